"""
What an evaluation tells: success with its uncertainty, pass@k, and the paper's Succ.* and Succ. of several runs.

An evaluation plays a fixed panel: each row of the evaluation set G times (`num_generations_eval`).
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..rollouts import StopReason
from .metrics import EpisodeSummary, episode_metrics


logger = logging.getLogger(__name__)

Z_95 = 1.959963984540054  # the normal distribution's quantile of 0.975


class RowOutcome(NamedTuple):
    """How often a row of the panel was played to a verdict, and how often with success."""

    num_episodes: int
    num_successes: int


class RunSuccess(NamedTuple):
    """A run's success rates: its maximum, and its mean after convergence."""

    best: float
    converged: float


def row_outcomes(summaries: Iterable[EpisodeSummary]) -> list[RowOutcome]:
    """The outcome of each row, without failed episodes and those whose environment does not tell of success."""
    verdicts: dict[int, list[bool]] = {}
    for summary in summaries:
        if summary.stop_reason is not StopReason.FAILURE and summary.success is not None:
            verdicts.setdefault(summary.row, []).append(summary.success)
    return [RowOutcome(len(verdicts[row]), sum(verdicts[row])) for row in sorted(verdicts)]


def t_quantile(degrees: int) -> float:
    """
    Student's t: the quantile of 0.975, by the series around the normal distribution's (Abramowitz and Stegun 26.7.5),
    which is too low by 0.13 % for three degrees of freedom and by less for more. For one and two it is exact.

    >>> [round(t_quantile(degrees), 2) for degrees in (1, 2, 3, 10, 1000)]
    [12.71, 4.3, 3.18, 2.23, 1.96]
    """
    if degrees == 1:
        return math.tan(0.475 * math.pi)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z_95
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def success_interval(outcomes: Sequence[RowOutcome]) -> tuple[float, float]:
    """
    The 95 % confidence interval of the success rate on rows like these (fractions).

    Episodes of one row resemble each other, so they do not count as so many independent ones. The interval is
    Wilson's, with the *effective* number of episodes in place of their number: p·(1 − p)/Var(p), where Var(p) is the
    variance of the success rate that the differences between rows imply (rows as clusters), at most the number of
    episodes (they are independent). A variance that few rows tell is uncertain, so that number is multiplied by (z/t)²
    (Korn and Graubard 1998), t with one degree of freedom less than rows; but it is at least the number of rows
    (episodes of a row are copies). With one episode a row that is Wilson's interval itself; without any difference to
    learn from (all succeed, all fail, a single row) rows count once.

    The interval speaks of one policy on other rows of the same kind. It does not tell how much training runs with
    other seeds differ.

    >>> [round(bound, 3) for bound in success_interval([RowOutcome(1, 1)] * 15 + [RowOutcome(1, 0)] * 5)]
    [0.531, 0.888]

    Raises:
        ValueError: If no episode has a verdict.
    """
    num_rows, num_episodes = len(outcomes), sum(outcome.num_episodes for outcome in outcomes)
    if not num_episodes:
        raise ValueError("There are no outcomes to estimate a success rate from.")
    rate = sum(outcome.num_successes for outcome in outcomes) / num_episodes
    z, effective = Z_95, float(num_rows)
    if num_rows > 1 and 0.0 < rate < 1.0:
        squares = sum((outcome.num_successes - rate * outcome.num_episodes) ** 2 for outcome in outcomes)
        variance = num_rows / (num_rows - 1) * squares / num_episodes**2
        effective = min(rate * (1 - rate) / variance, num_episodes) if variance else num_episodes
        effective = max(effective * (z / t_quantile(num_rows - 1)) ** 2, num_rows)
    center = (rate + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * math.sqrt(rate * (1 - rate) / effective + z**2 / (4 * effective**2))
    return max(center - half, 0.0), min(center + half, 1.0)


def pass_at_k(outcome: RowOutcome, k: int) -> float:
    """
    The unbiased estimate of the chance that at least one of k episodes of a row succeeds (Chen et al. 2021,
    arXiv 2107.03374): 1 − C(n − c, k)/C(n, k) for c successes of n episodes.

    >>> pass_at_k(RowOutcome(num_episodes=4, num_successes=1), k=2)
    0.5

    Raises:
        ValueError: If `k` is not between 1 and n.
    """
    num_episodes, num_successes = outcome
    if not 1 <= k <= num_episodes:
        raise ValueError(f"k is {k}, but must be from 1 to the number of episodes of the row, {num_episodes}.")
    return 1.0 - math.comb(num_episodes - num_successes, k) / math.comb(num_episodes, k)


def evaluation_metrics(summaries: Sequence[EpisodeSummary]) -> dict[str, float]:
    """
    Metrics of a panel: those of [`~trl_epo.reports.metrics.episode_metrics`] and

    Returns:
        `dict[str, float]`:
            `episode/count` (episodes that were played, failed ones included); `episode/success_low` and
            `episode/success_high` ([`success_interval`]); with several episodes a row, `episode/pass@k` for
            k = 1, 2, 4, … up to their number, each the mean over the rows with at least k verdicts.
    """
    metrics = episode_metrics(summaries)
    if summaries:
        metrics["episode/count"] = len(summaries)
    if outcomes := row_outcomes(summaries):
        metrics["episode/success_low"], metrics["episode/success_high"] = success_interval(outcomes)
        most = max(outcome.num_episodes for outcome in outcomes)
        if most > 1:
            for k in (2**power for power in range(most.bit_length())):
                rates = [pass_at_k(outcome, k) for outcome in outcomes if outcome.num_episodes >= k]
                metrics[f"episode/pass@{k}"] = sum(rates) / len(rates)
    return metrics


def failed_share(metrics: dict[str, float], name: str) -> float:
    """
    Which share of the episodes failed in the evaluation that a metric is of, by the metrics of all panels; 0 if there are
    no episodes.

    >>> failed_share({"eval_iid_episode/stop/failure": 0.25, "eval_ood_episode/stop/failure": 1.0}, "eval_iid_reward")
    0.25
    """
    ending = "episode/stop/failure"
    shares = {key.removesuffix(ending): share for key, share in metrics.items() if key.endswith(ending)}
    panel = max((prefix for prefix in shares if name.startswith(prefix)), key=len, default=None)
    return shares.get(panel, 0.0)


def enough_played(metrics: dict[str, float], name: str | None, max_failed_fraction: float) -> bool:
    """Whether enough of the episodes that a metric of an evaluation is of were played for it to mean something; if not, say so."""
    share = failed_share(metrics, f"eval_{name.removeprefix('eval_')}") if name else 0.0
    if share < 1.0 and share <= max_failed_fraction:
        return True
    logger.warning(
        f"{share:.0%} of the evaluation's episodes failed, more than `max_failed_fraction={max_failed_fraction}` "
        "allows, or all: what it says does not make this checkpoint the best one."
    )
    return False


def success_curve(log_history: Iterable[dict[str, Any]], panel: str | None = None) -> list[tuple[int, float]]:
    """
    The evaluations of a run: (optimizer step, success rate), by step; of several at one step the last.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`, or the `log_history` of a `trainer_state.json`.
        panel (`str`, *optional*): The evaluation set, if there are several, e.g. `"iid"`.
    """
    name = "eval_episode/success_rate" if panel is None else f"eval_{panel}_episode/success_rate"
    curve = {entry["step"]: entry[name] for entry in log_history if entry.get(name) is not None}
    return sorted(curve.items())


def run_success(
    log_history: Iterable[dict[str, Any]], panel: str | None = None, converged_share: float = 1 / 3
) -> RunSuccess:
    """
    A run's best success rate, and its mean success rate after convergence.

    The paper does not say, as far as we know, from when on a run counts as converged. Here it is the last third of its
    evaluations (`converged_share`), rounded up.

    >>> history = [{"step": 5 * i, "eval_iid_episode/success_rate": rate} for i, rate in enumerate([0.1, 0.9, 0.5, 0.7])]
    >>> run_success(history, "iid")
    RunSuccess(best=0.9, converged=0.6)

    Raises:
        ValueError: If the history holds no evaluation of the panel, or `converged_share` is not in (0, 1].
    """
    if not 0.0 < converged_share <= 1.0:
        raise ValueError(f"`converged_share` is {converged_share}, but must be above 0 and at most 1.")
    log_history = list(log_history)
    rates = [rate for _, rate in success_curve(log_history, panel)]
    if not rates:
        ending = "episode/success_rate"
        names = {name for entry in log_history for name in entry if name.startswith("eval") and name.endswith(ending)}
        raise ValueError(
            f"The history has no evaluation of the panel {panel!r}; it has {sorted(names) or 'no evaluation at all'}."
        )
    last = rates[-math.ceil(converged_share * len(rates)) :]
    return RunSuccess(max(rates), sum(last) / len(last))


def mean_success(runs: Sequence[RunSuccess]) -> RunSuccess:
    """
    The paper's numbers from runs that differ in their seed only: Succ.* (`best`: the mean of the runs' maxima) and
    Succ. (`converged`: the mean of their success after convergence).

    >>> mean_success([RunSuccess(0.9, 0.5), RunSuccess(0.5, 0.25)])
    RunSuccess(best=0.7, converged=0.375)
    """
    if not runs:
        raise ValueError("There are no runs to average.")
    best, converged = zip(*runs, strict=True)
    return RunSuccess(sum(best) / len(best), sum(converged) / len(converged))
