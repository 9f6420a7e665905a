import json

from hypothesis import given
from hypothesis import strategies as st

from trl_epo.history import EntropyHistory


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
