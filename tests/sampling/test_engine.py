"""Turns in an engine that goes on with some while others come and go. With vLLM's: `test_vllm_engine.py`."""

import threading
from itertools import count

import pytest
import torch
from conftest import Corridor, make_model
from engines import StepEngine
from samplers import EOS

from trl_epo.rollouts import ChatEncoder, ContextRules, EnvironmentPool, EpisodeStart, Limits, play_episodes
from trl_epo.sampling import EngineTurnSampler
from trl_epo.sampling.engine import MAX_TRIES, SPARE_STEPS


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


def finish(sampler):
    samples = {}
    while sampler.is_busy:
        samples.update(sampler.advance())
    return samples


def play(tokenizer, sampler, wait=lambda number: None, over=lambda: None, num=4, turns=3):
    """Episodes in one corridor; the environment that is made as number so calls `wait` in each step, `over` at its end."""
    numbers = count()

    class Noted(Corridor):
        def __init__(self):
            super().__init__(length=99, turns=turns)
            self.number = next(numbers)

        def step(self, action):
            wait(self.number)
            answer = super().step(action)
            if answer[3]:
                over()
            return answer

    chat = ChatEncoder(tokenizer, [EOS])
    rules = ContextRules(chat, max_length=500, max_turn_length=6)
    starts = [EpisodeStart([], seed=3, options={}) for _ in range(num)]
    limits = Limits(max_turns=turns, max_turn_length=6, patience=60.0)
    return play_episodes(starts, EnvironmentPool(Noted), rules, sampler, limits)


def test_nobody_waits_for_the_slowest_and_episodes_are_the_same(model, tokenizer):
    num_over, others_are_over, waited = count(1), threading.Event(), []

    def over():
        if next(num_over) == 3:
            others_are_over.set()

    def wait(number):
        if number == 1:
            waited.append(others_are_over.wait(30))

    played = []
    for calls in ({}, {"wait": wait, "over": over}):
        torch.manual_seed(4)
        engine = StepEngine(model)
        episodes = play(tokenizer, EngineTurnSampler(engine), **calls)
        played.append([[(turn.action_ids, turn.logprobs) for turn in episode.turns] for episode in episodes])
    assert waited == [True] * 3
    assert sum(episode.num_late_answers for episode in episodes) == 0
    assert played[0] == played[1]
    assert len({turns[0][0] for turns in played[0]}) > 1  # episodes of one prompt have random numbers of their own


def test_each_turn_goes_on_from_the_transcript(model):
    engine = StepEngine(model)
    sampler = EngineTurnSampler(engine)
    sampler.add(0, [5, 6], 4)
    first = finish(sampler)[0].token_ids
    sampler.add(0, [7], 3)
    second = finish(sampler)[0].token_ids
    sampler.rewind(0, 2)
    sampler.add(0, [8], 2)
    finish(sampler)
    assert [request[:2] for request in engine.requests] == [
        ([5, 6], 4),
        ([5, 6, *first, 7], 3),
        ([5, 6, 8], 2),
    ]
    assert len(second) <= 3
    assert len({seed for *_, seed in engine.requests}) == 3


def test_an_episode_that_is_played_again_has_other_random_numbers(model):
    torch.manual_seed(0)
    engine = StepEngine(model)
    sampler = EngineTurnSampler(engine)
    for _ in range(2):
        sampler.add(0, [5, 6], 4)
        finish(sampler)
        sampler.drop(0)
    (first, _, one), (second, _, other) = engine.requests
    assert first == second == [5, 6]
    assert one != other


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_is_given_up_is_made_again_and_samples_the_same(model, reason, caplog):
    samples = []
    for lost in (lambda number: None, lambda number: reason if number < MAX_TRIES - 1 else None):
        torch.manual_seed(0)
        sampler = EngineTurnSampler(StepEngine(model, lost))
        sampler.add(0, [5, 6], 8)
        samples.append(finish(sampler)[0])
    assert samples[0] == samples[1]
    assert caplog.text.count(f"a request of 2 tokens ({reason})") == MAX_TRIES - 1


def test_a_request_that_is_given_up_again_and_again_is_an_error(model):
    sampler = EngineTurnSampler(StepEngine(model, lambda number: "abort"))
    sampler.add(0, [5, 6], 8)
    with pytest.raises(RuntimeError, match=rf"request of 2 tokens {MAX_TRIES} times \(abort\)"):
        finish(sampler)


def test_a_request_that_the_engine_forgets_is_made_again(model):
    engine = StepEngine(model)
    sampler = EngineTurnSampler(engine)
    sampler.add(0, [5, 6], 8)
    sampler.add(1, [5, 7], 8)
    engine.abort(["0"])
    samples = finish(sampler)
    assert set(samples) == {0, 1}
    assert engine.requests[2] == engine.requests[0]


def test_an_engine_that_only_seems_to_work_is_an_error(model):
    class Stuck(StepEngine):
        def step(self):
            return []

    sampler = EngineTurnSampler(Stuck(model))
    sampler.add(0, [5, 6], 8)
    with pytest.raises(RuntimeError, match=f"{10 + SPARE_STEPS + 1} steps .* no more than 10 tokens"):
        finish(sampler)


def test_an_engine_that_fails_ends_the_rollout_and_keeps_nothing(model, tokenizer):
    class Broken(StepEngine):
        def step(self):
            if len(self.num_running) == 5:
                raise ValueError("out of order")
            return super().step()

    engine = Broken(model)
    sampler = EngineTurnSampler(engine)
    with pytest.raises(ValueError, match="out of order"):
        play(tokenizer, sampler)
    assert engine.running
    sampler.close()
    assert not engine.running and not sampler.is_busy


def test_answers_to_others_are_left_alone(model):
    engine = StepEngine(model)
    engine.add([5], 1, 0)
    sampler = EngineTurnSampler(engine)
    sampler.add(0, [5, 6], 3)
    assert list(finish(sampler)) == [0]
