"""Ablations and baselines of the entropy term, each with the real trainer on text episodes."""

import pytest
import torch
from conftest import Corridor, make_model
from datasets import Dataset
from trl import GRPOTrainer

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.entropy_term import action_mask


BASE = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_turns": 4,
    "max_turn_length": 5,
    "max_steps": 3,
    "optim": "sgd",  # its steps are the gradients: Adam makes much of the rounding in tiny ones
    "learning_rate": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
GRPO = {"entropy_coef": 0.0}
EPO = {
    "entropy_coef": 0.5,
    "entropy_smoothing_coef": 0.5,
    "entropy_smoothing_decay": 0.5,
    "entropy_corridor_low": 0.98,
    "entropy_corridor_high": 1.0,
}
EA = {**GRPO, "entropy_advantage_coef": 0.4}
ADAPTIVE = {**GRPO, "use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef_delta": 0.2}
# Each arm, and the one that differs from it by its flag alone.
ARMS = {
    "EPO": (EPO, GRPO),
    "EPO-Base": ({**EPO, "entropy_smoothing": "none"}, EPO),
    "constant weight": ({**EPO, "entropy_smoothing_schedule": "constant"}, EPO),
    "indicator": ({**EPO, "entropy_smoothing": "indicator"}, EPO),
    "EPO-Decay": ({**EPO, "entropy_turn_decay": 1.0}, EPO),
    "EA": (EA, GRPO),
    "adaptive": (ADAPTIVE, GRPO),
}
arms = pytest.mark.parametrize("arm", ARMS)


class Walk(Corridor):
    """Returns that differ from episode to episode, so that no advantage is zero."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, len(action) / 10, *rest


def make_trainer(tmp_path, tokenizer, **kwargs):
    return EPOTrainer(
        make_model(),
        args=EPOConfig(str(tmp_path), **{**BASE, **kwargs}),
        train_dataset=Dataset.from_dict({"length": [2, 3, 4, 5]}),
        processing_class=tokenizer,
        environment_factory=Walk,
    )


def train(tmp_path, tokenizer, resume=None, **kwargs):
    trainer = make_trainer(tmp_path, tokenizer, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@arms
def test_each_flag_changes_the_update(tmp_path, tokenizer, arm):
    with_flag, without = (train(tmp_path, tokenizer, **kwargs) for kwargs in ARMS[arm])
    assert torch.isfinite(weights(with_flag)).all()
    assert (weights(with_flag) - weights(without)).abs().max() > 1e-5


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "adaptive"])  # TRL's bonus is a mean per micro-batch
def test_split_into_micro_batches_does_not_matter(tmp_path, tokenizer, arm):
    whole = train(tmp_path, tokenizer, **ARMS[arm][0])
    split = train(tmp_path, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4, **ARMS[arm][0])
    torch.testing.assert_close(weights(split), weights(whole), atol=1e-6, rtol=1e-5)
    assert split.entropy_history.means == pytest.approx(whole.entropy_history.means, rel=1e-5)
    for name in ("epo/policy_loss", "epo/entropy_bonus", "epo/smoothing_loss"):
        assert logged(split, name) == pytest.approx(logged(whole, name), rel=1e-3, abs=1e-5)


@arms
def test_resume_equals_no_interruption(tmp_path, tokenizer, arm):
    kwargs = {**ARMS[arm][0], "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(tmp_path / "whole", tokenizer, **kwargs)
    resumed = train(tmp_path / "more", tokenizer, resume=str(tmp_path / "whole" / "checkpoint-2"), **kwargs)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.entropy_history.state_dict() == whole.entropy_history.state_dict()


class TestAdaptive:
    def test_trls_controller_acts_in_text_episodes(self, tmp_path, tokenizer):
        trainer = train(tmp_path, tokenizer, **ADAPTIVE)
        # Entropy is always below the target of 10 nats: the coefficient rises each step, and acts from the second on.
        assert logged(trainer, "entropy_coef") == pytest.approx([0.2, 0.4, 0.6])
        assert not logged(trainer, "epo/entropy_bonus")
        assert trainer._last_world_entropy == pytest.approx(logged(trainer, "epo/entropy")[-1], rel=1e-4)


class TestShapedAdvantages:
    @pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
    def test_every_loss_type(self, tmp_path, tokenizer, loss_type):
        kwargs = {"loss_type": loss_type, "max_completion_length": 200, "max_steps": 1, "learning_rate": 0.01}
        shaped = train(tmp_path, tokenizer, **EA, **kwargs)
        plain = train(tmp_path, tokenizer, **GRPO, **kwargs)
        assert torch.isfinite(weights(shaped)).all()
        assert not torch.equal(weights(shaped), weights(plain))

    @pytest.mark.parametrize("of_tokens", [False, True])
    def test_loss_of_a_batch(self, tmp_path, tokenizer, of_tokens):
        trainer = make_trainer(tmp_path, tokenizer, **EA)
        trainer.state.max_steps = 10
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        mask = action_mask(inputs)
        if of_tokens:
            inputs["advantages"] = inputs["advantages"][:, None] * torch.linspace(0.1, 1, mask.size(1))
        before = inputs["advantages"].clone()
        with trainer.capture_entropies() as captured:
            GRPOTrainer.compute_loss(trainer, trainer.model, inputs)
        loss = trainer.compute_loss(trainer.model, inputs)
        assert torch.equal(inputs["advantages"], before)  # the batch may be used again
        # On-policy the ratio is 1, so that the loss is −ΣA/n over action tokens.
        advantages = before if of_tokens else before[:, None]
        added = torch.minimum(0.4 * captured[0], advantages.abs() / 2)
        expected = -((advantages + added) * mask).sum() / mask.sum()
        torch.testing.assert_close(loss, expected)
        mean = (added * mask).sum() / mask.sum()
        assert trainer._metrics["train"]["epo/advantage_shaping"] == [pytest.approx(mean.item(), rel=1e-5)]
