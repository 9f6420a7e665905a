"""
Pushes that fail, and completions that are pushed in the background: a Hub on the loopback address that refuses, and
processes that train.
"""

import faulthandler
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import Corridor, make_model, make_tokenizer
from datasets import Dataset
from faulty_runs import SETTINGS, say
from hub_server import DROP, Hub
from peft import LoraConfig

from trl_epo import EPOConfig, EPOTrainer, cli
from trl_epo.runs import PushError


STEPS = 2
PUSH = {**SETTINGS, "max_steps": STEPS, "push_to_hub": True}
# What becomes of the commits to a repository of this name
FAULTS = {"refused": 401, "broken": 500, "dropped": DROP}


def make_trainer(folder: Path, **settings) -> EPOTrainer:
    return EPOTrainer(
        str(folder.parent / "base"),
        args=EPOConfig(str(folder), **{**PUSH, **settings}),
        processing_class=make_tokenizer(),
        environment_factory=Corridor,
    )


def failing(folder: Path) -> None:
    """Runs whose pushes fail; tell what the calls that push have raised."""
    told = {}
    for name in FAULTS:
        trainer = make_trainer(folder / name, hub_strategy="every_save", save_strategy="steps", save_steps=1)
        trainer.train()
        (folder / name / "model.safetensors").unlink()
        trainer.save_model()
        try:
            trainer.push_to_hub()
        except PushError as error:
            told[name] = str(error)

    # A repository that may not be made: before training, and after it
    try:
        make_trainer(folder / "forbidden")
    except PushError as error:
        told["forbidden"] = str(error)
    trainer = make_trainer(folder / "forbidden", push_to_hub=False)
    trainer.train()
    try:
        trainer.push_to_hub()
    except PushError:
        told["saved"] = (folder / "forbidden" / "model.safetensors").exists()

    # An adapter that nobody else can load
    EPOTrainer(
        str(folder / "base"),
        args=EPOConfig(str(folder / "adapter"), **PUSH),
        environment_factory=Corridor,
        peft_config=LoraConfig(r=2),
    )

    # The first upload of its weights is dropped once
    make_trainer(folder / "resent").push_to_hub()

    # Completions that cannot be uploaded
    make_trainer(
        folder / "told", push_to_hub=False, log_completions=True, log_completions_hub_repo="someone/lost"
    ).train()
    say(json.dumps(told))


def from_the_command_line(folder: Path) -> None:
    settings = {
        **PUSH,
        "environment": "conftest:Corridor",
        "model_name_or_path": folder / "base",
        "output_dir": folder / "refused",
    }
    cli.main(["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])


def completions(folder: Path) -> None:
    """Completions of a training, and of an evaluation after it; then Python ends."""
    trainer = EPOTrainer(
        str(folder / "base"),
        args=EPOConfig(
            str(folder / "run"),
            **{**PUSH, "push_to_hub": False, "hub_private_repo": True},
            log_completions=True,
            log_completions_hub_repo="someone/logs",
        ),
        eval_dataset=Dataset.from_dict({"length": [3], "seed": [2]}),
        environment_factory=Corridor,
    )
    trainer.train()
    last = folder / "run" / "completions" / f"completions_{STEPS:05d}.parquet"
    (folder / "trained.parquet").write_bytes(last.read_bytes())
    trainer.evaluate()


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path


def fault(method: str, path: str) -> int | None:
    if method == "POST" and "/commit/" in path:
        return next((status for name, status in FAULTS.items() if f"/{name}/" in path), None)
    return None


def test_they_cost_no_run(folder):
    dropped = []

    def on_request(method, path):
        if method == "PUT" and "someone/resent" in hub.repositories and not dropped:
            return dropped.append(path) or DROP
        if "/lost/commit/" in path and len(hub.repositories["datasets/someone/lost"].commits) > 1:  # after the card
            return 503
        return fault(method, path)

    with Hub() as hub:
        hub.on_request = on_request
        hub.forbidden = {"someone/forbidden"}
        result = hub.call(__file__, "failing", folder, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        told, log = json.loads(result.stdout.splitlines()[-1]), result.stderr
        causes = {"refused": "401", "broken": "500", "dropped": "disconnected"}
        for name, cause in causes.items():
            assert len(hub.repositories[f"someone/{name}"].commits) == 1  # the one that made it
            for file in ("model.safetensors", "README.md", f"checkpoint-{STEPS}/manifest.json"):
                assert (folder / name / file).exists(), file
            assert f"The push to someone/{name} failed: " in log  # of `save_model`
            assert cause in told[name] and f"`hf upload someone/{name} {folder / name} . --exclude" in told[name]
        assert log.count("A push to the Hub failed, so what it was to bring is not there") == len(causes) * STEPS
        assert "The repository 'forbidden' (`hub_model_id`) could not be made on the Hub: " in told["forbidden"]
        assert "`hf auth login`" in told["forbidden"]
        assert told["saved"] is True
        assert f"the base model of the adapter is the folder {folder / 'base'}" in log
        assert dropped and "model.safetensors" in hub.files("someone/resent")
        assert "Completions could not be pushed to someone/lost: " in log and "503" in log


def test_the_command_line_says_so_in_one_line(folder):
    with Hub() as hub:
        hub.on_request = fault
        result = hub.call(__file__, "from_the_command_line", folder, check=False)
    assert result.returncode == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("trl-epo train: error: The push to someone/refused failed: ") and "401" in line
    for file in ("model.safetensors", "README.md", "trainer_state.json", "trl_epo.json"):
        assert (folder / "refused" / file).exists(), file


def test_no_completion_is_lost(folder):
    with Hub() as hub:
        result = hub.call(__file__, "completions", folder, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        assert hub.unknown == []
        assert hub.repositories["datasets/someone/logs"].private
        commits = hub.repositories["datasets/someone/logs"].commits
        files = hub.files("datasets/someone/logs")
    local = {path.name: path.read_bytes() for path in (folder / "run" / "completions").iterdir()}
    assert {name: content for name, content in files.items() if name.endswith(".parquet")} == local
    last = f"completions_{STEPS:05d}.parquet"
    assert (folder / "trained.parquet").read_bytes() in [commit.files.get(last) for commit in commits]
    table = pq.read_table(folder / "run" / "completions" / last)
    assert {"step", "prompt", "completion", "episode_return", "advantage"} <= set(table.column_names)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(600, exit=True)  # rather than hang
    globals()[sys.argv[1]](Path(sys.argv[2]))
