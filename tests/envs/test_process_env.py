"""Environments in processes of their own: real processes, really killed."""

import gc
import os
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psutil
import pytest
from conftest import wait_for
from telling import Odd, Telling

from trl_epo import check_env
from trl_epo.envs import fork_server
from trl_epo.envs.base import EnvironmentDied
from trl_epo.envs.fork_server import PROCESS_NAME, SERVER_NAME
from trl_epo.envs.household import Household
from trl_epo.envs.process import ProcessEnv
from trl_epo.imitation import environment_expert
from trl_epo.rollouts.environment_pool import EnvironmentWorker


@pytest.fixture
def env():
    env = ProcessEnv(Telling)
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


def test_with_more_open_files_than_select_takes(env):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ProcessEnv(Telling)  # lets this process open more
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == max(soft, min(hard, 65_536))
    with ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))
        env.reset()
        process = env._process._pidfd
        assert process > 1023
        env.close()  # waits for its end


def test_its_expert_is_asked_there(env):
    there, here = ProcessEnv(Household), Household()
    there.reset(seed=3)
    here.reset(seed=3)
    assert there.expert_action() == here.expert_action()
    assert environment_expert(there)("", {}) == here.expert_action()
    there.close()
    assert not hasattr(env, "expert_action") and not hasattr(env, "expert_actions")


def test_a_process_of_its_own_that_ends_with_it(env):
    env.reset(seed=0)
    pid = env.step("r")[-1]["pid"]
    assert pid != os.getpid()
    assert psutil.pid_exists(pid)
    env.reset(seed=1)
    assert env.step("r")[-1]["pid"] == pid
    env.close()
    assert wait_for(lambda: not psutil.pid_exists(pid))
    env.close()  # a second time does nothing
    env.reset(seed=0)  # and it may be used again
    assert env.step("r")[-1]["pid"] != pid


def test_neither_process_nor_server_imports_torch(env):
    env.reset(seed=0)
    process = psutil.Process(env.step("r")[-1]["pid"])
    assert (process.name(), process.parent().name()) == (PROCESS_NAME, SERVER_NAME)
    assert max(process.memory_info().rss, process.parent().memory_info().rss) < 150 * 2**20


def test_a_killed_process_costs_its_episode(env):
    env.reset(seed=0)
    os.kill(env.step("r")[-1]["pid"], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="process died"):
        for _ in range(5):  # the pipe may take what is said to a dead process
            env.step("r")
    with pytest.raises(RuntimeError, match="call env.reset"):
        env.step("r")
    assert env.reset(seed=0)[0].startswith("You are")


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


def server_of(env):
    return psutil.Process(env.step("look")[-1]["pid"]).parent()


def test_a_killed_server_costs_the_episodes_of_its_processes(env):
    env.reset(seed=0)
    old = server_of(env)
    old.kill()
    with pytest.raises(EnvironmentDied):  # as soon as the kernel has ended it too
        wait_for(lambda: env.step("look") is None)
    env.reset(seed=0)
    assert server_of(env) != old


def test_a_server_that_hangs_is_replaced(env):
    playing = ProcessEnv(Telling)
    playing.reset(seed=0)
    server = server_of(playing)
    server.suspend()
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(env.reset, seed=0)
        assert wait_for(lambda: env._process is not None)
        env.interrupt()  # as the trainer does after `env_timeout`
        with pytest.raises(EnvironmentDied):
            start.result()
    env.reset(seed=0)
    assert server_of(env) != server
    assert server_of(playing) == server  # whose processes play on
    playing.close()
    del playing
    assert wait_for(lambda: not server.is_running())


def test_a_process_that_nobody_holds_any_more_ends():
    env = ProcessEnv(Telling)
    env.reset(seed=0)
    process = psutil.Process(env.step("look")[-1]["pid"])
    del env
    gc.collect()
    assert wait_for(lambda: not process.is_running())


def test_a_death_is_noticed_while_others_have_its_socket(env):
    """As when the environment itself forks."""
    env.reset(seed=0)
    forked = env.step("fork")[-1]["forked"]
    os.kill(env.step("look")[-1]["pid"], signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        answers = [pool.submit(env.step, "look") for _ in range(5)]
        in_time = wait_for(lambda: all(answer.done() for answer in answers), 60)
        os.kill(forked, signal.SIGKILL)
    assert in_time
    assert isinstance(answers[0].exception() or answers[1].exception(), EnvironmentDied)


def test_surroundings_are_those_of_now(env, tmp_path, monkeypatch):
    env.reset(seed=0)  # there is a server
    before = env.step("look")[-1]
    env.close()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EPO_TEST", "now")
    env.reset(seed=0)
    now = env.step("look")[-1]
    assert (now["folder"], now["variable"]) == (str(tmp_path), "now")
    assert before["variable"] is None
    assert before["draw"] != now["draw"]  # numpy's generator is not a copy of the server's


def test_without_a_server(env, monkeypatch):
    """As where the system has no safe fork."""
    monkeypatch.setattr(fork_server, "CAN_FORK", False)
    env.reset(seed=0)
    pid = env.step("look")[-1]["pid"]
    assert server_of(env).pid == os.getpid()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EnvironmentDied):
        for _ in range(5):
            env.step("look")
    env.reset(seed=0)
    process = psutil.Process(env.step("look")[-1]["pid"])
    env.close()
    assert not process.is_running()
