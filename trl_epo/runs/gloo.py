"""What gloo, by which processes without GPUs talk to each other, asks of a process that ends."""

import atexit
import time

import torch


LETTING_GO = 0.2  # seconds that gloo's threads have


def let_gloo_finish() -> None:
    """
    If processes talk by gloo, have this one wait a moment before Python ends.

    A thread of gloo's lets go of a collective's tensors just after the collective is done. If that is while Python ends,
    which is then no longer to be had (before Python 3.14), the process aborts with SIGABRT, whatever it has achieved.
    """
    if torch.distributed.is_initialized() and "gloo" in torch.distributed.get_backend_config():
        atexit.unregister(_wait)
        atexit.register(_wait)


def _wait() -> None:
    time.sleep(LETTING_GO)
