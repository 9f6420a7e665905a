"""Environments in processes of their own, for simulators that cannot share one."""

from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import Any

import gymnasium
from loky import ProcessPoolExecutor

from .base import TextEnv


_env: gymnasium.Env | None = None  # in the environment's own process


class ProcessEnv(TextEnv):
    """
    An environment that runs in a process of its own: for simulators that are not safe with threads or keep state of
    their process. It crashes alone: what it did is lost, this process goes on.

    ```python
    trainer = EPOTrainer(..., environment_factory=lambda: ProcessEnv(MySimulator))
    ```

    The process starts with the first reset, without what this one has imported, and ends with `close`.

    Args:
        factory (`Callable[[], gymnasium.Env]`): Makes the environment, in its process. May be a lambda; what it refers
            to is sent along with `cloudpickle`.

    Raises:
        RuntimeError: From `reset` and `step`, if the process died.
    """

    def __init__(self, factory: Callable[[], gymnasium.Env]):
        self._factory = factory
        self._process: ProcessPoolExecutor | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        if self._process is None:
            self._process = ProcessPoolExecutor(max_workers=1, timeout=None)
        return self._ask(_reset, self._factory, seed, options)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._process is None:
            raise RuntimeError("no episode is running: call env.reset() first.")
        return self._ask(_step, action)

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown(wait=True, kill_workers=True)
            self._process = None

    def _ask(self, function: Callable, *args) -> Any:
        try:
            return self._process.submit(function, *args).result()
        except BrokenExecutor as error:
            self.close()
            raise RuntimeError(
                "The environment's process died. The episode is lost: call env.reset(), which starts another."
            ) from error


def _reset(factory: Callable[[], gymnasium.Env], seed: int | None, options: dict[str, Any] | None) -> Any:
    global _env
    if _env is None:
        _env = factory()
    return _env.reset(seed=seed, options=options)


def _step(action: str) -> Any:
    return _env.step(action)
