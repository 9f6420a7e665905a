"""
The environment ALFWorld: its rows, its contract, and the process in which a game is played.
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base import TextEnv, with_actions
from ..process import ProcessEnv, call_method
from .search import ON_THE_WAY, Search, plan_after


if TYPE_CHECKING:
    from datasets import Dataset

TASKS = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
FOLDERS = {"train": "train", "iid": "valid_seen", "ood": "valid_unseen"}  # split -> ALFWorld's name of it
RELEASE = "json_2.1.1"  # folder of the games within the data folder
GAME_FILE = "game.tw-pddl"

INSTRUCTIONS = """\
You act in a room by text commands, to do the task that the first message names. Each of your answers is one command and \
nothing else, unless a message asks for another form. The commands: look, inventory, go to PLACE, open PLACE, close PLACE, \
take THING from PLACE, move THING to PLACE, examine THING, use LAMP, clean THING with PLACE, heat THING with PLACE, cool \
THING with PLACE. Names have numbers. "Nothing happens." means that a command is not possible now.
An example of an answer: take mug 1 from countertop 1"""

_NOT_UNDERSTOOD = "Nothing happens."
_DOWNLOAD = "run `alfworld-download`, or set $ALFWORLD_DATA (or pass `data`) to the folder it filled"


def tasks(split: str, names: Sequence[str] | None = None, data: str | os.PathLike | None = None) -> "Dataset":
    """
    The games of a split, one row each, with the columns `task` (one of `TASKS`) and `game` (absolute path of the game's
    file), ordered by path. As in ALFWorld, games with sliced things or movable receptacles, and those without a
    solution, are left out.

    Args:
        split: `"train"`, `"iid"` (rooms seen in training; ALFWorld's name `"valid_seen"` does as well) or `"ood"` (other
            rooms; `"valid_unseen"`).
        names: kinds of task to give; by default all of them.
        data: the folder that holds `json_2.1.1`; by default `$ALFWORLD_DATA`, else where `alfworld-download` puts it.

    Raises:
        ValueError: If the split or a kind of task is unknown, or there is no such game.
        FileNotFoundError: If there is no folder of the split.
    """
    from datasets import Dataset

    folder = folder_name(split)
    names = check_names(names)
    root = Path(data or os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser().absolute()
    games = root / RELEASE / folder
    if not games.is_dir():
        raise FileNotFoundError(f"there is no folder {str(games)!r} with games of split {split!r}: {_DOWNLOAD}.")
    files = sorted(str(file) for file in games.glob(f"*/*/{GAME_FILE}") if _task_of(file) in names and _playable(file))
    if not files:
        raise ValueError(f"no game of {', '.join(names)} in {str(games)!r}: choose other names, or {_DOWNLOAD}.")
    return Dataset.from_dict({"task": [_task_of(Path(file)) for file in files], "game": files})


def expert_actions(game: str | os.PathLike) -> list[str]:
    """The solution that comes with a game, from its first observation on."""
    return _read(Path(game))["walkthrough"]


def folder_name(split: str) -> str:
    """ALFWorld's name of a split."""
    folder = FOLDERS.get(split, split)
    if folder not in FOLDERS.values():
        known = ", ".join([*FOLDERS, *(name for name in FOLDERS.values() if name not in FOLDERS)])
        raise ValueError(f"unknown split {split!r}: expected one of {known}")
    return folder


def check_names(names: Sequence[str] | None) -> list[str]:
    """The kinds of task that are meant; raises a `ValueError` for one that ALFWorld does not have."""
    names = [names] if isinstance(names, str) else list(names or TASKS)
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown ALFWorld task {name!r}: expected one of {', '.join(TASKS)}")
    return names


def missing(package: str) -> ImportError:
    """The error for a package that is not installed."""
    return ImportError(
        f'ALFWorld needs {package}: pip install "trl-epo[alfworld]", which takes minutes, as it compiles parts of '
        "TextWorld with a C and a C++ compiler, make and cmake (on Debian: apt install build-essential cmake)."
    )


def _task_of(game: Path) -> str:
    return game.parts[-3].split("-")[0] if len(game.parts) > 2 else ""


def _playable(game: Path) -> bool:
    return "Sliced" not in game.parts[-3] and _read(game).get("solvable", False)


def _read(game: Path) -> dict[str, Any]:
    try:
        return json.loads(game.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no game {str(game)!r}: {_DOWNLOAD}, then take its path from `tasks`."
        ) from None
    except ValueError as error:
        raise ValueError(f"{str(game)!r} is not an ALFWorld game: {error}") from error


class LocalAlfWorld(TextEnv):
    """
    An ALFWorld game in this process, for one thread at a time. To train, use `AlfWorld`, which takes the same arguments.
    """

    def __init__(
        self,
        game: str | os.PathLike | None = None,
        turns: int | None = 50,
        instructions: str | None = INSTRUCTIONS,
        list_actions: bool = False,
        repeat_task: bool = False,
        searching_expert: bool = False,
    ):
        if turns is not None and turns < 1:
            raise ValueError(f"turns={turns!r}: expected at least 1, or None for no limit")
        self.game = game
        self.turns = turns
        self.instructions = instructions
        self.list_actions = list_actions
        self.repeat_task = repeat_task
        self.searching_expert = searching_expert
        self._task = ""  # as the game says it
        self._played: Any = None  # a `Game`
        self._loaded: Path | None = None  # its file
        self._running = False
        self._turn = 0
        self._walkthrough: list[str] = []  # the solution that comes with the game
        self._plan: list[str] = []  # of the expert, from here on
        self._search = Search("")  # of one that has to look for things

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if unknown := set(options or {}) - {"task", "game"}:
            raise ValueError(f"unknown options {sorted(unknown)}: expected task, game")
        game = (options or {}).get("game") or self.game
        if game is None:
            raise ValueError('no game: give one as AlfWorld(game=…) or reset(options={"game": …}), a row of `tasks`')
        self._running = False
        self._load(Path(game).expanduser().absolute())
        observation = self._played.reset()
        self._task = observation.rpartition("\n\n")[2]
        self._turn = 0
        self._plan = list(self._walkthrough)
        self._search = Search(observation)
        self._running = True
        info = self._info(invalid_action=False)
        return self._listed(observation, info), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self._running:
            raise RuntimeError("no episode is running: it has ended or was never begun. Call env.reset() first.")
        self._running = False  # should the game fail
        command = " ".join(action.lower().split())
        observation = self._played.step(command)
        terminated = self._played.won
        self._turn += 1
        truncated = not terminated and self._turn == self.turns
        self._running = not (terminated or truncated)
        info = self._info(invalid_action=observation == _NOT_UNDERSTOOD)
        if not info["invalid_action"]:
            self._search.note(command, observation)
            self._plan = plan_after(self._plan, command)
        if self.repeat_task and self._running:
            observation = f"{observation} {self._task}"
        return self._listed(observation, info), float(terminated), terminated, truncated, info

    def expert_action(self) -> str:
        """
        The next command of an expert that knows where everything is: of the solution that comes with the game, and where
        that was not followed, of a plan by fast-downward from here. With `searching_expert` it looks for what no observation
        has shown, place by place in the order of the first observation.
        """
        if not self._running:
            raise RuntimeError("no episode is running: it has ended or was never begun. Call env.reset() first.")
        possible = self._played.admissible_commands
        if self.searching_expert and (command := self._search.next(self._planned(), possible)):
            return command
        while self._plan and self._plan[0] not in possible and self._plan[0].startswith(ON_THE_WAY):
            self._plan = self._plan[1:]  # it is done already
        if self._plan and self._plan[0] not in possible:
            self._plan = []
        return self._planned()[0]

    def _planned(self) -> list[str]:
        """Commands from here to the goal."""
        self._plan = self._plan or self._played.solution()
        if not self._plan:
            raise RuntimeError("there is no way from here to the goal.")
        return self._plan

    def close(self) -> None:
        if self._played is not None:
            self._played.close()
        self._played = self._loaded = None
        self._running = False

    def _load(self, game: Path) -> None:
        if game == self._loaded:
            return
        contents = _read(game)
        self.close()
        self._played = _new_game(contents)
        self._walkthrough = contents.get("walkthrough", [])
        self._loaded = game

    def _listed(self, observation: str, info: dict[str, Any]) -> str:
        """What the model reads: with what is possible now, if it is to be listed and the episode goes on."""
        return with_actions(observation, info["admissible_actions"] if self.list_actions and self._running else ())

    def _info(self, invalid_action: bool) -> dict[str, Any]:
        info = {
            "success": self._played.won,
            "invalid_action": invalid_action,
            "admissible_actions": list(self._played.admissible_commands),
            "game": str(self._loaded),
        }
        if (task := _task_of(self._loaded)) in TASKS:
            info["task"] = task
        return info


def _new_game(contents: dict[str, Any]) -> Any:
    try:
        from .engine import Game
    except ImportError as error:
        raise missing(error.name or "fast_downward") from error
    return Game(contents)


class AlfWorld(ProcessEnv):
    """
    An ALFWorld game in a process of its own, which starts with the first reset and ends with `close`. On Linux all of
    them share the memory of TextWorld.

    ```python
    trainer = EPOTrainer(..., train_dataset=tasks("train"), environment_factory=AlfWorld)
    ```

    The text is the game's own, the task in the first observation. Case and white space of an action do not matter;
    anything else that is not one of `info["admissible_actions"]` is answered by "Nothing happens.". The reward is 1.0 for
    the step that reaches the goal, which ends the episode, else 0.0. `info["task"]` is the kind of task, from the name of
    the game's folder. The same game is the same episode, whatever the seed.

    Args:
        game: path of a `game.tw-pddl`, for resets whose `options`, a row of `tasks`, do not name one.
        turns: turns after which an episode is truncated; `None` for no limit. ALFWorld's evaluations, and the paper's,
            give 50.
        instructions: what the model is told to do; `None` for nothing.
        list_actions: whether each observation ends with the actions that are possible now, as the paper's
            agents are shown them.
        repeat_task: whether each observation says the task, after the rest of it but before what is possible; else only
            the first one does.
        searching_expert: whether the expert (`expert_action`) has to look for things, as the policy that imitates it will
            have to; else it goes straight to where they are.

    Raises:
        EnvironmentDied: From `reset` and `step`, if the process died. The episode is lost, the next reset starts another.
    """

    instructions: str | None = None  # without a process
    _preload = "trl_epo.envs.alfworld.engine:prepare"

    def __init__(
        self,
        game: str | os.PathLike | None = None,
        turns: int | None = 50,
        instructions: str | None = INSTRUCTIONS,
        list_actions: bool = False,
        repeat_task: bool = False,
        searching_expert: bool = False,
    ):
        LocalAlfWorld(game, turns)  # complains here, not in the process
        self.instructions = instructions
        super().__init__(
            partial(
                LocalAlfWorld,
                game,
                turns,
                list_actions=list_actions,
                repeat_task=repeat_task,
                searching_expert=searching_expert,
            )
        )
        self._game: str | None = None  # of the last reset

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        self._game = info["game"]
        return observation, info

    def expert_action(self) -> str:
        """The next command of an expert; see [`LocalAlfWorld.expert_action`]."""
        if self._game is None:
            raise RuntimeError("no episode is running: call env.reset() first.")
        return self._ask(call_method, "expert_action")
