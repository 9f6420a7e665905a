"""
The command line:

    trl-epo warm-up    imitate an expert, so that training has something to begin with
    trl-epo train      train a model in an environment
    trl-epo evaluate   play the evaluation sets with a model
    trl-epo play       watch a model play an episode, or play it yourself
    trl-epo view       write a page to look at a run
    trl-epo check-env  check an environment of your own

    trl-epo warm-up  --config household-small --model_name_or_path MODEL     --output_dir runs/warm
    trl-epo train    --config household-small --model_name_or_path runs/warm --output_dir runs/a
    trl-epo evaluate --config household-small --model_name_or_path runs/a    --output_dir runs/a
    trl-epo play     runs/a
    trl-epo view     runs/a

`warm-up`, `train`, `evaluate` and `play`: every field of `EPOConfig`, TRL's `ModelConfig` and `ScriptArguments` is a key of the
config file and a flag; flags win. With several processes: `accelerate launch -m trl_epo train …`.
"""

import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..text import did_you_mean
from .mistakes import UsageError, is_told, one_line


USAGE = f"{__doc__.strip()}\n\nHelp on a command: trl-epo train --help (most runs' options), trl-epo train --help-all"
COMMANDS = ("warm-up", "train", "evaluate", "play", "view", "check-env")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run a command; `arguments` are those of the process by default. What the user can mend ends in one line on stderr, with
    exit status 2 if the command has not begun and 1 if it has, or with `--traceback` in all of it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        print(USAGE, file=None if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"trl-epo {__version__}")
        sys.exit(0)
    command, *others = arguments
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or f" There are {', '.join(COMMANDS)}."
        print(f"trl-epo: error: there is no command {command!r}.{hint}", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, os.getcwd())
    with_traceback = "--traceback" in others
    others = [argument for argument in others if argument != "--traceback"]
    try:
        _run(command, others)
    except Exception as error:
        if with_traceback or not is_told(error):
            raise
        wrong_usage = isinstance(error, UsageError)
        hint = "" if wrong_usage else " (--traceback shows where.)"
        print(f"trl-epo {command}: error: {one_line(error)}{hint}", file=sys.stderr)
        sys.exit(2 if wrong_usage else 1)


def _run(command: str, arguments: list[str]) -> None:
    # Imported when they are run: torch and TRL take seconds.
    if command == "view":
        from .view import view

        return view(arguments)
    if command == "check-env":
        from .check_env import check_environment

        return check_environment(arguments)
    if "-h" in arguments or "--help" in arguments:
        from .help import command_help

        return print(command_help(command))
    if command == "play":
        from .play import play

        return play(arguments)
    if command == "warm-up":
        from .warm_up import warm_up

        return warm_up(arguments)
    from .evaluate import evaluate
    from .settings import parse
    from .train import train

    script, args, model_args = parse(command, arguments)
    if script.dry_run:
        if command != "train":
            raise UsageError("`dry_run` is for `trl-epo train`: leave it out.")
        from .dry_run import dry_run

        return dry_run(script, args, model_args)
    return {"train": train, "evaluate": evaluate}[command](script, args, model_args)
