"""SIGTERM, and Ctrl-C in a script: a checkpoint at the next boundary between steps, an exit like a terminated process, and no trace after a resume."""

import json
import logging
import os
import signal
import threading
import time

import pytest
import torch
from conftest import wait_for
from datasets import Dataset
from faulty_runs import When, make_trainer, same, start, wait_for_step, weights

from trl_epo.runs import interruption
from trl_epo.runs.checkpoints import last_whole_checkpoint


ROWS = Dataset.from_dict({"length": [2, 3, 4, 5]})


def terminate():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_checkpoint_exit_and_resume(tmp_path, number, name, code):
    process = start("one", tmp_path)
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    wait_for_step(process, 3)
    process.send_signal(number)
    assert wait_for(lambda: f"{name}: writing a checkpoint" in (tmp_path / "stderr.txt").read_text())
    if number == signal.SIGTERM:
        process.send_signal(number)  # as a scheduler and torchrun do, each for itself
    (tmp_path / "go").touch()
    output = process.stdout.read()
    assert process.wait(60) == code
    assert (tmp_path / "finally0").exists() and (tmp_path / "atexit0").exists()
    assert (tmp_path / "ctrl-c0").exists() == (number == signal.SIGINT)
    assert "step 4" not in output
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    errors = (tmp_path / "stderr.txt").read_text()
    assert f"Ended by {name} after step 3" in errors and "Traceback" not in errors

    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, whole)


def test_two_processes_do_the_same(tmp_path, caplog):
    process = start("two", tmp_path, processes=2)
    wait_for_step(process, 3)
    (tmp_path / "last" / "go").touch()
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    process.stdout.read()
    assert process.wait(60) != 0
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert (first["code"], first["checkpoint"]) == (143, str(tmp_path / "stopped" / "checkpoint-3"))
    assert first["same"]
    assert first["same episodes"]
    rows = first["kept"]["train/step-000000.parquet"]
    assert len(rows) == 6 and {row["row"] // 8 for row in rows} == {0, 1}  # of both processes
    assert all(turn["entropies"] for row in rows for turn in row["turns"])
    assert first["nonfinite"] == [0, 1, 2, 2, 2]  # on one of them
    assert (tmp_path / "last" / "atexit0").exists() and (tmp_path / "last" / "atexit1").exists()
    # With fewer processes a new generation batch begins.
    alone = make_trainer(tmp_path / "last", num_generations=8)
    with caplog.at_level(logging.WARNING):
        alone.train(resume_from_checkpoint=True)
    assert "world_size 2 -> 1" in caplog.text
    assert alone.state.global_step == 7


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_evaluate", "on_save"])
def test_it_comes_at_any_moment(tmp_path, event):
    kwargs = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "dataset": ROWS}
    if event != "on_evaluate":
        kwargs = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, When(event, 2 - (event == "on_step_begin"), terminate), **kwargs)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        trainer.train()
    assert exit.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.state.global_step == 2  # no step more
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_whole_checkpoint_is_not_written_again(tmp_path):
    manifest = tmp_path / "checkpoint-4" / "manifest.json"
    written = []

    def act():
        written.append(manifest.stat().st_mtime_ns)
        terminate()

    trainer = make_trainer(tmp_path, When("on_epoch_end", 4, act), save_strategy="steps", save_steps=2)
    with pytest.raises(SystemExit):
        trainer.train()
    assert written == [manifest.stat().st_mtime_ns]


def test_the_last_checkpoint_is_kept_beside_the_best(tmp_path):
    # Trainer deletes all but the best at the end of a run with these settings; an interrupted one is not at its end.
    trainer = make_trainer(
        tmp_path, When("on_step_end", 3, terminate), eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="episode/count",
        per_device_eval_batch_size=4, dataset=ROWS,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_second_one_ends_it_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "SAME_REQUEST", 0.0)
    said, say = os.pipe()
    child = os.fork()
    if not child:
        try:
            with interruption.Interruption() as noted:
                os.write(say, b"R")
                wait_for(lambda: noted.requested)
                os.write(say, b"N")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(say)
    for expected in (b"R", b"N"):  # ready, noted
        assert os.read(said, 1) == expected
        os.kill(child, signal.SIGTERM)
    os.close(said)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_fork_ends_by_its_own():
    said, say = os.pipe()
    with interruption.Interruption() as noted:
        child = os.fork()
        if not child:
            try:
                os.write(say, b"R")  # ready: at the very beginning Python forgets what signals a fork has had
                time.sleep(60)
            finally:
                os._exit(0)
        os.close(say)
        assert os.read(said, 1) == b"R"
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not noted.requested
    os.close(said)


def test_training_in_a_thread(tmp_path):
    # A notebook may do so; Python allows handlers in the main thread only.
    trainer = make_trainer(tmp_path, max_steps=1)
    before = weights(trainer)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(300)
    assert not torch.equal(weights(trainer), before)
