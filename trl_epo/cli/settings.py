"""What a command is told: its config file and its flags."""

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig, TrlParser

from ..config import EPOConfig
from ..envs.names import ENVIRONMENTS
from ..reports import PLAY_SETTINGS, foreign_code, play_settings
from ..saved import PLAY_SETTINGS_FILE, is_adapter, play_settings_file
from ..text import did_you_mean, shortened, shown
from .help import all_options
from .mistakes import OneLineParser, UsageError, one_line
from .named import check_environment_name, config_file, environment_maker, imported, json_object


# How the weights below an adapter are quantized, as fields of `ModelConfig`
QUANTIZATION = (
    *("load_in_4bit", "load_in_8bit", "dtype"),
    *("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
)


# What lies beside a model for `trl-epo play`, besides the settings of an episode; the latter if they are set
SAVED_SETTINGS = ("environment", "environment_kwargs", "tasks", "tasks_kwargs", "tasks_seed", "eval_splits")
OPTIONAL_SETTINGS = ("prompt_builder", "action_parser")


@dataclass
class ScriptArguments:
    """
    What to act in and on which rows.

    Parameters:
        environment (`str`):
            `"household"`, `"scienceworld"`, `"alfworld"`, `"textarena"`, `"openenv"`, or `"module:name"`: something that
            makes an environment when called. Modules are looked for in the working directory too.
        environment_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of the environment (on the command line as JSON).
        tasks (`str`, *optional*):
            `"module:function"`: a function that gives the [`~datasets.Dataset`] of a split, called with the name of the
            split. If it takes `size` it is also given `size` and `seed`. Built-in environments have their own.
        tasks_kwargs (`dict` or `str`, *optional*):
            More keyword arguments of that function (on the command line as JSON).
        reward_funcs (`list[str]`, *optional*):
            `"module:name"` of functions, rewards besides the episode's return.
        prompt_builder, action_parser (`str`, *optional*):
            `"module:name"` of the functions that [`EPOTrainer`] takes by these names.
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
            "help": "'household', 'scienceworld', 'alfworld', 'textarena', 'openenv', or 'module:name' of your own."
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
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "'module:name' of functions: rewards besides the episode's return."}
    )
    prompt_builder: str | None = field(
        default=None, metadata={"help": "'module:name' of what makes a turn's prompt where the context is a window."}
    )
    action_parser: str | None = field(
        default=None, metadata={"help": "'module:name' of what finds the action in the model's text."}
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
            setattr(self, name, json_object(name, getattr(self, name)))
        for name in ("eval_splits", "reward_funcs"):
            if isinstance(getattr(self, name), str):  # a file may say so
                setattr(self, name, [getattr(self, name)])
        for name in ("train_size", "eval_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"`{name}` is {size}, but must be at least 1; leave it out for all rows.")
        check_environment_name(self.environment)
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
        return environment_maker(self.environment, json_object("environment_kwargs", self.environment_kwargs))

    def functions(self) -> dict[str, Any]:
        """The arguments of [`EPOTrainer`] that are functions, those that were named."""
        named: dict[str, Any] = {
            name: imported(name, path)
            for name in ("prompt_builder", "action_parser")
            if (path := getattr(self, name)) is not None
        }
        if self.reward_funcs:
            named["reward_funcs"] = [imported("reward_funcs", path) for path in self.reward_funcs]
        return named

    def rows(self, split: str, size: int | None) -> Dataset:
        """`size` rows of a split, or all of them."""
        tasks = imported("tasks", self.tasks)
        kwargs = json_object("tasks_kwargs", self.tasks_kwargs)
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
        if not isinstance(rows, Dataset):
            raise UsageError(
                f"`tasks` is {self.tasks!r}, but gives a {type(rows).__name__} for the split {split!r}, and must give a "
                "`datasets.Dataset`, e.g. Dataset.from_list(rows)."
            )
        if len(rows) == 0:
            raise UsageError(f"`tasks` is {self.tasks!r}, but gives no row for the split {split!r}.")
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


def save_play_settings(script: ScriptArguments, args: EPOConfig, model_args: ModelConfig) -> None:
    """Leave beside the model what `trl-epo play` needs to know, as a config file."""
    settings = {name: getattr(script, name) for name in SAVED_SETTINGS} | play_settings(args)
    optional = {name: getattr(script, name) for name in OPTIONAL_SETTINGS}
    if model_args.load_in_4bit or model_args.load_in_8bit:
        optional |= {name: getattr(model_args, name) for name in QUANTIZATION}
    settings |= {name: value for name, value in optional.items() if value not in (None, False)}
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    Path(args.output_dir, PLAY_SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")


class _Parser(TrlParser, OneLineParser):
    pass


class _ConfigReader(TrlParser):
    """Reads a config file as TRL does, and leaves it at that."""

    config: dict[str, Any]

    def set_defaults_with_config(self, **config) -> list[str]:
        self.config = config
        return []

    def parse_args_into_dataclasses(self, **kwargs) -> tuple:
        return ()


def _make_parser(command: str, more: Iterable[type]) -> _Parser:
    prog = f"trl-epo {command}"
    usage = f"{prog} [--config FILE] [--OPTION VALUE ...]"
    make: Any = _Parser  # TrlParser's arguments, which argparse's annotations hide
    return make((ScriptArguments, EPOConfig, ModelConfig, *more), prog=prog, usage=usage, add_help=False)


def parse(command: str, arguments: Sequence[str], *more: type) -> tuple:
    """
    The settings of a command from its flags and, with `--config`, a file; flags win: [`ScriptArguments`], [`EPOConfig`],
    TRL's `ModelConfig` and one of each class of `more`. An adapter's weights are quantized as in its training, unless a
    flag or the file says how.

    Raises:
        UsageError: If a key or flag is unknown or a value is impossible.
        SystemExit: After `--help-all`.
    """
    parser = _make_parser(command, more)
    if "--help-all" in arguments:
        print(all_options(parser))
        raise SystemExit(0)
    file, flags = _without_config(arguments)
    config = {} if file is None else _read(file, parser)
    for action in parser._actions:
        action.required = False  # the one that is needed has an error of its own
    try:
        parser.set_defaults_with_config(**config)
        given, others = parser.parse_known_args(flags)
        if others:
            raise UsageError(f"{others[0]!r} belongs to no option: settings are given as --NAME VALUE.")
        if given.environment is None:
            raise UsageError(
                f"`environment` is not set: give one of {', '.join(ENVIRONMENTS)} or 'module:name', or a `config` that does."
            )
        told = {*config, *(flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags)}
        if given.model_name_or_path and told.isdisjoint(("load_in_4bit", "load_in_8bit")):
            saved = _saved_quantization(given.model_name_or_path, given.model_revision)
            parser.set_defaults_with_config(**{name: value for name, value in saved.items() if name not in told})
        settings = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise error if isinstance(error, UsageError) else UsageError(one_line(error)) from error
    needs_model = not any(getattr(given, "human", False) for given in settings)
    if needs_model and settings[2].model_name_or_path is None:
        raise UsageError("`model_name_or_path` is not set: give a model's folder, or its name on the Hub.")
    return settings


def _without_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that `--config` names, and the other arguments."""
    files, others, rest = [], [], iter(arguments)
    for argument in rest:
        name, has_value, value = argument.partition("=")
        if name != "--config":
            others.append(argument)
            continue
        value = value if has_value else next(rest, "")
        if not value or value.startswith("--"):
            raise UsageError("`--config` needs a file, or the name of one that comes with trl-epo.")
        files.append(value)
    if len(files) > 1:
        raise UsageError(
            f"`--config` is given {len(files)} times ({', '.join(files)}): put the settings into one file."
        )
    return (config_file(files[0]) if files else None), others


def _read(file: Path, parser: _Parser) -> dict[str, Any]:
    """A config file's settings; its `env` is set in the environment of the process."""
    reader = _ConfigReader(())
    try:
        reader.parse_args_and_config(["--config", str(file)])
    except Exception as error:  # the file system's, YAML's, and of what is no mapping TRL's
        if type(error) is not ValueError:
            raise UsageError(f"`config` is {str(file)!r}, but cannot be read: {one_line(error)}") from error
        if "`env`" in str(error):
            raise UsageError(f"`env` is no mapping of environment variables, in {file}.") from error
        holds = shortened(file.read_text().strip(), 100)
        raise UsageError(
            f"`config` is {str(file)!r}, but holds {holds!r} and no settings: write a line 'NAME: VALUE' for each."
        ) from error
    config = reader.config
    actions = {action.dest: action for action in parser._actions}
    for name, value in config.items():
        if name not in actions:
            hint = did_you_mean(str(name), actions) or f" {parser.prog} --help-all lists all settings."
            raise UsageError(f"There is no setting {name!r}, which is in {file}.{hint}")
        kind = actions[name].type
        number = {int: int, float: int | float}.get(kind) if isinstance(kind, type) else None
        if number is not None and not isinstance(value, number | str | None):
            raise UsageError(f"`{name}` is {value!r} in {file}, but must be a {'whole ' * (kind is int)}number.")
    return config


def _saved_quantization(model: str, revision: str | None) -> dict[str, Any]:
    """How the weights below an adapter were quantized when it was trained."""
    file = play_settings_file(model, revision) if is_adapter(model, revision) else None
    saved = {} if file is None else json.loads(file.read_text())
    return {name: value for name, value in saved.items() if name in QUANTIZATION}


def check_downloaded_settings(repository: str, file: Path, flags: Iterable[str]) -> None:
    """
    Whether the settings beside a model on the Hub are harmless: whoever wrote them is a stranger.

    Args:
        repository (`str`): The model's name on the Hub.
        file (`Path`): The downloaded file.
        flags (`Iterable[str]`): What the user names on the command line, and so wants ("--environment").

    Raises:
        UsageError: If it holds other settings than [`save_play_settings`] writes, or names code that is not this package's and
            that the user does not name too.
    """
    told = f"The {PLAY_SETTINGS_FILE} of {repository} on the Hub"
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(
            f"{told} cannot be read: {error}. Say what to play in, with --environment or --config."
        ) from error
    known = {*SAVED_SETTINGS, *OPTIONAL_SETTINGS, *QUANTIZATION, *PLAY_SETTINGS}
    if not isinstance(settings, dict) or (others := set(settings) - known):
        what = ", ".join(map(shown, sorted(others))) if isinstance(settings, dict) else f"a {type(settings).__name__}"
        raise UsageError(
            f"{told} holds {what}, which is not for it to say. Say what to play in, with --environment or --config."
        )
    code = {f"--{name}": path for name, path in foreign_code(settings).items()}
    if unsaid := set(code) - set(flags):
        options = " ".join(f"{name} {path}" for name, path in code.items())
        raise UsageError(
            f"{told} names code to run on this machine ({', '.join(sorted(unsaid))}). If that code is here and is what you want "
            f"to run, say so: {options}"
        )
