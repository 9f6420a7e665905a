"""The columns in which a terminal and a notebook show training steps and panels, as text."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .timing import PARTS


Entry = Mapping[str, Any]  # of the log

SUCCESS = "episode/success_rate"


class Column(NamedTuple):
    """A column of the table of steps: its name, its width, and its text for the step number and a log entry."""

    name: str
    width: int
    text: Callable[[str, Entry], str]


def _shown(name: str, form: str) -> Callable[[str, Entry], str]:
    """A metric as text; `"-"` where the entry has none."""
    return lambda step, entry: _format(entry.get(name), form)


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _corridor(step: str, entry: Entry) -> str:
    """The bounds that the entropy is between, or the one that it has passed."""
    entropy, low, high = (entry.get(f"epo/{name}") for name in ("entropy", "corridor_low", "corridor_high"))
    if entropy is None or low is None or high is None:
        return "-"
    if entropy < low:
        return f"< {low:.3f}"
    return f"> {high:.3f}" if entropy > high else f"{low:.3f}-{high:.3f}"


def _seconds(step: str, entry: Entry) -> str:
    seconds = [entry[name] for part in PARTS if (name := f"time/{part}") in entry]
    return _format(sum(seconds) if seconds else None, ".1f")


# The first ones stay where a terminal is narrow.
COLUMNS = (
    Column("step", 10, lambda step, entry: step),
    Column("success", 7, _shown(SUCCESS, ".1%")),
    Column("return", 7, _shown("episode/return", ".3f")),
    Column("invalid", 7, _shown("episode/invalid_actions", ".1%")),
    Column("entropy", 7, _shown("epo/entropy", ".3f")),
    Column("corridor", 12, _corridor),
    Column("tokens/s", 8, _shown("rollout/tokens_per_second", ",.0f")),
    Column("seconds", 7, _seconds),
)


def is_of_steps(entry: Entry) -> bool:
    """Whether it is of training steps."""
    return "epo/entropy" in entry


def step_row(entry: Entry, step: int, max_steps: int) -> list[str]:
    """The texts of [`COLUMNS`] for a log entry of training steps."""
    return [column.text(f"{step}/{max_steps}", entry) for column in COLUMNS]


class Panel(NamedTuple):
    """What an evaluation says of a panel, as text."""

    panel: str
    step: str
    success: str
    interval: str
    episode_return: str
    episodes: str


def panel_row(entry: Entry, step: int) -> Panel | None:
    """The evaluation of a panel that a log entry is of; `None` if it is of none."""
    ending = "episode/count"
    prefix = next(
        (name.removesuffix(ending) for name in entry if name.startswith("eval") and name.endswith(ending)), ""
    )
    if not prefix:
        return None
    low, high = (entry.get(f"{prefix}episode/success_{bound}") for bound in ("low", "high"))
    return Panel(
        panel=prefix.removeprefix("eval").strip("_"),
        step=str(step),
        success=_format(entry.get(prefix + SUCCESS), ".1%"),
        interval="-" if low is None or high is None else f"{100 * low:.1f}-{high:.1%}",
        episode_return=_format(entry.get(f"{prefix}episode/return"), ".3f"),
        episodes=_episodes(entry, prefix),
    )


def _episodes(entry: Entry, prefix: str) -> str:
    count = int(entry[f"{prefix}episode/count"])
    num_failed = round(count * entry.get(f"{prefix}episode/stop/failure", 0.0))
    return f"{count}, {num_failed} failed" if num_failed else str(count)
