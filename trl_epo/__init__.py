"""Train language-model agents over many turns with entropy-regularized policy optimization (EPO)."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import EPOConfig
    from .envs import TextEnv, check_env
    from .rollouts import Episode, StopReason, Turn
    from .trainer import EPOTrainer

# How often a thread of PyTorch's looks whether the others are done before it gives up its core; libgomp reads this once,
# when PyTorch is loaded. Its own number is so large that one busy core slows all threads tenfold (docs/speed.md, Few cores).
threads_spin = sys.platform == "linux" and os.environ.keys().isdisjoint({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"})
if threads_spin and "torch" not in sys.modules:
    os.environ["GOMP_SPINCOUNT"], threads_spin = "3000", False

__version__ = "0.1.0.dev0"

__all__ = ["EPOConfig", "EPOTrainer", "Episode", "StopReason", "TextEnv", "Turn", "check_env"]

_MODULES = {
    "EPOConfig": ".config",
    "EPOTrainer": ".trainer",
    "Episode": ".rollouts",
    "StopReason": ".rollouts",
    "TextEnv": ".envs",
    "Turn": ".rollouts",
    "check_env": ".envs",
}


def __getattr__(name: str):
    # Imported when first used: an environment in a process of its own needs neither torch nor TRL.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
