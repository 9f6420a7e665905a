"""
How fast ALFWorld plays and how much memory it takes, against TextWorld as it comes ("stock"):

    pip install -e ".[alfworld]" psutil
    ALFWORLD_DATA=… python examples/benchmarks/alfworld_speed.py --split train --games 24 --environments 64

The same games with the same random admissible commands are played three times, each time in a new process: by TextWorld, by
`LocalAlfWorld` with nothing translated before, and by `LocalAlfWorld` with all translated before. Then `AlfWorld` plays
them in a process of its own, which tells what the pipe costs. At last many `AlfWorld` play at once. Times are CPU-seconds of
all processes unless it says otherwise. Translations go to a new folder that is removed in the end.

`--generate` makes games and plays these, without a download.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import cloudpickle
import psutil

from trl_epo.envs import TextEnv
from trl_epo.envs.alfworld import AlfWorld, LocalAlfWorld, tasks, write_games
from trl_epo.envs.process import ProcessEnv


MB = 2**20


class Stock(TextEnv):
    """A game, played by TextWorld."""

    def __init__(self):
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld import EnvInfos
        from textworld.envs.pddl import PddlEnv

        self.world = AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)))

    def reset(self, *, seed=None, options=None):
        self.world.load(json.loads(Path(options["game"]).read_text()))
        state = self.world.reset()
        return state.feedback, {"success": state["won"], "admissible_actions": state["admissible_commands"]}

    def step(self, action):
        state, _, done = self.world.step(action)
        info = {"success": state["won"], "admissible_actions": state["admissible_commands"]}
        return state.feedback, float(state["won"]), done, False, info


def family() -> list[psutil.Process]:
    """The processes that this one has started, and theirs."""
    return psutil.Process().children(recursive=True)


def cpu_seconds(others: list[psutil.Process]) -> float:
    """Of this process and others."""
    return time.process_time() + sum(map(cpu_seconds_of, others))


def cpu_seconds_of(process: psutil.Process) -> float:
    try:
        nanoseconds, *_ = Path(f"/proc/{process.pid}/schedstat").read_text().split()  # of its first thread
        return int(nanoseconds) / 1e9
    except FileNotFoundError:
        times = process.cpu_times()  # in hundredths of a second
        return times.user + times.system


def play(env: TextEnv, games: list[str], num_steps: int, seed: int) -> dict[str, Any]:
    """Plays `num_steps` random admissible commands of each game; clocks of resets and steps, and a digest of all answers."""
    draws, answers = random.Random(seed), hashlib.sha256()
    resets, steps, wall, count = [], 0.0, 0.0, 0
    others = family()
    for game in games:
        start = cpu_seconds(others)
        observation, info = env.reset(options={"game": game})
        resets.append(cpu_seconds(others) - start)
        start, started = cpu_seconds(others), time.perf_counter()
        for _ in range(num_steps):
            answers.update(json.dumps([observation, info["admissible_actions"], info["success"]]).encode())
            if info["success"]:
                break
            observation, *_, info = env.step(draws.choice(info["admissible_actions"]))
            count += 1
        steps += cpu_seconds(others) - start
        wall += time.perf_counter() - started
    return {"resets": resets, "steps": steps, "wall": wall, "count": count, "answers": answers.hexdigest()}


def play_new(make: Callable[[], TextEnv], games: list[str], num_steps: int, seed: int) -> dict[str, Any]:
    env = make()
    env.reset(options={"game": games[0]})  # imports, or the start of a process
    result = play(env, games, num_steps, seed)
    result["memory"] = psutil.Process().memory_info().rss / MB
    env.close()
    return result


def stock_in_a_process() -> TextEnv:
    cloudpickle.register_pickle_by_value(sys.modules[Stock.__module__])  # this script
    return ProcessEnv(Stock)


def without_turns() -> TextEnv:
    return LocalAlfWorld(turns=None)


def piped_without_turns() -> TextEnv:
    return AlfWorld(turns=None)


def play_many(make: Callable[[], TextEnv], can_fork: bool, games: list[str], count: int, num_steps: int) -> dict:
    """`count` environments at once, each on a thread: their start with a first reset, and random steps."""
    import_module("trl_epo.envs.fork_server").CAN_FORK = can_fork  # not public: only to compare
    envs = [make() for _ in range(count)]

    def start(number: int) -> list[str]:
        return envs[number].reset(options={"game": games[number % len(games)]})[1]["admissible_actions"]

    def steps(number: int) -> int:
        draws, actions = random.Random(number), admissible[number]
        for count in range(num_steps):  # noqa: B007
            *_, info = envs[number].step(draws.choice(actions))
            actions = info["admissible_actions"]
            if info["success"]:
                break
        return count + 1

    with ThreadPoolExecutor(count) as pool:
        cpu, wall = cpu_seconds([]), time.perf_counter()
        admissible = list(pool.map(start, range(count)))
        result = {"start": time.perf_counter() - wall}
        others = family()
        result["start_cpu"] = cpu_seconds(others) - cpu
        cpu, wall = cpu_seconds(others), time.perf_counter()
        done = sum(pool.map(steps, range(count)))
        result |= {"cpu": cpu_seconds(others) - cpu, "wall": time.perf_counter() - wall, "steps": done}
    result["memory"] = sum(process.memory_full_info().pss for process in others) / MB
    for env in envs:
        env.close()
    return result


def in_a_new_process(function: Callable, *args: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def show(name: str, result: dict[str, Any], resets: list[float]) -> None:
    print(
        f"{name}: {result['count'] / result['steps']:.0f} steps/CPU-s, reset median {statistics.median(resets):.3f}, "
        f"max {max(resets):.3f} CPU-s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--split", default="train")
    parser.add_argument("--data", help="the folder that holds json_2.1.1")
    parser.add_argument("--generate", action="store_true", help="play generated games instead")
    parser.add_argument("--games", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50, help="random steps in each game")
    parser.add_argument("--environments", type=int, default=64, help="how many play at once")
    parser.add_argument("--stock_environments", type=int, default=8, help="how many by TextWorld")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        if args.generate:
            write_games(folder, args.split, args.games)
        rows = tasks(args.split, data=folder if args.generate else args.data)
        games = random.Random(args.seed).sample(rows["game"], min(args.games, len(rows)))
        work = (games, args.steps, args.seed)
        stock = in_a_new_process(play_new, Stock, *work)
        first = in_a_new_process(play_new, without_turns, *work)
        again = in_a_new_process(play_new, without_turns, *work)
        piped = in_a_new_process(play_new, piped_without_turns, *work)
        print(f"{len(games)} games, {stock['count']} random steps, seed {args.seed}")
        show("stock", stock, stock["resets"])
        show("LocalAlfWorld, not translated before", first, first["resets"][1:] or first["resets"])
        show("LocalAlfWorld, translated before", again, again["resets"])
        show("AlfWorld, translated before", piped, piped["resets"])
        same = len({each["answers"] for each in (stock, first, again, piped)}) == 1
        print("the answers are the same" if same else "THE ANSWERS DIFFER")
        pipe = 1e6 * (piped["steps"] / piped["count"] - again["steps"] / again["count"])
        print(f"the pipe: {pipe:.0f} CPU-us a step; steps/s of one environment: {piped['count'] / piped['wall']:.0f}")
        for name, make, can_fork, count in (
            ("stock, an interpreter each", stock_in_a_process, False, args.stock_environments),
            ("AlfWorld, an interpreter each", AlfWorld, False, args.environments),
            ("AlfWorld, forked", AlfWorld, True, args.environments),
        ):
            many = in_a_new_process(play_many, make, can_fork, games, count, min(args.steps, 50))
            print(
                f"{count} at once, {name}: start and first reset {many['start']:.1f} s, {many['start_cpu']:.1f} CPU-s; "
                f"{many['steps'] / many['wall']:.0f} steps/s, {many['steps'] / many['cpu']:.0f} steps/CPU-s; "
                f"memory {many['memory']:.0f} MB, {many['memory'] / count:.1f} MB each"
            )


if __name__ == "__main__":
    main()
