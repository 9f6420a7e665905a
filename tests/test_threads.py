"""How PyTorch's threads wait for each other."""

import os
import subprocess
import sys

import pytest
import torch
from faulty_runs import make_trainer


@pytest.mark.parametrize(
    "first, given, spins",
    [
        ("", {}, "3000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
        ("import torch", {}, "None"),  # too late: it has been read
    ],
)
def test_threads_wait_for_each_other_for_a_while(first, given, spins):
    program = f"{first}\nimport os, trl_epo\nprint(os.environ.get('GOMP_SPINCOUNT'), trl_epo.threads_spin)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    run = subprocess.run([sys.executable, "-c", program], env=environment | given, capture_output=True, text=True)
    assert run.stdout.split() == [spins, str(bool(first))], run.stderr


@pytest.mark.parametrize(("num_threads", "warns"), [(1, False), (2, True)])
def test_it_is_said_if_they_cannot(tmp_path, monkeypatch, caplog, num_threads, warns):
    monkeypatch.setattr("trl_epo.trainer.threads_spin", True)
    torch.set_num_threads(num_threads)
    try:
        make_trainer(tmp_path)
    finally:
        torch.set_num_threads(1)
    assert ("imported before trl_epo" in caplog.text) is warns
