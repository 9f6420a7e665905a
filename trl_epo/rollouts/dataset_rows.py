"""Dataset rows of text episodes: what they may hold, and rows for environments that need none."""

from numbers import Integral
from typing import Any, NamedTuple

from datasets import Dataset

from ..config import EPOConfig
from ..text import info_taken_in, printable, shown, taken_in
from .environment_pool import EnvironmentPool


# Columns of a dataset row that the trainer itself uses; the others are the environment's options.
TRAINER_COLUMNS = ("prompt", "seed", "environment")


def environment_options(row: dict[str, Any]) -> dict[str, Any]:
    """What of a dataset row goes to `reset(options=…)`: its columns that have a value, less the trainer's own."""
    return {name: value for name, value in row.items() if name not in TRAINER_COLUMNS and value is not None}


def placeholder_dataset(args: EPOConfig, pool: EnvironmentPool) -> Dataset:
    """Empty rows for environments that need no dataset: one generation batch of them."""
    if pool.named:
        raise ValueError(
            "Several environments need a `train_dataset` whose `environment` column names each row's environment."
        )
    if args.max_steps <= 0:
        raise ValueError(
            f"`max_steps` is {args.max_steps}, but without a `train_dataset` it must be positive: it says how long to "
            "train. Set `EPOConfig(max_steps=…)`."
        )
    num_rows = args.generation_batch_size // args.num_generations
    return Dataset.from_dict({"seed": [None] * num_rows})


class FirstRow(NamedTuple):
    """The dataset's first row: its prompt, and what `reset` answered to it."""

    prompt: list[dict[str, Any]]
    observation: str
    info: dict[str, Any]


def check_first_row(pool: EnvironmentPool, dataset, max_observation_length: int | None) -> FirstRow:
    """Reset an environment with the dataset's first row, so that a misfit shows before any training time is spent."""
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError("`train_dataset` is empty, but must have at least one row.")
    prompt = row.get("prompt")
    if prompt is not None and not isinstance(prompt, list):
        raise ValueError(
            f"The dataset's `prompt` is {shown(prompt)}, but text episodes need a list of messages, e.g. "
            '`[{"role": "system", "content": "You are …"}]`, or no such column.'
        )
    seed = row.get("seed")
    if seed is not None and (not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0):
        raise ValueError(
            f"The `seed` of the dataset's first row is {shown(seed)}, but must be a whole number of at least 0, with which "
            "the environment is reset, or there must be no such column."
        )
    name = row.get("environment") if pool.named else None
    if name not in pool.names:
        raise ValueError(
            f"The first row of the dataset has `environment={name!r}`, but must name one of {pool.names} (the keys of "
            "`environment_factory`)."
        )
    worker = pool.take(name)
    options = environment_options(row)
    try:
        observation, info = pool.wait_for(worker.reset(seed=0, options=options))
    except Exception as error:
        pool.discard(worker)
        raise ValueError(
            f"The environment {worker.kind} could not be reset with the dataset's first row {shown(options)}: "
            f"{printable(str(error)).removesuffix('.')}. `trl_epo.check_env` tells what is wrong with an environment."
        ) from error
    pool.give_back(name, worker)
    return FirstRow(
        prompt or [],
        taken_in(observation, max_observation_length),
        info_taken_in(info, max_observation_length),
    )
