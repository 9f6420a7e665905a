"""
EPO's entropy term as pure functions on tensors (arXiv 2509.22576, Eq. 2-6).

    loss = policy loss − λ · [L_H − β_k · L_smooth]

Shapes: B rows (one episode each), T token positions. Entropies are in nats.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cut_share(log_ratios: Tensor, mask: Tensor, bounds: tuple[float | None, float | None], by_row: bool) -> Tensor:
    """
    How many tokens have an importance ratio that is out of bounds, and how many there are.

    Args:
        log_ratios (`Tensor` of shape `(B, T)`): Logarithms of the tokens' ratios, in nats; NaN counts as 0.
        mask (`Tensor` of shape `(B, T)`): 1 at the tokens that count.
        bounds (`tuple`): The lowest and the highest ratio; `None` for no bound.
        by_row (`bool`): Whether a row has one ratio, the product of its tokens'.

    Returns:
        `Tensor` of shape `(2,)`.
    """
    logs = (log_ratios * mask).nan_to_num(nan=0.0)
    if by_row:
        logs = logs.sum(dim=1, keepdim=True).expand_as(mask)
    ratios = logs.exp()
    low, high = bounds
    out = torch.zeros_like(mask, dtype=torch.bool)
    if low is not None:
        out |= ratios < low
    if high is not None:
        out |= ratios > high
    return torch.stack([(out * mask).sum(), mask.sum()])


def turn_ids_from_mask(mask: Tensor) -> Tensor:
    """
    Number the turns of each row: a turn is an unbroken run of action tokens.

    Args:
        mask (`Tensor` of shape `(B, T)`): 1 at action tokens, 0 at observation and padding tokens.

    Returns:
        `Tensor` of shape `(B, T)`, int64: the token's turn, counted from 0, and −1 where `mask` is 0.

    >>> turn_ids_from_mask(torch.tensor([[1, 1, 0, 1, 0, 0]]))
    tensor([[ 0,  0, -1,  1, -1, -1]])
    """
    action = mask.bool()
    previous = torch.nn.functional.pad(action[:, :-1], (1, 0), value=False)
    starts = action & ~previous
    return (starts.cumsum(dim=1) - 1).masked_fill(~action, -1)


def turn_weights(taken: Tensor, decay: float) -> Tensor:
    """
    EPO-Decay: weights of an episode's turns that fall in equal steps from 1 + δ to 1 − δ.

    Turn t of T weighs 1 + δ·(1 − 2t/(T − 1)), so that an episode's mean weight is 1; an only turn weighs 1. The paper
    describes the variant (more weight early, less late) but gives no formula: this one is ours.

    Args:
        taken (`Tensor` of shape `(B, turns)`, bool): Which turns the episode has; the others do not count.
        decay (`float`): δ, from 0 (all turns alike) to 1 (nothing for the last).

    Returns:
        `Tensor` of shape `(B, turns)`; what it holds where `taken` is false means nothing.

    >>> turn_weights(torch.tensor([[True, True, True]]), 0.5)
    tensor([[1.5000, 1.0000, 0.5000]])
    """
    place = taken.cumsum(dim=1) - 1  # (B, turns)
    last = taken.sum(dim=1, keepdim=True) - 1  # (B, 1)
    return torch.where(last > 0, 1.0 + decay * (1.0 - 2.0 * place / last.clamp(min=1)), 1.0)


def episode_turn_means(values: Tensor, mask: Tensor, turn_ids: Tensor, decay: float = 0.0) -> Tensor:
    """
    The two inner means of Eq. 2: over the action tokens of a turn, then over the turns of an episode.

    Args:
        values (`Tensor` of shape `(B, T)`): A value per token.
        mask (`Tensor` of shape `(B, T)`): 1 at action tokens; all other positions are ignored.
        turn_ids (`Tensor` of shape `(B, T)`, int64): The turn of each action token, counted from 0.
        decay (`float`, *optional*, defaults to `0.0`): δ of [`turn_weights`], by which turns are weighted.

    Returns:
        `Tensor` of shape `(B,)`; 0 for an episode without action tokens.
    """
    action = mask.bool()
    ids = turn_ids.masked_fill(~action, 0)
    num_turns = int(ids.max()) + 1 if ids.numel() else 1
    shape = (values.size(0), num_turns)
    # `where`, not a product: an ignored position may hold inf or NaN.
    sums = values.new_zeros(shape).scatter_add(1, ids, torch.where(action, values, 0.0))  # (B, turns)
    counts = values.new_zeros(shape).scatter_add(1, ids, action.to(values.dtype))  # (B, turns)
    turn_means = sums / counts.clamp(min=1.0)
    taken = counts > 0
    if decay:
        turn_means = turn_means * turn_weights(taken, decay)
    return turn_means.sum(dim=1) / taken.sum(dim=1).clamp(min=1)


def turn_mean(
    values: Tensor,
    mask: Tensor,
    turn_ids: Tensor,
    num_episodes: Tensor | float | None = None,
    decay: float = 0.0,
) -> Tensor:
    """
    Eq. 2: the mean over episodes of the mean over turns of the mean over the turn's action tokens.

    A turn counts once however long it is, and an episode counts once however many turns it has.

    Args:
        values (`Tensor` of shape `(B, T)`): A value per token, e.g. its entropy.
        mask (`Tensor` of shape `(B, T)`): 1 at action tokens; all other positions are ignored.
        turn_ids (`Tensor` of shape `(B, T)`, int64): The turn of each action token, counted from 0.
        num_episodes (`Tensor` or `float`, *optional*): What the sum over episodes is divided by. Defaults to the
            number of rows with at least one action token; give the whole batch's number to split a batch.
        decay (`float`, *optional*, defaults to `0.0`): δ of [`turn_weights`], by which turns are weighted.

    Returns:
        `Tensor`, a scalar; 0 when there is no action token.

    >>> entropies = torch.tensor([[1.0, 3.0, 9.0, 4.0]])
    >>> mask = torch.tensor([[1, 1, 0, 1]])  # turn 0: 1 and 3 (mean 2); an observation; turn 1: 4
    >>> turn_mean(entropies, mask, turn_ids_from_mask(mask))
    tensor(3.)
    """
    if num_episodes is None:
        num_episodes = mask.bool().any(dim=1).sum().clamp(min=1)
    return episode_turn_means(values, mask, turn_ids, decay).sum() / num_episodes


def token_mean(values: Tensor, mask: Tensor, num_tokens: Tensor | float | None = None) -> Tensor:
    """
    The mean over all action tokens of a batch, each counting once.

    Args:
        values (`Tensor` of shape `(B, T)`): A value per token.
        mask (`Tensor` of shape `(B, T)`): 1 at action tokens; all other positions are ignored.
        num_tokens (`Tensor` or `float`, *optional*): What the sum is divided by. Defaults to the number of action
            tokens; give the whole batch's number to split a batch.

    Returns:
        `Tensor`, a scalar; 0 when there is no action token.
    """
    action = mask.bool()
    if num_tokens is None:
        num_tokens = action.sum().clamp(min=1)
    return torch.where(action, values, 0.0).sum() / num_tokens


def smoothing_penalty(
    entropies: Tensor, reference: Tensor | float, low: float, high: float, kind: str = "hinge"
) -> Tensor:
    """
    Eq. 3: how far each token's entropy is outside the corridor [κ_l·H̄_W, κ_r·H̄_W].

    Args:
        entropies (`Tensor` of any shape): Entropy per token, in nats.
        reference (`Tensor` or `float`): H̄_W, the mean entropy of the steps so far, in nats; one for all, or one for
            each token, NaN where a token has none and is not penalised. A constant: no gradient flows into it.
        low (`float`): κ_l, the lower bound as a multiple of `reference`.
        high (`float`): κ_r, the upper bound as a multiple of `reference`.
        kind (`str`, *optional*, defaults to `"hinge"`): `"hinge"`: relu(κ_l·H̄_W − H) + relu(H − κ_r·H̄_W), in nats,
            with slope ±1 outside the corridor. `"indicator"`: 1 outside and 0 inside (the paper's first version),
            which has no gradient.

    Returns:
        `Tensor` of the shape of `entropies`: 0 inside the corridor, positive outside.

    Raises:
        ValueError: If `kind` is neither of the two.

    >>> smoothing_penalty(torch.tensor([0.1, 1.0, 2.5]), reference=1.0, low=0.5, high=1.5)
    tensor([0.4000, 0.0000, 1.0000])
    """
    if isinstance(reference, Tensor):
        entropies = torch.where(reference.isnan(), 0.0, entropies)  # inside a corridor around nothing
        reference = reference.detach().nan_to_num()
    below = low * reference - entropies
    above = entropies - high * reference
    if kind == "hinge":
        return torch.relu(below) + torch.relu(above)
    if kind == "indicator":
        return ((below > 0) | (above > 0)).to(entropies.dtype)
    raise ValueError(f"`kind` is {kind!r}, but must be 'hinge' or 'indicator'.")


def reference_by_turn(references: Sequence[float | None], turn_ids: Tensor) -> Tensor:
    """
    The reference of each token where every turn index has its own.

    Args:
        references (`Sequence[float | None]`): By turn index, in nats; `None` where there is none.
        turn_ids (`Tensor` of shape `(B, T)`, int64): The turn of each token, counted from 0; −1 is no turn.

    Returns:
        `Tensor` of shape `(B, T)`, in nats; NaN where there is no reference, as in turns beyond the list.

    >>> reference_by_turn([0.5, None], torch.tensor([[0, -1, 0, 1, 2]]))
    tensor([[0.5000,    nan, 0.5000,    nan,    nan]])
    """
    values = [math.nan if value is None else value for value in references]
    table = torch.tensor([*values, math.nan], device=turn_ids.device)  # the last entry is for turns without reference
    return table[turn_ids.masked_fill(turn_ids < 0, len(values)).clamp(max=len(values))]


def linear_reference(first: float, end_share: float, step: int, total_steps: int) -> float:
    """
    A reference that falls in a straight line over the run: H̄_0·(1 − (1 − s)·k/(K − 1)). Not in the paper.

    Args:
        first (`float`): H̄_0, the mean entropy of the first RL step, in nats.
        end_share (`float`): s, what share of it is left at the last RL step.
        step (`int`): k, the RL step, counted from 0. Steps beyond the last keep its reference.
        total_steps (`int`): K, all RL steps of the run.

    Returns:
        `float`: In nats.

    >>> linear_reference(2.0, 0.2, step=5, total_steps=11)
    1.2
    """
    done = min(step / max(total_steps - 1, 1), 1.0)
    return first * (1.0 - (1.0 - end_share) * done)


def corridor_side(mean: float, reference: float, low: float, high: float) -> tuple[int, float]:
    """
    Where a batch's mean entropy is, seen from the corridor [κ_l·reference, κ_r·reference]. Not in the paper.

    Args:
        mean (`float`): The mean entropy, in nats.
        reference (`float`): In nats.
        low (`float`): κ_l.
        high (`float`): κ_r.

    Returns:
        `tuple[int, float]`: The slope there of relu(κ_l·reference − mean) + relu(mean − κ_r·reference), −1 below, 0 inside
        or 1 above, and the bound that was crossed, in nats (0 inside).

    >>> corridor_side(2.5, reference=2.0, low=0.5, high=1.0)
    (1, 2.0)
    """
    if mean > high * reference:
        return 1, high * reference
    if mean < low * reference:
        return -1, low * reference
    return 0, 0.0


def phase_weight(step: int, total_steps: int, decay: float) -> float:
    """
    Eq. 5: β_k = 1 + exp(−γ_β·k/k_mid) with k_mid = ⌊K/2⌋, at least 1.

    2 at the start, 1 + e^−γ in the middle, near 1 at the end.

    Args:
        step (`int`): k, the RL step, counted from 0.
        total_steps (`int`): K, all RL steps of the run.
        decay (`float`): γ_β.

    Returns:
        `float`: β_k.

    Raises:
        ValueError: If `step` is negative or `total_steps` below 1.

    >>> phase_weight(0, 100, 3.0)
    2.0
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"`step` ({step}) must be at least 0 and `total_steps` ({total_steps}) at least 1.")
    return 1.0 + math.exp(-decay * step / max(total_steps // 2, 1))


def shaped_advantages(advantages: Tensor, entropies: Tensor, coef: float, limit: float) -> Tensor:
    """
    Entropy-shaped advantages: A + min(α·H, |A|/κ) (Cheng et al. 2025, "Reasoning with Exploration: An Entropy
    Perspective", arXiv 2506.14758).

    With κ > 1 no advantage changes its sign, and one of 0 stays 0. No gradient flows through H.

    Args:
        advantages (`Tensor` of shape `(B,)` or `(B, T)`): A, of an episode or of each token.
        entropies (`Tensor` of shape `(B, T)`): H per token, in nats.
        coef (`float`): α, in units of advantage per nat.
        limit (`float`): κ, what share of |A| may be added at most: 1/κ.

    Returns:
        `Tensor` of shape `(B, T)`.

    >>> shaped_advantages(torch.tensor([1.0, -1.0]), torch.tensor([[0.5, 4.0], [0.5, 4.0]]), coef=0.4, limit=2.0)
    tensor([[ 1.2000,  1.5000],
            [-0.8000, -0.5000]])
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return advantages + torch.minimum(coef * entropies.detach(), advantages.abs() / limit)
