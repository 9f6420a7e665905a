"""
The study's statistics: pure functions of numbers. Success rates are fractions.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np


MAX_PAIRS = 22  # 4 million sign patterns
TOLERANCE = 1e-9  # sums that differ by rounding only are equal


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def sign_flip_test(differences: Sequence[float]) -> float:
    """
    The two-sided p-value of paired differences under the hypothesis that each is as likely as its negative (Fisher 1935):
    the share of all 2^n patterns of signs in which the sum is at least as far from 0 as the observed one. Exact.

    >>> sign_flip_test([3.0, 1.0])  # of ±3 ± 1 the sums 4 and −4
    0.5

    Raises:
        ValueError: If there are no differences, or more than 22.
    """
    if not 1 <= len(differences) <= MAX_PAIRS:
        raise ValueError(f"There are {len(differences)} differences, but the exact test is for 1 to {MAX_PAIRS}.")
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    size = max(abs(difference) for difference in differences)
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - TOLERANCE * size))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """
    p-values adjusted for their number (Holm 1979): the i-th smallest of m times m − i + 1, at least the one before, at most 1.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min((len(p_values) - place) * p_values[name], 1.0))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


@cache
def t_quantile(degrees: int) -> float:
    """
    Student's t: the quantile of 0.975. With t = √ν · tan θ its density is cos(θ)^(ν − 1) but for a factor, whose integral is
    taken by trapezoids.

    >>> [round(t_quantile(degrees), 3) for degrees in (1, 2, 14, 15)]  # as in any table
    [12.706, 4.303, 2.145, 2.131]
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees) * math.tan(np.interp(0.95 * below[-1], below, angles))


def t_interval(values: Sequence[float]) -> Interval:
    """
    The mean and its 95 % interval by Student's t; without bounds (infinite ones) for a single value.

    >>> [round(number, 3) for number in t_interval([1.0, 2.0, 3.0])]  # 2 ± 4.303 · 1 / √3
    [2.0, -0.484, 4.484]

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("There are no values to take a mean of.")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def area_under_curve(steps: Sequence[float], values: Sequence[float]) -> float:
    """
    The mean height of a curve over its steps, by trapezoids.

    >>> area_under_curve([0, 10, 30], [0.0, 0.2, 0.2])  # (10 · 0.1 + 20 · 0.2) / 30
    0.16666666666666666

    Raises:
        ValueError: If there are fewer than two points, or the steps do not rise.
    """
    if len(steps) < 2 or len(steps) != len(values) or any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"A curve has two or more points at rising steps, but these are at {list(steps)}.")
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def share_taken_off(successes: Sequence[float], threshold: float) -> float:
    """
    The share of runs whose success is at least `threshold`.

    >>> share_taken_off([0.1, 0.3, 0.9], 0.3)
    0.6666666666666666
    """
    return sum(success >= threshold for success in successes) / len(successes)


def chance_of_order(lower: Sequence[float], higher: Sequence[float]) -> float | None:
    """
    How well a number tells two kinds of run apart: the chance that one of `higher` is above one of `lower`, a tie counting
    half (the area under the ROC curve; Mann and Whitney 1947). `None` if there is none of a kind.

    >>> chance_of_order([0.1, 0.2], [0.2, 0.3])  # of four pairs three and a half
    0.875
    """
    if not lower or not higher:
        return None
    wins = sum((b > a) + (b == a) / 2 for a in lower for b in higher)
    return wins / (len(lower) * len(higher))
