"""
One training at a time writes into a folder: the first holds a lock on a file in there. The lock is the operating system's, of a
process (`fcntl.lockf`): it ends with the process, however that ends, and forks do not have it. On other systems, and on file
systems without locks, nobody is kept out; whether a lock holds on other hosts too is up to the file system.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"


class FolderInUse(RuntimeError):
    """Another process trains into the folder."""


@contextmanager
def sole_run(folder: str | Path) -> Iterator[None]:
    """
    While this context lasts, no other process can train into a folder. The same process may, but ends the lock when it is done.

    Raises:
        FolderInUse: If another process is in such a context.
    """
    file = _acquire(Path(folder))
    try:
        yield
    finally:
        if file is not None:
            Path(folder, LOCK_FILE).unlink(missing_ok=True)
            os.close(file)  # and with it the lock


def check_unused(folder: str | Path) -> None:
    """Raise [`FolderInUse`] if another process is training into a folder now. Not to be called within [`sole_run`]."""
    if Path(folder, LOCK_FILE).exists():
        with sole_run(folder):
            pass


def _acquire(folder: Path) -> int | None:
    """The descriptor that holds the lock; `None` where there are no locks."""
    if fcntl is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise FolderInUse(
                f"`output_dir` is {str(folder)!r}, in which {holder} is training. Give another folder, or wait until it ends. If "
                f"it ran on another machine that is no more, remove {path}."
            ) from error
        except OSError as error:
            os.close(file)
            logger.info("There is no lock on %s, whose file system has none: %s", folder, error)
            return None
        if _is_still(path, file):
            os.ftruncate(file, 0)
            os.write(
                file,
                f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M},".encode(),
            )
            return file
        os.close(file)  # that of a run which has just ended and removed it


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
