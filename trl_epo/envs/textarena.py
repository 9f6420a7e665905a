"""
TextArena: its single-player games, such as FrozenLake, Mastermind and Sokoban. Needs `pip install "trl-epo[textarena]"`.

A game draws from Python's global random numbers, at reset and while it is played. So each runs in a process of its own, where
nobody else draws any.
"""

import random
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import TextEnv, seeds_of
from .process import ProcessEnv


if TYPE_CHECKING:
    from datasets import Dataset

INSTRUCTIONS = """\
You play a game by text. The first message tells the rules. Each of your answers is one move in square brackets, in the form \
that the rules name, and nothing else, unless a message asks for another form. Two moves in a row that the rules do not allow \
end the game.
Examples of answers, each from another game: [up], [5], [1 2 3 4], [A C]"""

GAMES = ("FrozenLake-v0-random", "GuessTheNumber-v0", "Mastermind-v0")
OTHER_GAMES = (
    "FrozenLake-v0-hardcore",
    "GuessTheNumber-v0-hardcore",
    "Mastermind-v0-hard",
)  # of the same kinds, harder


def tasks(
    split: str,
    size: int,
    games: Sequence[str] = GAMES,
    other_games: Sequence[str] = OTHER_GAMES,
    seed: int = 0,
) -> "Dataset":
    """
    `size` rows with the columns `game` and `seed`, the games in turn.

    Args:
        split: `"train"`, `"iid"` (the same games with other seeds) or `"ood"` (other games).
        size: number of rows.
        games: the games of `"train"` and `"iid"`, by their names in TextArena.
        other_games: the games of `"ood"`.
        seed: which seeds are drawn.

    Raises:
        ValueError: If the split is unknown, there are no games, or one of them is in `games` and in `other_games`.
    """
    from datasets import Dataset

    games, other_games = ([names] if isinstance(names, str) else list(names) for names in (games, other_games))
    if both := set(games) & set(other_games):
        raise ValueError(
            f"{sorted(both)} are in `games` and in `other_games`, but the latter are for split 'ood' alone"
        )
    played = other_games if split == "ood" else games
    if not played:
        raise ValueError(f"there are no games of split {split!r}: name at least one, e.g. {GAMES[0]!r}")
    seeds = seeds_of("iid" if split == "ood" else split, size, seed)
    return Dataset.from_dict({"game": [played[i % len(played)] for i in range(size)], "seed": seeds})


class LocalTextArena(TextEnv):
    """
    A game of TextArena in this process, whose global random numbers it seeds and uses. To train, use `TextArena`, which takes
    the same arguments.
    """

    def __init__(self, game: str | None = None, instructions: str | None = INSTRUCTIONS):
        self.game = game
        self.instructions = instructions
        self._env: Any = None
        self._name: str | None = None  # of that game
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if unknown := set(options or {}) - {"game"}:
            raise ValueError(f"unknown options {sorted(unknown)}: expected game")
        game = (options or {}).get("game") or self.game
        if game is None:
            raise ValueError('no game: give one as TextArena("FrozenLake-v0") or reset(options={"game": …})')
        self._running = False
        if game != self._name:
            self._env, self._name = _make(game), game
        _begin(self._env, game, seed)
        self._running = True
        return self._messages(), self._info(success=False, invalid_action=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self._running:
            raise RuntimeError("no episode is running: it has ended or was never begun. Call env.reset() first.")
        self._running = False  # should the game fail
        done, _ = self._env.step(action)
        text, reward, outcome = self._messages(), 0.0, {}
        if done:
            rewards, outcomes = self._env.close()
            reward, outcome = rewards[0], outcomes[0]
            reason = outcome.get("reason")
            if isinstance(reward, str):  # some games give it and the reason of an invalid move in the wrong order
                reward, reason = 0.0, reward
            text = "\n".join(part for part in (text, reason) if part)
        self._running = not done
        invalid = bool(outcome.get("invalid_move")) or self._env.state.error_count > 0
        info = self._info(success=done and reward == 1, invalid_action=invalid)
        return text or "Go on.", float(reward), done, False, info

    def close(self) -> None:
        self._env = self._name = None
        self._running = False

    def _messages(self) -> str:
        """What the game has said since it was last asked, without the player's own words."""
        from textarena import ObservationType

        _, messages = self._env.get_observation()
        # Some games give the arguments of the player's own words in the wrong order, so that their text is a number.
        said = [
            text for _, text, kind in messages if kind is not ObservationType.PLAYER_ACTION and isinstance(text, str)
        ]
        return "\n".join(said).strip()

    def _info(self, success: bool, invalid_action: bool) -> dict[str, Any]:
        return {"success": bool(success), "invalid_action": invalid_action, "task": self._name}


def _make(game: str) -> Any:
    """
    A game without the wrappers that repeat all of its messages each turn; those that mend the form of an action stay.

    Raises:
        ImportError: If TextArena is not installed.
        ValueError: If there is no such game.
        FileNotFoundError: If it needs words that could not be downloaded.
    """
    try:
        import textarena
        from textarena.envs.registration import ENV_REGISTRY
    except ImportError as error:
        raise ImportError(f'TextArena needs {error.name}: pip install "trl-epo[textarena]".') from error
    if game not in ENV_REGISTRY:
        alike = [name for name in ENV_REGISTRY if name.startswith(game.split("-")[0] + "-")]
        known = ", ".join(name for name in alike if not name.endswith(("-raw", "-train"))) or f"such as {GAMES[0]!r}"
        raise ValueError(f"TextArena has no game {game!r}: expected a name, {known}")
    try:
        env, wrappers = textarena.make(game), []
    except LookupError as error:  # nltk's, a screenful
        needed = re.search(r"nltk\.download\('(\w+)'\)", str(error))
        if needed is None:
            raise
        raise FileNotFoundError(
            f"{game!r} needs data of nltk that it could not download: python -m nltk.downloader {needed[1]}"
        ) from error
    while isinstance(env, textarena.Wrapper):
        wrappers.append(type(env))
        env = env.env
    for wrapper in reversed(wrappers):
        env = wrapper(env) if issubclass(wrapper, textarena.ActionWrapper) else env
    return env


def _begin(env: Any, game: str, seed: int | None) -> None:
    """Raises a `ValueError` if it is not a game for one."""
    from textarena import SinglePlayerState

    if seed is not None:  # TextArena seeds Python's own numbers alone, and some games have drawn from them by then
        random.seed(seed)
        np.random.seed(seed % 2**32)
    problem = None
    try:
        env.reset(num_players=1, seed=seed)
    except AssertionError as error:
        problem = error
    if problem is not None or not isinstance(env.state, SinglePlayerState):
        raise ValueError(f"{game!r} is no single-player game of TextArena. {problem or ''}".strip()) from problem


class TextArena(ProcessEnv):
    """
    A single-player game of TextArena in a process of its own, which starts with the first reset and ends with `close`.

    ```python
    trainer = EPOTrainer(..., train_dataset=tasks("train", 1000), environment_factory=TextArena)
    ```

    An observation is what the game says, at the end with its verdict. The reward comes with the last step and is the game's own:
    1.0 if it is won, else mostly a part of it for what was done. Success is a reward of 1. `info["task"]` is the game's name.
    An action without square brackets gets them where the game wants them. After an action that its rules do not allow a game
    lets the player try once more; the second one in a row ends it. Games have limits on turns of their own, which end them like a
    loss.

    Args:
        game: name of a game in TextArena, for resets whose `options`, a row of `tasks`, do not name one.
        instructions: what the model is told to do; `None` for nothing.

    Raises:
        ImportError: From `reset`, if TextArena is not installed.
        ValueError: From `reset`, if there is no such game, or it is not for a single player.
        EnvironmentDied: From `reset` and `step`, if the process died. The episode is lost, the next reset starts another.
    """

    instructions: str | None = None  # without a process

    def __init__(self, game: str | None = None, instructions: str | None = INSTRUCTIONS):
        self.instructions = instructions
        super().__init__(partial(LocalTextArena, game))
