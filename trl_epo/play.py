"""A saved model plays an episode, turn by turn, or you type the actions yourself."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from copy import copy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import gymnasium
from accelerate.utils import set_seed
from datasets import Dataset

from .config import EPOConfig
from .reports import PLAY_SETTINGS
from .rollouts import ChatEncoder, EnvironmentPool, Episode, Limits, environment_options, play_episodes
from .sampling import Sample, TurnSampler
from .saved import is_adapter, load_adapter, play_settings_file
from .text import printable
from .trainer import EPOTrainer


Show = Callable[[str], Any]  # e.g. `print`


class _ShownEnvironment(gymnasium.Wrapper):
    """Shows what the environment says."""

    def __init__(self, env: gymnasium.Env, show: Show):
        super().__init__(env)
        self._show = show

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        self._show(printable(observation))
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not action:
            self._show("(no action was found in that)")
        self._show(printable(observation) + (f"  [reward {reward:g}]" if reward else ""))
        return observation, reward, terminated, truncated, info


class _ShownSampler:
    """Shows what the model says."""

    waits_for_turns = True  # there is one episode

    def __init__(self, sampler: TurnSampler, chat: ChatEncoder, show: Show):
        self._sampler = sampler
        self._chat = chat
        self._show = show

    def add(self, episode: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        self._sampler.add(episode, new_ids, max_new_tokens)

    def rewind(self, episode: int, num_tokens: int) -> None:
        self._sampler.rewind(episode, num_tokens)

    def drop(self, episode: int) -> None:
        self._sampler.drop(episode)

    @property
    def max_episodes(self) -> float:
        return self._sampler.max_episodes

    @property
    def is_busy(self) -> bool:
        return self._sampler.is_busy

    @property
    def wants_turns(self) -> bool:
        return self._sampler.wants_turns

    def advance(self) -> list[tuple[int, Sample]]:
        finished = self._sampler.advance()
        for _, sample in finished:
            self._show(f"> {printable(self._chat.decode(sample.token_ids))}")
        return finished


def settings_to_play(args: EPOConfig) -> EPOConfig:
    """A copy of training's settings without what an episode does not need: other models, evaluations, trackers, the Hub."""
    args = copy(args)
    args.beta, args.sync_ref_model, args.advantage_estimator = 0.0, False, "grpo"  # no reference model and no critic
    args.push_to_hub, args.log_completions_hub_repo, args.report_to = False, None, []
    args.eval_strategy, args.eval_on_start, args.load_best_model_at_end = "no", False, False
    return args


def saved_settings(model: str | Path | Any) -> EPOConfig:
    """What is saved beside a model of the settings that an episode depends on; the others are the defaults."""
    file = play_settings_file(model) if isinstance(model, str | Path) else None
    saved = {} if file is None else json.loads(file.read_text())
    return EPOConfig("play", **{name: value for name, value in saved.items() if name in PLAY_SETTINGS})


def play(
    model: str | Path | Any,
    environment_factory: Callable[[], gymnasium.Env] | dict[str, Callable[[], gymnasium.Env]],
    row: dict[str, Any] | None = None,
    args: EPOConfig | None = None,
    seed: int | None = None,
    temperature: float | None = None,
    show: Show = print,
    **kwargs,
) -> Episode:
    """
    Let a model play one episode, with the prompts and limits of its training.

    Args:
        model (`str` or `PreTrainedModel`): A model's or an adapter's folder, or its name on the Hub.
        environment_factory (`Callable` or `dict`): What makes the environment, as in training.
        row (`dict`, *optional*): A dataset row.
        args ([`EPOConfig`], *optional*): The settings of training: contexts, turns, sampling. By default those that are saved
            beside the model.
        seed (`int`, *optional*): Of sampling and, where the row has none, of the environment; by default that of `args`.
        temperature (`float`, *optional*): By default the one of evaluations.
        show (`Callable[[str], Any]`, *optional*): Gets each observation and each text of the model as they come.
        kwargs: More of [`EPOTrainer`], e.g. `processing_class`, `action_parser`, `prompt_builder`.

    Raises:
        RuntimeError: If the environment fails.
    """
    args = settings_to_play(saved_settings(model) if args is None else args)
    if isinstance(model, str | Path):
        model = str(model)
        if is_adapter(model):
            model, tokenizer = load_adapter(model, trust_remote_code=args.trust_remote_code)
            kwargs.setdefault("processing_class", tokenizer)
    with TemporaryDirectory(prefix="trl_epo_play_") as args.output_dir:  # a trainer makes this folder
        trainer = EPOTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list([row or {"prompt": []}]),
            environment_factory=environment_factory,
            **kwargs,
        )
        return play_row(trainer, row or {}, seed, temperature, show)


def play_row(
    trainer: EPOTrainer,
    row: dict[str, Any],
    seed: int | None = None,
    temperature: float | None = None,
    show: Show = print,
) -> Episode:
    """Let a trainer's model play a dataset row; see [`play`]."""
    player, args = trainer.player, trainer.args
    if player is None:
        raise ValueError("There is no text environment to play in: give an `environment_factory` that makes one.")
    if temperature is None:
        temperature = args.eval_temperature
    seed = args.seed if seed is None else seed
    start = player.start(
        {"seed": seed} | {name: value for name, value in row.items() if value is not None}, "eval", 0, 0, 0
    )
    pool = EnvironmentPool(
        {
            name: partial(lambda make: _ShownEnvironment(make(), show), make)
            for name, make in player.environments.factories.items()
        },
        player.environments.timeout,
    )
    set_seed(seed)
    with closing(pool), trainer.sampling_at(temperature), trainer.turn_sampler() as sampler:
        show(_limits(player.limits, trainer.sampling_temperature))
        shown = cast(TurnSampler, _ShownSampler(sampler, player.rules.chat, show))  # all that is asked of it here
        (episode,) = play_episodes([start], pool, player.rules, shown, player.limits, player.action_parser)
    if episode.failed:
        raise RuntimeError(f"The episode failed: {episode.failures[-1]}")
    show(_verdict(len(episode.turns), episode.success, episode.episode_return, episode.stop_reason.value))
    return episode


def play_yourself(
    environment_factory: Callable[[], gymnasium.Env],
    row: dict[str, Any] | None = None,
    seed: int = 0,
    read: Callable[[str], str] | None = None,
    show: Show = print,
) -> bool | None:
    """
    You say the actions. An empty line shows which ones are possible, if the environment tells; the end of the input ends the
    episode.

    Returns:
        `bool` or `None`: Success; `None` if the environment does not tell.
    """
    read = read or input
    row = row or {}
    env = _ShownEnvironment(environment_factory(), show)
    given = row.get("seed")
    with closing(env):
        _, info = env.reset(seed=seed if given is None else given, options=environment_options(row))
        num_turns, total, ended = 0, 0.0, ""
        while not ended:
            try:
                action = read("> ").strip()
            except EOFError:
                ended = "the end of the input"
                continue
            if not action:
                possible = info.get("admissible_actions") or info.get("action_templates")
                show("Possible: " + printable("; ".join(possible)) if possible else "Say what to do.")
                continue
            _, reward, terminated, truncated, info = env.step(action)
            num_turns, total = num_turns + 1, total + reward
            ended = "terminated" if terminated else "truncated" if truncated else ""
    success = info.get("success")
    show(_verdict(num_turns, success, total, ended))
    return success


def _limits(limits: Limits, temperature: float) -> str:
    return f"At most {limits.max_turns} turns of {limits.max_turn_length} tokens, temperature {temperature:g}."


def _verdict(num_turns: int, success: bool | None, total: float, why: str) -> str:
    verdict = {True: "Success", False: "No success", None: "The end"}[None if success is None else bool(success)]
    return f"{verdict} after {num_turns} turn{'s' * (num_turns != 1)} ({why}); return {total:g}."
