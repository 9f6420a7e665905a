"""Episodes × turns: text environments played by a turn sampler. Knows no trainer and no torch.distributed."""

import logging
import math
import re
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from .chat import ChatEncoder
from .environment_pool import EnvironmentPool, EnvironmentWorker
from .episode import Episode, StopReason, Turn
from .generation import Sample, TurnSampler


logger = logging.getLogger(__name__)

ActionParser = Callable[[str], str | None]

_ACTION_TAG = re.compile(r"<action>(.*?)</action>", re.DOTALL)


def parse_action(text: str) -> str | None:
    """
    The default action parser: what stands inside the last `<action>…</action>`, else the whole text.

    Returns `None`, an invalid action, when that is empty.

    >>> parse_action("<think>The key!</think><action>take key</action>")
    'take key'
    >>> parse_action("take key")
    'take key'
    """
    tagged = _ACTION_TAG.findall(text)
    return (tagged[-1] if tagged else text).strip() or None


@dataclass(frozen=True)
class EpisodeStart:
    """
    Where an episode begins.

    Args:
        prompt (`list[dict]`): Messages before the first observation; may be empty.
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
        max_episode_length (`int`): Tokens after the prompt, observations included.
        context_length (`int` or `None`): Tokens with the prompt; `None` if the model has no bound.
        max_concurrent_episodes (`float`): Episodes that are played at once.
        patience (`float`): How long generation waits for an environment's answer before it goes on without, in seconds.
    """

    max_turns: int
    max_turn_length: int
    max_episode_length: int
    context_length: int | None = None
    max_concurrent_episodes: float = math.inf
    patience: float = math.inf


@dataclass
class _Playing:
    """An episode that is still being played."""

    start: EpisodeStart
    worker: EnvironmentWorker | None = None
    prompt: list[dict[str, Any]] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    observation_ids: list[int] = field(default_factory=list)  # before the next action; none in the first turn
    room: int = 0  # tokens left for the next action
    sample: Sample | None = None  # the action that the environment is to answer; None: `reset`
    text: str = ""
    action: str | None = None
    success: bool | None = None
    task: str | None = None
    num_late_answers: int = 0
    stop_reason: StopReason | None = None
    failure: str | None = None

    def reset(self, pool: EnvironmentPool) -> Future:
        """Ask an environment for the first observation."""
        try:
            self.worker = pool.take(self.start.environment)
        except KeyError as error:
            return _failed(error)
        return self.worker.reset(self.start.seed, self.start.options)

    def act(self, sample: Sample, chat: ChatEncoder, action_parser: ActionParser) -> Future:
        """Ask the environment to answer the sampled action."""
        self.sample = sample
        self.text = chat.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        try:
            self.action = action_parser(self.text)
        except Exception as error:
            return _failed(error)
        return self.worker.step(
            self.action or ""
        )  # no action is an empty one: the environment answers in its own words

    def take_answer(self, answer: Future, chat: ChatEncoder, limits: Limits) -> None:
        """Note what the environment answered, and prepare the next turn or stop."""
        try:
            if self.sample is None:
                self._begin(*answer.result(), chat, limits)
            else:
                self._note_turn(*answer.result(), chat, limits)
        except Exception as error:
            self.stop_reason = StopReason.FAILURE
            self.failure = "".join(traceback.format_exception(error))
            self.prompt = self.prompt or add_observation(self.start.prompt, "")
            logger.warning("An episode failed and is left out of training:\n%s", self.failure)

    def _begin(self, observation: str, info: dict[str, Any], chat: ChatEncoder, limits: Limits) -> None:
        self._note_info(info)
        self.prompt = add_observation(self.start.prompt, observation)
        self.prompt_ids = chat.encode_prompt(self.prompt)
        self.room = limits.max_episode_length
        if limits.context_length is not None:
            self.room = min(self.room, limits.context_length - len(self.prompt_ids))
        if self.room < 1:
            raise ValueError(
                f"The first prompt has {len(self.prompt_ids)} tokens, which leaves no room for an action in the "
                f"model's context of {limits.context_length} tokens."
            )

    def _note_turn(
        self,
        observation: str,
        reward: float,
        terminated: bool,
        truncated: bool,
        info: dict[str, Any],
        chat: ChatEncoder,
        limits: Limits,
    ) -> None:
        self._note_info(info)
        token_ids, logprobs = self.sample
        self.turns.append(
            Turn(
                observation_ids=tuple(self.observation_ids),
                action_ids=tuple(token_ids),
                logprobs=None if logprobs is None else tuple(logprobs),
                text=self.text,
                action=self.action,
                invalid=self.action is None or bool(info.get("invalid_action", False)),
                observation=observation,
                reward=reward,
            )
        )
        if terminated:
            self.stop_reason = StopReason.TERMINATED
        elif truncated:
            self.stop_reason = StopReason.TRUNCATED
        elif len(self.turns) == limits.max_turns:
            self.stop_reason = StopReason.MAX_TURNS
        else:
            self.observation_ids = chat.encode_observation(observation, last_action_token=token_ids[-1])
            self.room -= len(token_ids) + len(self.observation_ids)
            if self.room < 1:
                self.stop_reason = StopReason.TOKEN_BUDGET

    def _note_info(self, info: dict[str, Any]) -> None:
        success = info.get("success")
        task = self.start.options.get("task") or info.get("task")
        self.success = None if success is None else bool(success)
        self.task = None if task is None else str(task)

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
            prompt_ids=tuple(self.prompt_ids),
            turns=tuple(self.turns),
            stop_reason=self.stop_reason,
            success=self.success,
            task=self.task,
            options=self.start.options,
            seed=self.start.seed,
            num_late_answers=self.num_late_answers,
            failure=self.failure,
        )


def play_episodes(
    starts: Sequence[EpisodeStart],
    pool: EnvironmentPool,
    chat: ChatEncoder,
    sampler: TurnSampler,
    limits: Limits,
    action_parser: ActionParser = parse_action,
) -> list[Episode]:
    """
    Play one episode from each start, many of them at once.

    Environments answer on threads of their own while the sampler goes on with other episodes. What is sampled together
    depends on the episodes alone, not on how fast they answer, as long as each answer takes at most
    `limits.patience`; later ones join when they come, and are counted.

    An environment that raises, or answers something other than the contract says, costs its own episode: it ends
    with [`StopReason.FAILURE`] and the environment is replaced.

    Returns:
        `list[Episode]`: In the order of `starts`.
    """
    episodes = [_Playing(start) for start in starts]
    try:
        _play(episodes, pool, chat, sampler, limits, action_parser)
    finally:
        for episode in episodes:  # after an interruption some still have their environments
            episode.leave(pool)
    return [episode.finish() for episode in episodes]


def _play(
    episodes: list[_Playing],
    pool: EnvironmentPool,
    chat: ChatEncoder,
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
            while queue and num_open < limits.max_concurrent_episodes:
                index = queue.popleft()
                answers[index] = episodes[index].reset(pool)
                num_open += 1
            wait([answers[index] for index in answers.keys() - late], min(limits.patience, threading.TIMEOUT_MAX))
            if not sampler.is_busy and not any(answer.done() for answer in answers.values()):
                wait(answers.values(), return_when=FIRST_COMPLETED)
            answered = sorted(index for index, answer in answers.items() if answer.done())
            for index in answers.keys() - late - set(answered):
                episodes[index].num_late_answers += 1
            late = answers.keys() - answered
            if not answered:
                break
            for index in answered:
                episode = episodes[index]
                episode.take_answer(answers.pop(index), chat, limits)
                if episode.stop_reason is None:
                    # The first turn follows the prompt, any other the observation that answers the last action.
                    new_ids = episode.observation_ids if episode.turns else episode.prompt_ids
                    sampler.add(index, new_ids, min(limits.max_turn_length, episode.room))
                else:
                    sampler.drop(index)
                    episode.leave(pool)
                    num_open -= 1
        for index, sample in sampler.advance() if sampler.is_busy else ():
            answers[index] = episodes[index].act(sample, chat, action_parser)


def _failed(error: Exception) -> Future:
    future = Future()
    future.set_exception(error)
    return future


def add_observation(prompt: list[dict[str, Any]], observation: str) -> list[dict[str, Any]]:
    """`prompt` with the first observation appended to its last user message, or as a user message of its own."""
    if prompt and prompt[-1]["role"] == "user":
        content = prompt[-1]["content"]
        joined = f"{content}\n\n{observation}" if content and observation else content + observation
        return [*prompt[:-1], {**prompt[-1], "content": joined}]
    return [*prompt, {"role": "user", "content": observation}]
