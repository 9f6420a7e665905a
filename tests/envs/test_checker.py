import re
import time
from pathlib import Path

import gymnasium
import pytest
from conftest import Corridor

from trl_epo import check_env
from trl_epo.envs import checker
from trl_epo.envs.base import WRAPPER
from trl_epo.envs.household import Household
from trl_epo.rollouts.environment_pool import make_environment_pool


@pytest.mark.parametrize("env", [Corridor(), Household()])
def test_good_environments_pass(env):
    assert check_env(env) is None


def test_options_are_used():
    with pytest.raises(ValueError, match="rooms"):
        check_env(Household(), options={"rooms": 99})


class Bad(Corridor):
    def reset(self, *, seed=None, options=None):
        return self.on_reset(*super().reset(seed=seed, options=options))

    def step(self, action):
        return self.on_step(*super().step(action))

    def on_reset(self, *answer):
        return answer

    def on_step(self, *answer):
        return answer


def bad(**methods):
    return type("Bad", (Bad,), {name: staticmethod(method) for name, method in methods.items()})()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (bad(on_reset=lambda obs, info: obs), r"`reset` returned 'You are.*must return `\(observation, info\)`"),
        (bad(on_reset=lambda obs, info: (b"x", info)), r"observation b'x' \(bytes\), but it must be a `str`"),
        (bad(on_reset=lambda obs, info: (" ", info)), "first observation is empty"),
        (bad(on_step=lambda *a: a[:4]), "must return `.observation, reward, terminated, truncated, info.`"),
        (bad(on_step=lambda o, r, *a: (o, float("inf"), *a)), "reward inf, but it must be finite"),
        (bad(on_step=lambda o, r, *a: (o, "1", *a)), r"reward '1' \(str\), but it must be a number"),
        (bad(on_step=lambda o, r, *a: (o, b"1", *a)), r"reward b'1' \(bytes\), but it must be a number"),
        (bad(on_step=lambda o, *a: ("", *a)), "every reply must be a sentence"),
        (bad(on_step=lambda *a: (*a[:4], {"success": "yes"})), "'yes', but must be a `bool`"),
        (bad(on_step=lambda *a: (*a[:4], {"admissible_actions": [1]})), r"\[1\], but must be a list of `str`"),
        (bad(on_step=lambda *a: (*a[:4], {"action_templates": [2]})), r"\[2\], but must be a list of `str`"),
        (bad(on_step=lambda *a: 1 / 0), "raised ZeroDivisionError"),
    ],
)
def test_each_fault_is_named(env, message):
    with pytest.raises(ValueError, match="(?s)Bad is not a text environment yet:.*" + message):
        check_env(env)


def test_first_observation_must_follow_from_the_seed():
    class Restless(Corridor):
        count = 0

        def reset(self, **kwargs):
            Restless.count += 1
            return f"Episode {Restless.count}.", {}

        def step(self, action):
            self.num_steps, self.place, self.door = 0, 0, 9
            return super().step(action)

    with pytest.raises(ValueError, match="another first observation the second time.*self.np_random"):
        check_env(Restless())


def test_several_faults_are_listed_at_once():
    class Spaceless(Bad):
        observation_space = gymnasium.spaces.Discrete(2)
        action_space = None

    with pytest.raises(ValueError) as error:
        check_env(Spaceless())
    assert str(error.value).count("\n- ") == 2


def test_factories_and_other_things():
    with pytest.raises(ValueError, match="Call it first"):
        check_env(Corridor)
    with pytest.raises(ValueError, match="must be a `gymnasium.Env`"):
        check_env({})


class Alike:
    """Talks like gymnasium's environments, and is none of them."""

    def reset(self, seed=None):
        return "Say stop.", {"suffix": ""}

    def step(self, action):
        stops = action == "stop"
        return "You have stopped." if stops else "Say stop.", float(stops), stops, False, {"suffix": ""}


class ToolNamedStep:
    """TRL's kind of environment."""

    def reset(self, **row):
        return "Walk."

    def step(self, to: str) -> str:
        """Walk."""
        return "Well done."


def test_what_only_talks_like_gymnasium(caplog):
    for refuse in (lambda: check_env(Alike()), lambda: make_environment_pool(Alike)):
        with pytest.raises(
            ValueError, match=r"Alike is no `gymnasium.Env`(?s:.*)ProcessEnv(?s:.*)    class Wrapped\(TextEnv\):"
        ):
            refuse()
    names = {"make": Alike}
    exec(WRAPPER, names)
    env = names["Wrapped"]()
    check_env(env)
    assert (env.reset()[0], env.step("stop")[1:]) == ("Say stop.", (1.0, True, False, {"suffix": "", "success": True}))
    assert make_environment_pool(ToolNamedStep) is None
    page = (Path(__file__).parents[2] / "docs" / "your_environment.md").read_text()
    assert re.sub("\n+", "\n", WRAPPER) in re.sub("\n+", "\n", page)


class Told(Corridor):
    instructions = "Walk to the door. Answer with left or right."


def test_what_is_missing_is_noted_and_no_error(caplog):
    check_env(Told())
    check_env(Household())
    assert caplog.text == ""
    check_env(Household(instructions=None))
    assert "Household: it has no `instructions`" in caplog.text
    caplog.clear()

    class Agreeable(Told):
        def step(self, action):
            *answer, info = super().step(action)
            return *answer, {"success": info["success"]}

    check_env(Agreeable())
    assert (
        "Agreeable: no nonsense is answered with `info[\"invalid_action\"] = True` (tried: '', 'xyzzy'" in caplog.text
    )
    assert "instructions" not in caplog.text


def test_what_takes_long_and_what_success_is_are_noted(caplog, monkeypatch):
    monkeypatch.setattr(checker, "SLOW", 0.05)

    class Slow(Told):
        def step(self, action):
            time.sleep(0.1 if action == "xyzzy" else 0.0)
            *answer, info = super().step(action)
            return *answer, {"invalid_action": True}

    check_env(Slow())
    assert "Slow: `step('xyzzy')` took 0.1 seconds." in caplog.text
    assert 'Slow: there is no `info["success"]`' in caplog.text


def test_a_signature_that_does_not_fit():
    class Old(Told):
        def reset(self, seed=None):
            return super().reset(seed=seed)

    with pytest.raises(ValueError, match=r"'options'. It is called as `reset\(seed=0, options=\{\}\)`"):
        check_env(Old())


def test_instructions_that_are_no_text():
    class Wrong(Corridor):
        instructions = 3

    with pytest.raises(ValueError, match=r"`instructions` is 3 \(int\), but must be a `str`"):
        check_env(Wrong())
