"""
A small new policy learns ALFWorld: EPO's term with group-relative advantages of turns, or with PPO's critic, on games of all six
kinds that are drawn here.

    pip install -e ".[alfworld,plot]"
    python examples/alfworld_small.py --output_dir runs/alfworld-small/turn-0 --warm_start runs/alfworld-small/warm-0 --seed 0
    python examples/alfworld_small.py --output_dir runs/alfworld-small/ppo-0 --warm_start runs/alfworld-small/warm-0 --seed 0 \\
        --advantage_estimator gae --gamma 1 --critic_learning_rate 1e-3 --critic_warmup_steps 5 --gae_lambda 0.95

A new Llama with a tokenizer trained on the game's text imitates an expert that looks for things and errs in three of ten turns (the
warm-up), on drawn games and, with --data, on ALFWorld's own train games, until it wins a quarter of 100 other drawn games. Then it is trained on
drawn games. The panels are 200 drawn games of other seeds (`iid`) and, with --data, ALFWorld's own valid_seen games, each played
four times (`real`). What is there already is not done again: games, the warm policy, the first panels, and the steps up to the
last checkpoint.
"""

from trl_epo import EPOConfig, EPOTrainer  # before torch: docs/speed.md, Few cores


# isort: split
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from quickstart import DEMO_SETTINGS, WARM_UP_SETTINGS, game_text, make_model, make_tokenizer
from shared import train_between_panels
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from trl_epo.envs.alfworld import AlfWorld, tasks, write_games
from trl_epo.imitation import Demonstration, environment_expert, expert_episodes, warm_up


@dataclass
class AlfWorldArguments:
    games: str = field(default="runs/alfworld-games", metadata={"help": "Folder for the games that are drawn."})
    data: str | None = field(default=None, metadata={"help": "Folder of ALFWorld's own games."})
    names: list[str] | None = field(default=None, metadata={"help": "Kinds of task; by default all six."})
    warm_start: str = field(default="runs/alfworld-small/warm", metadata={"help": "Folder of the warm policy."})
    warm_up_games: int = field(default=2000, metadata={"help": "Drawn games whose expert is imitated."})
    warm_up_epochs: float = field(default=4.0, metadata={"help": "Passes over them, at most."})
    until_success: float = field(default=0.25, metadata={"help": "Success at which the warm-up ends."})
    noise: float = field(default=0.3, metadata={"help": "Share of the expert's turns that are mistakes."})
    panel_size: int = field(default=200, metadata={"help": "Drawn games to play before and after."})


SETTINGS = {
    **DEMO_SETTINGS,
    "output_dir": "runs/alfworld-small/run",
    "max_steps": 150,
    "per_device_eval_batch_size": 100,
    "max_turns": 30,
    "max_turn_length": 16,
    "learning_rate": 3e-4,
    # A turn is worth what follows it, so that a turn wasted counts; an invalid one costs a fiftieth of a success, also
    # where none of a group succeeds: scaled by the batch, or there this would be all that is learned
    "advantage_estimator": "turn",
    "gamma": 0.95,
    "scale_rewards": "batch",
    "invalid_action_penalty": 0.02,
    "environment_patience": 30.0,  # a game takes seconds to load
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 5,
    "save_total_limit": 1,
}


def drawn(script: AlfWorldArguments, split: str, size: int, seed: int) -> Dataset:
    """`size` games that are drawn with `seed`, written once."""
    folder = Path(script.games, f"{split}-{seed}-{size}")
    if not (folder / "written").exists():
        write_games(folder, split, size, script.names, seed)
        (folder / "written").touch()
    return tasks(split, script.names, folder).shuffle(seed=seed)


def main() -> None:
    parser = TrlParser((AlfWorldArguments, EPOConfig))
    parser.set_defaults(**SETTINGS)
    script, args = parser.parse_args_and_config()
    set_seed(args.seed)
    start = time.perf_counter()
    factory = partial(AlfWorld, turns=args.max_turns, instructions=None, repeat_task=True, searching_expert=True)
    panels = {"iid": drawn(script, "valid_seen", script.panel_size, 0)}
    if script.data:
        real = tasks("valid_seen", script.names, script.data)
        panels["real"] = concatenate_datasets([real] * 4)

    warm, warm_up_rows = Path(script.warm_start), None
    if not (warm / "model.safetensors").exists():
        warm_up_rows = drawn(script, "train", script.warm_up_games, 1000 + args.seed)
        if script.data:
            real = tasks("train", script.names, script.data)
            warm_up_rows = concatenate_datasets([warm_up_rows, real]).shuffle(seed=args.seed)
        words = warm_up_rows.select(range(min(500, len(warm_up_rows))))
        tokenizer = make_tokenizer(game_text(Demonstration(factory(), environment_expert), words))
        model = make_model(tokenizer, 4096, hidden_size=160, intermediate_size=480, num_hidden_layers=3)
    else:
        tokenizer, model = AutoTokenizer.from_pretrained(warm), AutoModelForCausalLM.from_pretrained(warm)
    trainer = EPOTrainer(
        model,
        args=args,
        train_dataset=drawn(script, "train", args.max_steps * 8, 2000 + args.seed),
        eval_dataset=panels if warm_up_rows is None else drawn(script, "valid_seen", 100, 1),
        processing_class=tokenizer,
        environment_factory=factory,
    )
    if warm_up_rows is not None:
        print(f"Policy: {model.num_parameters():,} weights. The expert plays {len(warm_up_rows)} games …", flush=True)
        episodes = expert_episodes(trainer, warm_up_rows, noise=script.noise)
        print(
            f"Warm-up on {len(episodes)} episodes after {(time.perf_counter() - start) / 60:.0f} minutes …", flush=True
        )
        warm_up(
            trainer,
            episodes,
            learn_observations=True,
            until_success=script.until_success,
            check_every=250,
            per_device_train_batch_size=4,
            **WARM_UP_SETTINGS | {"num_train_epochs": script.warm_up_epochs, "learning_rate": 2e-3},
        )
        tokenizer.save_pretrained(warm)
        trainer.model.save_pretrained(warm)
        trainer.eval_dataset = panels
    train_between_panels(trainer, "alfworld", start)


if __name__ == "__main__":
    main()
