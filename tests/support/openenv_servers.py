"""Starts real OpenEnv servers on loopback, those of `guessing_server.py`, and ends them."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
from conftest import child_environment, wait_for


EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def servers():
    """Something that starts servers, `start(sessions)`; all end with this context."""
    command = [sys.executable, str(Path(__file__).with_name("guessing_server.py"))]
    environment = child_environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{EXAMPLES}"
    nursery = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    started = []

    def start(sessions: int, port: int | None = None) -> "Server":
        started.append(Server(nursery, sessions, port or free_port()))
        return started[-1]

    try:
        yield start
    finally:
        for server in started:
            server.kill()
        nursery.kill()
        nursery.communicate()


class Server:
    def __init__(self, nursery: subprocess.Popen, sessions: int, port: int):
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        print(port, sessions, file=nursery.stdin, flush=True)
        self.pid = int(nursery.stdout.readline())
        assert wait_for(self.is_there)

    def is_there(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    def sessions(self) -> int:
        """How many environments there are at the server."""
        return httpx.get(f"{self.url}/open").json()

    def kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        assert wait_for(lambda: not self.is_there())


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
