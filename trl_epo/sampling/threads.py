"""
How many threads sample on a CPU.

PyTorch's threads wait for each other at the end of every operation. A rollout of a small model is tens of thousands of tiny
operations, from which several threads gain little; and where another program holds one of their cores, all of them wait for it
each time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


SMALL = 4_000_000  # weights up to which one thread samples about as fast as several (docs/speed.md)


@contextmanager
def sampling_threads(model: PreTrainedModel) -> Iterator[None]:
    """
    One thread meanwhile for a small model on a CPU, unless the user has said how many (`OMP_NUM_THREADS`). The number follows
    from the model alone, since results on several threads differ in rounding.
    """
    before = torch.get_num_threads()
    if model.device.type == "cpu" and model.num_parameters() <= SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
