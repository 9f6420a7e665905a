"""What the README shows does run."""

import re
from pathlib import Path

from conftest import Corridor, make_model
from datasets import Dataset


README = Path(__file__).parent.parent / "README.md"


def block_with(text):
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL) if text in b]
    return block


def test_the_environment_of_the_readme_passes_its_check():
    exec(block_with("check_env("), {})


class Walk(Corridor):
    """Stands for the household game: all of a model of a few thousand weights can learn in seconds is to go right."""

    instructions = "You are in a corridor. Answer with one of: left, right. For example: left"
    commands = ("left", "right", "open", "look")

    def __init__(self, list_actions, searching_expert):
        super().__init__(length=4, turns=5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return f"You are at 0. The door is at {self.door}.", {"success": False, "admissible_actions": self.commands}

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step("r" if action == "right" else "")
        return observation, reward, terminated, truncated, info | {"admissible_actions": self.commands}

    def expert_action(self):
        return "right"


def walks(split, size, **knobs):
    return Dataset.from_dict({"seed": range(size)})


def test_the_ten_lines_learn(tmp_path, tokenizer, capsys):
    """Word for word, but for the model and what has to be as small as it: the game and the settings."""
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    script = block_with("warm_up(")
    for ours, small in {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(tmp_path),
        'output_dir="runs/agent",': f"output_dir={str(tmp_path)!r}, report_to='none', save_strategy='no', use_cpu=True, bf16=False, environment_patience=9e9,",
        "max_turns=12": "max_turns=5",
        "per_device_train_batch_size=4,\n        gradient": "per_device_train_batch_size=32, per_device_eval_batch_size=50,\n        gradient",
        "gradient_accumulation_steps=8": "gradient_accumulation_steps=1",
        "learning_rate=2e-4": "learning_rate=2e-3",
        "learning_rate=1e-3": "learning_rate=3e-3",
        '    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),\n': "",  # nothing is learned on top of random weights
        "from trl_epo.envs.household import Household, tasks": "",
    }.items():
        assert script.count(ours) == 1, ours
        script = script.replace(ours, small)
    exec(script, {"Household": Walk, "tasks": walks})
    out = capsys.readouterr().out
    warm, trained = map(int, re.findall(r"success: (\d+)% → (\d+)%", out)[-1])
    assert 20 <= warm < 60
    assert trained >= warm + 15


def test_the_two_commands_are_in_the_makefile():
    makefile = (README.parent / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in README.read_text()
        assert f"\n{command}:" in makefile
