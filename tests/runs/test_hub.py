"""
Pushes to the Hub, and what lies there: a Hub on the loopback address, a process that trains and pushes, another one that
plays, downloads and resumes.
"""

import faulthandler
import json
import re
import signal
import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import Corridor, make_model, make_tokenizer
from faulty_runs import SETTINGS, When, weights
from hub_server import Hub
from huggingface_hub import snapshot_download
from peft import LoraConfig

from trl_epo import EPOConfig, EPOTrainer, cli
from trl_epo.play import play
from trl_epo.runs.checkpoints import MANIFEST, what_is_missing


SECRET = "hf_of_someone_else"


class Breaking(Corridor):
    """Its first step raises, and leaves a line in failures.jsonl."""

    broken = False

    def step(self, action):
        if not Breaking.broken:
            Breaking.broken = True
            raise OSError(f"cannot read {__file__}")
        return super().step(action)


class HubTrainer(EPOTrainer):
    """
    Waits for a push that has begun before its checkpoint is whole, as if that took the time that large files take. What
    comes last in the checkpoint of the step `unwritable` cannot be written.
    """

    unwritable = None

    def save_extras(self, checkpoint):
        self._finish_current_push()
        super().save_extras(checkpoint)
        if self.state.global_step == self.unwritable:
            raise OSError("no room")


def make_trainer(folder: Path, base: Path, lora: bool, *callbacks, factory=Corridor, **kwargs) -> HubTrainer:
    # From a folder, as a new user has it: what is pushed must not tell of it.
    return HubTrainer(
        str(base),
        args=EPOConfig(str(folder), **{**SETTINGS, "max_steps": 5, "report_to": "none", **kwargs}),
        processing_class=make_tokenizer(),
        environment_factory=factory,
        callbacks=list(callbacks),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )


def train(folder: Path) -> None:
    """Runs with each `hub_strategy`; the weights of those that others must come to are left in files."""
    base = folder / "base"
    push = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "hub_private_repo": True}

    whole = make_trainer(folder / "whole", base, lora=False)
    whole.train()
    torch.save(weights(whole), folder / "full.pt")
    terminates = When("on_step_end", 3, partial(signal.raise_signal, signal.SIGTERM))
    stopped = make_trainer(folder / "full", base, False, terminates, hub_strategy="checkpoint", **push)
    try:
        stopped.train()
    except SystemExit:
        (folder / "pushed").write_text(json.dumps([job.done() for job in stopped.push_in_progress.jobs]))

    lora = make_trainer(folder / "lora", base, True, hub_strategy="all_checkpoints", hub_always_push=True, **push)
    lora.unwritable = 2
    lora.train()
    torch.save(weights(lora), folder / "lora.pt")
    lora.push_to_hub(dataset_name="corridor")

    push |= {"save_steps": 2, "hub_token": SECRET, "max_steps": 2, "factory": Breaking, "log_completions": True}
    for strategy in ("every_save", "end"):
        Breaking.broken = False
        trainer = make_trainer(folder / strategy, base, False, hub_strategy=strategy, **push)
        trainer.train()
        assert (folder / strategy / "episodes" / "failures.jsonl").exists()
        (folder / strategy / "viewer.html").touch()
        trainer.save_model()
        trainer.save_state()
        trainer.push_to_hub()

    flags = {
        **SETTINGS,
        **push,
        "environment": "test_hub:Breaking",
        "model_name_or_path": base,
        "output_dir": folder / "cli",
    }
    del flags["factory"]
    cli.main(["train", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])


def play_and_resume(folder: Path) -> None:
    """Play what the runs have pushed, by its name, then download it and train on from it."""
    args = EPOConfig("play", **SETTINGS)
    for name in ("full", "lora", "every_save", "end"):
        lines: list[str] = []
        play(f"someone/{name}", Corridor, {"length": 3, "seed": 2}, args, show=lines.append)
        (folder / f"{name}.txt").write_text("\n".join(lines))
    with redirect_stdout(StringIO()) as out:
        cli.main(["play", "someone/cli", "--environment", "test_hub:Breaking"])
    (folder / "cli.txt").write_text(out.getvalue())
    for name, place in (("full", "last-checkpoint"), ("lora", "checkpoint-3")):
        downloaded = snapshot_download(f"someone/{name}", local_dir=folder / name)
        trainer = make_trainer(folder / name, folder / "base", name == "lora")
        trainer.train(resume_from_checkpoint=str(Path(downloaded, place)))
        torch.save(weights(trainer), folder / f"{name}.pt")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, tokenizer):
    """The Hub after `train`, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("train")
    make_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    def refuse(commit):
        if commit.message == "Training in progress, step 4, checkpoint":  # the second run's: the first ends before
            raise RuntimeError("no room here")

    with Hub() as hub:
        hub.on_commit = refuse
        hub.errors = hub.call(__file__, "train", folder).stderr
        yield hub, folder


def test_it_speaks_all_that_is_asked(pushed):
    hub, _ = pushed
    assert hub.unknown == []
    assert sorted(hub.repositories) == [f"someone/{name}" for name in ("cli", "end", "every_save", "full", "lora")]
    assert all(repository.private for repository in hub.repositories.values())


def test_what_is_pushed_plays_and_resumes_bit_by_bit(pushed, tmp_path):
    hub, folder = pushed
    (tmp_path / "base").symlink_to(folder / "base")
    hub.call(__file__, "play_and_resume", tmp_path)
    for name in ("cli", "end", "every_save", "full", "lora"):
        played = (tmp_path / f"{name}.txt").read_text()
        assert "The door is at 3." in played and re.search(r"uccess after \d turns? \(", played), played
    for name in ("full", "lora"):
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), torch.load(folder / f"{name}.pt")), name


def test_pushed_checkpoints_are_whole(pushed, tmp_path):
    hub, folder = pushed
    # Each run ends with its last one
    assert hub.messages("someone/lora")[-2:] == ["Training in progress, step 5, checkpoint", "End of training"]
    assert b"### EPO" in hub.files("someone/lora")["checkpoint-5/README.md"]
    # The run ended by SIGTERM when its last checkpoint lay on the Hub.
    assert json.loads((folder / "pushed").read_text()) == [True, True]
    assert json.loads(hub.files("someone/full")[f"last-checkpoint/{MANIFEST}"])["step"] == 3
    assert hub.messages("someone/full")[-2:] == [
        "Training in progress, step 3",
        "Training in progress, step 3, checkpoint",
    ]
    # Every commit, not only the last: what has come to be there at any time could be resumed from.
    seen = set()
    for name in ("full", "lora"):
        for commit in hub.repositories[f"someone/{name}"].commits:
            places = {path.split("/")[0] for path in commit.files if "checkpoint" in path.split("/")[0]}
            for place in places:
                where = tmp_path / commit.oid / place
                for path, content in commit.files.items():
                    if path.startswith(f"{place}/"):
                        (tmp_path / commit.oid / path).parent.mkdir(parents=True, exist_ok=True)
                        (tmp_path / commit.oid / path).write_bytes(content)
                assert (where / MANIFEST).exists() and what_is_missing(where) is None
            seen |= {(name, place) for place in places}
    # The second was given up, and the Hub did not take the fourth.
    assert "checkpoint-2 could not be written" in hub.errors
    assert "A push to the Hub failed" in hub.errors and "no room here" in hub.errors
    assert seen == {("full", "last-checkpoint"), *(("lora", f"checkpoint-{step}") for step in (1, 3, 5))}


def test_what_is_pushed_tells_nothing_of_the_machine(pushed):
    hub, folder = pushed
    told = {}
    for name, repository in hub.repositories.items():
        for path, content in [
            (path, content) for commit in repository.commits for path, content in commit.files.items()
        ]:
            assert SECRET.encode() not in content, path
            assert not path.startswith("episodes/") and "training_args.bin" not in path
            if str(folder).encode() in content or str(Path(__file__).parent).encode() in content:
                told.setdefault(name, set()).add(path.split("/")[-1])
    # An adapter must say what it is an adapter of, which here is a folder.
    assert told == {"someone/lora": {"adapter_config.json"}}


@pytest.mark.parametrize("name", ["cli", "end", "every_save", "full", "lora"])
def test_model_and_card_are_there(pushed, name):
    hub, _ = pushed
    files = hub.files(f"someone/{name}")
    assert "adapter_model.safetensors" in files if name == "lora" else "model.safetensors" in files
    assert b"### EPO" in files["README.md"] and b"None" not in files["README.md"]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(600, exit=True)  # rather than hang
    globals()[sys.argv[1]](Path(sys.argv[2]))
