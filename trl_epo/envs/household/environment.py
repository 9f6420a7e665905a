"""The game as an environment, and its rows."""

import random
from typing import TYPE_CHECKING, Any

from ..base import TextEnv, with_actions
from .expert import Searcher, solution
from .world import ALWAYS, MAX_TRIES, MIN_TURNS, SPLITS, Refusal, World, draw_world


if TYPE_CHECKING:
    from datasets import Dataset


INSTRUCTIONS = """\
You act in a house by text commands, to do the task that the first message names. Each of your answers is one command and \
nothing else, unless a message asks for another form. The commands:
look
inventory
go to ROOM (one of the exits)
open RECEPTACLE
unlock RECEPTACLE (needs its key in hand)
take THING (you can carry two)
put THING in RECEPTACLE
clean THING (at the sink)
heat THING (at the stove)
An example of an answer: go to kitchen"""

_RANGES = {"rooms": (2, 8), "chores": (1, 3), "turns": (5, 50)}


def _check_knobs(knobs: dict[str, Any]) -> None:
    for name, (low, high) in _RANGES.items():
        value = knobs[name]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name}={value!r} is not possible: pass an integer from {low} to {high}.")
    if knobs["turns"] < MIN_TURNS * knobs["chores"]:
        raise ValueError(
            f"turns={knobs['turns']} is too few for chores={knobs['chores']}: pass at least {MIN_TURNS} turns a chore, "
            f"that is turns={MIN_TURNS * knobs['chores']}, or lower `chores`."
        )
    if knobs["split"] not in SPLITS:
        raise ValueError(f"split={knobs['split']!r} is not a split: pass one of {', '.join(map(repr, SPLITS))}.")


class Household(TextEnv):
    """
    A house with chores to do: text in, text out. The package's docstring shows a game and defines the splits.

    Args:
        rooms (`int`, *optional*, defaults to `4`): Rooms of the house, 2 to 8.
        chores (`int`, *optional*, defaults to `1`): Things to bring somewhere, 1 to 3; some have to be cleaned or
            heated first.
        turns (`int`, *optional*, defaults to `20`): Steps until the episode is truncated, 5 to 50 and at least 5 a
            chore. Only worlds that the expert solves within them are handed out.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"iid"` or `"ood"`.
        instructions (`str`, *optional*): What the model is told to do; `None` for nothing, as for a policy that has
            learned the commands already.
        searching_expert (`bool`, *optional*, defaults to `False`): Whether the expert has to look for things, as the
            agent does. An expert that knows where they are takes one as soon as it comes in, and who imitates it
            takes what is not there.
        list_actions (`bool`, *optional*, defaults to `False`): Whether each observation ends with what is possible now, but
            for `look` and `inventory`, which always are.
        repeat_task (`bool`, *optional*, defaults to `False`): Whether each observation says the task, after the rest of it
            but before what is possible; else only the first one does, at its beginning.

    The reward is 1.0 for the step that completes the goal, which ends the episode, else 0.0. `info` always has
    `"success"`, `"invalid_action"` (not understood, or not possible now), `"admissible_actions"` (sorted; all commands
    that are possible now, none once the episode is over) and `"task"` (`"put"`, `"clean"`, `"heat"`, or `"mixed"` for
    chores of several kinds). Case, extra spaces and a final period of an action do not matter.

    Example:
        >>> env = Household(rooms=2)
        >>> observation, info = env.reset(seed=0)
        >>> terminated = False
        >>> while not terminated:
        ...     observation, reward, terminated, truncated, info = env.step(env.expert_action())
        >>> reward, info["success"]
        (1.0, True)
    """

    def __init__(
        self,
        rooms: int = 4,
        chores: int = 1,
        turns: int = 20,
        split: str = "train",
        instructions: str | None = INSTRUCTIONS,
        searching_expert: bool = False,
        list_actions: bool = False,
        repeat_task: bool = False,
    ):
        self.instructions = instructions
        self.list_actions = list_actions
        self.repeat_task = repeat_task
        self.searching_expert = searching_expert
        self._knobs = {"rooms": rooms, "chores": chores, "turns": turns, "split": split}
        _check_knobs(self._knobs)
        self._world: World | None = None
        self._turns_left = 0
        self._plan: list[str] = []
        self._searcher: Searcher | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """
        Starts an episode. `options` is a dataset row: its `rooms`, `chores`, `turns` and `split` replace those of the
        constructor for this episode, its `task` is ignored.
        """
        super().reset(seed=seed)
        given = {name: value for name, value in (options or {}).items() if name != "task"}
        unknown = [name for name in given if name not in self._knobs]
        if unknown:
            raise ValueError(
                f"Unknown options {unknown}: pass only {list(self._knobs)}, remove the other columns from the row."
            )
        knobs: dict[str, Any] = self._knobs | given
        _check_knobs(knobs)
        rng = random.Random(int(self.np_random.integers(2**63)))
        for _ in range(MAX_TRIES):
            world = draw_world(rng, knobs["rooms"], knobs["chores"], knobs["split"])
            plan = [] if world is None else solution(world)
            if 0 < len(plan) <= knobs["turns"]:
                break
        else:
            raise ValueError(
                f"None of {MAX_TRIES} worlds with rooms={knobs['rooms']} and chores={knobs['chores']} can be solved in "
                f"turns={knobs['turns']}: raise `turns`, or lower `rooms` or `chores`."
            )
        self._world, self._plan, self._turns_left = world, plan, knobs["turns"]
        self._searcher = Searcher(world)
        first = world.look() if self.repeat_task else f"{world.task_sentence()} {world.look()}"
        return self._answer(first, invalid_action=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carries out one command; any string is answered by a sentence and takes a turn."""
        world = self._running_world()
        command = " ".join(action.lower().split()).removesuffix(".").rstrip()
        invalid_action = False
        try:
            reply = world.act(command)
        except Refusal as refusal:
            reply = str(refusal)
            invalid_action = True
        self._plan = self._plan[1:] if self._plan[:1] == [command] else []
        self._searcher.look()
        self._turns_left -= 1
        success = world.solved()
        truncated = not success and self._turns_left == 0
        if success:
            self._turns_left = 0
            reply += " Your task is done."
        observation, info = self._answer(reply, invalid_action)
        return observation, float(success), success, truncated, info

    def expert_action(self) -> str:
        """
        The next command of an expert; it solves every state, given enough turns. It knows the whole house, or, with
        `searching_expert`, what has been seen of it.
        """
        world = self._running_world()
        self._plan = self._plan or solution(world)
        return self._searcher.next_command(self._plan) if self.searching_expert else self._plan[0]

    def _running_world(self) -> World:
        if self._world is None:
            raise RuntimeError("There is no episode yet: call reset() first.")
        if self._turns_left == 0:
            raise RuntimeError("The episode is over: call reset() first.")
        return self._world

    def _answer(self, observation: str, invalid_action: bool) -> tuple[str, dict[str, Any]]:
        actions = self._world.admissible() if self._turns_left else []
        if self.repeat_task and self._turns_left:
            observation = f"{observation} {self._world.task_sentence()}"
        if self.list_actions:
            observation = with_actions(observation, [action for action in actions if action not in ALWAYS])
        kinds = [chore.kind for chore in self._world.goal]
        info = {
            "success": self._world.solved(),
            "invalid_action": invalid_action,
            "admissible_actions": actions,
            "task": kinds[0] if kinds.count(kinds[0]) == len(kinds) else "mixed",
        }
        return observation, info


def tasks(split: str, size: int, rooms: int = 4, chores: int = 1, turns: int = 20, seed: int = 0) -> "Dataset":
    """
    A dataset of `size` episodes of [`Household`]: the column `seed` (no two rows have the same) is for
    `reset(seed=...)`, the columns `split`, `rooms`, `chores` and `turns` are its `options`.
    """
    from datasets import Dataset

    knobs = {"split": split, "rooms": rooms, "chores": chores, "turns": turns}
    _check_knobs(knobs)
    seeds = random.Random(seed).sample(range(2**31), size)
    return Dataset.from_dict({"seed": seeds, **{name: [value] * size for name, value in knobs.items()}})
