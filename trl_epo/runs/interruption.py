"""
SIGTERM and Ctrl-C (SIGINT): a run that is asked to end does so at the next boundary between optimizer steps, after a
checkpoint.
"""

import logging
import os
import signal
import sys
import threading
import time

import torch


logger = logging.getLogger(__name__)

# What may ask a run to end -> what people call it. If processes get different ones, the first counts for all.
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
# A scheduler signals every process and torchrun passes the signal on to its workers: one request comes twice.
SAME_REQUEST = 3.0  # seconds


class EndedByCtrlC(SystemExit, KeyboardInterrupt):
    """What a Ctrl-C becomes in a script: an exit without a traceback that `except KeyboardInterrupt` catches."""


def is_interactive() -> bool:
    """Whether someone goes on in this process when a call ends: in a notebook, in IPython, at Python's own prompt."""
    return hasattr(sys, "ps1")


def end(number: signal.Signals) -> None:
    """
    End a run that a signal has asked to end.

    Raises:
        SystemExit: With 128 + the signal's number, what a shell says of such an end. After a Ctrl-C a `KeyboardInterrupt`
            as well, and only that in a session that goes on.
    """
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)
    if is_interactive():
        raise KeyboardInterrupt("Training ended after a checkpoint.")
    raise EndedByCtrlC(128 + number)


def _hears_terminal_and_torchrun() -> bool:
    """Whether a Ctrl-C reaches this process from both. Not if torchrun has put it into a process group of its own."""
    return torch.distributed.is_torchelastic_launched() and os.getpgrp() != os.getpid()


class Interruption:
    """
    While this context lasts, notes a SIGTERM or a Ctrl-C instead of ending the process. A second one ends it at once; not so an
    echo of the first, as there is of SIGTERM, and of Ctrl-C if torchrun passes on what the terminal has sent too. Outside the main thread, where Python allows no handlers,
    nothing changes, and a SIGINT that is ignored (`nohup`, a job in a script's background) or has a handler of someone's own
    is left alone.

    Attributes:
        signal (`signal.Signals` or `None`): What has asked the process to end.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._process = 0
        self._former = {}

    @property
    def requested(self) -> bool:
        """Whether the process has been asked to end."""
        return self.signal is not None

    def __enter__(self) -> "Interruption":
        self.signal = None
        self._process = os.getpid()
        self._former = {}
        if threading.current_thread() is threading.main_thread():
            self._former[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._former[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, former in self._former.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)  # `None` is one that is not Python's

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a fork, which has a right to end
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            os.kill(os.getpid(), number)
            return
        has_echo = number == signal.SIGTERM or _hears_terminal_and_torchrun()
        is_echo = has_echo and number == self.signal and time.monotonic() - self._since <= SAME_REQUEST
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            logger.warning(
                f"{NAMES[self.signal]}: writing a checkpoint at the end of this optimizer step, then ending."
                + (" Another Ctrl-C ends it at once, without one." if number == signal.SIGINT else "")
            )
            if not has_echo:
                self._let_end_at_once(number)
        elif not is_echo:
            self._let_end_at_once(number)
            os.kill(os.getpid(), number)

    def _let_end_at_once(self, number: int) -> None:
        """Have the next signal of this kind end the process, or the call in a session that goes on."""
        former = self._former[number] or signal.SIG_DFL
        if number == signal.SIGINT and not is_interactive():
            former = signal.SIG_DFL  # acts also in a call that does not come back to Python
        signal.signal(number, former)
