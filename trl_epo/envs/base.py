"""The text-environment contract: a `gymnasium.Env` whose observations and actions are text."""

import random
import string
import textwrap
from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.spaces import Text


MAX_OBSERVATION_LENGTH = 100_000  # characters
MAX_ACTION_LENGTH = 1_000  # characters
MAX_REWARD = 3.4e38  # what float32 can hold


# For an object that talks as gymnasium's environments do but is none
WRAPPER = """\
from trl_epo.envs import TextEnv

class Wrapped(TextEnv):
    instructions = "What this is, the commands with an example, the form of an answer."
    def __init__(self):
        self.env = make()  # what makes the environment
    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed)
    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "success": reward == 1}
"""


class EnvironmentDied(RuntimeError):
    """The process that an environment lives in has died. The episode is lost; the next `reset` starts another process."""


class NeighbourTimeout(EnvironmentDied):
    """
    The process that several environments live in was ended because another one of them gave no answer. The episode is
    lost through no fault of its own, and is played again without using up one of its retries.
    """


class InvalidAnswer(ValueError):
    """An answer of an environment that breaks the contract."""


class TextEnv(gymnasium.Env[str, str]):
    """
    Base class of the environments in this package. Any other `gymnasium.Env` that keeps to the same contract works as
    well; `trl_epo.check_env` tells whether one does.

    - `reset(seed=, options=) -> (observation, info)`: the first observation says what the task is. The same seed and
      options give the same episode. `options` is the dataset row.
    - `step(action) -> (observation, reward, terminated, truncated, info)`: any string is an action; one that makes no
      sense is answered by a sentence, never by an exception. `terminated` is the environment's own end, `truncated` a
      turn limit of the environment.

    Keys of `info` that the trainer reads, all of them optional:

    - `"success"` (`bool`): whether the goal is reached. The last step's value is the episode's success.
    - `"invalid_action"` (`bool`): the environment did not understand this action.
    - `"task"` (`str`): the kind of task, for success rates per task.

    An environment whose calls can be ended from outside may have a method `interrupt()`. It is called from another thread
    when a call does not return in time, or is not waited for any more; that call then has to raise. `close` follows. If
    that ends other environments too, their calls should raise a [`NeighbourTimeout`]. An attribute `held_up_by_another` may
    tell that a call has not begun, as another environment is at work, or is about to raise that error; it then gets as much
    time again.

    The attribute `instructions` (`str`) tells the model what this is, the commands with an example, and the form of an
    answer. It comes before the first observation, as a system message where the chat template has one, unless the dataset
    has a `prompt` column. Without it the model knows nothing but the observations.

    An environment that knows a solution may have one of two methods, which `trl_epo.imitation` asks: `expert_action()`, the
    next action from whatever state it is in, or `expert_actions()`, all of them from the first observation on.

    By convention `"admissible_actions"` (`list[str]`) holds what may be done now, and where that is too much,
    `"action_templates"` (`list[str]`) the forms of actions. The default prompt of a window shows them; in a transcript the model
    sees them if the observation says them, see [`~trl_epo.envs.base.with_actions`].
    """

    observation_space = Text(max_length=MAX_OBSERVATION_LENGTH, min_length=0, charset=string.printable)
    action_space = Text(max_length=MAX_ACTION_LENGTH, min_length=0, charset=string.printable)
    instructions: str | None = None


def with_actions(observation: str, actions: Sequence[str]) -> str:
    """An observation that ends with what may be done now: `"… Possible now: go to study, take bowl."`"""
    return f"{observation} Possible now: {', '.join(actions)}." if actions else observation


def looks_like_gymnasium(env: Any) -> bool:
    """
    Whether an object has gymnasium's `step`, and a `reset` that answers `(observation, info)`, but is no `gymnasium.Env`, like
    GEM's environments. It is reset, if it has a `step`.
    """
    if isinstance(env, gymnasium.Env) or not callable(getattr(env, "step", None)):
        return False
    try:
        answer = env.reset(seed=0)
    except Exception:
        return False
    return isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)


def how_to_wrap(env: Any) -> str:
    """What to do with an object that looks like gymnasium's environments but is none."""
    return (
        f"{type(env).__name__} is no `gymnasium.Env`. If its `step` gives `(observation, reward, terminated, truncated, info)`, wrap "
        "it, in a `ProcessEnv` if it uses the global random numbers (trl_epo.envs.process):\n\n"
        f"{textwrap.indent(WRAPPER, '    ')}"
    )


def seeds_of(split: str, size: int, seed: int) -> list[int]:
    """
    `size` reset seeds of a split, all different, drawn with `seed`: for environments that make an episode from any seed.
    `"train"` and `"iid"` have none in common.

    Raises:
        ValueError: If the split is another one.
    """
    first = {"train": 0, "iid": 2**30}
    if split not in first:
        raise ValueError(f"unknown split {split!r}: expected 'train' or 'iid'")
    return [first[split] + number for number in random.Random(seed).sample(range(2**30), size)]


def instructions_of(env: gymnasium.Env) -> str | None:
    """
    What an environment, or the one that it wraps, tells the model to do; `None` if it says nothing.

    Raises:
        InvalidAnswer: If that is not a text.
    """
    text = env.get_wrapper_attr("instructions") if env.has_wrapper_attr("instructions") else None
    if text is not None and not isinstance(text, str):
        raise InvalidAnswer(f"`instructions` is {_describe(text)}, but must be a `str`, or `None` for none.")
    return text or None


def check_reset(result: Any) -> tuple[str, dict[str, Any]]:
    """Return the answer of `reset` if it keeps to the contract; raise an [`InvalidAnswer`] that says what is wrong if not."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise InvalidAnswer(f"`reset` returned {_describe(result)}, but must return `(observation, info)`.")
    _check_text_and_info("reset", *result)
    return result


def check_step(result: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """
    Return the answer of `step` if it keeps to the contract, with the reward as a `float`.

    Raises:
        InvalidAnswer: If a part has the wrong type, or the reward is not finite in float32.
    """
    if not isinstance(result, tuple) or len(result) != 5:
        raise InvalidAnswer(
            f"`step` returned {_describe(result)}, but must return `(observation, reward, terminated, truncated, info)`."
        )
    observation, reward, terminated, truncated, info = result
    _check_text_and_info("step", observation, info)
    try:
        if isinstance(reward, str | bytes | bytearray):  # which `float` would read
            raise TypeError(type(reward).__name__)
        reward = float(reward)
    except Exception as error:  # OverflowError for a large integer, and whatever the object raises
        raise InvalidAnswer(f"`step` returned the reward {_describe(reward)}, but it must be a number.") from error
    if not abs(reward) <= MAX_REWARD:  # NaN included
        raise InvalidAnswer(f"`step` returned the reward {reward}, but it must be finite, also as a float32.")
    try:
        return observation, reward, bool(terminated), bool(truncated), info
    except Exception as error:
        raise InvalidAnswer(
            f"`step` returned terminated={_describe(terminated)} and truncated={_describe(truncated)}, but both must be "
            "`bool`."
        ) from error


def _check_text_and_info(method: str, observation: Any, info: Any) -> None:
    if not isinstance(observation, str):
        raise InvalidAnswer(f"`{method}` returned the observation {_describe(observation)}, but it must be a `str`.")
    if not isinstance(info, dict):
        raise InvalidAnswer(f"`{method}` returned the info {_describe(info)}, but it must be a `dict`.")


def _describe(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
