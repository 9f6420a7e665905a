"""The files of kept episodes: how they are written, what they may take of the disk, which belong to the run."""

import logging
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq


logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)\.parquet")


def training_file(rl_step: int) -> str:
    """Where the episodes of an RL step are, below `episodes/`."""
    return f"train/step-{rl_step:06d}.parquet"


def panel_file(panel: str | None, step: int) -> str:
    """Where an evaluation's episodes are, below `episodes/`; different sets never share a file."""
    folder = "eval" if not panel else "eval/" + re.sub(r"^\.", "%2E", quote(panel, safe=" "))
    return f"{folder}/step-{step:06d}.parquet"


class EpisodeFiles:
    """
    Files of a folder, of which those that were written later replace those of the same name.

    Which files are deleted when they take too much depends on their sizes and names alone, which are part of the run's
    state: a run that is resumed ends with the same files as one that was not interrupted.

    Args:
        folder (`Path`): The folder.
        max_bytes (`float`): What the files may take together.

    Attributes:
        sizes (`dict[str, int]`): Bytes of each of the run's files, by name.
        stride (`int`): Of the training's files only those are kept whose RL step is a multiple of it.
    """

    def __init__(self, folder: Path, max_bytes: float):
        self.folder = folder
        self.max_bytes = max_bytes
        self.sizes: dict[str, int] = {}
        self.stride = 1
        self._told = False  # that files are deleted
        self._fails = False  # whether the last file could not be written
        # The last RL step and optimizer step of the files that were there when training began and are kept; None: those
        # that come later, or are not the run's, have been deleted.
        self._begins_after: tuple[int, int] | None = None

    def begin(self) -> None:
        """Training begins anew: of what was written only evaluations of the weights that it begins with are its own."""
        kept = {name: size for name, size in self.sizes.items() if name.startswith("eval/") and not _step(name)}
        self.sizes, self.stride, self._told, self._begins_after = kept, 1, False, (-1, -1)

    def write(self, name: str, table: pa.Table) -> None:
        """Write a file, all of it or nothing. What prevents it is a warning: a run is worth more than its notes."""
        path = self.folder / name
        beside = path.with_name(f".{path.name}.tmp")
        try:
            if name.startswith("train/"):
                self._delete_others()
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            os.replace(beside, path)
        except (OSError, pa.ArrowException) as error:
            if not self._fails:
                logger.warning("Episodes could not be kept in %s: %s. Training goes on without.", path, error)
            self._fails = True
            self._delete(beside)
            return
        self._fails = False
        self.sizes[name] = size
        self._thin()

    def wants(self, rl_step: int) -> bool:
        """Whether the episodes of an RL step are to be kept."""
        return rl_step % self.stride == 0

    def last(self, step: int) -> pa.Table | None:
        """The file of an evaluation after this optimizer step, else the newest evaluation, else the newest of training."""
        evaluations = self._names("eval")
        names = [*self._names("train"), *evaluations, *(name for name in evaluations if _step(name) == step)]
        try:
            return pq.read_table(self.folder / names[-1]) if names else None
        except (OSError, pa.ArrowException) as error:
            logger.warning("Kept episodes in %s cannot be read: %s", self.folder / names[-1], error)
            return None

    def _delete_others(self) -> None:
        """Delete what is another run's, or comes after the checkpoint that this one goes on from; once in a training."""
        if self._begins_after is None:
            return
        last = dict(zip(("train", "eval"), self._begins_after, strict=True))
        self._begins_after = None
        others = []
        for part, step in last.items():
            for path in sorted((self.folder / part).rglob("*.parquet")):
                name = path.relative_to(self.folder).as_posix()
                if name not in self.sizes and _step(name) is not None and _step(name) > step:
                    others.append(path)
        if others:
            logger.warning(
                "%d files of kept episodes in %s are deleted: they are of an earlier run, or of steps that are made again.",
                len(others),
                self.folder,
            )
        for path in others:
            self._delete(path)

    def _thin(self) -> None:
        """Delete files until there is room: of training each second RL step, of evaluations all but the first and the last."""
        while sum(self.sizes.values()) > self.max_bytes:
            parts = {"train": self._thinned_training(), "eval": self._thinned_panels()}
            size = {part: sum(self.sizes[name] for name in self._names(part)) for part in parts}
            part = max((part for part, names in parts.items() if names), key=size.get, default=None)
            if part is None:
                break
            if part == "train":
                self.stride = self._next_stride()
            for name in parts[part]:
                del self.sizes[name]
                self._delete(self.folder / name)
            if not self._told:
                logger.warning(
                    "Kept episodes in %s have reached `keep_episodes_megabytes`: from now on only those of every second RL "
                    "step are kept, then of every fourth, and so on; of evaluations the first and the last always.",
                    self.folder,
                )
            self._told = True

    def _names(self, part: str) -> list[str]:
        return sorted((name for name in self.sizes if name.startswith(f"{part}/")), key=_step)

    def _next_stride(self) -> int:
        """The next one with which a training file goes; the present one if only the first is left."""
        steps = [_step(name) for name in self._names("train")]
        stride = self.stride
        while all(step % stride == 0 for step in steps) and stride <= max(steps, default=0):
            stride *= 2
        return stride

    def _thinned_training(self) -> list[str]:
        stride = self._next_stride()
        return [name for name in self._names("train") if _step(name) % stride]

    def _thinned_panels(self) -> list[str]:
        panels = defaultdict(list)
        for name in self._names("eval"):
            panels[name.rsplit("/", 1)[0]].append(name)
        return [name for names in panels.values() for name in names[1:-1:2]]

    @staticmethod
    def _delete(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON can carry it."""
        return {"sizes": dict(self.sizes), "stride": self.stride, "told": self._told}

    def load_state_dict(self, state: dict[str, Any], step: int, rl_step: int) -> None:
        """Go on from a checkpoint of an optimizer step and an RL step with what [`state_dict`] gave then."""
        self.sizes = {name: int(size) for name, size in state["sizes"].items()}
        self.stride, self._told = int(state["stride"]), bool(state["told"])
        self._begins_after = (rl_step, step)


def _step(name: str) -> int | None:
    """The step that a file is named after; `None` if it is not one of these files."""
    found = _STEP.fullmatch(name.rsplit("/", 1)[-1])
    return int(found[1]) if found else None
