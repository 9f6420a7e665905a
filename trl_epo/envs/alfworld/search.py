"""Where someone would look for a thing who knows no more than the observations of an episode have said."""

import re
from collections.abc import Collection, Sequence


_NAME = re.compile(r"[a-z]+ \d+")
_SHOWN = re.compile(r"\ban? ([a-z]+ \d+)")  # what an observation lists: "you see a mug 1, and a egg 2"
ON_THE_WAY = ("go to ", "open ")  # what a plan does to reach a thing
_CHANGES_NO_PLAN = (*ON_THE_WAY, "close ", "examine ", "look", "inventory")


def plan_after(plan: list[str], command: str) -> list[str]:
    """What is left of a plan when a command was taken; none if it may lead elsewhere now."""
    if plan[:1] == [command]:
        return plan[1:]
    return plan if command.startswith(_CHANGES_NO_PLAN) else []


class Search:
    """
    What the observations of an episode have shown.

    Args:
        observation (`str`): The first one, which names the places.
    """

    def __init__(self, observation: str):
        self._places: list[str] = _SHOWN.findall(observation)
        self._shown = set(self._places)
        self._where: dict[str, str] = {}  # the place at which a thing was seen last
        self._looked: set[str] = set()  # places whose things were seen
        self._moved: set[str] = set()  # things that were brought somewhere
        self._here = ""

    def note(self, command: str, observation: str) -> None:
        """A command that was possible, and what it was answered."""
        names = _NAME.findall(command)
        if command.startswith(("go to ", "open ")):
            [self._here] = names
            if "is closed" not in observation:
                self._looked.add(self._here)
            for thing in _SHOWN.findall(observation):
                self._shown.add(thing)
                self._where[thing] = self._here
        elif command.startswith("take "):
            self._where.pop(names[0], None)
        elif command.startswith("move "):
            self._moved.add(names[0])

    def next(self, plan: Sequence[str], admissible: Collection[str]) -> str | None:
        """
        The next command to find what the plan wants and no observation has shown; `None` if the plan's own is next.

        Args:
            plan (`list[str]`): Commands from here to the goal, of someone who knows where everything is.
            admissible (`list[str]`): What is possible now.
        """
        known = []  # what the plan does before it wants something that nobody has seen
        for command in plan:
            if unseen := [name for name in _NAME.findall(command) if name not in self._shown]:
                break
            known.append(command)
        else:
            return None
        while known and known[-1].startswith(ON_THE_WAY):
            known.pop()
        return None if known else self._look_for(unseen[0].split()[0], admissible)

    def _look_for(self, kind: str, admissible: Collection[str]) -> str | None:
        """Something of this kind; `None` if it is nowhere."""
        for thing, place in self._where.items():
            if thing.split()[0] == kind and thing not in self._moved:
                return take if (take := f"take {thing} from {place}") in admissible else f"go to {place}"
        if self._here not in self._looked and (opened := f"open {self._here}") in admissible:
            return opened
        return next((f"go to {place}" for place in self._places if place not in self._looked), None)
