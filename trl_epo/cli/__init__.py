"""
The command line:

    trl-epo warm-up  --config examples/configs/household-small.yaml --model_name_or_path MODEL --output_dir runs/warm
    trl-epo train    --config examples/configs/household-small.yaml --model_name_or_path MODEL --output_dir runs/a
    trl-epo evaluate --config examples/configs/household-small.yaml --model_name_or_path runs/a --output_dir runs/a
    trl-epo play     runs/a
    trl-epo view     runs/a

`warm-up`, `train`, `evaluate` and `play`: every field of `EPOConfig`, TRL's `ModelConfig` and `ScriptArguments` is a key of the
config file and a flag; flags win. With several processes: `accelerate launch -m trl_epo train …`. `train --dry-run` plays one
batch, trains on it, shows what is in it and writes nothing. `view` writes a page to look at a run.
"""

import difflib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .usage import UsageError


USAGE = f"{__doc__.strip()}\n\nHelp on a command: trl-epo train --help"
COMMANDS = ("warm-up", "train", "evaluate", "play", "view")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `arguments` are those of the process by default."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=None if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"trl-epo {__version__}")
        sys.exit(0)
    command, *others = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        print(f"{USAGE}\n\ntrl-epo: error: there is no command {command!r}.{meant}", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, os.getcwd())
    try:
        _run(command, others)
    except UsageError as error:
        print(f"trl-epo {command}: error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(command: str, arguments: list[str]) -> None:
    # Imported when they are run: torch and TRL take seconds.
    if command == "view":
        from .view import view

        return view(arguments)
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
