"""SIGTERM: a run that is asked to end does so at the next boundary between optimizer steps, after a checkpoint."""

import logging
import os
import signal
import threading
import time


logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM  # what a shell says of a process that was terminated
# A scheduler signals every process and torchrun passes the signal on to its workers: one request comes twice.
SAME_REQUEST = 3.0  # seconds


class Interruption:
    """
    While this context lasts, notes a SIGTERM instead of ending the process; a second one, later than the echo of
    the first, ends it at once. Outside the main thread, where Python allows no handlers, nothing changes.

    Attributes:
        requested (`bool`): Whether the process has been asked to end.
    """

    def __init__(self):
        self.requested = False
        self._since = 0.0
        self._process = 0
        self._former = None

    def __enter__(self) -> "Interruption":
        self.requested = False
        self._process = os.getpid()
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception) -> None:
        if self._handles:
            self._hand_back()

    def _note(self, number, frame) -> None:
        if os.getpid() != self._process:  # a fork, which has a right to end
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self.requested:
            self.requested, self._since = True, time.monotonic()
            logger.warning("SIGTERM: writing a checkpoint at the end of this optimizer step, then ending.")
        elif time.monotonic() - self._since > SAME_REQUEST:
            self._hand_back()
            os.kill(os.getpid(), signal.SIGTERM)

    def _hand_back(self) -> None:
        """The former handler; `None` stands for one that is not Python's."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._former is None else self._former)
