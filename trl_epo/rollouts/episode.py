"""What an episode is: turns of sampled tokens and observations, and the training row they make."""

import math
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from .failures import Failure


class StopReason(StrEnum):
    """Why an episode ended."""

    TERMINATED = "terminated"  # the environment's own end: goal reached or lost
    TRUNCATED = "truncated"  # the environment's turn limit
    MAX_TURNS = "max_turns"  # the trainer's turn limit
    TOKEN_BUDGET = "token_budget"  # no room for another turn in the episode's tokens
    FAILURE = "failure"  # it could not be played to an end, see `Episode.failures`; it is not trained on


@dataclass(frozen=True)
class Turn:
    """
    One action of the policy and the environment's answer.

    Args:
        observation_ids (`tuple[int, ...]`): Tokens between the previous action and this one: the observation as the
            chat template renders it or, if the turn `starts_context`, its whole prompt. Empty for the first turn, whose
            observation ends the episode's prompt.
        action_ids (`tuple[int, ...]`): The tokens the policy sampled, as sampled.
        logprobs (`tuple[float, ...]` or `None`): Log-probability of each sampled token at the sampling temperature,
            in nats; `None` if the generation backend does not tell.
        text (`str`): The sampled text.
        action (`str` or `None`): What the action parser found in it; `None` if nothing.
        invalid (`bool`): Whether the parser found no action or the environment did not understand it.
        observation (`str`): The environment's answer to the action.
        reward (`float`): The environment's reward for the action.
        starts_context (`bool`): Whether the model saw none of the episode's earlier tokens, but a prompt of this
            turn's own.
        cut_thought (`bool`): Whether the text ends within a thought (`<think>`), which `max_turn_length` has cut or the
            model did not close.
        entropies (`tuple[float, ...]` or `None`): Entropy of the distribution that each token was sampled from, at the sampling
            temperature, in nats; `None` if the backend does not tell or was not asked.
        cut (`bool`): Whether a limit on tokens ended it, and not the model's end-of-turn token.
    """

    observation_ids: tuple[int, ...]
    action_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    text: str
    action: str | None
    invalid: bool
    observation: str
    reward: float
    starts_context: bool = False
    cut_thought: bool = False
    entropies: tuple[float, ...] | None = None
    cut: bool = False


@dataclass(frozen=True, repr=False)
class Episode:
    """
    An episode as it was played.

    Args:
        prompt (`list[dict]`): The first messages; the last one holds the first observation.
        prompt_ids (`tuple[int, ...]`): The same as tokens, with the assistant's header.
        turns (`tuple[Turn, ...]`): The turns in order.
        stop_reason ([`StopReason`]): Why it ended.
        success (`bool` or `None`): The environment's last `info["success"]`; `None` if it does not tell.
        task (`str` or `None`): The kind of task, for metrics: one printable line, at most 100 characters.
        environment (`str` or `None`): Which of several environments it was played in.
        options (`dict`): The dataset row the environment was reset with.
        seed (`int`): The seed it was reset with.
        num_late_answers (`int`): How often generation went on without the environment's answer.
        failures (`tuple[Failure, ...]`): The attempts to play it that failed. What else is told here is of the last
            attempt, which failed as well if `stop_reason` is a failure.
        first_observation (`str`): What `reset` answered.
        num_cut_observations (`int`): How many observations were longer than `max_observation_length`.
    """

    prompt: list[dict[str, Any]]
    prompt_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    success: bool | None = None
    task: str | None = None
    environment: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    num_late_answers: int = 0
    failures: tuple[Failure, ...] = ()
    first_observation: str = ""
    num_cut_observations: int = 0

    def __repr__(self) -> str:
        told = f"turns={len(self.turns)}, success={self.success}, return={self.episode_return:g}, {self.stop_reason.value}"
        return f"<{type(self).__name__}: task={self.task!r}, {told}>"

    @property
    def failed(self) -> bool:
        """Whether the environment failed, so that the episode is worth nothing as an experience."""
        return self.stop_reason is StopReason.FAILURE

    @property
    def cut_off(self) -> bool:
        """Whether a limit ended it: the environment's or the trainer's on turns, or the one on tokens."""
        return self.stop_reason in (StopReason.TRUNCATED, StopReason.MAX_TURNS, StopReason.TOKEN_BUDGET)

    @property
    def episode_return(self) -> float:
        """The undiscounted sum of the environment's rewards (γ = 1)."""
        return sum(turn.reward for turn in self.turns)

    def penalised_rewards(self, penalty: float) -> list[float]:
        """The environment's reward for each turn, less a penalty for each invalid action, in units of reward."""
        return [turn.reward - penalty * turn.invalid for turn in self.turns]

    @property
    def num_invalid_actions(self) -> int:
        """Number of turns whose action was invalid."""
        return sum(turn.invalid for turn in self.turns)

    @property
    def num_cut_thoughts(self) -> int:
        """Number of turns that end within a thought."""
        return sum(turn.cut_thought for turn in self.turns)

    @property
    def observations(self) -> list[str]:
        """What the model had read last before each turn's action."""
        return [self.first_observation, *(turn.observation for turn in self.turns)][: len(self.turns)]

    @property
    def context_lengths(self) -> list[int]:
        """Tokens of each of the contexts that the model saw, the sampled ones included; one for a plain transcript."""
        lengths = [len(self.prompt_ids)]
        for turn in self.turns:
            if turn.starts_context:
                lengths.append(0)
            lengths[-1] += len(turn.observation_ids) + len(turn.action_ids)
        return lengths

    @property
    def completion(self) -> list[dict[str, str]]:
        """The episode after its prompt as chat messages: assistant, user, …, assistant."""
        messages = []
        for turn in self.turns:
            messages.append({"role": "assistant", "content": turn.text})
            messages.append({"role": "user", "content": turn.observation})
        return messages[:-1] or [{"role": "assistant", "content": ""}]


def episode_return(episodes: list[Episode], invalid_action_penalty: list[float], **kwargs) -> list[float]:
    """The reward of a text episode: its return, less `invalid_action_penalty` for each invalid action."""
    return [
        math.fsum(episode.penalised_rewards(penalty))
        for episode, penalty in zip(episodes, invalid_action_penalty, strict=True)
    ]


@dataclass(frozen=True)
class EpisodeSummary:
    """
    What metrics need of an episode; small, so that processes can exchange it.

    Args:
        row (`int`): Which group of the generation batch, or which row of the panel, it is an episode of.
        environment (`str` or `None`): Which of several environments it was played in.
    """

    task: str | None
    success: bool | None
    episode_return: float
    num_turns: int
    num_invalid_actions: int
    num_late_answers: int
    stop_reason: StopReason
    row: int = 0
    num_cut_observations: int = 0
    num_cut_thoughts: int = 0
    num_cut_turns: int = 0
    environment: str | None = None

    @classmethod
    def of(cls, episode: Episode, row: int = 0) -> "EpisodeSummary":
        return cls(
            task=episode.task,
            success=episode.success,
            episode_return=episode.episode_return,
            num_turns=len(episode.turns),
            num_invalid_actions=episode.num_invalid_actions,
            num_late_answers=episode.num_late_answers,
            stop_reason=episode.stop_reason,
            row=row,
            num_cut_observations=episode.num_cut_observations,
            num_cut_thoughts=episode.num_cut_thoughts,
            num_cut_turns=sum(turn.cut for turn in episode.turns),
            environment=episode.environment,
        )

    def as_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return {**asdict(self), "stop_reason": self.stop_reason.value}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "EpisodeSummary":
        """What [`as_json`] gave."""
        return cls(**{**fields, "stop_reason": StopReason(fields["stop_reason"])})


@dataclass(frozen=True)
class Row:
    """
    One training row: parallel lists over the T tokens after the prompt.

    Args:
        completion_ids (`list[int]`): Actions and the observations between them.
        action_mask (`list[int]`): 1 at action tokens, 0 at observation tokens.
        turn_ids (`list[int]`): The turn of each action token, counted from 0; −1 at observation tokens.
        context_ids (`list[int]`): The context of each token, counted from 0: it attends to the earlier tokens of the
            same context only. The prompt belongs to context 0.
        logprobs (`list[float]` or `None`): Sampling log-probabilities in nats; 0.0 at observation tokens.
    """

    completion_ids: list[int]
    action_mask: list[int]
    turn_ids: list[int]
    context_ids: list[int]
    logprobs: list[float] | None

    def masked(self) -> "Row":
        """The same tokens, none of which is trained on."""
        length = len(self.completion_ids)
        return replace(self, action_mask=[0] * length, turn_ids=[-1] * length)


def episode_row(episode: Episode, placeholder_id: int) -> Row:
    """
    Lay an episode's sampled tokens out as a training row, one context after the other; nothing is tokenised again.

    A failed episode gives two masked `placeholder_id` tokens, so that it keeps its place in the batch without being
    trained on. (Where all rows have one token, TRL's metrics count rows instead of tokens, masked ones too.)
    """
    if episode.failed or not episode.turns:
        return Row([placeholder_id] * 2, [0] * 2, [-1] * 2, [0] * 2, [0.0] * 2)
    completion_ids, action_mask, turn_ids, context_ids, logprobs = [], [], [], [], []
    context = 0
    for index, turn in enumerate(episode.turns):
        num_observation, num_action = len(turn.observation_ids), len(turn.action_ids)
        context += turn.starts_context
        completion_ids += [*turn.observation_ids, *turn.action_ids]
        action_mask += [0] * num_observation + [1] * num_action
        turn_ids += [-1] * num_observation + [index] * num_action
        context_ids += [context] * (num_observation + num_action)
        if turn.logprobs is not None:
            logprobs += [0.0] * num_observation + [*turn.logprobs]
    logprobs = logprobs if len(logprobs) == len(completion_ids) else None
    return Row(completion_ids, action_mask, turn_ids, context_ids, logprobs)
