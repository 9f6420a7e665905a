"""ALFWorld: real games where there are any ($ALFWORLD_DATA, or ../shared/alfworld), generated ones otherwise."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from trl_epo import check_env
from trl_epo.envs.alfworld import TASKS, AlfWorld, LocalAlfWorld, expert_actions, make_game, tasks, write_games
from trl_epo.envs.fork_server import PROCESS_NAME


REAL = Path(os.environ.get("ALFWORLD_DATA") or Path(__file__).parents[3] / "shared" / "alfworld")
needs_alfworld = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None, reason='needs pip install "trl-epo[alfworld]"'
)
needs_real_games = pytest.mark.skipif(not (REAL / "json_2.1.1").is_dir(), reason=f"no ALFWorld games in {REAL}")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of translations that is empty at first."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "trl_epo" / "alfworld"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Twelve generated games, two of each kind of task."""
    folder = tmp_path_factory.mktemp("alfworld")
    write_games(folder, "train", 12)
    return folder


@pytest.fixture(scope="module")
def rows(generated):
    """One game of each kind of task: a real one, if there are any."""
    dataset = tasks("train", data=REAL if (REAL / "json_2.1.1").is_dir() else generated)
    return [next(row for row in dataset if row["task"] == name) for name in TASKS]


@pytest.fixture
def env():
    env = AlfWorld()
    yield env
    env.close()


def play(env, actions):
    """Takes the actions until the episode ends; returns the steps."""
    steps = []
    for action in actions:
        steps.append(env.step(action))
        if steps[-1][2] or steps[-1][3]:
            break
    return steps


# Without ALFWorld


def lay_out(root, *games):
    """Makes files like ALFWorld's, of what is listed only; `games` are (split's folder, trajectory, solvable)."""
    for folder, trajectory, solvable in games:
        file = root / "json_2.1.1" / folder / trajectory / "trial_T1" / "game.tw-pddl"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"solvable": solvable, "walkthrough": ["look"]}))


@pytest.fixture
def listing(tmp_path):
    lay_out(
        tmp_path,
        ("train", "pick_two_obj_and_place-CD-None-Drawer-328", True),
        ("train", "pick_and_place_simple-Mug-None-Shelf-1", True),
        ("train", "pick_and_place_simple-Mug-None-Shelf-2", False),
        ("train", "pick_heat_then_place_in_recep-PotatoSliced-None-Shelf-3", True),
        ("train", "pick_and_place_with_movable_recep-Pen-Bowl-Shelf-4", True),
        ("valid_seen", "look_at_obj_in_light-CD-None-DeskLamp-5", True),
        ("valid_unseen", "pick_and_place_simple-Pen-None-Desk-6", True),
    )
    return tmp_path


def test_a_row_for_each_game_that_alfworld_plays(listing):
    dataset = tasks("train", data=listing)
    assert dataset.column_names == ["task", "game"]
    assert dataset["task"] == ["pick_and_place_simple", "pick_two_obj_and_place"]
    assert Path(dataset[0]["game"]) == (
        listing / "json_2.1.1/train/pick_and_place_simple-Mug-None-Shelf-1/trial_T1/game.tw-pddl"
    )
    assert expert_actions(dataset[0]["game"]) == ["look"]


def test_splits_go_by_both_names(listing, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(listing))
    assert tasks("iid")[:] == tasks("valid_seen")[:]
    assert tasks("iid")["task"] == ["look_at_obj_in_light"]
    assert tasks("ood")[:] == tasks("valid_unseen")[:]
    assert tasks("ood")["task"] == ["pick_and_place_simple"]


def test_chosen_tasks(listing):
    assert tasks("train", ["pick_two_obj_and_place"], listing)["task"] == ["pick_two_obj_and_place"]
    assert tasks("train", "pick_and_place_simple", listing)["task"] == ["pick_and_place_simple"]


def test_no_games_names_the_place_and_the_remedy(listing, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(listing / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match=r"nowhere/json_2.1.1/train' with games of split 'train'.*alfworld-down"
    ):
        tasks("train")
    with pytest.raises(ValueError, match="no game of look_at_obj_in_light in '.*/train'.*alfworld-download"):
        tasks("train", "look_at_obj_in_light", listing)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks("test"), "unknown split 'test': expected one of train, iid, ood, valid_seen, valid_unseen"),
        (lambda: tasks("train", ["boil"]), "unknown ALFWorld task 'boil': expected one of pick_and_place_simple, "),
        (lambda: AlfWorld(turns=0), "turns=0: expected at least 1"),
        (lambda: LocalAlfWorld().reset(), "no game: give one as"),
        (lambda: LocalAlfWorld().reset(options={"path": "x"}), r"unknown options \['path'\]: expected task, game"),
        (lambda: make_game("boil", 0), "unknown ALFWorld task 'boil'"),
        (lambda: LocalAlfWorld(__file__).reset(), "test_alfworld.py' is not an ALFWorld game"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_game_names_the_remedy():
    with pytest.raises(FileNotFoundError, match=r"there is no game '/nowhere/game.tw-pddl'.*alfworld-download"):
        LocalAlfWorld("/nowhere/game.tw-pddl").reset()


def test_calls_out_of_order():
    for env in (LocalAlfWorld(), AlfWorld()):
        with pytest.raises(RuntimeError, match="no episode is running.*all env.reset"):
            env.step("look")
        env.close()


def test_missing_package_names_the_remedy(listing, monkeypatch):
    monkeypatch.setitem(sys.modules, "alfworld", None)
    monkeypatch.setitem(sys.modules, "alfworld.agents.environment.alfred_tw_env", None)
    with pytest.raises(ImportError, match=r'pip install "trl-epo\[alfworld\]".*compiler'):
        LocalAlfWorld(tasks("iid", data=listing)[0]["game"]).reset()


def test_import_needs_no_alfworld():
    code = "import sys, trl_epo.envs.alfworld; assert not {'alfworld', 'textworld'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# With ALFWorld


@needs_alfworld
def test_generated_games_are_a_function_of_the_seed(generated, tmp_path):
    def games(folder):
        return {file.relative_to(folder): file.read_text() for file in folder.rglob("*.tw-pddl")}

    write_games(tmp_path / "same", "train", 12)
    write_games(tmp_path / "other", "train", 12, seed=1)
    assert games(tmp_path / "same") == games(generated)
    assert len(games(generated)) == 12
    assert not set(games(tmp_path / "other").values()) & set(games(generated).values())


@needs_alfworld
def test_expert_solves_generated_games(generated):
    env = LocalAlfWorld()
    for row in tasks("train", data=generated):
        _, info = env.reset(options=row)
        for action in (actions := expert_actions(row["game"])):
            assert action in info["admissible_actions"]
            _, reward, terminated, truncated, info = env.step(action)
            last = action is actions[-1]  # nothing before the last step is enough
            assert (reward, terminated, truncated, info["success"]) == (float(last), last, False, last), row["game"]


@needs_alfworld
def test_a_problem_of_ones_own(tmp_path):
    """As the docs say: a file with these three parts is a game."""
    parts = make_game("pick_and_place_simple", seed=0)
    take = next(action for action in parts["walkthrough"] if action.startswith("take"))
    problem, _ = parts["pddl_problem"].split("(:goal")
    problem += "(:goal (exists (?o - object ?a - agent) (holds ?a ?o)))\n(:metric minimize (total-cost)))\n"
    game = tmp_path / "mine.tw-pddl"
    names = ("pddl_domain", "grammar")
    game.write_text(json.dumps({name: parts[name] for name in names} | {"pddl_problem": problem}))
    env = LocalAlfWorld(game)
    env.reset()
    *_, last = play(env, parts["walkthrough"][: parts["walkthrough"].index(take) + 1])
    assert (last[1], last[2], last[4]["success"]) == (1.0, True, True)


@needs_alfworld
def test_expert_succeeds(env, rows):
    for row in rows:
        observation, info = env.reset(options=row)
        assert "Your task is to: " in observation
        assert (info["task"], info["game"], info["success"]) == (row["task"], row["game"], False)
        steps = play(env, expert_actions(row["game"]))
        assert [step[1] for step in steps] == [0.0] * (len(steps) - 1) + [1.0]
        assert steps[-1][2:4] == (True, False)
        assert steps[-1][4]["success"]
        assert not any(step[4]["invalid_action"] for step in steps)
        with pytest.raises(RuntimeError, match="it has ended"):
            env.step("look")


@needs_alfworld
@pytest.mark.parametrize("make", [LocalAlfWorld, AlfWorld])
def test_the_expert_goes_on_after_mistakes(generated, make):
    """Its first plan is the game's solution; after anything else it plans anew."""
    draw = random.Random(0)
    for row in tasks("train", data=generated).select(range(0, 12, 4)):
        with closing(make()) as env:
            _, info = env.reset(options=row)
            assert env.expert_action() == expert_actions(row["game"])[0]
            for _ in range(6):
                *_, info = env.step(draw.choice([a for a in info["admissible_actions"] if a.startswith("go to")]))
            env.step("nonsense")
            steps = 0
            while not info["success"]:
                *_, info = env.step(env.expert_action())
                steps += 1
            assert steps <= 12
    with pytest.raises(RuntimeError, match="env.reset"):
        make().expert_action()


@needs_alfworld
def test_a_searching_expert_knows_what_was_shown(generated):
    draw, lengths = random.Random(0), []
    for row in tasks("train", data=generated):
        env = LocalAlfWorld(turns=60, searching_expert=True)
        shown, info = env.reset(options=row)
        while not info["success"]:
            command = env.expert_action()
            if not command.startswith(("go to", "open")):
                assert all(name in shown for name in re.findall(r"[a-z]+ \d+", command)), command
            if draw.random() < 0.3:
                command = draw.choice(info["admissible_actions"])
            observation, _, terminated, truncated, info = env.step(command)
            shown += observation
            assert not truncated
        lengths.append(env._turn)
        env.close()
    assert len(lengths) == 12


@needs_alfworld
def test_what_is_true_is_told_in_order():
    from textworld.logic import Type, TypeHierarchy

    from trl_epo.envs.alfworld.engine import Facts

    types = TypeHierarchy()
    for name in ("mug", "shelf"):
        types.add(Type(name, ["object"]))
    facts = Facts(types)

    def on_shelves(condition="on(m:mug, s:shelf)"):
        return [[value for value, _ in way.values()] for way in facts.matches(condition, {})]

    def on(mug, shelf):
        return "on", ((mug, "mug"), (shelf, "shelf"))

    assert on_shelves() == []
    facts.add(*on("mug_2", "shelf_1"))
    assert on_shelves() == [["mug_2", "shelf_1"]]
    facts.add(*on("mug_1", "shelf_1"))
    assert on_shelves() == [["mug_1", "shelf_1"], ["mug_2", "shelf_1"]]
    both = "on(m:mug, s:shelf) & on(n:mug, s:shelf)"  # different placeholders are different things
    assert on_shelves(both) == [["mug_1", "shelf_1", "mug_2"], ["mug_2", "shelf_1", "mug_1"]]
    facts.discard(*on("mug_1", "shelf_1"))
    assert on_shelves() == [["mug_2", "shelf_1"]] and on_shelves(both) == []


@needs_real_games
def test_split_of_real_games():
    for split in ("train", "iid"):
        dataset = tasks(split, data=REAL)
        assert set(dataset["task"]) == set(TASKS)
        assert all(Path(game).is_file() for game in dataset["game"])
        assert all(expert_actions(game) for game in dataset["game"])


@needs_alfworld
def test_keeps_to_the_contract(env, rows):
    check_env(env, rows[0])


@needs_alfworld
def test_replies_to_actions(rows):
    env = LocalAlfWorld(rows[0]["game"])
    _, info = env.reset()
    go = next(action for action in info["admissible_actions"] if action.startswith("go to"))
    arrived = env.step(f"  {go.upper().replace(' ', '  ')}\n")
    assert arrived[0].startswith("You arrive at")
    assert not arrived[4]["invalid_action"]
    for action in ("fly to the moon", "", "look\nlook", "\ud800", "x" * 10_000):
        observation, reward, *_, info = env.step(action)
        assert (observation, reward, info["invalid_action"], info["success"]) == ("Nothing happens.", 0.0, True, False)
    assert not env.step("look")[4]["invalid_action"]


@needs_alfworld
@pytest.mark.parametrize("make", [LocalAlfWorld, AlfWorld])
def test_lists_what_is_possible_now(rows, make):
    env, plain = make(rows[0]["game"], list_actions=True), LocalAlfWorld(rows[0]["game"])
    actions = expert_actions(rows[0]["game"])
    for told, bare in zip([env.reset(), *play(env, actions)], [plain.reset(), *play(plain, actions)], strict=True):
        listed = f" Possible now: {', '.join(bare[-1]['admissible_actions'])}."
        assert told[0] == bare[0] + (listed if len(told) == 2 or not told[2] else "")
    env.close()


@needs_alfworld
def test_says_the_task_in_each_observation_before_what_is_possible(rows):
    env, plain = (AlfWorld(rows[0]["game"], list_actions=True, repeat_task=repeat) for repeat in (True, False))
    actions = expert_actions(rows[0]["game"])
    (first, _), (bare, _) = env.reset(), plain.reset()
    assert first == bare  # it ends with the task
    task = first.partition(" Possible now")[0].split("\n\n")[-1]
    assert task.startswith("Your task is to: ")
    *on, last = zip(play(env, actions), play(plain, actions), strict=True)
    for told, bare in on:
        said, possible = bare[0].split(" Possible now: ")
        assert told[0] == f"{said} {task} Possible now: {possible}"
    assert last[0][0] == last[1][0]  # there is nothing left to do
    env.close()
    plain.close()


@needs_alfworld
def test_turn_limit_truncates(rows):
    env = LocalAlfWorld(rows[0]["game"], turns=2)
    env.reset()
    assert env.step("look")[2:4] == (False, False)
    assert env.step("nonsense")[2:4] == (False, True)  # an invalid action takes a turn
    with pytest.raises(RuntimeError, match="Call env.reset"):
        env.step("look")
    env.reset()
    assert env.step("look")[2:4] == (False, False)
    assert LocalAlfWorld().turns == 50


@needs_alfworld
def test_success_on_the_last_turn_is_no_truncation(rows):
    actions = expert_actions(rows[0]["game"])
    env = LocalAlfWorld(rows[0]["game"], turns=len(actions))
    env.reset()
    assert play(env, actions)[-1][2:4] == (True, False)


@needs_alfworld
def test_same_game_same_episode(rows):
    actions = ["look", "inventory", "nonsense", *expert_actions(rows[0]["game"])]
    first, second = LocalAlfWorld(rows[0]["game"]), LocalAlfWorld()
    runs = [[first.reset(seed=1), *play(first, actions)]]
    second.reset(options=rows[1])  # another game before
    runs.append([second.reset(seed=2, options=rows[0]), *play(second, actions)])
    runs.append([second.reset(seed=3, options=rows[0]), *play(second, actions)])
    assert runs[0] == runs[1] == runs[2]


def stock_episodes(games):
    """What TextWorld as it comes says to the games' solutions and to 50 random steps; in processes of its own."""
    script = str(Path(__file__).parents[1] / "support" / "stock_alfworld.py")
    shares = [games[n :: os.cpu_count()] for n in range(os.cpu_count())]
    with ThreadPoolExecutor(len(shares)) as pool:
        for output in pool.map(lambda share: subprocess.check_output([sys.executable, script, "50", *share]), shares):
            yield from map(json.loads, output.splitlines())


def assert_plays_as_stock(games):
    env = LocalAlfWorld(turns=None)
    played = []
    for episode in stock_episodes(games):
        observation, info = env.reset(options={"game": episode["game"]})
        said = [[observation, info["admissible_actions"], info["success"]]]
        for command in episode["commands"]:
            observation, *_, info = env.step(command)
            said.append([observation, info["admissible_actions"], info["success"]])
        assert said == episode["states"], episode["game"]
        played.append((episode["game"], said[-1][2]))
    env.close()
    assert sorted(game for game, _ in played) == sorted(2 * games)
    assert all(won for _, won in played[::2])  # their solutions do


@needs_alfworld
def test_says_what_textworld_says(generated):
    """To the letter: observations, admissible commands and their order, success."""
    assert_plays_as_stock(list(tasks("train", data=generated)["game"])[:3])


@needs_alfworld
def test_says_what_textworld_says_in_words_of_ones_own(tmp_path):
    """Several actions with one command, and sentences on what is no longer true."""
    contents = make_game("pick_heat_then_place_in_recep", seed=0)
    grammar = contents["grammar"]
    for command in ("look", "help", "inventory"):
        assert grammar.count(f'template :: "{command}"') == 1
        grammar = grammar.replace(f'template :: "{command}"', 'template :: "wait"')
    rules = {
        "how": [
            {"condition": "not_opened(r:receptacle)", "rhs": " It is shut."},
            {"condition": "opened(r:receptacle)", "rhs": " It is ajar."},
        ]
    }
    first = '"OpenObject.feedback": ['
    assert grammar.count(first) == 1
    grammar = grammar.replace(first, json.dumps(rules)[1:-1] + ", " + first)
    for said in ("You open the {r.name}.", "You close the {r.name}."):
        assert grammar.count(said) == 1
        grammar = grammar.replace(said, said + "#how#")
    game = tmp_path / "game.tw-pddl"
    game.write_text(json.dumps({**contents, "grammar": grammar}))
    assert_plays_as_stock([str(game)])
    with closing(LocalAlfWorld(game)) as env:
        env.reset()
        places = [command for command in contents["walkthrough"] if command.startswith("open")]
        steps = play(env, [*contents["walkthrough"][:2], places[0].replace("open", "close"), places[0]])
    said = [re.search("ajar|shut", step[0]).group() for step in steps[1:]]
    assert said == ["ajar", "shut", "ajar"]


@needs_alfworld
@needs_real_games
def test_says_what_textworld_says_in_real_games():
    """Takes TextWorld some minutes."""
    assert_plays_as_stock([game for split in ("train", "iid") for game in tasks(split, data=REAL)["game"]])


@needs_alfworld
def test_plays_as_in_one_process(env, rows):
    here = LocalAlfWorld()
    for row in (rows[0], rows[0], rows[1], rows[0]):  # the same game again, from its beginning
        assert env.reset(options=row) == here.reset(options=row)
        for action in ("look", *expert_actions(row["game"])):
            assert env.step(action) == here.step(action)


@needs_alfworld
def test_several_at_once(rows):
    def episode(row):
        env = AlfWorld()
        try:
            first = env.reset(options=row)
            return [first, *play(env, expert_actions(row["game"]))]
        finally:
            env.close()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(episode, [*rows[:3], rows[0]]))
    assert [run[-1][4]["success"] for run in together] == [True] * 4
    assert [run[0][1]["game"] for run in together] == [row["game"] for row in [*rows[:3], rows[0]]]
    assert together[0] == together[3] == episode(rows[0])


@needs_alfworld
def test_a_killed_process_costs_its_episode(env, rows):
    before = set(psutil.Process().children(recursive=True))
    env.reset(options=rows[0])
    new = set(psutil.Process().children(recursive=True)) - before
    (worker,) = [child for child in new if child.name() == PROCESS_NAME]
    other = AlfWorld(rows[1]["game"])
    other.reset()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="process died.*call env.reset"):
        for _ in range(5):  # the pipe may take what is said to a dead process
            env.step("look")
    assert not other.step("look")[4]["invalid_action"]
    other.close()
    env.reset(options=rows[0])
    assert play(env, expert_actions(rows[0]["game"]))[-1][4]["success"]


@needs_alfworld
def test_benchmark():
    script = Path(__file__).parents[2] / "examples" / "benchmarks" / "alfworld_speed.py"
    sizes = ["--games", "2", "--steps", "5", "--environments", "2", "--stock_environments", "1"]
    command = [sys.executable, str(script), "--generate", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 games, 10 random steps")
    assert "the answers are the same" in done.stdout
    assert len(done.stdout.splitlines()) == 10
