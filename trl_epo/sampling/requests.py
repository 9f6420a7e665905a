"""Turns as requests of their own."""

import math
from collections.abc import Callable, Sequence

from .turns import Sample


class RequestTurnSampler:
    """
    Samples each turn as a request of its own, the whole transcript as the prompt, in waves: those that were asked for, all
    at once. For vLLM where it cannot be driven by [`EngineTurnSampler`], for transformers' continuous batching, and for models
    that [`CachedTurnSampler`] does not fit.

    Args:
        generate (`Callable`): `(prompts, max_new_tokens) -> (token ids, log-probs or None)`, each a list by prompt.
        together (`Callable`, *optional*): `(lengths of prompts, max_new_tokens) -> places of those that are asked for
            together`, for a backend that takes as much memory as it is asked for. `None`: all at once.
    """

    wants_turns = True  # a batch of requests is answered all at once
    waits_for_turns = True
    max_episodes = math.inf  # it keeps nothing but their tokens

    def __init__(
        self,
        generate: Callable[[list[list[int]], int], tuple[list[list[int]], list[list[float]] | None]],
        together: Callable[[list[int], int], list[list[int]]] | None = None,
    ):
        self._generate = generate
        self._together = together
        self._transcripts: dict[int, list[int]] = {}
        self._asked: dict[int, int] = {}  # by episode: the turn's limit

    def num_fitting(self) -> float:
        return math.inf

    def hold_at_most(self, num_episodes: float) -> None:
        self.max_episodes = num_episodes

    def add(self, episode: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        self._transcripts.setdefault(episode, []).extend(new_ids)
        self._asked[episode] = max_new_tokens

    def rewind(self, episode: int, num_tokens: int) -> None:
        del self._transcripts[episode][num_tokens:]

    def drop(self, episode: int) -> None:
        self._transcripts.pop(episode, None)

    @property
    def is_busy(self) -> bool:
        return bool(self._asked)

    def advance(self) -> list[tuple[int, Sample]]:
        asked, self._asked = self._asked, {}
        # By limit: a prompt near the end of the context leaves no room for what another may still say
        groups = [
            group
            for limit in sorted({*asked.values()})
            for group in self._groups([episode for episode in asked if asked[episode] == limit], limit)
        ]
        order = list(asked)
        finished = [sample for group in groups for sample in self._ask(group, asked[group[0]])]
        return sorted(finished, key=lambda sample: order.index(sample[0]))

    def _groups(self, episodes: list[int], limit: int) -> list[list[int]]:
        if self._together is None:
            return [episodes]
        lengths = [len(self._transcripts[episode]) for episode in episodes]
        return [[episodes[place] for place in group] for group in self._together(lengths, limit)]

    def _ask(self, episodes: list[int], limit: int) -> list[tuple[int, Sample]]:
        """One call of the backend."""
        prompts = [list(self._transcripts[episode]) for episode in episodes]
        token_ids, logprobs = self._generate(prompts, limit)
        if len(token_ids) != len(prompts) or not all(token_ids):
            raise RuntimeError(
                f"The generation backend answered {len(prompts)} prompts with {len(token_ids)} completions, of which "
                f"{sum(not ids for ids in token_ids)} are empty; see its own log for the reason."
            )
        finished = []
        for row, episode in enumerate(episodes):
            sampled = token_ids[row][:limit]
            self._transcripts[episode] += sampled
            finished.append((episode, Sample(sampled, logprobs[row][:limit] if logprobs is not None else None)))
        return finished
