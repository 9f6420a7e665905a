"""Environments at work: each on a thread of its own, kept for the next batch of episodes."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import gymnasium

from .envs.base import check_reset, check_step


logger = logging.getLogger(__name__)

EnvironmentFactory = Callable[[], gymnasium.Env]


class EnvironmentWorker:
    """
    An environment and the thread that makes it, uses it and closes it, so that environments run side by side and none
    ever sees a second thread.

    Args:
        factory (`Callable[[], gymnasium.Env]`): Makes the environment.
    """

    def __init__(self, factory: EnvironmentFactory):
        self._factory = factory
        self._env: gymnasium.Env | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="environment")

    def call(self, function: Callable[[gymnasium.Env], Any]) -> Future:
        """`function(environment)` on the environment's thread."""
        return self._thread.submit(self._call, function)

    def reset(self, seed: int, options: dict[str, Any]) -> Future:
        """`(observation, info)`, checked against the contract."""
        return self.call(lambda env: check_reset(env.reset(seed=seed, options=dict(options))))

    def step(self, action: str) -> Future:
        """`(observation, reward, terminated, truncated, info)`, checked against the contract."""
        return self.call(lambda env: check_step(env.step(action)))

    def close(self) -> Future:
        """Close the environment after what it still has to do. An error in it is logged."""
        try:
            closed = self._thread.submit(self._close)
        except RuntimeError:  # the interpreter is shutting down and starts no more work on threads
            closed = Future()
            closed.set_result(self._close())
        self._thread.shutdown(wait=False)
        return closed

    def _call(self, function: Callable[[gymnasium.Env], Any]) -> Any:
        if self._env is None:
            self._env = self._factory()
        return function(self._env)

    def _close(self) -> None:
        env, self._env = self._env, None
        try:
            if env is not None:
                env.close()
        except Exception:
            logger.warning("Closing an environment failed.", exc_info=True)


class EnvironmentPool:
    """
    Makes environments when they are needed and keeps them for the next batch.

    Args:
        factory (`Callable` or `dict[str, Callable]`): Makes an environment; by name, if there are several.
    """

    def __init__(self, factory: EnvironmentFactory | dict[str, EnvironmentFactory]):
        self.named = isinstance(factory, dict)
        self._factories = factory if self.named else {None: factory}
        self._idle: dict[str | None, list[EnvironmentWorker]] = {name: [] for name in self._factories}

    @property
    def names(self) -> list[str | None]:
        """The environments' names; `[None]` if there is a single, unnamed factory."""
        return list(self._factories)

    def take(self, name: str | None) -> EnvironmentWorker:
        """An environment that nobody uses. Raises `KeyError` if there is none of that name."""
        idle = self._idle[name]
        return idle.pop() if idle else EnvironmentWorker(self._factories[name])

    def give_back(self, name: str | None, worker: EnvironmentWorker) -> None:
        """Keep an environment for later."""
        self._idle[name].append(worker)

    def close(self) -> None:
        """Close all idle environments."""
        closed = [idle.pop().close() for idle in self._idle.values() for _ in range(len(idle))]
        for future in closed:
            future.result()
