"""The environment, and its rows."""

import json
import numbers
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..base import TextEnv
from .java import UNKNOWN_ACTION, World, current_jvm, running_jvm, waits


if TYPE_CHECKING:
    from datasets import Dataset


INSTRUCTIONS = """\
You act in a simulated house with a laboratory by text commands, to do the task that the first message names. Each of your \
answers is one command and nothing else, unless a message asks for another form. Some commands: look around, look at OBJ, \
look in OBJ, inventory, task, go to LOC, teleport to LOC, open OBJ, close OBJ, pick up OBJ, put down OBJ, move OBJ to OBJ, \
pour OBJ in OBJ, mix OBJ, use OBJ on OBJ, activate OBJ, deactivate OBJ, connect OBJ to OBJ, read OBJ, eat OBJ, wait. \
`help` lists all of them. `focus on OBJ` says which thing the task is about: only do it where the task asks for it, since \
a wrong one fails. When a number is asked for, answer with the number.
An example of an answer: open cupboard"""

# Number of variations of each task.
VARIATIONS = {
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
    "use-thermometer": 540,
}
SPLITS = ("train", "iid", "ood")
SIMPLIFICATIONS = ("noElectricalAction", "openContainers", "openDoors", "selfWateringFlowerPots", "teleportAction")

_NOT_UNDERSTOOD = ("No known action matches that input.", UNKNOWN_ACTION)  # how such replies start


def tasks(split: str, names: Sequence[str] | None = None, simplification: str = "easy") -> "Dataset":
    """
    The paper's rows of a split, with the columns `task`, `variation` and `simplification`.

    Args:
        split: `"train"`, `"iid"` or `"ood"`: ScienceWorld's own train, dev and test variations.
        names: tasks to give; by default all of them except use-thermometer, as in the paper.
        simplification: as for `ScienceWorld`; the same in all rows.
    """
    from datasets import Dataset

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if names is None:
        names = [name for name in VARIATIONS if name != "use-thermometer"]
    elif isinstance(names, str):
        names = [names]
    for name in names:
        _check(name, None, simplification)
    rows = [(name, variation) for name in names for variation in _variations(name, split)]
    return Dataset.from_dict(
        {
            "task": [name for name, _ in rows],
            "variation": [variation for _, variation in rows],
            "simplification": [simplification] * len(rows),
        }
    )


def _variations(task: str, split: str) -> range:
    # ScienceWorld's rule: the first two quarters, the third, and the rest.
    quarter = VARIATIONS[task] // 4
    return {
        "train": range(2 * quarter),
        "iid": range(2 * quarter, 3 * quarter),
        "ood": range(3 * quarter, VARIATIONS[task]),
    }[split]


def _check(task: str | None, variation: int | None, simplification: str) -> None:
    if task is not None and task not in VARIATIONS:
        raise ValueError(f"unknown ScienceWorld task {task!r}: expected one of {', '.join(VARIATIONS)}")
    parts = simplification.split(",") if simplification not in ("", "easy") else []
    if unknown := set(parts) - set(SIMPLIFICATIONS):
        raise ValueError(
            f"unknown simplification {sorted(unknown)} in {simplification!r}: expected 'easy', '' for none, or names "
            f"joined by commas from {', '.join(SIMPLIFICATIONS)}"
        )
    if "noElectricalAction" in parts and task is not None and ("power-component" in task or "conductivity" in task):
        raise ValueError(
            f"simplification {simplification!r} makes task {task!r} impossible: leave out noElectricalAction"
        )
    if variation is not None and task is not None:
        last = VARIATIONS[task] - 1
        if not isinstance(variation, numbers.Integral) or not 0 <= variation <= last:
            raise ValueError(f"variation {variation!r} of task {task!r}: expected an integer from 0 to {last}")


class ScienceWorld(TextEnv):
    """
    A ScienceWorld environment. `task`, `variation` and `simplification` are defaults for what the `options` of `reset`,
    a row of `tasks`, leave out. Success is a score of 100. The first observation is the task's description and what is
    around; an action that fits several things is answered by a numbered list, and the next action is the number.
    `info["action_templates"]` lists the forms of actions ("move OBJ to OBJ"), as the simulator's answer to "help" does.

    The same task and variation give the same episode but for what the simulator leaves open: it visits objects in no
    fixed order. A list within an observation may be in another order, bees fly elsewhere, and in a few tasks
    (electricity, genetics, growing fruit) the same actions may score a turn earlier or later, rarely not at all.

    Args:
        task: name of the task, one of `VARIATIONS`.
        variation: number of the variation; by default one of the task's train variations is drawn at each reset.
        simplification: `"easy"`, `""` for none, or names from `SIMPLIFICATIONS` joined by commas.
        turns: turns after which an episode is truncated; by default none.
        reward: `"sparse"`, 1.0 for the step that reaches the score 100; or `"dense"`, the change of the score / 100. A
            score that is above 0 at the start counts as already had; a failed task falls to −100, which is not clipped.
        admissible_actions: whether `info` lists the valid actions (takes longer than the step itself).
        instructions: what the model is told to do; `None` for nothing.
    """

    def __init__(
        self,
        task: str | None = None,
        variation: int | None = None,
        simplification: str = "easy",
        turns: int | None = None,
        reward: str = "sparse",
        admissible_actions: bool = False,
        instructions: str | None = INSTRUCTIONS,
    ):
        _check(task, variation, simplification)
        if reward not in ("sparse", "dense"):
            raise ValueError(f"unknown reward {reward!r}: expected 'sparse' or 'dense'")
        if turns is not None and turns < 1:
            raise ValueError(f"turns={turns!r}: expected at least 1, or None for no limit")
        self.defaults = {"task": task, "variation": variation, "simplification": simplification}
        self.turns = turns
        self.reward = reward
        self.admissible_actions = admissible_actions
        self.instructions = instructions
        self._world: World | None = None
        self._row: tuple[str, int, str] | None = None  # of the current episode
        self._running = False
        self._turn = 0
        self._score = 0
        self._thread = 0  # that of the last call

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._thread = threading.get_ident()
        if unknown := set(options or {}) - set(self.defaults):
            raise ValueError(f"unknown options {sorted(unknown)}: expected {', '.join(self.defaults)}")
        given = {name: value for name, value in (options or {}).items() if value is not None}
        row: dict[str, Any] = self.defaults | given
        task, variation, simplification = row.values()
        if task is None:
            raise ValueError('no task: give one as ScienceWorld(task=…) or reset(options={"task": …})')
        _check(task, variation, simplification)
        if variation is None:
            variation = self.np_random.integers(len(_variations(task, "train")))
        self._row = (task, int(variation), simplification)
        observation, info, _ = self._begin()
        return observation, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self._running:
            raise RuntimeError("no episode is running: it has ended or was never begun. Call env.reset() first.")
        self._thread = threading.get_ident()
        # Java takes no lone surrogates; white space makes no difference to ScienceWorld except around a number.
        text = " ".join(action.encode("utf-8", "replace").decode().split())
        self._running = False  # should the simulator fail
        before = self._score
        reply = self._world.step(text)
        info = self._look()
        self._turn += 1
        info["invalid_action"] = reply.startswith(_NOT_UNDERSTOOD)
        terminated = info["success"] or self._score < 0  # ScienceWorld does not call a failed task completed
        truncated = not terminated and self._turn == self.turns
        self._running = not (terminated or truncated)
        reward = (self._score - before) / 100 if self.reward == "dense" else float(info["success"])
        return reply, reward, terminated, truncated, info

    def expert_actions(self) -> list[str]:
        """
        The simulator's own solution of the current task. Starts the episode again from its beginning. Some solutions go
        on after the goal is reached: stop when the episode has ended.
        """
        if self._row is None:
            raise RuntimeError("there is no current task. Call env.reset() first.")
        return self._begin(expert=True)[2]

    def close(self) -> None:
        """Lets go of this environment's part of the JVM; the JVM goes on for the others."""
        if self._world is not None:
            self._world.close()
        self._world = self._row = None
        self._running = False

    def interrupt(self) -> None:
        """Kills the JVM: a call that waits for it raises `SimulatorGivenUp`, and so does the next of each environment in it."""
        jvm = running_jvm() if self._world is None else self._world.jvm
        if jvm is not None:
            jvm.kill()

    @property
    def held_up_by_another(self) -> bool:
        """
        Whether a call waits for another environment to be done with the copy of the simulator that they share, or with
        starting Java, or is about to raise `SimulatorGivenUp`.
        """
        world = self._world
        return waits(self._thread) or (world is not None and world.jvm.killed)

    def _begin(self, expert: bool = False) -> tuple[str, dict[str, Any], list[str]]:
        self._running = False
        if self._world is None or not self._world.jvm.alive():
            self._world = None  # from here on `interrupt` is for the process that starts
            self._world = World(current_jvm())
        task, variation, simplification = self._row
        actions = self._world.load(task, variation, simplification, expert)
        observation = f"{self._world.description}\n\n{self._world.step('look around')}"
        info = self._look()
        self._turn = 0
        self._running = True
        return observation, info, actions

    def _look(self) -> dict[str, Any]:
        self._score = round(100 * self._world.score)
        success = self._score == 100 and self._world.completed
        info = {"success": success, "score": self._score, "task": self._row[0], "variation": self._row[1]}
        info["invalid_action"] = False
        info["action_templates"] = list(self._world.action_templates)
        if self.admissible_actions:
            with self._world.use() as server:
                valid = json.loads(server.getValidActionObjectCombinationsJSON())["validActions"]
            info["admissible_actions"] = sorted(entry["action"] for entry in valid)
        return info
