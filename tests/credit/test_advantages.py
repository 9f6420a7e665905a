"""Credit assignment against numbers worked out by hand, and its properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_epo.credit.advantages import (
    anchored_advantages,
    discounted_returns,
    flat_groups,
    gae,
    is_flat,
    rewards_at_turn_ends,
    spread_over_tokens,
    standardized,
    turn_advantages,
    turn_rewards,
    value_loss,
)


REWARDS = st.lists(st.floats(-10, 10), min_size=1, max_size=8)


class TestTurnRewards:
    def test_the_rest_comes_at_the_end(self):
        assert turn_rewards([0.25, 0.0, -0.5], total=2.0) == [0.25, 0.0, 1.75]
        assert turn_rewards([], total=3.0) == []

    @pytest.mark.parametrize("unit", [0.01, 1.0, 33.0])
    def test_rounding_is_no_rest(self, unit):
        """Two episodes whose second turns are alike, with totals in float32 as the trainer has them."""
        episodes = [[0.3 * unit, 0.1 * unit], [0.7 * unit, 0.1 * unit]]
        totals = torch.tensor([math.fsum(episode) for episode in episodes]).tolist()
        earned = [turn_rewards(*each) for each in zip(episodes, totals, strict=True)]
        assert earned == episodes
        [(_, first), (_, second)] = anchored_advantages(earned, [["a", "b"], ["c", "b"]], group_size=2)
        assert first == second == 0.0

    @given(REWARDS, st.floats(-10, 10))
    def test_they_sum_to_the_episodes_reward(self, rewards, total):
        assert math.fsum(turn_rewards(rewards, total)) == pytest.approx(total, abs=3e-6)  # float32's rounding


class TestReturns:
    def test_by_hand(self):
        # G_2 = 4, G_1 = 2 + 0.5·4 = 4, G_0 = 1 + 0.5·4 = 3
        assert discounted_returns([1.0, 2.0, 4.0], gamma=0.5) == [3.0, 4.0, 4.0]
        assert discounted_returns([1.0, 2.0, 4.0], gamma=0.0) == [1.0, 2.0, 4.0]
        assert discounted_returns([], gamma=0.9) == []

    @given(REWARDS)
    def test_without_a_discount_the_first_is_the_sum(self, rewards):
        assert discounted_returns(rewards, gamma=1.0)[0] == pytest.approx(math.fsum(rewards), abs=1e-9)


class TestFlatGroups:
    def test_examples(self):
        nan = math.nan
        assert flat_groups([0.0, 0.0, 0.0, 1.0], 2) == [True, False]
        assert flat_groups([nan, 1.0, nan, nan, 0.5, 0.5], 2) == [True, True, True]
        assert flat_groups([nan, 1.0, 0.0, 1.0], 4) == [False]


class TestGroupRelative:
    def test_standardized_by_hand(self):
        # mean 2, sample deviation 1
        assert standardized([1.0, 2.0, 3.0]) == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001])
        assert standardized([1.0, 2.0, 3.0], scale=1.0) == [-1.0, 0.0, 1.0]
        assert standardized([7.0]) == [0.0]

    def test_turns_are_compared_within_their_group_only(self):
        # the first group's returns are 0, 2, 4 (mean 2), the second's 10 and 20 (mean 15)
        found = turn_advantages([[0.0, 2.0], [4.0], [10.0], [20.0]], group_size=2, scale=1.0)
        assert found == [[-2.0, 0.0], [2.0], [-5.0], [5.0]]

    def test_an_episode_that_failed_has_no_turns(self):
        assert turn_advantages([[], [1.0, 3.0]], group_size=2, scale=1.0) == [[], [-1.0, 1.0]]

    def test_anchored_by_hand(self):
        returns = [[1.0, 2.0, 8.0], [3.0, 5.0], [9.0], [9.0]]
        anchors = [["a", "b", "a"], ["a", "c"], ["a"], ["b"]]
        # first group: "a" has 1, 8, 3 (mean 4); "b" and "c" have one each; the second group's "a" is another one
        found = anchored_advantages(returns, anchors, group_size=2, scale=1.0)
        assert found == [[-3.0, 0.0, 4.0], [-1.0, 0.0], [0.0], [0.0]]

    @given(st.lists(st.lists(st.floats(-5, 5), max_size=4), min_size=4, max_size=4))
    def test_a_groups_advantages_sum_to_zero(self, returns):
        found = turn_advantages(returns, group_size=2)
        for group in (found[:2], found[2:]):
            assert math.fsum(value for episode in group for value in episode) == pytest.approx(0.0, abs=1e-6)


TURN_IDS = torch.tensor([[0, 0, -1, 1, 1], [-1, -1, -1, -1, -1]])


def test_spread_over_tokens():
    assert spread_over_tokens([[2.0, 3.0], []], TURN_IDS).tolist() == [[2.0, 2.0, 0.0, 3.0, 3.0], [0.0] * 5]


def test_rewards_at_turn_ends():
    assert rewards_at_turn_ends([[2.0, 3.0], []], TURN_IDS).tolist() == [[0.0, 2.0, 0.0, 0.0, 3.0], [0.0] * 5]
    # two turns without an observation between them
    assert rewards_at_turn_ends([[2.0, 3.0]], torch.tensor([[0, 0, 1, -1]])).tolist() == [[0.0, 2.0, 3.0, 0.0]]


class TestGae:
    def test_by_hand(self):
        """Two turns of two tokens and an observation of two; γ = 0.5, λ = 0.5."""
        mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0]])
        rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 4.0, 0.0]])
        values = torch.tensor([[1.0, 2.0, 99.0, -99.0, 4.0, 2.0, 99.0]])
        # δ = 0+½·2−1, 1+½·4−2, 0+½·2−4, 4+0−2 = 0, 1, −3, 2
        # A = 2; −3+¼·2 = −2.5; 1+¼·(−2.5) = 0.375; 0+¼·0.375 = 0.09375
        advantages, returns = gae(rewards, values, mask, gamma=0.5, lambda_=0.5)
        assert advantages.tolist() == [[0.09375, 0.375, 0.0, 0.0, -2.5, 2.0, 0.0]]
        assert returns.tolist() == [[1.09375, 2.375, 0.0, 0.0, 1.5, 4.0, 0.0]]

    def test_a_garbage_value_outside_the_actions_does_not_matter(self):
        mask = torch.tensor([[1, 0, 1]])
        values = torch.tensor([[0.0, math.nan, 0.0]])
        advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), values, mask, 1.0, 1.0)
        assert advantages.tolist() == returns.tolist() == [[1.0, 0.0, 1.0]]

    @given(st.data())
    def test_observations_can_be_left_out(self, data):
        """Removing the tokens that are no actions changes nothing."""
        length = data.draw(st.integers(1, 12))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
        mask = torch.rand(1, length, generator=generator) < 0.6
        rewards, values = torch.randn(2, 1, length, generator=generator)
        gamma, lambda_ = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
        advantages, _ = gae(rewards, values, mask, gamma, lambda_)
        kept, _ = gae(rewards[mask][None], values[mask][None], torch.ones(1, int(mask.sum())), gamma, lambda_)
        torch.testing.assert_close(advantages[mask], kept[0])

    @given(st.integers(0, 1000))
    def test_at_gamma_and_lambda_1_the_return_is_what_follows(self, seed):
        generator = torch.Generator().manual_seed(seed)
        rewards, values = torch.randn(2, 2, 6, generator=generator)
        _, returns = gae(rewards, values, torch.ones(2, 6), 1.0, 1.0)
        torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), atol=1e-5, rtol=1e-5)


class TestIsFlat:
    def test_examples(self):
        assert is_flat(0.0, 0.0) and is_flat(-3.0, -3.0) and is_flat(0.3, 0.1 + 0.2)
        assert not is_flat(0.0, 1e-6) and not is_flat(-1.0, 1.0) and not is_flat(100.0, 100.01)
        assert is_flat(math.inf, -math.inf)  # of no tokens at all

    @given(REWARDS, st.randoms())
    def test_the_order_of_a_sum_is_no_difference(self, rewards, random):
        """In float32, as the trainer adds up; rewards of one sign, whose sum keeps its digits."""
        ones = torch.ones(1, len(rewards))
        shuffled = random.sample(rewards, len(rewards))
        rows = (torch.tensor([list(map(abs, each))]) for each in (rewards, shuffled))
        totals = [gae(row, torch.zeros_like(row), ones, 1.0, 1.0)[0][0, 0].item() for row in rows]
        assert is_flat(min(totals), max(totals))

    @given(st.floats(-100, 100), st.floats(0.01, 100), st.floats(0.01, 100))
    def test_the_unit_of_reward_does_not_matter(self, lowest, spread, unit):
        assert not is_flat(lowest * unit, (lowest + spread) * unit)


class TestValueLoss:
    def test_by_hand(self):
        values = torch.tensor([1.0, 1.0, 0.1])
        # a step of 1 is clipped to 0.2: (0.2 − 2)² / 2 = 1.62; towards the old value the unclipped one is the larger
        found = value_loss(values, torch.zeros(3), torch.tensor([2.0, 0.0, 0.3]), clip_range=0.2)
        torch.testing.assert_close(found, torch.tensor([1.62, 0.5, 0.02]))

    def test_no_gradient_beyond_the_clip(self):
        values = torch.tensor([1.0], requires_grad=True)
        value_loss(values, torch.zeros(1), torch.tensor([2.0]), clip_range=0.2).sum().backward()
        assert values.grad.item() == 0.0

    def test_no_clipping(self):
        found = value_loss(torch.tensor([1.0]), torch.zeros(1), torch.tensor([3.0]), clip_range=math.inf)
        assert found.tolist() == [2.0]
