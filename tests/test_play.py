"""A model plays an episode in the terminal, or you do."""

import re
from copy import copy
from decimal import Decimal
from functools import partial

import pytest
from conftest import PATIENT_RUN, Corridor, make_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs.household import Household, tasks
from trl_epo.play import play, play_yourself


SETTINGS = {**PATIENT_RUN, "max_turns": 4, "max_turn_length": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    make_model(context_length=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shown(folder, **kwargs):
    lines = []
    settings = {**SETTINGS, **kwargs.pop("settings", {})}
    row = kwargs.pop("row", {"length": 3, "seed": 2})
    episode = play(
        folder, kwargs.pop("factory", Corridor), row, EPOConfig("play", **settings), show=lines.append, **kwargs
    )
    return episode, lines


class TestModel:
    @pytest.mark.parametrize("context", ["transcript", "window"])
    def test_turn_by_turn(self, folder, context):
        episode, lines = shown(folder, settings={"context": context}, seed=3)
        assert lines[:2] == ["At most 4 turns of 5 tokens, temperature 1.", episode.first_observation]
        assert sum(line.startswith("> ") for line in lines) == len(episode.turns)
        assert [turn.starts_context for turn in episode.turns[1:]] == [context == "window"] * len(episode.turns[1:])
        for turn in episode.turns:
            assert any(line.startswith(turn.observation) for line in lines[1:])
        assert re.match(r"(Success|No success) after \d turns? \(\w+\); return [01]\.", lines[-1])

    def test_it_leaves_no_folder(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        shown(folder)
        assert not list(tmp_path.iterdir())

    def test_the_seed_and_the_temperature(self, folder):
        again = [shown(folder, seed=3)[1] for _ in range(2)]
        assert again[0] == again[1] != shown(folder, seed=4)[1]
        cold = [shown(folder, seed=seed, temperature=1e-4)[1] for seed in (3, 4)]
        assert cold[0] == cold[1]

    def test_the_seed_is_the_environments_where_the_row_has_none(self, folder):
        row = {"length": 1000}
        first, second = (shown(folder, seed=seed, row=row)[0].first_observation for seed in (3, 4))
        assert first != second

    def test_an_adapter(self, folder, tmp_path, tokenizer):
        base = make_model(context_length=4096)
        base.config._name_or_path = str(folder)
        base.name_or_path = str(folder)
        get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
            tmp_path
        )
        tokenizer.save_pretrained(tmp_path)
        assert shown(tmp_path, seed=3)[1] == shown(folder, seed=3)[1]  # a new adapter changes nothing

    def test_settings_of_training_that_no_episode_needs(self, folder):
        args = EPOConfig(
            "play",
            **SETTINGS,
            eval_strategy="steps",
            eval_steps=1,
            beta=0.1,
            advantage_estimator="gae",
            push_to_hub=True,
        )
        trained = copy(args)
        play(folder, Corridor, {"length": 3}, args, show=lambda line: None)  # without a token it could not push
        assert args == trained

    def test_what_it_says_cannot_drive_the_terminal(self, folder):
        class Rude(Corridor):
            def reset(self, **kwargs):
                return "\x1b]0;title\x07", super().reset(**kwargs)[1]

        assert shown(folder, factory=Rude, seed=3)[1][1] == r"\x1b]0;title\x07"

    def test_an_environment_that_fails(self, folder):
        class Broken(Corridor):
            def step(self, action):
                raise OSError("the door is stuck")

        with pytest.raises(RuntimeError, match="The episode failed: .*the door is stuck"):
            shown(folder, factory=Broken, settings={"env_max_retries": 0})


class TestYou:
    def test_you_type_the_actions(self):
        env, row = Household(), tasks("train", 1, rooms=2)[0]
        env.reset(seed=row["seed"], options={name: row[name] for name in row if name != "seed"})
        typed, lines = [], []

        def read(prompt):
            if not typed:
                typed.append("")
                return ""
            typed.append(env.expert_action())
            env.step(typed[-1])
            return typed[-1]

        assert play_yourself(Household, row, read=read, show=lines.append) is True
        assert lines[0].startswith("Your task:")
        assert lines[1].startswith("Possible: ")
        assert "[reward 1]" in lines[-2]
        assert lines[-1] == f"Success after {len(typed) - 1} turns (terminated); return 1."

    def test_you_leave(self):
        def read(prompt):
            raise EOFError

        lines = []
        assert play_yourself(Corridor, {"length": 3}, read=read, show=lines.append) is False
        assert lines[-1] == "No success after 0 turns (the end of the input); return 0."


def card(tmp_path, tokenizer, factory, **columns):
    folder = tmp_path / "run"
    trainer = EPOTrainer(
        make_model(),
        args=EPOConfig(str(folder), **SETTINGS, max_steps=1),
        train_dataset=Dataset.from_dict({"seed": [2], **columns}),
        processing_class=tokenizer,
        environment_factory=factory,
    )
    trainer.save_model()
    trainer.create_model_card(model_name="walker")
    text = (folder / "README.md").read_text()
    assert "time machine" not in text
    return text.split("## Quick start\n\n```")[1].split("```")[0]


def test_what_is_saved_beside_a_model_bounds_its_episode(folder):
    (folder / "trl_epo.json").write_text('{"environment": "household", "max_turns": 2, "max_turn_length": 5}')
    try:
        lines = []
        episode = play(folder, Corridor, {"length": 3, "seed": 2}, show=lines.append)
    finally:
        (folder / "trl_epo.json").unlink()
    assert lines[0].startswith("At most 2 turns of 5 tokens")
    assert len(episode.turns) <= 2 and len(repr(episode)) < 120


class Talkative(Corridor):
    def __init__(self, text):
        super().__init__()
        self.text = text


class TestModelCard:
    def test_its_example_plays_an_episode(self, tmp_path, tokenizer, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)  # where the example leaves its folder
        example = card(tmp_path, tokenizer, Corridor, length=[3]).removeprefix("python\n")
        assert len(example.splitlines()) <= 8
        exec(example, {})
        out = capsys.readouterr().out
        assert "The door is at 3." in out
        assert re.search(r"uccess after \d turns? \(", out)

    def test_its_example_has_the_environments_arguments(self, tmp_path, tokenizer, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        example = card(tmp_path, tokenizer, partial(partial(Household, 2), repeat_task=True)).removeprefix("python\n")
        assert "partial(Household, 2, repeat_task=True)" in example
        exec(example, {})
        assert re.search(r"uccess after \d+ turns? \(", capsys.readouterr().out)

    @pytest.mark.parametrize(
        "factory", [lambda: Corridor(), partial(Corridor, length=Decimal(3)), partial(Talkative, text="x" * 10_000)]
    )
    def test_an_environment_that_cannot_be_imported(self, tmp_path, tokenizer, factory):
        example = card(tmp_path, tokenizer, factory, length=[3])
        assert "make_environment = ...  # the `environment_factory` of training" in example
        compile(example.removeprefix("python\n"), "example", "exec")

    def test_the_command_where_its_settings_are(self, tmp_path, tokenizer):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "trl_epo.json").write_text('{"environment": "household"}')
        assert card(tmp_path, tokenizer, Corridor, length=[3]) == f"bash\ntrl-epo play {tmp_path / 'run'}\n"
