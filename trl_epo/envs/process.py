"""Environments in processes of their own, for simulators that cannot share one."""

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import gymnasium
from loky import ProcessPoolExecutor
from loky.process_executor import ShutdownExecutorError

from .base import EnvironmentDied, TextEnv, instructions_of


_env: gymnasium.Env | None = None  # in the environment's own process


def _new_starter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="starts-environments")


# Linux ends a process when the *thread* ends that has started it: they are all started by this one.
_starter = _new_starter()
PR_SET_PDEATHSIG = 1


class ProcessEnv(TextEnv):
    """
    An environment that runs in a process of its own: for simulators that are not safe with threads or keep state of
    their process. It crashes alone: what it did is lost, this process goes on.

    ```python
    trainer = EPOTrainer(..., environment_factory=lambda: ProcessEnv(MySimulator))
    ```

    The process starts with the first reset, or when `instructions` are read, which are those of the environment in it,
    without what this one has imported. It ends with `close`, with `interrupt`,
    and when this process ends, however that happens.

    Args:
        factory (`Callable[[], gymnasium.Env]`): Makes the environment, in its process. May be a lambda; what it refers
            to is sent along with `cloudpickle`.
        memory_limit (`int`, *optional*): Bytes of data that the process may hold (Linux: `RLIMIT_DATA`). One that leaks
            gets a `MemoryError` there, which costs its episode, instead of taking the whole machine's memory.

    Raises:
        EnvironmentDied: From `reset`, `step` and `instructions`, if the process died.
    """

    def __init__(self, factory: Callable[[], gymnasium.Env], memory_limit: int | None = None):
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"memory_limit={memory_limit!r}: expected a number of bytes, or None for no limit")
        self._factory = factory
        self._memory_limit = memory_limit
        self._process: ProcessPoolExecutor | None = None
        self._interrupted = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self._have_process()
        return self._ask(_reset, self._factory, seed, options)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._process is None:
            raise RuntimeError("no episode is running: call env.reset() first.")
        return self._ask(_step, action)

    @property
    def instructions(self) -> str | None:
        self._have_process()
        return self._ask(_instructions, self._factory)

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown(wait=True, kill_workers=True)
            self._process = None
            self._interrupted = False

    def interrupt(self) -> None:
        """
        Kill the process, or the next one if there is none yet; a call that waits for it, on another thread, raises
        `EnvironmentDied`.
        """
        self._interrupted = True
        if (process := self._process) is not None:
            process.shutdown(wait=False, kill_workers=True)

    def _have_process(self) -> None:
        if self._process is None:
            self._process = _starter.submit(self._start).result()
            if self._interrupted:  # before there was anything to kill
                self.interrupt()

    def _start(self) -> ProcessPoolExecutor:
        process = ProcessPoolExecutor(
            max_workers=1,
            timeout=None,
            initializer=_begin_process,
            initargs=(os.getpid(), self._memory_limit),
            env={"LOKY_MAX_MEMORY_LEAK_SIZE": "1e18"},  # a process that has grown is not exchanged in mid-episode
        )
        # Should this process end: do not wait for what the other one is about. There is no argument for it.
        process._flags.kill_workers = True
        process.submit(os.getpid)  # this starts it
        return process

    def _ask(self, function: Callable, *args) -> Any:
        try:
            return self._process.submit(function, *args).result()
        except (BrokenExecutor, ShutdownExecutorError) as error:
            self.close()
            raise EnvironmentDied(
                "The environment's process died. The episode is lost: call env.reset(), which starts another."
            ) from error


def _begin_process(parent: int, memory_limit: int | None) -> None:
    if sys.platform == "linux":  # at once, and also if it is stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with, args=(parent,), name="ends-with-parent", daemon=True).start()
    # A terminal's Ctrl-C, and a scheduler's signal to every process, is for the parent, who decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _do_nothing)  # what the environment itself starts does not inherit that
    if memory_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _do_nothing(number: int, frame: Any) -> None:
    pass


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _made(factory: Callable[[], gymnasium.Env]) -> gymnasium.Env:
    global _env
    if _env is None:
        _env = factory()
    return _env


def _reset(factory: Callable[[], gymnasium.Env], seed: int | None, options: dict[str, Any] | None) -> Any:
    with _errors_that_travel():
        return _that_travels(_made(factory).reset(seed=seed, options=options))


def _instructions(factory: Callable[[], gymnasium.Env]) -> str | None:
    with _errors_that_travel():
        return instructions_of(_made(factory))


def _step(action: str) -> Any:
    with _errors_that_travel():
        return _that_travels(_env.step(action))


def _that_travels(value: Any) -> Any:
    """`value`; raises if it cannot be put together again, as at the other end, where loky takes that for a dead process."""
    deepcopy(value)
    return value


@contextmanager
def _errors_that_travel() -> Iterator[None]:
    """An exception that cannot be put together again, as one whose class takes other arguments, is told by another."""
    try:
        yield
    except Exception as error:
        try:
            _that_travels(error)
        except Exception:
            text = "".join(traceback.format_exception_only(error)).strip()
            raise RuntimeError(text).with_traceback(error.__traceback__) from None
        raise


def _after_fork() -> None:
    global _starter
    _starter = _new_starter()  # the thread was left behind


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
