"""Generation settings to the distribution that is sampled from."""

import inspect
from typing import Any

import torch
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


# Keys of `generation_kwargs` that text episodes honour, in the order in which they act.
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
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

READS_HISTORY = (RepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor, NoBadWordsLogitsProcessor)


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
