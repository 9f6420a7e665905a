"""Curves of a run from its log. Needs matplotlib: `pip install "trl-epo[plot]"`."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_training(log_history: Sequence[dict[str, Any]], path: str | PathLike | None = None) -> "Figure":
    """
    Draw success, return and entropy in its corridor over a run. A notebook shows the figure.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`, or the `log_history` of a `trainer_state.json`.
        path (`str` or `PathLike`, *optional*): Where to write it as an image; the ending gives the format.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ValueError: If the log holds no training step of `EPOTrainer`.
    """
    figure = draw_training(log_history, (15, 4))
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def draw_training(log_history: Sequence[dict[str, Any]], size: tuple[float, float]) -> "Figure":
    """The figure of [`plot_training`], of this width and height in inches; raises the same."""
    from matplotlib.figure import Figure

    if not any("epo/entropy" in entry or "episode/return" in entry for entry in log_history):
        raise ValueError(
            f"The log has {len(log_history)} entries but none of EPOTrainer's metrics. Train first, with "
            "`logging_steps` small enough that something is logged."
        )

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[name]) for entry in log_history if entry.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=size, layout="constrained")
    success, returns, entropy = figure.subplots(1, 3)

    success.plot(*series("episode/success_rate"), color="tab:blue", label="training episodes")
    for name in sorted({name for entry in log_history for name in entry}):
        if name.startswith("eval") and name.endswith("episode/success_rate") and "success_rate/" not in name:
            panel = name.removeprefix("eval_").removesuffix("episode/success_rate").strip("_/") or "held-out"
            success.plot(*series(name), marker="o", linestyle="--", label=panel)
    success.set(title="Success rate", xlabel="optimizer step", ylim=(-0.02, 1.02))
    success.legend()

    returns.plot(*series("episode/return"), color="tab:green", label="return")
    returns.set(title="Mean return of an episode", xlabel="optimizer step")

    entropy.plot(*series("epo/entropy"), color="tab:red", label="action tokens")
    steps, low = series("epo/corridor_low")
    _, high = series("epo/corridor_high")
    if steps:
        entropy.fill_between(steps, low, high, color="tab:gray", alpha=0.2, label="corridor")
        entropy.plot(*series("epo/entropy_reference"), color="tab:gray", label="mean of the steps before")
    entropy.set(title="Entropy (nats)", xlabel="optimizer step")
    entropy.legend()

    for axes in (success, returns, entropy):
        axes.grid(alpha=0.3)
    return figure
