"""The examples run, on small settings, and leave behind what they say."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model

from trl_epo.sampling.memory import LOGIT_BYTES, PIECE_BYTES
from trl_epo.seams.trl import CPU_HEAD_TILE


EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--max_steps", "2", "--warm_up_episodes", "60", "--panel_size", "8", "--per_device_train_batch_size", "16"]


def run(tmp_path, script, *flags):
    return call(script, "--output_dir", str(tmp_path), *flags)


def call(script, *flags):
    command = [sys.executable, str(EXAMPLES / script), *flags]
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


def test_three_environments(tmp_path):
    pytest.importorskip("textarena", reason='needs pip install "trl-epo[textarena]"')
    flags = ["--max_steps", "1", "--warm_up_episodes", "30", "--panel_size", "4", "--num_generations", "4"]
    stdout = run(tmp_path, "three_environments.py", *flags, "--per_device_train_batch_size", "12")
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("household", "guess", "lake"):
        assert 0.0 <= summary[f"success_after_{name}"] <= 1.0
        assert f"{name} (4 rows)" in stdout
    logged = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    in_training = {name for entry in logged for name in entry if name.startswith("episode/success_rate_in/")}
    assert {name.split("/")[-1] for name in in_training} == {"household", "guess", "lake"}


@pytest.mark.jvm
def test_quickstart_on_scienceworld_with_a_given_model(tmp_path, tokenizer):
    folder = tmp_path / "model"
    make_model(context_length=8192).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ["--environment", "scienceworld", "--model", str(folder), "--max_turns", "3", "--entropy_coef", "0.01"]
    flags += ["--max_turn_length", "60"]  # the tokenizer knows few words
    check(tmp_path, run(tmp_path, "quickstart.py", *SMALL, *flags), "scienceworld")


@pytest.mark.jvm
def test_scienceworld_goes_on_where_it_stopped(tmp_path, tokenizer):
    """After a cut at step 1 of 2 the same command ends with the same weights; the warm policy is made once."""
    make_model(context_length=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--warm_start", str(tmp_path / "warm"), "--warm_up_epochs", "0.1"]
    flags += ["--max_steps", "2", "--panel_size", "2", "--max_turns", "2", "--gradient_accumulation_steps", "1"]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--environment_patience", "inf"]
    out = tmp_path / "out"
    first = run(out, "scienceworld.py", *flags)
    weights = (out / "adapter_model.safetensors").read_bytes()
    before = (out / "before.json").read_bytes()
    shutil.rmtree(out / "checkpoint-2")
    (out / "adapter_model.safetensors").unlink()
    again = run(out, "scienceworld.py", *flags)
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert (out / "before.json").read_bytes() == before
    assert "Warm-up on" in first and "from the warm policy" in first
    assert "Warm-up on" not in again and f"Training from {out / 'checkpoint-1'}" in again
    summary = json.loads((out / "summary.json").read_text())
    assert {"success_before", "success_before_ood", "success_after_ood"} <= set(summary)


@pytest.mark.jvm
def test_benchmark_of_environments(tmp_path):
    results, figure = tmp_path / "results.json", tmp_path / "figure.png"
    flags = ["--environments", "2", "1", "--steps", "6", "--json", str(results), "--plot", str(figure)]
    stdout = call("benchmarks/environments.py", *flags)
    rows = json.loads(results.read_text())["rows"]
    arrangements = ["one JVM", "one JVM each"] * 2
    assert [(row["environments"], row["arrangement"]) for row in rows] == list(
        zip([1, 1, 2, 2], arrangements, strict=True)
    )
    for row in rows:
        assert row["steps"] == 6
        assert row["admissible_actions"] is False
        assert 0 <= row["invalid_share"] < 1
        assert min(row[name] for name in ("steps_per_s", "invalid_steps_per_s", "cpu_s")) > 0
        assert 50 < row["jvm_rss_mb"] < 2000
    assert rows[3]["jvm_rss_mb"] > 1.5 * rows[1]["jvm_rss_mb"]
    assert len(stdout.splitlines()) == 1 + len(rows)
    assert figure.stat().st_size > 0


def benchmark(tmp_path, script, *flags):
    results, figure = tmp_path / "results.json", tmp_path / "figure.png"
    call(
        f"benchmarks/{script}",
        "--model",
        "tiny",
        "--threads",
        "1",
        "--json",
        str(results),
        "--plot",
        str(figure),
        *flags,
    )
    assert figure.exists()
    return json.loads(results.read_text())["rows"]


def test_benchmark_of_rollouts(tmp_path):
    rows = benchmark(tmp_path, "rollout_speed.py", "--turns", "2", "7", "--episodes", "4")
    assert [row["turns"] for row in rows] == [2, 7]
    for row in rows:
        assert row["episodes"] == 4
        assert row["ours_tokens"] == row["trl_tokens"] > 20 * row["turns"]  # the comparison is of equal episodes
        assert min(row["ours_cpu_s"], row["trl_cpu_s"], row["floor_cpu_s"]) > 0
    assert rows[1]["last_turn_over_fifth"] > 0


def test_benchmark_of_the_training_step(tmp_path):
    flags = ["--tokens", "200", "--episodes", "4", "--micro_batch", "2", "--repeats", "1"]
    equal, ragged = benchmark(tmp_path, "train_step.py", *flags)
    assert (equal["lengths"], ragged["lengths"]) == ("equal", "ragged")
    assert min(equal["ours_cpu_s"], equal["trl_cpu_s"], ragged["ours_cpu_s"], ragged["trl_cpu_s"]) > 0
    assert "epo_term_cpu_s" in equal


def test_benchmark_of_memory(tmp_path, monkeypatch):
    """The formula reckons with the package's own constants, which are not public."""
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    benchmark = runpy.run_path(str(EXAMPLES / "benchmarks" / "memory.py"))
    assert benchmark["CPU_HEAD_TILE"] == CPU_HEAD_TILE
    assert (benchmark["LOGIT_BYTES"], benchmark["PIECE_BYTES"]) == (LOGIT_BYTES, PIECE_BYTES)
    stdout = call("benchmarks/memory.py", "--measure", "false")
    assert all(size in stdout for size in ("0.5B", "1.5B", "3B", "7B"))


def test_benchmark_of_contexts(tmp_path):
    results = tmp_path / "results.json"
    flags = ["--model", "tiny", "--turns", "6", "9", "--episodes", "2", "--json", str(results)]
    call("benchmarks/contexts.py", *flags)
    rows = json.loads(results.read_text())["rows"]
    assert [(row["turns"], row["context"], row["contexts"]) for row in rows] == [
        (6, "transcript", 1), (6, "window", 6), (9, "transcript", 1), (9, "window", 9)
    ]  # fmt: skip
    for transcript, window in (rows[:2], rows[2:]):
        assert transcript["read"] == transcript["trained"] < transcript["read_without_cache"]
        assert transcript["read"] < window["read"] < window["read_without_cache"] == window["trained"]


def test_benchmark_of_credit(tmp_path):
    results = tmp_path / "results.json"
    flags = ["--output_dir", str(tmp_path), "--seeds", "0", "--warm_up_episodes", "8", "--json", str(results)]
    stdout = call("benchmarks/credit_signal.py", *flags, "--batches", "3", "--skipped", "1", "--gae_lambdas", "0.9")
    rows = json.loads(results.read_text())["rows"]
    assert [row["advantages"] for row in rows] == ["centred returns", "grpo", "gae", "gae"]
    assert [row.get("critic_learning_rate") for row in rows] == [None, None, 1e-5, 1e-3]
    assert stdout.count("| 0 | gae | 0.001 | 0.9 |") == 1


def test_arms(tmp_path):
    flags = ["--arms", "ppo+epo", "--seeds", "0", "--contexts", "transcript", "window", "--max_steps", "2"]
    flags += ["--warm_up_episodes", "8", "--panel_size", "4"]
    stdout = call("arms.py", *flags, "--output_dir", str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["context"], row["arm"]) for row in rows] == [("transcript", "ppo+epo"), ("window", "ppo+epo")]
    assert all(0 <= row["iid_after"] <= 1 for row in rows)
    assert stdout.count("| window | 0.0005 |") == 1
    again = call("arms.py", *flags, "--output_dir", str(tmp_path))  # nothing is left to run
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert "train_runtime" not in again
