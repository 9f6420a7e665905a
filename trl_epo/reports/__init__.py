"""
What a run tells.

In: summaries of episodes, the log. Out: metrics, panels with intervals, the paper's Succ. and Succ.*, model card, curves.
Imports: rollouts and what is below. Open first: `metrics.py`. Nothing is imported before it is used, so that a report needs no torch.
"""

from .evaluation import evaluation_metrics, failed_share, mean_success, run_success, success_interval
from .metrics import episode_metrics
from .model_card import complete_model_card
from .plots import plot_training


__all__ = [
    "complete_model_card",
    "episode_metrics",
    "evaluation_metrics",
    "failed_share",
    "mean_success",
    "plot_training",
    "run_success",
    "success_interval",
]
