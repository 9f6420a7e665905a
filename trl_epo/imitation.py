"""
The warm-up: a policy learns to do what someone has shown, so that reinforcement learning starts from one that sometimes
succeeds. Episodes are played with the trainer's own rules, limits and chat encoder while someone else says the actions, so
that the tokens, prompts and masks are those of its rollouts.
"""

import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import gymnasium
import pyarrow.parquet as pq
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from .envs import TextEnv
from .rollouts import (
    ChatEncoder,
    EnvironmentPool,
    Episode,
    EpisodePlayer,
    EpisodeStart,
    PastTurn,
    TurnView,
    environment_options,
    episode_row,
    parse_tagged_action,
    play_episodes,
)
from .runs import own_randomness
from .sampling import Sample, TurnSampler
from .seams import head_tiles
from .text import shown
from .trainer import EPOTrainer


logger = logging.getLogger(__name__)

TEACHER_REQUESTS = 8  # at once
ENOUGH_TO_GIVE_UP = 8  # episodes none of which can be used
IMPOSSIBLE = 0.5  # share of the mistakes, where they are read and not learned
IGNORED = -100  # the label of a token without loss

Chat = list[dict[str, str]]
# Given an observation and its info: what to say; `None`: no more.
Say = Callable[[str, dict[str, Any]], str | None]
# Given an environment that was just reset: who says the actions of this episode.
Expert = Callable[[gymnasium.Env], Say]


def environment_expert(env: gymnasium.Env) -> Say:
    """
    The environment's own expert: `expert_action()`, which plans anew from whatever state it is in, or `expert_actions()`,
    a list from the first observation on.

    Raises:
        ValueError: If the environment has neither.
    """
    env = env.unwrapped
    if hasattr(env, "expert_action"):
        return lambda observation, info: env.expert_action()
    if not hasattr(env, "expert_actions"):
        raise ValueError(
            f"The environment {type(env).__name__} has no expert: neither `expert_action()` nor `expert_actions()`. Give "
            "one of your own, chats, kept episodes or a teacher."
        )
    actions = []
    for action in env.expert_actions():
        # ScienceWorld's solutions focus on things that no observation has named, which a policy could only guess.
        actions += ["look around", action] if action.startswith("focus on") else [action]
    return _says(actions)


def _says(texts: Iterable[str]) -> Say:
    remaining = iter(texts)
    return lambda observation, info: next(remaining, None)


class Demonstration(gymnasium.Wrapper):
    """
    An environment with someone beside it who says what to do.

    Args:
        env (`gymnasium.Env`): The environment.
        expert (`Callable`): Asked after each `reset` for who says the actions of the episode.
        form (`str`): What the model is to write for an action.
        noise (`float`): The share of actions that are mistakes. Episodes then show how to go on after one, which a policy
            that makes mistakes needs to know.
        impossible (`float`): The share of mistakes that cannot be done at that moment, but could before, or in the episode
            before. The others are drawn from the admissible actions.
        draw (`random.Random`, *optional*): Draws them.

    Attributes:
        text (`str` or `None`): What to say next; `None` if the episode has ended.
        mistakes (`list[int]`): The turns, from 0, whose text is a mistake.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        expert: Expert,
        form: str = "{}",
        noise: float = 0.0,
        impossible: float = 0.0,
        draw: random.Random | None = None,
    ):
        super().__init__(env)
        self.expert = expert
        self.form = form
        self.noise = noise
        self.impossible = impossible
        self.draw = draw or random.Random(0)
        self.text: str | None = None
        self.mistakes: list[int] = []
        self._turn = 0
        self._say: Say | None = None
        # Actions that were admissible in the episode before and in this one
        self._possible: list[dict[str, None]] = []

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        self.mistakes, self._turn = [], 0
        self._possible = [*self._possible[-1:], {}]
        self._say = self.expert(self.env)
        self._choose(observation, info)
        if self.text is None:
            raise RuntimeError("The expert says nothing to the first observation.")
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.text = None
        self._turn += 1
        if not (terminated or truncated):
            self._choose(observation, info)
            truncated = self.text is None  # the expert has no more to say
        return observation, reward, terminated, truncated, info

    def _choose(self, observation: str, info: dict[str, Any]) -> None:
        admissible = dict.fromkeys(info.get("admissible_actions", ()))
        if self.draw.random() < self.noise:
            useful = [a for a in admissible if a not in ("look", "inventory")]
            if self.impossible and self.draw.random() < self.impossible:
                useful = [a for actions in self._possible for a in actions if a not in admissible] or useful
            text = self.draw.choice(useful or ["look"])
            self.mistakes.append(self._turn)
        else:
            text = self._say(observation, info)
        self._possible[-1].update(admissible)
        self.text = None if text is None else self.form.format(text)


@dataclass(frozen=True)
class DemonstratedEpisode(Episode):
    """
    An episode whose actions someone has said.

    Args:
        mistakes (`frozenset[int]`): The turns, from 0, that were mistakes made on purpose. They are read, not learned.
    """

    mistakes: frozenset[int] = frozenset()


class _DemonstrationSampler:
    """A turn sampler that says what the demonstrations say, by the place that an episode has."""

    wants_turns = waits_for_turns = True
    max_episodes = math.inf

    def __init__(self, demonstrations: dict[int, Demonstration], chat: ChatEncoder):
        self._demonstrations = demonstrations
        self._chat = chat
        self._asked: dict[int, int] = {}  # by episode: the turn's limit

    def add(self, episode: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        self._asked[episode] = max_new_tokens

    def rewind(self, episode: int, num_tokens: int) -> None:
        pass

    def drop(self, episode: int) -> None:
        pass

    @property
    def is_busy(self) -> bool:
        return bool(self._asked)

    def advance(self) -> list[tuple[int, Sample]]:
        asked, self._asked = self._asked, {}
        return [(episode, Sample(self._ids(episode)[:limit], None)) for episode, limit in asked.items()]

    def _ids(self, episode: int) -> list[int]:
        text = self._demonstrations[episode].text
        if self._chat.opens_thought and "</think>" not in text:
            text = f"</think>\n\n{text}"  # an open thought would swallow the action
        return self._chat.encode_action(text)


def demonstrate(
    trainer: EPOTrainer,
    starts: Sequence[EpisodeStart],
    experts: Sequence[Expert],
    factories: dict[str | None, Callable[[], gymnasium.Env]] | None = None,
    form: str = "{}",
    noise: float = 0.0,
    learn_mistakes: bool = False,
    seed: int = 0,
    at_once: int = 1,
) -> list[Episode]:
    """
    Play an episode from each start, with an expert for each, as the trainer plays its rollouts. Those that fail, or hold
    a text that is longer than `max_turn_length`, are left out.

    Args:
        trainer ([`EPOTrainer`]): Has the environments, and says what the model sees.
        starts (`list[EpisodeStart]`): Where the episodes begin.
        experts (`list[Callable]`): Who says the actions of each.
        factories (`dict`, *optional*): What makes the environments, by name; by default the trainer's.
        form (`str`): What the model is to write for an action.
        noise (`float`): The share of mistakes; they are drawn in the order of the episodes, which are played one at a time.
        learn_mistakes (`bool`): Whether the mistakes are learned too.
        seed (`int`): Draws them.
        at_once (`int`): Episodes that are played at once.

    Raises:
        ValueError: If none of the first ones can be used, or the trainer has no text environment or several processes.
    """
    player = _player_of(trainer)
    makers = player.environments.factories if factories is None else factories
    draw = random.Random(seed)
    present: dict[int, Expert] = {}  # by place
    demonstrations: dict[int, Demonstration] = {}

    def make(place: int, name: str | None) -> Demonstration:
        def begin(env: gymnasium.Env) -> Say:  # a place has an environment of each name
            demonstrations[place] = demonstration
            return present[place](env)

        demonstration = Demonstration(makers[name](), begin, form, noise, 0.0 if learn_mistakes else IMPOSSIBLE, draw)
        return demonstration

    places = range(min(at_once, len(starts)))
    pool = EnvironmentPool(
        {_name(place, name): partial(make, place, name) for place in places for name in makers},
        player.environments.timeout,
    )
    sampler = cast(
        TurnSampler, _DemonstrationSampler(demonstrations, player.rules.chat)
    )  # all that is asked of it here
    limits = replace(player.limits, patience=math.inf, max_concurrent_episodes=math.inf)
    usable: list[Episode] = []
    num_failed = num_cut = 0
    with closing(pool):
        for first in range(0, len(starts), at_once):
            batch = starts[first : first + at_once]
            present.update(enumerate(experts[first : first + at_once]))
            placed = [replace(start, environment=_name(place, start.environment)) for place, start in enumerate(batch)]
            played = play_episodes(placed, pool, player.rules, sampler, limits, player.action_parser)
            for place, (start, episode) in enumerate(zip(batch, played, strict=True)):
                cut = any(turn.action_ids[-1] not in player.rules.chat.eos_token_ids for turn in episode.turns)
                num_failed += episode.failed
                num_cut += cut and not episode.failed
                if not (episode.failed or cut):
                    told = {**vars(episode), "environment": start.environment}
                    mistakes = frozenset[int]() if learn_mistakes else frozenset(demonstrations[place].mistakes)
                    usable.append(DemonstratedEpisode(**told, mistakes=mistakes))
                why = episode.failures[-1].cause if episode.failed else "an action has more tokens than that"
            num_played = first + len(batch)
            if not usable and num_played >= min(ENOUGH_TO_GIVE_UP, len(starts)):
                raise ValueError(
                    f"None of the first {num_played} demonstrated episodes can be used ({num_cut} hold a text that is longer "
                    f"than `max_turn_length={player.limits.max_turn_length}` tokens, {num_failed} failed): {why}."
                )
    if num_failed or num_cut:
        logger.warning(
            "%d of %d demonstrated episodes are left out: %d failed, %d hold a text that is longer than `max_turn_length` (%d "
            "tokens).",
            num_failed + num_cut,
            len(starts),
            num_failed,
            num_cut,
            player.limits.max_turn_length,
        )
    return usable


def _name(place: int, name: str | None) -> str:
    return str(place) if name is None else f"{place} {name}"


def _player_of(trainer: EPOTrainer) -> EpisodePlayer:
    if trainer.player is None:
        raise ValueError("The trainer has no text environment: give it an `environment_factory`, then warm it up.")
    if trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"A warm-up runs in one process, but there are {trainer.accelerator.num_processes}. Warm up by itself, save the "
            "model, and train that with as many as you like."
        )
    return trainer.player


def _starts(player: EpisodePlayer, rows: Iterable[dict[str, Any]]) -> list[EpisodeStart]:
    return [player.start(row, "train", 0, index, 0) for index, row in enumerate(rows)]


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
    if not 0.0 <= noise < 1.0:
        raise ValueError(
            f"`noise` is {noise}, but must be at least 0 and below 1: the share of actions that are mistakes."
        )
    player = _player_of(trainer)
    starts = _starts(player, rows)
    if expert is environment_expert and noise:
        expert = _expert_that_plans_anew
    form = "<action>{}</action>" if player.action_parser is parse_tagged_action else "{}"
    seed = trainer.args.seed if seed is None else seed
    experts = [expert] * len(starts)
    return demonstrate(trainer, starts, experts, form=form, noise=noise, learn_mistakes=learn_mistakes, seed=seed)


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
    player = _player_of(trainer)
    starts = _starts(player, rows)
    timeout = player.environments.timeout
    ask = partial(
        _ask,
        f"{url.rstrip('/')}/chat/completions",
        api_key or os.environ.get("OPENAI_API_KEY"),
        None if math.isinf(timeout) else timeout,
        model=model,
        max_tokens=player.limits.max_turn_length,
        temperature=trainer.args.temperature if temperature is None else temperature,
    )
    experts = [partial(_teacher, ask, player, start.prompt) for start in starts]
    return demonstrate(trainer, starts, experts, at_once=TEACHER_REQUESTS)


def _ask(url: str, api_key: str | None, timeout: float | None, messages: Chat, **settings) -> str:
    body = {"messages": messages, **{name: value for name, value in settings.items() if value is not None}}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = Request(url, json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=timeout) as response:
            answer = json.load(response)
    except HTTPError as error:
        raise RuntimeError(f"{url} answers {error.code}: {error.read(1000).decode(errors='replace')}") from error
    except URLError as error:
        raise RuntimeError(f"{url} cannot be reached: {error.reason}") from error
    return answer["choices"][0]["message"]["content"] or ""


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
    return _says(texts)


def read_chats(path: str | os.PathLike) -> list[Chat | dict[str, Chat]]:
    """Chats from a file with one JSON value a line."""
    chats = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        if line.strip():
            try:
                chats.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path} is not JSON: {error}") from error
    return chats


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
    player = _player_of(trainer)
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
    # What a row's prompt was is not kept with its episode
    prompts = {
        json.dumps(environment_options(row), sort_keys=True): row["prompt"]
        for row in (trainer.train_dataset if "prompt" in (trainer.train_dataset.column_names or ()) else ())
    }
    rows = []
    for row in wanted:
        options = json.loads(row["options"] or "{}")
        prompt = prompts.get(json.dumps(options, sort_keys=True))
        rows.append({**options, "seed": row["seed"], "environment": row["environment"], "prompt": prompt})
    experts = [partial(_recorded, [turn["text"] for turn in row["turns"]]) for row in wanted]
    episodes = demonstrate(trainer, _starts(player, rows), experts)
    return [episode for episode in episodes if episode.success or not success]


def token_rows(episode: Episode, learn_observations: bool = False) -> list[dict[str, list[int]]]:
    """
    An episode as rows for supervised training, one for each context in which something is to be learned: `input_ids`, and
    `labels`, which are −100 at all tokens but the actions', and at those of mistakes.

    Args:
        episode ([`Episode`]): As it was played.
        learn_observations (`bool`, *optional*, defaults to `False`): All tokens are labels, but those of mistakes.
    """
    row = episode_row(episode, 0)
    mistakes = episode.mistakes if isinstance(episode, DemonstratedEpisode) else frozenset()
    rows = []
    for context in range(row.context_ids[-1] + 1):
        places = [place for place, its in enumerate(row.context_ids) if its == context]
        prompt = [] if context else list(episode.prompt_ids)
        ids = prompt + [row.completion_ids[place] for place in places]
        turns = [-1] * len(prompt) + [row.turn_ids[place] for place in places]
        labels = [
            token if (turn >= 0 or learn_observations) and turn not in mistakes else IGNORED
            for token, turn in zip(ids, turns, strict=True)
        ]
        if any(label != IGNORED for label in labels):
            rows.append({"input_ids": ids, "labels": labels})
    return rows


def warm_up(
    trainer: EPOTrainer,
    episodes: Iterable[Episode],
    learn_observations: bool = False,
    until_success: float | None = None,
    check_every: int = 50,
    **kwargs,
) -> float | None:
    """
    Train the trainer's model, an adapter or all weights, on the actions of `episodes` with TRL's [`~trl.SFTTrainer`]. Then
    `trainer.train()` goes on as if it had been made with the model that comes out.

    Args:
        trainer ([`EPOTrainer`]): Its model is trained.
        episodes (`Iterable[Episode]`): What to imitate.
        learn_observations (`bool`, *optional*, defaults to `False`):
            Learn to write observations too: a model that is new learns to read from them.
        until_success (`float`, *optional*):
            Stop as soon as the trainer's evaluation sets are solved this often (the mean over the sets), so that there is
            something left to learn.
        check_every (`int`, *optional*, defaults to `50`):
            Optimizer steps between two of these evaluations.
        kwargs:
            Of [`~trl.SFTConfig`], such as `num_train_epochs`, `learning_rate`, `per_device_train_batch_size`. Precision,
            gradient checkpointing, device and seed are the trainer's.

    Returns:
        `float` or `None`: The last evaluation's success, if there was one.

    Raises:
        ValueError: If there is nothing to learn from, or nothing to evaluate on, or success cannot be told.
    """
    _player_of(trainer)
    rows = [row for episode in episodes for row in token_rows(episode, learn_observations)]
    if not rows:
        raise ValueError("There are no episodes to learn from.")
    if until_success is not None:
        if not 0.0 < until_success <= 1.0:
            raise ValueError(f"`until_success` is {until_success}, but must be above 0 and at most 1.")
        if trainer.eval_dataset is None:
            raise ValueError("`until_success` needs an `eval_dataset`, the rows on which success is told.")
        if check_every < 1:
            raise ValueError(f"`check_every` is {check_every}, but must be at least 1.")
    stop = _StopAtSuccess(trainer, until_success, check_every)
    if until_success is not None and stop.is_reached():
        logger.warning("The model's success is %.1f %% without any warm-up.", 100 * stop.success)
    else:
        with own_randomness(trainer.args.seed, trainer.accelerator.device):
            _imitate(trainer, rows, [] if until_success is None else [stop], kwargs)
    if until_success is not None and stop.success < until_success:
        logger.warning(
            "The warm-up ends before `until_success=%s` was seen: the last evaluation's success is %.1f %%. Give more episodes, "
            "more passes over them or a higher learning rate.",
            until_success,
            100 * stop.success,
        )
    return stop.success


def _imitate(trainer: EPOTrainer, rows: list[dict], callbacks: list[TrainerCallback], kwargs: dict[str, Any]) -> None:
    args = trainer.args
    settings = {
        "output_dir": str(Path(args.output_dir, "warm_up")),
        "max_length": None,  # episodes have their bounds
        "save_strategy": "no",
        "report_to": "none",
        **{
            name: getattr(args, name)
            for name in (
                *("bf16", "fp16", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
                *("use_cpu", "seed", "disable_tqdm"),
            )
        },
        **kwargs,
    }
    with _forward_kept(trainer.model), head_tiles(trainer.accelerator.device):
        imitation = SFTTrainer(
            trainer.model,
            args=SFTConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=trainer.processing_class,
            callbacks=callbacks,
        )
        imitation.train()
        imitation.accelerator.free_memory()


@contextmanager
def _forward_kept(model: nn.Module) -> Iterator[None]:
    """What another trainer has put around the model's forward is taken off in the end."""
    modules = [model, model.get_base_model()] if is_peft_model(model) else [model]
    names = ("forward", "_original_forward")
    before = [{name: module.__dict__[name] for name in names if name in module.__dict__} for module in modules]
    try:
        yield
    finally:
        for module, had in zip(modules, before, strict=True):
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(had)


class _StopAtSuccess(TrainerCallback):
    """Ends training when the trainer's evaluation sets are solved often enough."""

    def __init__(self, trainer: EPOTrainer, until_success: float | None, check_every: int):
        self.trainer, self.until_success, self.check_every = trainer, until_success, check_every
        self.success: float | None = None

    def is_reached(self) -> bool:
        metrics = self.trainer.evaluate()
        rates = [rate for name, rate in metrics.items() if name.endswith("episode/success_rate")]
        if not rates:
            raise ValueError(
                'The environment does not tell of success (`info["success"]`): leave `until_success` out.'
            )
        self.success = sum(rates) / len(rates)
        return self.success >= self.until_success

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step == state.max_steps
        if state.global_step % self.check_every == 0 or last:
            control.should_training_stop = self.is_reached() or last
