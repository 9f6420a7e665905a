"""The rows of the study: one for each run, a line of JSON each."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


Row = dict[str, Any]
Key = tuple[str, str, int]


def key_of(row: Row) -> Key:
    """Which run a row is of: its phase, arm and seed."""
    return row["phase"], row["arm"], row["seed"]


def read_rows(file: Path) -> list[Row]:
    """
    The rows of a file; none if it is not there.

    Raises:
        ValueError: If a line is not JSON, or two rows are of one run.
    """
    rows, lines_of = [], {}
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {file} is not JSON: {error}") from error
        first = lines_of.setdefault(key_of(row), number)
        if first != number:
            raise ValueError(
                f"Lines {first} and {number} of {file} are of one run, {key_of(row)}: delete one of them."
            )
        rows.append(row)
    return rows


def append_row(file: Path, row: Row) -> None:
    """
    Add a row to a file, which holds either all of it or nothing whatever happens meanwhile.

    Raises:
        ValueError: If there is a row of this run already.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_name(file.name + ".lock")):
        if key_of(row) in {key_of(other) for other in read_rows(file)}:
            raise ValueError(f"{file} has a row of {key_of(row)} already.")
        beside = file.with_name(file.name + ".tmp")
        with open(beside, "w") as output:
            output.write(file.read_text() if file.exists() else "")
            output.write(json.dumps(row) + "\n")
            output.flush()
            os.fsync(output.fileno())
        os.replace(beside, file)


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[None]:
    """
    While this context lasts, no other process is in one with the same file.

    Raises:
        BlockingIOError: If another process is, and this one does not want to wait.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
