"""What a rollout needs of a generation backend."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class Sample(NamedTuple):
    """
    The tokens sampled for one turn of one episode.

    Args:
        token_ids (`list[int]`): At least one token; ends with an end-of-turn token unless cut by the limit.
        logprobs (`list[float]` or `None`): Their log-probabilities at the sampling temperature, in nats.
        entropies (`list[float]` or `None`): Entropies of the distributions at that temperature, in nats; `None` where unknown.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    entropies: list[float] | None = None


class EpisodeNumbers:
    """
    Random numbers of each episode's own, so that what is sampled beside it changes nothing. They follow from torch's generator
    for CPUs, of which they take one number.
    """

    def __init__(self):
        self._seed = int(torch.randint(2**62, ()))
        self._num_begun: Counter[int] = Counter()

    def begin(self, episode: int) -> random.Random:
        """Those of an episode that begins; its number comes again when it is played again, with other ones."""
        self._num_begun[episode] += 1
        return random.Random(f"{self._seed} {episode} {self._num_begun[episode]}")


class TurnSampler(Protocol):
    """
    What a rollout needs of a generation backend. Episodes are numbered by the caller.

    Attributes:
        max_episodes (`float`): How many it can hold at once; falls when it runs out of memory. No more should be begun; those
            that have begun it plays all the same.
        waits_for_turns (`bool`): Whether it is to wait for turns that may soon be asked for (`Limits.patience`), so that what is
            sampled together depends on the episodes alone. Else each joins the others as soon as it is asked for.
    """

    max_episodes: float
    waits_for_turns: bool

    def num_fitting(self) -> float:
        """How many episodes fit into the memory that is free; ∞ if that is no matter. Asked before there are any."""

    def hold_at_most(self, num_episodes: float) -> None:
        """Set `max_episodes`."""

    def add(self, episode: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        """
        Ask for the next turn of an episode. `new_ids` are the tokens that follow its last sampled one; those of an
        episode that is new, its prompt. `max_new_tokens` limits the turn.
        """

    def rewind(self, episode: int, num_tokens: int) -> None:
        """Forget all of an episode's tokens but the first `num_tokens`; new ones follow these."""

    def drop(self, episode: int) -> None:
        """The episode has ended."""

    def advance(self) -> list[tuple[int, Sample]]:
        """Sample for a while; the turns that were finished, by episode."""

    @property
    def is_busy(self) -> bool:
        """Whether there are turns to sample."""

    @property
    def wants_turns(self) -> bool:
        """Whether now is the time to ask for more turns; depends on numbers of tokens only, never on the clock."""
