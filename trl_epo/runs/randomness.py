"""Random numbers of evaluations, which leave those of training alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import set_seed


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from this seed, different ones on each process, in here; afterwards all goes on as before."""
    devices = range(0 if device.type == "cpu" else torch.get_device_module(device).device_count())
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            set_seed(seed, device_specific=True)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
