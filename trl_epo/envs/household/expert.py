"""How a house's chores are done by one who knows it all, or by one who has to look for things."""

from .world import APPLIANCES, HANDS, MAX_CARRIED, RECEPTACLES, Chore, World


class _Expert:
    """Does chores in a copy of a world, which it knows in full, and keeps the commands."""

    def __init__(self, world: World):
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
        path = next(path for path in self.world.paths() if item in self.world.furniture[path[-1]])
        for room in path[1:]:
            self.act(f"go to {room}")


def solution(world: World) -> list[str]:
    """The commands that do all open chores one after another, in the best order."""
    plans = []
    for chore in world.goal:
        if world.done(chore):
            continue
        for key_after in range(3) if chore.target in world.locks else (0,):
            expert = _Expert(world)
            expert.do_chore(chore, key_after)
            plans.append(expert.commands + solution(expert.world))
    return min(plans, key=len, default=[])


class Searcher:
    """Remembers what was seen of a world, and says how to find the rest."""

    def __init__(self, world: World):
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
        for path in self.world.paths():
            left = self._unopened(path[-1]) if of_things else []
            if len(path) == 1 and left:
                return f"open {left[0]}"
            if left or path[-1] not in self.rooms:
                return f"go to {path[1]}"
        return None

    def _unopened(self, room: str) -> list[str]:
        items = self.world.furniture[room] if room in self.rooms else []
        return [item for item in items if item in self.world.closed and item not in self.world.locks]
