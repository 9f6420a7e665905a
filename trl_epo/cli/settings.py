"""What a command is told: its config file and its flags."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
from datasets import Dataset
from trl import ModelConfig, TrlParser

from ..config import EPOConfig
from ..reports import PLAY_SETTINGS_FILE, play_settings
from .usage import UsageError


class BuiltIn(NamedTuple):
    """Where an environment of this package is, and the function that gives its rows."""

    environment: str
    tasks: str


# Each knows the splits "train", "iid" and, but for OpenEnv, "ood".
ENVIRONMENTS = {
    "household": BuiltIn("trl_epo.envs.household:Household", "trl_epo.envs.household:tasks"),
    "scienceworld": BuiltIn("trl_epo.envs.scienceworld:ScienceWorld", "trl_epo.envs.scienceworld:tasks"),
    "alfworld": BuiltIn("trl_epo.envs.alfworld:AlfWorld", "trl_epo.envs.alfworld:tasks"),
    "textarena": BuiltIn("trl_epo.envs.textarena:TextArena", "trl_epo.envs.textarena:tasks"),
    "openenv": BuiltIn("trl_epo.envs.openenv:OpenEnv", "trl_epo.envs.openenv:tasks"),
}


@dataclass
class ScriptArguments:
    """
    What to act in and on which rows.

    Parameters:
        environment (`str`):
            `"household"`, `"scienceworld"`, `"alfworld"`, `"textarena"`, `"openenv"`, or `"module:attribute"`: something that
            makes an environment when called. Modules are looked for in the working directory too.
        environment_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of the environment (on the command line as JSON).
        tasks (`str`, *optional*):
            `"module:function"`: a function that gives the [`~datasets.Dataset`] of a split, called with the name of the
            split. If it takes `size` it is also given `size` and `seed`. Built-in environments have their own.
        tasks_kwargs (`dict` or `str`, *optional*):
            More keyword arguments of that function (on the command line as JSON).
        tasks_seed (`int`, *optional*, defaults to `0`):
            Which rows are drawn, if not all; the same whatever `seed` training has.
        train_split (`str`, *optional*, defaults to `"train"`):
            The split to train on.
        eval_splits (`list[str]`, *optional*, defaults to `["iid", "ood"]`):
            The splits that are evaluation sets, of which metrics get their names.
        train_size, eval_size (`int`, *optional*):
            Rows of the training split and of each evaluation set. `None`: all of them.
        resume (`bool`, *optional*, defaults to `False`):
            Train on from the newest whole checkpoint in `output_dir`, if there is one. (`resume_from_checkpoint` names one.)
        dry_run (`bool`, *optional*, defaults to `False`):
            Only play one batch and train on it, print an episode, figures and what the run would take, and write nothing.
        results (`str`, *optional*):
            The JSON file that `evaluate` writes. `None`: `evaluation.json` in `output_dir`.
    """

    environment: str = field(
        metadata={
            "help": "'household', 'scienceworld', 'alfworld', 'textarena', 'openenv', or 'module:attribute' of your own."
        }
    )
    environment_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of the environment, as JSON."}
    )
    tasks: str | None = field(
        default=None,
        metadata={"help": "'module:function' that gives the dataset of a split. None: the environment's."},
    )
    tasks_kwargs: dict | str | None = field(
        default=None, metadata={"help": "More keyword arguments of that function, as JSON."}
    )
    tasks_seed: int = field(default=0, metadata={"help": "Which rows are drawn, if not all."})
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    eval_splits: list[str] = field(
        default_factory=lambda: ["iid", "ood"], metadata={"help": "The splits that are evaluation sets."}
    )
    train_size: int | None = field(default=None, metadata={"help": "Rows to train on. None: all."})
    eval_size: int | None = field(default=None, metadata={"help": "Rows of each evaluation set. None: all."})
    resume: bool = field(
        default=False, metadata={"help": "Train on from the newest whole checkpoint in `output_dir`, if there is one."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Only play one batch and train on it, print what is in it and what the run would take."},
    )
    results: str | None = field(
        default=None, metadata={"help": "JSON file that `evaluate` writes. None: evaluation.json in `output_dir`."}
    )

    def __post_init__(self):
        for name in ("environment_kwargs", "tasks_kwargs"):
            setattr(self, name, _json_object(name, getattr(self, name)))
        if isinstance(self.eval_splits, str):  # a file may say so
            self.eval_splits = [self.eval_splits]
        for name in ("train_size", "eval_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"`{name}` is {size}, but must be at least 1; leave it out for all rows.")
        if self.environment not in ENVIRONMENTS and ":" not in self.environment:
            raise ValueError(
                f"`environment` is {self.environment!r}, but must be one of {', '.join(map(repr, ENVIRONMENTS))}, or "
                "'module:attribute'."
            )
        built_in = ENVIRONMENTS.get(self.environment)
        if self.tasks is None and built_in is not None:
            self.tasks = built_in.tasks
        for name in ("train_size", "eval_size", "tasks_kwargs"):
            if self.tasks is None and getattr(self, name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but `tasks` is not set, so that there are no rows. Give a "
                    "'module:function' that returns the dataset of a split, or leave it out."
                )

    def environment_factory(self) -> Callable:
        """What makes an environment; raises a `UsageError` if it makes none, or none that talks in text."""
        built_in = ENVIRONMENTS.get(self.environment)
        factory = _imported("environment", self.environment if built_in is None else built_in.environment)

        def make() -> gymnasium.Env:
            wrong = f"`environment` is {self.environment!r}, but called with {self.environment_kwargs} it"
            try:
                environment = factory(**self.environment_kwargs)
            except Exception as error:
                raise UsageError(f"{wrong} raises {type(error).__name__}: {error}") from error
            if not isinstance(environment, gymnasium.Env):
                raise UsageError(
                    f"{wrong} gives a {type(environment).__name__}. Name what makes a `gymnasium.Env`, such as a class "
                    "of your own that inherits from `trl_epo.envs.TextEnv`; `trl_epo.check_env` shows how to wrap another's."
                )
            return environment

        return make

    def rows(self, split: str, size: int | None) -> Dataset:
        """`size` rows of a split, or all of them."""
        tasks = _imported("tasks", self.tasks)
        kwargs = self.tasks_kwargs
        signature = inspect.signature(tasks)
        sized = "size" in signature.parameters
        if sized:
            if size is None:
                raise UsageError(
                    f"The tasks of {self.environment!r} have no end: set `train_size` and `eval_size`, the numbers of rows."
                )
            kwargs = {"size": size, "seed": self.tasks_seed, **kwargs}
        try:
            signature.bind(split, **kwargs)
        except TypeError as error:
            raise UsageError(
                f"`tasks_kwargs` is {self.tasks_kwargs}, but {self.tasks} takes {signature}: {error}."
            ) from error
        try:
            rows = tasks(split, **kwargs)
        except (ValueError, OSError) as error:
            raise UsageError(f"There are no rows of the split {split!r} with {kwargs}: {error}") from error
        if sized or size is None or size >= len(rows):
            return rows
        return rows.shuffle(seed=self.tasks_seed).select(range(size))

    def panels(self) -> dict[str, Dataset]:
        """The evaluation sets by name."""
        if self.tasks is None:
            raise UsageError(
                f"There is nothing to evaluate on: `tasks` is not set, and the environment {self.environment!r} is not "
                "one of this package's. Give a 'module:function' that returns the dataset of a split."
            )
        if not self.eval_splits:
            raise UsageError("`eval_splits` is empty: name at least one split to evaluate on, e.g. iid.")
        return {split: self.rows(split, self.eval_size) for split in self.eval_splits}


def save_play_settings(script: ScriptArguments, args: EPOConfig) -> None:
    """Leave beside the model what `trl-epo play` needs to know, as a config file."""
    names = ("environment", "environment_kwargs", "tasks", "tasks_kwargs", "tasks_seed", "eval_splits")
    settings = {name: getattr(script, name) for name in names} | play_settings(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    Path(args.output_dir, PLAY_SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def parse(command: str, arguments: Sequence[str], *more: type) -> tuple:
    """
    The settings of a command from its flags and, with `--config`, a file; flags win: [`ScriptArguments`], [`EPOConfig`],
    TRL's `ModelConfig` and one of each class of `more`.

    Raises:
        SystemExit: If a key or flag is unknown or a value is impossible, after a message that names it.
    """
    prog = f"trl-epo {command}"
    parser = TrlParser(
        (ScriptArguments, EPOConfig, ModelConfig, *more),
        prog=prog,
        usage=f"{prog} [--config FILE] [--FLAG VALUE ...]",
        allow_abbrev=False,
    )
    try:
        *settings, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
        if unknown:
            raise ValueError(f"There is no setting of the name {unknown[0].removeprefix('--')!r} (see {prog} --help).")
        needs_model = not any(getattr(given, "human", False) for given in settings)
        if needs_model and settings[2].model_name_or_path is None:
            raise ValueError("`model_name_or_path` is not set: give a model's folder, or its name on the Hub.")
        return tuple(settings)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


def _json_object(name: str, value: dict | str | None) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` is {value!r}, which is not JSON: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'`{name}` is {value!r}, but must be a mapping, e.g. {{"rooms": 2}}.')
    return value or {}


def _imported(what: str, path: str) -> Callable:
    """What "module:attribute" names, something to call."""
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"`{what}` is {path!r}, but there is no such thing: {error}") from error
    if not callable(found):
        raise UsageError(f"`{what}` is {path!r}, a {type(found).__name__}, but must be something to call.")
    return found
