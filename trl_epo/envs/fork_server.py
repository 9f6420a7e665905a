"""
Processes for environments, and calls in them. They are forked from a server, which is a Python process without threads
that has imported what they need: a fork takes milliseconds, and what was imported is in memory once for all of them.

    trainer --- starts ---> server --- forks ---> process of an environment
       +------------------ a socket ---------------------+

A server lives in this file's `serve`, a process in `_work`; `Process` is the trainer's end of one.
"""

import ctypes
import gc
import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import cloudpickle


def _can_fork() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
        return True
    except (AttributeError, OSError):
        return False


CAN_FORK = _can_fork()  # Linux from 5.3 on; elsewhere each process is an interpreter started for it
SERVER_NAME, PROCESS_NAME = "trl-epo-server", "trl-epo-env"  # as `ps` and `top` show them
MOST_FILES = 65_536  # open ones that are asked for
CLOSING_TIME = 5.0  # seconds that a process that is killed may take to be gone

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_LENGTH = struct.Struct("!Q")


class ProcessDied(Exception):
    """The process, or its server, is no more."""


@cache
def allow_open_files() -> None:
    """Let this process have as many files open as it may (Unix): an environment takes two, and 1,024 is a usual limit."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Process:
    """
    A process that does one call after the other; calls come from one thread at a time, `kill` from any.

    Args:
        preload (`str`, *optional*): What its server does before it forks the first process, as `"module:function"`. All
            processes with the same one have the same server.

    Raises:
        OSError: If it cannot be started.
    """

    def __init__(self, preload: str | None = None):
        self._lock = threading.Lock()  # on what `kill` uses
        self._owner = os.getpid()
        self._pidfd: int | None = None
        self._server: _Server | None = None
        self._alone: subprocess.Popen | None = None
        self._socket, theirs = socket.socketpair()
        with theirs:
            if CAN_FORK:
                self._server = _starter.submit(_fork, preload, theirs).result()
            else:
                self._alone = _starter.submit(_start, "work", theirs, preload).result()

    def call(self, function: Callable, *args: Any) -> Any:
        """
        `function(*args)` there. Both are sent with `cloudpickle`.

        Raises:
            ProcessDied: If there is no answer to come any more.
            Exception: What the function raises, with a note of where. If it cannot be unpickled, a `RuntimeError` with
                its text.
        """
        request = cloudpickle.dumps((function, args))
        try:
            if CAN_FORK and self._pidfd is None:
                self._meet()
            _send(self._socket, request)
            if CAN_FORK:
                self._wait()
            answer = _receive(self._socket)
        except (OSError, EOFError) as error:
            raise ProcessDied from error
        value, failure = pickle.loads(answer)
        if failure is not None:
            raise _put_together(*failure)
        return pickle.loads(value)

    def kill(self) -> None:
        """Kill it; a call that waits for it raises `ProcessDied`."""
        with self._lock:
            if os.getpid() != self._owner:  # a fork of the trainer has a copy of this object
                return
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # all there is to do before it is forked
            if self._pidfd is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            elif self._server is not None:
                self._server.retire()  # it may be the server that hangs
            elif self._alone is not None:
                self._alone.kill()

    def close(self) -> None:
        """Kill it, and wait until it is gone."""
        self.kill()
        if self._alone is not None and os.getpid() == self._owner:
            self._alone.wait()
        with self._lock:
            if self._pidfd is not None:
                if os.getpid() == self._owner:
                    gone = select.poll()  # unlike `select` for any number of open files
                    gone.register(self._pidfd, select.POLLIN)
                    gone.poll(1000 * CLOSING_TIME)
                os.close(self._pidfd)
                self._pidfd = None
            self._socket.close()
            self._server = None

    def __del__(self):
        with suppress(Exception):  # one that was not made, or at the end of Python
            self.kill()
            if self._pidfd is not None:
                os.close(self._pidfd)

    def _meet(self) -> None:
        """Wait until it is there; it sends a file that stands for it."""
        _, files, _, _ = socket.recv_fds(self._socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not files:
            raise EOFError
        self._ready = select.poll()
        self._ready.register(self._socket, select.POLLIN)
        self._ready.register(files[0], select.POLLIN)
        with self._lock:
            self._pidfd = files[0]

    def _wait(self) -> None:
        """Wait until there is an answer, or the process is gone: others may have its end of the socket."""
        ready = {file for file, _ in self._ready.poll()}
        if self._socket.fileno() not in ready:
            raise EOFError


class _Server:
    """The trainer's end of a server."""

    def __init__(self, preload: str | None):
        self._control, theirs = socket.socketpair()
        with theirs:
            process = _start("serve", theirs, preload)
        self._preload = preload
        self._end = weakref.finalize(self, _end_server, process, self._control, os.getpid())

    def fork(self, theirs: socket.socket) -> None:
        """Have a process forked that gets this socket. Raises `OSError` if the server is no more."""
        socket.send_fds(self._control, [b"f"], [theirs.fileno()])

    def retire(self) -> None:
        """Fork no more processes. It lives for as long as one of its processes is used: these end with it."""
        if _servers.get(self._preload) is self:
            del _servers[self._preload]


_servers: dict[str | None, _Server] = {}


def _new_starter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="starts-environments")


# Linux ends a process when the *thread* ends that has started it: they are all started by this one.
_starter = _new_starter()


def _after_fork() -> None:
    global _starter
    _starter = _new_starter()  # the thread was left behind
    _servers.clear()  # they are the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _fork(preload: str | None, theirs: socket.socket) -> _Server:
    if preload in _servers:
        with suppress(OSError):
            _servers[preload].fork(theirs)
            return _servers[preload]
    server = _servers[preload] = _Server(preload)  # the first, or the last one was killed
    server.fork(theirs)
    return server


def _start(what: str, theirs: socket.socket, preload: str | None) -> subprocess.Popen:
    """Start `serve` or `work` in a new interpreter."""
    code = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import {what}; {what}()"
    path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
    command = [sys.executable, "-P", "-c", code, path, str(theirs.fileno()), str(os.getpid()), preload or ""]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])


def _end_server(process: subprocess.Popen, control: socket.socket, owner: int) -> None:
    control.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()


def _put_together(error: bytes | None, text: str, trace: str) -> BaseException:
    try:
        exception = pickle.loads(error)
        exception.add_note(f"In the environment's process:\n{trace}")
        return exception
    except Exception:  # as one whose class takes other arguments than it says
        return RuntimeError(text)


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> bytearray:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    left = memoryview(data)
    while left:
        if not (received := connection.recv_into(left)):
            raise EOFError
        left = left[received:]
    return data


# In a server


def serve() -> None:
    """Fork a process for each socket that comes; end with the trainer."""
    control, preload = _begin(SERVER_NAME)
    _import(preload)
    gc.collect()
    gc.freeze()  # what is not collected is not written to, and so stays in memory once
    me = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    while True:
        message, files, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not message:
            os._exit(0)
        with suppress(OSError):  # no more processes or memory: the socket closes, and says so
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                _work(socket.socket(fileno=files[0]), parent=me)
        os.close(files[0])


# In a process


def work() -> None:
    """Be a process without a server."""
    connection, preload = _begin(PROCESS_NAME)
    _import(preload)
    _answer(connection)


def _work(connection: socket.socket, parent: int) -> None:
    """Be a process that was forked; does not return."""
    try:
        _end_with(parent)
        _call_it(PROCESS_NAME)
        if "numpy" in sys.modules:  # Python's own generator sees to itself
            sys.modules["numpy"].random.seed()
        pidfd = os.pidfd_open(os.getpid())
        socket.send_fds(connection, [b"p"], [pidfd])
        os.close(pidfd)
        _answer(connection)
    finally:
        os._exit(1)


def _begin(name: str) -> tuple[socket.socket, str]:
    connection, parent, preload = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    _end_with(parent)
    _call_it(name)
    # A terminal's Ctrl-C, and a scheduler's signal to every process, is for the trainer, who decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _do_nothing)  # what the environment itself starts does not inherit that
    return socket.socket(fileno=connection), preload


def _import(preload: str) -> None:
    if preload:
        module, function = preload.split(":")
        with suppress(Exception):  # the environment says what is missing
            getattr(import_module(module), function)()


def _answer(connection: socket.socket) -> None:
    """Do what is asked, until nobody asks any more."""
    while True:
        try:
            request = _receive(connection)
        except (OSError, EOFError):
            os._exit(0)
        try:
            function, args = pickle.loads(request)
            answer: tuple[bytes | None, Any] = (cloudpickle.dumps(function(*args)), None)
        except BaseException as error:  # also that of one that calls `sys.exit`
            answer = (None, _taken_apart(error))
        _send(connection, pickle.dumps(answer))


def _taken_apart(error: BaseException) -> tuple[bytes | None, str, str]:
    """What `_put_together` takes."""
    text = "".join(traceback.format_exception_only(error)).strip()
    trace = "".join(traceback.format_exception(error))
    try:
        return cloudpickle.dumps(error), text, trace
    except Exception:
        return None, text, trace


def _do_nothing(number: int, frame: Any) -> None:
    pass


def _call_it(name: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _end_with(parent: int) -> None:
    """Have this process end when its parent does, however that happens."""
    if sys.platform == "linux":  # at once, and also if it is stopped
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)
    else:
        threading.Thread(target=_look_after, args=(parent,), name="ends-with-parent", daemon=True).start()


def _look_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
