"""
Tokens of turns.

In: a model and the tokens that it is to read. Out: a turn's sampled tokens and their log-probs. Knows no episode and no environment.
Imports: batches. Open first: `turns.py`, what a sampler is; `cached.py` keeps keys and values over turns, `decoding.py` goes from
one sampled token to the next, `engine.py` gives turns to an engine that is at work (vLLM), `requests.py` asks for a wave of turns
and waits for all, `memory.py` says what may be in memory at once.
"""

from .cached import CachedTurnSampler, masked_attention, unfit_for_cached_sampler
from .engine import Answer, EngineTurnSampler
from .memory import Footprint
from .processors import make_logits_processors
from .requests import RequestTurnSampler
from .turns import Sample, TurnSampler


__all__ = [
    "Answer",
    "CachedTurnSampler",
    "EngineTurnSampler",
    "Footprint",
    "RequestTurnSampler",
    "Sample",
    "TurnSampler",
    "make_logits_processors",
    "masked_attention",
    "unfit_for_cached_sampler",
]
