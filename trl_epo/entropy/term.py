"""EPO's entropy term over a training run: what it adds to the loss, what it remembers, and what is logged of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..batches import action_mask, sum_dtype
from ..config import EPOConfig
from .history import EntropyHistory
from .objective import (
    corridor_side,
    episode_turn_means,
    linear_reference,
    phase_weight,
    reference_by_turn,
    shaped_advantages,
    smoothing_penalty,
    token_mean,
    turn_mean,
)


@dataclass(frozen=True)
class Moment:
    """
    Where in a run a loss is computed.

    Args:
        train (`bool`): Training, as opposed to evaluation.
        max_steps (`int`): Optimizer steps of the whole run.
        micro_batches (`int`): Micro-batches that the current optimizer step accumulates; 1 in evaluation.
        first_pass (`bool`): Whether the batch is used for the first time since it was sampled.
        step_ends (`bool`): Whether this is the last micro-batch of the current optimizer step.
    """

    train: bool
    max_steps: int
    micro_batches: int
    first_pass: bool
    step_ends: bool


class EntropyTerm:
    """
    The entropy term −λ·(L_H − β_k·L_smooth) of Eq. 6 (arXiv 2509.22576), computed micro-batch by micro-batch, or what an
    ablation has in its place.

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
        return bool(self.args.entropy_coef or self.args.entropy_corridor_coef)

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
        reference = self.reference(batch, moment)
        if args.entropy_corridor_coef:
            return self._corridor_loss(aggregate(entropies), reference, moment, policy_loss)
        bonus = aggregate(entropies)  # L_H
        smoothing = torch.zeros_like(bonus)  # L_smooth: 0 at k = 0
        phase = self.phase_weight(moment.max_steps)
        if args.entropy_smoothing != "none" and reference is not None:
            penalty = smoothing_penalty(
                entropies, reference, args.entropy_corridor_low, args.entropy_corridor_high, args.entropy_smoothing
            )
            smoothing = args.entropy_smoothing_coef * aggregate(penalty)
        parts = {"policy_loss": policy_loss, "entropy_bonus": bonus, "smoothing_loss": smoothing}
        metrics = self._of_optimizer_step(parts, moment)
        return -args.entropy_coef * (bonus - phase * smoothing), metrics | {"phase_weight": phase}

    def _corridor_loss(
        self, mean: Tensor, reference: float | None, moment: Moment, policy_loss: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """
        The hinge on L_H. On which side of the corridor L_H lies depends on the whole batch, of which a micro-batch knows
        a part: it is looked up in the optimizer step before, so that the split does not matter.
        """
        args, latest = self.args, self.history.latest
        slope, bound = 0, 0.0
        if reference is not None and latest is not None:
            slope, bound = corridor_side(latest, reference, args.entropy_corridor_low, args.entropy_corridor_high)
        loss = args.entropy_corridor_coef * slope * (mean - bound / moment.micro_batches)
        metrics = self._of_optimizer_step({"policy_loss": policy_loss, "corridor_loss": loss}, moment)
        metrics["corridor_slope"] = slope
        if latest is not None:
            metrics["corridor_entropy"] = latest
        return loss, metrics

    def reference(self, batch: dict[str, Any], moment: Moment) -> float | Tensor | None:
        """What the corridor is around, in nats: one value, (B, T), or `None` at k = 0."""
        kind, history = self.args.entropy_reference, self.history
        if kind == "turn_history":
            return reference_by_turn(history.turn_references, batch["turn_ids"]) if history.turn_means else None
        of_batches = bool(self.args.entropy_corridor_coef)  # like is compared with like
        if kind == "history":
            return history.aggregate_reference if of_batches else history.reference
        means = history.aggregates if of_batches else history.means
        if not means:
            return None
        num_steps = self._num_rl_steps(moment.max_steps)
        return linear_reference(means[0], self.args.entropy_reference_end, history.step, num_steps)

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
        args, reference = self.args, self.reference(batch, moment)
        turn_ids = batch["turn_ids"]
        dtype = sum_dtype(entropies.device)
        # A token whose entropy is not finite would stay in the history for good; its optimizer step is left out.
        action = action_mask(batch).bool() & entropies.isfinite()
        num_turns = turn_ids.max(dim=1, keepdim=True).values + 1  # (B, 1)
        late = action & (2 * turn_ids >= num_turns) & (num_turns > 1)
        early = action & ~late
        values = torch.where(action, entropies, 0.0).to(dtype)
        amounts = {
            "tokens": action.sum(),
            "early tokens": early.sum(),
            "late tokens": late.sum(),
            "episodes": action.any(dim=1).sum(),
            "entropy": values.sum(),
            "early entropy": (values * early).sum(),
            "late entropy": (values * late).sum(),
            "episode entropy": episode_turn_means(values, action, turn_ids).sum(),
        }
        if reference is not None:
            amounts["below"] = (action & (entropies < args.entropy_corridor_low * reference)).sum()
            amounts["above"] = (action & (entropies > args.entropy_corridor_high * reference)).sum()
        if isinstance(reference, Tensor):
            known = action & ~reference.isnan()
            amounts["references"] = torch.where(known, reference, 0.0).to(dtype).sum()
            amounts["tokens with reference"] = known.sum()
        if args.entropy_advantage_coef:
            advantages = batch["advantages"].reshape(len(action), -1)  # (B, 1) or (B, T)
            added = self.shape_advantages(advantages, entropies) - advantages
            amounts["advantage"] = torch.where(action, added, 0.0).to(dtype).sum()
        sums = self.accelerator.reduce(torch.stack([amount.to(dtype) for amount in amounts.values()]), reduction="sum")
        total = dict(zip(amounts, sums.tolist(), strict=True))
        if moment.train:
            self._remember(total, values, action, turn_ids, moment)

        metrics = {}
        for name, amount, number in (
            ("entropy", "entropy", "tokens"),
            ("entropy_early_turns", "early entropy", "early tokens"),
            ("entropy_late_turns", "late entropy", "late tokens"),
        ):
            if total[number]:
                metrics[name] = total[amount] / total[number]
        if isinstance(reference, Tensor):
            number = total["tokens with reference"]
            reference = total["references"] / number if number else None
        if reference is not None and total["tokens"]:
            metrics["entropy_reference"] = reference
            metrics["corridor_low"] = args.entropy_corridor_low * reference
            metrics["corridor_high"] = args.entropy_corridor_high * reference
            if not args.entropy_corridor_coef:
                metrics["below_corridor"] = total["below"] / total["tokens"]
                metrics["above_corridor"] = total["above"] / total["tokens"]
        if args.entropy_advantage_coef and total["tokens"]:
            metrics["advantage_shaping"] = total["advantage"] / total["tokens"]
        return metrics

    def _remember(
        self, total: dict[str, float], values: Tensor, action: Tensor, turn_ids: Tensor, moment: Moment
    ) -> None:
        """Enter a micro-batch into the history."""
        history = self.history
        by_turn = self.args.entropy_aggregation == "turn"
        aggregate = total["episode entropy" if by_turn else "entropy"]
        number = int(total["episodes" if by_turn else "tokens"])
        history.observe_optimizer_step(aggregate, number, moment.step_ends)
        if not moment.first_pass:
            return
        # The first pass over the batch: each of its action tokens enters the means of the RL step once.
        history.observe(total["entropy"], int(total["tokens"]))
        history.observe_aggregate(aggregate, number)
        if self.args.entropy_reference == "turn_history":
            ids = turn_ids.masked_fill(~action, 0)
            sums = values.new_zeros(2, int(ids.max()) + 1)  # (2, turns): entropies and tokens
            sums[0].scatter_add_(0, ids[action], values[action])
            sums[1].scatter_add_(0, ids[action], action[action].to(values.dtype))
            sums = self.accelerator.pad_across_processes(sums, dim=1)
            entropy_sums, token_counts = self.accelerator.reduce(sums, reduction="sum").tolist()
            history.observe_turns(entropy_sums, [int(count) for count in token_counts])

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
