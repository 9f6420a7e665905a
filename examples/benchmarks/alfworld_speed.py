"""
How fast ALFWorld plays and how much memory it takes, each environment in a process of its own:

    pip install -e ".[alfworld]" psutil
    ALFWORLD_DATA=… python examples/benchmarks/alfworld_speed.py --split train --environments 2

Each environment plays its share of the split's games, each once, by the solution that comes with the game. Resets are
of another game each time, as in training; the first reset of each environment, which starts its process, counts apart.
`--generate GAMES` makes games and plays these, without a download.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import psutil

from trl_epo.envs.alfworld import AlfWorld, expert_actions, tasks
from trl_epo.envs.alfworld_games import write_games


MB = 2**20


def play(rows: list[dict]) -> tuple[AlfWorld, list[float], list[float], int]:
    """Plays games; returns the environment, the seconds of the resets and of the steps, and the number of successes."""
    env = AlfWorld()
    resets, steps, successes = [], [], 0
    for row in rows:
        start = time.perf_counter()
        _, info = env.reset(options=row)
        resets.append(time.perf_counter() - start)
        for action in expert_actions(row["game"]):
            start = time.perf_counter()
            *_, info = env.step(action)
            steps.append(time.perf_counter() - start)
        successes += info["success"]
    return env, resets, steps, successes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--split", default="train")
    parser.add_argument("--data", help="the folder that holds json_2.1.1")
    parser.add_argument("--generate", type=int, metavar="GAMES", help="plays as many generated games instead")
    parser.add_argument("--environments", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.generate:
            write_games(folder, args.split, args.generate)
        rows = list(tasks(args.split, data=folder if args.generate else args.data))
        shares = [rows[n :: args.environments] for n in range(args.environments)]
        with ThreadPoolExecutor(args.environments) as pool:
            played = list(pool.map(play, shares))
    workers = [child for child in psutil.Process().children() if "LokyProcess" in " ".join(child.cmdline())]
    memory = [worker.memory_info().rss / MB for worker in workers]
    for env, *_ in played:
        env.close()
    resets = [seconds for _, resets, _, _ in played for seconds in resets[1:]]
    firsts = [resets[0] for _, resets, _, _ in played]
    steps = [seconds for _, _, steps, _ in played for seconds in steps]
    print(f"{len(rows)} games, {args.environments} environments; solved: {sum(won for *_, won in played)}")
    print(f"first reset, with the process: {statistics.median(firsts):.1f} s (median)")
    if resets:
        print(f"reset: {min(resets):.1f} to {max(resets):.1f} s, median {statistics.median(resets):.1f} s")
    print(f"{len(steps)} steps, {len(steps) / sum(steps):.1f} a second and environment")
    print(f"memory of a process at the end: {min(memory):.0f} to {max(memory):.0f} MB")


if __name__ == "__main__":
    main()
