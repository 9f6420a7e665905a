"""Failures of episodes: what they were, how many, and the file that tells of each."""

import json
import logging
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from .envs.base import EnvironmentDied, InvalidAnswer, NeighbourTimeout
from .text import MAX_FAILURE_LENGTH, printable, taken_in


if TYPE_CHECKING:
    from .episode import Episode

logger = logging.getLogger(__name__)

MAX_CAUSE_LENGTH = 500  # characters


class FailureKind(StrEnum):
    """Why an episode could not be played on."""

    CRASH = "crash"  # the environment, or what makes it, raised
    TIMEOUT = "timeout"  # no answer within `env_timeout`
    PROCESS_DIED = "process_died"  # the process that the environment lives in died
    NEIGHBOUR = "neighbour"  # the process died because another environment in it gave no answer
    INVALID_ANSWER = "invalid_answer"  # an answer that breaks the contract: no text, a reward that is not finite, …
    INPUT = "input"  # not the environment's: the dataset row, the prompt (no room for an action), builder or parser

    @property
    def may_pass(self) -> bool:
        """Whether a fresh environment may do better."""
        return self is not FailureKind.INPUT


class EnvironmentTimeout(TimeoutError):
    """An environment gave no answer in the time that it has."""


class BadInput(ValueError):
    """What was given to an episode, besides its environment, does not do."""


def kind_of(error: Exception) -> FailureKind:
    """What kind of failure it is when an environment's answer is this error."""
    if isinstance(error, EnvironmentTimeout):
        return FailureKind.TIMEOUT
    if isinstance(error, NeighbourTimeout):
        return FailureKind.NEIGHBOUR
    if isinstance(error, EnvironmentDied):
        return FailureKind.PROCESS_DIED
    if isinstance(error, InvalidAnswer):
        return FailureKind.INVALID_ANSWER
    if isinstance(error, BadInput):
        return FailureKind.INPUT
    return FailureKind.CRASH


@dataclass(frozen=True)
class Failure:
    """
    A failed attempt to play an episode.

    Args:
        kind ([`FailureKind`]): What happened.
        num_turns (`int`): Turns that had been played.
        action (`str` or `None`): The action that the environment was to answer; `None` for `reset`, or if the model
            gave none.
        cause (`str`): The error, in a printable line.
        traceback (`str`): The error with its traceback, as it is but bounded.
    """

    kind: FailureKind
    num_turns: int
    action: str | None
    cause: str
    traceback: str

    @classmethod
    def of(cls, kind: FailureKind, error: Exception, num_turns: int, action: str | None) -> "Failure":
        lines = traceback.format_exception_only(error)
        line = next((line for line in lines if not line.startswith(" ")), lines[-1])  # without code, and without notes
        cause = printable(taken_in(" ".join(line.split()), MAX_CAUSE_LENGTH))
        text = taken_in("".join(traceback.format_exception(error)), MAX_FAILURE_LENGTH)
        return cls(kind, num_turns, action, cause, text)

    def __str__(self) -> str:
        return f"{self.kind.value} after {self.num_turns} turns: {self.cause}"


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
        self.counts = {"train": Counter(), "eval": Counter()}

    def begin(self, mode: str) -> None:
        """Forget what an earlier run or evaluation has left, which may have been interrupted."""
        self._own = []
        self.counts[mode].clear()

    def note(self, episodes: Sequence["Episode"]) -> None:
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
        return json.dumps({**record, "options": f"{type(error).__name__}: they cannot be written as JSON"}) + "\n"
