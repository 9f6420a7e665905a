"""
Rebuild the study's report from its rows: a page of tables and the figures.

    python examples/study/analyse.py --output_dir examples/study/report
    python examples/study/analyse.py --files examples/study/results/pilot.jsonl --output_dir runs/pilot-report

Rows of one run, rows of different commits and rows of an arm with different settings are refused.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from figures import draw_all
from one_run import TEMPERATURES, success_at
from paired import (
    Interval,
    area_under_curve,
    chance_of_order,
    holm,
    share_taken_off,
    sign_flip_test,
    t_interval,
)
from plan import HYPOTHESES, PHASES
from rows import Row, key_of, read_rows
from transformers import HfArgumentParser


HERE = Path(__file__).parent
PRIMARY = success_at(TEMPERATURES[0])


@dataclass
class AnalysisArguments:
    files: list[str] | None = field(
        default=None, metadata={"help": "Of rows; by default results/PHASE.jsonl of all phases but the pilot."}
    )
    output_dir: str = field(default=str(HERE / "report"), metadata={"help": "For report.md and the figures."})
    mixed_commits: bool = field(default=False, metadata={"help": "Take rows of different commits together."})


# --------------------------------------------------------------------------------------------------------------- rows


def checked(rows: Sequence[Row], mixed_commits: bool = False) -> list[Row]:
    """
    The rows, if they may be compared.

    Raises:
        ValueError: If there are none, two are of one run, some are of different commits, or some of one phase have another
            regime or some of one arm other settings.
    """
    if not rows:
        raise ValueError("There are no rows: run the study first (run.py), or name --files.")
    seen = set()
    for row in rows:
        if key_of(row) in seen:
            raise ValueError(
                f"There are two rows of the run {key_of(row)}: give each file once, and keep one of them."
            )
        seen.add(key_of(row))
    commits = sorted({row["commit"] for row in rows})
    if len(commits) > 1 and not mixed_commits:
        raise ValueError(
            f"The rows are of {len(commits)} commits ({', '.join(commits)}), so that more than the arm may differ. Give "
            "files of one, or --mixed_commits true if the code of a run is the same in all."
        )
    _check_alike(rows, "regime", lambda row: row["phase"])
    _check_alike(rows, "settings", lambda row: (row["phase"], row["arm"]))
    return list(rows)


def _check_alike(rows: Iterable[Row], name: str, group: Callable[[Row], object]) -> None:
    first = {}
    for row in rows:
        other = first.setdefault(group(row), row)
        if row[name] != other[name]:
            raise ValueError(f"The runs {key_of(other)} and {key_of(row)} have another {name}: they cannot be pooled.")


def by_arm(rows: Iterable[Row], phase: str) -> dict[str, dict[int, Row]]:
    """Arm → seed → row, in the order of the plan."""
    found = defaultdict(dict)
    for row in rows:
        if row["phase"] == phase:
            found[row["arm"]][row["seed"]] = row
    order = {arm: place for place, arm in enumerate(PHASES[phase].arms)}
    return {arm: dict(sorted(found[arm].items())) for arm in sorted(found, key=lambda arm: order.get(arm, len(order)))}


def paired_differences(arm: dict[int, Row], other: dict[int, Row], name: str = PRIMARY) -> list[float]:
    """Arm less other, by seed, of the seeds that both have."""
    return [arm[seed][name] - other[seed][name] for seed in sorted(arm.keys() & other.keys())]


def training_area(row: Row) -> float:
    """The mean success of training episodes over a run; 0 for a run that ended before there was a curve."""
    curve = row["curve"]
    points = [(step, rate) for step, rate in zip(curve["step"], curve["success"], strict=True) if rate is not None]
    return area_under_curve(*zip(*points, strict=True)) if len(points) > 1 else 0.0


def roughness(values: Sequence[float]) -> float:
    """
    How much a curve shakes: the root mean square of its changes from one point to the next.

    >>> roughness([0.0, 3.0, 7.0])  # √((9 + 16) / 2)
    3.5355339059327378
    """
    changes = [b - a for a, b in zip(values, values[1:], strict=False)]
    return statistics.fmean(change**2 for change in changes) ** 0.5


def drift(values: Sequence[float]) -> float:
    """
    The mean of a curve's last third less that of its first.

    >>> drift([1.0, 5.0, 3.0])
    2.0
    """
    third = max(len(values) // 3, 1)
    return statistics.fmean(values[-third:]) - statistics.fmean(values[:third])


def present(row: Row, name: str) -> list[float]:
    """A curve without the points at which it has no value."""
    return [value for value in row["curve"][name] if value is not None]


def value_at(row: Row, name: str, share: float) -> float | None:
    """The mean of a curve's last five points up to this share of the steps."""
    curve, end = row["curve"], share * row["regime"]["steps"]
    values = [v for step, v in zip(curve["step"], curve[name], strict=True) if step <= end and v is not None]
    return statistics.fmean(values[-5:]) if values else None


# ------------------------------------------------------------------------------------------------------------- report


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(interval: Interval) -> str:
    """
    Of a difference of shares.

    >>> points(Interval(0.05, -0.01, 0.11))
    '+5.0 (-1.0 to +11.0)'
    """
    return f"{100 * interval.mean:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def confirmatory(arms: dict[str, dict[int, Row]]) -> str:
    """The four hypotheses, once every pair of each has been run: nobody looks at tests of a part."""
    wanted = len(PHASES["main"].seeds)
    pairs = {name: paired_differences(arms.get(arm, {}), arms.get(other, {})) for name, arm, other in HYPOTHESES}
    missing = [f"{name}: {len(found)} of {wanted} pairs" for name, found in pairs.items() if len(found) < wanted]
    if missing:
        return f"Not yet: {', '.join(missing)}.\n"
    adjusted = holm({name: sign_flip_test(found) for name, found in pairs.items()})
    return table(
        ("hypothesis", "difference", "pairs", "points of held-out success (95 %)", "p", "p, Holm"),
        (
            (
                name,
                f"`{arm}` − `{other}`",
                str(len(pairs[name])),
                points(t_interval(pairs[name])),
                f"{sign_flip_test(pairs[name]):.5f}",
                f"{adjusted[name]:.5f}",
            )
            for name, arm, other in HYPOTHESES
        ),
    )


def overview(arms: dict[str, dict[int, Row]]) -> str:
    """What the runs of a phase came to."""
    lines = []
    for arm, runs in arms.items():
        rows = list(runs.values())
        take_off = rows[0]["regime"]["take_off"]
        primary = t_interval([row[PRIMARY] for row in rows])
        entropies = [present(row, "entropy") for row in rows if present(row, "entropy")]
        ends = [statistics.fmean(values[place] for values in entropies) for place in (0, -1)] if entropies else []
        lines.append(
            (
                f"`{arm}`",
                str(len(rows)),
                percent(statistics.fmean(row["warm_start"][PRIMARY] for row in rows)),
                f"{percent(primary.mean)} ({100 * primary.low:.1f} to {100 * primary.high:.1f})",
                percent(statistics.fmean(row[success_at(TEMPERATURES[1])] for row in rows)),
                percent(share_taken_off([row[PRIMARY] for row in rows], take_off)),
                percent(statistics.fmean(training_area(row) for row in rows)),
                " → ".join(f"{value:.2f}" for value in ends),
                str(sum(bool(row["diverged"]) for row in rows)),
                f"{statistics.fmean(row['cpu_seconds'] or 0.0 for row in rows) / 60:.1f}",
            )
        )
    head = (
        *("arm", "runs", "warm start", "success (95 %)", "at temperature 1", "taken off", "area, training"),
        *("entropy", "diverged", "CPU minutes"),
    )
    return table(head, lines)


def against_grpo(arms: dict[str, dict[int, Row]]) -> str:
    """Differences from GRPO at both temperatures and in area, exploratory."""
    names = [success_at(temperature) for temperature in TEMPERATURES]
    lines = []
    for arm, runs in arms.items():
        seeds = sorted(runs.keys() & arms.get("grpo", {}).keys())
        if arm != "grpo" and seeds:
            areas = [training_area(runs[seed]) - training_area(arms["grpo"][seed]) for seed in seeds]
            differences = [paired_differences(runs, arms["grpo"], name) for name in names]
            lines.append((f"`{arm}`", str(len(seeds)), *(points(t_interval(each)) for each in (*differences, areas))))
    return table(("arm − `grpo`", "pairs", *(f"success, {t:g}" for t in TEMPERATURES), "area, training"), lines)


def entropy_by_outcome(arms: dict[str, dict[int, Row]]) -> str:
    """The paper's claims on entropy: how much it shakes, and where early and late turns go in runs that fail."""
    lines = []
    for arm, runs in arms.items():
        for outcome, wanted in (("yes", True), ("no", False)):
            rows = [
                row
                for row in runs.values()
                if (row[PRIMARY] >= row["regime"]["take_off"]) == wanted and len(present(row, "entropy")) > 1
            ]
            if rows:
                shakes = statistics.fmean(roughness(present(row, "entropy")) for row in rows)
                drifts = (
                    statistics.fmean(drift(present(row, f"entropy_{part}")) for row in rows)
                    for part in ("early", "late")
                )
                lines.append(
                    (f"`{arm}`", outcome, str(len(rows)), f"{shakes:.3f}", *(f"{each:+.3f}" for each in drifts))
                )
    return table(("arm", "took off", "runs", "roughness", "drift, early turns", "drift, late turns"), lines)


def foretold(arms: dict[str, dict[int, Row]]) -> str:
    """How early entropy and success tell which runs will take off, all arms together."""
    rows = [row for runs in arms.values() for row in runs.values()]
    lines = []
    for share in (0.25, 0.5, 0.75):
        cells = []
        for name in ("entropy", "success"):
            groups = {True: [], False: []}
            for row in rows:
                if (value := value_at(row, name, share)) is not None:
                    groups[row[PRIMARY] >= row["regime"]["take_off"]].append(value)
            chance = chance_of_order(groups[False], groups[True])
            cells.append("–" if chance is None else f"{chance:.2f}")
        lines.append((percent(share), *cells))
    return table(("after this share of the steps", "entropy", "training success"), lines)


def write_report(rows: Sequence[Row], folder: Path) -> Path:
    """`report.md` and the figures of these rows; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    phases = {phase: by_arm(rows, phase) for phase in PHASES}
    parts = [
        "# Does entropy control help an agent?\n",
        "What `analyse.py` makes of the rows; the plan is `PLAN.md`.\n",
    ]
    parts += [f"Code: {', '.join(sorted({row['commit'] for row in rows}))}.\n"]
    for phase, arms in phases.items():
        if not arms:
            continue
        parts.append(f"## Phase `{phase}`\n")
        if phase == "main":
            parts += ["### Confirmatory\n", confirmatory(arms), "### All else is exploratory\n"]
        parts.append(overview(arms))
        if len(arms) > 1:
            parts.append(against_grpo(arms))
        parts += [
            "Entropy (nats) by whether a run took off. Roughness: root mean square of its changes between points of the "
            "curve; drift: mean of the last third less that of the first.\n",
            entropy_by_outcome(arms),
            "The chance that a run that takes off is above one that does not, by what is seen early (0.5: it tells nothing).\n",
            foretold(arms),
        ]
    for figure in draw_all(phases, folder):
        parts.append(f"![{figure.stem}]({figure.name})\n")
    page = folder / "report.md"
    page.write_text("\n".join(parts))
    return page


def main() -> None:
    (script,) = HfArgumentParser(AnalysisArguments).parse_args_into_dataclasses()
    files = script.files or [HERE / "results" / f"{phase}.jsonl" for phase in PHASES if phase != "pilot"]
    rows = [row for file in files for row in read_rows(Path(file))]
    print(write_report(checked(rows, script.mixed_commits), Path(script.output_dir)))


if __name__ == "__main__":
    main()
