"""
Rows of tokens.

In: padded rows with their masks. Out: which tokens carry loss, which rows share a forward, log-probs and entropies of action tokens.
Imports: nothing of this package. Open first: `batching.py`, then `scoring.py`.
"""

from .batching import action_mask, length_groups, sum_dtype
from .scoring import Run, equal_number_of_forwards, in_forwards, keep_only, lay_out_contexts, score_tokens


__all__ = [
    "Run",
    "action_mask",
    "equal_number_of_forwards",
    "in_forwards",
    "keep_only",
    "lay_out_contexts",
    "length_groups",
    "score_tokens",
    "sum_dtype",
]
