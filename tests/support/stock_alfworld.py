"""
Plays ALFWorld games with TextWorld as it comes, and tells what it said:

    python stock_alfworld.py STEPS GAME... > episodes.jsonl

A line for each of a game's two episodes: its solution, if it brings one, and as many random steps, some of them nonsense.
Imports nothing of `trl_epo`.
"""

import json
import random
import sys
from pathlib import Path

from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from textworld import EnvInfos
from textworld.envs.pddl import PddlEnv


def main() -> None:
    num_steps, games = int(sys.argv[1]), sys.argv[2:]
    env = AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)))
    for game in games:
        contents = json.loads(Path(game).read_text())
        env.load(contents)
        draws = random.Random(contents["pddl_problem"])
        for script in (contents.get("walkthrough") or [], [None] * num_steps):
            state, done = env.reset(), False
            states = [(state.feedback, state["admissible_commands"], state["won"])]
            commands = []
            for command in script:
                if command is None:
                    command = draws.choice([draws.choice(state["admissible_commands"])] * 9 + ["fly to the moon"])
                state, _, done = env.step(command)
                commands.append(command)
                states.append((state.feedback, state["admissible_commands"], state["won"]))
                if done:
                    break
            print(json.dumps({"game": game, "commands": commands, "states": states}), flush=True)


if __name__ == "__main__":
    main()
