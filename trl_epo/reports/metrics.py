"""What is logged about episodes and entropies."""

from collections import defaultdict
from collections.abc import Sequence

from transformers.utils import logging

from ..rollouts import EpisodeSummary, StopReason


logger = logging.get_logger(__name__)

MOST_KINDS = 50  # of tasks, or of environments, by which success is logged


def episode_metrics(summaries: Sequence[EpisodeSummary]) -> dict[str, float]:
    """
    Metrics over a set of episodes. Failed episodes count in `episode/stop/failure` only.

    Returns:
        `dict[str, float]`:
            `episode/success_rate` and, with several tasks, `episode/success_rate/<task>` and, with several environments,
            `episode/success_rate_in/<environment>` (fractions of the episodes whose environment tells); `episode/return` (mean undiscounted return, without penalties); `episode/turns`
            (mean); `episode/invalid_actions` (fraction of actions); `episode/cut_thoughts` (fraction of actions whose
            text ends within a thought); `episode/cut_turns` (fraction of actions that a limit on tokens cut); `episode/late_answers` (mean number of answers that generation did not wait
            for); `episode/cut_observations` (mean number of observations that were too long); `episode/stop/<reason>`
            (fraction of episodes).
    """
    if not summaries:
        return {}
    metrics = {}
    played = [summary for summary in summaries if summary.stop_reason is not StopReason.FAILURE]
    judged = [summary for summary in played if summary.success is not None]
    if judged:
        metrics["episode/success_rate"] = _mean([summary.success for summary in judged])
        metrics |= _success_by("task", judged, "episode/success_rate/")
        metrics |= _success_by("environment", judged, "episode/success_rate_in/")
    if played:
        metrics["episode/return"] = _mean([summary.episode_return for summary in played])
        metrics["episode/turns"] = _mean([summary.num_turns for summary in played])
        num_actions = sum(summary.num_turns for summary in played)
        metrics["episode/invalid_actions"] = sum(s.num_invalid_actions for s in played) / max(num_actions, 1)
        metrics["episode/cut_thoughts"] = sum(s.num_cut_thoughts for s in played) / max(num_actions, 1)
        metrics["episode/cut_turns"] = sum(s.num_cut_turns for s in played) / max(num_actions, 1)
        metrics["episode/late_answers"] = _mean([summary.num_late_answers for summary in played])
        metrics["episode/cut_observations"] = _mean([summary.num_cut_observations for summary in played])
    for reason in StopReason:
        metrics[f"episode/stop/{reason.value}"] = _mean([s.stop_reason is reason for s in summaries])
    return metrics


def _success_by(attribute: str, summaries: Sequence[EpisodeSummary], prefix: str) -> dict[str, float]:
    """The success rate of each task or environment, if there are several."""
    outcomes = defaultdict(list)
    for summary in summaries:
        if (name := getattr(summary, attribute)) is not None:
            outcomes[name].append(summary.success)
    if len(outcomes) > MOST_KINDS:
        logger.warning_once(
            f"There are more than {MOST_KINDS} kinds of `{attribute}` at once, so that success is not logged by it. A kind is what several "
            "rows share; the episodes that are kept tell the success of each."
        )
        return {}
    return {prefix + name: _mean(outcomes[name]) for name in sorted(outcomes)} if len(outcomes) > 1 else {}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
