"""
How fast ScienceWorld steps and how much memory it takes, with all environments in one Java virtual machine (JVM), as
`trl_epo` runs them, and with a process and a JVM for each:

    pip install -e ".[scienceworld,plot]"
    python examples/benchmarks/environments.py --json environments.json --plot environments.png

The tasks are rows of the train split, drawn with the seed. The environments step in rounds, a thread for each, as they
do while a model waits for all observations. Each takes the simulator's own solution of its task over and over: going,
looking, opening, carrying, measuring, waiting, in the proportions the tasks ask for, but for "focus on", which would
end the episode. From the second time on some of these actions fit nothing any more; `invalid_share` tells how many. An
action the simulator does not understand costs less, and is timed on its own as `invalid_steps_per_s`. As many steps as
are timed are taken before, for Java compiles the simulator while it runs. Episodes that end are begun again, within the
time. The memory is the resident set at the end, summed over the processes; pages that processes share count for each.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from trl_epo.envs.scienceworld import ScienceWorld, tasks


ONE, EACH = "one JVM", "one JVM each"
NONSENSE = "xyzzy"
MB = 2**20


class Player:
    """An environment and the actions it takes over and over."""

    def __init__(self, row: dict[str, Any]):
        self.row = row
        self.env = ScienceWorld()
        self.env.reset(options=row)
        solution = [action for action in self.env.expert_actions() if not action.startswith("focus on")]
        self.actions = solution or ["look around"]
        self.taken = 0

    def step(self, nonsense: bool) -> bool:
        action = NONSENSE if nonsense else self.actions[self.taken % len(self.actions)]
        self.taken += not nonsense
        _, _, terminated, _, info = self.env.step(action)
        if terminated:
            self.env.reset(options=self.row)
        return info["invalid_action"]


def work(rows: list[dict[str, Any]], rounds: int, barrier: Barrier, results: Connection) -> None:
    """A process with an environment for each row: plays, and sends what it measured."""
    with ThreadPoolExecutor(len(rows)) as pool:
        players = list(pool.map(Player, rows))

        def play(nonsense: bool) -> dict[str, Any]:
            barrier.wait()
            start = time.monotonic()
            invalid = sum(
                sum(pool.map(Player.step, players, [nonsense] * len(players)))
                for _ in tqdm(range(rounds), desc="invalid" if nonsense else "solutions", leave=False, disable=None)
            )
            return {"start": start, "end": time.monotonic(), "invalid": invalid}

        python = psutil.Process()
        (java,) = python.children()

        def cpu_seconds() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in (python, java))

        play(nonsense=False)
        before = cpu_seconds()
        measured = {"solutions": play(nonsense=False), "cpu_s": cpu_seconds() - before}
        play(nonsense=True)
        measured["nonsense"] = play(nonsense=True)
        measured["python_rss"], measured["jvm_rss"] = python.memory_info().rss, java.memory_info().rss
        results.send(measured)


def measure(rows: list[dict[str, Any]], arrangement: str, rounds: int) -> dict[str, Any]:
    shares = [rows] if arrangement == ONE else [[row] for row in rows]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(shares))
    processes, pipes = [], []
    for share in shares:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(share, rounds, barrier, sender), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    parts = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()

    steps = rounds * len(rows)

    def per_second(name: str) -> float:
        seconds = max(part[name]["end"] for part in parts) - min(part[name]["start"] for part in parts)
        return round(steps / seconds, 1)

    return {
        "environments": len(rows),
        "arrangement": arrangement,
        "steps": steps,
        "steps_per_s": per_second("solutions"),
        "invalid_share": round(sum(part["solutions"]["invalid"] for part in parts) / steps, 3),
        "invalid_steps_per_s": per_second("nonsense"),
        "cpu_s": round(sum(part["cpu_s"] for part in parts), 2),
        "python_rss_mb": round(sum(part["python_rss"] for part in parts) / MB),
        "jvm_rss_mb": round(sum(part["jvm_rss"] for part in parts) / MB),
        "admissible_actions": False,
    }


def show(results: list[dict[str, Any]]) -> None:
    columns = ["environments", "arrangement", "steps_per_s", "invalid_steps_per_s", "invalid_share", "cpu_s"]
    columns += ["python_rss_mb", "jvm_rss_mb"]
    lines = [columns]
    for result in results:
        if "skipped" in result:
            lines.append([str(result["environments"]), result["arrangement"], result["skipped"]])
        else:
            lines.append([str(result[column]) for column in columns])
    for line in lines:
        print("  ".join(text.ljust(len(column)) for text, column in zip(line, columns, strict=False)).rstrip())


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for arrangement in (ONE, EACH):
        chosen = [r for r in results if r["arrangement"] == arrangement and "skipped" not in r]
        counts = [r["environments"] for r in chosen]
        speed.plot(counts, [r["steps_per_s"] for r in chosen], "o-", label=arrangement)
        memory.plot(counts, [(r["python_rss_mb"] + r["jvm_rss_mb"]) / 1024 for r in chosen], "o-", label=arrangement)
    for axes, title in ((speed, "Steps per second"), (memory, "Memory of Python and Java, GB")):
        axes.set(title=title, xlabel="environments", xscale="log", ylim=(0, None))
        ticks = sorted({r["environments"] for r in results})
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=4096, help="steps of a row of the table, of all its environments")
    parser.add_argument("--seed", type=int, default=0, help="draws the tasks")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="file for a figure")
    args = parser.parse_args()
    if min(*args.environments, args.steps) < 1:
        parser.error("--environments and --steps must be positive")

    rows = list(tasks("train").shuffle(seed=args.seed).select(range(max(args.environments))))
    results = []
    one_process_mb = 0.0
    for count in tqdm(sorted(args.environments), desc="environments", file=sys.stderr):
        for arrangement in (ONE, EACH):
            free_mb = psutil.virtual_memory().available / MB
            if arrangement == EACH and count * one_process_mb > 0.9 * free_mb:
                needed, free = count * one_process_mb / 1024, free_mb / 1024
                skipped = f"skipped: needs about {needed:.1f} GB, {free:.1f} GB are free"
                results.append({"environments": count, "arrangement": arrangement, "skipped": skipped})
                continue
            result = measure(rows[:count], arrangement, max(1, args.steps // count))
            results.append(result)
            memory_mb = (result["python_rss_mb"] + result["jvm_rss_mb"]) / (count if arrangement == EACH else 1)
            one_process_mb = one_process_mb or memory_mb
    show(results)
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "rows": results}, indent=2) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
