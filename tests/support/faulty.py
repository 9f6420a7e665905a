"""An environment that meets with faults; apart from the tests, so that its process imports little."""

import ctypes
import os
import signal
import threading
from pathlib import Path

import numpy as np

from trl_epo.envs import TextEnv


class Faulty(TextEnv):
    """Meets with a fault where `fault` says, as often as there are tokens in a folder."""

    def __init__(self, fault, at, tokens):
        self.fault, self.at, self.tokens = fault, at, tokens
        self.num_steps = 0

    def _meet(self, answer):
        for token in sorted(Path(self.tokens).iterdir()):
            try:
                token.unlink()
            except FileNotFoundError:
                continue
            return FAULTS[self.fault](answer)
        return answer

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.num_steps = 0
        answer = "You are at 1. The door is at 9.", {}
        return self._meet(answer) if self.at == 0 else answer

    def step(self, action):
        self.num_steps += 1
        answer = "Nothing happens.", 0.0, False, False, {"success": False}
        return self._meet(answer) if self.num_steps == self.at else answer


def crash(answer):
    raise RuntimeError("the simulator crashed \x1b]0;title\x07 \udce4")


def leak(answer):
    kept = []
    while True:
        kept.append(bytearray(10 * 2**20))


FAULTS = {
    "crash": crash,
    "hang": lambda answer: threading.Event().wait(),
    "bytes": lambda answer: (b"x" * 10 * 2**20, *answer[1:]),
    "nothing": lambda answer: None,
    "nan": lambda answer: (answer[0], float("nan"), *answer[2:]),
    "inf": lambda answer: (answer[0], float("inf"), *answer[2:]),
    "success": lambda answer: (*answer[:-1], {"success": np.ones(2)}),
    "exit": lambda answer: os._exit(0),
    "segfault": lambda answer: ctypes.string_at(0),
    "kill": lambda answer: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda answer: os.kill(os.getpid(), signal.SIGSTOP),
    "leak": leak,
}
