"""`trl-epo play`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers.utils import CONFIG_NAME

from ..play import play_row, play_yourself, settings_to_play
from ..reports import named_environment
from ..saved import ADAPTER_CONFIG, PLAY_SETTINGS_FILE, is_adapter, play_settings_file, saved_file
from .mistakes import UsageError
from .settings import ScriptArguments, check_downloaded_settings, parse
from .train import make_trainer


@dataclass
class PlayArguments:
    """
    Which episode to play.

    Parameters:
        split (`str`, *optional*):
            The split of the row. `None`: the first of `eval_splits`.
        row (`int`, *optional*, defaults to `0`):
            Which row of the split.
        human (`bool`, *optional*, defaults to `False`):
            You type the actions; no model is needed.
    """

    split: str | None = field(
        default=None, metadata={"help": "The split of the row. None: the first of `eval_splits`."}
    )
    row: int = field(default=0, metadata={"help": "Which row of the split."})
    human: bool = field(default=False, metadata={"help": "You type the actions; no model is needed."})


def play(arguments: Sequence[str]) -> None:
    """Play one episode: `trl-epo play [MODEL] [--FLAG VALUE ...]`; the model is a folder or a name on the Hub."""
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        run = arguments.pop(0)
        given = _flags(arguments)
        if "--config" not in given:
            file = play_settings_file(run, given.get("--model_revision"))
            if file is not None:
                if not Path(run).is_dir():
                    check_downloaded_settings(run, file, given)
                arguments += ["--config", str(file)]
            if "--environment" not in given and (file is None or named_environment(file) is None):
                raise _no_environment(run, file)
        arguments += ["--model_name_or_path", run]
    script, args, model_args, which = parse("play", arguments, PlayArguments)
    row = _row(script, which)
    if which.human:
        play_yourself(script.environment_factory(), row, args.seed)
        return
    args = settings_to_play(args)
    with TemporaryDirectory(prefix="trl_epo_play_") as args.output_dir:  # a trainer makes this folder
        trainer = make_trainer(script, args, model_args, train_dataset=Dataset.from_list([row or {"prompt": []}]))
        # A temperature that was asked for is meant, whatever evaluations have
        play_row(trainer, row, temperature=args.temperature if "--temperature" in arguments else None)


def _no_environment(run: str, file: Path | None) -> UsageError:
    """The error where nothing says what to play in; `file`: the settings beside the model, if there are any."""
    here = Path(run).is_dir()
    if file is None and here and not is_adapter(run) and saved_file(run, CONFIG_NAME) is None:
        return UsageError(
            f"There is no model in {run!r}: neither {CONFIG_NAME} nor {ADAPTER_CONFIG}. If its run was cut off, go on with it, "
            "or play one of its checkpoints; a warm-up saves its model only when it is through."
        )
    there = "There is no" if file is None else "No environment is named in"
    where = "" if here else ": no such folder is here, and the Hub has none or cannot be asked"
    return UsageError(
        f"{there} {PLAY_SETTINGS_FILE}, in which `trl-epo train` names it beside a model, in {run!r}{where}. Say what "
        "to play in, with --environment or --config, e.g. --environment my_code:Shop."
    )


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """The options that are given, with what stands behind each."""
    flags = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, has_value, value = argument.partition("=")
        if name.startswith("--"):
            flags[name] = value if has_value else following
    return flags


def _row(script: ScriptArguments, which: PlayArguments) -> dict[str, Any]:
    if script.tasks is None:
        return {}
    if which.row < 0:
        raise UsageError(f"`row` is {which.row}, but must be at least 0.")
    rows = script.rows(which.split or script.eval_splits[0], which.row + 1)
    if which.row >= len(rows):
        raise UsageError(f"`row` is {which.row}, but the split has {len(rows)} rows: give a smaller number.")
    return rows[which.row]
