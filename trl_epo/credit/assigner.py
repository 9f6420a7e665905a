"""How the rewards of a batch of episodes are credited to its tokens: groups, estimators, the critic's part."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..batches import action_mask, sum_dtype
from ..config import EPOConfig
from ..entropy import token_mean
from ..rollouts import Episode
from .advantages import (
    STD_OFFSET,
    anchored_advantages,
    deviation,
    discounted_returns,
    flat_groups,
    gae,
    is_flat,
    rewards_at_turn_ends,
    spread_over_tokens,
    turn_advantages,
    turn_rewards,
    value_loss,
)
from .critic import Critic


class CreditAssigner:
    """
    Assigns the credit of generation batches whose rows are episodes, the episodes of a group next to each other.

    A batch is a dictionary with `completion_mask`, `tool_mask` and `turn_ids`, all (B, T), `advantages`, (B,), and
    `num_items_in_batch`, the number of action tokens over all processes. Metrics are returned by name.

    Args:
        args ([`EPOConfig`]): The settings.
        accelerator ([`~accelerate.Accelerator`]): Gathers groups, and adds up over processes.
        critic ([`Critic`], *optional*): Of `advantage_estimator="gae"`.
        return_weight (`float`): What an episode's return, and so a turn's reward from the environment, is multiplied by.
    """

    def __init__(
        self, args: EPOConfig, accelerator: Accelerator, critic: Critic | None = None, return_weight: float = 1.0
    ):
        self.args = args
        self.accelerator = accelerator
        self.critic = critic
        self.return_weight = return_weight

    def flat_episodes(self, episodes: list[Episode]) -> tuple[list[int], int]:
        """Which of these are in groups whose rewards from the environment are all equal; the number of such groups."""
        penalty = self.args.invalid_action_penalty
        rewards = [math.nan if each.failed else math.fsum(each.penalised_rewards(penalty)) for each in episodes]
        return self._in_flat_groups(gather_object(rewards), len(episodes))

    def mask_flat_groups(self, batch: dict[str, Any], rewards: Tensor) -> dict[str, float]:
        """Take groups whose `rewards`, (N,) over all processes, are all equal out of the loss."""
        rows, num_groups = self._in_flat_groups(rewards.tolist(), len(batch["turn_ids"]))
        batch["tool_mask"][rows] = 0
        batch["turn_ids"][rows] = -1
        batch["num_items_in_batch"] = self.accelerator.gather(action_mask(batch).sum()).sum()
        return {"groups/masked": num_groups}

    def assign(self, batch: dict[str, Any], episodes: list[Episode], rewards: Tensor) -> dict[str, float]:
        """Replace the episodes' advantages, (B,), by those of their tokens, (B, T), as the estimator has it."""
        args = self.args
        if args.advantage_estimator == "grpo":
            return {}
        own = self._own(len(episodes))
        earned = [
            [] if episode.failed else turn_rewards(self._weighted_rewards(episode), total)
            for episode, total in zip(episodes, rewards[own].tolist(), strict=True)
        ]
        if args.advantage_estimator == "gae":
            return self._estimate_with_critic(batch, rewards_at_turn_ends(earned, batch["turn_ids"]))
        returns = gather_object([discounted_returns(rewards, args.gamma) for rewards in earned])
        every_return = [value for episode in returns for value in episode]
        scale = {"group": None, "batch": deviation(every_return) + STD_OFFSET, "none": 1.0}[args.scale_rewards]
        if args.advantage_estimator == "turn":
            advantages = turn_advantages(returns, args.num_generations, scale)
        else:
            anchors = gather_object([[] if episode.failed else episode.observations for episode in episodes])
            advantages = anchored_advantages(returns, anchors, args.num_generations, scale)
        by_token = spread_over_tokens(advantages[own], batch["turn_ids"])
        if args.advantage_estimator == "gigpo":
            by_token = batch["advantages"][:, None] + args.gigpo_step_coef * by_token
        batch["advantages"] = by_token
        return {}

    def train_critic(self, batch: dict[str, Any], micro_batches: int, alone: bool) -> tuple[Tensor, dict[str, float]]:
        """
        The critic's part of a micro-batch: its gradients.

        Args:
            batch (`dict`): The micro-batch.
            micro_batches (`int`): Micro-batches of the optimizer step.
            alone (`bool`): Whether only the critic learns from it.

        Returns:
            `tuple[Tensor, dict[str, float]]`: The critic's loss, without a graph, and metrics.
        """
        self.critic.trains_alone = alone
        value_loss, metrics = self.critic_loss(batch, micro_batches)
        self.critic.backward(value_loss)
        return value_loss.detach(), metrics

    def critic_loss(self, batch: dict[str, Any], micro_batches: int) -> tuple[Tensor, dict[str, float]]:
        """
        The critic's loss on a micro-batch, one of `micro_batches` of its optimizer step: its part of a mean over the
        action tokens of all of them, on all processes.
        """
        losses = value_loss(self.critic.values(batch), batch["values"], batch["returns"], self.args.critic_clip_range)
        share = micro_batches / self.args.steps_per_generation / self.accelerator.num_processes
        loss = token_mean(losses, action_mask(batch), batch["num_items_in_batch"].clamp(min=1) * share)
        total = self.accelerator.reduce(loss.detach(), reduction="mean") * micro_batches
        return loss, {"critic/value_loss": total.item()}

    def _estimate_with_critic(self, batch: dict[str, Any], rewards: Tensor) -> dict[str, float]:
        action = action_mask(batch).bool()
        with torch.no_grad():
            values = self.critic.values(batch)
        advantages, returns = gae(rewards, values, action, self.args.gamma, self.args.gae_lambda)
        errors = returns - values
        dtype = sum_dtype(values.device)
        sums = [part.to(dtype)[action].sum() for x in (advantages, values, returns, errors) for part in (x, x**2)]
        sums = self.accelerator.reduce(torch.stack([*sums, action.sum().to(dtype)]), reduction="sum").tolist()
        means = [total / max(sums[-1], 1) for total in sums[:-1]]
        mean, value, mean_return, error = means[::2]
        variance, _, return_variance, error_variance = (
            max(square - mean**2, 0.0) for mean, square in zip(means[::2], means[1::2], strict=True)
        )
        # Where nothing went better than anything else, advantages are the critic's noise, which whitening would blow up
        flat = is_flat(*self._bounds_of_returns(rewards, action))
        scale = 0.0 if flat else 1.0 / (math.sqrt(variance) + 1e-8)
        batch["advantages"] = torch.where(action, (advantages - mean) * scale, 0.0)
        batch["values"], batch["returns"] = values, returns
        metrics = {"critic/value": value, "critic/return": mean_return}
        metrics |= {"critic/advantage_std": math.sqrt(variance), "critic/flat": float(flat)}
        if return_variance > 1e-12:
            metrics["critic/explained_variance"] = 1.0 - error_variance / return_variance
        return metrics

    def _weighted_rewards(self, episode: Episode) -> list[float]:
        """What each turn's own reward is in the episode's."""
        return [self.return_weight * reward for reward in episode.penalised_rewards(self.args.invalid_action_penalty)]

    def _bounds_of_returns(self, rewards: Tensor, action: Tensor) -> tuple[float, float]:
        """The lowest and the highest of what follows each action token in reward, discounted, on all processes."""
        returns, _ = gae(rewards, torch.zeros_like(rewards), action, self.args.gamma, 1.0)
        lowest = returns.masked_fill(~action, math.inf).min()
        highest = returns.masked_fill(~action, -math.inf).max()
        bounds = self.accelerator.gather(torch.stack([lowest, highest])).view(-1, 2)
        return bounds[:, 0].min().item(), bounds[:, 1].max().item()

    def _own(self, num_episodes: int) -> slice:
        """This process's episodes among those of all."""
        first = self.accelerator.process_index * num_episodes
        return slice(first, first + num_episodes)

    def _in_flat_groups(self, rewards: list[float], num_episodes: int) -> tuple[list[int], int]:
        flat = flat_groups(rewards, self.args.num_generations)
        own = range(len(rewards))[self._own(num_episodes)]
        return [i for i, episode in enumerate(own) if flat[episode // self.args.num_generations]], sum(flat)
