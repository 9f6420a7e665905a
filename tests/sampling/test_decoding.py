"""The step from token to token: its buffers, what it asks of a device, and histories on the device."""

from pathlib import Path

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from samplers import Greedy, in_buckets, sampler
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from trl_epo.sampling import cached, decoding
from trl_epo.sampling.cached import CachedTurnSampler
from trl_epo.sampling.decoding import NUMBERS, DecodeStep
from trl_epo.sampling.kv_cache import EpisodeCache, bucket
from trl_epo.sampling.processors import make_logits_processors


@pytest.fixture
def model():
    return make_model(vocab_size=50).eval()


@pytest.fixture
def steps(monkeypatch):
    """Each step: rows and columns of its forward and of the buffers, and where these are."""
    seen, usual = [], DecodeStep.__call__

    def call(step):
        results = usual(step)
        cache = step.cache
        buffers = [step.ids, step.columns, step.places, step._numbers]
        masks = list(step._mask_buffers.values())
        assert all(mask.is_floating_point() for mask in masks)  # or each layer would make one
        seen.append(
            {
                "forward": (results.size(1), cache.extent),
                "capacity": (cache.row_capacity, cache.column_capacity),
                "by_row": [buffer.data_ptr() for buffer in buffers],
                "by_row_and_column": [*cache.addresses, *(mask.data_ptr() for mask in masks)],
            }
        )
        return results

    monkeypatch.setattr(DecodeStep, "__call__", call)
    return seen


def played(sampler, limits):
    """One turn of so many tokens at most of each episode, each its own prompt; transcripts and log-probs."""
    prompts = [[3 + episode % 40, 4 + episode // 40] for episode in range(len(limits))]
    for episode, limit in enumerate(limits):
        sampler.add(episode, prompts[episode], limit)
    turns = {}
    while sampler.is_busy:
        for episode, turn in sampler.advance():
            turns[episode] = prompts[episode] + turn.token_ids, turn.logprobs
            sampler.drop(episode)
    return turns


@pytest.mark.parametrize("buckets", [True, False])
def test_four_thousand_tokens_while_rows_shrink_from_64_to_1(model, steps, buckets):
    limits = [1 + episode * episode // 21 for episode in range(63)] + [4100 if buckets else 190]
    with in_buckets(buckets):
        turns = played(CachedTurnSampler(model, [], 0, 1.0, LogitsProcessorList([Greedy()])), limits)
    assert sum(limits) > 4000
    with torch.no_grad():
        for transcript, logprobs in turns.values():
            expected = model(torch.tensor([transcript[:-1]])).logits[0, 1:].log_softmax(dim=-1)
            assert expected.argmax(dim=-1).tolist() == transcript[2:]
            assert expected.amax(dim=-1).tolist() == pytest.approx(logprobs, abs=1e-4)
    forwards = {step["forward"] for step in steps}
    if not buckets:
        assert {rows for rows, _ in forwards} >= {1, 2, 3, 5, 7}
        assert {columns for _, columns in forwards} == set(range(4, 2 + max(limits) + 1))
        return
    assert {rows for rows, _ in forwards} == {64, 32, 16, 8, 4, 2, 1}
    assert {columns for _, columns in forwards} == {2**power for power in range(6, 14)}
    for before, after in zip(steps, steps[1:], strict=False):
        if before["capacity"][0] == after["capacity"][0]:
            assert before["by_row"] == after["by_row"]
        if before["capacity"] == after["capacity"]:
            assert before["by_row_and_column"] == after["by_row_and_column"]


def test_buckets():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [bucket(size, cpu) for size in (0, 1, 5, 64)] == [0, 1, 5, 64]
    assert [bucket(size, cuda) for size in (0, 1, 2, 3, 5, 64, 65)] == [0, 1, 2, 4, 8, 64, 128]
    assert [bucket(size, cuda, 48) for size in (17, 33, 48, 49)] == [32, 48, 48, 49]


def test_buffers_do_not_outgrow_what_fits(model):
    with in_buckets():
        fitting = sampler(model, make_logits_processors(), longest_context=90)
        fitting.hold_at_most(5)
        played(fitting, [80] * 12)
        assert fitting._cache.column_capacity == 128  # 91, rounded up
        seen = EpisodeCache(1, torch.device("cpu"), 200)
        assert [seen.room(extent) for extent in (3, 65, 130, 201)] == [64, 128, 256, 256]
        seen.resize(5, 5)
        assert seen.row_capacity == seen.padded_rows == 5


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 5}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 3}, {"bad_words_ids": [[5, 6]]}],
)
@pytest.mark.parametrize("buckets", [True, False])
def test_a_token_asks_the_device_for_one_wait_and_no_copy(model, settings, buckets, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmarks")
    from decode_ops import counts_of

    with in_buckets(buckets):
        few, many = (counts_of(model, 5, tokens, False, settings) for tokens in (10, 40))
    assert many["operations"] > few["operations"]
    assert many["copies"] == few["copies"]
    assert many["waits"] - few["waits"] == 30


@pytest.mark.parametrize("buckets", [True, False])
def test_random_numbers_are_an_episodes_own(model, buckets, monkeypatch):
    # Long turns use up what the device was given; which tokens those are depends on the episode alone.
    def texts(limits):
        torch.manual_seed(3)
        return played(CachedTurnSampler(model, [], 0, 1.0, make_logits_processors()), limits)

    with in_buckets(buckets):
        together, alone = texts([2 * NUMBERS + 7, 11, NUMBERS, 30]), texts([2 * NUMBERS + 7])
        assert together[0][0] == alone[0][0]
        for module in (cached, decoding):
            monkeypatch.setattr(module, "NUMBERS", 1)  # each brought there by itself
        assert texts([2 * NUMBERS + 7]) == alone


def test_a_forward_that_is_repeated_changes_nothing(model, monkeypatch):
    # As it is before a CUDA graph is recorded and when it is replayed.
    def texts():
        torch.manual_seed(3)
        return played(
            CachedTurnSampler(model, [], 0, 1.0, make_logits_processors(repetition_penalty=1.1)), [9, 70, 40]
        )

    with in_buckets():
        expected = texts()
        monkeypatch.setattr(DecodeStep, "_logits", lambda step: [step._forward() for _ in range(3)][-1])
        assert texts() == expected


tokens = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@given(histories=st.lists(tokens, min_size=1, max_size=4), size=st.integers(1, 4), more=st.integers(0, 3))
def test_histories_of_unequal_length_equal_transformers_processors_on_each(histories, size, more):
    width = max(map(len, histories)) + more
    cache = EpisodeCache(1, torch.device("cpu"), keeps_tokens=True)
    cache.resize(len(histories))
    cache.room(width + 1)
    cache.tokens.fill_(3)  # what others have left
    for row, history in enumerate(histories):
        cache.tokens[row, 1 : len(history) + 1] = torch.tensor(history)
    rows = torch.arange(len(histories)).flip(0)
    lengths = torch.tensor([[len(history)] for history in reversed(histories)])
    scores = torch.linspace(-1, 1, 6).repeat(len(histories), 1)
    given = cache.history(rows, lengths, width, filler=6)
    for mine, theirs in (
        (make_logits_processors(repetition_penalty=1.5), RepetitionPenaltyLogitsProcessor(1.5)),
        (make_logits_processors(no_repeat_ngram_size=size), NoRepeatNGramLogitsProcessor(size)),
        (make_logits_processors(bad_words_ids=[[1], [2, 3], [0, 0, 4]]), None),
    ):
        theirs = theirs or mine[0]
        expected = [theirs(torch.tensor([h]), scores[:1].clone()) for h in reversed(histories)]
        torch.testing.assert_close(mine(given, scores.clone()), torch.cat(expected), rtol=0, atol=0)
