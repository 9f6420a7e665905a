"""
Household: a small text game in pure Python, in ALFWorld's manner, for tests, docs and the study of long horizons.

A house has rooms, rooms have furniture, and some of it is closed or locked. One sentence says what to do; the reward is
1 at the moment all of it is done, and 0 before. A game looks like this:

    Your task: put a clean mug in the cabinet. Hallway. You see a bench with a mug, a closed chest. Exits: kitchen.
    > take mug
    You take the mug.
    > go to kitchen
    Kitchen. You see a closed cabinet, a sink. Exits: hallway.
    > clean mug
    The mug is clean.
    > open cabinet
    The cabinet is open; it holds a brass key.
    > put mug in cabinet
    You put the mug in the cabinet. Your task is done.

The commands are `look`, `inventory`, `go to ROOM`, `open RECEPTACLE`, `unlock RECEPTACLE` (its key in hand), `take
THING` (two at most), `put THING in RECEPTACLE` (or `on`), `clean THING` (at the sink) and `heat THING` (at the stove).
Nothing can be closed, locked or lost for good, so every state can still be solved.

Splits. A stable hash holds out a fifth of all goals (kind, thing, receptacle), of all doors (room, room) and of all
placements (furniture, room). `train` and `iid` use none of these. `ood` has only held-out goals, and at least one
held-out door and one held-out placement in every house. `train` and `iid` follow one distribution, and the parity of a
hash of the whole world (house, contents, goal, first room) decides which of the two a world belongs to.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .base import TextEnv


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


# ---------------------------------------------------------------------------------------------------------- vocabulary

# A house of n rooms takes its words from the beginning of each list, so that a small house needs few of them.
ROOMS = ("kitchen", "study", "hallway", "cellar", "attic", "bathroom", "bedroom", "garage", "lounge", "pantry")
SURFACES = ("table", "shelf", "desk", "counter", "bench", "ledge", "mat", "rack", "sill", "stand", "stool", "tray")
CONTAINERS = (
    *("box", "cabinet", "chest", "drawer", "fridge", "closet", "crate"),
    *("cupboard", "dresser", "locker", "safe", "trunk", "vault", "wardrobe"),
)
RECEPTACLES = SURFACES + CONTAINERS
KEYS = ("brass key", "iron key", "silver key")
THINGS = {  # what can be done to each thing besides carrying it
    "cup": ("clean",),
    "apple": ("clean", "heat"),
    "book": (),
    "bowl": ("clean",),
    "bun": ("heat",),
    "carrot": ("clean", "heat"),
    "coin": (),
    "fork": ("clean",),
    "mug": ("clean",),
    "potato": ("clean", "heat"),
    "candle": (),
    "pie": ("heat",),
    "knife": ("clean",),
    "tomato": ("clean", "heat"),
    "pen": (),
    "pan": ("clean",),
    "pizza": ("heat",),
    "egg": ("clean", "heat"),
    "watch": (),
    "plate": ("clean",),
    "spoon": ("clean",),
}
KINDS = ("put", "clean", "heat")
APPLIANCES = {"clean": "sink", "heat": "stove"}
ADJECTIVES = {"clean": "clean", "heat": "hot"}

SPLITS = ("train", "iid", "ood")
LOCKED = 0.25  # chance that a chore's thing or target is locked
HANDS = "hands"  # where a carried thing is
MAX_CARRIED = 2
MIN_TURNS = 5  # a chore
MAX_TRIES = 10_000  # worlds drawn for one episode before giving up


class Chore(NamedTuple):
    """One part of the goal; `kind` is one of `"put"`, `"clean"` (and put) and `"heat"` (and put)."""

    kind: str
    thing: str
    target: str


def _held_out(*words: str) -> bool:
    """Whether a chore, a door (two rooms) or a placement (furniture, room), in any order, is only for `ood`."""
    return zlib.crc32(" ".join(sorted(words)).encode()) % 5 == 0


CHORES = [Chore(k, t, r) for k in KINDS for t, kinds in THINGS.items() if k in ("put", *kinds) for r in RECEPTACLES]
CHORES_OF = {  # (held out, kind) -> chores
    (ood, kind): [chore for chore in CHORES if chore.kind == kind and _held_out(*chore) == ood]
    for ood in (False, True)
    for kind in KINDS
}


# --------------------------------------------------------------------------------------------------------------- world


class _Refusal(Exception):
    """Why a command was not carried out, as a sentence for the agent."""


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@dataclass
class _World:
    """The state of a game, its rules and its words. Only `room` and the last four fields change during a game."""

    exits: dict[str, list[str]]  # room -> rooms next to it
    furniture: dict[str, list[str]]  # room -> receptacles and appliances in it
    goal: list[Chore]
    room: str  # where the agent is
    where: dict[str, str]  # thing or key -> receptacle, or HANDS
    closed: set[str]  # receptacles, the locked ones included
    locks: dict[str, str]  # locked receptacle -> its key
    treated: set[tuple[str, str]] = field(default_factory=set)  # ("clean", thing), ("heat", thing)

    def copy(self) -> "_World":
        parts = (self.where.copy(), self.closed.copy(), self.locks.copy(), self.treated.copy())
        return _World(self.exits, self.furniture, self.goal, self.room, *parts)

    def carried(self) -> list[str]:
        return [thing for thing, place in self.where.items() if place == HANDS]

    def done(self, chore: Chore) -> bool:
        treated = chore.kind == "put" or (chore.kind, chore.thing) in self.treated
        return treated and self.where[chore.thing] == chore.target

    def solved(self) -> bool:
        return all(map(self.done, self.goal))

    def canonical(self) -> str:
        """The world in an order that does not depend on how it was drawn."""
        facts = [f"{room} next to {other}" for room, others in self.exits.items() for other in others]
        facts += [f"{item} stands in {room}" for room, items in self.furniture.items() for item in items]
        facts += [f"{thing} is in {place}" for thing, place in self.where.items()]
        facts += [f"{receptacle} needs {key}" for receptacle, key in self.locks.items()]
        facts += [f"goal {' '.join(chore)}" for chore in self.goal]
        return "; ".join([self.room, *sorted(facts)])

    # What is said

    def named(self, thing: str) -> str:
        adjectives = [ADJECTIVES[kind] for kind in THINGS.get(thing, ()) if (kind, thing) in self.treated]
        return _a(" ".join([*adjectives, thing]))

    def contents(self, receptacle: str) -> str:
        return " and ".join(self.named(thing) for thing, place in self.where.items() if place == receptacle)

    def task_sentence(self) -> str:
        wanted = ((_a(f"{ADJECTIVES.get(kind, '')} {thing}".strip()), target) for kind, thing, target in self.goal)
        return f"Your task: {' and '.join(f'put {thing} in the {target}' for thing, target in wanted)}."

    def look(self) -> str:
        seen = []
        for item in self.furniture[self.room]:
            if item in self.closed:
                seen.append(f"a {'locked' if item in self.locks else 'closed'} {item}")
                continue
            name = f"an open {item}" if item in CONTAINERS else f"a {item}"
            contents = self.contents(item)
            seen.append(f"{name} with {contents}" if contents else name)
        return f"{self.room.capitalize()}. You see {', '.join(seen)}. Exits: {', '.join(self.exits[self.room])}."

    # What is done

    def admissible(self) -> list[str]:
        """All commands that `act` carries out now, sorted (`put … on` is only another spelling of `put … in`)."""
        carried = self.carried()
        commands = ["inventory", "look", *(f"go to {room}" for room in self.exits[self.room])]
        within_reach = set()
        for item in self.furniture[self.room]:
            if item in self.locks:
                if self.locks[item] in carried:
                    commands.append(f"unlock {item}")
            elif item in self.closed:
                commands.append(f"open {item}")
            elif item in RECEPTACLES:
                within_reach.add(item)
                commands += [f"put {thing} in {item}" for thing in carried]
        for kind, item in APPLIANCES.items():
            if item in self.furniture[self.room]:
                fitting = (thing for thing in carried if kind in THINGS.get(thing, ()))
                commands += [f"{kind} {thing}" for thing in fitting if (kind, thing) not in self.treated]
        if len(carried) < MAX_CARRIED:
            commands += [f"take {thing}" for thing, place in self.where.items() if place in within_reach]
        return sorted(commands)

    def act(self, command: str) -> str:
        """Carries out a command and tells what happened; a `_Refusal` tells why the world stays as it is."""
        match command.split(" ", maxsplit=1):
            case ["look"]:
                return self.look()
            case ["inventory"]:
                return f"You carry {self.contents(HANDS) or 'nothing'}."
            case ["go", direction]:
                return self._go(direction)
            case ["open", receptacle]:
                return self._open(receptacle)
            case ["unlock", receptacle]:
                return self._unlock(receptacle)
            case ["take", thing]:
                return self._take(thing)
            case ["put", what]:
                thing, _, receptacle = what.partition(" on " if " on " in what else " in ")
                return self._put(thing, receptacle)
            case ["clean" | "heat" as kind, thing]:
                return self._treat(kind, thing)
        raise _Refusal("Nothing happens.")

    def _go(self, direction: str) -> str:
        room = direction.removeprefix("to ")
        if room == direction:
            raise _Refusal("Go to which room?")
        if room == self.room:
            raise _Refusal(f"You are in the {room}.")
        if room not in self.exits[self.room]:
            raise _Refusal("No door leads there from here.")
        self.room = room
        return self.look()

    def _open(self, receptacle: str) -> str:
        self._check_here(receptacle)
        if receptacle not in CONTAINERS:
            raise _Refusal(f"The {receptacle} cannot be opened.")
        if receptacle not in self.closed:
            raise _Refusal(f"The {receptacle} is open.")
        self._check_unlocked(receptacle)
        self.closed.remove(receptacle)
        return f"The {receptacle} is open; it holds {self.contents(receptacle) or 'nothing'}."

    def _unlock(self, receptacle: str) -> str:
        self._check_here(receptacle)
        if receptacle not in self.locks:
            raise _Refusal(f"The {receptacle} is not locked.")
        self._check_unlocked(receptacle, keys=self.carried())
        del self.where[self.locks.pop(receptacle)]
        return f"The {receptacle} is unlocked; the key stays in it."

    def _take(self, thing: str) -> str:
        place = self.where.get(thing)
        if place == HANDS:
            raise _Refusal(f"You carry the {thing}.")
        if place in self.closed or place not in self.furniture[self.room]:
            raise _Refusal("You see nothing like that here.")
        if len(self.carried()) == MAX_CARRIED:
            raise _Refusal("Your hands are full.")
        self.where[thing] = HANDS
        return f"You take the {thing}."

    def _put(self, thing: str, receptacle: str) -> str:
        self._check_carried(thing)
        self._check_here(receptacle)
        if receptacle not in RECEPTACLES:
            raise _Refusal(f"Nothing can be put in the {receptacle}.")
        self._check_unlocked(receptacle)
        if receptacle in self.closed:
            raise _Refusal(f"The {receptacle} is closed.")
        self.where[thing] = receptacle
        return f"You put the {thing} in the {receptacle}."

    def _treat(self, kind: str, thing: str) -> str:
        self._check_carried(thing)
        if APPLIANCES[kind] not in self.furniture[self.room]:
            raise _Refusal(f"There is no {APPLIANCES[kind]} here.")
        if kind not in THINGS.get(thing, ()):
            raise _Refusal(f"You cannot {kind} the {thing}.")
        if (kind, thing) in self.treated:
            raise _Refusal(f"The {thing} is {ADJECTIVES[kind]} already.")
        self.treated.add((kind, thing))
        return f"The {thing} is {ADJECTIVES[kind]}."

    def _check_carried(self, thing: str) -> None:
        if self.where.get(thing) != HANDS:
            raise _Refusal("You do not carry that.")

    def _check_here(self, item: str) -> None:
        if item not in self.furniture[self.room]:
            raise _Refusal("You see nothing like that here.")

    def _check_unlocked(self, receptacle: str, keys: Sequence[str] = ()) -> None:
        key = self.locks.get(receptacle)
        if key is not None and key not in keys:
            raise _Refusal(f"The {receptacle} is locked; you need the {key}.")


# ---------------------------------------------------------------------------------------------------- world generation


def _draw_house(rng: random.Random, rooms: int, ood: bool) -> tuple[dict[str, list[str]], dict[str, list[str]]] | None:
    """Draws exits (a tree of rooms and perhaps one more door) and furniture. `None` if the draw fails."""
    names = rng.sample(ROOMS[: 2 * rooms], rooms)
    doors: list[tuple[str, str]] = []
    for n, room in enumerate(names[1:], start=1):
        fitting = [other for other in names[:n] if ood or not _held_out(room, other)]
        if not fitting:
            return None
        doors.append((room, rng.choice(fitting)))
    one, other = rng.sample(names, 2)
    if not {(one, other), (other, one)}.intersection(doors) and (ood or not _held_out(one, other)):
        doors.append((one, other))
    exits = {room: [a if b == room else b for a, b in doors if room in (a, b)] for room in names}

    furniture: dict[str, list[str]] = {}
    free = [*SURFACES[: 2 * rooms + 1], *CONTAINERS[: 2 * rooms + 1]]
    rng.shuffle(free)
    for room in names:
        furniture[room] = [item for item in free if ood or not _held_out(item, room)][: rng.randint(1, 3)]
        if not furniture[room]:
            return None
        free = [item for item in free if item not in furniture[room]]
    for appliance in APPLIANCES.values():
        fitting = [room for room in names if ood or not _held_out(appliance, room)]
        if not fitting:
            return None
        furniture[rng.choice(fitting)].append(appliance)

    if ood:
        placements = ((item, room) for room, items in furniture.items() for item in items)
        if not (any(_held_out(*door) for door in doors) and any(_held_out(*placed) for placed in placements)):
            return None
    return exits, furniture


def _draw_world(rng: random.Random, rooms: int, chores: int, split: str) -> _World | None:
    """Draws a world of the split. `None` if the draw fits another split or fails."""
    ood = split == "ood"
    house = _draw_house(rng, rooms, ood)
    if house is None:
        return None
    exits, furniture = house
    receptacles = [item for items in furniture.values() for item in items if item in RECEPTACLES]
    things = list(THINGS)[: 4 * rooms]

    goal: list[Chore] = []
    for _ in range(chores):
        fitting = [chore for chore in CHORES_OF[ood, rng.choice(KINDS)] if chore.target in receptacles]
        fitting = [chore for chore in fitting if chore.thing in things]
        fitting = [chore for chore in fitting if all(chore.thing != other.thing for other in goal)]
        if not fitting:
            return None
        goal.append(rng.choice(fitting))
    where = {chore.thing: rng.choice([item for item in receptacles if item != chore.target]) for chore in goal}
    for thing in rng.sample([thing for thing in things if thing not in where], rooms):
        where[thing] = rng.choice(receptacles)

    keys = rng.sample(KEYS, chores)
    locks: dict[str, str] = {}
    for chore in goal:
        receptacle = rng.choice((chore.target, where[chore.thing]))
        if rng.random() < LOCKED and receptacle in CONTAINERS:
            locks[receptacle] = keys.pop()
    unlocked = [item for item in receptacles if item not in locks]
    if not unlocked:
        return None
    where |= {key: rng.choice(unlocked) for key in locks.values()}  # never behind a lock: no dead ends
    closed = {item for item in receptacles if item in CONTAINERS}
    world = _World(exits, furniture, goal, rng.choice(list(exits)), where, closed, locks)
    parity = zlib.crc32(world.canonical().encode()) % 2
    return world if ood or parity == SPLITS.index(split) else None


# -------------------------------------------------------------------------------------------------------------- expert


class _Expert:
    """Does chores in a copy of a world, which it knows in full, and keeps the commands."""

    def __init__(self, world: _World):
        self.world = world.copy()
        self.commands: list[str] = []

    def act(self, command: str) -> None:
        self.world.act(command)
        self.commands.append(command)

    def do_chore(self, chore: Chore, key_after: int) -> None:
        """Does one chore; the key of a locked target is fetched after `key_after` of the two other errands."""
        locks = self.world.locks
        keep = (chore.thing, locks.get(chore.target), locks.get(self.world.where[chore.thing]))
        for errand in range(3):
            if errand == key_after and chore.target in locks:
                self.fetch(locks[chore.target], keep)
            if errand == 0:
                self.fetch(chore.thing, keep)
            if errand == 1 and chore.kind != "put" and (chore.kind, chore.thing) not in self.world.treated:
                self.go_to(APPLIANCES[chore.kind])
                self.act(f"{chore.kind} {chore.thing}")
        self.reach(chore.target, keep)
        self.act(f"put {chore.thing} in {chore.target}")

    def fetch(self, thing: str, keep: tuple[str | None, ...]) -> None:
        """Takes `thing` in hand; of two full hands it empties the one that holds nothing of `keep`."""
        place = self.world.where[thing]
        if place == HANDS:
            return
        self.reach(place, keep)
        carried = self.world.carried()
        if len(carried) == MAX_CARRIED:
            spare = next(item for item in carried if item not in keep)
            self.act(f"put {spare} in {place}")
        self.act(f"take {thing}")

    def reach(self, receptacle: str, keep: tuple[str | None, ...]) -> None:
        if receptacle in self.world.locks:
            self.fetch(self.world.locks[receptacle], keep)
        self.go_to(receptacle)
        if receptacle in self.world.locks:
            self.act(f"unlock {receptacle}")
        if receptacle in self.world.closed:
            self.act(f"open {receptacle}")

    def go_to(self, item: str) -> None:
        """Walks the shortest way to the room where `item` stands."""
        exits = self.world.exits
        paths = [[self.world.room]]
        for path in paths:  # grows while it is walked through: breadth first
            if item in self.world.furniture[path[-1]]:
                for room in path[1:]:
                    self.act(f"go to {room}")
                return
            paths += [[*path, room] for room in exits[path[-1]] if room not in path]


def _plan(world: _World) -> list[str]:
    """The commands that do all open chores one after another, in the best order."""
    plans = []
    for chore in world.goal:
        if world.done(chore):
            continue
        for key_after in range(3) if chore.target in world.locks else (0,):
            expert = _Expert(world)
            expert.do_chore(chore, key_after)
            plans.append(expert.commands + _plan(expert.world))
    return min(plans, key=len, default=[])


class _Searcher:
    """Remembers what was seen of a world, and says how to find the rest."""

    def __init__(self, world: _World):
        self.world = world
        self.rooms: set[str] = set()  # where the agent has been
        self.looked_into: set[str] = set()  # receptacles that were seen open
        self.look()

    def look(self) -> None:
        """To be called after each command."""
        here = self.world.furniture[self.world.room]
        self.rooms.add(self.world.room)
        self.looked_into |= {item for item in here if item in RECEPTACLES and item not in self.world.closed}

    def next_command(self, plan: list[str]) -> str:
        """The first command of a plan that knows the whole house, as long as what it goes for has been seen; else of the search."""
        errands = [command for command in plan if not command.startswith(("go to ", "unlock "))]
        opened_to_take = errands[0].startswith("open ") and errands[1].startswith("take ")
        verb, _, what = errands[0].partition(" ")
        item = {"put": what.rpartition(" in ")[2], **APPLIANCES}.get(verb, what)
        place = self.world.where.get(item, item)  # a thing's receptacle
        room = next(room for room, items in self.world.furniture.items() if place in items)
        if opened_to_take or (verb == "take" and place not in self.looked_into):
            # The plan knows what is in there, the agent does not
            return self._search(of_things=True) or plan[0]
        return plan[0] if room in self.rooms else self._search(of_things=False) or plan[0]

    def _search(self, of_things: bool) -> str | None:
        """Open what is closed here, else go towards the next room where something is left to see; `None` if nothing is."""
        paths = [[self.world.room]]
        for path in paths:  # breadth first
            left = self._unopened(path[-1]) if of_things else []
            if len(path) == 1 and left:
                return f"open {left[0]}"
            if left or path[-1] not in self.rooms:
                return f"go to {path[1]}"
            paths += [[*path, room] for room in self.world.exits[path[-1]] if room not in path]
        return None

    def _unopened(self, room: str) -> list[str]:
        items = self.world.furniture[room] if room in self.rooms else []
        return [item for item in items if item in self.world.closed and item not in self.world.locks]


# --------------------------------------------------------------------------------------------------------- environment

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
    A house with chores to do: text in, text out. The module's docstring shows a game and defines the splits.

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
    ):
        self.instructions = instructions
        self.searching_expert = searching_expert
        self._knobs = {"rooms": rooms, "chores": chores, "turns": turns, "split": split}
        _check_knobs(self._knobs)
        self._world: _World | None = None
        self._turns_left = 0
        self._plan: list[str] = []
        self._searcher: _Searcher | None = None

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
            world = _draw_world(rng, knobs["rooms"], knobs["chores"], knobs["split"])
            plan = [] if world is None else _plan(world)
            if 0 < len(plan) <= knobs["turns"]:
                break
        else:
            raise ValueError(
                f"None of {MAX_TRIES} worlds with rooms={knobs['rooms']} and chores={knobs['chores']} can be solved in "
                f"turns={knobs['turns']}: raise `turns`, or lower `rooms` or `chores`."
            )
        self._world, self._plan, self._turns_left = world, plan, knobs["turns"]
        self._searcher = _Searcher(world)
        return f"{world.task_sentence()} {world.look()}", self._info(invalid_action=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carries out one command; any string is answered by a sentence and takes a turn."""
        world = self._running_world()
        command = " ".join(action.lower().split()).removesuffix(".").rstrip()
        invalid_action = False
        try:
            reply = world.act(command)
        except _Refusal as refusal:
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
        return reply, float(success), success, truncated, self._info(invalid_action)

    def expert_action(self) -> str:
        """
        The next command of an expert; it solves every state, given enough turns. It knows the whole house, or, with
        `searching_expert`, what has been seen of it.
        """
        world = self._running_world()
        self._plan = self._plan or _plan(world)
        return self._searcher.next_command(self._plan) if self.searching_expert else self._plan[0]

    def _running_world(self) -> _World:
        if self._world is None:
            raise RuntimeError("There is no episode yet: call reset() first.")
        if self._turns_left == 0:
            raise RuntimeError("The episode is over: call reset() first.")
        return self._world

    def _info(self, invalid_action: bool) -> dict[str, Any]:
        kinds = [chore.kind for chore in self._world.goal]
        return {
            "success": self._world.solved(),
            "invalid_action": invalid_action,
            "admissible_actions": self._world.admissible() if self._turns_left else [],
            "task": kinds[0] if kinds.count(kinds[0]) == len(kinds) else "mixed",
        }


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
