"""Episodes × turns: text environments played by a turn sampler. Knows no trainer and no torch.distributed."""

import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from ..sampling import Sample, TurnSampler
from ..text import info_taken_in, name_of, taken_in
from .chat import THOUGHTS, after_thoughts
from .contexts import ContextRules, NextTurn, PastTurn, TurnView
from .environment_pool import EnvironmentPool, EnvironmentWorker
from .episode import Episode, StopReason, Turn
from .failures import BadInput, Failure, FailureKind, kind_of


logger = logging.getLogger(__name__)

ActionParser = Callable[[str], str | None]

NO_PROMPT = [{"role": "user", "content": ""}]  # of an episode that failed before it had one

_ACTION_TAG = re.compile(r"<action>(.*?)</action>", re.DOTALL)


def parse_action(text: str) -> str | None:
    """
    The default action parser: of what follows the last `</think>` what stands inside the last `<action>…</action>`, else
    all of it.

    Returns `None`, an invalid action, when that is empty, or when a thought is not closed.

    >>> parse_action("<think>The key!</think><action>take key</action>")
    'take key'
    >>> parse_action("<think>The key!</think> take key")
    'take key'
    >>> parse_action("<think>The key") is None
    True
    """
    text = after_thoughts(text) or ""
    tagged = _ACTION_TAG.findall(text)
    return (tagged[-1] if tagged else text).strip() or None


def parse_tagged_action(text: str) -> str | None:
    """
    The paper's action parser: as [`parse_action`], but without the tags there is no action.

    >>> parse_tagged_action("take key") is None
    True
    """
    return parse_action(text) if _ACTION_TAG.search(after_thoughts(text) or "") else None


IGNORE_THOUGHTS = (parse_action, parse_tagged_action)


@dataclass(frozen=True)
class EpisodeStart:
    """
    Where an episode begins.

    Args:
        prompt (`list[dict]`): Messages before the first observation: the row's, or the environment's instructions; may be
            empty.
        seed (`int`): For `reset(seed=…)`.
        options (`dict`): For `reset(options=…)`: the dataset row.
        environment (`str` or `None`): Which environment factory it uses.
    """

    prompt: list[dict[str, Any]]
    seed: int
    options: dict[str, Any]
    environment: str | None = None


@dataclass(frozen=True)
class Limits:
    """
    What bounds episodes.

    Args:
        max_turns (`int`): Actions per episode.
        max_turn_length (`int`): New tokens per action.
        max_concurrent_episodes (`float`): Episodes that are played at once.
        patience (`float`): How long generation waits for an environment's answer before it goes on without, in seconds.
        max_retries (`int`): How often an episode whose environment fails is played again, not counting failures that come
            of another one's time-out.
        max_observation_length (`int` or `None`): Longest observation, in characters; longer ones are cut.
    """

    max_turns: int
    max_turn_length: int
    max_concurrent_episodes: float = math.inf
    patience: float = math.inf
    max_retries: int = 0
    max_observation_length: int | None = None


@dataclass
class _Playing:
    """An episode that is still being played."""

    start: EpisodeStart
    worker: EnvironmentWorker | None = None
    prompt: list[dict[str, Any]] = field(default_factory=list)
    prompt_ids: tuple[int, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    first_observation: str = ""
    context: list[int] = field(default_factory=list)  # all tokens of the present context up to the last action
    context_prompt_length: int = 0  # how many of them were its first prompt
    next_turn: NextTurn | None = None  # what comes before the next action
    sample: Sample | None = None  # the action that the environment is to answer; None: `reset`
    text: str = ""
    action: str | None = None
    cut_thought: bool = False
    not_understood: bool = False  # the environment says so of the last action
    success: bool | None = None
    task: str | None = None
    num_late_answers: int = 0
    num_cut_observations: int = 0
    stop_reason: StopReason | None = None
    failures: tuple[Failure, ...] = ()
    asked_at: float = -math.inf  # when the environment was asked, on the clock of `time.monotonic`
    deadline: float = math.inf  # when it must have answered
    has_more_time: bool = False  # for that answer, as another environment held it up

    def reset(self, pool: EnvironmentPool) -> Future:
        """Ask an environment for the first observation: a new one, if another has failed."""
        try:
            self.worker = pool.take(self.start.environment, fresh=bool(self.failures))
        except KeyError:
            return _failed(
                BadInput(
                    f"The dataset row has `environment={self.start.environment!r}`, but must name one of {pool.names}."
                )
            )
        self._start_clock(pool)
        return self.worker.reset(self.start.seed, self.start.options)

    def ask(self, index: int, sampler: TurnSampler, limits: Limits) -> None:
        """Ask the sampler for the next action."""
        new_ids, starts_context, room = self.next_turn
        if starts_context:
            kept = _num_equal(self.context, new_ids)
            if self.context:
                sampler.rewind(index, kept)
            self.context, self.context_prompt_length = list(new_ids), len(new_ids)
            new_ids = new_ids[kept:]
        else:
            self.context += new_ids
        sampler.add(index, new_ids, int(min(limits.max_turn_length, room)))

    def act(self, sample: Sample, rules: ContextRules, action_parser: ActionParser, pool: EnvironmentPool) -> Future:
        """Ask the environment to answer the sampled action."""
        self.sample = sample
        self.context += sample.token_ids
        self.text = rules.chat.decode(sample.token_ids)
        # A thought that the template has opened is not closed by a text without tags either
        self.cut_thought = after_thoughts(THOUGHTS[0][0] * rules.chat.opens_thought + self.text) is None
        try:
            cut = self.cut_thought and action_parser in IGNORE_THOUGHTS
            self.action = None if cut else action_parser(self.text)
        except Exception as error:
            bad = BadInput(f"The action parser raised {type(error).__name__}: {error}")
            bad.__cause__ = error
            return _failed(bad)
        self._start_clock(pool)
        return self.worker.step(
            self.action or ""
        )  # no action is an empty one: the environment answers in its own words

    def _start_clock(self, pool: EnvironmentPool) -> None:
        self.asked_at = time.monotonic()
        self.deadline = self.asked_at + pool.timeout
        self.has_more_time = False

    def get_more_time(self, pool: EnvironmentPool) -> bool:
        """Whether the environment gets as much time again, once, since it was another one that took what it had."""
        if self.has_more_time or not self.worker.held_up_by_another:
            return False
        self._start_clock(pool)
        self.has_more_time = True
        return True

    def give_up_waiting(self, pool: EnvironmentPool) -> Future:
        """The environment has not answered in time: let go of it."""
        error = pool.no_answer(self.worker.is_starting)
        pool.discard(self.worker)
        self.worker = None
        return _failed(error)

    def take_answer(self, answer: Future, rules: ContextRules, limits: Limits) -> None:
        """Note what the environment answered, and prepare the next turn or stop."""
        kind = None
        try:
            observation, *verdict, info = answer.result()
            kind = FailureKind.INVALID_ANSWER
            observation, info = self._take_in(observation, info, limits)
            kind = FailureKind.INPUT
            if self.sample is None:
                self._begin(observation, info, rules)
            else:
                reward, terminated, truncated = verdict
                self._note_turn(observation, reward, terminated, truncated, info, rules, limits)
        except Exception as error:
            kind = kind or kind_of(error)
            action = None if self.sample is None else self.action
            self.failures += (Failure.of(kind, error, len(self.turns), action),)
            error.__traceback__ = None  # it holds the frames of this rollout, which hold the error
            self.stop_reason = StopReason.FAILURE
            self.prompt = self.prompt or NO_PROMPT

    def may_be_played_again(self, limits: Limits, num_timeouts: int) -> bool:
        """Whether a failed episode gets another try; there have been `num_timeouts`, of all episodes."""
        kinds = [failure.kind for failure in self.failures]
        # Each time-out of another one excuses one failure at most, and those come to an end, as they use up retries.
        excused = min(kinds.count(FailureKind.NEIGHBOUR), num_timeouts - kinds.count(FailureKind.TIMEOUT))
        return kinds[-1].may_pass and len(kinds) - excused <= limits.max_retries

    def again(self) -> "_Playing":
        """The same episode, from its start."""
        return _Playing(self.start, failures=self.failures, num_late_answers=self.num_late_answers)

    def _begin(self, observation: str, info: dict[str, Any], rules: ContextRules) -> None:
        self.first_observation = observation
        self.prompt, self.next_turn = rules.first(self.start.prompt, observation, info)
        self.prompt_ids = tuple(self.next_turn.new_ids)

    def _note_turn(
        self,
        observation: str,
        reward: float,
        terminated: bool,
        truncated: bool,
        info: dict[str, Any],
        rules: ContextRules,
        limits: Limits,
    ) -> None:
        token_ids, logprobs, entropies = self.sample
        is_first = not self.turns
        self.turns.append(
            Turn(
                observation_ids=() if is_first else tuple(self.next_turn.new_ids),
                action_ids=tuple(token_ids),
                logprobs=None if logprobs is None else tuple(logprobs),
                text=self.text,
                action=self.action,
                invalid=self.action is None or self.not_understood,
                observation=observation,
                reward=reward,
                starts_context=not is_first and self.next_turn.starts_context,
                cut_thought=self.cut_thought,
                entropies=None if entropies is None else tuple(entropies),
                cut=not token_ids or token_ids[-1] not in rules.chat.eos_token_ids,
            )
        )
        if terminated:
            self.stop_reason = StopReason.TERMINATED
        elif truncated:
            self.stop_reason = StopReason.TRUNCATED
        elif len(self.turns) == limits.max_turns:
            self.stop_reason = StopReason.MAX_TURNS
        else:
            turn = TurnView(self.start.prompt, self.first_observation, len(self.turns), (), observation, info)
            self.next_turn = rules.next(self.context, self.context_prompt_length, turn, self._past_turns())
            if self.next_turn is None:
                self.stop_reason = StopReason.TOKEN_BUDGET

    def _past_turns(self) -> list[PastTurn]:
        observations = [self.first_observation, *(turn.observation for turn in self.turns)]
        return [
            PastTurn(observation, turn.text, turn.action or turn.text)
            for observation, turn in zip(observations, self.turns, strict=False)
        ]

    def _take_in(self, observation: str, info: dict[str, Any], limits: Limits) -> tuple[str, dict[str, Any]]:
        """Note what an environment tells in `info`; return its texts as they are kept: encodable, and not too long."""
        length = limits.max_observation_length
        self.num_cut_observations += length is not None and len(observation) > length
        success = info.get("success")
        task = self.start.options.get("task") or info.get("task")
        self.success = None if success is None else bool(success)
        self.not_understood = bool(info.get("invalid_action", False))
        self.task = None if task is None else name_of(task)
        return taken_in(observation, length), info_taken_in(info, length)

    def leave(self, pool: EnvironmentPool) -> None:
        """Let go of the environment, which is used again if the episode came to an end of its own."""
        if self.worker is None:
            return
        if self.stop_reason in (None, StopReason.FAILURE):
            pool.discard(self.worker)
        else:
            pool.give_back(self.start.environment, self.worker)
        self.worker = None

    def finish(self) -> Episode:
        return Episode(
            prompt=self.prompt,
            prompt_ids=self.prompt_ids,
            turns=tuple(self.turns),
            stop_reason=self.stop_reason,
            success=self.success,
            task=self.task,
            environment=self.start.environment,
            options=self.start.options,
            seed=self.start.seed,
            num_late_answers=self.num_late_answers,
            failures=self.failures,
            first_observation=self.first_observation,
            num_cut_observations=self.num_cut_observations,
        )


def play_episodes(
    starts: Sequence[EpisodeStart],
    pool: EnvironmentPool,
    rules: ContextRules,
    sampler: TurnSampler,
    limits: Limits,
    action_parser: ActionParser = parse_action,
) -> list[Episode]:
    """
    Play one episode from each start, many of them at once. `rules` say what the model sees before each action.

    Environments answer on threads of their own while the sampler goes on with other episodes. What is sampled together
    depends on the episodes alone, not on how fast they answer, as long as each answer takes at most
    `limits.patience`; later ones join when they come, and are counted. A sampler that does not wait for turns gets each as
    soon as its environment has answered.

    An environment that raises, dies, answers something other than the contract says, or gives no answer within
    `pool.timeout`, costs its own episode. The environment is replaced and the episode played again from its start; after
    `limits.max_retries` times it ends with [`StopReason.FAILURE`]. A failure that comes of another episode's time-out
    (`NeighbourTimeout`) is not one of these times. What went wrong is in `Episode.failures`.

    Returns:
        `list[Episode]`: In the order of `starts`.
    """
    episodes = [_Playing(start) for start in starts]
    try:
        _play(episodes, pool, rules, sampler, limits, action_parser)
    finally:
        _tell_failures(episodes)
        for episode in episodes:  # after an interruption some still have their environments
            episode.leave(pool)
    return [episode.finish() for episode in episodes]


def _play(
    episodes: list[_Playing],
    pool: EnvironmentPool,
    rules: ContextRules,
    sampler: TurnSampler,
    limits: Limits,
    action_parser: ActionParser,
) -> None:
    queue = deque(range(len(episodes)))
    answers: dict[int, Future] = {}  # by episode: what its environment has been asked
    late: set[int] = set()  # generation does not wait for these answers any more
    num_open = 0
    while queue or num_open:
        while sampler.wants_turns:
            while queue and num_open < min(limits.max_concurrent_episodes, sampler.max_episodes):
                index = queue.popleft()
                answers[index] = episodes[index].reset(pool)
                num_open += 1
            wanted = answers.keys() - late if sampler.waits_for_turns else ()
            _wait(episodes, answers, wanted, time.monotonic() + limits.patience, pool)
            if not sampler.is_busy:
                _wait(episodes, answers, answers.keys(), math.inf, pool, FIRST_COMPLETED)
            answered = sorted(index for index, answer in answers.items() if answer.done())
            late -= set(answered)
            now = time.monotonic()
            for index in answers.keys() - late - set(answered):
                if episodes[index].asked_at + limits.patience <= now:
                    episodes[index].num_late_answers += 1
                    late.add(index)
            if not answered:
                break
            for index in answered:
                episodes[index].take_answer(answers.pop(index), rules, limits)
            failures = [failure for episode in episodes for failure in episode.failures]
            num_timeouts = sum(failure.kind is FailureKind.TIMEOUT for failure in failures)
            for index in answered:
                episode = episodes[index]
                if episode.stop_reason is None:
                    episode.ask(index, sampler, limits)
                    continue
                sampler.drop(index)
                episode.leave(pool)
                if episode.stop_reason is StopReason.FAILURE and episode.may_be_played_again(limits, num_timeouts):
                    episodes[index] = episode.again()
                    answers[index] = episodes[index].reset(pool)
                else:
                    num_open -= 1
        for index, sample in sampler.advance() if sampler.is_busy else ():
            answers[index] = episodes[index].act(sample, rules, action_parser, pool)


def _tell_failures(episodes: list[_Playing]) -> None:
    """One line for each kind of failure: with a broken environment every episode fails alike."""
    by_kind: dict[FailureKind, list[Failure]] = {}
    for episode in episodes:
        for failure in episode.failures:
            by_kind.setdefault(failure.kind, []).append(failure)
    for kind, failures in by_kind.items():
        left_out = sum(
            episode.stop_reason is StopReason.FAILURE and episode.failures[-1].kind is kind for episode in episodes
        )
        logger.warning(
            "%d attempts to play one of %d episodes failed (%s), %d episodes are left out. The first: %s",
            len(failures),
            len(episodes),
            kind.value,
            left_out,
            failures[0],
        )


def _wait(
    episodes: list[_Playing],
    answers: dict[int, Future],
    wanted: Iterable[int],
    end: float,
    pool: EnvironmentPool,
    return_when: str = ALL_COMPLETED,
) -> None:
    """Wait until `end` for answers that are `wanted`; those that pass their deadline meanwhile become failures."""
    start = time.monotonic()
    while True:
        now = time.monotonic()
        due = [index for index, answer in answers.items() if not answer.done() and episodes[index].deadline <= now]
        # All of them are asked first: giving one up may free those that it has held up.
        for index in [index for index in due if not episodes[index].get_more_time(pool)]:
            answers[index] = episodes[index].give_up_waiting(pool)
        if now >= end or _is_enough([answers[index] for index in wanted], return_when):
            break
        deadlines = [episodes[index].deadline for index, answer in answers.items() if not answer.done()]
        seconds = min(end - now, min(deadlines, default=math.inf) - now, threading.TIMEOUT_MAX)
        wait([answers[index] for index in wanted], max(seconds, 0.0), return_when)
    pool.seconds_awaited += time.monotonic() - start


def _is_enough(answers: list[Future], return_when: str) -> bool:
    done = [answer.done() for answer in answers]
    return all(done) or (return_when == FIRST_COMPLETED and any(done))


def _failed(error: Exception) -> Future:
    future: Future = Future()
    future.set_exception(error)
    return future


def _num_equal(old: list[int], new: list[int]) -> int:
    """How many tokens two contexts have in common at their beginning; one of `new` is left to be read."""
    limit = min(len(old), len(new) - 1)
    return next((index for index in range(limit) if old[index] != new[index]), limit)
