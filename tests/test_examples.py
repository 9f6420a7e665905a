"""The examples run, on small settings, and leave behind what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model


EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--max_steps", "2", "--warm_up_episodes", "60", "--panel_size", "8", "--per_device_train_batch_size", "16"]


def run(tmp_path, script, *flags):
    command = [sys.executable, str(EXAMPLES / script), "--output_dir", str(tmp_path), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(tmp_path, stdout, environment):
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["environment"] == environment
    assert {"success_before", "success_after", "panel_size", "train_minutes", "peak_memory_gb", "seed"} <= set(summary)
    assert 0.0 <= summary["success_before"] <= 1.0
    assert summary["panel_size"] == 8
    for name in ("model.safetensors", "tokenizer.json", "README.md", "training.png"):
        assert (tmp_path / name).exists()
    assert str(tmp_path / "training.png") in stdout
    assert "iid (8 rows)" in stdout


def test_quickstart(tmp_path):
    check(tmp_path, run(tmp_path, "quickstart.py", *SMALL), "household")


@pytest.mark.jvm
def test_quickstart_on_scienceworld_with_a_given_model(tmp_path, tokenizer):
    folder = tmp_path / "model"
    make_model(context_length=8192).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ["--environment", "scienceworld", "--model", str(folder), "--max_turns", "3", "--entropy_coef", "0.01"]
    check(tmp_path, run(tmp_path, "quickstart.py", *SMALL, *flags), "scienceworld")
