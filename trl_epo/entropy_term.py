"""EPO's entropy term over a training run: what it adds to the loss, what it remembers, and what is logged of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import EPOConfig
from .history import EntropyHistory
from .objective import phase_weight, shaped_advantages, smoothing_penalty, token_mean, turn_mean


@dataclass(frozen=True)
class Moment:
    """
    Where in a run a loss is computed.

    Args:
        train (`bool`): Training, as opposed to evaluation.
        max_steps (`int`): Optimizer steps of the whole run.
        micro_batches (`int`): Micro-batches that the current optimizer step accumulates; 1 in evaluation.
        first_pass (`bool`): Whether the batch is used for the first time since it was sampled.
    """

    train: bool
    max_steps: int
    micro_batches: int
    first_pass: bool


class EntropyTerm:
    """
    The entropy term −λ·(L_H − β_k·L_smooth) of Eq. 6 (arXiv 2509.22576), computed micro-batch by micro-batch.

    Per RL step: `history.begin_step()`; then for each micro-batch [`loss`] and [`observe`], on all processes alike.
    A micro-batch is a dictionary with `completion_mask`, perhaps `tool_mask`, and `turn_ids`, all (B, T), `advantages`,
    (B,) or (B, T), and the counts of its generation batch over all processes: `num_episodes_in_batch` and
    `num_items_in_batch`.

    Args:
        args (`EPOConfig`): The settings.
        accelerator (`Accelerator`): Adds up over processes.
    """

    def __init__(self, args: EPOConfig, accelerator: Accelerator):
        self.args = args
        self.accelerator = accelerator
        self.history = EntropyHistory()

    @property
    def acts(self) -> bool:
        """Whether anything is added to the policy loss."""
        return bool(self.args.entropy_coef)

    def loss(
        self, entropies: Tensor, batch: dict[str, Any], moment: Moment, policy_loss: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """
        What a micro-batch adds to the policy loss, scaled like it for gradient accumulation.

        Args:
            entropies (`Tensor` of shape `(B, T)`): Entropy per token, in nats, with gradient.
            batch (`dict`): The micro-batch.
            moment (`Moment`): Where in the run.
            policy_loss (`Tensor`): The micro-batch's policy loss, to be logged.

        Returns:
            `tuple[Tensor, dict[str, float]]`: The loss, a scalar, and metrics of a whole optimizer step.
        """
        args = self.args
        aggregate = self._aggregation(batch, moment)
        bonus = aggregate(entropies)  # L_H
        smoothing = torch.zeros_like(bonus)  # L_smooth: 0 at k = 0
        phase = self.phase_weight(moment.max_steps)
        reference = self.history.reference
        if args.entropy_smoothing != "none" and reference is not None:
            penalty = smoothing_penalty(
                entropies, reference, args.entropy_corridor_low, args.entropy_corridor_high, args.entropy_smoothing
            )
            smoothing = args.entropy_smoothing_coef * aggregate(penalty)
        parts = {"policy_loss": policy_loss, "entropy_bonus": bonus, "smoothing_loss": smoothing}
        metrics = self._of_optimizer_step(parts, moment)
        return -args.entropy_coef * (bonus - phase * smoothing), metrics | {"phase_weight": phase}

    def shape_advantages(self, advantages: Tensor, entropies: Tensor) -> Tensor:
        """
        The advantages that the policy loss uses: as given, or entropy-shaped if `entropy_advantage_coef` says so.

        Args:
            advantages (`Tensor` of shape `(B,)` or `(B, T)`): A of an episode or of each token.
            entropies (`Tensor` of shape `(B, T)`): Entropy per token, in nats.

        Returns:
            `Tensor` of the shape of `advantages`, or `(B, T)` if shaped.
        """
        if not self.args.entropy_advantage_coef:
            return advantages
        return shaped_advantages(
            advantages, entropies, self.args.entropy_advantage_coef, self.args.entropy_advantage_limit
        )

    def observe(self, entropies: Tensor, batch: dict[str, Any], moment: Moment) -> dict[str, float]:
        """
        Take note of the entropies of a micro-batch's action tokens: in training they enter the current RL step's
        history.

        Args:
            entropies (`Tensor` of shape `(B, T)`): Entropy per token, in nats.
            batch (`dict`): The micro-batch.
            moment (`Moment`): Where in the run.

        Returns:
            `dict[str, float]`: Metrics of the micro-batch over all processes.
        """
        args, reference = self.args, self.history.reference
        turn_ids = batch["turn_ids"]
        dtype = torch.float32 if entropies.device.type == "mps" else torch.float64  # MPS has no float64
        action = action_mask(batch).bool()
        num_turns = turn_ids.max(dim=1, keepdim=True).values + 1  # (B, 1)
        late = action & (2 * turn_ids >= num_turns) & (num_turns > 1)
        early = action & ~late
        outside = [torch.zeros_like(action)] * 2
        if reference is not None:
            outside = [
                action & (entropies < args.entropy_corridor_low * reference),
                action & (entropies > args.entropy_corridor_high * reference),
            ]
        values = torch.where(action, entropies, 0.0).to(dtype)
        sums = [(values * group).sum() for group in (action, early, late)]
        counts = [group.sum().to(dtype) for group in (action, early, late, *outside)]
        advantages = batch["advantages"].view(len(action), -1)  # (B, 1) or (B, T)
        added = torch.where(action, self.shape_advantages(advantages, entropies) - advantages, 0.0).to(dtype).sum()
        totals = self.accelerator.reduce(torch.stack([*sums, *counts, added]), reduction="sum").tolist()
        total, early_sum, late_sum, count, early_count, late_count, below, above, added = totals
        if moment.train and moment.first_pass:
            # Each of the batch's action tokens enters the history once.
            self.history.observe(total, int(count))
        means = {
            "entropy": (total, count),
            "entropy_early_turns": (early_sum, early_count),
            "entropy_late_turns": (late_sum, late_count),
        }
        metrics = {name: top / bottom for name, (top, bottom) in means.items() if bottom}
        if reference is not None and count:
            metrics["entropy_reference"] = reference
            metrics["corridor_low"] = args.entropy_corridor_low * reference
            metrics["corridor_high"] = args.entropy_corridor_high * reference
            metrics["below_corridor"] = below / count
            metrics["above_corridor"] = above / count
        if args.entropy_advantage_coef and count:
            metrics["advantage_shaping"] = added / count
        return metrics

    def phase_weight(self, max_steps: int) -> float:
        """β_k (Eq. 5) of the current RL step in a run of `max_steps` optimizer steps."""
        if self.args.entropy_smoothing_schedule == "constant":
            return 1.0
        return phase_weight(
            max(self.history.step, 0), self._num_rl_steps(max_steps), self.args.entropy_smoothing_decay
        )

    def _num_rl_steps(self, max_steps: int) -> int:
        """K, at least 1."""
        micro_steps = max_steps * self.args.gradient_accumulation_steps
        return max(math.ceil(micro_steps / (self.args.steps_per_generation * self.args.num_iterations)), 1)

    def _aggregation(self, batch: dict[str, Any], moment: Moment) -> Callable[[Tensor], Tensor]:
        """(B, T) → the micro-batch's part of a mean over the whole batch, so that its split does not matter."""
        mask = action_mask(batch)
        share = moment.micro_batches / self.args.steps_per_generation if moment.train else 1.0
        share /= self.accelerator.num_processes
        if self.args.entropy_aggregation == "turn":
            num_episodes = batch["num_episodes_in_batch"].clamp(min=1) * share
            return lambda values: turn_mean(
                values, mask, batch["turn_ids"], num_episodes, self.args.entropy_turn_decay
            )
        num_tokens = batch["num_items_in_batch"].clamp(min=1) * share
        return lambda values: token_mean(values, mask, num_tokens)

    def _of_optimizer_step(self, parts: dict[str, Tensor], moment: Moment) -> dict[str, float]:
        """A micro-batch holds its share of each part; logged are the parts of a whole optimizer step."""
        values = torch.stack([part.detach().float() for part in parts.values()])
        values = self.accelerator.reduce(values, reduction="mean") * moment.micro_batches
        return dict(zip(parts, values.tolist(), strict=True))


def action_mask(batch: dict[str, Any]) -> Tensor:
    """The tokens that carry loss, (B, T): those of the completion that the model sampled."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
