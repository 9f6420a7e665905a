"""The entropy term: values and gradients worked out by hand, and the paper's lemmas as properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_epo.entropy.objective import (
    corridor_side,
    episode_turn_means,
    linear_reference,
    phase_weight,
    reference_by_turn,
    shaped_advantages,
    smoothing_penalty,
    token_mean,
    turn_ids_from_mask,
    turn_mean,
    turn_weights,
)


# Two episodes. The first has turns of entropies (1, 3) and (5); the second one turn of (2, 4, 9). 99 is not an action.
ENTROPIES = torch.tensor([[1.0, 3.0, 99.0, 5.0, 99.0], [2.0, 4.0, 9.0, 99.0, 99.0]])
MASK = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]])
TURN_IDS = torch.tensor([[0, 0, -1, 1, -1], [0, 0, 0, -1, -1]])


class TestTurnMean:
    def test_hand_worked_value(self):
        # ((1 + 3)/2 + 5)/2 = 3.5 and (2 + 4 + 9)/3 = 5: the mean is 4.25
        assert turn_mean(ENTROPIES, MASK, TURN_IDS).item() == pytest.approx(4.25)
        assert episode_turn_means(ENTROPIES, MASK, TURN_IDS).tolist() == pytest.approx([3.5, 5.0])

    def test_hand_worked_gradient(self):
        entropies = ENTROPIES.clone().requires_grad_()
        turn_mean(entropies, MASK, TURN_IDS).backward()
        # 1/2 episodes · 1/turns · 1/tokens
        expected = [[1 / 8, 1 / 8, 0, 1 / 4, 0], [1 / 6, 1 / 6, 1 / 6, 0, 0]]
        torch.testing.assert_close(entropies.grad, torch.tensor(expected))

    def test_token_mean_differs(self):
        assert token_mean(ENTROPIES, MASK).item() == pytest.approx((1 + 3 + 5 + 2 + 4 + 9) / 6)

    def test_turn_counts_once_however_long(self):
        short = turn_mean(torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), torch.tensor([[0, 1]]))
        long = turn_mean(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.ones(1, 4), torch.tensor([[0, 0, 0, 1]]))
        assert short.item() == long.item() == 0.5

    def test_episode_without_actions_does_not_count(self):
        entropies = torch.cat([ENTROPIES, torch.full((1, 5), 7.0)])
        mask = torch.cat([MASK, torch.zeros(1, 5, dtype=torch.long)])
        turn_ids = torch.cat([TURN_IDS, torch.full((1, 5), -1)])
        assert turn_mean(entropies, mask, turn_ids).item() == pytest.approx(4.25)

    @pytest.mark.parametrize("mean", [lambda v, m: turn_mean(v, m, turn_ids_from_mask(m)), token_mean])
    def test_no_actions_at_all_is_zero_with_a_gradient(self, mean):
        values = torch.full((2, 3), float("nan"), requires_grad=True)
        result = mean(values, torch.zeros(2, 3, dtype=torch.long))
        result.backward()
        assert result.item() == 0.0
        assert values.grad.abs().sum() == 0.0

    def test_ignored_positions_may_hold_anything(self):
        entropies = ENTROPIES.masked_fill(MASK == 0, float("nan")).requires_grad_()
        result = turn_mean(entropies, MASK, TURN_IDS)
        result.backward()
        assert result.item() == pytest.approx(4.25)
        assert torch.isfinite(entropies.grad).all()


class TestInvariance:
    @given(padding=st.integers(0, 5), order=st.permutations(range(2)))
    @settings(max_examples=20)
    def test_padding_and_batch_order(self, padding, order):
        def padded(tensor, value):
            return torch.nn.functional.pad(tensor, (0, padding), value=value)[order]

        result = turn_mean(padded(ENTROPIES, 50.0), padded(MASK, 0), padded(TURN_IDS, -1))
        assert result.item() == pytest.approx(4.25)

    @given(seed=st.integers(0, 1000), num_parts=st.sampled_from([1, 2, 3, 6]))
    @settings(max_examples=30)
    def test_split_into_micro_batches(self, seed, num_parts):
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(6, 9, generator=generator)
        mask = torch.randint(0, 2, (6, 9), generator=generator)
        turn_ids = turn_ids_from_mask(mask)
        num_episodes = mask.bool().any(dim=1).sum().clamp(min=1)
        num_tokens = mask.sum().clamp(min=1)
        parts = [slice(i, i + 6 // num_parts) for i in range(0, 6, 6 // num_parts)]
        by_turn = sum(turn_mean(values[p], mask[p], turn_ids[p], num_episodes) for p in parts)
        by_token = sum(token_mean(values[p], mask[p], num_tokens) for p in parts)
        torch.testing.assert_close(by_turn, turn_mean(values, mask, turn_ids))
        torch.testing.assert_close(by_token, token_mean(values, mask))


class TestTurnWeights:
    def test_hand_worked_values(self):
        # Five turns, three turns (one of the batch's turns has no tokens), one turn.
        taken = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
        weights = turn_weights(taken, 0.8)
        assert weights[0].tolist() == pytest.approx([1.8, 1.4, 1.0, 0.6, 0.2])
        assert weights[1][taken[1]].tolist() == pytest.approx([1.8, 1.0, 0.2])
        assert weights[2, 0].item() == 1.0

    def test_hand_worked_mean_and_gradient(self):
        entropies = ENTROPIES.clone().requires_grad_()
        # Weights (1.5, 0.5): (1.5·2 + 0.5·5)/2 = 2.75; the one turn of the second episode keeps its 5
        mean = turn_mean(entropies, MASK, TURN_IDS, decay=0.5)
        mean.backward()
        assert mean.item() == pytest.approx((2.75 + 5) / 2)
        expected = [[1.5 / 8, 1.5 / 8, 0, 0.5 / 4, 0], [1 / 6, 1 / 6, 1 / 6, 0, 0]]
        torch.testing.assert_close(entropies.grad, torch.tensor(expected))

    @given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any), st.floats(0.0, 1.0))
    def test_mean_is_one_and_weights_never_rise_nor_turn_negative(self, taken, decay):
        taken = torch.tensor([taken])
        weights = turn_weights(taken, decay)[taken]
        assert weights.mean().item() == pytest.approx(1.0, abs=1e-6)
        assert (weights >= -1e-6).all()
        assert (weights.diff() <= 1e-6).all()

    @given(st.floats(0.0, 1.0))
    def test_equal_turns_are_not_changed(self, decay):
        values = torch.full((1, 4), 0.7)
        assert turn_mean(values, torch.ones(1, 4), torch.arange(4)[None], decay=decay).item() == pytest.approx(0.7)


class TestTurnIds:
    def test_runs_are_turns(self):
        mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
        expected = [[-1, 0, 0, -1, -1, 1, -1, 2], [0] * 8, [-1] * 8]
        assert turn_ids_from_mask(mask).tolist() == expected


class TestSmoothingPenalty:
    def test_hand_worked_values(self):
        entropies = torch.tensor([0.0, 0.5, 1.0, 3.0, 3.5])
        # reference 2, corridor [0.5, 3.0]... below by 0.5, at the bound, inside, at the bound, above by 0.5
        penalty = smoothing_penalty(entropies, reference=2.0, low=0.25, high=1.5)
        assert penalty.tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0, 0.5])

    def test_hand_worked_gradient(self):
        entropies = torch.tensor([0.1, 1.0, 3.5], requires_grad=True)
        smoothing_penalty(entropies, reference=2.0, low=0.25, high=1.5).sum().backward()
        assert entropies.grad.tolist() == [-1.0, 0.0, 1.0]

    def test_no_gradient_flows_into_the_reference(self):
        reference = torch.tensor(2.0, requires_grad=True)
        entropies = torch.tensor([5.0], requires_grad=True)
        smoothing_penalty(entropies, reference, 0.0, 2.0).sum().backward()
        assert reference.grad is None

    def test_indicator_has_values_but_no_gradient(self):
        entropies = torch.tensor([0.1, 1.0, 3.5], requires_grad=True)
        penalty = smoothing_penalty(entropies, reference=2.0, low=0.25, high=1.5, kind="indicator")
        assert penalty.tolist() == [1.0, 0.0, 1.0]
        assert not penalty.requires_grad

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="'hinge' or 'indicator'"):
            smoothing_penalty(torch.ones(1), 1.0, 0.0, 2.0, kind="square")


entropy = st.floats(0.0, 12.0, width=32)
corridor = st.tuples(st.floats(0.0, 2.0), st.floats(0.0, 2.0)).map(sorted)


class TestLemmas:
    @given(entropy, entropy, st.floats(0.0, 6.0), corridor)
    def test_a10_non_negative_zero_inside_and_1_lipschitz(self, first, second, reference, bounds):
        low, high = bounds
        entropies = torch.tensor([first, second], dtype=torch.float64)
        penalty = smoothing_penalty(entropies, reference, low, high)
        assert (penalty >= 0).all()
        inside = (entropies >= low * reference) & (entropies <= high * reference)
        assert (penalty[inside] == 0).all()
        assert (penalty[0] - penalty[1]).abs() <= abs(first - second) + 1e-12

    @given(st.lists(entropy, min_size=1, max_size=8), st.floats(0.1, 6.0), corridor, st.floats(0.0, 3.0))
    def test_a11_gradient_of_the_smoothing_loss(self, values, reference, bounds, alpha):
        # One turn per token in one episode, so that each token's weight is 1/n and ∇L_smooth = ±α·∇H/n
        low, high = bounds
        entropies = torch.tensor([values], dtype=torch.float64, requires_grad=True)
        mask = torch.ones_like(entropies, dtype=torch.long)
        turn_ids = torch.arange(len(values))[None]
        penalty = smoothing_penalty(entropies, reference, low, high)
        (alpha * turn_mean(penalty, mask, turn_ids)).backward()
        for value, gradient in zip(values, entropies.grad[0].tolist(), strict=True):
            sign = -1 if value < low * reference else 1 if value > high * reference else 0
            assert gradient == pytest.approx(sign * alpha / len(values))

    @given(st.floats(0.01, 0.49), st.integers(0, 100))
    def test_with_the_papers_alpha_the_bonus_always_outweighs_the_cap(self, alpha, step):
        # Above the cap the net weight of ∇H in the loss is −λ·(1 − α·β_k): negative, i.e. entropy is pushed up.
        entropies = torch.tensor([[10.0]], requires_grad=True)
        mask, turn_ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)
        bonus = turn_mean(entropies, mask, turn_ids)
        smoothing = alpha * turn_mean(smoothing_penalty(entropies, 1.0, 0.0, 2.0), mask, turn_ids)
        beta = phase_weight(step, 100, 3.0)
        (-(bonus - beta * smoothing)).backward()
        assert entropies.grad.item() == pytest.approx(-(1 - alpha * beta), rel=1e-5)
        assert entropies.grad.item() < 0


class TestPhaseWeight:
    def test_hand_worked_values(self):
        assert phase_weight(0, 120, 3.0) == 2.0
        assert phase_weight(60, 120, 3.0) == pytest.approx(1 + math.exp(-3))
        assert phase_weight(30, 121, 3.0) == pytest.approx(1 + math.exp(-1.5))  # k_mid = 60
        assert phase_weight(120, 120, 3.0) == pytest.approx(1 + math.exp(-6))

    def test_short_runs(self):
        assert phase_weight(0, 1, 3.0) == 2.0

    @given(st.integers(1, 500), st.floats(0.0, 10.0))
    def test_falls_from_two_towards_one(self, total, decay):
        weights = [phase_weight(step, total, decay) for step in range(total)]
        assert weights[0] == 2.0
        assert all(1.0 <= later <= earlier for earlier, later in zip(weights, weights[1:], strict=False))

    @pytest.mark.parametrize(("step", "total"), [(-1, 10), (0, 0)])
    def test_bad_values(self, step, total):
        with pytest.raises(ValueError, match="at least"):
            phase_weight(step, total, 3.0)


class TestShapedAdvantages:
    def test_hand_worked_values(self):
        # α = 0.4, κ = 2: 0.4·1 = 0.4 is below |±1|/2, 0.4·3 = 1.2 is not; nothing is added to 0
        entropies = torch.tensor([[0.0, 1.0, 3.0]]).expand(3, 3)
        shaped = shaped_advantages(torch.tensor([1.0, -1.0, 0.0]), entropies, 0.4, 2.0)
        expected = [[1.0, 1.4, 1.5], [-1.0, -0.6, -0.5], [0.0, 0.0, 0.0]]
        torch.testing.assert_close(shaped, torch.tensor(expected))

    def test_advantages_of_tokens(self):
        shaped = shaped_advantages(torch.tensor([[2.0, -4.0]]), torch.tensor([[10.0, 1.0]]), 0.4, 2.0)
        torch.testing.assert_close(shaped, torch.tensor([[3.0, -3.6]]))

    def test_no_gradient_flows_into_the_entropy(self):
        entropies = torch.ones(1, 2, requires_grad=True)
        assert not shaped_advantages(torch.ones(1), entropies, 0.4, 2.0).requires_grad

    @given(st.floats(-10, 10), entropy, st.floats(0.0, 5.0), st.floats(1.001, 10.0))
    def test_never_lowers_an_advantage_nor_turns_its_sign(self, advantage, entropies, coef, limit):
        before = torch.tensor([advantage], dtype=torch.float64)
        after = shaped_advantages(before, torch.tensor([[entropies]], dtype=torch.float64), coef, limit)[0]
        assert after >= before
        assert after.sign() == before.sign()
        assert after - before <= before.abs() / limit + 1e-12


class TestReferenceByTurn:
    def test_hand_worked_values_and_gradient(self):
        # Turn 0 has the reference 1 and turn 1 the reference 4; nothing is known of turns 2 and 3.
        turn_ids = torch.tensor([[0, -1, 1, 2], [0, 1, 1, 3]])
        reference = reference_by_turn([1.0, 4.0, None], turn_ids)
        nan = math.nan
        expected = torch.tensor([[1.0, nan, 4.0, nan], [1.0, 4.0, 4.0, nan]])
        torch.testing.assert_close(reference, expected, equal_nan=True)
        entropies = torch.tensor([[3.0, 9.0, 3.0, 9.0], [0.1, 1.0, 9.0, 0.0]], requires_grad=True)
        penalty = smoothing_penalty(entropies, reference, low=0.5, high=2.0)
        penalty.sum().backward()
        torch.testing.assert_close(penalty.detach(), torch.tensor([[1.0, 0, 0, 0], [0.4, 1.0, 1.0, 0]]))
        assert entropies.grad.tolist() == [[1.0, 0.0, 0.0, 0.0], [-1.0, -1.0, 1.0, 0.0]]

    def test_indicator(self):
        reference = torch.tensor([1.0, math.nan, 1.0])
        penalty = smoothing_penalty(torch.tensor([5.0, 5.0, 1.0]), reference, 0.5, 2.0, kind="indicator")
        assert penalty.tolist() == [1.0, 0.0, 0.0]

    @given(st.lists(entropy, min_size=1, max_size=6), st.floats(0.1, 6.0), corridor)
    def test_equal_references_are_one_reference(self, values, reference, bounds):
        entropies = torch.tensor([values])
        by_turn = reference_by_turn([reference] * len(values), torch.arange(len(values))[None])
        of_turns = smoothing_penalty(entropies, by_turn, *bounds)
        torch.testing.assert_close(of_turns, smoothing_penalty(entropies, reference, *bounds))


class TestLinearReference:
    def test_hand_worked_values(self):
        values = [linear_reference(2.0, 0.2, step, 5) for step in range(5)]
        assert values == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])

    def test_beyond_the_run_and_one_step(self):
        assert linear_reference(2.0, 0.2, 9, 5) == pytest.approx(0.4)
        assert linear_reference(2.0, 0.2, 0, 1) == 2.0


class TestCorridorSide:
    @given(entropy, st.floats(0.0, 6.0), corridor)
    def test_it_is_the_slope_of_the_hinge(self, mean, reference, bounds):
        value = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        hinge = smoothing_penalty(value, reference, *bounds)
        hinge.backward()
        slope, bound = corridor_side(mean, reference, *bounds)
        assert slope == value.grad.item()
        assert slope * (mean - bound) == pytest.approx(hinge.item())
