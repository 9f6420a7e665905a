"""What a CUDA device says of its memory, what fits into it, and what happens when it is used up."""

import gc

import pytest
import torch
from conftest import make_model
from samplers import Greedy
from transformers import LogitsProcessorList

from trl_epo.sampling import memory
from trl_epo.sampling.cached import CachedTurnSampler


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GIB = 2**30


@pytest.fixture
def limit():
    """Let this process have so many bytes of the device beside what it has; all again in the end."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory

    def set_limit(num_bytes):
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / total)

    yield set_limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def cached_sampler(longest_context):
    torch.manual_seed(0)
    model = make_model(vocab_size=50).to("cuda", torch.bfloat16).eval()
    return CachedTurnSampler(model, [], 0, 1.0, LogitsProcessorList([Greedy()]), longest_context=longest_context)


def played(sampler, num_episodes, num_tokens):
    for episode in range(num_episodes):
        sampler.add(episode, [5 + episode % 40, 6], num_tokens)
    turns = {}
    while sampler.is_busy:
        for episode, turn in sampler.advance():
            turns[episode] = turn.token_ids
            sampler.drop(episode)
    sampler.close()
    return turns


def test_what_is_free():
    device = torch.device("cuda")
    before = memory.free_memory(device)
    taken = torch.empty(GIB, dtype=torch.uint8, device=device)
    assert before - memory.free_memory(device) == pytest.approx(GIB, abs=2**26)
    del taken
    assert memory.free_memory(device) == pytest.approx(before, abs=2**26)  # kept by the allocator, but free


def test_as_many_as_are_said_to_fit(limit, monkeypatch):
    """The longest they can be, all at once, in a device that has no more than they are reckoned with."""
    monkeypatch.setattr(memory, "GIB", 2**20)
    monkeypatch.setattr(memory, "PIECE_BYTES", 2**25)
    sampler = cached_sampler(longest_context=1024)
    room = 2**28
    monkeypatch.setattr("trl_epo.sampling.cached.free_memory", lambda device: room)
    num_episodes = min(sampler.num_fitting(), 256)
    limit(room)
    turns = played(sampler, num_episodes, num_tokens=1000)
    assert len(turns) == num_episodes > 1
    assert sampler.max_episodes >= num_episodes  # none was given up


def test_when_memory_runs_out(limit, caplog):
    calm = played(cached_sampler(longest_context=4096), 64, num_tokens=600)
    limit(2**25)
    short = played(cached_sampler(longest_context=4096), 64, num_tokens=600)
    assert "Out of memory" in caplog.text
    assert short.keys() == calm.keys()
    same = [episode for episode in calm if short[episode] == calm[episode]]
    assert len(same) > 48  # where two tokens are as good, batches of another size may take the other
