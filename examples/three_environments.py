"""
Train one agent in three environments at once, with success by environment:

    pip install -e ".[textarena,plot]"
    python examples/three_environments.py --output_dir runs/three

The household game, a game of guessing (the README's) and TextArena's FrozenLake. Each dataset row names its environment in the column
`environment`; its other columns go to that environment's `reset`. An RL step plays rows of all three, and each group of
episodes is compared within itself, so that an easy environment is no measure for a hard one.

A small Llama made on the spot imitates an expert of each environment until it sometimes succeeds, then EPO trains it. There is a
panel of rows that were never trained on for each environment, played before and after; in training
`episode/success_rate_in/<environment>` is logged. Every flag of EPOConfig works.
"""

from trl_epo import EPOConfig, EPOTrainer  # before torch: docs/speed.md, Few cores


# isort: split
import random
import time
from collections import deque
from dataclasses import dataclass, field

import gymnasium
from datasets import Dataset, concatenate_datasets
from quickstart import DEMO_SETTINGS, WARM_UP_SETTINGS, game_text, make_household, make_model, make_tokenizer
from shared import train_between_panels
from transformers import set_seed
from trl import TrlParser

from trl_epo.envs import TextEnv, household, textarena
from trl_epo.imitation import Demonstration, environment_expert, expert_episodes, warm_up


@dataclass
class ThreeArguments:
    warm_up_episodes: int = field(default=6000, metadata={"help": "Expert episodes to imitate, of all environments."})
    warm_up_learning_rate: float = field(default=6e-3, metadata={"help": "Learning rate of the imitation."})
    panel_size: int = field(default=100, metadata={"help": "Held-out rows of each environment."})


class Guess(TextEnv):
    """Guess a number, with a hint after each guess."""

    instructions = "Guess a number from 1 to 99. Answer with the number alone, for example: 50"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.secret = int(self.np_random.integers(1, 100))
        self.low, self.high = 1, 99
        return "Guess my number from 1 to 99.", {"success": False, "task": "guess"}

    def step(self, action):
        info = {"success": False, "task": "guess"}
        if not action.isdecimal():
            return "That is no number.", 0.0, False, False, {**info, "invalid_action": True}
        guess = int(action)
        if guess == self.secret:
            return "Right!", 1.0, True, False, {**info, "success": True}
        if guess < self.secret:
            self.low = max(self.low, guess + 1)
            return "Higher.", 0.0, False, False, info
        self.high = min(self.high, guess - 1)
        return "Lower.", 0.0, False, False, info

    def expert_action(self) -> str:
        return str((self.low + self.high) // 2)


def way_over_the_lake(observation: str, info: dict) -> str:
    """The first step of a shortest way to the goal around the holes, from the board that the game shows."""
    board = [line.strip("|").split("|") for line in observation.splitlines() if line.startswith("|")]
    cells = {(row, column): cell.strip() for row, line in enumerate(board) for column, cell in enumerate(line)}
    start = next(place for place, cell in cells.items() if cell == "P")
    first_steps, queue = {start: ""}, deque([start])
    while cells[place := queue.popleft()] != "G":
        row, column = place
        for step, to in (
            ("down", (row + 1, column)), ("right", (row, column + 1)), ("up", (row - 1, column)), ("left", (row, column - 1))
        ):  # fmt: skip
            if cells.get(to, "H") != "H" and to not in first_steps:
                first_steps[to] = first_steps[place] or f"[{step}]"
                queue.append(to)
    return first_steps[place]


def expert(env: gymnasium.Env):
    """Who knows what to do in each environment."""
    return way_over_the_lake if isinstance(env.unwrapped, textarena.TextArena) else environment_expert(env)


# The warm-up teaches the commands of each, which is why no instructions are given.
def make_guess() -> Guess:
    env = Guess()
    env.instructions = None
    return env


def make_lake() -> textarena.TextArena:
    return textarena.TextArena("FrozenLake-v0", instructions=None)


FACTORIES = {"household": make_household, "guess": make_guess, "lake": make_lake}


def rows_of(environment: str, split: str, size: int, seed: int, turns: int) -> Dataset:
    """Rows of one environment, which they name."""
    if environment == "household":
        rows = household.tasks(split, size, rooms=2, turns=turns, seed=seed)
    else:
        rows = textarena.tasks(split, size, games="FrozenLake-v0", seed=seed)
        rows = rows if environment == "lake" else rows.remove_columns("game")  # a seed is all that Guess needs
    return rows.add_column("environment", [environment] * size)


def mixed(split: str, size: int, seed: int, turns: int) -> Dataset:
    """As many rows of each environment, shuffled; columns that an environment does not have are empty."""
    each = [rows_of(name, split, size // len(FACTORIES), seed, turns) for name in FACTORIES]
    return concatenate_datasets(each).shuffle(seed=seed)


def main() -> None:
    parser = TrlParser((ThreeArguments, EPOConfig))
    parser.set_defaults(**{**DEMO_SETTINGS, "output_dir": "runs/three", "per_device_train_batch_size": 96})
    script, args = parser.parse_args_and_config()
    set_seed(args.seed)
    start = time.perf_counter()

    warm_up_rows = mixed("train", script.warm_up_episodes, seed=1, turns=args.max_turns)
    groups = args.generation_batch_size // args.num_generations
    train_rows = mixed("train", args.max_steps * groups, seed=2, turns=args.max_turns)
    panels = {name: rows_of(name, "iid", script.panel_size, seed=3, turns=args.max_turns) for name in FACTORIES}

    texts = []
    for name, make in FACTORIES.items():
        env = Demonstration(make(), expert, draw=random.Random(args.seed))
        rows = (row for row in warm_up_rows.select(range(min(1000, len(warm_up_rows)))) if row["environment"] == name)
        known = [{column: value for column, value in row.items() if value is not None} for row in rows]
        texts += game_text(env, [{k: v for k, v in row.items() if k != "environment"} for row in known])
    tokenizer = make_tokenizer(texts)
    trainer = EPOTrainer(
        make_model(tokenizer),
        args=args,
        train_dataset=train_rows,
        eval_dataset=panels,
        processing_class=tokenizer,
        environment_factory=FACTORIES,
    )
    print(f"Warm-up on {len(warm_up_rows)} expert episodes …", flush=True)
    warm_up(
        trainer,
        expert_episodes(trainer, warm_up_rows, expert=expert),
        learn_observations=True,
        per_device_train_batch_size=4,
        learning_rate=script.warm_up_learning_rate,
        **WARM_UP_SETTINGS,
    )
    train_between_panels(trainer, "household, guess, lake", start)


if __name__ == "__main__":
    main()
