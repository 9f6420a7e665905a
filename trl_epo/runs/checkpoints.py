"""
Whole checkpoints: which folders hold everything that was written to them, and which were cut in the middle.

The last file of a checkpoint is its manifest, which names all others with their sizes, but one that nobody reads and that
is not pushed to the Hub (`training_args.bin`). Until then an unfinished one stands
in its place, so that a folder without any was written by someone else (plain TRL, say).
"""

import json
import logging
import os
import shutil
from pathlib import Path

from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, and had to be."""


class PushError(RuntimeError):
    """A push to the Hub that failed; what was to be pushed is on the disk."""


def begin_checkpoint(folder: Path) -> None:
    """Mark a folder as cut, until [`finish_checkpoint`] says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_durably(folder / MANIFEST, {"files": None})


def finish_checkpoint(folder: Path, step: int, world_size: int, begun: float) -> None:
    """
    Once all processes have written to it: mark a folder as whole, after its files are on the disk.

    Args:
        folder (`Path`): The checkpoint's.
        step (`int`): Optimizer steps made.
        world_size (`int`): Processes of the run.
        begun (`float`): When this training began, in seconds since 1970.
    """
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, TRAINING_ARGS_NAME):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # a network disk may report only now that it is full
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    _write_durably(folder / MANIFEST, {"step": step, "world_size": world_size, "begun": begun, "files": sizes})


def what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; `None` if it is whole, or another trainer's and looks so."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return _what_anothers_misses(folder)
    except ValueError as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if manifest["files"] is None:
        return "it was cut while it was being written"
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def last_whole_checkpoint(run: str | os.PathLike) -> str | None:
    """
    The newest checkpoint of a run's folder that is whole, on every process; `None` if there is none. Newest is the one with
    the most steps of the training that began last: what an earlier training has left in the folder comes after all of its. What
    is passed over is named in a warning. Every process calls it, also one that does not see the folder.
    """
    missing = {folder.name: what_is_missing(folder) for folder in _checkpoints(Path(run))}
    begun = {name: _begun(Path(run, name)) for name in missing}
    last_begun = max(begun.values(), default=0.0)
    begun |= {name: last_begun for name, reason in missing.items() if reason}  # cut ones are named, whosever they are
    everyones = gather_object([missing])
    for name in sorted(missing, key=lambda name: (begun[name], step_of(name)), reverse=True):
        reasons = [each.get(name, "it is not there on every process") for each in everyones]
        reason = next((reason for reason in reasons if reason), None)
        if reason is None:
            if not Path(run, name, MANIFEST).exists():
                logger.warning("%s has no %s, so whether it is whole cannot be told.", Path(run, name), MANIFEST)
            return os.path.join(run, name)
        logger.warning("The checkpoint %s is passed over: %s.", Path(run, name), reason)
    return None


def checkpoint_to_resume(asked: str | bool | None, run: str) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` means: a folder, the last whole one of the run (`True`), or none.

    Raises:
        ValueError: If it is not whole, or there is none.
    """
    if asked is None or asked is False:
        return None
    if asked is True:
        found = last_whole_checkpoint(run)
        if found is None:
            raise ValueError(
                f"`resume_from_checkpoint=True`, but there is no whole checkpoint in {run!r}. Leave it out to begin anew, "
                "or name a checkpoint's folder."
            )
        return found
    folder = Path(asked)
    if reason := what_is_missing(folder):
        whole = [other for other in _checkpoints(folder.parent) if what_is_missing(other) is None]
        remedy = f"the last whole one beside it is {str(whole[-1])!r}" if whole else "there is no whole one beside it"
        raise ValueError(f"The checkpoint {str(folder)!r} cannot be resumed from: {reason}; {remedy}.")
    if not (folder / MANIFEST).exists():
        logger.warning("%s has no %s, so whether it is whole cannot be told.", folder, MANIFEST)
    return str(folder)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beside the newest, cut ones first, until `limit` are left; never the best one."""
    if not limit or limit < 0:
        return
    others = [folder for folder in _checkpoints(newest.parent) if folder.name != newest.name]
    keep = None if best is None else Path(best).name
    candidates = [folder for folder in others if folder.name != keep]
    candidates.sort(key=lambda folder: (what_is_missing(folder) is None, folder.stat().st_mtime))
    for folder in candidates[: max(len(others) + 1 - limit, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def _begun(folder: Path) -> float:
    """When the training that wrote a checkpoint began, in seconds since 1970; 0 if nobody has noted that."""
    try:
        return float(json.loads((folder / MANIFEST).read_text()).get("begun", 0.0))
    except (OSError, ValueError):
        return 0.0


def _what_anothers_misses(folder: Path) -> str | None:
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())  # Trainer's last file
    except FileNotFoundError:
        return f"it has neither {MANIFEST} nor {TRAINER_STATE_NAME}"
    except ValueError as error:
        return f"its {TRAINER_STATE_NAME} cannot be read ({error})"
    return None


def _checkpoints(run: Path) -> list[Path]:
    """The folders of checkpoints, by step."""
    folders = run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if run.is_dir() else ()
    return sorted((f for f in folders if f.is_dir() and step_of(f.name) is not None), key=lambda f: step_of(f.name))


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder; `None` if it is no such name."""
    number = name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else None


def _write_durably(path: Path, content: dict) -> None:
    """All of it or nothing, whatever happens meanwhile."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
