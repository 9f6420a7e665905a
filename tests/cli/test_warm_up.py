"""`trl-epo warm-up` and `trl-epo play`, as they are run, in processes of their own or in this one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENT_RUN, child_environment, make_model
from safetensors.torch import load_file

from trl_epo import EPOConfig, EPOTrainer, cli
from trl_epo.envs.household import Household


SMALL = Path(__file__).parents[2] / "examples" / "configs" / "household-small.yaml"
SHORT = ("--config", str(SMALL), "--train_size", "6", "--eval_size", "2", "--max_turn_length", "8")


def main(capsys, *arguments):
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments, code=2):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == code
    return capsys.readouterr().err.splitlines()[-1]


class TestWarmUp:
    def test_a_warm_model_that_plays_in_a_fresh_process(self, tmp_path, model_folder, capsys):
        flags = (*SHORT, "--model_name_or_path", model_folder, "--output_dir", tmp_path)
        more = ("--noise", "0.2", "--until_success", "1.0", "--warm_up_learning_rate", "0.01")
        out = main(capsys, "warm-up", *flags, *more, "--max_turn_length", "40")
        assert re.findall(r"eval iid at step (\d)", out) == ["0", "2"]  # of the warm-up
        assert re.search(r"6 episodes were imitated. Success on the evaluation sets: [\d.]+%. The model is in", out)
        warm, cold = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path, model_folder))
        assert not torch.equal(warm["model.norm.weight"], cold["model.norm.weight"])
        settings = json.loads((tmp_path / "trl_epo.json").read_text())
        assert (settings["environment"], settings["max_turns"], settings["bf16"]) == ("household", 12, False)
        played = subprocess.run(
            [sys.executable, "-m", "trl_epo", "play", str(tmp_path), "--row", "1", "--split", "ood", "--seed", "3"],
            env=child_environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert played.returncode == 0, played.stderr[-3000:]
        assert "Your task:" in played.stdout
        assert re.search(r"uccess after 12 turns \(\w+\); return 0\.", played.stdout)

    def test_an_adapter(self, tmp_path, model_folder, capsys):
        flags = (*SHORT, "--model_name_or_path", model_folder, "--output_dir", tmp_path, "--use_peft", "true")
        main(capsys, "warm-up", *flags, "--max_turn_length", "40", "--context", "window")
        assert (tmp_path / "adapter_model.safetensors").exists()
        out = main(capsys, "play", tmp_path, "--max_turns", "2")
        assert "after 2 turns (max_turns)" in out

    def test_chats(self, tmp_path, model_folder, capsys):
        chat = [{"role": "user", "content": "You are here."}, {"role": "assistant", "content": "go"}]
        (tmp_path / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 3)
        flags = (*SHORT, "--model_name_or_path", model_folder, "--output_dir", tmp_path)
        assert "3 episodes were imitated" in main(capsys, "warm-up", *flags, "--chats", tmp_path / "chats.jsonl")
        assert "`chats` is 'nowhere'" in refused(capsys, "warm-up", *flags, "--chats", "nowhere")
        assert "has kept 0 episodes" in refused(capsys, "warm-up", *flags, "--from", tmp_path, "--success", code=1)
        assert "one source at a time" in refused(capsys, "warm-up", *flags, "--chats", "a", "--teacher", "b")
        assert "`noise` is 0.1, but is for" in refused(capsys, "warm-up", *flags, "--chats", "a", "--noise", "0.1")
        for flag, value in (("noise", 30), ("until_success", 20)):  # before the model is loaded
            assert f"`{flag}` is {value}.0, but must be" in refused(capsys, "warm-up", *flags, f"--{flag}", value)
        teacher = ("--teacher", "http://127.0.0.1:9/v1", "--teacher_model", "wise")
        assert "cannot be reached" in refused(capsys, "warm-up", *flags, *teacher, code=1)


class TestPlay:
    def test_you(self, monkeypatch, capsys):
        lines = iter(["", "look"])

        def read(prompt):
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("trl_epo.play.input", read, raising=False)
        out = main(capsys, "play", "--human", "--environment", "household", "--bf16", "false")
        assert "Your task:" in out
        assert "Possible: " in out
        assert "No success after 1 turn (the end of the input)" in out

    def test_a_run_in_python_keeps_its_limits(self, capsys, tmp_path, monkeypatch, tokenizer):
        """The environment has to be said again."""

        def ended(prompt):
            raise EOFError

        run, here = tmp_path / "run", tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        settings = {**PATIENT_RUN, "max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2}
        trainer = EPOTrainer(
            make_model(context_length=4096),
            args=EPOConfig(str(run), max_turns=2, max_turn_length=3, **settings),
            processing_class=tokenizer,
            environment_factory=Household,
        )
        trainer.train()
        trainer.save_model()
        assert "No environment is named in trl_epo.json" in refused(capsys, "play", run)
        out = main(capsys, "play", run, "--environment", "household")
        assert out.startswith("At most 2 turns of 3 tokens, temperature 1.\n")
        assert "after 2 turns (max_turns)" in out
        assert list(here.iterdir()) == []
        (run / "config.json").unlink()  # you need no model
        monkeypatch.setattr("trl_epo.play.input", ended, raising=False)
        out = main(capsys, "play", run, "--environment", "household", "--human")
        assert "No success after 0 turns (the end of the input)" in out

    def test_mistakes(self, capsys, model_folder):
        flags = ("play", model_folder, "--config", SMALL)
        assert "`row` is -1" in refused(capsys, *flags, "--row", "-1")
        assert "split 'val'" in refused(capsys, *flags, "--split", "val")
        assert "`model_name_or_path` is not set" in refused(capsys, "play", "--config", SMALL)
        assert "in 'nowhere': no such folder is here, and the Hub has" in refused(capsys, "play", "nowhere")
        assert "with --environment or --config" in refused(capsys, "play", model_folder)
