"""
A small OpenEnv server to try the adapter on, with as many sessions as a run asks for:

    pip install -e ".[openenv]"
    python examples/openenv_server.py --port 8000

A session guesses a number from 1 to 99, a new one for each seed. `examples/configs/openenv-small.yaml` trains on it.
"""

import argparse
import random

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Guess(Action):
    text: str


class Hint(Observation):
    text: str = ""


class Guessing(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True  # else a server has a single one

    def reset(self, seed=None, episode_id=None, number=None, **kwargs) -> Hint:
        """The number is the dataset row's, or the seed's: the episodes of a group have to begin alike."""
        self.number = random.Random(seed).randint(1, 99) if number is None else number
        return Hint(text="Guess my number from 1 to 99.")

    def step(self, action: Guess, timeout_s=None, **kwargs) -> Hint:
        if not action.text.isdecimal():
            return Hint(text="That is no number.")
        guess = int(action.text)
        if guess == self.number:
            return Hint(text="Right!", reward=1.0, done=True)
        return Hint(text="Higher." if guess < self.number else "Lower.")

    @property
    def state(self) -> State:
        return State()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--sessions", type=int, default=64, help="At once.")
    arguments = parser.parse_args()
    app = create_fastapi_app(Guessing, Guess, Hint, max_concurrent_envs=arguments.sessions)
    uvicorn.run(app, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
