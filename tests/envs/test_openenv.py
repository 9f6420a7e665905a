"""OpenEnv: a real server on loopback, that raises, hangs, is killed and refuses sessions."""

import doctest
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count

import pytest
from conftest import PATIENT_RUN, make_model, wait_for

from trl_epo import EPOConfig, EPOTrainer, check_env
from trl_epo.envs import openenv
from trl_epo.envs.base import EnvironmentDied
from trl_epo.envs.openenv import OpenEnv, tasks, text_field
from trl_epo.rollouts.environment_pool import EnvironmentWorker


pytest.importorskip("openenv", reason='needs pip install "trl-epo[openenv]"')
import httpx
from openenv_servers import servers


FIRST = "Guess my number from 1 to 99."
CELLS, UNTOLD, SESSIONS = 1, 2, 40  # what the server's sessions make of it


@pytest.fixture(scope="module")
def start():
    with servers() as start:
        yield start


@pytest.fixture(scope="module")
def server(start):
    return start(SESSIONS)


@pytest.fixture
def session(server):
    made = []

    def make(url=server.url, **kwargs):
        made.append(OpenEnv(url, **kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


def number_of(seed):
    return str(random.Random(seed).randint(1, 99))


def plays(env):
    """Whether it plays an episode to its end."""
    return env.reset(options={"number": 3})[0] == FIRST and env.step("3")[2]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(openenv, "CONNECTING", 0.3)


def test_keeps_to_the_contract_and_leaves_nothing_behind(server, session):
    check_env(session(instructions="Guess a number from 1 to 99. For example: 50"))
    assert server.sessions() == 1
    env = session(success=1.0)
    assert env.reset(seed=0) == (FIRST, {"success": False, "invalid_action": False})
    assert env.step("0") == ("Higher.", 0.0, False, False, {"success": False, "invalid_action": False})
    assert env.step(number_of(0)) == ("Right!", 1.0, True, False, {"success": True, "invalid_action": False})
    with pytest.raises(RuntimeError, match="Call env.reset"):
        env.step("1")
    env.reset(seed=0, options={"number": 107})  # a row's columns are the server's arguments
    assert env.step("107")[1:3] == (1.0, True)
    assert server.sessions() == 2
    env.close()
    env.close()  # a second time does nothing
    assert wait_for(lambda: server.sessions() == 1)
    assert plays(env)  # and it may be used again


def test_actions_and_texts_of_ones_own(session):
    env = session(
        to_action=lambda text: {"text": str(int(text))},
        to_text=lambda fields: fields["text"].upper(),
        success=lambda result: result.done,
    )
    assert env.reset(options={"number": 5})[0] == FIRST.upper()
    refused = env.step("five")
    assert refused[0].startswith("This is no action: invalid literal for int()")
    assert refused[1:] == (0.0, False, False, {"success": False, "invalid_action": True})
    assert env.step(" 5")[-1] == {"success": True, "invalid_action": False}
    env = session(to_action=lambda text: {"words": text})  # no field of the server's
    env.reset()
    for _ in range(2):  # and the session goes on
        assert env.step("5")[-1] == {"invalid_action": True}


def test_fields(start, session, impatient):
    """The text's field is found where there is one; else an error names the fields, or that they are not told."""
    text, number, none = {"type": "string"}, {"type": "integer"}, {"type": "null"}
    assert text_field({"properties": {"say": text, "metadata": text}}) == "say"
    assert text_field({"properties": {"say": {"anyOf": [text, none]}, "times": number}}) == "say"
    assert text_field({"properties": {"say": text, "why": text}, "required": ["say"]}) == "say"
    assert text_field({"properties": {"say": text, "why": text}}) is None
    assert text_field({"properties": {"say": text, "times": number}, "required": ["say", "times"]}) is None
    assert text_field({"properties": {"times": number}, "required": ["times"]}) is None
    assert text_field({"properties": {"kind": {**text, "const": "look"}}, "required": ["kind"]}) is None
    assert doctest.testmod(openenv).failed == 0
    cells = start(CELLS)
    with pytest.raises(ValueError, match=r"row \(integer\), column \(integer\).*to_action=lambda text"):
        session(cells.url).reset()
    assert wait_for(lambda: cells.sessions() == 0)
    env = session(cells.url, to_action=lambda text: dict(zip(("row", "column"), map(int, text.split()), strict=True)))
    env.reset()
    assert env.step("2 3")[0] == "At 2, 3."
    assert env.step("2")[-1]["invalid_action"]  # `zip` raises a ValueError
    with pytest.raises(ValueError, match=r"/schema does not tell.*404.*to_action=lambda text"):
        session(start(UNTOLD).url).reset()
    with pytest.raises(ValueError, match="url='localhost:8000'.*http"):
        OpenEnv("localhost:8000")


def test_rows():
    train, iid = tasks("train", 50), tasks("iid", 50)
    assert len({*train["seed"], *iid["seed"]}) == 100
    assert tasks("train", 50)["seed"] == train["seed"] != tasks("train", 50, seed=1)["seed"]
    with pytest.raises(ValueError, match="'ood'.*'train' or 'iid'"):
        tasks("ood", 5)


def test_one_that_raises(server, session):
    env = session()
    env.reset(seed=1)
    with pytest.raises(RuntimeError, match="the dice are lost"):
        env.step("raise")
    with pytest.raises(RuntimeError, match="Call env.reset"):
        env.step("1")
    assert plays(env)


def test_one_that_hangs_is_given_up_and_frees_its_session(start):
    server = start(SESSIONS)
    worker = EnvironmentWorker(lambda: OpenEnv(server.url))
    assert worker.reset(0, {}).result(60)
    answer = worker.step("hang")
    assert not wait_for(answer.done, 0.5)
    worker.close()
    worker.join(60)
    assert not worker.is_alive
    assert isinstance(answer.exception(60), EnvironmentDied)
    httpx.get(f"{server.url}/free")  # else the server's own thread hangs on
    assert wait_for(lambda: server.sessions() == 0)


def test_a_killed_server_costs_the_episode(start, session, impatient):
    server = start(3)
    env, other = session(server.url), session(server.url)
    for each in (env, other):
        each.reset(options={"number": 4})
    server.kill()
    with pytest.raises(EnvironmentDied, match=f"connection to {server.url} has ended"):
        env.step("4")
    with pytest.raises(EnvironmentDied, match=f"no connection to {server.url}"):
        env.reset()
    again = start(3, server.port)
    with pytest.raises(EnvironmentDied):  # a server that knows nothing of the episode is no server for it
        other.step("4")
    assert plays(env)
    again.kill()
    assert start(3, server.port).sessions() == 0
    assert plays(env)  # between episodes a lost session is made anew


def test_a_full_server(start, session, monkeypatch):
    server = start(CELLS)
    cell = {"to_action": lambda text: {"row": 0, "column": 0}}
    first, second = session(server.url, **cell), session(server.url, **cell)
    first.reset()
    with monkeypatch.context() as impatient:
        impatient.setattr(openenv, "CONNECTING", 0.3)
        with pytest.raises(RuntimeError, match=r"no session.*max_concurrent_envs.*max_concurrent_episodes"):
            second.reset()
    monkeypatch.setattr(openenv, "CONNECTING", 120.0)
    with ThreadPoolExecutor(1) as thread:
        waits = thread.submit(second.reset)
        assert not wait_for(waits.done, 0.5)
        first.close()
        assert waits.result(120)
    assert server.sessions() == 1


def test_32_sessions_in_training_of_which_one_raises(start, tmp_path, tokenizer):
    server = start(SESSIONS)
    before = threading.active_count()
    numbers = count()
    trainer = EPOTrainer(
        make_model(),
        args=EPOConfig(
            str(tmp_path),
            **PATIENT_RUN,
            per_device_train_batch_size=32,
            num_generations=4,
            max_turns=3,
            max_turn_length=4,
            max_steps=1,
        ),
        train_dataset=tasks("train", 8),
        processing_class=tokenizer,
        environment_factory=partial(OpenEnv, server.url, success=1.0, instructions="Guess!"),
        action_parser=lambda text: "raise" if next(numbers) == 40 else text or "50",
    )
    most = []
    play = trainer.player.play

    def watched(*args):
        batch = play(*args)
        most.append(server.sessions())
        return batch

    trainer.player.play = watched
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "faults/crash" in entry)
    assert entry["faults/crash"] == entry["faults/retried"] == 1
    assert entry["episode/stop/failure"] == 0.0
    assert entry["episode/success_rate"] >= 0.0
    assert most[0] >= 32
    trainer.player.environments.close()
    assert wait_for(lambda: server.sessions() == 0)
    assert wait_for(lambda: threading.active_count() <= before + 1)  # the event loop's, if it is the first
