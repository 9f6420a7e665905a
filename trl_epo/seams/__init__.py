"""
TRL's trainer, with its private names turned into methods of ours.

In: what `GRPOTrainer` does, version by version. Out: `SeamedGRPOTrainer`, which `EPOTrainer` extends, and the check of what a new TRL
has changed (`python -m trl_epo.seams`). Every private name of TRL and of transformers' `Trainer` is in here and nowhere else.
Imports: every wing below. Open first: `trl.py`, which extends `sampling.py` (turns of episodes), which extends `checkpoints.py`
(faults and checkpoints), which extends `hub.py` (pushes).
"""

from .replacing import replaced
from .trl import SeamedGRPOTrainer, head_tiles


__all__ = ["SeamedGRPOTrainer", "head_tiles", "replaced"]
