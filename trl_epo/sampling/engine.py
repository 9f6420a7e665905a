"""Turns in an engine that goes on with some requests while others come and go (vLLM)."""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from .turns import EpisodeNumbers, Sample


logger = logging.getLogger(__name__)

MAX_TRIES = 3  # of a request that the engine gives up
# An engine that works reads or samples a token of a request that is under way in each of its steps, but for some of these.
SPARE_STEPS = 1000


class Answer(NamedTuple):
    """
    What an engine says of a request that has ended.

    Args:
        request_id (`str`): The request.
        token_ids (`list[int]`): The tokens sampled.
        logprobs (`list[float]` or `None`): Their log-probabilities at the sampling temperature, in nats.
        given_up (`str` or `None`): Why it has ended before its turn was over; `None` if it was.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[float] | None
    given_up: str | None = None


class Engine(Protocol):
    """What [`EngineTurnSampler`] needs of an engine."""

    @property
    def is_busy(self) -> bool:
        """Whether it has requests that have not ended."""

    def add(self, prompt_ids: list[int], max_new_tokens: int, seed: int) -> str:
        """Begin a request; its id, which comes no second time. Its random numbers follow from `seed` alone."""

    def step(self) -> list[Answer]:
        """Go on with all requests for a token, or for some of their prompts' tokens; those that have ended."""

    def abort(self, request_ids: list[str]) -> None:
        """Forget these requests; they get no answer."""


@dataclass(frozen=True)
class _Request:
    """A turn that was asked for."""

    episode: int
    prompt_ids: list[int]
    max_new_tokens: int
    seed: int
    num_tries: int = 0


class EngineTurnSampler:
    """
    Samples each turn as a request of its own, the whole transcript as the prompt, which joins the others as soon as it is
    asked for: nobody waits for the slowest answer or the slowest environment. The engine's prefix cache makes it cheap.

    Each turn has a seed of its own, which follows from torch's generator for CPUs and the episode: what is sampled depends on
    what is sampled beside it only as far as rounding does.

    A request that the engine gives up or forgets is made again, up to `MAX_TRIES` times.

    Args:
        engine ([`Engine`]): The engine; nobody else asks it for anything meanwhile.
    """

    wants_turns = True
    waits_for_turns = False
    max_episodes = math.inf  # the engine bounds its memory itself

    def __init__(self, engine: Engine):
        self._engine = engine
        self._episode_numbers = EpisodeNumbers()
        self._numbers: dict[int, random.Random] = {}  # by episode
        self._transcripts: dict[int, list[int]] = {}
        self._requests: dict[str, _Request] = {}  # by id: those under way
        self._idle_steps = 0  # since something has ended

    def num_fitting(self) -> float:
        return math.inf

    def hold_at_most(self, num_episodes: float) -> None:
        self.max_episodes = num_episodes

    def add(self, episode: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        if episode not in self._transcripts:
            self._transcripts[episode] = []
            self._numbers[episode] = self._episode_numbers.begin(episode)
        transcript = self._transcripts[episode]
        transcript += new_ids
        self._ask(_Request(episode, list(transcript), max_new_tokens, self._numbers[episode].getrandbits(62)))

    def rewind(self, episode: int, num_tokens: int) -> None:
        del self._transcripts[episode][num_tokens:]

    def drop(self, episode: int) -> None:
        self._transcripts.pop(episode, None)

    def close(self) -> None:
        """Have the engine forget the turns under way, after an error or an interruption: they would be in the next rollout."""
        request_ids, self._requests = list(self._requests), {}
        try:
            self._engine.abort(request_ids)
        except Exception:
            logger.warning("The generation engine could not abort its requests.", exc_info=True)

    @property
    def is_busy(self) -> bool:
        return bool(self._requests)

    def advance(self) -> list[tuple[int, Sample]]:
        answers = self._engine.step()
        self._idle_steps = 0 if answers else self._idle_steps + 1
        finished = []
        for answer in answers:
            request = self._requests.pop(answer.request_id, None)
            if request is None:
                continue  # not of this rollout
            given_up = answer.given_up or (None if answer.token_ids else "no tokens")
            if given_up:
                self._ask_again(request, given_up)
                continue
            self._transcripts[request.episode] += answer.token_ids
            finished.append((request.episode, Sample(answer.token_ids, answer.logprobs)))
        self._look_for_lost_requests()
        return finished

    def _ask(self, request: _Request) -> None:
        request_id = self._engine.add(request.prompt_ids, request.max_new_tokens, request.seed)
        self._requests[request_id] = request

    def _ask_again(self, request: _Request, given_up: str) -> None:
        request = replace(request, num_tries=request.num_tries + 1)
        if request.num_tries == MAX_TRIES:
            raise RuntimeError(
                f"The generation engine has given up a request of {len(request.prompt_ids)} tokens {MAX_TRIES} times "
                f"({given_up}); see its own log for the reason."
            )
        logger.warning(
            "The generation engine has given up a request of %d tokens (%s); it is made again.",
            len(request.prompt_ids),
            given_up,
        )
        self._ask(request)

    def _look_for_lost_requests(self) -> None:
        if not self._engine.is_busy:
            lost, self._requests = self._requests, {}
            for request in lost.values():
                self._ask_again(request, "lost")
        num_tokens = sum(len(request.prompt_ids) + request.max_new_tokens for request in self._requests.values())
        if self._idle_steps > num_tokens + SPARE_STEPS:
            raise RuntimeError(
                f"The generation engine has made {self._idle_steps} steps without an answer, but the {len(self._requests)} "
                f"turns that it was asked for have no more than {num_tokens} tokens: it has lost them; see its own log."
            )
