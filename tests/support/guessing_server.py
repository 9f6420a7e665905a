"""
The server of `examples/openenv_server.py`, which raises and hangs where it is told to, and counts its sessions.

OpenEnv is imported once, then servers are started as they are asked for, by a line `port sessions` on the input.
"""

import os
import signal
import sys
import threading
from contextlib import suppress

import uvicorn
from openenv.core.env_server import Action, create_fastapi_app
from openenv_server import Guess, Guessing, Hint


class Cell(Action):
    row: int
    column: int


class FaultyGuessing(Guessing):
    open, lock = 0, threading.Lock()
    go_on = threading.Event()  # for those that hang

    def __init__(self):
        super().__init__()
        self.count(1)

    def step(self, action, timeout_s=None, **kwargs):
        if isinstance(action, Cell):
            return Hint(text=f"At {action.row}, {action.column}.")
        if action.text == "raise":
            raise RuntimeError("the dice are lost")
        if action.text == "hang":
            self.go_on.wait()
        return super().step(action)

    def close(self):
        self.count(-1)

    def count(self, number):
        with self.lock:
            FaultyGuessing.open += number


def serve(port: int, sessions: int) -> None:
    # One with a single session takes cells; one with two does not tell what its actions are.
    app = create_fastapi_app(FaultyGuessing, Cell if sessions == 1 else Guess, Hint, max_concurrent_envs=sessions)
    if sessions == 2:
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/schema"]
    app.get("/open")(lambda: FaultyGuessing.open)
    app.get("/free")(FaultyGuessing.go_on.set)
    uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical")).run()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not waited for
    started = []
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            try:
                serve(*map(int, line.split()))
            finally:
                os._exit(0)
        started.append(pid)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    for pid in started:  # whoever has asked for them has ended
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
