"""Whom a policy imitates: an environment's expert, a teacher behind a chat endpoint, recorded chats, its own successes."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import gymnasium
import pyarrow.parquet as pq
from datasets import Dataset

from ..envs import TextEnv
from ..rollouts import (
    Episode,
    EpisodePlayer,
    EpisodeStart,
    PastTurn,
    StopReason,
    TurnView,
    environment_options,
    parse_tagged_action,
)
from ..text import shown
from ..trainer import EPOTrainer
from .demonstrations import Expert, Say, demonstrate, environment_expert, player_of, says, starts_of


logger = logging.getLogger(__name__)

TEACHER_REQUESTS = 8  # at once
BUSY = (429, 502, 503, 529)  # status codes of an endpoint that has too much to do just now
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds, before it is asked again, if it does not say how long …
LONGEST_PAUSE = 60.0  # … and at most, if it does
THINKING_TOKENS = 4096  # what a teacher that thinks may take for it, beside its answer

Chat = list[dict[str, str]]


def expert_episodes(
    trainer: EPOTrainer,
    rows: Iterable[dict[str, Any]],
    expert: Expert = environment_expert,
    noise: float = 0.0,
    learn_mistakes: bool = False,
    seed: int | None = None,
) -> list[Episode]:
    """
    An expert plays each dataset row. Where the prompt asks for `<action>` tags, its actions stand in such.

    Args:
        trainer ([`EPOTrainer`]): Has the environments, and says what the model sees.
        rows (`Iterable[dict]`): The dataset rows.
        expert (`Callable`, *optional*): Given an environment that was just reset, returns a function of an observation and its
            `info` that says the next action, or `None` for no more. By default the environment's own.
        noise (`float`, *optional*, defaults to `0.0`): The share of actions that are mistakes; only for an expert that knows how
            to go on from any state. A warm-up learns how the expert goes on from them. Half are drawn from
            `info["admissible_actions"]`, half are actions that were admissible before and are not now.
        learn_mistakes (`bool`, *optional*, defaults to `False`): The mistakes are learned too, and all are drawn from
            `info["admissible_actions"]`: the policy then errs as often, and tries more.
        seed (`int`, *optional*): Draws the mistakes; by default the trainer's.

    Raises:
        ValueError: If nothing can be imitated: the environment has no expert, all episodes fail, or no action fits.
    """
    check_noise(noise)
    player = player_of(trainer)
    starts = starts_of(player, rows)
    if expert is environment_expert and noise:
        expert = _expert_that_plans_anew
    form = "<action>{}</action>" if player.action_parser is parse_tagged_action else "{}"
    seed = trainer.args.seed if seed is None else seed
    experts = [expert] * len(starts)
    episodes = demonstrate(trainer, starts, experts, form=form, noise=noise, learn_mistakes=learn_mistakes, seed=seed)
    limits = {StopReason.MAX_TURNS: "max_turns", StopReason.TOKEN_BUDGET: "max_completion_length"}
    for reason, name in limits.items():
        if num_cut := sum(episode.stop_reason is reason for episode in episodes):
            logger.warning(
                f"`{name}` cuts {num_cut} of {len(episodes)} of the expert's episodes before they end: the policy would learn "
                "ways that do not lead to the goal. Raise it, or give rows whose episodes are shorter."
            )
    return episodes


def check_noise(noise: float) -> None:
    """Raise a `ValueError` if this can be no share of an expert's mistakes."""
    if not 0.0 <= noise < 1.0:
        raise ValueError(
            f"`noise` is {noise}, but must be at least 0 and below 1: the share of actions that are mistakes."
        )


def _expert_that_plans_anew(env: gymnasium.Env) -> Say:
    if not hasattr(env.unwrapped, "expert_action"):
        raise ValueError(
            f"`noise` wants an expert that can go on from any state, `expert_action()`, which {type(env.unwrapped).__name__} "
            "does not have. Leave `noise` out."
        )
    return environment_expert(env)


def teacher_episodes(
    trainer: EPOTrainer,
    rows: Iterable[dict[str, Any]],
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    temperature: float | None = None,
) -> list[Episode]:
    """
    A model behind an endpoint that speaks OpenAI's chat API plays each dataset row: it gets the messages that the policy
    would get, and its answers are the policy's text. Not all of them will be successes.

    Args:
        trainer ([`EPOTrainer`]): Has the environments, and says what the model sees.
        rows (`Iterable[dict]`): The dataset rows.
        url (`str`): Of the endpoint, up to `/v1`.
        model (`str`, *optional*): Its name there.
        api_key (`str`, *optional*): By default `$OPENAI_API_KEY`, if it is set. No other token is sent.
        temperature (`float`, *optional*): By default the trainer's.
    """
    player = player_of(trainer)
    starts = starts_of(player, rows)
    timeout = player.environments.timeout
    ask = _Endpoint(
        f"{url.rstrip('/')}/chat/completions",
        api_key or os.environ.get("OPENAI_API_KEY"),
        None if math.isinf(timeout) else timeout,
        model=model,
        max_tokens=player.limits.max_turn_length,
        temperature=trainer.args.temperature if temperature is None else temperature,
    )
    experts = [partial(_teacher, ask, player, start.prompt) for start in starts]
    return demonstrate(trainer, starts, experts, at_once=TEACHER_REQUESTS)


class _Endpoint:
    """Asks for the next message of a chat; `settings` are those of each request."""

    def __init__(self, url: str, api_key: str | None, timeout: float | None, **settings):
        self.url, self.timeout = url, timeout
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.settings = {name: value for name, value in settings.items() if value is not None}

    def __call__(self, messages: Chat) -> str:
        for pause in (*PAUSES, None):
            settings = self.settings
            body = json.dumps({"messages": messages, **settings}).encode()
            try:
                with urlopen(Request(self.url, body, self.headers), timeout=self.timeout) as response:
                    return self._text(json.load(response)["choices"][0])
            except HTTPError as error:
                answer = error.read(1000).decode(errors="replace")
                if "max_completion_tokens" in answer and "max_tokens" in settings:
                    # The bound's new name, of models that think: what they think counts, too
                    others = {name: value for name, value in settings.items() if name != "max_tokens"}
                    self.settings = {**others, "max_completion_tokens": THINKING_TOKENS + settings["max_tokens"]}
                    continue
                if pause is None or error.code not in BUSY:
                    raise RuntimeError(f"{self.url} answers {error.code}: {answer}") from error
                asked_for = error.headers.get("Retry-After", "")
                time.sleep(min(float(asked_for), LONGEST_PAUSE) if asked_for.isdecimal() else pause)
            except URLError as error:
                raise RuntimeError(f"{self.url} cannot be reached: {error.reason}") from error
        raise RuntimeError(f"{self.url} did not answer in {len(PAUSES) + 1} requests.")

    def _text(self, choice: dict[str, Any]) -> str:
        text = choice["message"]["content"] or ""
        if not text and choice.get("finish_reason") == "length":
            raise RuntimeError(
                f"{self.url} has used up the tokens that an answer may have, and said nothing: use a teacher that does not "
                "think, or thinks less."
            )
        return text


def _teacher(ask: Callable[[Chat], str], player: EpisodePlayer, prompt: Chat, env: gymnasium.Env) -> Say:
    past: list[PastTurn] = []
    observations: list[str] = []

    def say(observation: str, info: dict[str, Any]) -> str:
        observations.append(observation)
        history = tuple(past[max(0, len(past) - player.rules.context_turns) :])
        view = TurnView(prompt, observations[0], len(past), history, observation, info)
        text = ask(player.rules.messages(view, past))
        past.append(PastTurn(observation, text, player.action_parser(text) or text))
        return text

    return say


class RecordedChat(TextEnv):
    """Says a chat's user messages again, whatever the actions."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._remaining = iter(options["observations"])
        return next(self._remaining), {}

    def step(self, action):
        observation = next(self._remaining, None)
        return observation or "", 0.0, observation is None, False, {"success": True}


def chat_episodes(trainer: EPOTrainer, chats: Iterable[Chat | dict[str, Chat]]) -> list[Episode]:
    """
    Episodes from chats: messages, or dictionaries with the key `"messages"`. Those of the user are the observations, those of
    the assistant the policy's text; what comes before the first user message is the prompt. They count as successes.

    Raises:
        ValueError: If a chat's messages do not take turns.
    """
    starts, experts = [], []
    for number, chat in enumerate(chats):
        messages = chat["messages"] if isinstance(chat, dict) else chat
        roles = [message.get("role") for message in messages]
        first = roles.index("user") if "user" in roles else len(roles)
        turns = len(roles[first:]) // 2
        if not turns or roles[first:][: 2 * turns] != ["user", "assistant"] * turns:
            raise ValueError(
                f"Chat {number} has messages of the roles {shown(roles)}, but from the first user message on user and "
                "assistant must take turns."
            )
        texts = [message["content"] for message in messages[first:]]
        options = {"observations": texts[0 : 2 * turns : 2]}
        starts.append(EpisodeStart(messages[:first], 0, options))
        experts.append(partial(_recorded, texts[1 : 2 * turns : 2]))
    return demonstrate(trainer, starts, experts, factories={None: RecordedChat})


def _recorded(texts: list[str], env: gymnasium.Env) -> Say:
    return says(texts)


def read_chats(path: str | os.PathLike) -> list[Chat | dict[str, Chat]]:
    """Chats from a file with one JSON value a line."""
    chats = []
    # Other ends of a line may stand within a text
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                chats.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path} is not JSON: {error}") from error
    return chats


def _as_kept(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True, default=repr)


def kept_episodes(trainer: EPOTrainer, run: str | os.PathLike, success: bool = True) -> list[Episode]:
    """
    The training episodes that a run has kept, played again in the trainer's environments: what the model wrote there is said
    once more. The model may be another one, with another tokenizer.

    Args:
        trainer ([`EPOTrainer`]): Has the environments, and says what the model sees.
        run (`str`): The run's folder, with parquet files below `episodes/`.
        success (`bool`, *optional*, defaults to `True`): Only those that succeeded, and do so again.

    Raises:
        ValueError: If there are none.
    """
    player = player_of(trainer)
    columns = ["mode", "environment", "seed", "options", "success", "stop_reason", "turns"]
    kept = [
        row
        for path in sorted(Path(run, "episodes").rglob("*.parquet"))
        for row in pq.read_table(path, columns=columns).to_pylist()
        if row["mode"] == "train" and row["stop_reason"] != "failure" and row["turns"]
    ]
    wanted = [row for row in kept if row["success"] or not success]
    if not wanted:
        raise ValueError(
            f"{run} has kept {len(kept)} episodes of training (episodes/**/*.parquet), {len(wanted)} of which are "
            f"{'successes' if success else 'usable'}: there is nothing to imitate."
        )
    # A row's prompt is not kept with its episode, nor what JSON does not hold
    known = trainer.train_dataset if isinstance(trainer.train_dataset, Dataset) else ()
    originals = {_as_kept(environment_options(row)): row for row in known}
    rows = []
    for row in wanted:
        options = json.loads(row["options"] or "{}")
        original = originals.get(_as_kept(options))
        if original is not None:
            options = {**environment_options(original), "prompt": original.get("prompt")}
        rows.append({**options, "seed": row["seed"], "environment": row["environment"]})
    experts = [partial(_recorded, [turn["text"] for turn in row["turns"]]) for row in wanted]
    episodes = demonstrate(trainer, starts_of(player, rows), experts)
    return [episode for episode in episodes if episode.success or not success]
