"""`EPOTrainer` against `GRPOTrainer` and against the objective worked out apart from it; no environments."""

import json
import logging

import pytest
import torch
from conftest import CPU_RUN, make_model
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.entropy.objective import smoothing_penalty, turn_ids_from_mask, turn_mean
from trl_epo.trainer import HISTORY_FILE


PROMPTS = ["You are at 3.", "The door is open.", "look", "Nothing happens. You are"]


def dataset(num_rows=16):
    return Dataset.from_dict({"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(num_rows)]})


def reward(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


BASE = {
    **CPU_RUN,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 3,
    "learning_rate": 1e-2,
}


def train(
    tmp_path, tokenizer, trainer_class=EPOTrainer, config_class=EPOConfig, callbacks=None, resume=None, **kwargs
):
    args = config_class(str(tmp_path), **{**BASE, **kwargs})
    trainer = trainer_class(
        make_model(),
        reward_funcs=reward,
        args=args,
        train_dataset=dataset(),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class TestDropIn:
    @pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "sapo"])
    def test_without_epos_terms_it_is_grpo(self, tmp_path, tokenizer, loss_type):
        ours = train(tmp_path, tokenizer, entropy_coef=0.0, loss_type=loss_type)
        theirs = train(tmp_path, tokenizer, GRPOTrainer, GRPOConfig, loss_type=loss_type)
        assert logged(ours, "loss") == logged(theirs, "loss")
        assert torch.equal(weights(ours), weights(theirs))

    def test_with_epos_terms_it_is_not(self, tmp_path, tokenizer):
        ours = train(tmp_path, tokenizer, entropy_coef=0.1)
        theirs = train(tmp_path, tokenizer, GRPOTrainer, GRPOConfig)
        assert not torch.equal(weights(ours), weights(theirs))

    def test_trls_own_bonus_never_acts_as_well(self, tmp_path, tokenizer):
        # Completions are single turns here, so that with equal lengths L_H is TRL's token mean: one bonus, not two.
        kwargs = {"entropy_coef": 0.05, "generation_kwargs": {"min_new_tokens": 8}, "max_steps": 1}
        ours = train(tmp_path, tokenizer, entropy_smoothing="none", **kwargs)
        theirs = train(tmp_path, tokenizer, GRPOTrainer, GRPOConfig, **kwargs)
        assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-6)
        torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=1e-5)

    def test_trls_adaptive_entropy(self, tmp_path, tokenizer):
        kwargs = {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef": 0.0}
        ours = train(tmp_path, tokenizer, **kwargs)
        theirs = train(tmp_path, tokenizer, GRPOTrainer, GRPOConfig, **kwargs)
        assert torch.equal(weights(ours), weights(theirs))

    @pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
    def test_every_loss_type_trains(self, tmp_path, tokenizer, loss_type):
        before = torch.cat([parameter.detach().flatten() for parameter in make_model().parameters()])
        trainer = train(tmp_path, tokenizer, loss_type=loss_type, max_steps=1)
        assert torch.isfinite(weights(trainer)).all()
        assert not torch.equal(weights(trainer), before)

    def test_default_args(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model = make_model()
        model.config._name_or_path = "me/tiny"
        trainer = EPOTrainer(model, reward_funcs=reward, train_dataset=dataset(), processing_class=tokenizer)
        assert isinstance(trainer.args, EPOConfig)
        assert trainer.args.output_dir == "tiny-EPO"
        assert trainer.max_completion_length == 512

    def test_grpo_config_is_refused(self, tmp_path, tokenizer):
        with pytest.raises(TypeError, match="GRPOConfig, but must be an `EPOConfig`"):
            train(tmp_path, tokenizer, config_class=GRPOConfig)

    def test_no_reward_is_refused(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="neither `reward_funcs` nor an `environment_factory`"):
            EPOTrainer(
                make_model(), args=EPOConfig(str(tmp_path)), train_dataset=dataset(), processing_class=tokenizer
            )

    def test_a_dataset_without_prompts_is_refused_at_once(self, tmp_path, tokenizer):
        for rows in (
            Dataset.from_dict({"question": ["a"]}),
            Dataset.from_dict({"question": ["a"]}).to_iterable_dataset(),
        ):
            with pytest.raises(ValueError, match=r"columns \['question'\], but needs `prompt`"):
                EPOTrainer(make_model(), reward, EPOConfig(str(tmp_path), **BASE), rows, processing_class=tokenizer)

    @pytest.mark.parametrize("rewards", [0.5, None, "good", ["good"] * 4, [[1.0]] * 4], ids=str)
    def test_rewards_that_are_no_numbers(self, tmp_path, tokenizer, rewards):
        def broken(completions, **kwargs):
            return rewards

        args = EPOConfig(str(tmp_path), **{**BASE, "gradient_accumulation_steps": 1})
        trainer = EPOTrainer(make_model(), [reward, broken], args, dataset(), processing_class=tokenizer)
        with pytest.raises(TypeError, match="'broken' gave .* a list with a number, or None, for each of the 4"):
            trainer.train()

    def test_rewards_of_all_kinds_that_trl_takes(self, tmp_path, tokenizer):
        import numpy

        kinds = {
            "array": lambda number: numpy.ones(number, dtype=numpy.float32),
            "tensor": torch.ones,
            "mixed": lambda number: (
                one for one in [True, 1, numpy.float64(1), torch.tensor(1.0), *[1.0] * number][:number]
            ),
            "none": lambda number: [None] * (number - 1) + [1],
        }
        functions = []
        for name, make in kinds.items():

            def function(completions, make=make, **kwargs):
                return make(len(completions))

            function.__name__ = name
            functions.append(function)

        async def awaited(completions, **kwargs):
            return [1.0] * len(completions)

        args = EPOConfig(str(tmp_path), **{**BASE, "max_steps": 1})
        trainer = EPOTrainer(make_model(), [*functions, awaited], args, dataset(), processing_class=tokenizer)
        trainer.train()
        for name in [*kinds, "awaited"]:
            assert logged(trainer, f"rewards/{name}/mean") == [1.0]

    def test_settings_of_text_episodes_are_told(self, tmp_path, tokenizer, caplog):
        train(tmp_path, tokenizer, max_turns=3, invalid_action_penalty=0.1, max_steps=1)
        assert "`max_turns=3`, `invalid_action_penalty=0.1`: for text episodes only, and ignored" in caplog.text
        with pytest.raises(ValueError, match="^`context='window'`: for text episodes only"):
            train(tmp_path, tokenizer, context="window")

    def test_evaluation_and_callbacks(self, tmp_path, tokenizer):
        from transformers import TrainerCallback

        seen = []

        class Watch(TrainerCallback):
            def on_evaluate(self, args, state, control, metrics, **kwargs):
                seen.append(metrics)

        args = EPOConfig(str(tmp_path), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, **BASE)
        trainer = EPOTrainer(
            make_model(),
            reward_funcs=[reward, reward],
            args=args,
            train_dataset=dataset(),
            eval_dataset=dataset(4),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.train()
        assert len(seen) == 3
        assert all("eval_reward" in metrics and "eval_epo/entropy" in metrics for metrics in seen)
        assert trainer.entropy_history.step == 2  # three RL steps; evaluation is none

    def test_peft(self, tmp_path, tokenizer):
        from peft import LoraConfig

        args = EPOConfig(str(tmp_path), **{**BASE, "save_strategy": "steps", "save_steps": 3})
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = EPOTrainer(
            make_model(),
            reward_funcs=reward,
            args=args,
            train_dataset=dataset(),
            processing_class=tokenizer,
            peft_config=lora,
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name in before if "lora_" in name}
        assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
        for folder in (tmp_path, tmp_path / "elsewhere"):
            trainer.save_model(str(folder))
            card = (folder / "README.md").read_text()
            assert "base_model" not in card  # PEFT's card would name a folder
            assert "- trl-epo: " in card


def test_fewer_rows_than_a_batch_takes(tmp_path, tokenizer):
    def make(num_rows):
        args = EPOConfig(str(tmp_path), **{**BASE, "max_steps": 1})
        return EPOTrainer(make_model(), reward, args, dataset(num_rows), processing_class=tokenizer)

    with pytest.raises(ValueError, match="has 1 rows, but a batch of 8 completions with `num_generations=4` takes 2"):
        make(1).train()
    trainer = make(2)
    trainer.train()
    assert trainer.state.global_step == 1


class TestObjective:
    def losses(self, tmp_path, tokenizer, means, **kwargs):
        """TRL's loss, ours, and the token entropies on one batch, with a given entropy history."""
        args = EPOConfig(str(tmp_path), **{**BASE, "gradient_accumulation_steps": 1, **kwargs})
        trainer = EPOTrainer(
            make_model(), reward_funcs=reward, args=args, train_dataset=dataset(), processing_class=tokenizer
        )
        trainer.state.max_steps = 10
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.entropy_history.means = list(means)
        trainer.entropy_history.step = len(means)
        with trainer.capture_entropies() as captured:
            policy = GRPOTrainer.compute_loss(trainer, trainer.model, inputs)
        return trainer, inputs, policy, captured[0]

    @pytest.mark.parametrize("means", [[], [1.0], [2.0, 4.0]])
    def test_loss_is_policy_loss_plus_eq6(self, tmp_path, tokenizer, means):
        kwargs = {"entropy_coef": 0.3, "entropy_smoothing_coef": 0.7}
        trainer, inputs, policy, entropies = self.losses(tmp_path, tokenizer, means, **kwargs)
        mask = inputs["completion_mask"]
        turn_ids = turn_ids_from_mask(mask)
        expected = policy - 0.3 * turn_mean(entropies, mask, turn_ids)
        if means:
            reference = sum(means) / len(means)
            beta = trainer.entropy_term.phase_weight(trainer.state.max_steps)
            assert beta == pytest.approx(1 + 2.718281828459045 ** (-3 * len(means) / 5))  # K = 10, k_mid = 5
            penalty = smoothing_penalty(entropies, reference, 0.0, 2.0)
            expected = expected + 0.3 * beta * 0.7 * turn_mean(penalty, mask, turn_ids)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), expected)

    def gradient(self, tmp_path, tokenizer, **kwargs):
        trainer, inputs, *_ = self.losses(tmp_path, tokenizer, [1.0], **kwargs)
        trainer.compute_loss(trainer.model, inputs).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    def test_the_default_penalty_has_a_gradient_outside_the_corridor_and_the_indicator_has_none(
        self, tmp_path, tokenizer
    ):
        # The history's mean is 1 nat and the untrained model's entropy about 6: every token is far above the cap.
        policy = self.gradient(tmp_path, tokenizer, entropy_coef=0.0)
        none = self.gradient(tmp_path, tokenizer, entropy_coef=1.0, entropy_smoothing="none")
        hinge = self.gradient(tmp_path, tokenizer, entropy_coef=1.0)
        indicator = self.gradient(tmp_path, tokenizer, entropy_coef=1.0, entropy_smoothing="indicator")
        bonus = none - policy
        assert bonus.norm() > 1e-3
        alpha_beta = 0.1 * (1 + 2.718281828459045 ** (-3 / 5))  # k = 1, k_mid = 5
        torch.testing.assert_close(hinge - none, -alpha_beta * bonus, atol=1e-5, rtol=1e-2)
        torch.testing.assert_close(indicator, none)

    def test_inside_the_corridor_the_penalty_does_nothing(self, tmp_path, tokenizer):
        none = self.gradient(tmp_path, tokenizer, entropy_smoothing="none")
        inside = self.gradient(tmp_path, tokenizer, entropy_corridor_high=100.0)
        torch.testing.assert_close(inside, none)

    @pytest.mark.parametrize("aggregation", ["turn", "token"])
    @pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
    def test_split_into_micro_batches_does_not_matter(self, tmp_path, tokenizer, aggregation, loss_type):
        # Wide corridor bounds are left on purpose, so that both parts of the term act.
        kwargs = {
            "entropy_coef": 0.5,
            "entropy_corridor_low": 0.99,
            "entropy_corridor_high": 1.0,
            "entropy_aggregation": aggregation,
            "loss_type": loss_type,
            "learning_rate": 1e-3,
        }
        splits = [(8, 1), (4, 2), (2, 4)]
        runs = [
            train(tmp_path, tokenizer, per_device_train_batch_size=b, gradient_accumulation_steps=a, **kwargs)
            for b, a in splits
        ]
        for run in runs[1:]:
            torch.testing.assert_close(weights(run), weights(runs[0]), atol=2e-5, rtol=1e-4)
            assert run.entropy_history.means == pytest.approx(runs[0].entropy_history.means, rel=1e-5)
            for name in ("loss", "epo/entropy_bonus", "epo/smoothing_loss"):
                assert logged(run, name)[0] == pytest.approx(logged(runs[0], name)[0], rel=1e-4, abs=1e-6)

    def test_missing_entropies_are_an_error_not_a_fallback(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setattr(
            "trl_epo.seams.trl.SeamedGRPOTrainer._get_per_token_logps_and_entropies",
            GRPOTrainer._get_per_token_logps_and_entropies,
        )
        with pytest.raises(RuntimeError, match="0 times in one loss"):
            train(tmp_path, tokenizer, max_steps=1)


class TestHistory:
    def test_one_entry_per_rl_step_however_many_optimizer_steps(self, tmp_path, tokenizer):
        trainer = train(
            tmp_path,
            tokenizer,
            gradient_accumulation_steps=1,
            steps_per_generation=2,
            num_iterations=2,
            max_steps=8,  # two RL steps of 2 batches × 2 passes
        )
        history = trainer.entropy_history
        assert history.step == 1
        assert len(history.means) == 1
        # The mean is that of the first pass: two micro-batches, each logged once per optimizer step.
        first = [entry for entry in trainer.state.log_history if "epo/entropy" in entry][:2]
        low, high = sorted(entry["epo/entropy"] for entry in first)
        assert low <= history.means[0] <= high

    def test_phase_weight_counts_rl_steps(self, tmp_path, tokenizer):
        trainer = train(tmp_path, tokenizer, gradient_accumulation_steps=1, num_iterations=2, max_steps=8)
        # K = 4 RL steps of two optimizer steps, k_mid = 2
        expected = [1 + 2.718281828459045 ** (-1.5 * k) for k in (0, 0, 1, 1, 2, 2, 3, 3)]
        assert logged(trainer, "epo/phase_weight") == pytest.approx(expected)

    def test_constant_schedule(self, tmp_path, tokenizer):
        trainer = train(tmp_path, tokenizer, entropy_smoothing_schedule="constant")
        assert logged(trainer, "epo/phase_weight") == [1.0, 1.0, 1.0]


class TestCheckpoints:
    KWARGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "entropy_coef": 0.1}

    def test_resume_equals_no_interruption(self, tmp_path, tokenizer):
        whole = train(tmp_path / "whole", tokenizer, **self.KWARGS)
        resumed = train(tmp_path / "more", tokenizer, resume=str(tmp_path / "whole" / "checkpoint-2"), **self.KWARGS)
        assert resumed.entropy_history.state_dict() == whole.entropy_history.state_dict()
        assert torch.equal(weights(resumed), weights(whole))

    def test_history_is_in_every_checkpoint(self, tmp_path, tokenizer):
        train(tmp_path, tokenizer, **self.KWARGS)
        state = json.loads((tmp_path / "checkpoint-2" / HISTORY_FILE).read_text())
        assert state["step"] == 1
        assert len(state["means"]) == 1
        assert state["token_count"] > 0

    def test_checkpoint_of_another_trainer(self, tmp_path, tokenizer, caplog):
        kwargs = {**self.KWARGS, "entropy_coef": 0.0}
        train(tmp_path / "grpo", tokenizer, GRPOTrainer, GRPOConfig, **kwargs)
        with caplog.at_level(logging.WARNING):
            train(tmp_path / "epo", tokenizer, resume=str(tmp_path / "grpo" / "checkpoint-2"), **kwargs)
        assert "starts anew" in caplog.text

    def test_model_card(self, tmp_path, tokenizer):
        train(tmp_path, tokenizer, **self.KWARGS)
        card = (tmp_path / "README.md").read_text()
        assert "EPO" in card
        assert "2509.22576" in card
        assert "- epo" in card
        assert "| κ_r | `entropy_corridor_high` | 2.0 |" in card
        assert "[None]" not in card


def test_same_seed_same_result(tmp_path, tokenizer):
    first, second = train(tmp_path, tokenizer), train(tmp_path, tokenizer)
    assert torch.equal(weights(first), weights(second))
