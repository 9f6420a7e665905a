"""Samplers for tests, and what they are compared with."""

import math
from contextlib import contextmanager

import pytest
import torch

from trl_epo.sampling import kv_cache
from trl_epo.sampling.cached import CachedTurnSampler
from trl_epo.sampling.kv_cache import _Layer
from trl_epo.sampling.turns import Sample


EOS, PAD = 2, 0


class Greedy:
    """Makes sampling deterministic: all probability on the best token."""

    def __call__(self, history, scores):
        return torch.full_like(scores, -float("inf")).scatter(1, scores.argmax(dim=1, keepdim=True), 0.0)


def sampler(model, processors, temperature=1.0, **kwargs):
    return CachedTurnSampler(model, [EOS], PAD, temperature=temperature, processors=processors, **kwargs)


@contextmanager
def in_buckets(forced=True):
    """While this context lasts, a CPU's forwards have as many rows and columns as a GPU's."""
    with pytest.MonkeyPatch.context() as patch:
        if forced:
            patch.setattr(kv_cache, "EXACT_DEVICES", frozenset())
        yield


def refuse_caches(monkeypatch, max_cells):
    """Have an allocator refuse caches of more rows times columns; the list of these."""
    refused, fitted = [], _Layer._fitted

    def refuse(layer, old, like):
        size = layer.cache.row_capacity, layer.cache.column_capacity
        if math.prod(size) > max_cells:
            refused.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return fitted(layer, old, like)

    monkeypatch.setattr(_Layer, "_fitted", refuse)
    return refused


def reference_turn(model, transcript, limit):
    """Greedy decoding that reads the whole transcript for each token."""
    ids, logprobs = [], []
    while len(ids) < limit and (not ids or ids[-1] != EOS):
        with torch.no_grad():
            scores = model(torch.tensor([transcript + ids])).logits[0, -1].log_softmax(dim=-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return ids, logprobs


class ScriptedSampler:
    """Says the same texts in each episode, one per turn; as many tokens as the limit lets through."""

    wants_turns = waits_for_turns = True
    max_episodes = math.inf

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, texts
        self.num_turns = {}
        self.asked = {}
        self.batches = []  # the episodes of each `advance`
        self.dropped = []

    @property
    def is_busy(self):
        return bool(self.asked)

    def add(self, episode, new_ids, max_new_tokens):
        self.asked[episode] = max_new_tokens

    def drop(self, episode):
        self.dropped.append(episode)

    def advance(self):
        asked, self.asked = self.asked, {}
        self.batches.append(list(asked))
        finished = []
        for episode, limit in asked.items():
            turn = self.num_turns[episode] = self.num_turns.get(episode, -1) + 1
            text = self.texts[turn % len(self.texts)]
            ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id][:limit]
            finished.append((episode, Sample(ids, [-0.5] * len(ids))))
        return finished
