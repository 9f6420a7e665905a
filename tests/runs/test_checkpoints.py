"""Checkpoints that were cut in the middle, disks that are full, and what is read of a checkpoint."""

import json
import logging
import os
import pickle
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from faulty_runs import SETTINGS, make_trainer, same, start, weights
from trl import GRPOConfig, GRPOTrainer

from trl_epo.runs.checkpoints import (
    MANIFEST,
    begin_checkpoint,
    checkpoint_to_resume,
    finish_checkpoint,
    last_whole_checkpoint,
    rotate,
    what_is_missing,
)


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a checkpoint of each step."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), **SAVING)
    trainer.train()
    return trainer


@pytest.fixture
def run(whole, tmp_path):
    """A copy of its folder."""
    return Path(shutil.copytree(whole.args.output_dir, tmp_path / "run"))


def cut(folder: Path, how: str) -> str:
    """Damage a checkpoint; what is to be said of it."""
    if how == "unfinished":
        begin_checkpoint(folder)
        return "it was cut while it was being written"
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
        return "neither manifest.json nor trainer_state.json"
    if how == "no manifest, and half a state":
        (folder / MANIFEST).unlink()
        os.truncate(folder / "trainer_state.json", 100)
        return "its trainer_state.json cannot be read"
    if how == "half a manifest":
        os.truncate(folder / MANIFEST, 100)
        return "its manifest.json cannot be read"
    if how == "missing":
        (folder / "run_state" / "process_0.json").unlink()
        return "run_state/process_0.json is missing"
    os.truncate(folder / "model.safetensors", 1000)
    return r"model.safetensors has 1000 bytes instead of \d+"


WAYS = ["unfinished", "empty", "no manifest, and half a state", "half a manifest", "missing", "short"]


@pytest.mark.parametrize("how", WAYS)
def test_a_cut_checkpoint_is_passed_over(run, whole, how, caplog):
    reason = cut(run / "checkpoint-4", how)
    cut(run / "checkpoint-5", "short")
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(run) == str(run / "checkpoint-3")
    warnings = [record.getMessage() for record in caplog.records]
    assert [str(run / f"checkpoint-{step}") in warning for step, warning in zip((5, 4), warnings, strict=True)] == [
        True
    ] * 2
    with pytest.raises(ValueError, match=rf"checkpoint-4.*{reason}.*the last whole one beside it is .*checkpoint-3'"):
        checkpoint_to_resume(str(run / "checkpoint-4"), str(run))
    resumed = make_trainer(run, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, whole)
    assert last_whole_checkpoint(run) == str(run / "checkpoint-5")


def test_nothing_to_resume_from(run):
    for step in range(1, 6):
        cut(run / f"checkpoint-{step}", "unfinished")
    with pytest.raises(ValueError, match="no whole checkpoint in.*begin anew"):
        make_trainer(run).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there is no such folder"):
        make_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-9"))


def test_checkpoints_of_another_trainer(tmp_path, caplog):
    ours = ("environment_patience", "max_turns", "max_turn_length")
    settings = {name: value for name, value in SETTINGS.items() if name not in ours}
    trainer = GRPOTrainer(
        make_model(),
        reward_funcs=lambda completions, **kwargs: [float(len(c)) for c in completions],
        args=GRPOConfig(str(tmp_path), **{**settings, **SAVING, "max_steps": 2, "entropy_coef": 0.0}),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "Look."}]] * 8}),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "whether it is whole cannot be told" in caplog.text
    make_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_the_newest_is_of_the_training_that_began_last(tmp_path, caplog):
    for step, begun in ((7, 1.0), (3, 2.0), (2, 2.0), (8, None)):
        folder = tmp_path / f"checkpoint-{step}"
        begin_checkpoint(folder)
        if begun is not None:
            finish_checkpoint(folder, step, 1, begun)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert "checkpoint-8 is passed over: it was cut" in caplog.text  # whosever it was
    assert "checkpoint-7" not in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-7")


def test_a_training_that_began_anew_is_resumed_and_not_the_one_before(tmp_path):
    settings = {**SAVING, "lr_scheduler_type": "constant"}
    make_trainer(tmp_path, **{**settings, "max_steps": 4}).train()
    second, resumed = (make_trainer(tmp_path, **{**settings, "max_steps": steps}, seed=1) for steps in (2, 3))
    second.train()
    resumed.train(resume_from_checkpoint=True)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (second, resumed)]
    assert losses[1][:2] == losses[0] and len(losses[1]) == 3
    assert Path(last_whole_checkpoint(tmp_path)).name == "checkpoint-3"  # and not the first one's fourth


def test_rotation_spares_the_best_and_takes_cut_ones_first(tmp_path):
    for step in range(1, 6):
        folder = tmp_path / f"checkpoint-{step}"
        begin_checkpoint(folder)
        if step != 3:
            finish_checkpoint(folder, step, 1, begun=1.0)
        os.utime(folder, (step, step))
    left = lambda: sorted(int(path.name[-1]) for path in tmp_path.iterdir())  # noqa: E731
    rotate(tmp_path / "checkpoint-5", None, None)
    assert left() == [1, 2, 3, 4, 5]
    rotate(tmp_path / "checkpoint-5", 4, None)
    assert left() == [1, 2, 4, 5]
    rotate(tmp_path / "checkpoint-5", 2, str(tmp_path / "checkpoint-1"))
    assert left() == [1, 5]
    rotate(tmp_path / "checkpoint-5", 1, str(tmp_path / "checkpoint-1"))
    assert left() == [1, 5]


def test_processes_that_do_not_see_the_same_folder(tmp_path, tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    begin_checkpoint(tmp_path / "view0" / "checkpoint-5")
    finish_checkpoint(tmp_path / "view0" / "checkpoint-5", 5, 2, begun=1.0)
    process = start("views", tmp_path, processes=2)
    process.stdout.read()
    errors = (tmp_path / "stderr.txt").read_text()
    assert process.wait(60) == 0, errors[-3000:]
    assert "checkpoint-5 is passed over: it is not there on every process" in errors
    assert errors.count("--resume: there is no whole checkpoint in") == 1
    assert all("there is no whole checkpoint" in (tmp_path / f"refused{rank}").read_text() for rank in range(2))


def test_killed_while_writing_checkpoints(tmp_path):
    process = start("kills", tmp_path)
    *_, verdict, episodes = lines = process.stdout.read().splitlines()
    assert process.wait(60) == 0, (tmp_path / "stderr.txt").read_text()[-3000:]
    kills = [line for line in lines if line.startswith("killed")]
    assert len(kills) >= 3
    assert all(not line.endswith("None") for line in kills if "checkpoint-1'" not in line)
    assert (verdict, episodes) == ("same", "same episodes")


def test_full_disk(tmp_path):
    process = start("full_disk", tmp_path)
    output = process.stdout.read()
    errors = (tmp_path / "stderr.txt").read_text()
    assert process.wait(60) == 0, errors[-3000:]
    name, message, step = json.loads(output.splitlines()[-1])
    # The third checkpoint could be done without, the last could not.
    assert "checkpoint-3 could not be written" in errors and "Training goes on without it" in errors
    assert (name, step) == ("CheckpointError", 7)
    assert "checkpoint-7 could not be written" in message and "File too large" in message
    assert "The last whole one is" in message and "checkpoint-6" in message
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("moment", ["prepare_rows", "compute_loss", "save_extras", "prediction_step"])
def test_ctrl_c_and_on_in_the_same_process(tmp_path, whole, moment):
    rows = Dataset.from_dict({"length": [2, 3]})
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "dataset": rows}
    trainer = make_trainer(tmp_path, **SAVING, **evaluation)
    usual, calls = getattr(trainer, moment), count()

    def interrupted(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt  # the second in a notebook, which does not wait for the step's end
        return usual(*args, **kwargs)

    setattr(trainer, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert same(trainer, whole)
    evaluations = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2, 3, 4, 5]
    assert {entry["eval_episode/count"] for entry in evaluations} == {8.0}


def test_a_first_checkpoint_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoint-1").write_text("in its place")
    with pytest.raises(RuntimeError, match="checkpoint-1 could not be written.*The last whole one is None"):
        make_trainer(tmp_path, **SAVING).train()


def test_a_card_that_cannot_be_written_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
    def fail(path, facts):
        raise KeyError("what a card is made of")

    monkeypatch.setattr("trl_epo.reporting.complete_model_card", fail)
    trainer = make_trainer(tmp_path, **{**SAVING, "max_steps": 1})
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert what_is_missing(tmp_path / "checkpoint-1") is None
    assert "The model card could not be completed" in caplog.text


@pytest.mark.parametrize(
    "changed", [{"steps_per_generation": 4}, {"num_iterations": 1}, {"gradient_accumulation_steps": 2}]
)
def test_other_batches_begin_anew(run, changed, caplog):
    trainer = make_trainer(run, **{**SAVING, **changed})
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert "a new generation batch begins" in caplog.text
    assert next(iter(changed)) in caplog.text
    assert weights(trainer).isfinite().all()


def test_an_optimizer_of_other_weights(run):
    checkpoint = run / "checkpoint-3"
    state = torch.load(checkpoint / "optimizer.pt")
    state["param_groups"].append(state["param_groups"][0])  # as if there were a critic's
    torch.save(state, checkpoint / "optimizer.pt")
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-3 had other weights.*begin a new run with this folder as `model`"
    ):
        make_trainer(run, **SAVING).train(resume_from_checkpoint=str(checkpoint))


def test_a_second_run_of_a_trainer_begins_anew(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)  # of the four that a batch serves
    trainer.train()
    assert trainer.entropy_history.step == 0
    trainer.train()
    assert trainer.entropy_history.step == 0  # with a batch of its own


def test_a_complete_run_makes_no_further_step(tmp_path):
    # Trainer makes one when the last step was not the last of an epoch.
    kwargs = {**SAVING, "lr_scheduler_type": "constant"}
    first, again = make_trainer(tmp_path, **kwargs), make_trainer(tmp_path, **kwargs)
    first.train()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert same(again, first)


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_nothing_is_run_that_a_checkpoint_holds(run, tmp_path, name):
    checkpoint = run / "checkpoint-3"
    torch.save(Hostile(tmp_path / "trace"), checkpoint / name)
    finish_checkpoint(checkpoint, 3, 1, begun=1.0)
    trainer = make_trainer(run, **SAVING)
    if name == "training_args.bin":  # nobody reads it
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        with pytest.raises(pickle.UnpicklingError):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "trace").exists()
    torch.load(checkpoint / name, weights_only=False)
    assert (tmp_path / "trace").exists()  # it would have been


def test_the_kind_of_files(run):
    # Nothing of this package's own is a pickle.
    trainers = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    files = {path.name for path in (run / "checkpoint-3").rglob("*") if path.is_file()}
    assert {path for path in files if Path(path).suffix not in (".json", ".safetensors", ".md", ".jinja")} == trainers
    assert what_is_missing(run / "checkpoint-3") is None


def test_the_table_of_completions_goes_on(run, whole, capsys):
    resumed = make_trainer(run, log_completions=True, **{**SAVING, "max_steps": 4})
    again = make_trainer(run / "again", log_completions=True, **{**SAVING, "max_steps": 4})
    again.train()
    resumed.train(resume_from_checkpoint=str(run / "again" / "checkpoint-3"))
    assert list(resumed._logs["completion"]) == list(again._logs["completion"])
    assert len(resumed._logs["completion"]) == 8
    assert resumed._logs["rewards"] == again._logs["rewards"]
