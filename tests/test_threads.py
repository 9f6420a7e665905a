"""How PyTorch's threads wait for each other."""

import os
import subprocess
import sys

import pytest


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
    program = f"{first}\nimport os, trl_epo\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    run = subprocess.run([sys.executable, "-c", program], env=environment | given, capture_output=True, text=True)
    assert run.stdout.strip() == spins, run.stderr
