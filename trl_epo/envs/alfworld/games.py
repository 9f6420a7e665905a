"""
Small ALFWorld games by seed: ALFWorld's own rules and words (alfred.pddl and alfred.twl2, which its package brings) with
a room drawn here, so that tests and examples need no download.
"""

import importlib.util
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .environment import GAME_FILE, RELEASE, check_names, folder_name, missing


FURNITURE = {  # receptacle -> whether it opens
    "Cabinet": True,
    "CounterTop": False,
    "DiningTable": False,
    "Drawer": True,
    "Dresser": False,
    "Shelf": False,
    "SideTable": False,
}
APPLIANCES = {  # where a thing is treated -> the task's kind, the command, what it must be able and come to be
    "SinkBasin": ("pick_clean_then_place_in_recep", "clean", "cleanable", "isClean"),
    "Microwave": ("pick_heat_then_place_in_recep", "heat", "heatable", "isHot"),
    "Fridge": ("pick_cool_then_place_in_recep", "cool", "coolable", "isCool"),
}
LAMP, DESK = "DeskLamp", "Desk"
TREATABLE = {"cleanable", "heatable", "coolable"}
THINGS = {  # what each thing is besides pickupable
    "Apple": TREATABLE,
    "Bowl": {"cleanable", "coolable"},
    "Book": set(),
    "CellPhone": set(),
    "CreditCard": set(),
    "Egg": TREATABLE,
    "Fork": {"cleanable"},
    "KeyChain": set(),
    "Mug": TREATABLE,
    "Pen": set(),
    "Plate": TREATABLE,
    "Potato": TREATABLE,
    "Spoon": {"cleanable"},
    "Tomato": TREATABLE,
}
SENTENCES = {  # ALFWorld's own
    "pick_and_place_simple": ("put a {thing} in {target}", "put some {thing} on {target}"),
    "look_at_obj_in_light": ("look at {thing} under the {target}", "examine the {thing} with the {target}"),
    "pick_clean_then_place_in_recep": ("put a clean {thing} in {target}", "clean some {thing} and put it in {target}"),
    "pick_heat_then_place_in_recep": ("put a hot {thing} in {target}", "heat some {thing} and put it in {target}"),
    "pick_cool_then_place_in_recep": ("put a cool {thing} in {target}", "cool some {thing} and put it in {target}"),
    "pick_two_obj_and_place": ("put two {thing} in {target}", "find two {thing} and put them in {target}"),
}


def write_games(
    folder: str | os.PathLike, split: str, size: int, names: Sequence[str] | None = None, seed: int = 0
) -> None:
    """
    Writes `size` games in ALFWorld's folder layout, the kinds of task in turn; `tasks(split, data=folder)` lists them.
    The same arguments write the same files. All splits are drawn alike: `"ood"` has no rooms of another sort.

    Args:
        folder: takes the part of `$ALFWORLD_DATA`; is made if need be.
        split: as for `tasks`.
        size: number of games.
        names: kinds of task; by default all six.
        seed: other seeds give other games.
    """
    names, split = check_names(names), folder_name(split)
    for number in range(size):
        task = names[number % len(names)]
        game = make_game(task, f"{seed} {split} {number}")
        thing, target = game.pop("goal")
        path = Path(folder, RELEASE, split, f"{task}-{thing}-None-{target}-{seed}", f"trial_{number:05}", GAME_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(game))


def make_game(task: str, seed: int | str) -> dict[str, Any]:
    """
    The contents of a game file, with a solution in `"walkthrough"`, and under `"goal"` the kinds of thing and of
    receptacle (or lamp) the task is about.

    Args:
        task: one of `TASKS`.
        seed: the same task and seed give the same game.

    Raises:
        ImportError: If ALFWorld is not installed.
    """
    (task,) = check_names(task)
    room = _Room(task, random.Random(f"{task} {seed}"))
    return {
        "pddl_domain": _shipped("alfred.pddl"),
        "grammar": _shipped("alfred.twl2").replace("UNKNOWN GOAL", room.sentence),
        "pddl_problem": room.problem(),
        "solvable": True,
        "walkthrough": room.solution(),
        "goal": (room.thing, room.target),
    }


def _shipped(name: str) -> str:
    spec = importlib.util.find_spec("alfworld")  # importing it would make a folder in the user's home
    if spec is None:
        raise missing("alfworld")
    return Path(spec.submodule_search_locations[0], "data", name).read_text()


class _Room:
    """One drawn room. Items are known by kind and number: `("Mug", 2)` is "mug 2" in the game."""

    def __init__(self, task: str, rng: random.Random):
        self.task = task
        self.treatment = next((kind for kind, (of_task, *_) in APPLIANCES.items() if of_task == task), None)
        kinds = rng.sample(list(FURNITURE), 4)
        self.receptacles = [(kind, n) for kind in kinds for n in range(1, rng.randint(1, 3) + 1)]
        self.receptacles += [(kind, 1) for kind in (*APPLIANCES, DESK)]
        fitting = [
            thing for thing, can in THINGS.items() if not self.treatment or APPLIANCES[self.treatment][2] in can
        ]
        self.thing = rng.choice(fitting)
        self.target = LAMP if task == "look_at_obj_in_light" else rng.choice(kinds)
        self.place: dict[tuple[str, int], tuple[str, int]] = {}  # thing -> receptacle
        storage = [item for item in self.receptacles if item[0] not in APPLIANCES]
        away = [item for item in storage if item[0] != self.target]
        for n in range(1, 3 if task == "pick_two_obj_and_place" else rng.randint(2, 3)):
            self.place[self.thing, n] = rng.choice(away)
        for other in rng.sample([thing for thing in THINGS if thing != self.thing], 6):
            for n in range(1, rng.randint(1, 2) + 1):
                self.place[other, n] = rng.choice(storage)
        words = {"thing": self.thing.lower(), "target": self.target.lower()}
        self.sentence = rng.choice(SENTENCES[task]).format(**words)

    def solution(self) -> list[str]:
        commands: list[str] = []
        reached: list[tuple[str, int]] = []

        def reach(receptacle: tuple[str, int]) -> None:
            if reached[-1:] != [receptacle]:
                commands.append(f"go to {_name(receptacle)}")
            if _opens(receptacle) and receptacle not in reached:
                commands.append(f"open {_name(receptacle)}")
            reached.append(receptacle)

        for n in (1, 2) if self.task == "pick_two_obj_and_place" else (1,):
            thing = (self.thing, n)
            reach(self.place[thing])
            commands.append(f"take {_name(thing)} from {_name(self.place[thing])}")
            if self.treatment:
                appliance = _name((self.treatment, 1))
                command = APPLIANCES[self.treatment][1]
                commands += [f"go to {appliance}", f"{command} {_name(thing)} with {appliance}"]
                reached.append((self.treatment, 1))
            if self.target == LAMP:
                reach((DESK, 1))
                commands.append(f"use {_name((LAMP, 1))}")
            else:
                reach((self.target, 1))
                commands.append(f"move {_name(thing)} to {_name((self.target, 1))}")
        return commands

    def problem(self) -> str:
        things = list(self.place)
        kinds = dict.fromkeys(kind for kind, _ in self.receptacles)
        objects = ["agent1 - agent", "loc_bar_0 - location", f"{LAMP}Type - otype", f"{_id((LAMP, 1))} - object"]
        objects += [f"loc_bar_{place} - location" for place in range(1, len(self.receptacles) + 1)]
        objects += [f"{kind}Type - otype" for kind in THINGS]
        objects += [f"{kind}Type - rtype" for kind in kinds]
        objects += [f"{_id(thing)} - object" for thing in things]
        objects += [f"{_id(receptacle)} - receptacle" for receptacle in self.receptacles]

        facts = ["atLocation agent1 loc_bar_0"]
        facts += [f"canContain {kind}Type {thing}Type" for kind in kinds for thing in THINGS]
        location = {}
        for place, receptacle in enumerate(self.receptacles, start=1):
            location[receptacle] = f"loc_bar_{place}"
            facts.append(f"receptacleType {_id(receptacle)} {receptacle[0]}Type")
            facts.append(f"receptacleAtLocation {_id(receptacle)} {location[receptacle]}")
            if _opens(receptacle):
                facts.append(f"openable {_id(receptacle)}")
        lamp, desk = (LAMP, 1), (DESK, 1)
        facts.append(f"toggleable {_id(lamp)}")
        for thing, receptacle in {**self.place, lamp: desk}.items():
            facts.append(f"objectType {_id(thing)} {thing[0]}Type")
            facts.append(f"inReceptacle {_id(thing)} {_id(receptacle)}")
            facts.append(f"objectAtLocation {_id(thing)} {location[receptacle]}")
        for thing in things:
            facts += [f"{ability} {_id(thing)}" for ability in ("pickupable", *sorted(THINGS[thing[0]]))]
        return (
            "(define (problem room)\n(:domain alfred)\n(:objects\n"
            + "\n".join(objects)
            + ")\n(:init\n(= (total-cost) 0)\n"
            + "\n".join(f"({fact})" for fact in facts)
            + f")\n(:goal {self._goal()})\n(:metric minimize (total-cost)))\n"
        )

    def _goal(self) -> str:
        if self.target == LAMP:
            return (
                f"(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and (objectType ?ot {LAMP}Type) "
                "(toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)"
                f")) (exists (?o - object ?a - agent) (and (objectType ?o {self.thing}Type) (holds ?a ?o))))"
            )
        placed = f"(objectType {{o}} {self.thing}Type) (receptacleType ?r {self.target}Type) (inReceptacle {{o}} ?r)"
        more = ""
        if self.treatment:
            more = f"({APPLIANCES[self.treatment][3]} ?o)"
        if self.task == "pick_two_obj_and_place":
            more = f"(exists (?o2 - object) (and (not (= ?o ?o2)) {placed.format(o='?o2')}))"
        return f"(exists (?r - receptacle) (exists (?o - object) (and {placed.format(o='?o')} {more})))"


def _opens(receptacle: tuple[str, int]) -> bool:
    return FURNITURE.get(receptacle[0], receptacle[0] in ("Fridge", "Microwave"))


def _name(item: tuple[str, int]) -> str:
    return f"{item[0].lower()} {item[1]}"


def _id(item: tuple[str, int]) -> str:
    # ALFWorld numbers the items of a kind from the last identifier to the first, and calls a sink's basin by both names.
    kind, number = item
    return f"{kind.replace('SinkBasin', 'Sink')}_bar_{99 - number}{'_bar_SinkBasin' if kind == 'SinkBasin' else ''}"
