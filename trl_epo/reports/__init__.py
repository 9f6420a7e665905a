"""
What a run tells.

In: episodes and summaries of them, the log. Out: metrics, panels with intervals, the paper's Succ. and Succ.*, where the time goes,
what is shown while a run goes on and what is wrong with it, kept episodes, model card, curves, the page to look at a run.
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
    from .kept_episodes import EpisodeKeeper
    from .metrics import episode_metrics
    from .model_card import (
        PAPER,
        PLAY_SETTINGS,
        RunFacts,
        complete_model_card,
        foreign_code,
        keep_limits,
        named_environment,
        play_settings,
    )
    from .plots import plot_training
    from .progress import show_progress
    from .timing import SAMPLING, SCORING, StepTimes
    from .trackers import show_episodes
    from .viewer import write_viewer

__all__ = [
    "PAPER",
    "PLAY_SETTINGS",
    "SAMPLING",
    "SCORING",
    "Diagnosis",
    "EpisodeKeeper",
    "RunFacts",
    "StepTimes",
    "complete_model_card",
    "enough_played",
    "episode_metrics",
    "evaluation_metrics",
    "failed_share",
    "foreign_code",
    "keep_limits",
    "mean_success",
    "named_environment",
    "play_settings",
    "plot_training",
    "run_success",
    "show_episodes",
    "show_progress",
    "success_interval",
    "write_viewer",
]

_MODULES = {
    "EpisodeKeeper": "kept_episodes",
    "PAPER": "model_card",
    "Diagnosis": "diagnosis",
    "PLAY_SETTINGS": "model_card",
    "RunFacts": "model_card",
    "foreign_code": "model_card",
    "SAMPLING": "timing",
    "SCORING": "timing",
    "StepTimes": "timing",
    "complete_model_card": "model_card",
    "enough_played": "evaluation",
    "episode_metrics": "metrics",
    "evaluation_metrics": "evaluation",
    "failed_share": "evaluation",
    "keep_limits": "model_card",
    "mean_success": "evaluation",
    "named_environment": "model_card",
    "play_settings": "model_card",
    "plot_training": "plots",
    "run_success": "evaluation",
    "show_episodes": "trackers",
    "show_progress": "progress",
    "success_interval": "evaluation",
    "write_viewer": "viewer",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
