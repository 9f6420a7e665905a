"""Failures of a run's episodes: how many, and the file that tells of each."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from .episode import Episode


logger = logging.getLogger(__name__)


class FailureLog:
    """
    The failures of a run's episodes, over all processes: counted for the logs, written to a file of JSON lines.

    Args:
        path (`Path`): The file. Lines are appended, by the process that `writes`.
        writes (`bool`): Whether this process is the one.

    Attributes:
        counts (`dict[str, Counter]`): By mode: failed attempts by kind, and `retried`.
    """

    def __init__(self, path: Path, writes: bool):
        self.path = path
        self._writes = writes
        self._own: list[dict[str, Any]] = []  # of this process, not shared yet
        self.counts: dict[str, Counter] = {"train": Counter(), "eval": Counter()}

    def begin(self, mode: str) -> None:
        """Forget what an earlier run or evaluation has left, which may have been interrupted."""
        self._own = []
        self.counts[mode].clear()

    def note(self, episodes: Sequence[Episode]) -> None:
        """Take down the failures of episodes that this process has played."""
        for episode in episodes:
            for attempt, failure in enumerate(episode.failures):
                self._own.append(
                    {
                        "kind": failure.kind.value,
                        "retried": attempt + 1 < len(episode.failures) or not episode.failed,
                        "environment": episode.environment,
                        "task": episode.task,
                        "seed": episode.seed,
                        "options": episode.options,
                        "num_turns": failure.num_turns,
                        "action": failure.action,
                        "cause": failure.cause,
                        "traceback": failure.traceback,
                    }
                )

    def share(self, mode: str, **where: Any) -> list[dict[str, Any]]:
        """
        Count and write what was noted since the last call; called by every process at once. `where` says where it
        happened, and is part of each line.

        Returns:
            `list[dict]`: The lines, those of the first process first.
        """
        records = gather_object([{"mode": mode, **where, **record} for record in self._own])
        self._own = []
        self.counts[mode].update(record["kind"] for record in records)
        self.counts[mode]["retried"] += sum(record["retried"] for record in records)
        if records and self._writes:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.writelines(_line(record) for record in records)
            except OSError as error:  # the run is worth more than its notes
                logger.warning("Failures of episodes could not be written to %s: %s", self.path, error)
        return records

    def metrics(self, mode: str) -> dict[str, float]:
        """
        `faults/<kind>`, and `faults/retried` (attempts that another one followed): numbers of the whole training so far,
        or of the last evaluation. Those that are zero are left out.
        """
        return {f"faults/{name}": float(count) for name, count in self.counts[mode].items() if count}


def _line(record: dict[str, Any]) -> str:
    try:
        return json.dumps(record, default=repr) + "\n"
    except Exception as error:  # options with keys that are no text, in a circle, or that cannot even be shown
        told = {**record, "options": f"{type(error).__name__}: they cannot be written as JSON"}
        return json.dumps(told, default=repr) + "\n"
