"""Ablations and baselines of the entropy term, each with the real trainer on text episodes."""

import pytest
import torch
from conftest import PATIENT_RUN, Corridor, make_model
from datasets import Dataset
from trl import GRPOTrainer

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.entropy.objective import smoothing_penalty, token_mean, turn_mean
from trl_epo.entropy.term import action_mask
from trl_epo.rollouts.rollout import parse_action


BASE = {
    **PATIENT_RUN,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_turns": 4,
    "max_turn_length": 5,
    "max_steps": 3,
    "optim": "sgd",  # its steps are the gradients: Adam makes much of the rounding in tiny ones
    "learning_rate": 0.02,
}
GRPO = {"entropy_coef": 0.0}
EPO = {
    "entropy_coef": 0.5,
    "entropy_smoothing_coef": 0.5,
    "entropy_smoothing_decay": 0.5,
    "entropy_corridor_low": 0.8,
    "entropy_corridor_high": 1.2,
}
EA = {**GRPO, "entropy_advantage_coef": 0.4}
CORRIDOR = {
    **GRPO,
    "entropy_corridor_coef": 0.5,
    "entropy_corridor_low": 1.0,
    "entropy_corridor_high": 1.0,
}
LINEAR = {**CORRIDOR, "entropy_reference": "linear", "entropy_reference_end": 0.5}
ADAPTIVE = {**GRPO, "use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef_delta": 0.2}
# Each arm, and the one that differs from it by its flag alone.
ARMS = {
    "EPO": (EPO, GRPO),
    "EPO-Base": ({**EPO, "entropy_smoothing": "none"}, EPO),
    "constant weight": ({**EPO, "entropy_smoothing_schedule": "constant"}, EPO),
    "indicator": ({**EPO, "entropy_smoothing": "indicator"}, EPO),
    "EPO-Decay": ({**EPO, "entropy_turn_decay": 1.0}, EPO),
    "per-turn history": ({**EPO, "entropy_reference": "turn_history"}, EPO),
    "linear reference": ({**EPO, "entropy_reference": "linear"}, EPO),
    "EA": (EA, GRPO),
    "corridor": (CORRIDOR, GRPO),
    "corridor, linear": (LINEAR, CORRIDOR),
    "corridor of tokens": ({**CORRIDOR, "entropy_aggregation": "token"}, CORRIDOR),
    "adaptive": (ADAPTIVE, GRPO),
}
arms = pytest.mark.parametrize("arm", ARMS)


class Walk(Corridor):
    """Returns that differ from episode to episode, so that no advantage is zero."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, len(action) / 10, *rest


def sharp_model():
    """Entropies that differ from token to token, where an untrained model's are all near the largest there is."""
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight *= 10
        model.model.embed_tokens.weight[model.config.eos_token_id] *= 2  # turns of different lengths
    return model


def make_trainer(tmp_path, tokenizer, **kwargs):
    return EPOTrainer(
        sharp_model(),
        args=EPOConfig(str(tmp_path), **{**BASE, **kwargs}),
        train_dataset=Dataset.from_dict({"length": [2, 3, 4, 5]}),
        processing_class=tokenizer,
        environment_factory=Walk,
        action_parser=parse_action,  # also where a window's prompt asks for tags
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
    assert split.entropy_history.aggregates == pytest.approx(whole.entropy_history.aggregates, rel=1e-5)
    for name in ("epo/policy_loss", "epo/entropy_bonus", "epo/smoothing_loss", "epo/corridor_loss"):
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


def one_batch(tmp_path, tokenizer, **kwargs):
    """A trainer in its fifth RL step of ten, and a batch."""
    trainer = make_trainer(tmp_path, tokenizer, **{"max_steps": 10, **kwargs})
    trainer.state.max_steps = 10
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.entropy_history.step = 4
    return trainer, inputs


def parts_and_gradient(trainer, inputs, of_loss):
    """The policy loss and the batch's entropies, and the gradient of what `of_loss` makes of the two."""
    with trainer.capture_entropies() as captured:
        policy = GRPOTrainer.compute_loss(trainer, trainer.model, inputs)
    loss = of_loss(policy, captured[0])
    trainer.model.zero_grad()
    loss.backward()
    return loss.detach(), gradient(trainer)


def gradient(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


class TestCorridor:
    @pytest.mark.parametrize("aggregation", ["turn", "token"])
    @pytest.mark.parametrize(("scale", "sign"), [(0.5, 1), (0.75, 0), (2.0, -1)])
    def test_loss_and_gradient_are_those_of_the_hinge(self, tmp_path, tokenizer, aggregation, scale, sign):
        kwargs = {**CORRIDOR, "entropy_corridor_low": 1.0, "entropy_corridor_high": 1.5}
        trainer, inputs = one_batch(tmp_path, tokenizer, entropy_aggregation=aggregation, **kwargs)
        mask, turn_ids = action_mask(inputs), inputs["turn_ids"]

        def mean(entropies):
            return turn_mean(entropies, mask, turn_ids) if aggregation == "turn" else token_mean(entropies, mask)

        with torch.no_grad(), trainer.capture_entropies() as captured:
            GRPOTrainer.compute_loss(trainer, trainer.model, inputs)
        latest = mean(captured[0]).item()
        # References are about half, three quarters and twice the batch's mean entropy: above, inside and below.
        trainer.entropy_history.aggregates = [0.9 * scale * latest, 1.1 * scale * latest]
        trainer.entropy_history.means = [123.0]  # the mean over tokens is not what L_H is compared with
        trainer.entropy_history.latest = latest

        def hinge(policy, entropies):
            return policy + 0.5 * smoothing_penalty(mean(entropies), scale * latest, 1.0, 1.5)

        expected, expected_gradient = parts_and_gradient(trainer, inputs, hinge)
        _, policy_gradient = parts_and_gradient(trainer, inputs, lambda policy, entropies: policy)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(gradient(trainer), expected_gradient, atol=1e-7, rtol=1e-4)
        assert bool((gradient(trainer) - policy_gradient).abs().max() > 1e-4) == bool(sign)
        metrics = trainer._metrics["train"]
        assert metrics["epo/corridor_slope"] == [sign]
        assert metrics["epo/corridor_entropy"] == [latest]
        assert metrics["epo/entropy_reference"] == [pytest.approx(scale * latest)]
        assert metrics["epo/corridor_high"] == [pytest.approx(1.5 * scale * latest)]
        if sign:
            distance = scale * latest * (1.0 if sign < 0 else 1.5) - latest
            assert metrics["epo/corridor_loss"] == [pytest.approx(0.5 * abs(distance), rel=1e-4)]

    @pytest.mark.parametrize(("end", "slope"), [(0.5, 1), (1.5, -1)])
    def test_entropy_follows_the_reference(self, tmp_path, tokenizer, end, slope):
        steps = {"max_steps": 8, "lr_scheduler_type": "constant"}
        trainer = train(tmp_path, tokenizer, **{**LINEAR, **steps, "entropy_reference_end": end})
        assert logged(trainer, "epo/corridor_slope")[:2] == [0, slope]  # k = 0: no reference yet
        first = trainer.entropy_history.aggregates[0]
        references = [first * (1 - (1 - end) * k / 7) for k in range(1, 8)]
        assert logged(trainer, "epo/entropy_reference") == pytest.approx(references)
        without = train(tmp_path, tokenizer, **GRPO, **steps).entropy_history.latest
        assert slope * (without - trainer.entropy_history.latest) > 0.2 * first

    def test_the_side_is_that_of_the_optimizer_step_before(self, tmp_path, tokenizer):
        kwargs = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 8}
        trainer = train(tmp_path, tokenizer, **LINEAR, **kwargs)
        history = trainer.entropy_history
        assert (history.step, len(history.aggregates)) == (1, 1)  # two RL steps of four optimizer steps
        assert len(logged(trainer, "epo/corridor_entropy")) == 7
        # The RL step's mean is that of its first pass: of two optimizer steps with equally many episodes
        first_pass = logged(trainer, "epo/corridor_entropy")[:2]
        assert history.aggregates[0] == pytest.approx(sum(first_pass) / 2)

    def test_token_shares_are_not_logged(self, tmp_path, tokenizer):
        trainer = train(tmp_path, tokenizer, **CORRIDOR)
        assert logged(trainer, "epo/corridor_low")
        assert not logged(trainer, "epo/above_corridor")
        assert not logged(trainer, "epo/entropy_bonus")


class TestTurnHistory:
    def test_loss_of_a_batch(self, tmp_path, tokenizer):
        kwargs = {**EPO, "entropy_reference": "turn_history", "entropy_smoothing_schedule": "constant"}
        trainer, inputs = one_batch(tmp_path, tokenizer, **kwargs)
        mask, turn_ids = action_mask(inputs), inputs["turn_ids"]
        # Turn 0 is far above its reference, turn 1 far below, and the others have none.
        trainer.entropy_history.turn_means = [[0.001, 0.003], [50.0], []]

        def by_hand(policy, entropies):
            penalty = torch.where(turn_ids == 0, entropies - 1.2 * 0.002, 0.0)
            penalty = torch.where(turn_ids == 1, 0.8 * 50 - entropies, penalty)
            return policy - 0.5 * (turn_mean(entropies, mask, turn_ids) - 0.5 * turn_mean(penalty, mask, turn_ids))

        expected, expected_gradient = parts_and_gradient(trainer, inputs, by_hand)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(gradient(trainer), expected_gradient, atol=1e-7, rtol=1e-4)
        metrics = trainer._metrics["train"]
        counts = [int((turn_ids == turn).sum()) for turn in range(2)]
        assert metrics["epo/entropy_reference"] == [pytest.approx((0.002 * counts[0] + 50 * counts[1]) / sum(counts))]
        assert metrics["epo/above_corridor"] == [pytest.approx(counts[0] / int(mask.sum()))]
        assert metrics["epo/below_corridor"] == [pytest.approx(counts[1] / int(mask.sum()))]

    def test_history_holds_each_turns_mean(self, tmp_path, tokenizer):
        trainer = train(tmp_path, tokenizer, entropy_reference="turn_history", **EPO)
        turns = trainer.entropy_history.turn_means
        assert 1 < len(turns) <= BASE["max_turns"]
        assert len(turns[0]) == 2  # two RL steps before the third
        low, high = (bound([means[0] for means in turns if means]) for bound in (min, max))
        assert low <= trainer.entropy_history.means[0] <= high

    def test_other_arms_do_not_keep_it(self, tmp_path, tokenizer):
        assert train(tmp_path, tokenizer, **EPO).entropy_history.turn_means == []


@pytest.mark.parametrize("arm", ["EPO-Decay", "per-turn history", "EA", "corridor, linear"])
def test_windows_and_advantages_of_turns(tmp_path, tokenizer, arm):
    settings = {"context": "window", "advantage_estimator": "turn"}
    with_flag, without = (train(tmp_path, tokenizer, **kwargs, **settings) for kwargs in ARMS[arm])
    assert torch.isfinite(weights(with_flag)).all()
    assert (weights(with_flag) - weights(without)).abs().max() > 1e-5
