"""The sampler with a cache across turns against the plain forward over the whole transcript."""

import pytest
import torch
from conftest import make_model
from transformers import Gemma2Config, LlamaConfig, LogitsProcessorList, MistralConfig, Qwen2Config

from trl_epo.generation import (
    CachedTurnSampler,
    RequestTurnSampler,
    fits_cached_sampler,
    make_logits_processors,
)


EOS, PAD = 2, 0


class Greedy:
    """Makes sampling deterministic: all probability on the best token."""

    def __call__(self, history, scores):
        return torch.full_like(scores, -float("inf")).scatter(1, scores.argmax(dim=1, keepdim=True), 0.0)


@pytest.fixture
def model():
    return make_model(vocab_size=50).eval()


def sampler(model, processors):
    return CachedTurnSampler(model, [EOS], PAD, temperature=1.0, processors=processors)


def reference_turn(model, transcript, limit):
    """Greedy decoding that reads the whole transcript for each token."""
    ids, logprobs = [], []
    while len(ids) < limit and (not ids or ids[-1] != EOS):
        with torch.no_grad():
            scores = model(torch.tensor([transcript + ids])).logits[0, -1].log_softmax(dim=-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return ids, logprobs


def test_equals_reading_the_transcript_again_each_turn(model):
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randint(3, 50, (length,), generator=generator).tolist()

    num_turns = [12, 5, 9, 1]  # ragged: episodes end at different times
    prompts = [draw(length) for length in (7, 3, 11, 5)]
    transcripts = [list(prompt) for prompt in prompts]
    cached = sampler(model, LogitsProcessorList([Greedy()]))
    cached.start(prompts)
    worst = 0.0
    for turn in range(max(num_turns)):
        active = [episode for episode in range(4) if turn < num_turns[episode]]
        new_ids = [draw(2 + (episode + turn) % 5) if turn else [] for episode in active]
        limits = [3 + (episode * turn) % 4 for episode in active]
        samples = cached.sample(active, new_ids, limits)
        for episode, ids, limit, sample in zip(active, new_ids, limits, samples, strict=True):
            transcripts[episode] += ids
            expected_ids, expected_logprobs = reference_turn(model, transcripts[episode], limit)
            assert sample.token_ids == expected_ids
            worst = max(worst, *(abs(a - b) for a, b in zip(sample.logprobs, expected_logprobs, strict=True)))
            transcripts[episode] += expected_ids
    assert worst < 1e-4


def test_samples_from_the_models_distribution(model):
    cached = sampler(model, make_logits_processors(1.0, 1.0, 0, None, 1.0))
    torch.manual_seed(0)
    prompt = [5, 6, 7]
    cached.start([prompt] * 4000)
    samples = cached.sample(range(4000), [[]] * 4000, [1] * 4000)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0, -1].log_softmax(dim=-1)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=50)
    torch.testing.assert_close(counts / 4000, logprobs.exp(), atol=0.015, rtol=0.0)
    for s in samples[:20]:
        assert s.logprobs[0] == pytest.approx(float(logprobs[s.token_ids[0]]), abs=1e-5)


def test_temperature_scales_the_logprobs(model):
    processors = make_logits_processors(0.5, 1.0, 0, None, 1.0)
    cached = CachedTurnSampler(model, [EOS], PAD, temperature=0.5, processors=processors)
    cached.start([[5, 6, 7]])
    (drawn,) = cached.sample([0], [[]], [1])
    with torch.no_grad():
        logprobs = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5).log_softmax(dim=-1)
    assert drawn.logprobs[0] == pytest.approx(float(logprobs[drawn.token_ids[0]]), abs=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "allowed"),
    [({"top_k": 3}, 3), ({"top_p": 1e-6}, 1), ({"min_p": 1.0}, 1)],
)
def test_top_k_top_p_min_p_restrict_the_choice(model, kwargs, allowed):
    settings = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, **kwargs}
    cached = sampler(model, make_logits_processors(1.0, **settings))
    cached.start([[5, 6, 7]] * 200)
    seen = {s.token_ids[0] for s in cached.sample(range(200), [[]] * 200, [1] * 200)}
    with torch.no_grad():
        best = model(torch.tensor([[5, 6, 7]])).logits[0, -1].topk(allowed).indices.tolist()
    assert seen <= set(best)


def test_repetition_penalty_sees_the_episodes_own_tokens_only(model):
    # A huge penalty forbids every token of the episode; padding must forbid nothing in the shorter one.
    prompts = [list(range(3, 48)), [4]]
    processors = make_logits_processors(1.0, 1.0, 0, None, 1e6)
    cached = sampler(model, LogitsProcessorList([*processors, Greedy()]))
    cached.start(prompts)
    long, short = cached.sample([0, 1], [[], []], [1, 6])
    assert long.token_ids[0] not in prompts[0]
    assert len(set(short.token_ids)) == len(short.token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[4]])).logits[0, -1]
    logits[4] = torch.where(logits[4] < 0, logits[4] * 1e6, logits[4] / 1e6)
    assert short.token_ids[0] == int(logits.argmax())


def test_same_seed_same_samples(model):
    def play():
        torch.manual_seed(3)
        cached = sampler(model, make_logits_processors(1.0, 1.0, 0, None, 1.0))
        cached.start([[5, 6], [7]])
        return [cached.sample([0, 1], [[], []], [5, 5]), cached.sample([1], [[9, 9]], [5])]

    assert play() == play()


def test_temperature_may_be_a_whole_number(model):
    cached = sampler(model, make_logits_processors(1, 1.0, 0, None, 1.0))
    cached.start([[5, 6]])
    assert len(cached.sample([0], [[]], [2])[0].token_ids) <= 2


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (LlamaConfig(), True),
        (MistralConfig(sliding_window=8), False),
        (MistralConfig(sliding_window=None), True),
        (Qwen2Config(sliding_window=8, use_sliding_window=False), True),
        (Gemma2Config(), False),
    ],
)
def test_models_whose_layers_do_not_see_the_whole_context_do_not_fit(config, fits):
    assert fits_cached_sampler(config) == fits


@pytest.mark.parametrize("answer", [[[1], []], [[1]]])
def test_backend_that_loses_a_request(answer):
    requests = RequestTurnSampler(lambda prompts, limit: (answer, None))
    requests.start([[1], [2]])
    with pytest.raises(RuntimeError, match="answered 2 prompts"):
        requests.sample([0, 1], [[], []], [3, 3])


def test_requests_carry_the_whole_transcript():
    asked = []

    def generate(prompts, max_new_tokens):
        asked.append((prompts, max_new_tokens))
        return [[10, 11, 12]] * len(prompts), None

    requests = RequestTurnSampler(generate)
    requests.start([[1], [2]])
    samples = requests.sample([0, 1], [[], []], [3, 2])
    assert [s.token_ids for s in samples] == [[10, 11, 12], [10, 11]]  # the second is cut to its own limit
    requests.sample([1], [[5]], [3])
    assert asked[1][0] == [[2, 10, 11, 5]]
