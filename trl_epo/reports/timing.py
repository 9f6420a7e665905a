"""Where the seconds of an optimizer step go, how many tokens a rollout samples in them, and the memory at most."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from ..rollouts import EnvironmentPool
from ..sampling import TurnSampler


# The parts of an optimizer step. What is none of the others is the update.
SAMPLING, ENVIRONMENTS, SCORING, UPDATE = PARTS = ("sampling", "environments", "scoring", "update")
GIB = 2**30


class StepTimes(TrainerCallback):
    """
    Measures optimizer steps. Each moment of one belongs to one part, the innermost that is under way; what is between two
    steps (evaluations, checkpoints, logs) belongs to none. It only reads the clock: it never waits for the device.
    """

    def __init__(self):
        self._part: str | None = None  # that is under way; None: between two steps
        self._since = 0.0  # when it began, on the clock of `time.perf_counter`
        self._device_peak = 0.0  # bytes
        self._forget()

    def _forget(self) -> None:
        self._seconds: dict[str | None, float] = defaultdict(float)
        self._num_steps = self._num_tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._part = None
        self._forget()

    def on_step_begin(self, args, state, control, **kwargs):
        self._part, self._since = UPDATE, time.perf_counter()

    def end_step(self, device: torch.device) -> None:
        """The optimizer step has been made, on the device too."""
        if self._part is not None:
            self._switch(None)
            self._num_steps += 1
            self._device_peak = max(self._device_peak, _device_peak(device))

    def _switch(self, part: str | None) -> str | None:
        """Begin a part; the one that was under way."""
        now = time.perf_counter()
        before = self._part
        self._seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens in here is this part of a step, if there is one under way."""
        if self._part is None:
            yield
            return
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def rollout(self, environments: EnvironmentPool) -> Iterator[None]:
        """In here episodes are played: what is not waiting for `environments` is sampling."""
        before = environments.seconds_awaited
        with self.part(SAMPLING):
            yield
        if self._part is not None:
            waited = environments.seconds_awaited - before
            self._seconds[ENVIRONMENTS] += waited
            self._seconds[SAMPLING] -= waited

    def counted(self, sampler: TurnSampler) -> TurnSampler:
        """The sampler, whose tokens are counted if there is a step under way."""
        return sampler if self._part is None else _CountedSampler(sampler, self)

    def count_tokens(self, num_tokens: int) -> None:
        """So many tokens were sampled, if there is a step under way."""
        if self._part is not None:
            self._num_tokens += num_tokens

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """
        The metrics of the steps since the last call; every process calls it. Nothing if there was none.

        Returns:
            `dict[str, float]`:
                `time/<part>` (seconds of a step of this process, mean over the steps); `rollout/tokens_per_second` (tokens
                that all processes sampled in a second of sampling and waiting for environments), if any were sampled;
                `memory/process_peak` and, with an accelerator, `memory/device_peak` (GiB, the most of any process).
        """
        if not self._num_steps:
            return {}
        device = accelerator.device
        own = torch.tensor([self._num_tokens, _process_peak() / GIB, self._device_peak / GIB], device=device)
        everyone = accelerator.gather(own).view(-1, len(own))
        num_tokens, (_, process_peak, device_peak) = everyone[:, 0].sum().item(), everyone.amax(dim=0).tolist()
        metrics = {f"time/{part}": self._seconds[part] / self._num_steps for part in PARTS}
        seconds = self._seconds[SAMPLING] + self._seconds[ENVIRONMENTS]
        if num_tokens:
            metrics["rollout/tokens_per_second"] = num_tokens / seconds
        metrics |= {"memory/process_peak": process_peak} if process_peak else {}
        metrics |= {"memory/device_peak": device_peak} if device_peak else {}
        self._forget()
        return metrics


class _CountedSampler:
    """A sampler that tells how many tokens it has sampled."""

    def __init__(self, sampler: TurnSampler, times: StepTimes):
        self._sampler, self._times = sampler, times

    def advance(self):
        finished = self._sampler.advance()
        self._times.count_tokens(sum(len(sample.token_ids) for _, sample in finished))
        return finished

    def __getattr__(self, name: str):
        return getattr(self._sampler, name)


def _process_peak() -> float:
    """Most resident memory of this process since it began, in bytes; 0 where that is not told (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024.0 * peak


def _device_peak(device: torch.device) -> float:
    """
    Most memory of tensors on the device since the process began, in bytes; 0 on a CPU. MPS tells what its driver holds now
    only.
    """
    if device.type == "cpu":
        return 0.0
    return torch.mps.driver_allocated_memory() if device.type == "mps" else torch.accelerator.max_memory_allocated()
