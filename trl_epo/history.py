"""The entropy history W_k: the mean entropy of every RL step so far (arXiv 2509.22576, Algorithm 1)."""


class EntropyHistory:
    """
    Keeps H̄_0 … H̄_{k−1}, the token-level mean entropy over all action tokens of each RL step, in nats.

    An RL step is one batch of fresh episodes, however many optimizer steps it feeds. Sums and counts are expected to
    be totals over all processes, so that every process holds the same history.

    Usage per RL step: [`begin_step`], then [`observe`] for each part of the batch. The step's mean enters the history
    when the next step begins, so it never serves as its own reference.
    """

    def __init__(self):
        self.means: list[float] = []
        self.step = -1  # index k of the current RL step; -1 before the first
        self._entropy_sum = 0.0  # nats, of the current step
        self._token_count = 0

    def begin_step(self) -> None:
        """Close the current RL step, if any, and begin the next. A step without action tokens leaves no mean."""
        if self._token_count:
            self.means.append(self._entropy_sum / self._token_count)
        self._entropy_sum, self._token_count = 0.0, 0
        self.step += 1

    def observe(self, entropy_sum: float, token_count: int) -> None:
        """Add the sum of entropies (nats) and the number of action tokens of a part of the current step's batch."""
        self._entropy_sum += entropy_sum
        self._token_count += token_count

    @property
    def reference(self) -> float | None:
        """H̄_W, the mean of all earlier steps' means, in nats. `None` at k = 0, where nothing is smoothed."""
        if not self.means:
            return None
        return sum(self.means) / len(self.means)

    def state_dict(self) -> dict:
        """All state, as JSON can carry it."""
        return {
            "means": list(self.means),
            "step": self.step,
            "entropy_sum": self._entropy_sum,
            "token_count": self._token_count,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what [`state_dict`] gave."""
        self.means = [float(mean) for mean in state["means"]]
        self.step = int(state["step"])
        self._entropy_sum = float(state["entropy_sum"])
        self._token_count = int(state["token_count"])
