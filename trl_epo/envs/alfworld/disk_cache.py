"""What is costly to compute, kept in files for every process and every run of a user."""

import fcntl
import hashlib
import logging
import os
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds, for another process that computes the same
LEFT_OVER = 3600.0  # seconds, after which a file that is not whole belongs to a process that was killed
_PART = ".part"
_LOCK = "lock"


def user_folder(name: str) -> Path:
    """Where this user's caches are: in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "trl_epo" / name


class DiskCache:
    """
    Values by key, in a folder of which any number of processes may use the same, and may be killed at any time: a file
    is put in place when it is whole, and one that is damaged counts for nothing. Of processes that want the same value at
    once, one computes it.

    The folder has to be this user's own, and nobody else's to write to; else, and where nothing can be written, all
    values are computed, and a warning says why.

    Args:
        folder: Is made if need be.
        max_size: Bytes of all files. Beyond, those that were not used for longest are removed.
    """

    def __init__(self, folder: Path, max_size: int):
        self.folder = folder
        self.max_size = max_size
        self._warned = False

    def get(self, key: str, compute: Callable[[], bytes]) -> bytes:
        """
        The value of a key, computed if need be.

        Args:
            key: Hexadecimal digits of a digest of all that the value depends on.
            compute: Makes the value.
        """
        try:
            folder = self._open()
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
            self._warn(error)
            return compute()
        try:
            if (value := _read(folder, key)) is not None:
                return value
            with _locked(folder, key):
                if (value := _read(folder, key)) is not None:  # another process was at it
                    return value
                value = compute()
                try:
                    _write(folder, key, value)
                    self._remove_oldest(folder)
                except OSError as error:
                    self._warn(error)
                return value
        finally:
            os.close(folder)

    def _open(self) -> int:
        path = self.folder.expanduser()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        status = os.fstat(folder)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            os.close(folder)
            raise PermissionError("the folder is another user's, or others may write to it")
        return folder

    def _remove_oldest(self, folder: int) -> None:
        files, size, now = [], 0, time.time()
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # another process removes files too
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(_PART):
                    if now - status.st_mtime > LEFT_OVER:
                        os.unlink(entry.name, dir_fd=folder)
                elif entry.name != _LOCK:
                    files.append((status.st_mtime, status.st_size, entry.name))
                    size += status.st_size
        if size <= self.max_size:
            return
        for _, bytes_, name in sorted(files):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            size -= bytes_
            if size <= 0.9 * self.max_size:
                break

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning("Nothing is kept in the cache %s: %s", self.folder, error)
        self._warned = True


def _read(folder: int, key: str) -> bytes | None:
    try:
        file = os.open(key, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
        with open(file, "rb") as opened:
            content = opened.read()
            os.utime(file)  # it was used
        value = zlib.decompress(content[hashlib.sha256().digest_size :])
    except (OSError, zlib.error):
        return None
    return value if _digest(key, value) == content[: hashlib.sha256().digest_size] else None


def _write(folder: int, key: str, value: bytes) -> None:
    part = f"{key}.{secrets.token_hex(8)}{_PART}"
    try:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        with open(file, "wb") as opened:
            opened.write(_digest(key, value) + zlib.compress(value))
        os.replace(part, key, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(part, dir_fd=folder)
        raise


def _digest(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + value).digest()


@contextmanager
def _locked(folder: int, key: str) -> Iterator[None]:
    """Alone with a key; together with others after a while, as a process with the lock may have been stopped."""
    try:
        lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.lockf(
                    lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:14], 16)
                )  # a byte of the file for each key
                break
            except (BlockingIOError, PermissionError):
                time.sleep(0.02)
            except OSError:  # no locks on this file system
                break
        yield
    finally:
        os.close(lock)  # and with it the lock
