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

from .environment import INSTRUCTIONS, Household, tasks


__all__ = ["INSTRUCTIONS", "Household", "tasks"]
