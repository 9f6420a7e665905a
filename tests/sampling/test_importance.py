"""
TRL's correction for tokens that vLLM sampled with other probabilities than training computes. Here the tokens come from
the trainer's own sampler, and their log-probabilities are moved as if they came from an engine (tests/sampling/test_vllm.py has a
real one).
"""

import math

import pytest
import torch
from conftest import Corridor, make_model
from datasets import Dataset
from test_text_episodes import make_trainer, weights
from trl import GRPOConfig

from trl_epo import EPOConfig, EPOTrainer


def as_if_by_an_engine(trainer, shift):
    """Each token is `shift` nats less likely there, the third token of each turn ten times as much; returns the batches."""
    prepare, extend, batches = trainer.prepare_rows, trainer.extend_batch, []

    def prepared(rows):
        trainer.use_vllm = False
        rows = prepare(rows)
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
        for episode, logprobs in zip(trainer._batch.episodes, trainer._batch.logprobs, strict=True):
            place = 0
            for turn in episode.turns:
                place += len(turn.observation_ids)
                for token in range(len(turn.action_ids)):
                    logprobs[place + token] -= shift * (10 if token == 2 else 1)
                place += len(turn.action_ids)
        return rows

    trainer.prepare_rows = prepared
    trainer.extend_batch = lambda batch: batches.append(extend(batch)) or batches[-1]
    return batches


def logged(trainer):
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entry["sampling/importance_sampling_ratio/cut"]


def cut_share(trainer, is_cut):
    tokens = [
        token for episode in trainer._batch.episodes for turn in episode.turns for token in range(len(turn.action_ids))
    ]
    return sum(map(is_cut, tokens)) / len(tokens)


def test_ratios_of_text_episodes_are_by_token_by_default(tmp_path, tokenizer):
    """exp(0.2) and exp(2), which is beyond the bound of 3."""
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1)
    batches = as_if_by_an_engine(trainer, 0.2)
    before = weights(trainer)
    trainer.train()
    assert trainer.args.vllm_importance_sampling_mode == "token_truncate"
    [batch] = batches
    actions = batch["turn_ids"] >= 0
    ratios = batch["importance_sampling_ratio"][actions]
    assert set(ratios.mul(100).round().int().tolist()) == {round(100 * math.exp(0.2)), 300}
    assert logged(trainer) == pytest.approx(cut_share(trainer, lambda token: token == 2))
    assert not torch.equal(weights(trainer), before)


@pytest.mark.parametrize(
    ("shift", "mode", "bounds", "is_cut"),
    [
        (0.2, "token_mask", (None, 3.0), lambda token: token == 2),
        (-0.2, "token_truncate", (0.5, 3.0), lambda token: token == 2),
        (0.2, "token_mask", (None, None), lambda token: False),
        (0.2, "sequence_mask", (None, 3.0), lambda token: True),
        (0.2, "sequence_truncate", (None, 3.0), lambda token: True),
    ],
)
def test_another_mode_holds_and_tells_what_it_cuts(tmp_path, tokenizer, shift, mode, bounds, is_cut):
    low, high = bounds
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )  # fmt: skip
    as_if_by_an_engine(trainer, shift)
    trainer.train()
    assert trainer.vllm_importance_sampling_mode == trainer.args.vllm_importance_sampling_mode == mode
    assert logged(trainer) == pytest.approx(cut_share(trainer, is_cut))


def test_without_an_environment_the_default_is_trls(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        factory=None,
        dataset=Dataset.from_dict({"prompt": ["a"]}),
        trainer_kwargs={"reward_funcs": [len]},
    )
    assert trainer.vllm_importance_sampling_mode == GRPOConfig.vllm_importance_sampling_mode == "sequence_mask"


def test_truncation_needs_a_bound(tmp_path, tokenizer):
    args = EPOConfig(str(tmp_path), use_vllm=True, bf16=False, vllm_importance_sampling_clip_max=None, max_steps=1)
    with pytest.raises(ValueError, match="`vllm_importance_sampling_clip_max` is None.*'token_mask'"):
        EPOTrainer(make_model(), args=args, processing_class=tokenizer, environment_factory=Corridor)
