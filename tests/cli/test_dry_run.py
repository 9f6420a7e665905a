"""`trl-epo train --dry-run`: what it shows, and that it leaves nothing behind."""

import doctest
import re
from pathlib import Path

import pytest

from trl_epo import cli
from trl_epo.cli import dry_run


SMALL = Path(__file__).parents[2] / "examples" / "configs" / "household-small.yaml"


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def flags(model_folder, output_dir, *more):
    few = ("--max_steps", "40", "--eval_steps", "1", "--eval_size", "6", "--max_turn_length", "4", "--max_turns", "3")
    batch = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--save_steps", "1")
    named = ("--config", str(SMALL), "--model_name_or_path", model_folder, "--output_dir", str(output_dir))
    return [*named, *few, *batch, *more]


@pytest.mark.parametrize("per_generation", [1, 2])
def test_one_batch_is_played_and_shown(tmp_path, model_folder, monkeypatch, capsys, caplog, per_generation):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "checkpoint-1" / "trainer_state.json").write_text("{}")
    before = files(tmp_path)
    more = ("--steps_per_generation", str(per_generation), "--report_to", "tensorboard", "--resume")
    cli.main(["train", "--dry-run", *flags(model_folder, run, *more)])
    shown = capsys.readouterr().out
    shown = shown[shown.index("An episode of 3 turns (success: ") :]
    assert "[system]\nYou act in a house by text commands" in shown  # in full
    assert "[user]\nYour task: " in shown
    assert shown.count("\n[assistant]") == 3
    number = r"[0-9.e+-]+"
    steps = "an optimizer step" if per_generation == 1 else "2 optimizer steps"
    for line in (
        rf"{4 * per_generation} episodes, {12 * per_generation} actions",
        rf"invalid actions    {number}%",
        r"success            0\.0%",
        rf"equal rewards      {number}% of the groups, which teach nothing",
        rf"cut turns          {number}%, in a thought 0\.0%",
        r"ended by           max_turns 100\.0%",
        rf"entropy            {number} nats",
        r"tokens an episode  \d+ on average, \d+ at most",
        rf"loss               {number}",
        rf"peak memory        {number} GiB, of this process",
        rf"time               {number} s for this batch and {steps} on it",
        rf"the whole run      about {number} (s|min|h) for 40 optimizer steps, without evaluations and checkpoints",
        f"Nothing was written to {run}.",
    ):
        assert re.search(f"^{line}$", shown, re.MULTILINE), line
    assert "of the actions were invalid" in caplog.text  # what is wrong with the run is said, too
    assert files(tmp_path) == before


def test_it_is_for_training(tmp_path, model_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--dry-run", *flags(model_folder, tmp_path)])
    assert stop.value.code == 2
    assert "`dry_run` is for `trl-epo train`" in capsys.readouterr().err


def test_examples_in_docstrings():
    assert doctest.testmod(dry_run).failed == 0
