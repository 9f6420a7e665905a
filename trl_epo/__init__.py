"""Train language-model agents over many turns with entropy-regularized policy optimization (EPO)."""

from .config import EPOConfig
from .envs import check_env
from .trainer import EPOTrainer


__version__ = "0.1.0.dev0"

__all__ = ["EPOConfig", "EPOTrainer", "check_env"]
