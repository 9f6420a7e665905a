"""Episodes × turns: text environments played by a turn sampler. Knows no trainer and no torch.distributed."""

import logging
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium

from .chat import ChatEncoder
from .envs.base import check_reset, check_step
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
    What bounds an episode.

    Args:
        max_turns (`int`): Actions per episode.
        max_turn_length (`int`): New tokens per action.
        max_episode_length (`int`): Tokens after the prompt, observations included.
        context_length (`int` or `None`): Tokens with the prompt; `None` if the model has no bound.
    """

    max_turns: int
    max_turn_length: int
    max_episode_length: int
    context_length: int | None = None


class EnvironmentPool:
    """
    Makes environments when they are needed and keeps them for the next batch.

    Args:
        factory (`Callable` or `dict[str, Callable]`): Makes an environment; by name, if there are several.
    """

    def __init__(self, factory: Callable[[], gymnasium.Env] | dict[str, Callable[[], gymnasium.Env]]):
        self.named = isinstance(factory, dict)
        self._factories = factory if self.named else {None: factory}
        self._idle: dict[str | None, list[gymnasium.Env]] = {name: [] for name in self._factories}

    @property
    def names(self) -> list[str | None]:
        """The environments' names; `[None]` if there is a single, unnamed factory."""
        return list(self._factories)

    def take(self, name: str | None) -> gymnasium.Env:
        """An environment that nobody uses."""
        idle = self._idle[name]
        return idle.pop() if idle else self._factories[name]()

    def give_back(self, name: str | None, env: gymnasium.Env) -> None:
        """Keep an environment for later."""
        self._idle[name].append(env)

    def discard(self, env: gymnasium.Env) -> None:
        """Close an environment that failed; it is not used again."""
        try:
            env.close()
        except Exception:
            logger.warning("Closing a failed environment failed as well:\n%s", traceback.format_exc())

    def close(self) -> None:
        """Close all idle environments."""
        for idle in self._idle.values():
            while idle:
                self.discard(idle.pop())


@dataclass
class _Playing:
    """An episode that is still being played."""

    start: EpisodeStart
    env: gymnasium.Env | None = None
    prompt: list[dict[str, Any]] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    next_ids: list[int] = field(default_factory=list)  # observation tokens before the next action
    room: int = 0  # tokens left for the next action
    info: dict[str, Any] = field(default_factory=dict)
    stop_reason: StopReason | None = None
    failure: str | None = None

    def fail(self, error: Exception) -> None:
        self.stop_reason = StopReason.FAILURE
        self.failure = "".join(traceback.format_exception(error))
        logger.warning("An episode failed and is left out of training:\n%s", self.failure)

    def finish(self) -> Episode:
        success = self.info.get("success")
        task = self.start.options.get("task") or self.info.get("task")
        return Episode(
            prompt=self.prompt,
            prompt_ids=tuple(self.prompt_ids),
            turns=tuple(self.turns),
            stop_reason=self.stop_reason,
            success=None if success is None else bool(success),
            task=None if task is None else str(task),
            options=self.start.options,
            seed=self.start.seed,
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
    Play one episode from each start, all of them turn by turn together.

    An environment that raises, or answers something other than the contract says, costs its own episode: it ends
    with [`StopReason.FAILURE`] and the environment is replaced.

    Returns:
        `list[Episode]`: In the order of `starts`.
    """
    episodes = [_Playing(start) for start in starts]
    for episode in episodes:
        _reset(episode, pool, chat, limits)
    sampler.start([episode.prompt_ids for episode in episodes])
    while active := [index for index, episode in enumerate(episodes) if episode.stop_reason is None]:
        new_ids = [episodes[index].next_ids for index in active]
        room = [min(limits.max_turn_length, episodes[index].room) for index in active]
        for index, sample in zip(active, sampler.sample(active, new_ids, room), strict=True):
            _act(episodes[index], sample, chat, limits, action_parser)
    for episode in episodes:
        if episode.env is not None:
            if episode.stop_reason is StopReason.FAILURE:
                pool.discard(episode.env)
            else:
                pool.give_back(episode.start.environment, episode.env)
    return [episode.finish() for episode in episodes]


def _reset(episode: _Playing, pool: EnvironmentPool, chat: ChatEncoder, limits: Limits) -> None:
    start = episode.start
    try:
        episode.env = pool.take(start.environment)
        observation, episode.info = check_reset(episode.env.reset(seed=start.seed, options=dict(start.options)))
    except Exception as error:
        episode.prompt = add_observation(start.prompt, "")
        episode.prompt_ids = chat.encode_prompt(episode.prompt)
        return episode.fail(error)
    episode.prompt = add_observation(start.prompt, observation)
    episode.prompt_ids = chat.encode_prompt(episode.prompt)
    episode.room = limits.max_episode_length
    if limits.context_length is not None:
        episode.room = min(episode.room, limits.context_length - len(episode.prompt_ids))
    if episode.room < 1:
        episode.fail(
            ValueError(
                f"The first prompt has {len(episode.prompt_ids)} tokens, which leaves no room for an action in the "
                f"model's context of {limits.context_length} tokens."
            )
        )


def _act(episode: _Playing, sample: Sample, chat: ChatEncoder, limits: Limits, action_parser: ActionParser) -> None:
    """Play the sampled turn: parse the action, step the environment, note the turn, prepare the next or stop."""
    text = chat.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    try:
        action = action_parser(text)
        # No action is an empty one: the environment answers it in its own words.
        observation, reward, terminated, truncated, episode.info = check_step(episode.env.step(action or ""))
    except Exception as error:
        return episode.fail(error)
    episode.turns.append(
        Turn(
            observation_ids=tuple(episode.next_ids),
            action_ids=tuple(sample.token_ids),
            logprobs=None if sample.logprobs is None else tuple(sample.logprobs),
            text=text,
            action=action,
            invalid=action is None or bool(episode.info.get("invalid_action", False)),
            observation=observation,
            reward=reward,
        )
    )
    if terminated:
        episode.stop_reason = StopReason.TERMINATED
    elif truncated:
        episode.stop_reason = StopReason.TRUNCATED
    elif len(episode.turns) == limits.max_turns:
        episode.stop_reason = StopReason.MAX_TURNS
    else:
        episode.next_ids = chat.encode_observation(observation, last_action_token=sample.token_ids[-1])
        episode.room -= len(sample.token_ids) + len(episode.next_ids)
        if episode.room < 1:
            episode.stop_reason = StopReason.TOKEN_BUDGET


def add_observation(prompt: list[dict[str, Any]], observation: str) -> list[dict[str, Any]]:
    """`prompt` with the first observation appended to its last user message, or as a user message of its own."""
    if prompt and prompt[-1]["role"] == "user":
        content = prompt[-1]["content"]
        joined = f"{content}\n\n{observation}" if content and observation else content + observation
        return [*prompt[:-1], {**prompt[-1], "content": joined}]
    return [*prompt, {"role": "user", "content": observation}]
