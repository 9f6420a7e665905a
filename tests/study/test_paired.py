"""The study's statistics against numbers that others, or a pencil, have worked out, and their properties."""

import doctest
import math
from itertools import product

import paired
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paired import (
    area_under_curve,
    chance_of_order,
    holm,
    share_taken_off,
    sign_flip_test,
    t_interval,
)


# Charles Darwin's fifteen pairs of maize, crossed less self-fertilised, in eighths of an inch
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]

differences = st.lists(st.integers(-20, 20).map(lambda points: points / 200), min_size=1, max_size=8)
shares = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_examples_in_docstrings():
    assert doctest.testmod(paired).failed == 0


class TestSignFlip:
    def test_fishers_count(self):
        """In 1,726 of the 32,768 patterns the sum is at least as far from 0 (The Design of Experiments, section 21)."""
        assert sign_flip_test(MAIZE) == 1726 / 32768

    def test_all_of_sixteen_on_one_side(self):
        assert sign_flip_test([0.1 + 0.01 * place for place in range(16)]) == 2 / 65536

    def test_no_difference_at_all(self):
        assert sign_flip_test([0.0] * 4) == 1.0

    def test_sums_that_differ_by_rounding_only(self):
        """0.1 + 0.2 − 0.1 is a bit above 0.2 in floating point; six of the eight sums are ±0.2 or ±0.4."""
        assert sign_flip_test([0.1, 0.2, -0.1]) == 6 / 8

    @pytest.mark.parametrize("number", [0, 23])
    def test_too_few_or_many(self, number):
        with pytest.raises(ValueError, match=f"{number} differences"):
            sign_flip_test([0.5] * number)

    @given(differences)
    def test_counting_patterns(self, values):
        """In whole points, where there is no rounding."""
        whole = [round(200 * value) for value in values]
        sums = [sum(s * v for s, v in zip(signs, whole, strict=True)) for signs in product((1, -1), repeat=len(whole))]
        assert sign_flip_test(values) == sum(abs(each) >= abs(sum(whole)) for each in sums) / len(sums)

    @given(differences, st.randoms(use_true_random=False), st.floats(0.01, 100))
    def test_order_direction_and_unit_do_not_matter(self, values, draw, unit):
        others = [-unit * value for value in values]
        draw.shuffle(others)
        assert sign_flip_test(others) == sign_flip_test(values)


class TestHolm:
    def test_by_hand(self):
        """4 · 0.005, 3 · 0.011, 2 · 0.02 = 0.04 and 1 · 0.039, which may not be below the one before."""
        adjusted = holm({"H1": 0.02, "H2": 0.005, "H3": 0.039, "H4": 0.011})
        assert adjusted == pytest.approx({"H1": 0.04, "H2": 0.02, "H3": 0.04, "H4": 0.033})

    @given(shares)
    def test_properties(self, values):
        adjusted = list(holm(dict(enumerate(values))).values())
        assert all(before <= after <= 1.0 for before, after in zip(values, adjusted, strict=True))
        assert min(adjusted) == min(1.0, len(values) * min(values))
        pairs = sorted(zip(values, adjusted, strict=True))
        assert [after for _, after in pairs] == sorted(adjusted)  # the order stays


class TestInterval:
    def test_darwins_maize(self):
        """Mean 20.93, deviation 37.74, t of 14 degrees of freedom 2.145."""
        assert t_interval(MAIZE) == pytest.approx((20.933, 0.031, 41.836), abs=0.01)

    def test_one_value(self):
        assert t_interval([0.2]) == (0.2, -math.inf, math.inf)

    def test_none(self):
        with pytest.raises(ValueError, match="no values"):
            t_interval([])

    @given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(-5, 5))
    def test_moves_with_the_values(self, values, shift):
        mean, low, high = t_interval(values)
        assert low <= mean <= high
        assert t_interval([value + shift for value in values]) == pytest.approx(
            (mean + shift, low + shift, high + shift), abs=1e-6
        )


class TestCurves:
    def test_area_by_hand(self):
        """(10 · 0.25 + 10 · 0.5 + 20 · 0.5) / 40"""
        assert area_under_curve([0, 10, 20, 40], [0.0, 0.5, 0.5, 0.5]) == pytest.approx(17.5 / 40)

    @pytest.mark.parametrize("steps", [[], [1], [1, 1], [2, 1]])
    def test_no_curve(self, steps):
        with pytest.raises(ValueError, match="two or more points"):
            area_under_curve(steps, [0.5] * len(steps))

    @given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=2, max_size=9))
    def test_area_lies_between_the_values(self, points):
        steps = [sum(width for width, _ in points[: place + 1]) for place in range(len(points))]
        values = [value for _, value in points]
        assert min(values) - 1e-9 <= area_under_curve(steps, values) <= max(values) + 1e-9

    def test_share_taken_off(self):
        assert share_taken_off([0.0, 0.29, 0.3, 1.0], 0.3) == 0.5

    @given(shares, shares)
    def test_chance_of_order(self, lower, higher):
        chance = chance_of_order(lower, higher)
        assert chance + chance_of_order(higher, lower) == pytest.approx(1.0)
        assert chance == (1.0 if max(lower) < min(higher) else chance)

    def test_chance_without_one_kind(self):
        assert chance_of_order([], [0.5]) is None
