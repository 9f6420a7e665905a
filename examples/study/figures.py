"""The study's figures. Each takes arm → seed → row."""

import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from one_run import TEMPERATURES, success_at
from paired import t_interval
from plan import HYPOTHESES
from rows import Row


PRIMARY = success_at(TEMPERATURES[0])
Arms = dict[str, dict[int, Row]]


def draw_all(phases: dict[str, Arms], folder: Path) -> list[Path]:
    """Write the figures for which there are rows, as PNG files in a folder."""
    written = []

    def save(figure: Figure, name: str) -> None:
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)

    for phase, arms in phases.items():
        if arms and phase != "tuning":
            save(panels(arms, draw_success), f"{phase}-success.png")
            save(panels(arms, draw_entropy), f"{phase}-entropy.png")
    main = phases.get("main", {})
    if pairs := [(name, arm, other) for name, arm, other in HYPOTHESES if main.keys() >= {arm, other}]:
        save(forest(main, pairs), "forest.png")
    if phases.get("rates"):
        save(rates(main, phases["rates"]), "rates.png")
    return written


def panels(arms: Arms, draw: Callable[[Axes, list[Row]], None]) -> Figure:
    """A panel for each arm, side by side."""
    figure = Figure(figsize=(3.2 * len(arms) + 0.6, 3.2), layout="constrained")
    for axes, (arm, runs) in zip(
        figure.subplots(1, len(arms), squeeze=False, sharey=True)[0], arms.items(), strict=True
    ):
        draw(axes, list(runs.values()))
        axes.set(title=arm, xlabel="RL step")
    return figure


def draw_success(axes: Axes, rows: list[Row]) -> None:
    """Held-out success at the primary temperature: each run, the mean and its 95 % band."""
    values = {}
    for row in rows:
        curve = [(0, row["warm_start"][PRIMARY]), *((each["step"], each[PRIMARY]) for each in row["evaluations"])]
        axes.plot(*zip(*curve, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
        for step, rate in curve:
            values.setdefault(step, []).append(rate)
    draw_band(axes, {step: rates for step, rates in values.items() if len(rates) == len(rows)}, "tab:blue")
    axes.set_ylim(-0.02, 1.02)


def draw_entropy(axes: Axes, rows: list[Row]) -> None:
    """Entropy in training, nats, of the first and the second half of the turns: the mean over the runs and its band."""
    for part, color in (("early", "tab:orange"), ("late", "tab:purple")):
        values = {}
        for row in rows:
            for step, entropy in zip(row["curve"]["step"], row["curve"][f"entropy_{part}"], strict=True):
                if entropy is not None:
                    values.setdefault(step, []).append(entropy)
        draw_band(axes, values, color, f"{part} turns")
    axes.legend()


def draw_band(axes: Axes, values: dict[int, list[float]], color: str, label: str | None = None) -> None:
    intervals = {step: t_interval(found) for step, found in sorted(values.items())}
    steps = list(intervals)
    axes.plot(steps, [each.mean for each in intervals.values()], color=color, label=label)
    if all(len(found) > 1 for found in values.values()):
        low, high = ([getattr(each, end) for each in intervals.values()] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color=color, alpha=0.2)


def forest(arms: Arms, pairs: list[tuple[str, str, str]]) -> Figure:
    """Paired differences of the hypotheses: each seed, the mean and its 95 % interval."""
    figure = Figure(figsize=(7, 0.7 * len(pairs) + 1.2), layout="constrained")
    axes = figure.subplots()
    for height, (_, arm, other) in enumerate(reversed(pairs)):
        seeds = sorted(arms[arm].keys() & arms[other].keys())
        differences = [100 * (arms[arm][seed][PRIMARY] - arms[other][seed][PRIMARY]) for seed in seeds]
        axes.plot(differences, [height + 0.2] * len(seeds), "|", color="tab:gray")
        if len(seeds) > 1:
            mean, low, high = t_interval(differences)
            axes.errorbar(mean, height, xerr=[[mean - low], [high - mean]], fmt="o", color="tab:blue", capsize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(pairs)), [f"{name}: {arm} − {other}" for name, arm, other in reversed(pairs)])
    axes.set_xlabel("points of held-out success")
    return figure


def rates(main: Arms, faster: Arms) -> Figure:
    """Held-out success over the learning rate's factor, by arm, of the seeds that all rates have."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm, runs in main.items():
        by_factor = {1: runs} | {factor: faster.get(f"{arm}*{factor}", {}) for factor in (2, 4)}
        seeds = set.intersection(*(set(found) for found in by_factor.values()))
        if seeds:
            means = [statistics.fmean(found[seed][PRIMARY] for seed in seeds) for found in by_factor.values()]
            axes.plot(list(by_factor), means, marker="o", label=f"{arm} ({len(seeds)} seeds)")
    axes.set(xlabel="learning rate, times the regime's", ylabel="held-out success", xticks=[1, 2, 4], ylim=(0, 1))
    if axes.lines:
        axes.legend()
    return figure
