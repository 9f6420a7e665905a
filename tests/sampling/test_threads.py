"""How many threads sample on a CPU, and how they wait for each other."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import PATIENT_RUN, Corridor, make_model

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.sampling import threads


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_a_rollout(tmp_path, tokenizer) -> set[int]:
    seen = set()

    def parse(text: str) -> str:  # between two turns
        seen.add(torch.get_num_threads())
        return text

    args = EPOConfig(
        str(tmp_path), **PATIENT_RUN, per_device_train_batch_size=4, num_generations=4, max_steps=1, max_turn_length=3
    )
    trainer = EPOTrainer(
        make_model(), args=args, processing_class=tokenizer, environment_factory=Corridor, action_parser=parse
    )
    trainer.train()
    assert torch.get_num_threads() == 2  # the loss has all of them again
    return seen


def test_a_small_model_samples_on_one_thread(tmp_path, tokenizer, two_threads):
    assert threads_of_a_rollout(tmp_path, tokenizer) == {1}


def test_a_large_model_samples_on_all(tmp_path, tokenizer, two_threads, monkeypatch):
    monkeypatch.setattr(threads, "SMALL", 10)
    assert threads_of_a_rollout(tmp_path, tokenizer) == {2}


def test_so_it_does_if_the_user_says_how_many(tmp_path, tokenizer, two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_of_a_rollout(tmp_path, tokenizer) == {2}


@pytest.mark.parametrize(
    "first, given, spins",
    [
        ("", {}, "1000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
        ("import torch", {}, "None"),  # too late: it has been read
    ],
)
def test_threads_wait_for_each_other_for_a_while(first, given, spins):
    program = f"{first}\nimport os, trl_epo\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    run = subprocess.run([sys.executable, "-c", program], env=environment | given, capture_output=True, text=True)
    assert run.stdout.strip() == spins, run.stderr
