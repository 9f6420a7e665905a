"""The entropy history W_k: the mean entropy of every RL step so far (arXiv 2509.22576, Algorithm 1)."""

import json
import logging
import os
from collections.abc import Sequence


logger = logging.getLogger(__name__)


class EntropyHistory:
    """
    Keeps H̄_0 … H̄_{k−1}, the token-level mean entropy over all action tokens of each RL step, in nats.

    An RL step is one batch of fresh episodes, however many optimizer steps it feeds. Sums and counts are expected to
    be totals over all processes, so that every process holds the same history.

    Usage per RL step: [`begin_step`], then [`observe`] for each part of the batch, and where they are needed
    [`observe_aggregate`] and [`observe_turns`]. The step's means enter the history when the next step begins, so they
    never serve as their own reference.

    Attributes:
        means (`list[float]`): H̄_m of each RL step that had action tokens, in nats.
        aggregates (`list[float]`): The same, averaged as in L_H (Eq. 2) instead of over tokens.
        turn_means (`list[list[float]]`): For each turn index the mean over its action tokens, of each RL step that
            reached that turn.
        latest (`float` or `None`): L_H of the last optimizer step.
        step (`int`): k of the current RL step; −1 before the first.
    """

    def __init__(self):
        self.means: list[float] = []
        self.aggregates: list[float] = []
        self.turn_means: list[list[float]] = []
        self.latest: float | None = None
        self.step = -1
        # Sums, in nats, and counts of what is still open
        self._entropy_sum, self._token_count = 0.0, 0
        self._aggregate = (0.0, 0)
        self._turns: list[tuple[float, int]] = []
        self._optimizer_step = (0.0, 0)

    def begin_step(self) -> None:
        """Close the current RL step, if any, and begin the next. A step without action tokens leaves no mean."""
        if self._token_count:
            self.means.append(self._entropy_sum / self._token_count)
        if self._aggregate[1]:
            self.aggregates.append(self._aggregate[0] / self._aggregate[1])
        self.turn_means += [[] for _ in self._turns[len(self.turn_means) :]]
        for means, (total, count) in zip(self.turn_means, self._turns, strict=False):
            if count:
                means.append(total / count)
        self._entropy_sum, self._token_count = 0.0, 0
        self._aggregate = (0.0, 0)
        self._turns = []
        self.step += 1

    def observe(self, entropy_sum: float, token_count: int) -> None:
        """Add the sum of entropies (nats) and the number of action tokens of a part of the current step's batch."""
        self._entropy_sum += entropy_sum
        self._token_count += token_count

    def observe_aggregate(self, total: float, count: int) -> None:
        """Add the sum (nats) and the number of what L_H averages last: the episodes of a part of the batch."""
        self._aggregate = (self._aggregate[0] + total, self._aggregate[1] + count)

    def observe_turns(self, entropy_sums: Sequence[float], token_counts: Sequence[int]) -> None:
        """As [`observe`], for each turn index from 0."""
        self._turns += [(0.0, 0)] * (len(entropy_sums) - len(self._turns))
        for turn, (total, count) in enumerate(zip(entropy_sums, token_counts, strict=True)):
            self._turns[turn] = (self._turns[turn][0] + total, self._turns[turn][1] + count)

    def observe_optimizer_step(self, total: float, count: int, ends: bool) -> None:
        """As [`observe_aggregate`], for `latest`, which is set when the optimizer step `ends` and had any episode."""
        self._optimizer_step = (self._optimizer_step[0] + total, self._optimizer_step[1] + count)
        if ends:
            total, count = self._optimizer_step
            self.latest = total / count if count else self.latest
            self._optimizer_step = (0.0, 0)

    @property
    def reference(self) -> float | None:
        """H̄_W, the mean of all earlier steps' means, in nats. `None` at k = 0, where nothing is smoothed."""
        return _mean(self.means)

    @property
    def aggregate_reference(self) -> float | None:
        """The mean of all earlier steps' `aggregates`, in nats. `None` at k = 0."""
        return _mean(self.aggregates)

    @property
    def turn_references(self) -> list[float | None]:
        """By turn index: the mean over the earlier steps that reached it, in nats; `None` where none did."""
        return [_mean(means) for means in self.turn_means]

    def state_dict(self) -> dict:
        """All state, as JSON can carry it."""
        return {
            "means": list(self.means),
            "aggregates": list(self.aggregates),
            "turn_means": [list(means) for means in self.turn_means],
            "latest": self.latest,
            "step": self.step,
            "entropy_sum": self._entropy_sum,
            "token_count": self._token_count,
            "aggregate": list(self._aggregate),
            "turns": [list(turn) for turn in self._turns],
            "optimizer_step": list(self._optimizer_step),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what [`state_dict`] gave."""
        self.means = [float(mean) for mean in state["means"]]
        self.aggregates = [float(mean) for mean in state["aggregates"]]
        self.turn_means = [[float(mean) for mean in means] for means in state["turn_means"]]
        self.latest = None if state["latest"] is None else float(state["latest"])
        self.step = int(state["step"])
        self._entropy_sum = float(state["entropy_sum"])
        self._token_count = int(state["token_count"])
        self._aggregate = tuple(state["aggregate"])
        self._turns = [tuple(turn) for turn in state["turns"]]
        self._optimizer_step = tuple(state["optimizer_step"])

    def save(self, path: str | os.PathLike) -> None:
        """Write it as JSON."""
        with open(path, "w") as file:
            json.dump(self.state_dict(), file)

    def load(self, path: str | os.PathLike) -> None:
        """Go on from what [`save`] wrote; without such a file, say so and begin anew."""
        if not os.path.exists(path):
            logger.warning(
                "There is no %s: the checkpoint was not written by EPOTrainer. The entropy history starts anew.", path
            )
            return
        with open(path) as file:
            self.load_state_dict(json.load(file))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
