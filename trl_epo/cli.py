"""
The command line:

    trl-epo train    --config examples/configs/household-small.yaml --model_name_or_path MODEL --output_dir runs/a
    trl-epo evaluate --config examples/configs/household-small.yaml --model_name_or_path runs/a --output_dir runs/a

Every field of `EPOConfig`, TRL's `ModelConfig` and `ScriptArguments` is a key of the config file and a flag; flags win.
With several processes: `accelerate launch -m trl_epo train …`.
"""

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import AutoConfig
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from .config import EPOConfig
from .reports import failed_share
from .rollouts import FAILURES_FILE
from .runs import last_whole_checkpoint
from .trainer import EPOTrainer


logger = logging.getLogger(__name__)


class UsageError(ValueError):
    """A setting that cannot work; the command ends with its message, without a traceback."""


class BuiltIn(NamedTuple):
    """Where an environment of this package is, and the function that gives its rows."""

    environment: str
    tasks: str


# Each knows the splits "train", "iid" and "ood".
ENVIRONMENTS = {
    "household": BuiltIn("trl_epo.envs.household:Household", "trl_epo.envs.household:tasks"),
    "scienceworld": BuiltIn("trl_epo.envs.scienceworld:ScienceWorld", "trl_epo.envs.scienceworld:tasks"),
    "alfworld": BuiltIn("trl_epo.envs.alfworld:AlfWorld", "trl_epo.envs.alfworld:tasks"),
}


# Flags of a new adapter and what they are in its configuration
LORA_FLAGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


@dataclass
class ScriptArguments:
    """
    What to act in and on which rows.

    Parameters:
        environment (`str`):
            `"household"`, `"scienceworld"`, `"alfworld"`, or `"module:attribute"`: something that makes an environment
            when called. Modules are looked for in the working directory too.
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
        results (`str`, *optional*):
            The JSON file that `evaluate` writes. `None`: `evaluation.json` in `output_dir`.
    """

    environment: str = field(
        metadata={"help": "'household', 'scienceworld', 'alfworld', or 'module:attribute' of your own."}
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
                    "of your own that inherits from `trl_epo.envs.TextEnv`."
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


def parse(command: str, arguments: Sequence[str]) -> tuple[ScriptArguments, EPOConfig, ModelConfig]:
    """
    The settings of a command from its flags and, with `--config`, a file; flags win.

    Raises:
        SystemExit: If a key or flag is unknown or a value is impossible, after a message that names it.
    """
    prog = f"trl-epo {command}"
    parser = TrlParser(
        (ScriptArguments, EPOConfig, ModelConfig),
        prog=prog,
        usage=f"{prog} [--config FILE] [--FLAG VALUE ...]",
        allow_abbrev=False,
    )
    try:
        script, args, model_args, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
        if unknown:
            raise ValueError(f"There is no setting of the name {unknown[0].removeprefix('--')!r} (see {prog} --help).")
        if model_args.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is not set: give a model's folder, or its name on the Hub.")
        return script, args, model_args
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


def make_trainer(
    script: ScriptArguments, args: EPOConfig, model_args: ModelConfig, train_dataset: Dataset | None, **kwargs
) -> EPOTrainer:
    """The trainer; a folder with an adapter is loaded as its model, quantized if asked for, with that adapter."""
    quantization = get_quantization_config(model_args)
    if quantization is not None and not is_bitsandbytes_available():
        name = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit"
        raise UsageError(f"`{name}` needs bitsandbytes: `pip install bitsandbytes`, or leave it out.")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    model = model_args.model_name_or_path
    if Path(model, ADAPTER_CONFIG).exists():
        model = AutoPeftModelForCausalLM.from_pretrained(
            model, is_trainable=True, quantization_config=quantization, **args.model_init_kwargs
        )
        args.model_init_kwargs = quantization = None
        if wanted := kwargs.pop("peft_config", None):
            _tell_of_other_adapter(model_args.model_name_or_path, model.peft_config["default"], wanted)
    else:
        try:
            AutoConfig.from_pretrained(
                model, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"`model_name_or_path` is {model!r}, but there is no model in such a folder, and none of that name could "
                f"be had from the Hub: {str(error).splitlines()[0]}"
            ) from error
    return EPOTrainer(
        model,
        args=args,
        train_dataset=train_dataset,
        quantization_config=quantization,
        environment_factory=script.environment_factory(),
        **kwargs,
    )


def _tell_of_other_adapter(folder: str, has: PeftConfig, wanted: LoraConfig) -> None:
    """Log which LoRA settings have no effect on an adapter that is there already."""
    differences = []
    for flag, name in LORA_FLAGS.items():
        found, asked = (getattr(config, name, None) for config in (has, wanted))
        found, asked = (sorted(value) if isinstance(value, set | list) else value for value in (found, asked))
        chosen_by_peft = isinstance(asked, str | None)  # "all-linear", a pattern, or what fits the architecture
        if found != asked and not chosen_by_peft:
            differences.append(f"`{flag}` is {found}, not {asked}")
    if differences:
        logger.warning(
            "%s holds an adapter, which stays as it is: %s. Give a model without one to begin another adapter.",
            folder,
            ", ".join(differences),
        )


def train(script: ScriptArguments, args: EPOConfig, model_args: ModelConfig) -> None:
    """Train, and leave the model, its card and the log in `output_dir`."""
    trainer = make_trainer(
        script,
        args,
        model_args,
        train_dataset=None if script.tasks is None else script.rows(script.train_split, script.train_size),
        eval_dataset=None if args.eval_strategy == "no" else script.panels(),
        peft_config=get_peft_config(model_args),
    )
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and script.resume:
        checkpoint = last_whole_checkpoint(args.output_dir)  # which all processes look for together
        if trainer.is_world_process_zero():
            nothing = f"there is no whole checkpoint in {args.output_dir}, training begins anew"
            logger.warning("--resume: %s.", nothing if checkpoint is None else f"training goes on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(model_name=Path(args.output_dir).name)
    trainer.accelerator.end_training()


def evaluate(script: ScriptArguments, args: EPOConfig, model_args: ModelConfig) -> None:
    """
    Play the panels, print a table of them and write it as JSON.

    Raises:
        SystemExit: In the end, if more than `max_failed_fraction` of a panel's episodes failed.
    """
    path = _writable(Path(script.results or Path(args.output_dir, "evaluation.json")))
    panels = script.panels()
    args.beta, args.sync_ref_model, args.advantage_estimator = 0.0, False, "grpo"  # no reference model and no critic
    trainer = make_trainer(script, args, model_args, train_dataset=next(iter(panels.values())), eval_dataset=panels)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        results = {
            "model": model_args.model_name_or_path,
            "environment": script.environment,
            "temperature": args.temperature if args.eval_temperature is None else args.eval_temperature,
            "episodes_per_row": trainer.num_generations_eval,
            "seed": args.seed,
            "panels": {name: panel_results(metrics, name) for name in panels},
        }
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(table(results["panels"]))
        print(f"\nAll figures: {path}")
    trainer.accelerator.end_training()
    failed = {name: failed_share(metrics, f"eval_{name}_") for name in panels}
    if too_many := [name for name, share in failed.items() if share > args.max_failed_fraction]:
        sys.exit(
            f"trl-epo evaluate: more episodes of {', '.join(too_many)} failed than `max_failed_fraction="
            f"{args.max_failed_fraction}` allows; why is in {Path(args.output_dir, FAILURES_FILE)}."
        )


def panel_results(metrics: dict[str, float], panel: str) -> dict[str, float]:
    """The episode metrics of a panel out of all of an evaluation's, under their short names."""
    prefix = f"eval_{panel}_episode/"
    results = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: int(value) if name == "count" else value for name, value in results.items()}


def table(panels: dict[str, dict[str, float]]) -> str:
    """
    A table of results by panel, and by task within it, and below it how many episodes failed, if any.

    >>> print(table({"iid": {"count": 8, "success_rate": 0.5, "success_low": 0.21, "success_high": 0.785,
    ...     "return": 0.5, "turns": 7.25, "success_rate/heat": 1.0}}))
    panel     episodes  success         95 %  return  turns
    iid              8    50.0%   21.0-78.5%    0.50    7.2
      heat               100.0%
    """
    width = max(
        [8, *(2 + len(name.split("/")[-1]) for results in panels.values() for name in results if "rate/" in name)]
    )
    passes = sorted({name for results in panels.values() for name in results if name.startswith("pass@")}, key=_k)
    header = f"{'panel':<{width}}  episodes  success         95 %  return  turns"
    lines = [header + "".join(f"  {name:>8}" for name in passes)]
    for panel, results in panels.items():
        interval = (
            f"{100 * results['success_low']:.1f}-{results['success_high']:.1%}" if "success_low" in results else "-"
        )
        lines.append(
            f"{panel:<{width}}  {results.get('count', 0):>8}  {_percent(results, 'success_rate'):>7}  {interval:>11}"
            f"  {_number(results, 'return', 2):>6}  {_number(results, 'turns', 1):>5}"
            + "".join(f"  {_percent(results, name):>8}" for name in passes)
        )
        for name in results:
            if name.startswith("success_rate/"):
                lines.append(f"{'  ' + name.split('/', 1)[1]:<{width}}  {'':>8}  {_percent(results, name):>7}")
    for panel, results in panels.items():
        if num_failed := round(results.get("count", 0) * results.get("stop/failure", 0.0)):
            lines.append(
                f"{panel}: {num_failed} of {results['count']} episodes failed (see the log): the other figures are "
                "without them."
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `arguments` are those of the process by default."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": train, "evaluate": evaluate}
    if not arguments or arguments[0] not in commands:
        asked_for_help = arguments[:1] in (["-h"], ["--help"])
        print(
            f"{__doc__.strip()}\n\nHelp on a command: trl-epo train --help",
            file=None if asked_for_help else sys.stderr,
        )
        sys.exit(0 if asked_for_help else 2)
    sys.path.insert(0, os.getcwd())
    try:
        commands[arguments[0]](*parse(arguments[0], arguments[1:]))
    except UsageError as error:
        print(f"trl-epo {arguments[0]}: error: {error}", file=sys.stderr)
        sys.exit(2)


def _k(name: str) -> int:
    return int(name.removeprefix("pass@"))


def _number(results: dict[str, float], name: str, digits: int) -> str:
    return f"{results[name]:.{digits}f}" if name in results else "-"


def _percent(results: dict[str, float], name: str) -> str:
    return f"{results[name]:.1%}" if name in results else "-"


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


def _writable(path: Path) -> Path:
    """A file's path in a folder that exists by now, and in which it can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"`results` is {str(path)!r}, but its folder cannot be made: {error}. Name another."
        ) from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"`results` is {str(path)!r}, but no file can be written there: name another.")
    return path
