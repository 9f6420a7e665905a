"""
Credit assignment over turns and tokens, as pure functions.

Shapes: N episodes (groups of G next to each other), K turns, B rows (one episode each), T token positions. Rewards,
values and advantages are in units of reward; group-relative ones have none.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


STD_OFFSET = 1e-4  # added to a standard deviation before dividing by it, as in TRL
FLOAT32_ROUNDING = 2.0**-22  # relative, of a sum of a few numbers
SUM_ROUNDING = 1e-5  # the same of many


def flat_groups(rewards: Sequence[float], group_size: int) -> list[bool]:
    """
    For each group, whether its rewards are all equal, so that none of its episodes is better than another.

    Args:
        rewards (`Sequence[float]`): N; NaN for an episode that failed, which is not looked at.
        group_size (`int`): G.

    >>> flat_groups([0.0, 1.0, 1.0, float("nan")], group_size=2)
    [False, True]
    """
    groups = [rewards[first : first + group_size] for first in range(0, len(rewards), group_size)]
    return [len({reward for reward in group if not math.isnan(reward)}) < 2 for group in groups]


def turn_rewards(rewards: Sequence[float], total: float) -> list[float]:
    """
    The reward of each turn of an episode whose reward is `total`: what the turns earned, and the rest at the last one.

    A rest that is only the rounding of `total` to float32 is none: it would tell turns apart whose returns are equal.

    >>> turn_rewards([0.0, 0.5], total=1.0)
    [0.0, 1.0]
    """
    if not rewards:
        return []
    rest = total - math.fsum(rewards)
    if abs(rest) <= FLOAT32_ROUNDING * max(abs(total), *map(abs, rewards)):
        rest = 0.0
    return [*rewards[:-1], rewards[-1] + rest]


def discounted_returns(rewards: Sequence[float], gamma: float) -> list[float]:
    """
    The return of each turn: G_t = r_t + γ·G_{t+1}.

    >>> discounted_returns([0.0, 0.0, 1.0], gamma=0.5)
    [0.25, 0.5, 1.0]
    """
    returns, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.append(following)
    return returns[::-1]


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample (with N − 1); 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def standardized(values: Sequence[float], scale: float | None = None) -> list[float]:
    """
    Values less their mean, over their standard deviation.

    Args:
        values (`Sequence[float]`): At least one.
        scale (`float`, *optional*): Divide by this instead of the standard deviation.

    Returns:
        `list[float]`: Zeros if all values are equal.
    """
    mean = math.fsum(values) / len(values)
    scale = deviation(values) + STD_OFFSET if scale is None else scale
    return [(value - mean) / scale for value in values]


def turn_advantages(
    returns: Sequence[Sequence[float]], group_size: int, scale: float | None = None
) -> list[list[float]]:
    """
    Each turn's return relative to all turns of all episodes of its group.

    Args:
        returns (`Sequence[Sequence[float]]`): N lists, one return a turn; an empty one for an episode that failed.
        group_size (`int`): G.
        scale (`float`, *optional*): Divide by this instead of the group's standard deviation.

    Returns:
        `list[list[float]]`: In the shape of `returns`.
    """
    same = [[None] * len(episode) for episode in returns]
    return anchored_advantages(returns, same, group_size, scale)


def anchored_advantages(
    returns: Sequence[Sequence[float]],
    anchors: Sequence[Sequence[Hashable]],
    group_size: int,
    scale: float | None = None,
) -> list[list[float]]:
    """
    GiGPO's step advantage (Feng et al. 2025, arXiv 2505.10978): each turn's return relative to the turns of its group
    that began in the same state.

    Args:
        returns (`Sequence[Sequence[float]]`): N lists, one return a turn.
        anchors (`Sequence[Sequence[Hashable]]`): N lists, for each turn the state it began in.
        group_size (`int`): G.
        scale (`float`, *optional*): Divide by this instead of the standard deviation of such turns.

    Returns:
        `list[list[float]]`: In the shape of `returns`; 0 for a turn whose state nobody else of the group was in.
    """
    places = defaultdict(list)
    for episode, keys in enumerate(anchors):
        for turn, key in enumerate(keys):
            places[episode // group_size, key].append((episode, turn))
    advantages = [[0.0] * len(episode) for episode in returns]
    for where in places.values():
        relative = standardized([returns[episode][turn] for episode, turn in where], scale)
        for (episode, turn), value in zip(where, relative, strict=True):
            advantages[episode][turn] = value
    return advantages


def spread_over_tokens(turn_values: Sequence[Sequence[float]], turn_ids: Tensor) -> Tensor:
    """
    Give each action token the value of its turn.

    Args:
        turn_values (`Sequence[Sequence[float]]`): B lists, one value a turn.
        turn_ids (`Tensor` of shape `(B, T)`, int64): The turn of each action token, −1 elsewhere.

    Returns:
        `Tensor` of shape `(B, T)`: 0 where there is no turn.
    """
    width = max(1, *map(len, turn_values)) if turn_values else 1
    padded = [[*values, *[0.0] * (width - len(values))] for values in turn_values]
    table = torch.tensor(padded, dtype=torch.float32, device=turn_ids.device)
    return table.gather(1, turn_ids.clamp(min=0)).masked_fill(turn_ids < 0, 0.0)


def rewards_at_turn_ends(turn_values: Sequence[Sequence[float]], turn_ids: Tensor) -> Tensor:
    """
    Put each turn's reward at its last action token.

    Args:
        turn_values (`Sequence[Sequence[float]]`): B lists, one reward a turn.
        turn_ids (`Tensor` of shape `(B, T)`, int64): The turn of each action token, −1 elsewhere.

    Returns:
        `Tensor` of shape `(B, T)`: 0 elsewhere.
    """
    following = torch.nn.functional.pad(turn_ids[:, 1:], (0, 1), value=-1)
    is_end = (turn_ids >= 0) & (following != turn_ids)
    return spread_over_tokens(turn_values, turn_ids).masked_fill(~is_end, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lambda_: float) -> tuple[Tensor, Tensor]:
    """
    Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438) over the action tokens of an episode, one
    after the other; other tokens do not exist for it.

    With i⁺ the action token after i: δ_i = r_i + γ·V_{i⁺} − V_i and A_i = δ_i + γ·λ·A_{i⁺}; both are 0 after the last.
    An episode that was cut by a limit ends there like any other: the limit is part of the task.

    Args:
        rewards (`Tensor` of shape `(B, T)`): The reward that follows each token.
        values (`Tensor` of shape `(B, T)`): The value before each token.
        mask (`Tensor` of shape `(B, T)`): 1 at action tokens; all other positions are ignored.
        gamma (`float`): γ, a token.
        lambda_ (`float`): λ, a token.

    Returns:
        `tuple[Tensor, Tensor]`: Advantages and returns (advantage + value), (B, T) each; 0 where `mask` is.
    """
    action = mask.bool()
    # The action tokens of each row side by side, at its beginning
    order = (~action).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(action.sum(dim=1).max())]
    here, rewards, values = action.gather(1, order), rewards.gather(1, order), values.gather(1, order)
    packed = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(values))
    for token in reversed(range(values.size(1))):
        delta = rewards[:, token] + gamma * next_value - values[:, token]
        advantage = torch.where(here[:, token], delta + gamma * lambda_ * advantage, 0.0)
        next_value = torch.where(here[:, token], values[:, token], 0.0)
        packed[:, token] = advantage
    returns = torch.where(here, packed + values, 0.0)
    empty = torch.zeros(action.shape, dtype=values.dtype, device=values.device)
    return empty.scatter(1, order, packed), empty.scatter(1, order, returns)


def is_flat(lowest: float, highest: float) -> bool:
    """
    Whether returns from `lowest` to `highest`, in units of reward, differ by no more than the rounding of their sums.

    >>> is_flat(0.3, 0.1 + 0.2), is_flat(0.0, 1e-6)
    (True, False)
    """
    return highest - lowest <= SUM_ROUNDING * max(abs(lowest), abs(highest))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """
    The critic's loss at each token, the larger of ½(V − R)² and ½(V_clip − R)², where V_clip is V kept within
    `clip_range` of its value at the rollout (Schulman et al.'s PPO implementation).

    Args:
        values (`Tensor` of any shape): V now, in units of reward.
        old_values (`Tensor`): V at the rollout.
        returns (`Tensor`): R.
        clip_range (`float`): In units of reward.

    Returns:
        `Tensor` of the same shape.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
