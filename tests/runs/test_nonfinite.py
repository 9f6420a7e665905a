"""Optimizer steps whose loss or gradient is not finite are left out."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import Corridor, make_model, make_tokenizer
from faulty_runs import SETTINGS, Poisoned, make_trainer, weights
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.entropy.term import EntropyTerm, Moment


class Snapshots(TrainerCallback):
    """After each step: the weights and the optimizer's state, the critic's too."""

    def __init__(self, trainer):
        self.trainer, self.taken = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        both = [self.trainer, *([] if self.trainer._critic is None else [self.trainer._critic])]
        of_models = [weight.detach().clone() for each in both for weight in each.model.parameters()]
        states = [state for each in both for state in each.optimizer.state.values()]
        self.taken.append(of_models + [value.clone() for state in states for value in state.values()])

    @property
    def changed(self) -> list[bool]:
        """From each step to the next: whether anything did."""
        return [
            len(before) != len(after) or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for before, after in pairwise(self.taken)
        ]


def snapshots(trainer) -> Snapshots:
    trainer.add_callback(taken := Snapshots(trainer))
    return taken


def poison_gradient(trainer, weight: torch.nn.Parameter, steps: tuple[int, ...]) -> None:
    weight.register_hook(lambda grad: grad * math.inf if trainer.state.global_step in steps else grad)


def poison_loss(trainer, steps):
    trainer.poisoned_steps = steps


def poison_policy(trainer, steps):
    poison_gradient(trainer, next(trainer.model.parameters()), steps)


def poison_critic(trainer, steps):
    poison_gradient(trainer, next(trainer._critic.model.parameters()), steps)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("poison", [poison_loss, poison_policy, poison_critic])
def test_a_step_that_is_left_out_leaves_no_trace(tmp_path, poison, max_grad_norm):
    trainer = make_trainer(
        tmp_path, trainer_class=Poisoned, advantage_estimator="gae", critic_learning_rate=1e-2, weight_decay=0.1,
        gradient_accumulation_steps=2, steps_per_generation=2, num_iterations=1, max_steps=5, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    poison(trainer, (2,))
    taken = snapshots(trainer)
    trainer.train()
    assert taken.changed == [True, False, True, True]
    assert weights(trainer).isfinite().all()
    entries = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["faults/nonfinite_steps"] for entry in entries] == [0, 0, 1, 1, 1]
    assert [entry["learning_rate"] for entry in entries] == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])
    assert trainer.entropy_history.step == 4


def test_the_critic_is_looked_after_in_every_run_of_a_trainer(tmp_path):
    trainer = make_trainer(tmp_path, advantage_estimator="gae", max_steps=3)
    trainer.train()
    poison_critic(trainer, (1,))
    taken = snapshots(trainer)
    trainer.train()
    assert taken.changed == [False, True]
    assert trainer._nonfinite.total == 1
    assert all(weight.isfinite().all() for weight in trainer._critic.model.parameters())


def test_too_many_in_a_row(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=Poisoned, max_nonfinite_steps=2, max_steps=7)
    trainer.poisoned_steps = (1, 3, 4)
    taken = snapshots(trainer)
    with pytest.raises(FloatingPointError, match=r"2 optimizer steps in a row.*max_nonfinite_steps=2.*checkpoint-5"):
        trainer.train()
    assert taken.changed == [False, True, False, False]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True))
    # From there it goes on, if it can.
    resumed = make_trainer(tmp_path, trainer_class=Poisoned, max_nonfinite_steps=2, max_steps=7)
    resumed.poisoned_steps = (5,)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[-2]["faults/nonfinite_steps"] == 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ["grpo", "gae", "gigpo", "turn"])
def test_rewards_that_are_no_numbers(tmp_path, value, estimator):
    def reward(completions, **kwargs):
        return [value if trainer.state.global_step == 1 else float(len(c)) for c in completions]

    trainer = EPOTrainer(
        make_model(),
        reward_funcs=reward,
        args=EPOConfig(
            str(tmp_path),
            **{**SETTINGS, "steps_per_generation": 1, "num_iterations": 1, "max_steps": 3},
            advantage_estimator=estimator,
        ),
        processing_class=make_tokenizer(),
        environment_factory=Corridor,
    )
    before = weights(trainer)
    trainer.train()
    assert weights(trainer).isfinite().all() and not torch.equal(weights(trainer), before)
    assert all(math.isfinite(mean) for mean in trainer.entropy_history.means)


def test_an_infinite_entropy_does_not_stay(tmp_path):
    trainer = make_trainer(tmp_path)
    term = EntropyTerm(trainer.args, trainer.accelerator)
    batch = {
        "completion_mask": torch.ones(2, 2, dtype=torch.long),
        "turn_ids": torch.tensor([[0, 1], [0, 1]]),
        "advantages": torch.zeros(2),
    }
    moment = Moment(train=True, max_steps=4, micro_batches=1, first_pass=True, step_ends=True)
    term.history.begin_step()
    term.observe(torch.tensor([[1.0, math.nan], [3.0, math.inf]]), batch, moment)
    term.history.begin_step()
    assert term.history.means == [2.0]
    assert term.history.latest == 2.0


@pytest.mark.parametrize(("scale", "expected"), [(2.0**10, 0), (1.0, 1)])
def test_an_overflow_in_fp16_is_the_scalers(tmp_path, scale, expected):
    # fp16 itself needs a GPU; a scaler does not.
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.accelerator.state._mixed_precision, trainer.accelerator.native_amp = "fp16", True
    poison_policy(trainer, (1,))
    taken = snapshots(trainer)
    trainer.train()
    assert taken.changed == [False, True]
    assert trainer._nonfinite.total == expected
