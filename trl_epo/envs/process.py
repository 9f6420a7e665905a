"""Environments in processes of their own, for simulators that cannot share one."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import gymnasium

from .base import EnvironmentDied, TextEnv, instructions_of
from .fork_server import Process, ProcessDied, allow_open_files


_env: gymnasium.Env | None = None  # in the environment's own process
_factory: Callable[[], gymnasium.Env] | None = None  # there too


class ProcessEnv(TextEnv):
    """
    An environment that runs in a process of its own: for simulators that are not safe with threads or keep state of
    their process. It crashes alone: what it did is lost, this process goes on.

    ```python
    trainer = EPOTrainer(..., environment_factory=lambda: ProcessEnv(MySimulator))
    ```

    The process starts with the first reset, or when `instructions` are read, which are those of the environment in it,
    without what this one has imported: on Linux it is forked from a server, a process without threads that all of them
    share. It ends with `close`, with `interrupt`, and when this process ends, however that happens. It has the
    environment variables, the working directory and `sys.path` of the moment that it starts.

    Args:
        factory (`Callable[[], gymnasium.Env]`): Makes the environment, in its process. May be a lambda; what it refers
            to is sent along with `cloudpickle`.
        memory_limit (`int`, *optional*): Bytes of data that the process may hold (Linux: `RLIMIT_DATA`). One that leaks
            gets a `MemoryError` there, which costs its episode, instead of taking the whole machine's memory.

    Raises:
        EnvironmentDied: From `reset`, `step` and `instructions`, if the process died.
    """

    _preload: str | None = None  # what the server does once for all processes

    def __init__(self, factory: Callable[[], gymnasium.Env], memory_limit: int | None = None):
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"memory_limit={memory_limit!r}: expected a number of bytes, or None for no limit")
        allow_open_files()
        self._factory = factory
        self._memory_limit = memory_limit
        self._process: Process | None = None
        self._interrupted = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self._have_process()
        return self._ask(_reset, seed, options)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._process is None:
            raise RuntimeError("no episode is running: call env.reset() first.")
        return self._ask(_step, action)

    @property
    def instructions(self) -> str | None:  # type: ignore[override]  # asked of the process
        self._have_process()
        return self._ask(_instructions)

    def __getattr__(self, name: str) -> Any:
        # Of the environment's expert, if it has one (`trl_epo.imitation`); any other name is no one's
        if name in ("expert_action", "expert_actions"):
            self._have_process()
            if self._ask(_has, name):
                return partial(self._ask, call_method, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
            self._interrupted = False

    def interrupt(self) -> None:
        """
        Kill the process, or the next one if there is none yet; a call that waits for it, on another thread, raises
        `EnvironmentDied`.
        """
        self._interrupted = True
        if (process := self._process) is not None:
            process.kill()

    def _have_process(self) -> None:
        if self._process is None:
            self._process = Process(self._preload)
            if self._interrupted:  # before there was anything to kill
                self.interrupt()
            try:
                self._ask(_begin, _surroundings(), self._memory_limit, self._factory)
            except Exception:  # as when it cannot import what the factory refers to
                self.close()
                raise

    def _ask(self, function: Callable, *args) -> Any:
        try:
            return self._process.call(function, *args)
        except ProcessDied as error:
            self.close()
            raise EnvironmentDied(
                "The environment's process died. The episode is lost: call env.reset(), which starts another."
            ) from error


def _surroundings() -> tuple[dict[str, str], list[str], str | None]:
    folder = None
    with suppress(FileNotFoundError):  # it was removed
        folder = os.getcwd()
    return dict(os.environ), sys.path, folder


# In the process


def _begin(
    surroundings: tuple[dict[str, str], list[str], str | None],
    memory_limit: int | None,
    factory: Callable[[], gymnasium.Env],
) -> None:
    global _factory
    environ, sys.path[:], folder = surroundings
    os.environ.clear()
    os.environ.update(environ)
    if folder is not None:
        with suppress(OSError):
            os.chdir(folder)
    if memory_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    _factory = factory


def _made() -> gymnasium.Env:
    global _env
    if _env is None:
        _env = _factory()
    return _env


def _reset(seed: int | None, options: dict[str, Any] | None) -> Any:
    return _made().reset(seed=seed, options=options)


def _instructions() -> str | None:
    return instructions_of(_made())


def _step(action: str) -> Any:
    return _env.step(action)


def _has(name: str) -> bool:
    return hasattr(_made().unwrapped, name)


def call_method(name: str) -> Any:
    """What a method of the environment returns."""
    return getattr(_made().unwrapped, name)()
