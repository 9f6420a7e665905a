"""How many episodes a trainer plays at once, by the memory that there is."""

import math

import pytest
import torch
from conftest import PATIENT_RUN, Corridor, make_model
from datasets import Dataset
from samplers import in_buckets, refuse_caches

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.sampling.kv_cache import _Layer


RUN = {
    **PATIENT_RUN,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_turns": 6,
    "max_turn_length": 5,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 1,
}
WEIGHT_BYTES = 4 * sum(weight.numel() for weight in make_model().parameters())


class Counting(Corridor):
    """Counts the environments that are made and how often they begin."""

    made = resets = 0

    def __init__(self):
        super().__init__(length=99)
        Counting.made += 1

    def reset(self, **kwargs):
        Counting.resets += 1
        return super().reset(**kwargs)


def make_trainer(folder, tokenizer, **settings):
    """A trainer, and the tokens of the actions of each episode of each batch that it plays."""
    Counting.made = Counting.resets = 0
    played = []

    def note(episodes, **kwargs):
        played.append([[turn.action_ids for turn in episode.turns] for episode in episodes])
        return [float(len(episode.turns[0].text) % 2) for episode in episodes]

    trainer = EPOTrainer(
        make_model(),
        reward_funcs=note,
        args=EPOConfig(str(folder), **{**RUN, **settings}),
        train_dataset=Dataset.from_dict({"length": [90, 91]}),
        processing_class=tokenizer,
        environment_factory=Counting,
    )
    return trainer, played


def weights(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


@pytest.fixture
def free(monkeypatch):
    """What is free of the device, in bytes, as if an episode took one byte."""
    free = {"bytes": math.inf, "asked": 0}

    def num_fitting(free_bytes, *args):
        free["asked"] += 1
        return int(free_bytes)

    monkeypatch.setattr("trl_epo.sampling.cached.free_memory", lambda device: free["bytes"])
    monkeypatch.setattr("trl_epo.sampling.cached.num_fitting", num_fitting)
    return free


def test_out_of_memory_no_episode_is_lost_or_played_again(tmp_path, tokenizer, monkeypatch, caplog):
    calm, expected = make_trainer(tmp_path / "calm", tokenizer, learning_rate=0.0)
    calm.train()
    num_resets = Counting.resets
    assert calm.player.num_fitting == math.inf  # on a CPU

    refused = refuse_caches(monkeypatch, max_cells=8 * 128)
    trainer, played = make_trainer(tmp_path / "refused", tokenizer, learning_rate=0.0)
    trainer.train()
    assert played == expected
    assert Counting.resets == num_resets
    assert len(refused) == 1
    assert [message for message in caplog.messages if "Out of memory" in message] == [
        "Out of memory with 8 episodes in the key/value cache, the longest of 128 tokens. No episode is lost: from now on at "
        "most 4 are in it, and those that were are read again. `max_concurrent_episodes=4` avoids this."
    ]
    assert trainer.player.num_fitting == 4


def test_what_was_learned_of_memory_is_in_the_checkpoint(tmp_path, tokenizer, monkeypatch):
    refused = refuse_caches(monkeypatch, max_cells=8 * 128)
    whole, _ = make_trainer(tmp_path / "whole", tokenizer)
    whole.train()
    assert len(refused) == 1
    resumed, _ = make_trainer(tmp_path / "resumed", tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert len(refused) == 1
    assert Counting.made == 4
    assert torch.equal(weights(resumed), weights(whole))
    again, _ = make_trainer(tmp_path / "again", tokenizer, max_concurrent_episodes=8, max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))  # a number of one's own is tried
    assert Counting.made == 8
    assert len(refused) == 2


def test_as_many_as_fit_are_played_at_once(tmp_path, tokenizer, free):
    free["bytes"] = 2 * WEIGHT_BYTES + 3  # the optimizer is still to come
    whole, _ = make_trainer(tmp_path / "whole", tokenizer)
    whole.train()
    assert (whole.player.num_fitting, Counting.made, free["asked"]) == (3, 3, 1)

    free["bytes"] = 5
    resumed, _ = make_trainer(tmp_path / "resumed", tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert (resumed.player.num_fitting, Counting.made, free["asked"]) == (3, 3, 1)  # what the run began with
    assert torch.equal(weights(resumed), weights(whole))

    evaluated, _ = make_trainer(tmp_path / "evaluated", tokenizer)
    evaluated.evaluate(evaluated.train_dataset)
    assert (evaluated.player.num_fitting, Counting.made) == (5, 5)  # no optimizer will come
    asked, _ = make_trainer(tmp_path / "asked", tokenizer, max_concurrent_episodes=6)
    asked.evaluate(asked.train_dataset)
    assert (Counting.made, free["asked"]) == (6, 2)


def test_that_a_batch_does_not_fit_is_said_once(tmp_path, tokenizer, free, caplog):
    free["bytes"] = 3
    trainer, _ = make_trainer(tmp_path, tokenizer, max_completion_length=100)
    trainer.evaluate(trainer.train_dataset)
    trainer.evaluate(trainer.train_dataset)
    (told,) = [message for message in caplog.messages if "fit into the memory" in message]
    assert told.startswith("3 of the batch's 8 episodes fit into the memory at once if each takes 1")
    assert "`max_completion_length`, observations included" in told


@pytest.mark.parametrize("at_once", [None, 5])
def test_the_cache_has_no_more_rows_than_are_played_at_once(tmp_path, tokenizer, at_once):
    rows, fitted = set(), _Layer._fitted

    def note(layer, old, like):
        rows.add(layer.cache.row_capacity)
        return fitted(layer, old, like)

    with in_buckets(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Layer, "_fitted", note)
        trainer, _ = make_trainer(tmp_path, tokenizer, max_concurrent_episodes=at_once, max_steps=1)
        trainer.train()
    assert max(rows) == (at_once or 8)  # and not 8, the bucket of 5
    assert trainer.player.num_fitting == math.inf


def test_the_longest_context(tmp_path, tokenizer):
    whole, _ = make_trainer(tmp_path, tokenizer)
    assert whole.player.longest_context == 1024
    bounded, _ = make_trainer(tmp_path, tokenizer, max_completion_length=100)
    prompt = bounded.player.rules.chat.encode_prompt([{"role": "user", "content": "You are at 0. The door is at 90."}])
    assert abs(bounded.player.longest_context - 100 - len(prompt)) <= 1  # the place may have two digits
