"""TextArena: its real games, in processes of their own."""

import importlib.util
import os
import random
import subprocess
import sys

import pytest

from trl_epo import check_env
from trl_epo.envs.textarena import LocalTextArena, TextArena, tasks


needs_textarena = pytest.mark.skipif(
    importlib.util.find_spec("textarena") is None, reason='needs pip install "trl-epo[textarena]"'
)


def guess(env):
    """Wins GuessTheNumber by halves; returns the last step."""
    low, high = 1, 20
    while True:
        step = env.step(str((low + high) // 2))  # without brackets, which the game wants
        if step[2]:
            return step
        if "higher" in step[0]:
            low = (low + high) // 2 + 1
        else:
            high = (low + high) // 2 - 1


@needs_textarena
def test_keeps_to_the_contract():
    env = TextArena("FrozenLake-v0")
    check_env(env)
    env.close()


@needs_textarena
def test_one_for_each_dataset_row():
    env = TextArena()
    assert "[5]" in env.instructions
    observation, info = env.reset(seed=2, options={"game": "GuessTheNumber-v0"})
    assert "You are playing Guess The Number." in observation
    assert info == {"success": False, "invalid_action": False, "task": "GuessTheNumber-v0"}
    text, *verdict, info = guess(env)
    assert text == "Congratulations! You guessed the correct number."  # and not the player's own words
    assert verdict == [1.0, True, False]
    assert info == {"success": True, "invalid_action": False, "task": "GuessTheNumber-v0"}
    with pytest.raises(RuntimeError, match="Call env.reset"):
        env.step("5")
    observation, info = env.reset(seed=2, options={"game": "Mastermind-v0"})
    assert "Mastermind" in observation and info["task"] == "Mastermind-v0"
    env.close()


@needs_textarena
def test_a_part_of_the_reward_is_no_success():
    env = LocalTextArena("GuessTheNumber-v0")
    env.reset(seed=0)
    secret = env._env.state.game_state["game_number"]
    near = secret + 1 if secret < 20 else secret - 1
    env.step(f"[{near}]")
    _, *verdict, info = env.step(f"[{near}]")  # again, which the rules do not allow …
    assert verdict == [0.0, False, False] and info["invalid_action"]
    _, reward, terminated, _, info = env.step("nonsense")  # … nor twice
    assert 0.9 < reward < 1.0 and terminated
    assert (info["success"], info["invalid_action"]) == (False, True)


@needs_textarena
def test_the_same_seed_is_the_same_game_whoever_draws_meanwhile():
    """2048 draws while it is played. Another game, and this process's own numbers, do not disturb it."""
    here, there, other = LocalTextArena("2048-v0"), TextArena("2048-v0"), TextArena("2048-v0")
    moves = ["[Up]", "[Left]", "[Down]", "[Right]"] * 5
    first = here.reset(seed=7)
    alone = [first, *(here.step(move) for move in moves)]
    together = [there.reset(seed=7)]
    other.reset(seed=8)
    for move in moves:
        random.random()
        other.step(move)
        together.append(there.step(move))
    assert together == alone
    assert other.reset(seed=9) != first
    there.close()
    other.close()


@needs_textarena
@pytest.mark.parametrize("game", ["Countdown-v0", "ThreeCardMonte-v0"])
def test_games_with_arguments_in_the_wrong_order(game):
    env = LocalTextArena(game)
    env.reset(seed=0)
    while True:
        text, reward, terminated, _, info = env.step("nonsense")
        assert text and info["invalid_action"]
        if terminated:
            break
    assert reward == 0.0


@needs_textarena
def test_games_that_are_not_to_be_had():
    env = LocalTextArena()
    for game, message in (
        ("FrozenLake", "no game 'FrozenLake'.*FrozenLake-v0, FrozenLake-v0-random"),
        ("Lake", "no game 'Lake'"),
        ("TicTacToe-v0", "'TicTacToe-v0' is no single-player game"),
        ("PublicGoodsGame-v0", "no single-player game"),  # begins with one player all the same
        (None, "no game: give one"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(options={"game": game})
    with pytest.raises(ValueError, match="unknown options.*level"):
        env.reset(options={"level": 1})
    with pytest.raises(FileNotFoundError, match="nltk.downloader words"):
        nltk_without_network(env)


def nltk_without_network(env):
    env.reset(options={"game": "Wordle-v0"})


def test_rows():
    train, iid, ood = (tasks(split, 30) for split in ("train", "iid", "ood"))
    assert set(train["game"]) == set(iid["game"]) and not set(train["game"]) & set(ood["game"])
    assert len({*train["seed"], *iid["seed"]}) == 60
    assert train["game"][:2] == ["FrozenLake-v0-random", "GuessTheNumber-v0"]
    assert set(tasks("train", 4, games="Sokoban-v0")["game"]) == {"Sokoban-v0"}
    with pytest.raises(ValueError, match="unknown split 'test'"):
        tasks("test", 4)
    with pytest.raises(ValueError, match=r"\['Mastermind-v0-hard'\] are in `games` and in `other_games`"):
        tasks("train", 4, games=["Mastermind-v0-hard"])
    with pytest.raises(ValueError, match="no games of split 'ood'"):
        tasks("ood", 4, other_games=[])


def test_what_is_missing_is_named(tmp_path):
    code = """
import sys
sys.modules["textarena"] = sys.modules["openenv"] = None
from trl_epo.envs.openenv import OpenEnv
from trl_epo.envs.textarena import TextArena
for make, extra in ((lambda: TextArena("FrozenLake-v0").reset(), "textarena"), (lambda: OpenEnv("http://127.0.0.1:1"), "openenv")):
    try:
        make()
    except ImportError as error:
        assert f'pip install "trl-epo[{extra}]"' in str(error), error
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ, check=True, timeout=300)
