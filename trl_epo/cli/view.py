"""`trl-epo view`."""

from collections.abc import Sequence
from pathlib import Path

from .mistakes import OneLineParser


def view(arguments: Sequence[str]) -> None:
    """Write the page of one or two runs, and say where it is."""
    parser = OneLineParser(
        "trl-epo view",
        description="Write one HTML file to look at one or two runs: curves, and kept episodes turn by turn.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="The folder of a run; at most two.")
    parser.add_argument("--output", help="The file. By default viewer.html in the first run's folder.")
    given = parser.parse_args(arguments)
    if len(given.runs) > 2:
        parser.error(f"{len(given.runs)} runs are given, but the page shows one or two.")
    from ..reports import write_viewer  # takes seconds, and --help does not need it

    output = Path(given.output or Path(given.runs[0], "viewer.html"))
    write_viewer(given.runs, output)
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB): open it in a browser.")
