import json

from hypothesis import given
from hypothesis import strategies as st

from trl_epo.entropy.history import EntropyHistory


def test_hand_worked():
    history = EntropyHistory()
    history.begin_step()
    assert history.step == 0
    assert history.reference is None  # k = 0: nothing to smooth against
    history.observe(6.0, 3)
    history.observe(2.0, 1)
    assert history.reference is None  # a step is never its own reference
    history.begin_step()
    assert history.means == [2.0]  # (6 + 2) / 4: tokens count, not parts
    history.observe(4.0, 1)
    history.begin_step()
    assert history.step == 2
    assert history.means == [2.0, 4.0]
    assert history.reference == 3.0  # steps count, not tokens


def test_step_without_tokens_leaves_no_mean_but_counts():
    history = EntropyHistory()
    history.begin_step()
    history.begin_step()
    assert (history.step, history.means, history.reference) == (1, [], None)


steps = st.lists(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=3), max_size=6)


@given(before=steps, after=steps)
def test_saved_and_restored_in_the_middle_equals_no_interruption(before, after):
    def play(history, parts):
        for part in parts:
            history.begin_step()
            for entropy_sum, token_count in part:
                history.observe(entropy_sum, token_count)

    whole, first, second = EntropyHistory(), EntropyHistory(), EntropyHistory()
    play(whole, before + after)
    play(first, before)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    play(second, after)
    assert second.state_dict() == whole.state_dict()


def test_turns_hand_worked():
    history = EntropyHistory()
    history.begin_step()
    history.observe_turns([2.0, 3.0], [1, 3])
    history.observe_turns([4.0], [2])  # another part of the batch, whose episodes end after one turn
    assert history.turn_references == []
    history.begin_step()
    assert history.turn_references == [2.0, 1.0]  # (2 + 4) / (1 + 2) and 3 / 3
    history.observe_turns([5.0, 0.0, 0.0, 8.0], [1, 0, 0, 2])
    history.begin_step()
    # The mean over the steps that reached the turn: turn 1 in the first only, turn 3 in the second, turn 2 in none
    assert history.turn_references == [3.5, 1.0, None, 4.0]
    history.begin_step()
    assert history.turn_references == [3.5, 1.0, None, 4.0]


def test_aggregates_hand_worked():
    history = EntropyHistory()
    history.begin_step()
    history.observe_aggregate(3.0, 2)
    history.observe_aggregate(1.0, 2)
    assert history.aggregate_reference is None
    history.begin_step()
    history.begin_step()  # a step without episodes
    assert (history.aggregates, history.aggregate_reference) == ([1.0], 1.0)


def test_latest_is_the_last_optimizer_step_that_had_episodes():
    history = EntropyHistory()
    history.observe_optimizer_step(3.0, 2, ends=False)
    assert history.latest is None
    history.observe_optimizer_step(1.0, 2, ends=True)
    assert history.latest == 1.0
    history.observe_optimizer_step(5.0, 1, ends=True)
    assert history.latest == 5.0
    history.observe_optimizer_step(0.0, 0, ends=True)
    assert history.latest == 5.0


totals = st.tuples(st.floats(0, 100), st.integers(0, 50))
parts = st.lists(st.tuples(totals, st.lists(totals, max_size=4), st.booleans()), max_size=3)


@given(before=st.lists(parts, max_size=4), after=st.lists(parts, max_size=4))
def test_saved_and_restored_in_the_middle_with_turns_and_optimizer_steps(before, after):
    def play(history, steps):
        for step in steps:
            history.begin_step()
            for (total, count), turns, ends in step:
                history.observe_aggregate(total, count)
                history.observe_optimizer_step(total, count, ends)
                history.observe_turns([turn[0] for turn in turns], [turn[1] for turn in turns])

    whole, first, second = EntropyHistory(), EntropyHistory(), EntropyHistory()
    play(whole, before + after)
    play(first, before)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    play(second, after)
    assert second.state_dict() == whole.state_dict()
    assert second.turn_references == whole.turn_references
