"""Optimizer steps whose loss or gradient is not finite, which are not made."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class NonfiniteSteps:
    """
    Counts them.

    Usage per optimizer step: [`observe`] for each micro-batch's loss, then [`end_step`].

    Attributes:
        total (`int`): Of the run.
        in_a_row (`int`): Without a good one since.
    """

    def __init__(self):
        self.total = self.in_a_row = 0
        self._losses: list[Tensor] = []

    def observe(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch, a scalar."""
        self._losses.append(loss.detach())

    def losses_are_finite(self) -> bool:
        """Whether those of the current optimizer step are, on this process."""
        return bool(torch.stack(self._losses).isfinite().all()) if self._losses else True

    def end_step(self, finite: bool) -> None:
        """Count the optimizer step, which was `finite` on all processes or not."""
        self._losses.clear()
        self.total += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1

    def state_dict(self) -> dict[str, int]:
        """All state between optimizer steps."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what [`state_dict`] gave."""
        self.total, self.in_a_row = int(state["total"]), int(state["in_a_row"])


def gradient_is_finite(norm: Tensor | float | None, others: Iterable[nn.Parameter]) -> bool:
    """Whether the gradient is, of which the policy's `norm` is known, and its part for `others` on this process."""
    if norm is not None and not torch.as_tensor(norm).isfinite():
        return False
    gradients = [weight.grad for weight in others if weight.grad is not None]
    return not gradients or bool(nn.utils.get_total_norm(gradients).isfinite())


def leaves_overflow_to_scaler(accelerator: Accelerator) -> bool:
    """Whether a gradient in fp16 may be infinite only since it was scaled, which the scaler finds and mends by itself."""
    return accelerator.scaler is not None and accelerator.scaler.get_scale() > 1.0
