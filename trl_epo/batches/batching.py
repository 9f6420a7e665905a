"""Batches of rows: which of their tokens carry loss, and which rows of unequal length to compute together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def action_mask(batch: dict[str, Any]) -> Tensor:
    """The tokens that carry loss, (B, T): those of the completion that the model sampled."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def sum_dtype(device: torch.device) -> torch.dtype:
    """In what to add up many numbers on a device."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # others may have no float64


def length_groups(lengths: Sequence[int], overhead: int, max_tokens: float = math.inf) -> list[list[int]]:
    """
    Split rows into groups that are padded each to its own longest row, at the least total cost: the padded tokens of
    all groups, and `overhead` tokens for each group.

    Args:
        lengths (`Sequence[int]`): Tokens of each row.
        overhead (`int`): What one more group costs, in tokens.
        max_tokens (`int`, *optional*): Largest group, in padded tokens; a single row may be larger.

    Returns:
        `list[list[int]]`: Indices of the rows of each group, longest rows first.

    >>> length_groups([100, 2000, 110], overhead=500)
    [[1], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    # best[i]: least cost of the first i rows of `order`; start[i]: where the last of their groups begins
    best, start = [0], [0]
    for end in range(1, len(order) + 1):
        splits = []
        for first in range(end):
            tokens = lengths[order[first]] * (end - first)
            if tokens <= max_tokens or first == end - 1:
                splits.append((best[first] + overhead + tokens, first))
        cost, first = min(splits)
        best.append(cost)
        start.append(first)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.insert(0, order[start[end] : end])
        end = start[end]
    return groups
