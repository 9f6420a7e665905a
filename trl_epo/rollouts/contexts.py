"""What the model sees before each action: one growing transcript, or a window that is built anew each turn."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..text import printable, whole_messages
from .chat import ChatEncoder


class PastTurn(NamedTuple):
    """
    A turn that is over.

    Args:
        observation (`str`): What the model had read when it acted.
        text (`str`): What it wrote.
        action (`str`): The action found in it; the text, if none was.
    """

    observation: str
    text: str
    action: str


@dataclass(frozen=True)
class TurnView:
    """
    What a prompt builder is told about the turn that it is to ask for.

    Args:
        prompt (`list[dict]`): The dataset row's messages, or else the environment's instructions as one; they come before
            everything else; may be empty.
        task (`str`): The episode's first observation, which says what the task is.
        num_steps (`int`): Actions taken so far.
        history (`tuple[PastTurn, ...]`): The last turns, oldest first; at most `context_turns`.
        observation (`str`): The present observation.
        info (`dict`): What the environment said with it, e.g. `"admissible_actions"`.
    """

    prompt: list[dict[str, Any]]
    task: str
    num_steps: int
    history: tuple[PastTurn, ...]
    observation: str
    info: dict[str, Any]


PromptBuilder = Callable[[TurnView], str | list[dict[str, str]]]

INSTRUCTIONS = (
    "First reason step by step about what to do next, inside <think> </think>. Then choose one action and write it "
    "inside <action> </action>."
)


def describe_turn(turn: TurnView) -> str:
    """
    The task, the number of steps, the last turns, the present observation and the admissible actions, or else the forms
    of actions, as text.
    """
    parts = [f"Your task and where you began:\n{turn.task}"]
    if turn.num_steps:
        parts.append(f"You have taken {turn.num_steps} step{'s' * (turn.num_steps > 1)}.")
        first = turn.num_steps - len(turn.history) + 1
        for step, past in enumerate(turn.history, start=first):
            parts.append(f"Observation {step}: {past.observation}\nAction {step}: {past.action}")
        parts.append(f"Observation {turn.num_steps + 1}, now: {turn.observation}")
    if actions := turn.info.get("admissible_actions"):
        parts.append("Actions that are possible now: " + "; ".join(actions))
    elif templates := turn.info.get("action_templates"):
        parts.append("Forms of actions: " + "; ".join(templates))
    return "\n\n".join(parts)


def build_prompt(turn: TurnView) -> str:
    """
    The default `prompt_builder` of `context="window"`, with the parts of the paper's prompts: role, task, number of
    steps, the last observations and actions, the present observation, admissible actions or the forms of actions, and
    the form of the answer.
    """
    return f"You are an expert agent in a text environment.\n\n{describe_turn(turn)}\n\n{INSTRUCTIONS}"


def add_observation(prompt: list[dict[str, Any]], observation: str) -> list[dict[str, Any]]:
    """`prompt` with the first observation appended to its last user message, or as a user message of its own."""
    if prompt and prompt[-1]["role"] == "user":
        content = prompt[-1]["content"]
        joined = f"{content}\n\n{observation}" if content and observation else content + observation
        return [*prompt[:-1], {**prompt[-1], "content": joined}]
    return [*prompt, {"role": "user", "content": observation}]


class NextTurn(NamedTuple):
    """
    What the model is to read before an action.

    Args:
        new_ids (`list[int]`): Tokens that follow those of the context so far or, if `starts_context`, a whole prompt.
        starts_context (`bool`): Whether a new context begins, which holds nothing of the last one.
        room (`float`): Tokens that the action may take.
    """

    new_ids: list[int]
    starts_context: bool
    room: float


class ContextRules:
    """
    Decides what the model sees before each action.

    Args:
        chat ([`~trl_epo.rollouts.chat.ChatEncoder`]): Turns messages into tokens.
        max_length (`float`): Longest context after its first prompt, in tokens, observations included.
        context_length (`int` or `None`): Longest context, in tokens; `None` if the model has no bound.
        max_turn_length (`int`): New tokens per action.
        window (`bool`): Whether every turn has a prompt of its own. A prompt that goes on where the context so far
            ends, token by token, goes on with it; any other begins a new context.
        overflow_to_window (`bool`): Whether a transcript without room for another whole turn goes on with such a
            prompt, instead of ending the episode.
        context_turns (`int`): Last turns that a prompt may tell about; fewer if they do not fit.
        prompt_builder (`Callable`): Makes the prompt, as a text or as messages, from a [`TurnView`].
    """

    def __init__(
        self,
        chat: ChatEncoder,
        max_length: float,
        context_length: int | None = None,
        max_turn_length: int = 1,
        window: bool = False,
        overflow_to_window: bool = False,
        context_turns: int = 2,
        prompt_builder: PromptBuilder = build_prompt,
    ):
        self.chat = chat
        self.max_length = max_length
        self.context_length = context_length
        self.max_turn_length = max_turn_length
        self.window = window
        self.overflow_to_window = overflow_to_window
        self.context_turns = context_turns
        self.prompt_builder = prompt_builder

    def check_builder(self, prompt: list[dict[str, Any]], observation: str, info: dict[str, Any]) -> None:
        """
        Try the prompt builder on an episode's first turn and on a later one.

        Raises:
            ValueError: If it raises, or builds something other than a text or messages.
        """
        if not (self.window or self.overflow_to_window):
            return
        for num_steps in (0, 1):
            past = (PastTurn(observation, "", ""),) * min(num_steps, self.context_turns)
            try:
                self.chat.encode_prompt(self._build(TurnView(prompt, observation, num_steps, past, observation, info)))
            except Exception as error:
                raise ValueError(
                    f"The `prompt_builder` could not build a prompt for turn {num_steps} of the dataset's first row: "
                    f"{type(error).__name__}: {printable(str(error))}. It gets a `trl_epo.rollouts.contexts.TurnView` and must return "
                    "the user message as a `str`, or a list of messages."
                ) from error

    def longest_context(self, prompt: list[dict[str, Any]], observation: str, info: dict[str, Any]) -> float:
        """An estimate of the longest context, in tokens, for episodes whose first prompt is as long as this one."""
        try:
            _, first = self.first(prompt, observation, info)
        except Exception:  # costs its episode, not the run
            return self.context_length or self.max_length
        return min(self.context_length or math.inf, len(first.new_ids) + self.max_length)

    def first(
        self, prompt: list[dict[str, Any]], observation: str, info: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], NextTurn]:
        """
        The first messages of an episode, and the same as tokens.

        Raises:
            ValueError: If they leave no room for an action.
        """
        if self.window:
            messages = self._build(TurnView(prompt, observation, 0, (), observation, info))
        else:
            messages = whole_messages(add_observation(prompt, observation))
        ids = self.chat.encode_prompt(messages)
        room = self._room(len(ids), len(ids))
        if room < 1:
            raise ValueError(
                f"The first prompt has {len(ids)} tokens, which leaves no room for an action in the model's context "
                f"of {self.context_length} tokens."
            )
        return messages, NextTurn(ids, True, room)

    def next(self, context: list[int], prompt_length: int, turn: TurnView, past: list[PastTurn]) -> NextTurn | None:
        """
        What comes after an action.

        Args:
            context (`list[int]`): The context so far, up to the last action's last token.
            prompt_length (`int`): How many of these were its first prompt.
            turn ([`TurnView`]): The coming turn, without its history.
            past (`list[PastTurn]`): All turns so far.

        Returns:
            [`NextTurn`], or `None` if there is no room for another action.
        """
        whole_turn = min(self.max_turn_length, self.max_length)
        if not self.window:
            new_ids = self.chat.encode_observation(turn.observation, last_action_token=context[-1])
            room = self._room(len(context) + len(new_ids), prompt_length)
            if room >= (whole_turn if self.overflow_to_window else 1):
                return NextTurn(new_ids, False, room)
            if not self.overflow_to_window:
                return None
        roomiest = None
        for num_turns in range(min(self.context_turns, len(past)), -1, -1):
            ids = self.chat.encode_prompt(self._build(replace(turn, history=tuple(past[len(past) - num_turns :]))))
            choices = [NextTurn(ids, True, self._room(len(ids), len(ids)))]
            if len(ids) > len(context) and ids[: len(context)] == context:
                choices.insert(0, NextTurn(ids[len(context) :], False, self._room(len(ids), prompt_length)))
            for choice in choices:
                if choice.room >= whole_turn:
                    return choice
                if choice.room >= (1 if roomiest is None else roomiest.room + 1):
                    roomiest = choice
        return roomiest

    def messages(self, turn: TurnView, past: list[PastTurn]) -> list[dict[str, Any]]:
        """A turn's context as messages: its prompt where there are windows, else the transcript of all turns so far."""
        if self.window:
            return self._build(turn)
        chat = add_observation(turn.prompt, turn.task)
        observations = [*(then.observation for then in past[1:]), turn.observation][: len(past)]
        for then, observation in zip(past, observations, strict=True):
            chat += [{"role": "assistant", "content": then.text}, {"role": "user", "content": observation}]
        return whole_messages(chat)

    def _build(self, turn: TurnView) -> list[dict[str, Any]]:
        built = self.prompt_builder(turn)
        return whole_messages(add_observation(turn.prompt, built) if isinstance(built, str) else built)

    def _room(self, length: int, prompt_length: int) -> float:
        """Tokens left in a context that holds `length`, `prompt_length` of which were its first prompt."""
        room = self.max_length - (length - prompt_length)
        if self.context_length is not None:
            room = min(room, self.context_length - length)
        return room
