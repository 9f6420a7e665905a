"""Generation settings to the distribution that is sampled from."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """The same for histories of unequal length, which begin with a token that is not in the vocabulary."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, vocab_size = scores.shape
        seen = torch.zeros(rows, vocab_size + 1, dtype=torch.bool, device=scores.device)
        seen = seen.scatter_(1, input_ids.clamp(max=vocab_size), True)[:, :vocab_size]
        return torch.where(seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)


class NoRepeatNGram(NoRepeatNGramLogitsProcessor):
    """The same for such histories; nothing of them goes to the host."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        before = self.ngram_size - 1
        num_places = input_ids.size(1) - before
        if num_places <= 0:
            return scores
        rows, vocab_size = scores.shape
        repeats = torch.ones(rows, num_places, dtype=torch.bool, device=scores.device)
        for i in range(before):  # the n-gram at a place begins like the one that would be next
            repeats &= input_ids[:, i : i + num_places] == input_ids[:, num_places + i, None]
        banned = torch.zeros(rows, vocab_size + 1, dtype=torch.bool, device=scores.device)
        banned.scatter_(1, input_ids[:, before:].masked_fill(~repeats, vocab_size).clamp(max=vocab_size), True)
        return scores.masked_fill(banned[:, :vocab_size], -torch.inf)


# Keys of `generation_kwargs` that text episodes honour, in the order in which they act.
PROCESSORS = {
    "repetition_penalty": RepetitionPenalty,
    "no_repeat_ngram_size": NoRepeatNGram,
    "bad_words_ids": NoBadWordsLogitsProcessor,
    "suppress_tokens": SuppressTokensLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}

NEUTRAL = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}

# These are given what has been read of each row with the last tokens below each other; before a shorter one is a token that is not
# in the vocabulary ([`EpisodeCache.history`]).
READS_HISTORY = (RepetitionPenalty, NoRepeatNGram, NoBadWordsLogitsProcessor)


def make_logits_processors(device: torch.device | str = "cpu", **settings: Any) -> LogitsProcessorList:
    """
    The sampling distribution that generation settings ask for; a neutral value or `None` adds nothing.

    Args:
        device (`torch.device`): Where the logits are.
        settings: Values by name, the names being keys of `PROCESSORS`.

    Raises:
        ValueError: If a name is not one of them.
    """
    if unknown := settings.keys() - PROCESSORS.keys():
        raise ValueError(
            f"Text episodes cannot honour the generation settings {sorted(unknown)}. They sample with "
            f"{', '.join(PROCESSORS)}."
        )
    processors = LogitsProcessorList()
    for name, make in PROCESSORS.items():
        value = settings.get(name)
        if value is None or value == NEUTRAL.get(name):
            continue
        value = float(value) if isinstance(NEUTRAL.get(name), float) else value
        takes_device = "device" in inspect.signature(make).parameters
        processors.append(make(value, device=str(device)) if takes_device else make(value))
    return processors
