"""The cache of translations: real files, real processes, really killed."""

import logging
import os
import subprocess
import sys
import time

import pytest
from conftest import child_environment, wait_for

from trl_epo.envs.alfworld.disk_cache import LEFT_OVER, DiskCache


KEY, OTHER = "a" * 64, "b" * 64


def never():
    raise AssertionError("is computed once more")


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path / "cache", max_size=10**6)


def test_a_value_is_computed_once(cache):
    value = os.urandom(1000)
    assert cache.get(KEY, lambda: value) == value
    assert DiskCache(cache.folder, max_size=10**6).get(KEY, never) == value
    assert cache.get(OTHER, lambda: b"") == b""
    assert cache.get(OTHER, never) == b""
    assert (cache.folder.stat().st_mode & 0o777, (cache.folder / KEY).stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[::-1]])
def test_a_damaged_file_counts_for_nothing(cache, damage):
    cache.get(KEY, lambda: b"value")
    file = cache.folder / KEY
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get(KEY, lambda: b"value") == b"value"
    assert cache.get(KEY, never) == b"value"


def test_a_file_of_another_key_counts_for_nothing(cache):
    cache.get(KEY, lambda: b"value")
    (cache.folder / KEY).rename(cache.folder / OTHER)
    assert cache.get(OTHER, lambda: b"other") == b"other"


PROCESS = """
import os, sys, time
from pathlib import Path
from trl_epo.envs.alfworld import disk_cache

folder, notes, die = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def compute():
    (notes / str(os.getpid())).touch()
    while die == "computing" or not (notes / "go").exists():
        time.sleep(0.01)
    return b"value" * 10**5

if die == "writing":
    disk_cache.os.replace = lambda *args, **kwargs: os.kill(os.getpid(), 9)
assert disk_cache.DiskCache(folder, 10**6).get("a" * 64, compute) == b"value" * 10**5
"""


def test_processes_at_once_and_killed_in_the_middle(cache, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()

    def start(die="no"):
        command = [sys.executable, "-c", PROCESS, str(cache.folder), str(notes), die]
        return subprocess.Popen(command, env=child_environment())

    def num_computing():
        return len(list(notes.iterdir()))

    killed = start("computing")
    assert wait_for(lambda: num_computing() == 1)
    others = [start(), start()]
    killed.kill()  # it has the lock, which goes to one of the others
    assert wait_for(lambda: num_computing() == 2)
    (notes / "go").touch()
    assert [process.wait(300) for process in others] == [0, 0]
    assert num_computing() == 3  # and "go"
    assert cache.get(KEY, never) == b"value" * 10**5

    (cache.folder / KEY).unlink()
    assert start("writing").wait(300) == -9
    (part,) = cache.folder.glob("*.part")
    assert cache.get(KEY, lambda: b"value") == b"value"
    assert part.exists()  # somebody may be at it
    os.utime(part, (0, time.time() - LEFT_OVER - 60))
    cache.get(OTHER, lambda: b"value")
    assert not part.exists()


def test_what_was_not_used_for_longest_goes(cache):
    cache.max_size = 5000
    values = {f"{n:064}": os.urandom(1000) for n in range(5)}
    for number, (key, value) in enumerate(values.items()):
        cache.get(key, lambda value=value: value)
        if number < 4:
            os.utime(cache.folder / key, (0, number + 1))
        if number == 1:
            cache.get(f"{0:064}", never)  # it was used
    kept = {file.name for file in cache.folder.iterdir()} - {"lock"}
    assert kept == {f"{n:064}" for n in (0, 2, 3, 4)}
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= 5000


def spoil_nothing(folder):
    folder.write_text("no folder")


def spoil_mode(folder):
    folder.mkdir()
    folder.chmod(0o777)


def spoil_link(folder):
    folder.with_name("elsewhere").mkdir()
    folder.symlink_to(folder.with_name("elsewhere"))


def spoil_owner(folder):
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder of another user")
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)


@pytest.mark.parametrize("spoil", [spoil_nothing, spoil_mode, spoil_link, spoil_owner])
def test_a_folder_that_others_may_have_written_is_not_used(cache, spoil, caplog):
    spoil(cache.folder)
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY, lambda: b"value") == b"value"
        assert cache.get(KEY, lambda: b"other") == b"other"
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"Nothing is kept in the cache {cache.folder}"
    ]
