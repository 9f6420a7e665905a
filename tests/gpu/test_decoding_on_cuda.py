"""What only a GPU can show of the sampler with a cache: its results, memory, waits and graphs."""

import random
import warnings

import pytest
import torch
from conftest import make_model
from samplers import Greedy
from transformers import LogitsProcessorList

from trl_epo.sampling import decoding
from trl_epo.sampling.cached import CachedTurnSampler
from trl_epo.sampling.decoding import DecodeStep
from trl_epo.sampling.kv_cache import EpisodeCache
from trl_epo.sampling.memory import LOGIT_BYTES
from trl_epo.sampling.processors import make_logits_processors


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LIMITS = [1 + episode * episode // 4 for episode in range(16)]


@pytest.fixture
def model():
    return make_model(vocab_size=50).to("cuda", torch.bfloat16).eval()


def played(model, processors, limits=LIMITS, num_turns=3):
    """Turns of so many tokens at most of each episode: transcripts, which of their tokens were sampled, and log-probs."""
    torch.manual_seed(0)
    cached = CachedTurnSampler(model, [], 0, 1.0, processors, longest_context=1024)
    rng = random.Random(1)
    transcripts = {episode: [] for episode in range(len(limits))}
    sampled = {episode: [] for episode in transcripts}
    logprobs = {episode: [] for episode in transcripts}
    turns_left = dict.fromkeys(transcripts, num_turns)

    def ask(episode):
        new = rng.choices(range(3, 50), k=rng.randint(2, 30))
        transcripts[episode] += new
        cached.add(episode, new, limits[episode])

    for episode in transcripts:
        ask(episode)
    while cached.is_busy:
        for episode, turn in cached.advance():
            sampled[episode] += range(len(transcripts[episode]), len(transcripts[episode]) + len(turn.token_ids))
            transcripts[episode] += turn.token_ids
            logprobs[episode] += turn.logprobs
            turns_left[episode] -= 1
            if turns_left[episode]:
                ask(episode)
            else:
                cached.drop(episode)
    cached.close()
    return transcripts, sampled, logprobs


def test_in_bfloat16_as_on_the_plain_path(model):
    transcripts, sampled, logprobs = played(model, LogitsProcessorList([Greedy()]))
    for episode, transcript in transcripts.items():
        with torch.no_grad():
            expected = model(torch.tensor([transcript], device="cuda")).logits[0].float().log_softmax(dim=-1)
        places = torch.tensor(sampled[episode])
        drawn = torch.tensor(transcript)[places]
        expected = expected[places - 1].cpu()
        mine = torch.tensor(logprobs[episode])
        torch.testing.assert_close(mine, expected[torch.arange(len(drawn)), drawn], atol=0.1, rtol=0.0)
        assert (expected.amax(dim=-1) - mine).max() < 0.1  # where two are as good either may be the best


def test_twice_the_same(model):
    processors = make_logits_processors("cuda", top_p=0.9, repetition_penalty=1.1)
    assert played(model, processors) == played(model, processors)


def test_peak_memory(model, monkeypatch):
    capacities = []
    refit = EpisodeCache._refit

    def noted(cache):
        refit(cache)
        capacities.append(cache.row_capacity * cache.column_capacity)

    monkeypatch.setattr(EpisodeCache, "_refit", noted)
    played(model, make_logits_processors("cuda"))  # what libraries take once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    played(model, make_logits_processors("cuda"))
    config = model.config
    token = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2  # in one layer
    cache = max(capacities) * token * (config.num_hidden_layers + 1)  # one layer twice, while it grows
    reading = 16 * 1024 * (4 * config.hidden_size + 3 * config.intermediate_size) * 2 + 16 * 1024 * 32 * 8
    assert torch.cuda.max_memory_allocated() - before < cache + 16 * 50 * LOGIT_BYTES + reading + 2**23


def test_a_token_waits_once(model):
    cached = CachedTurnSampler(model, [], 0, 1.0, make_logits_processors("cuda", top_k=5))
    for episode in range(5):
        cached.add(episode, [5, 6 + episode], 40)
    waits, step = [], DecodeStep.__call__

    def counted(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return step(self)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits.append([str(warning.message) for warning in caught if "synchron" in str(warning.message)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeStep, "__call__", counted)
        while cached.is_busy:
            cached.advance()
    assert len(waits) == 39
    assert not any(waits)  # the one wait is for what a step returns


def test_a_recorded_forward_equals_the_usual_one(model, monkeypatch):
    processors = make_logits_processors("cuda")
    expected = played(model, processors)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    monkeypatch.setattr(decoding, "CAPTURES_GRAPHS", True)
    assert played(model, processors) == expected
    assert len(replays) > 3 * len(set(map(id, replays)))  # recorded once, replayed often
