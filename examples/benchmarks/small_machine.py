"""
What a busy core costs a run on few cores: RL steps of a small policy, alone and beside a program that keeps one core busy, each
in a process of its own:

    python examples/benchmarks/small_machine.py --json small_machine.json

PyTorch's threads wait for each other in the loop of libgomp, so many rounds of it before they give up their core; `import trl_epo`
sets 3,000. All processes train the same warm policy on the same rows; the first step is not timed.
"""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

from common import save_json, show
from quickstart import (
    DEMO_SETTINGS,
    WARM_UP_SETTINGS,
    game_text,
    make_household,
    make_model,
    make_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import TrlParser

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs import household
from trl_epo.imitation import Demonstration, environment_expert, expert_episodes, warm_up


LIBGOMP = 300_000  # its number where nothing is said
WAYS = {f"waits {spins:,} rounds": {"GOMP_SPINCOUNT": str(spins)} for spins in (LIBGOMP, 10_000, 3_000, 1_000, 300)}
WAYS["one thread"] = {"OMP_NUM_THREADS": "1"}
KNOBS = {"rooms": 2, "turns": DEMO_SETTINGS["max_turns"]}


@dataclass
class SmallMachineArguments:
    steps: int = field(default=4, metadata={"help": "RL steps to time."})
    warm_up_episodes: int = field(default=1500, metadata={"help": "Expert episodes to imitate."})
    json: str | None = field(default=None, metadata={"help": "File for the rows as JSON, rewritten after each."})
    measure: str | None = field(
        default=None, metadata={"help": "Only measure the policy in this folder; the other runs use it."}
    )


class Clock(TrainerCallback):
    """When each step began, and when training ended."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    def on_train_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def make_trainer(model, tokenizer, folder: str, steps: int) -> EPOTrainer:
    settings = {**DEMO_SETTINGS, "output_dir": f"{folder}/run", "max_steps": steps, "disable_tqdm": True}
    return EPOTrainer(
        model,
        args=EPOConfig(**settings),
        train_dataset=household.tasks("train", 8 * steps, **KNOBS, seed=2),
        processing_class=tokenizer,
        environment_factory=make_household,
    )


def make_warm_policy(script: SmallMachineArguments, folder: str) -> None:
    set_seed(0)
    rows = household.tasks("train", script.warm_up_episodes, **KNOBS, seed=1)
    env = Demonstration(make_household(), environment_expert, noise=0.3, draw=random.Random(0))
    tokenizer = make_tokenizer(game_text(env, rows))
    trainer = make_trainer(make_model(tokenizer), tokenizer, folder, 1)
    warm_up(
        trainer,
        expert_episodes(trainer, rows, noise=0.3, learn_mistakes=True),
        learn_observations=True,
        per_device_train_batch_size=4,
        learning_rate=6e-3,
        **WARM_UP_SETTINGS,
    )
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: str, steps: int) -> None:
    """Seconds of `steps` RL steps, on standard output."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trainer = make_trainer(model, tokenizer, folder, steps + 1)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    print(json.dumps({"seconds": clock.times[-1] - clock.times[1]}))


@contextmanager
def a_busy_core():
    program = [
        sys.executable,
        "-c",
        "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass",
    ]
    with subprocess.Popen(program) as busy:
        try:
            yield
        finally:
            busy.kill()


def seconds(folder: str, steps: int, way: dict[str, str]) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, __file__, "--measure", folder, "--steps", str(steps)]
    run = subprocess.run(command, env={**environment, **way}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])["seconds"]


def main() -> None:
    (script,) = TrlParser(SmallMachineArguments).parse_args_and_config()
    if script.measure:
        measure(script.measure, script.steps)
        return
    rows = []
    with TemporaryDirectory() as folder:
        make_warm_policy(script, folder)
        for name, way in WAYS.items():
            alone = seconds(folder, script.steps, way)
            with a_busy_core():
                beside = seconds(folder, script.steps, way)
            rows.append({"threads": name, "alone, s": alone, "beside a busy core, s": beside})
            first = rows[0]["alone, s"]
            rows[-1] |= {"alone, ratio": alone / first, "beside a busy core, ratio": beside / first}
            save_json(script.json, rows, vars(script))
            show(rows, f"{script.steps} RL steps")


if __name__ == "__main__":
    main()
