"""Environments in processes of their own: real processes, really killed."""

import os
import signal
import threading

import psutil
import pytest
from conftest import Corridor

from trl_epo import check_env
from trl_epo.envs.base import EnvironmentDied
from trl_epo.envs.household import Household
from trl_epo.envs.process import ProcessEnv
from trl_epo.rollouts.environment_pool import EnvironmentWorker


class Telling(Corridor):
    """Tells about its process."""

    def step(self, action):
        *answer, info = super().step(action)
        return *answer, {**info, "pid": os.getpid()}


@pytest.fixture
def env():
    env = ProcessEnv(lambda: Telling(length=99))
    yield env
    env.close()


def test_keeps_to_the_contract():
    env = ProcessEnv(Household)
    check_env(env)
    env.close()


def test_plays_as_in_one_process():
    there, here = ProcessEnv(lambda: Household(turns=5)), Household(turns=5)
    for seed in (1, 2):
        assert there.reset(seed=seed) == here.reset(seed=seed)
        for action in ("look", "open fridge", "nonsense", "look", "look"):
            assert there.step(action) == here.step(action)
    there.close()


def test_a_process_of_its_own_that_ends_with_it(env):
    env.reset(seed=0)
    pid = env.step("r")[-1]["pid"]
    assert pid != os.getpid()
    assert psutil.pid_exists(pid)
    env.reset(seed=1)
    assert env.step("r")[-1]["pid"] == pid
    env.close()
    assert not psutil.pid_exists(pid)
    env.close()  # a second time does nothing
    env.reset(seed=0)  # and it may be used again
    assert env.step("r")[-1]["pid"] != pid


def test_the_process_does_not_import_torch():
    env = ProcessEnv(Household)
    before = psutil.Process().children()
    env.reset(seed=0)
    started = set(psutil.Process().children()).difference(before)
    (worker,) = [child for child in started if "LokyProcess" in " ".join(child.cmdline())]
    assert worker.memory_info().rss < 150 * 2**20
    env.close()


def test_a_killed_process_costs_its_episode(env):
    env.reset(seed=0)
    os.kill(env.step("r")[-1]["pid"], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="process died"):
        for _ in range(5):  # the pipe may take what is said to a dead process
            env.step("r")
    with pytest.raises(RuntimeError, match="call env.reset"):
        env.step("r")
    assert env.reset(seed=0)[0].startswith("You are at")


def test_a_schedulers_sigterm_to_every_process_is_not_for_it(env):
    env.reset(seed=0)
    pid = env.step("l")[-1]["pid"]
    os.kill(pid, signal.SIGTERM)
    assert env.step("l")[-1]["pid"] == pid


def test_one_that_is_given_up_before_it_has_started():
    worker = EnvironmentWorker(lambda: ProcessEnv(lambda: threading.Event().wait()))
    worker.reset(0, {})
    worker.close()  # there is no process to kill yet
    worker.join(30)
    assert not worker.is_alive


def test_one_that_is_interrupted_before_it_has_started(env):
    env.interrupt()
    with pytest.raises(EnvironmentDied):
        env.reset(seed=0)
    assert env.reset(seed=0)


def test_an_exception_is_the_environments_own():
    env = ProcessEnv(Household)
    with pytest.raises(ValueError, match="Unknown options"):
        env.reset(options={"nonsense": 1})
    assert env.reset(seed=0)
    env.close()


class TwoArguments(Exception):
    """As many exceptions are: pickled with the arguments of `Exception`, which are not its own."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


class NoNumber:
    def __reduce__(self):
        return int, ("no number",)


class Odd(Corridor):
    """What it raises and answers cannot be unpickled."""

    def step(self, action):
        if action == "raise":
            raise TwoArguments(7, "no more ink")
        if action == "answer":
            return "", 0.0, False, False, {"place": NoNumber()}
        return "", 0.0, False, False, {"pid": os.getpid()}


def test_what_cannot_be_unpickled_is_not_taken_for_a_dead_process():
    env = ProcessEnv(Odd)
    env.reset(seed=0)
    pid = env.step("look")[-1]["pid"]
    with pytest.raises(RuntimeError, match="TwoArguments: 7: no more ink"):
        env.step("raise")
    with pytest.raises(ValueError, match="no number"):
        env.step("answer")
    assert env.step("look")[-1]["pid"] == pid
    env.close()


def test_in_a_forked_child():
    env = ProcessEnv(Household)
    env.reset(seed=0)
    child = os.fork()
    if not child:
        try:
            signal.alarm(120)
            other = ProcessEnv(Household)
            other.reset(seed=0)
            other.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert env.step("look")
    env.close()
