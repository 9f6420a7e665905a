"""What the command line says of a user's mistakes, what it leaves to a traceback, and its help."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import child_environment, wait_for

from trl_epo import cli
from trl_epo.cli.help import COMMANDS, OTHERS, all_options, command_help, group_of
from trl_epo.cli.mistakes import is_told
from trl_epo.cli.play import PlayArguments
from trl_epo.cli.settings import _make_parser, parse
from trl_epo.cli.warm_up import WarmUpArguments
from trl_epo.runs import LOCK_FILE, last_whole_checkpoint, step_of


OWN = """
from datasets import Dataset
from trl_epo.envs import TextEnv
from trl_epo.rollouts.contexts import build_prompt
from trl_epo.rollouts.rollout import parse_action

calls = []

def rows(split, **kwargs):
    return [] if split == "ood" else Dataset.from_list([]) if split == "iid" else [{"seed": 1}]

class Silent(TextEnv):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "", {"success": "no"}
    def step(self, action):
        return f"{action}?", 0.0, False, False, {}

def reward(completions, **kwargs):
    calls.append("reward")
    return [0.5] * len(completions)

def broken_reward(completions, **kwargs):
    raise ValueError("a mistake in this function")

def prompt(view):
    calls.append("prompt")
    return build_prompt(view)

def action(text):
    calls.append("action")
    return parse_action(text)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "code_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("code_of_mine", None)


def flags(model_folder, output_dir, *more):
    few = (
        "--max_steps",
        "1",
        "--eval_strategy",
        "no",
        "--max_turn_length",
        "4",
        "--max_turns",
        "2",
        "--train_size",
        "8",
    )
    batch = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--num_generations", "4")
    named = ("--config", "household-small", "--model_name_or_path", model_folder, "--output_dir", str(output_dir))
    return [*named, *few, *batch, *map(str, more)]


def told(capsys, *arguments, code=2):
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith((f"trl-epo {arguments[0]}: error: ", "trl-epo: error: "))
    return line


class TestWhatIsTold:
    @pytest.mark.parametrize(
        ("module", "code", "expected"),
        [
            ("trl_epo.rollouts.failures", "raise RuntimeError('too many failed')", True),
            ("trl_epo.config", "raise ValueError('must be\\n  at least 1')", True),
            ("trl_epo.config", "raise ValueError", False),  # nothing is said
            ("trl_epo.config", "raise KeyError('x')", False),
            ("trl_epo.config", "int('x')", False),  # raised by Python
            ("trl_epo.config", "list(zip([1], [], strict=True))", False),
            ("trl_epo.config", "open('/no/such/file')", False),
            ("trl_epo.config", "open('/')", True),  # refused by the operating system
            ("code_of_mine", "raise ValueError('a mistake in here')", False),
            ("transformers.trainer", "raise ValueError('shapes differ')", False),  # once training has begun
        ],
    )
    def test_who_raised_it_and_how(self, module, code, expected):
        space = {"__name__": module}
        exec(f"def f():\n    {code}", space)
        with pytest.raises(Exception) as caught:
            space["f"]()
        assert is_told(caught.value) == expected

    def test_unknown_command(self, capsys):
        assert "no command 'trian'. Did you mean 'train'?" in told(capsys, "trian")
        assert "no command 'dance'. There are warm-up, train, evaluate" in told(capsys, "dance")

    def test_what_the_trainer_finds(self, capsys, tmp_path, model_folder):
        """Raised deep inside, in this package and in libraries."""
        given = flags(model_folder, tmp_path)
        assert "`reward_weights`" in told(capsys, "train", *given, "--reward_weights", "1", "1", "1")
        assert "`critic_model` is 'nowhere'" in told(
            capsys, "train", *given, "--advantage_estimator", "gae", "--critic_model", "nowhere"
        )
        assert "vllm" in told(capsys, "train", *given, "--use_vllm").lower()
        with pytest.raises(ValueError, match="`reward_weights`"):
            cli.main(["train", *given, "--reward_weights", "1", "1", "1", "--traceback"])

    def test_an_output_folder_that_cannot_be(self, capsys, tmp_path, model_folder):
        (tmp_path / "file").write_text("")
        line = told(capsys, "train", *flags(model_folder, tmp_path / "file" / "run"))
        assert f"`output_dir` is '{tmp_path / 'file' / 'run'}', but cannot be made" in line


class TestOnesOwnFunctions:
    def test_they_are_called(self, own, tmp_path, model_folder, capsys):
        import code_of_mine

        named = ("--prompt_builder", "code_of_mine:prompt", "--action_parser", "code_of_mine:action")
        given = flags(model_folder, tmp_path, *named, "--reward_funcs", "code_of_mine:reward", "--context", "window")
        cli.main(["train", *given])
        assert set(code_of_mine.calls) == {"reward", "prompt", "action"}
        code_of_mine.calls.clear()
        cli.main(["play", str(tmp_path)])
        assert set(code_of_mine.calls) == {"prompt", "action"}

    def test_their_own_mistakes_keep_the_traceback(self, own, tmp_path, model_folder):
        with pytest.raises(ValueError, match="a mistake in this function"):
            cli.main(["train", *flags(model_folder, tmp_path, "--reward_funcs", "code_of_mine:broken_reward")])

    def test_names_that_lead_nowhere(self, own, tmp_path, model_folder, capsys):
        given = flags(model_folder, tmp_path)
        line = told(capsys, "train", *given, "--reward_funcs", "code_of_mine:rewrad")
        file = tmp_path / "code_of_mine.py"
        assert f"`reward_funcs` is 'code_of_mine:rewrad', but 'code_of_mine' ({file}) has no 'rewrad'." in line
        assert line.endswith("Did you mean 'reward'?")
        line = told(capsys, "train", *given, "--action_parser", "code_of_yours:f")
        assert f"no module 'code_of_yours', neither in the working directory {Path.cwd()} nor among Python's" in line
        assert "must be 'module:name', such as 'my_code:prompt_builder'" in told(
            capsys, "train", *given, "--prompt_builder", "prompt"
        )
        (tmp_path / "broken_of_mine.py").write_text("import no_such_thing")
        line = told(capsys, "train", *given, "--action_parser", "broken_of_mine:f")
        assert "importing 'broken_of_mine' raises ModuleNotFoundError: No module named 'no_such_thing'" in line
        assert "that is a list" in told(capsys, "train", *given, "--action_parser", "code_of_mine:calls")
        given += ("--tasks", "code_of_mine:rows")
        assert "gives a list for the split 'train', and must give a `datasets.Dataset`" in told(
            capsys, "train", *given
        )
        given += ("--train_split", "iid")
        assert "gives no row for the split 'iid'" in told(capsys, "train", *given)


class TestCheckEnv:
    def test_it_keeps_to_the_contract(self, capsys):
        for named in (["household"], ["--environment", "household", "--environment_kwargs", "{}"]):
            cli.main(["check-env", *named])
            assert capsys.readouterr().out == "household is a text environment that trl-epo can train in.\n"

    def test_every_problem_is_a_line(self, own, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main(["check-env", "code_of_mine:Silent"])
        assert str(stop.value).startswith("trl-epo check-env: Silent is not a text environment yet:\n- ")
        assert "\n- The first observation is empty" in str(stop.value)

    def test_mistakes(self, capsys):
        assert "Name one environment" in told(capsys, "check-env")
        assert "Did you mean 'household'?" in told(capsys, "check-env", "houshold")
        assert "Did you mean '--environment'?" in told(capsys, "check-env", "--enviroment", "household")
        assert "is not JSON" in told(capsys, "check-env", "household", "--options", "{x}")
        line = told(capsys, "check-env", "household", "--environment_kwargs", '{"roms": 1}')
        assert "'roms'" in line and "It takes (rooms: int" in line


class TestOneRunAFolder:
    def test_while_one_runs_and_after_it_was_killed(self, capsys, tmp_path, model_folder):
        given = flags(model_folder, tmp_path, "--save_steps", "1", "--max_steps", "100000", "--save_total_limit", "2")
        command = [sys.executable, "-m", "trl_epo", "train", *given]
        assert "There is no model in" in told(capsys, "play", tmp_path)
        with subprocess.Popen(
            command, env=child_environment(), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as first:
            try:
                # The third is begun once the second is whole
                assert wait_for(
                    lambda: (
                        any(step_of(path.name) > 2 for path in tmp_path.glob("checkpoint-*"))
                        or first.poll() is not None
                    )
                )
                assert first.poll() is None
                line = told(capsys, "train", *given, code=1)
                assert f"`output_dir` is '{tmp_path}', in which process {first.pid} on " in line
                assert "is training" in line
            finally:
                first.kill()
        assert (tmp_path / LOCK_FILE).exists()
        assert "of an earlier run. Go on from there with --resume" in told(capsys, "train", *given)
        step = step_of(Path(last_whole_checkpoint(tmp_path)).name)
        line = told(capsys, "train", *given[:-4], "--max_steps", str(step - 1), "--resume")
        assert f"checkpoint-{step} is of more steps than `max_steps={step - 1}`" in line
        cli.main(["train", *given[:-4], "--max_steps", str(step + 1), "--resume"])
        assert (tmp_path / "model.safetensors").exists()
        assert not (tmp_path / LOCK_FILE).exists()


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_one_screen_of_options_that_there_are(self, command):
        lines = command_help(command).splitlines()
        assert len(lines) <= 42
        assert max(map(len, lines)) < 120
        parser = _make_parser(command, [WarmUpArguments, PlayArguments])
        options = [match[1] for line in lines if (match := re.match(r"  (--\S+)", line))]
        assert set(options) <= {*parser._option_string_actions, "--config"}
        assert len(options) == len(set(options))

    def test_all_options_are_in_a_group(self):
        parser = _make_parser("train", [WarmUpArguments, PlayArguments])
        assert [action.dest for action in parser._actions if group_of(action.dest) == OTHERS] == []
        shown = all_options(parser)
        assert all(f"  --{action.dest}" in shown for action in parser._actions)
        assert "\nPEFT:\n" in shown and "--max-steps" not in shown

    def test_as_they_are_asked_for(self, capsys):
        cli.main(["train", "--help"])
        assert "--dry-run" in capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            parse("train", ["--help-all"])
        assert stop.value.code == 0
        assert "\nvLLM:\n" in capsys.readouterr().out
