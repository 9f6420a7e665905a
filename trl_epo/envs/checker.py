"""`check_env`: says in plain words what is wrong with a text environment."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium

from ..text import printable
from .base import InvalidAnswer, check_reset, check_step, how_to_wrap, instructions_of, looks_like_gymnasium


logger = logging.getLogger(__name__)

SEED = 0
SLOW = 1.0  # seconds
SIGNATURES = ". It is called as `reset(seed=0, options={})` and `step(action)`"
HOSTILE_ACTIONS = ("", "xyzzy", "\n", "<|im_end|>", "ÄÖÜ 🦉", "word " * 200)


def check_env(env: gymnasium.Env, options: dict[str, Any] | None = None) -> None:
    """
    Check that an environment keeps to the contract of text environments (see [`~trl_epo.envs.TextEnv`]).

    Plays a few steps, so use an instance of its own. Whether the environment is a good one it cannot tell. What makes
    training harder but breaks nothing is logged: no `instructions`, no `success`, no `invalid_action` however senseless the action,
    and calls that take longer than a second.

    Args:
        env (`gymnasium.Env`): The environment.
        options (`dict`, *optional*): A dataset row to reset it with.

    Raises:
        ValueError: Lists everything that is wrong, each with what was expected.

    >>> from trl_epo.envs.household import Household
    >>> check_env(Household())
    """
    if isinstance(env, type) or (callable(env) and not isinstance(env, gymnasium.Env)):
        raise ValueError(f"`env` is {env!r}, but must be an environment, not the thing that makes one. Call it first.")
    if not isinstance(env, gymnasium.Env):
        if looks_like_gymnasium(env):
            raise ValueError(how_to_wrap(env))
        raise ValueError(
            f"`env` is a {type(env).__name__}, but must be a `gymnasium.Env`. Derive it from `trl_epo.envs.TextEnv`."
        )
    notes: list[str] = []
    problems = [*_check_spaces(env), *_check_episode(env, options or {}, notes), *_check_instructions(env, notes)]
    for note in notes:
        logger.warning("%s: %s", type(env).__name__, note)
    if problems:
        lines = "".join(f"\n- {problem}" for problem in problems)
        raise ValueError(f"{type(env).__name__} is not a text environment yet:{lines}")


def _check_spaces(env: gymnasium.Env) -> list[str]:
    problems = []
    for name in ("observation_space", "action_space"):
        space = getattr(env, name, None)
        if not isinstance(space, gymnasium.spaces.Text):
            problems.append(f"`{name}` is {space!r}, but must be a `gymnasium.spaces.Text`: {name[:-6]}s are strings.")
    return problems


def _check_instructions(env: gymnasium.Env, notes: list[str]) -> list[str]:
    try:
        if instructions_of(env) is None:
            notes.append(
                "it has no `instructions`, so the model is not told the commands or the form of an answer. Set the attribute "
                "to a short text, or give the dataset a `prompt` column."
            )
    except Exception as error:
        return [printable(str(error))]
    return []


def _check_episode(env: gymnasium.Env, options: dict[str, Any], notes: list[str]) -> list[str]:
    problems: list[str] = []
    refused = False
    slowest, slowest_call = SLOW, ""

    def attempt(what: str, call: Callable[[], Any], check: Callable[[Any], Any]) -> Any:
        nonlocal slowest, slowest_call
        start = time.monotonic()
        try:
            answer = call()
        except Exception as error:
            hint = SIGNATURES if isinstance(error, TypeError) else ""
            problems.append(f"{what} raised {type(error).__name__}: {printable(str(error))}{hint}")
            return None
        if (seconds := time.monotonic() - start) > slowest:
            slowest, slowest_call = seconds, what
        try:
            return check(answer)
        except InvalidAnswer as error:
            problems.append(f"{what}: {error}")
            return None

    def reset():
        return attempt(
            f"`reset(seed={SEED}, options={options})`",
            lambda: env.reset(seed=SEED, options=dict(options)),
            check_reset,
        )

    first = reset()
    if first is None:
        return problems  # nothing else can be tried
    observation, info = first
    if not observation.strip():
        problems.append("The first observation is empty, but it must tell the agent its task.")
    for action in HOSTILE_ACTIONS:
        shown = _name(action)
        answer = attempt(f"`step({shown})`", partial(env.step, action), check_step)
        if answer is None:
            break
        observation, _, terminated, truncated, info = answer
        problems += _check_info(info)
        refused |= bool(info.get("invalid_action", False))
        if not observation.strip():
            problems.append(f"`step({shown})` answers with an empty text, but every reply must be a sentence.")
        if terminated or truncated:
            reset()
    if slowest_call:
        notes.append(
            f"{slowest_call} took {slowest:.1f} seconds. Others are not held up by an answer that takes longer than "
            "`environment_patience` (1 s by default), but the same seed then need not give the same run: raise it for that. One that "
            "takes longer than `env_timeout` (300 s) costs its episode."
        )
    if "success" not in info and not problems:
        notes.append('there is no `info["success"]`, so success rates are not told, and a warm-up cannot stop at one.')
    if not refused and not problems:
        notes.append(
            f'no nonsense is answered with `info["invalid_action"] = True` (tried: {", ".join(map(_name, HOSTILE_ACTIONS))}), '
            "so a run cannot tell a policy that does not know the commands from one that plays badly."
        )
    if not problems:
        again = reset()
        if again is not None and again[0] != first[0]:
            problems.append(
                f"`reset(seed={SEED})` gives another first observation the second time. The episodes of a group must "
                "start from the same state: draw everything from `self.np_random` after `super().reset(seed=seed)`."
            )
    return list(dict.fromkeys(problems))


def _name(action: str) -> str:
    return repr(action if len(action) <= 20 else action[:20] + "…")


def _check_info(info: dict[str, Any]) -> list[str]:
    problems = []
    for key in ("success", "invalid_action"):
        if key in info and info[key] not in (True, False):
            problems.append(f"`info[{key!r}]` is {info[key]!r}, but must be a `bool`.")
    for key in ("admissible_actions", "action_templates"):
        actions = info.get(key)
        if actions is not None and not all(isinstance(action, str) for action in actions):
            problems.append(f"`info[{key!r}]` is {actions!r}, but must be a list of `str`.")
    return problems
