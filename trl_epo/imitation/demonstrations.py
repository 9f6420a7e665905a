"""Episodes whose actions someone says, played as the trainer plays its rollouts."""

import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import gymnasium

from ..rollouts import ChatEncoder, EnvironmentPool, Episode, EpisodePlayer, EpisodeStart, play_episodes
from ..sampling import Sample, TurnSampler
from ..trainer import EPOTrainer


logger = logging.getLogger(__name__)

ENOUGH_TO_GIVE_UP = 8  # episodes none of which can be used
IMPOSSIBLE = 0.5  # share of the mistakes, where they are read and not learned

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
    return says(actions)


def says(texts: Iterable[str]) -> Say:
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
        if self.noise and "admissible_actions" not in info:
            raise ValueError(
                f"`noise` is {self.noise}, but mistakes are made of `info['admissible_actions']`, which the environment does not "
                "tell. Have its `reset` and `step` tell them, or leave `noise` out."
            )
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


@dataclass(frozen=True, repr=False)
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
    player = player_of(trainer)
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
                cut = any(turn.cut for turn in episode.turns)
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


def player_of(trainer: EPOTrainer) -> EpisodePlayer:
    if trainer.player is None:
        raise ValueError("The trainer has no text environment: give it an `environment_factory`, then warm it up.")
    if trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"A warm-up runs in one process, but there are {trainer.accelerator.num_processes}. Warm up by itself, save the "
            "model, and train that with as many as you like."
        )
    return trainer.player


def starts_of(player: EpisodePlayer, rows: Iterable[dict[str, Any]]) -> list[EpisodeStart]:
    return [player.start(row, "train", 0, index, 0) for index, row in enumerate(rows)]
