"""
The paper (arXiv 2509.22576): the entropy term.

In: token entropies with gradient, (B, T), turn ids. Out: −λ·(L_H − β_k·L_smooth), and the history W_k that it is measured against.
Imports: config, batches. Open first: `objective.py`, the equations as pure functions; then `history.py` and `term.py`.
"""

from .history import EntropyHistory
from .objective import cut_share, token_mean, turn_ids_from_mask
from .term import EntropyTerm, Moment


__all__ = ["EntropyHistory", "EntropyTerm", "Moment", "cut_share", "token_mean", "turn_ids_from_mask"]
