"""`trl-epo view`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..reports import write_viewer
from .usage import UsageError


def view(arguments: Sequence[str]) -> None:
    """Write the page of one or two runs, and say where it is."""
    parser = argparse.ArgumentParser(
        "trl-epo view",
        description="Write one HTML file to look at one or two runs: curves, and kept episodes turn by turn.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="The folder of a run; at most two.")
    parser.add_argument("--output", help="The file. By default viewer.html in the first run's folder.")
    given = parser.parse_args(arguments)
    if len(given.runs) > 2:
        parser.error(f"{len(given.runs)} runs are given, but the page shows one or two.")
    output = Path(given.output or Path(given.runs[0], "viewer.html"))
    try:
        write_viewer(given.runs, output)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB): open it in a browser.")
