"""Where the time of a step goes, and how its figures get into the log."""

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import PATIENT_RUN, Corridor, make_model, make_tokenizer
from datasets import Dataset
from transformers import TrainerCallback

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.reports.timing import PARTS


SETTINGS = {
    **PATIENT_RUN,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_turns": 2,
    "max_turn_length": 4,
    "max_steps": 2,
}


class Slow(Corridor):
    """Takes time for an answer."""

    seconds = 0.4

    def step(self, action):
        time.sleep(self.seconds)
        return super().step(action)


class Clock(TrainerCallback):
    """The whole time of each step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def make_trainer(folder: Path, *callbacks, factory=Corridor, rows=None, **kwargs) -> EPOTrainer:
    return EPOTrainer(
        make_model(),
        args=EPOConfig(str(folder), **{**SETTINGS, **kwargs}),
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        environment_factory=factory,
        callbacks=list(callbacks),
    )


def training_entries(trainer: EPOTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def parts(entry: dict) -> dict[str, float]:
    return {part: entry[f"time/{part}"] for part in PARTS}


def are_about(whole: float, each: dict[str, float]) -> bool:
    """Whether these seconds make up the whole, but for what a busy machine may take anywhere."""
    return 0.6 * whole <= sum(each.values()) <= whole + 0.5


def test_the_parts_are_the_whole_step(tmp_path):
    clock = Clock()
    trainer = make_trainer(tmp_path, clock, factory=Slow)
    rollouts = []
    play = trainer._player.play
    trainer._player.play = lambda *args: rollouts.append(play(*args)) or rollouts[-1]
    trainer.train()
    entries = training_entries(trainer)
    assert len(entries) == len(clock.seconds) == 2
    for entry, whole, batch in zip(entries, clock.seconds, rollouts, strict=True):
        each = parts(entry)
        assert all(seconds > 0.0 for seconds in each.values())
        assert are_about(whole, each)
        assert each["environments"] > Slow.seconds  # two turns, side by side
        num_tokens = sum(len(turn.action_ids) for episode in batch.episodes for turn in episode.turns)
        rollout = each["sampling"] + each["environments"]
        assert entry["rollout/tokens_per_second"] == pytest.approx(num_tokens / rollout)
        assert 0.01 < entry["memory/process_peak"] < 1000  # GiB
        assert "memory/device_peak" not in entry
    json.dumps(entries)


def test_means_over_the_steps_of_an_entry(tmp_path):
    # One rollout for two optimizer steps, one entry for four of them
    clock = Clock()
    kwargs = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "logging_steps": 4, "max_steps": 8}
    trainer = make_trainer(tmp_path, clock, **kwargs)
    trainer.train()
    entries = training_entries(trainer)
    assert [entry["step"] for entry in entries] == [4, 8]
    for index, entry in enumerate(entries):
        whole = sum(clock.seconds[4 * index : 4 * index + 4]) / 4
        assert are_about(whole, parts(entry))


def test_a_step_without_a_rollout(tmp_path):
    trainer = make_trainer(tmp_path, steps_per_generation=2, gradient_accumulation_steps=1)
    trainer.train()
    first, second = training_entries(trainer)
    assert first["time/sampling"] > 0.0 and first["rollout/tokens_per_second"] > 0.0
    assert second["time/sampling"] == second["time/environments"] == 0.0
    assert second["time/update"] > 0.0
    assert "rollout/tokens_per_second" not in second


def test_what_is_between_steps_does_not_count(tmp_path):
    class Pause(TrainerCallback):
        def on_evaluate(self, *args, **kwargs):
            time.sleep(1.0)

    clock = Clock()
    kwargs = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer = make_trainer(tmp_path, clock, Pause(), rows=Dataset.from_dict({"length": [2]}), **kwargs)
    trainer.evaluate()  # nor what was before training
    trainer.train()
    for entry, whole in zip(training_entries(trainer), clock.seconds, strict=True):
        assert are_about(whole, parts(entry))
    assert not any("time/" in name for entry in trainer.state.log_history for name in entry if "eval" in name)


def test_critic_and_reference_are_scoring(tmp_path):
    slow = 0.3
    trainer = make_trainer(tmp_path, advantage_estimator="gae")
    values = trainer._critic.values

    def slow_values(batch):
        if not torch.is_grad_enabled():
            time.sleep(slow)
        return values(batch)

    trainer._critic.values = slow_values
    trainer.train()
    assert all(entry["time/scoring"] > slow for entry in training_entries(trainer))


def test_attempts_that_are_given_up_were_sampled_too(tmp_path):
    # Rewards are all equal, so each group is played four times
    class Flat(Corridor):
        def step(self, action):
            observation, _, done, cut, info = super().step(action)
            return observation, 0.0, done, cut, info

    trainer = make_trainer(tmp_path, factory=Flat, filter_zero_variance_groups="resample", max_steps=1)
    rollouts = []
    play = trainer._player._play

    def kept(*args):
        episodes = play(*args)
        rollouts.append(list(episodes))  # the first list gets the groups that are played again
        return episodes

    trainer._player._play = kept
    trainer.train()
    assert len(rollouts) == 4
    num_tokens = sum(len(turn.action_ids) for episodes in rollouts for each in episodes for turn in each.turns)
    (entry,) = training_entries(trainer)
    rollout = entry["time/sampling"] + entry["time/environments"]
    assert entry["rollout/tokens_per_second"] == pytest.approx(num_tokens / rollout)


def test_without_a_text_environment(tmp_path):
    clock = Clock()
    trainer = EPOTrainer(
        make_model(),
        reward_funcs=lambda completions, **kwargs: [float(len(completion)) for completion in completions],
        args=EPOConfig(
            str(tmp_path), **{k: v for k, v in SETTINGS.items() if "turn" not in k}, max_completion_length=4
        ),
        train_dataset=Dataset.from_dict({"prompt": ["left", "right"]}),
        processing_class=make_tokenizer(),
        callbacks=[clock],
    )
    trainer.train()
    for entry, whole in zip(training_entries(trainer), clock.seconds, strict=True):
        each = parts(entry)
        assert are_about(whole, each)
        assert each["sampling"] > 0.0 and each["environments"] == 0.0
        num_tokens = 4 * entry["completions/mean_length"]
        assert entry["rollout/tokens_per_second"] == pytest.approx(num_tokens / each["sampling"])
