"""
Run the study, or go on with it: one run after the other, a row for each in `results/PHASE.jsonl`.

    python examples/study/run.py --phase pilot --arms grpo --seeds 900 901 --steps 80
    python examples/study/run.py --phase main --core 0 --hours 8

`PLAN.md` says what the phases are. Runs that have a row are not run again; one that was cut off goes on from its last
checkpoint. The pilot's regime is set by flags, that of all other phases is `regime.yaml`'s, and they want code that is committed.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from one_run import Run, perform
from plan import PHASES, arm_settings
from regime import Regime, changed, registered_regime
from rows import append_row, key_of, locked, read_rows
from trl import TrlParser


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# What decides, besides the regime and the settings in its row, how a run comes out …
CODE = [
    "trl_epo",
    "examples/quickstart.py",
    "examples/shared.py",
    *(f"examples/study/{name}.py" for name in ("one_run", "regime", "rows", "run")),
]
# … and where those are from. Both have to be committed; all else may change while the study runs.
PLAN = [f"examples/study/{name}" for name in ("plan.py", "regime.yaml", "tuned.yaml")]
PACKAGES = ("torch", "transformers", "trl", "accelerate", "tokenizers", "datasets", "numpy")


@dataclass
class StudyArguments:
    phase: str = field(metadata={"help": "Part of the plan.", "choices": tuple(PHASES)})
    arms: list[str] | None = field(default=None, metadata={"help": "Names; by default those of the phase."})
    seeds: list[int] | None = field(default=None, metadata={"help": "By default those of the phase."})
    output_dir: str = field(default="runs/study", metadata={"help": "For warm starts and unfinished runs."})
    results: str | None = field(default=None, metadata={"help": "By default results/PHASE.jsonl beside this file."})
    hours: float = field(default=float("inf"), metadata={"help": "No run is begun after this time."})
    core: int | None = field(default=None, metadata={"help": "The core to stay on (Linux)."})


def commit_of_code() -> str:
    """
    The last commit that changed the code of a run; with a `+` if that code, or the plan's data, has changes that are not
    committed, and `unknown` outside of a repository.
    """
    if not (ROOT / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changes = git("status", "--porcelain", "--", *CODE, *PLAN)
    return git("log", "-1", "--format=%H", "--", *CODE) + ("+" if changes else "")


def versions() -> dict[str, str]:
    """What the figures depend on besides the code."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found, "processor": _processor()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def planned(script: StudyArguments, regime: Regime) -> list[Run]:
    """
    The runs that the arguments ask for: all arms of a seed, then those of the next.

    Raises:
        ValueError: If something is not in the plan, or not settled yet.
    """
    phase, commit = PHASES[script.phase], commit_of_code()
    arms, seeds = script.arms or phase.arms, script.seeds or phase.seeds
    if script.phase == "pilot":
        if not arms or not seeds:
            raise ValueError("The pilot has no runs of its own: say --arms and --seeds.")
    else:
        if flags := changed(regime):
            raise ValueError(f"{sorted(flags)} can be set for the pilot only; phase {script.phase!r} is registered.")
        if others := sorted({*arms} - {*phase.arms}) + sorted({*seeds} - {*phase.seeds}):
            raise ValueError(f"{others} are not in phase {script.phase!r} of the plan.")
        if commit.endswith("+") or commit == "unknown":
            raise ValueError(
                f"The code's commit is {commit!r}, but a registered run needs code and a plan that are committed."
            )
        regime = registered_regime()
    return [
        Run(script.phase, arm, seed, regime, arm_settings(arm, regime), commit, Path(script.output_dir))
        for seed in seeds
        for arm in arms
    ]


def left_to_do(runs: list[Run], file: Path) -> list[Run]:
    """
    The runs that have no row yet.

    Raises:
        ValueError: If the rows that are there cannot stand beside those to come: the same run with another regime or other
            settings, or, but for the pilot, rows of other code.
    """
    there = {key_of(row): row for row in read_rows(file)}
    for run in runs:
        row = there.get(run.key)
        if row and (row["regime"], row["settings"]) != (asdict(run.regime), run.settings):
            raise ValueError(
                f"{file} has a row of {run.key} with another regime or other settings. Give another file (--results)."
            )
    commits = {run.commit for run in runs}
    others = {row["commit"] for row in there.values()} - commits
    if others and runs[0].phase != "pilot":
        raise ValueError(
            f"{file} has rows of commit {', '.join(sorted(others))}, but the code is at {', '.join(commits)}: check that "
            "commit out, or give another file (--results)."
        )
    return [run for run in runs if run.key not in there]


def main() -> None:
    script, regime = TrlParser((StudyArguments, Regime)).parse_args_and_config()
    if script.core is not None:
        os.sched_setaffinity(0, {script.core})
    torch.set_num_threads(1)
    file = Path(script.results or HERE / "results" / f"{script.phase}.jsonl")
    end = time.monotonic() + 3600 * script.hours
    runs = planned(script, regime)
    with locked(Path(script.output_dir, "lock"), wait=False):
        for number, run in enumerate(left := left_to_do(runs, file), start=1):
            if time.monotonic() > end:
                print("The time is up; the same command goes on.", flush=True)
                return
            print(f"Run {number} of {len(left)}: {run.arm}, seed {run.seed} …", flush=True)
            row = {**perform(run), "versions": versions()}
            append_row(file, row)
            shutil.rmtree(run.folder, ignore_errors=True)
            print({name: row[name] for name in row if name.startswith("success") or name in ("error", "diverged")})


if __name__ == "__main__":
    main()
