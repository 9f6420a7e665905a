"""Ctrl-C in training: in a script, at a prompt, in a notebook's kernel, on two processes, and where it is none of ours."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import child_environment, wait_for
from datasets import Dataset
from faulty_runs import When, make_trainer, start, wait_for_step

from trl_epo.runs.checkpoints import last_whole_checkpoint
from trl_epo.runs.interruption import EndedByCtrlC, Interruption


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def usual_handler():
    """Python's own, also where the tests were started in a script's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def prompt(monkeypatch):
    """As at Python's prompt, in IPython and in notebooks."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)


def test_a_script_may_catch_it_as_either(tmp_path):
    trainer = make_trainer(tmp_path, When("on_step_end", 2, ctrl_c))
    with pytest.raises(KeyboardInterrupt) as ended:
        trainer.train()
    assert isinstance(ended.value, EndedByCtrlC) and isinstance(ended.value, SystemExit) and ended.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("event", ["on_step_begin", "on_evaluate", "on_save"])
def test_a_session_goes_on(tmp_path, prompt, event):
    rows = Dataset.from_dict({"length": [2, 3]})
    kwargs = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "dataset": rows}
    if event != "on_evaluate":
        kwargs = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, When(event, 2 - (event == "on_step_begin"), ctrl_c), **kwargs)
    with pytest.raises(KeyboardInterrupt) as ended:
        trainer.train()
    assert not isinstance(ended.value, SystemExit)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_second_one_ends_a_sessions_call_at_once(prompt):
    with pytest.raises(KeyboardInterrupt), Interruption() as noted:
        ctrl_c()
        assert noted.requested
        ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def endless():
    sum(range(10**15))  # in which Python runs no handler


@pytest.mark.parametrize(
    ("second", "busy"), [(signal.SIGINT, endless), (signal.SIGTERM, lambda: time.sleep(60))], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_second_signal_ends_a_script_at_once(second, busy):
    # SIGTERM: what torchrun makes of a second Ctrl-C. It is no echo of the first, however soon it comes.
    said, say = os.pipe()
    child = os.fork()
    if not child:
        try:
            with Interruption() as noted:
                os.write(say, b"R")
                wait_for(lambda: noted.requested)
                os.write(say, b"N")
                busy()
        finally:
            os._exit(1)
    os.close(say)
    for number in (signal.SIGINT, second):
        assert os.read(said, 1)  # ready, noted
        time.sleep(0.2)  # into what it is busy with
        os.kill(child, number)
    os.close(said)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -second


def test_an_echo_under_torchrun_is_not_a_second_one(monkeypatch):
    # The terminal signals all processes of its group, and torchrun its workers once more.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr(os, "getpgrp", os.getppid)
    with Interruption() as noted:
        ctrl_c()
        ctrl_c()
        assert noted.signal == signal.SIGINT


def test_a_fork_is_interrupted_by_its_own():
    said, say = os.pipe()
    with Interruption() as noted:
        child = os.fork()
        if not child:
            try:
                os.write(say, b"R")  # ready: at the very beginning Python forgets what signals a fork has had
                time.sleep(60)
            except KeyboardInterrupt:
                os._exit(7)
            finally:
                os._exit(0)
        os.close(say)
        assert os.read(said, 1) == b"R"
        os.kill(child, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert not noted.requested
    os.close(said)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "one's own"])
def test_another_handler_is_left_alone(tmp_path, handler):
    signal.signal(signal.SIGINT, handler)
    trainer = make_trainer(tmp_path, When("on_step_end", 1, ctrl_c), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_evaluation_by_itself_ends_at_once(tmp_path):
    trainer = make_trainer(tmp_path, dataset=Dataset.from_dict({"length": [2, 3]}), per_device_eval_batch_size=4)
    usual = trainer.prediction_step
    trainer.prediction_step = lambda *args, **kwargs: (ctrl_c(), usual(*args, **kwargs))
    with pytest.raises(KeyboardInterrupt) as ended:
        trainer.evaluate()
    assert not isinstance(ended.value, SystemExit)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_two_processes_stop_at_the_same_step(tmp_path):
    process = start("one", tmp_path, processes=2)
    wait_for_step(process, 3)
    (tmp_path / "go").touch()
    process.send_signal(signal.SIGINT)  # torchrun hands it on
    process.stdout.read()
    assert process.wait(60) != 0
    assert [(tmp_path / f"ctrl-c{rank}").read_text() for rank in range(2)] == ["3", "3"]
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


CELLS = """
import signal
from pathlib import Path
from faulty_runs import Steps, make_trainer
handler = signal.getsignal(signal.SIGINT)
trainer = make_trainer(Path({folder!r}))
trainer.add_callback(Steps(trainer))
---
trainer.train()
---
from trl_epo.runs.checkpoints import last_whole_checkpoint
print(last_whole_checkpoint({folder!r}), signal.getsignal(signal.SIGINT) is handler)
trainer.train(resume_from_checkpoint=True)
print("ended at", trainer.state.global_step)
"""


def test_a_notebooks_kernel(tmp_path):
    manager = pytest.importorskip("jupyter_client").KernelManager()
    pytest.importorskip("ipykernel")
    environment = child_environment(IPYTHONDIR=str(tmp_path / "ipython"), JUPYTER_RUNTIME_DIR=str(tmp_path))
    environment["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    (tmp_path / "go").touch()
    manager.start_kernel(env=environment)
    client = manager.client()
    client.start_channels()
    said = []

    def output(message):
        if message["msg_type"] == "stream":
            before = "".join(said)
            said.append(message["content"]["text"])
            if "step 3" in "".join(said) and "step 3" not in before:
                manager.interrupt_kernel()

    try:
        client.wait_for_ready(timeout=300)
        make, train, resume = CELLS.format(folder=str(tmp_path)).split("---")
        replies = [client.execute_interactive(cell, timeout=300, output_hook=output) for cell in (make, train, resume)]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    outcomes = [reply["content"].get("ename", reply["content"]["status"]) for reply in replies]
    assert outcomes == ["ok", "KeyboardInterrupt", "ok"], "".join(said)
    assert "Another Ctrl-C ends it at once" in "".join(said)
    assert f"{tmp_path / 'checkpoint-3'} True\n" in "".join(said)
    assert "ended at 7\n" in "".join(said), "".join(said)
