"""Failures of episodes: what they were."""

import traceback
from dataclasses import dataclass
from enum import StrEnum

from ..envs.base import EnvironmentDied, InvalidAnswer, NeighbourTimeout
from ..text import MAX_FAILURE_LENGTH, printable, taken_in


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
