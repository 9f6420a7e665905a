"""
What a run tells.

In: summaries of episodes, the log. Out: metrics, panels with intervals, the paper's Succ. and Succ.*, model card, curves, the page to look at a run, and what
is wrong with it (`diagnosis.py`).
Imports: rollouts and what is below. Open first: `metrics.py`. Each name is imported when it is first used, so that a report that
needs no torch loads none.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .diagnosis import Diagnosis
    from .evaluation import (
        enough_played,
        evaluation_metrics,
        failed_share,
        mean_success,
        run_success,
        success_interval,
    )
    from .metrics import episode_metrics
    from .model_card import PAPER, complete_model_card
    from .plots import plot_training
    from .viewer import write_viewer

__all__ = [
    "PAPER",
    "Diagnosis",
    "complete_model_card",
    "enough_played",
    "episode_metrics",
    "evaluation_metrics",
    "failed_share",
    "mean_success",
    "plot_training",
    "run_success",
    "success_interval",
    "write_viewer",
]

_MODULES = {
    "PAPER": "model_card",
    "Diagnosis": "diagnosis",
    "complete_model_card": "model_card",
    "enough_played": "evaluation",
    "episode_metrics": "metrics",
    "evaluation_metrics": "evaluation",
    "failed_share": "evaluation",
    "mean_success": "evaluation",
    "plot_training": "plots",
    "run_success": "evaluation",
    "success_interval": "evaluation",
    "write_viewer": "viewer",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
