"""Environments at work: each on a thread of its own, kept for the next batch of episodes."""

import inspect
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from copy import deepcopy
from queue import SimpleQueue
from typing import Any

import gymnasium

from ..envs.base import check_reset, check_step, how_to_wrap, instructions_of, looks_like_gymnasium
from ..text import MAX_FAILURE_LENGTH, printable, set_apart, taken_in
from .failures import EnvironmentTimeout


logger = logging.getLogger(__name__)

CLOSING_TIME = 5.0  # seconds that environments have to close when the process ends

EnvironmentFactory = Callable[[], gymnasium.Env]


class EnvironmentWorker:
    """
    An environment and the thread that makes it, uses it and closes it, so that environments run side by side and none
    ever sees a second thread.

    Args:
        factory (`Callable[[], gymnasium.Env]`): Makes the environment, when it is first used.
    """

    def __init__(self, factory: EnvironmentFactory):
        # This queue may be written to at any time, even by the garbage collector.
        self._tasks: SimpleQueue[tuple[Callable, Future] | None] = SimpleQueue()
        self._made: list[gymnasium.Env] = []  # the environment, from when it is made
        self._given_up = threading.Event()
        self._num_calls = 0
        self._last_answer: Future | None = None
        # A daemon: an environment that hangs does not keep the process from ending.
        self._thread = threading.Thread(
            target=_work,
            args=(factory, self._tasks, self._made, self._given_up),
            name="environment",
            daemon=True,
        )
        self._thread.start()

    def call(self, function: Callable[[gymnasium.Env], Any]) -> Future:
        """`function(environment)` on the environment's thread."""
        self._num_calls += 1
        future = self._last_answer = Future()
        self._tasks.put((function, future))
        return future

    def reset(self, seed: int, options: dict[str, Any]) -> Future:
        """`(observation, info)`, checked against the contract. The environment may do with its `options` as it likes."""
        return self.call(lambda env: check_reset(env.reset(seed=seed, options=deepcopy(options))))

    def step(self, action: str) -> Future:
        """`(observation, reward, terminated, truncated, info)`, checked against the contract."""
        return self.call(lambda env: check_step(env.step(action)))

    def close(self) -> None:
        """
        Have the environment closed; do not wait for it. A call that is still under way is interrupted, if the
        environment has a method `interrupt`, else it is let run. An error in either is logged.
        """
        if self._last_answer is not None and not self._last_answer.done():
            self._given_up.set()
            for env in self._made:
                try:
                    getattr(env.unwrapped, "interrupt", lambda: None)()
                except Exception:
                    _log_error("Interrupting an environment failed")
        self._last_answer = None  # an error's traceback holds the rollout, and with it the trainer
        self._tasks.put(None)

    @property
    def kind(self) -> str:
        """The name of the environment's class; `"(not made yet)"` before it is made."""
        return type(self._made[0]).__name__ if self._made else "(not made yet)"

    @property
    def is_starting(self) -> bool:
        """Whether its environment is made for the last call, if that has no answer yet."""
        return self._num_calls == 1

    @property
    def held_up_by_another(self) -> bool:
        """Whether its environment tells that its call is held up by another environment."""
        try:
            return any(getattr(env.unwrapped, "held_up_by_another", False) for env in self._made)
        except Exception:
            return False

    @property
    def is_alive(self) -> bool:
        """Whether it is still to be closed."""
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait until it is closed, at most `timeout` seconds."""
        self._thread.join(timeout)


def _work(
    factory: EnvironmentFactory, tasks: SimpleQueue, made: list[gymnasium.Env], given_up: threading.Event
) -> None:
    while (task := tasks.get()) is not None:
        function, future = task
        try:
            if not made:
                made.append(factory())
            if given_up.is_set():  # before there was anything to interrupt
                raise RuntimeError("Nobody waits for the answer.")
            answer = function(made[0])
        except BaseException as error:  # an environment that calls `sys.exit` fails like any other
            future.set_exception(
                error if isinstance(error, Exception) else RuntimeError(f"It raised {type(error).__name__}.")
            )
        else:
            future.set_result(answer)
    for env in made:
        try:
            if hasattr(env, "close"):  # TRL's tool environments need not have it
                env.close()
        except Exception:
            _log_error("Closing an environment failed")


def _log_error(what: str) -> None:
    """Log the exception that is being handled, whose text is the environment's."""
    logger.warning("%s:\n%s", what, set_apart(taken_in(traceback.format_exc(), MAX_FAILURE_LENGTH)))


class EnvironmentPool:
    """
    Makes environments when they are needed and keeps them for the next batch.

    Args:
        factory (`Callable` or `dict[str, Callable]`): Makes an environment; by name, if there are several.
        timeout (`float`): How long an environment may take for an answer, in seconds.

    Attributes:
        seconds_awaited (`float`): How long rollouts have waited for answers and done nothing else, in seconds.
        factories (`dict[str | None, Callable]`): What makes an environment, by name.
    """

    def __init__(self, factory: EnvironmentFactory | dict[str, EnvironmentFactory], timeout: float = math.inf):
        self.timeout = timeout
        self.seconds_awaited = 0.0
        self.named = isinstance(factory, dict)
        self.factories: dict[str | None, EnvironmentFactory]
        if isinstance(factory, dict):
            self.factories = dict(factory)
        else:
            self.factories = {None: factory}
        self._idle: dict[str | None, list[EnvironmentWorker]] = {name: [] for name in self.factories}
        self._closing: list[EnvironmentWorker] = []

    @property
    def names(self) -> list[str | None]:
        """The environments' names; `[None]` if there is a single, unnamed factory."""
        return list(self.factories)

    def take(self, name: str | None, fresh: bool = False) -> EnvironmentWorker:
        """An environment that nobody uses; a `fresh` one was never used. Raises `KeyError` if there is none of that name."""
        idle = self._idle[name]
        return idle.pop() if idle and not fresh else EnvironmentWorker(self.factories[name])

    def wait_for(self, answer: Future) -> Any:
        """What a worker answers. Raises `EnvironmentTimeout` if it takes too long, and what the environment raised."""
        if not wait([answer], min(self.timeout, threading.TIMEOUT_MAX)).done:
            raise self.no_answer()
        return answer.result()

    def instructions(self) -> dict[str | None, str | None]:
        """
        What each environment tells the model to do, by name; `None` for one that says nothing.

        Raises:
            ValueError: If one does not say it as a text, or raises.
        """
        texts = {}
        for name in self.names:
            worker = self.take(name)
            try:
                texts[name] = self.wait_for(worker.call(instructions_of))
            except Exception as error:
                self.discard(worker)
                raise ValueError(
                    f"The `instructions` of the environment {worker.kind} could not be read: {printable(str(error))}"
                ) from error
            self.give_back(name, worker)
        return texts

    def no_answer(self, is_starting: bool = False) -> EnvironmentTimeout:
        """The error for an answer that does not come; `is_starting`: from an environment that had to be made for it."""
        remedy = "If it is only slow, raise that."
        if is_starting:
            remedy = "It had to start in this time, beside others. If that is slow, raise it or lower `max_concurrent_episodes`."
        return EnvironmentTimeout(
            f"The environment gave no answer in {self.timeout:g} seconds (`env_timeout`). {remedy}"
        )

    def give_back(self, name: str | None, worker: EnvironmentWorker) -> None:
        """Keep an environment for later."""
        self._idle[name].append(worker)

    def discard(self, worker: EnvironmentWorker) -> None:
        """Have an environment closed that is not to be used again."""
        worker.close()
        self._closing = [other for other in self._closing if other.is_alive] + [worker]

    def close(self) -> None:
        """Have all idle environments closed."""
        for idle in self._idle.values():
            while idle:
                self.discard(idle.pop())
        if not threading.main_thread().is_alive():  # the process ends, and its daemon threads with it
            deadline = time.monotonic() + CLOSING_TIME
            for worker in self._closing:
                worker.join(max(0.0, deadline - time.monotonic()))


def make_environment_pool(
    factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None, timeout: float = math.inf
) -> EnvironmentPool | None:
    """
    A pool if the factories make text environments, `None` if there are none or they make TRL's tool environments.

    Raises:
        TypeError: If a factory cannot be called.
        ValueError: If there are both kinds, or one is no `gymnasium.Env` but talks like one.
    """
    if factory is None:
        return None
    for made in factory.values() if isinstance(factory, dict) else [factory]:
        if not callable(made):
            raise TypeError(
                f"`environment_factory` is a {type(made).__name__}, but must make one: pass the class, or a function that returns "
                "a new environment at each call."
            )
    pool = EnvironmentPool(factory, timeout)
    kinds = {}
    try:
        for name in pool.names:
            worker = pool.take(name)
            pool.give_back(name, worker)
            kinds[name] = pool.wait_for(worker.call(_is_text_environment))
    finally:
        if not all(kinds.values()) or len(kinds) < len(pool.names):
            pool.close()
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"`environment_factory` mixes text environments and TRL tool environments: {kinds} (True: a "
            "`gymnasium.Env`). Use one kind in a run."
        )
    return pool if all(kinds.values()) else None


def _is_text_environment(env: Any) -> bool:
    if isinstance(env, gymnasium.Env):
        return True
    if looks_like_gymnasium(env):
        raise ValueError(f"`environment_factory` would make TRL tool environments: {how_to_wrap(env)}")
    step = getattr(env, "step", None)
    if callable(step) and not inspect.getdoc(step):
        raise ValueError(
            f"{type(env).__name__} has a `step` but is no `gymnasium.Env`, so that it would be one of TRL's tool environments, whose "
            "methods are tools and need docstrings. For text episodes derive it from `trl_epo.envs.TextEnv`: its `reset(*, "
            "seed=None, options=None)` gives `(observation, info)`, its `step(action)` `(observation, reward, terminated, "
            "truncated, info)`."
        )
    return False
