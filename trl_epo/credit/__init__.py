"""
Rewards to advantages.

In: episodes with their rewards. Out: an advantage for each action token, (B, T), and the critic's loss.
Imports: runs (sharded critics), rollouts, entropy, config, batches. Open first: `advantages.py`, the estimators as pure
functions; `assigner.py` applies them to batches, `critic.py` is PPO's.
"""

from .advantages import gae, rewards_at_turn_ends
from .assigner import CreditAssigner
from .critic import Critic, TrainCritic, make_critic


__all__ = ["CreditAssigner", "Critic", "TrainCritic", "gae", "make_critic", "rewards_at_turn_ends"]
