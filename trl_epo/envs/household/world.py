"""The house: its words, its rules, what is said of it, and how one is drawn."""

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


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
ALWAYS = ("inventory", "look")  # commands that are possible in every state
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


class Refusal(Exception):
    """Why a command was not carried out, as a sentence for the agent."""


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@dataclass
class World:
    """The state of a game, its rules and its words. Only `room` and the last four fields change during a game."""

    exits: dict[str, list[str]]  # room -> rooms next to it
    furniture: dict[str, list[str]]  # room -> receptacles and appliances in it
    goal: list[Chore]
    room: str  # where the agent is
    where: dict[str, str]  # thing or key -> receptacle, or HANDS
    closed: set[str]  # receptacles, the locked ones included
    locks: dict[str, str]  # locked receptacle -> its key
    treated: set[tuple[str, str]] = field(default_factory=set)  # ("clean", thing), ("heat", thing)

    def copy(self) -> "World":
        parts = (self.where.copy(), self.closed.copy(), self.locks.copy(), self.treated.copy())
        return World(self.exits, self.furniture, self.goal, self.room, *parts)

    def carried(self) -> list[str]:
        return [thing for thing, place in self.where.items() if place == HANDS]

    def done(self, chore: Chore) -> bool:
        treated = chore.kind == "put" or (chore.kind, chore.thing) in self.treated
        return treated and self.where[chore.thing] == chore.target

    def solved(self) -> bool:
        return all(map(self.done, self.goal))

    def paths(self) -> Iterator[list[str]]:
        """The rooms on the ways from the agent's, that one first and no room twice; the shortest ways first."""
        paths = [[self.room]]
        for path in paths:  # grows while it is walked through: breadth first
            yield path
            paths += [[*path, room] for room in self.exits[path[-1]] if room not in path]

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
        commands = [*ALWAYS, *(f"go to {room}" for room in self.exits[self.room])]
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
        """Carries out a command and tells what happened; a `Refusal` tells why the world stays as it is."""
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
        raise Refusal("Nothing happens.")

    def _go(self, direction: str) -> str:
        room = direction.removeprefix("to ")
        if room == direction:
            raise Refusal("Go to which room?")
        if room == self.room:
            raise Refusal(f"You are in the {room}.")
        if room not in self.exits[self.room]:
            raise Refusal("No door leads there from here.")
        self.room = room
        return self.look()

    def _open(self, receptacle: str) -> str:
        self._check_here(receptacle)
        if receptacle not in CONTAINERS:
            raise Refusal(f"The {receptacle} cannot be opened.")
        if receptacle not in self.closed:
            raise Refusal(f"The {receptacle} is open.")
        self._check_unlocked(receptacle)
        self.closed.remove(receptacle)
        return f"The {receptacle} is open; it holds {self.contents(receptacle) or 'nothing'}."

    def _unlock(self, receptacle: str) -> str:
        self._check_here(receptacle)
        if receptacle not in self.locks:
            raise Refusal(f"The {receptacle} is not locked.")
        self._check_unlocked(receptacle, keys=self.carried())
        del self.where[self.locks.pop(receptacle)]
        return f"The {receptacle} is unlocked; the key stays in it."

    def _take(self, thing: str) -> str:
        place = self.where.get(thing)
        if place == HANDS:
            raise Refusal(f"You carry the {thing}.")
        if place in self.closed or place not in self.furniture[self.room]:
            raise Refusal("You see nothing like that here.")
        if len(self.carried()) == MAX_CARRIED:
            raise Refusal("Your hands are full.")
        self.where[thing] = HANDS
        return f"You take the {thing}."

    def _put(self, thing: str, receptacle: str) -> str:
        self._check_carried(thing)
        self._check_here(receptacle)
        if receptacle not in RECEPTACLES:
            raise Refusal(f"Nothing can be put in the {receptacle}.")
        self._check_unlocked(receptacle)
        if receptacle in self.closed:
            raise Refusal(f"The {receptacle} is closed.")
        self.where[thing] = receptacle
        return f"You put the {thing} in the {receptacle}."

    def _treat(self, kind: str, thing: str) -> str:
        self._check_carried(thing)
        if APPLIANCES[kind] not in self.furniture[self.room]:
            raise Refusal(f"There is no {APPLIANCES[kind]} here.")
        if kind not in THINGS.get(thing, ()):
            raise Refusal(f"You cannot {kind} the {thing}.")
        if (kind, thing) in self.treated:
            raise Refusal(f"The {thing} is {ADJECTIVES[kind]} already.")
        self.treated.add((kind, thing))
        return f"The {thing} is {ADJECTIVES[kind]}."

    def _check_carried(self, thing: str) -> None:
        if self.where.get(thing) != HANDS:
            raise Refusal("You do not carry that.")

    def _check_here(self, item: str) -> None:
        if item not in self.furniture[self.room]:
            raise Refusal("You see nothing like that here.")

    def _check_unlocked(self, receptacle: str, keys: Sequence[str] = ()) -> None:
        key = self.locks.get(receptacle)
        if key is not None and key not in keys:
            raise Refusal(f"The {receptacle} is locked; you need the {key}.")


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


def draw_world(rng: random.Random, rooms: int, chores: int, split: str) -> World | None:
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
    world = World(exits, furniture, goal, rng.choice(list(exits)), where, closed, locks)
    parity = zlib.crc32(world.canonical().encode()) % 2
    return world if ood or parity == SPLITS.index(split) else None
