"""Episodes in trackers: tables of a few, and no tracker that ends a run."""

import json
import logging
from uuid import uuid4

import pytest
import wandb
from datasets import Dataset
from faulty_runs import make_trainer
from transformers.integrations import WandbCallback

from trl_epo.reports.trackers import COLUMNS, show_episodes


RUN = {"max_steps": 4, "per_device_eval_batch_size": 4, "dataset": Dataset.from_dict({"length": [2]})}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    yield
    wandb.finish()


def check_cells(cells: list) -> None:
    step, _, prompt, turns, success, total, stop_reason = cells
    assert step in (0, 4) and "You are at" in prompt and success in (True, False) and total == float(success)
    assert turns.startswith("[1] ") and "\n> " in turns and stop_reason in ("terminated", "max_turns")


def test_wandb(tmp_path):
    trainer = make_trainer(tmp_path, report_to="wandb", **RUN)
    trainer.train()
    trainer.evaluate()
    wandb.finish()
    for name in ("episodes", "eval_episodes"):
        (path,) = tmp_path.rglob(f"media/table/{name}_*.table.json")
        table = json.loads(path.read_text())
        assert table["columns"] == list(COLUMNS) and len(table["data"]) == 3
        for cells in table["data"]:
            check_cells(cells)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    trainer = make_trainer(tmp_path, report_to="tensorboard", **RUN)
    trainer.train()
    trainer.evaluate()
    texts = {}
    for file in tmp_path.rglob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["tensors"]:
            texts[tag] = [make_ndarray(event.tensor_proto)[0].decode() for event in events.Tensors(tag)]
    for name in ("episodes", "eval_episodes"):
        (text,) = texts[f"{name}/text_summary"]
        assert text.count("**, success ") == 3 and "    [1] " in text and "    > " in text


def test_trackio(tmp_path):
    trackio = pytest.importorskip("trackio")
    project = uuid4().hex  # Trackio has read where it writes long ago
    trainer = make_trainer(tmp_path, report_to="trackio", project=project, run_name="mine", **RUN)
    trainer.evaluate()  # before there is a run, and after it was ended
    trainer.train()
    trainer.evaluate()
    trackio.finish()
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs(project=project, run="mine")
    for name, number in (("episodes", 1), ("eval_episodes", 2)):
        tables = [entry[name] for entry in logs if name in entry]
        assert len(tables) == number
        for table in tables:
            assert len(table["_value"]) == 3
            for cells in table["_value"]:
                check_cells([cells[column] for column in COLUMNS])


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path, caplog, monkeypatch):
    trainer = make_trainer(tmp_path, report_to="wandb", **RUN)
    monkeypatch.setattr("wandb.Table", lambda **kwargs: 1 / 0)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    assert "Episodes could not be shown by WandbCallback: ZeroDivisionError" in caplog.text


def test_a_tracker_that_has_no_run(caplog):
    assert wandb.run is None
    row = {
        "turns": [],
        "first_observation": "",
        "task": None,
        "success": None,
        "return": 0.0,
        "stop_reason": "failure",
    }
    show_episodes([{"step": 0, **row}], "episodes", 0, [WandbCallback()])
    assert not caplog.messages
