"""
ALFWorld: household chores of six kinds in rooms of the ALFRED data set, as text. Needs
`pip install "trl-epo[alfworld]"`, which compiles parts of TextWorld, and games: `alfworld-download` fetches ALFWorld's
own, `write_games` makes small ones.

    Your task is to: put a clean mug in shelf.
    > go to countertop 1
    You arrive at countertop 1. On the countertop 1, you see a mug 1, and a plate 2.
    > take mug 1 from countertop 1
    You pick up the mug 1 from the countertop 1.

`engine.py` plays a game. TextWorld's parsers keep state of their process and are not safe with threads, and the
translator of PDDL takes standard output for itself, so that each `AlfWorld` has a process of its own.
"""

from .environment import INSTRUCTIONS, TASKS, AlfWorld, LocalAlfWorld, expert_actions, tasks
from .games import make_game, write_games


__all__ = [
    "INSTRUCTIONS",
    "TASKS",
    "AlfWorld",
    "LocalAlfWorld",
    "expert_actions",
    "make_game",
    "tasks",
    "write_games",
]
