"""Environments for processes of their own: this file imports little, and so do they."""

import os
import time

import numpy as np

from trl_epo.envs import TextEnv


class Telling(TextEnv):
    """Tells about its process."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "You are here.", {}

    def step(self, action):
        info = {"pid": os.getpid(), "folder": os.getcwd(), "variable": os.environ.get("TRL_EPO_TEST")}
        info["draw"] = float(np.random.random())
        if action == "fork" and not (forked := os.fork()):
            time.sleep(600)
            os._exit(0)
        if action == "fork":
            info["forked"] = forked
        return "You are here.", 0.0, False, False, info


class TwoArguments(Exception):
    """As many exceptions are: pickled with the arguments of `Exception`, which are not its own."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


class NoNumber:
    def __reduce__(self):
        return int, ("no number",)


class Odd(Telling):
    """What it raises and answers cannot be unpickled."""

    def step(self, action):
        if action == "raise":
            raise TwoArguments(7, "no more ink")
        if action == "answer":
            return "", 0.0, False, False, {"place": NoNumber()}
        return super().step(action)
