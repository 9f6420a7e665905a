"""Contexts and credit assignment in training: a real model, the real trainer, real environments."""

import json
import math
import re
import threading

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from conftest import Corridor, make_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_text_episodes import make_trainer as make_any_trainer
from test_text_episodes import weights
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    TrainerCallback,
)

from trl_epo import EPOConfig
from trl_epo.batches.batching import sum_dtype
from trl_epo.credit.advantages import gae
from trl_epo.credit.critic import make_critic, value_head
from trl_epo.credit.critic_checkpoint import _load_optimizer, _save_optimizer, load_model, save_model
from trl_epo.rollouts.rollout import parse_action


ARMS = [(context, estimator) for context in ("transcript", "window") for estimator in ("grpo", "gae", "gigpo", "turn")]
SGD = {"optim": "sgd", "learning_rate": 1.0, "critic_learning_rate": 0.1}


class Steps(Corridor):
    """Rewards each step towards the door."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward + 0.1 * ("r" in action), *rest


class Short(Steps):
    """Some actions end it."""

    def step(self, action):
        observation, reward, terminated, *rest = super().step(action)
        return observation, reward, terminated or len(action) % 3 == 0, *rest


class Foretold(Corridor):
    """The first observation says what the episode will earn, whatever is done."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.good = bool(self.np_random.integers(2))
        return "open look" if self.good else "left right", {}

    def step(self, action):
        return "Nothing happens.", float(self.good), False, False, {}


def make_trainer(*args, trainer_kwargs=None, **kwargs):
    """Any text is an action: the tiny model writes no tags."""
    return make_any_trainer(*args, trainer_kwargs={"action_parser": parse_action, **(trainer_kwargs or {})}, **kwargs)


def recorded(trainer):
    """The generation batches that the trainer makes."""
    batches, extend = [], trainer.extend_batch
    trainer.extend_batch = lambda batch: batches.append(extend(batch)) or batches[-1]
    return batches


def critic_weights(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer._critic.model.parameters()])


@pytest.mark.parametrize(("context", "estimator"), ARMS)
def test_micro_batches_do_not_matter(tmp_path, tokenizer, context, estimator):
    kwargs = {"context": context, "advantage_estimator": estimator, "entropy_coef": 0.1, "gamma": 0.9, **SGD}
    whole = make_trainer(tmp_path, tokenizer, factory=Steps, **kwargs)
    before = weights(whole)
    whole.train()
    split = make_trainer(
        tmp_path, tokenizer, factory=Steps, per_device_train_batch_size=2, gradient_accumulation_steps=4, **kwargs
    )
    split.train()
    assert not torch.allclose(weights(whole), before, atol=1e-4)
    torch.testing.assert_close(weights(split), weights(whole), atol=2e-7, rtol=1e-5)
    if estimator == "gae":
        torch.testing.assert_close(critic_weights(split), critic_weights(whole), atol=2e-7, rtol=1e-5)


# Not "bnpo", which TRL normalises by the tokens of a micro-batch, and "dapo", which is the default above
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"])
def test_micro_batches_do_not_matter_to_any_loss(tmp_path, tokenizer, loss_type):
    """Nor that episodes have different numbers of contexts."""
    kwargs = {"context": "window", "advantage_estimator": "turn", "factory": Short, "num_iterations": 2}
    kwargs |= {"loss_type": loss_type, "max_completion_length": 300, "entropy_coef": 0.1, **SGD, "learning_rate": 0.1}
    whole = make_trainer(tmp_path, tokenizer, **kwargs)
    before, batches = weights(whole), recorded(whole)
    whole.train()
    assert len(set(batches[0]["context_ids"].max(dim=1).values.tolist())) > 1
    split = make_trainer(tmp_path, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4, **kwargs)
    split.train()
    assert not torch.allclose(weights(whole), before, atol=1e-5)
    torch.testing.assert_close(weights(split), weights(whole), atol=2e-7, rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("estimator", ["grpo", "turn"])
def test_losses_are_those_of_contexts_scored_one_by_one(tmp_path, tokenizer, loss_type, estimator):
    """One forward over whole contexts for each micro-batch, or one for each context: the same weights."""
    kwargs = {"context": "window", "advantage_estimator": estimator, "loss_type": loss_type, "gamma": 0.9, **SGD}
    kwargs |= {"max_completion_length": 300, "num_iterations": 2}
    found = []
    for rows in (64, 1):
        trainer = make_trainer(tmp_path, tokenizer, factory=Steps, **kwargs)
        type(trainer)._rows_per_forward, original = (
            property(lambda self, rows=rows: rows),
            type(trainer)._rows_per_forward,
        )
        try:
            trainer.train()
        finally:
            type(trainer)._rows_per_forward = original
        assert all(math.isfinite(e["loss"]) for e in trainer.state.log_history if "loss" in e)
        found.append(weights(trainer))
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=1e-4)


def test_a_window_trains_on_what_the_policy_saw(tmp_path, tokenizer):
    """At the first step, before any update, the log-probabilities of the loss are those of the rollout."""
    trainer = make_trainer(tmp_path, tokenizer, context="window", max_steps=1, num_iterations=2)
    batches = recorded(trainer)
    trainer.train()
    batch = batches[0]
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert batch["context_ids"].max() == 3
    torch.testing.assert_close(
        batch["old_per_token_logps"][mask], batch["sampling_per_token_logps"][mask], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("estimator", ["gigpo", "turn"])
def test_advantages_are_those_of_the_turns(tmp_path, tokenizer, estimator):
    trainer = make_trainer(
        tmp_path, tokenizer, factory=Steps, advantage_estimator=estimator, gamma=0.5, max_steps=1, scale_rewards="none",
        gigpo_step_coef=2.0, invalid_action_penalty=0.3,
    )  # fmt: skip
    batches = recorded(trainer)
    trainer.train()
    [batch], episodes = batches, trainer._batch.episodes
    returns, groups = [], [range(4), range(4, 8)]
    for episode in episodes:
        following, own = 0.0, []
        for turn in reversed(episode.turns):
            following = turn.reward - 0.3 * turn.invalid + 0.5 * following
            own.insert(0, following)
        returns.append(own)
    for group in groups:
        totals = [sum(t.reward - 0.3 * t.invalid for t in episodes[i].turns) for i in group]
        for i in group:
            for number, turn in enumerate(episodes[i].turns):
                if estimator == "turn":
                    others = [value for j in group for value in returns[j]]
                    expected = returns[i][number] - sum(others) / len(others)
                else:
                    here = episodes[i].observations[number]
                    others = [
                        v
                        for j in group
                        for v, o in zip(returns[j], episodes[j].observations, strict=True)
                        if o == here
                    ]
                    expected = (
                        totals[i - group[0]] - sum(totals) / 4 + 2.0 * (returns[i][number] - sum(others) / len(others))
                    )
                tokens = batch["advantages"][i][batch["turn_ids"][i] == number]
                assert len(tokens) == len(turn.action_ids)
                assert tokens.tolist() == pytest.approx([expected] * len(tokens), abs=1e-5)
    assert not batch["advantages"][batch["turn_ids"] < 0].any() or estimator == "gigpo"


class Dense(Corridor):
    """Earns 1 each turn."""

    def step(self, action):
        return "ok", 1.0, False, False, {}


@pytest.mark.parametrize(
    ("reward_weights", "own_weight", "return_weight"),
    [([0.5], None, 0.5), ([0.1], None, 0.1), ([3.0], 3.0, 1.0), ([3.0, 0.1], 3.0, 0.1), ([3.0, 0.0], 3.0, 0.0)],
)
def test_turns_are_credited_with_weighted_rewards(tmp_path, tokenizer, reward_weights, own_weight, return_weight):
    """A turn earns its own reward, weighted; what a reward function gives, here to every second episode, comes last."""

    def every_second(episodes, **kwargs):
        return [float(i % 2) for i in range(len(episodes))]

    trainer_kwargs = {} if own_weight is None else {"reward_funcs": every_second}
    trainer = make_trainer(
        tmp_path, tokenizer, factory=Dense, advantage_estimator="turn", max_steps=1, scale_rewards="none",
        reward_weights=reward_weights, trainer_kwargs=trainer_kwargs,
    )  # fmt: skip
    batches = recorded(trainer)
    trainer.train()
    [batch] = batches
    for i in range(8):
        found = [batch["advantages"][i][batch["turn_ids"][i] == turn][0].item() for turn in range(4)]
        expected = [return_weight * (1.5 - turn) + (own_weight or 0.0) * (i % 2 - 0.5) for turn in range(4)]
        assert found == pytest.approx(expected, abs=1e-6)
    assert trainer.args.reward_weights == reward_weights  # which may be used for another trainer
    [entry] = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert entry["reward"] == pytest.approx(4 * return_weight + 0.5 * (own_weight or 0.0))


class Returns(Corridor):
    """Each turn looks like the first. One reward: at the end, in the second turn of two episodes and the fourth of others."""

    lock = threading.Lock()
    number = 0

    def reset(self, *, seed=None, options=None):
        with Returns.lock:
            self.last = 2 + 2 * (Returns.number % 2)
            Returns.number += 1
        self.num_steps = 0
        return "ok", {}

    def step(self, action):
        self.num_steps += 1
        done = self.num_steps == self.last
        return "ok", float(done), done, False, {}


def test_gigpo_tells_turns_of_an_episode_apart_by_default(tmp_path, tokenizer):
    """With one reward at the end and γ = 1 all turns that began in the same state have the same advantage."""
    kwargs = {"factory": Returns, "advantage_estimator": "gigpo", "max_steps": 1, "scale_rewards": "none"}
    trainer = make_trainer(tmp_path, tokenizer, **kwargs)
    batches = recorded(trainer)
    trainer.train()
    [batch] = batches
    for i, episode in enumerate(trainer._batch.episodes):
        last = len(episode.turns) - 1
        found = [batch["advantages"][i][batch["turn_ids"][i] == turn][0].item() for turn in (0, last)]
        assert found[1] - found[0] == pytest.approx(1 - 0.95**last, abs=1e-6)


class Breaks(Corridor):
    """Earns 1 each turn; one environment of a group breaks in its third."""

    lock = threading.Lock()
    num_broken = {}  # by first row's length

    def reset(self, *, seed=None, options=None):
        self.length, self.num_steps = options["length"], 0
        return "Look!", {}

    def step(self, action):
        self.num_steps += 1
        if self.num_steps == 3:
            with Breaks.lock:
                if self.length not in Breaks.num_broken:
                    Breaks.num_broken[self.length] = 1
                    raise OSError("broken")
        return f"Turn {self.num_steps}.", 1.0, False, False, {}


@pytest.mark.parametrize("estimator", ["turn", "gigpo"])
def test_failed_episodes_are_no_baseline(tmp_path, tokenizer, estimator):
    Breaks.num_broken.clear()
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        factory=Breaks,
        advantage_estimator=estimator,
        max_steps=1,
        scale_rewards="none",
        env_max_retries=0,
    )
    batches = recorded(trainer)
    trainer.train()
    [batch] = batches
    expected = [1.5, 0.5, -0.5, -1.5] if estimator == "turn" else [0.0] * 4
    assert sum(episode.failed for episode in trainer._batch.episodes) == 2  # one of each group
    for i, episode in enumerate(trainer._batch.episodes):
        if not episode.failed:
            found = [batch["advantages"][i][batch["turn_ids"][i] == turn][0].item() for turn in range(4)]
            assert found == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ["grpo", "turn", "gigpo"])
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_scaled_advantages_do_not_know_the_unit_of_rewards(tmp_path, tokenizer, estimator, scale):
    class Hundredfold(Steps):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            return observation, 100 * reward, *rest

    largest = []
    for factory in (Steps, Hundredfold):
        trainer = make_trainer(
            tmp_path, tokenizer, factory=factory, advantage_estimator=estimator, scale_rewards=scale, max_steps=1
        )
        batches = recorded(trainer)
        trainer.train()
        largest.append(batches[0]["advantages"].abs().max().item())
    assert largest[0] == pytest.approx(largest[1], rel=0.01)


class TestFilter:
    def test_masked_groups_do_not_train(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path, tokenizer, filter_zero_variance_groups="mask", max_steps=4, learning_rate=1e-4
        )
        batches = recorded(trainer)
        trainer.train()
        logged = [entry["groups/masked"] for entry in trainer.state.log_history if "groups/masked" in entry]
        flat = [entry["frac_reward_zero_std"] for entry in trainer.state.log_history if "groups/masked" in entry]
        assert logged == [2 * fraction for fraction in flat] and any(logged)
        for batch, number in zip(batches, logged, strict=True):
            assert (batch["tool_mask"] * batch["completion_mask"]).any(dim=1).sum() == 8 - 4 * number
            assert batch["num_items_in_batch"] == (batch["tool_mask"] * batch["completion_mask"]).sum()

    def test_a_batch_of_nothing_else_changes_nothing(self, tmp_path, tokenizer):
        class Never(Corridor):
            def step(self, action):
                return "no", 0.0, False, False, {}

        trainer = make_trainer(tmp_path, tokenizer, factory=Never, filter_zero_variance_groups="resample", max_steps=1)
        before = weights(trainer)
        trainer.train()
        assert torch.equal(weights(trainer), before)
        [entry] = [entry for entry in trainer.state.log_history if "groups/masked" in entry]
        assert (entry["groups/masked"], entry["groups/resampled"]) == (2, 6)  # two groups, three times

    def test_resampled_groups_replace_flat_ones(self, tmp_path, tokenizer):
        flat = {}
        for choice in ("mask", "resample"):
            trainer = make_trainer(
                tmp_path, tokenizer, filter_zero_variance_groups=choice, max_steps=6, learning_rate=1e-9
            )
            trainer.train()
            flat[choice] = sum(e.get("groups/masked", 0) for e in trainer.state.log_history)
        assert flat["resample"] < flat["mask"]


class TestCritic:
    def test_it_begins_at_zero_with_the_policys_weights(self, model):
        critic = make_critic(model, None)
        ids = torch.randint(3, 300, (2, 9))
        assert not critic(ids).logits.any()
        torch.testing.assert_close(critic.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
        with torch.no_grad():
            critic.model.norm.weight.add_(1.0)
        assert not torch.equal(critic.model.norm.weight, model.model.norm.weight)  # a copy

    def test_values_and_advantages(self, tmp_path, tokenizer):
        """Against values read from the plain critic, one episode at a time."""
        trainer = make_trainer(
            tmp_path, tokenizer, factory=Steps, advantage_estimator="gae", max_steps=1, gamma=0.9, gae_lambda=0.8
        )
        with torch.no_grad():
            value_head(trainer._critic.model).weight.normal_()
        plain = make_critic(trainer.model, None)
        plain.load_state_dict(trainer._critic.model.state_dict())
        batches = recorded(trainer)
        trainer.train()
        [batch] = batches
        mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
        rewards = torch.zeros_like(batch["values"])
        for i, episode in enumerate(trainer._batch.episodes):
            tokens = [*episode.prompt_ids, *batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()]
            values = plain(torch.tensor([tokens])).logits[0, :-1, 0]
            first = len(episode.prompt_ids)
            for place in mask[i].nonzero().flatten().tolist():
                assert batch["values"][i, place].item() == pytest.approx(values[first + place - 1].item(), abs=1e-5)
            for number, turn in enumerate(episode.turns):
                rewards[i, (batch["turn_ids"][i] == number).nonzero().max()] = turn.reward
        advantages, returns = gae(rewards, batch["values"], mask, 0.9, 0.8)
        torch.testing.assert_close(batch["returns"], returns)
        standard = (advantages - advantages[mask].mean()) / advantages[mask].std(correction=0)
        torch.testing.assert_close(batch["advantages"][mask], standard[mask], atol=1e-4, rtol=1e-4)
        assert not batch["advantages"][~mask].any()

    def test_no_float64_where_a_device_has_none(self, tmp_path, tokenizer, monkeypatch):
        """Everything on a CPU here, as if its sums were to be in what MPS has."""

        class NoFloat64(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                assert not isinstance(result, torch.Tensor) or result.dtype != torch.float64, func
                return result

        assert sum_dtype(torch.device("mps")) == sum_dtype(torch.device("xpu")) == torch.float32
        assert sum_dtype(torch.device("cpu")) == sum_dtype(torch.device("cuda")) == torch.float64
        trainer = make_trainer(tmp_path, tokenizer, factory=Steps, advantage_estimator="gae", max_steps=1)
        assign = trainer._credit.assign

        def checked(batch, *args):
            expected = assign(dict(batch), *args)
            monkeypatch.setattr("trl_epo.credit.assigner.sum_dtype", lambda device: torch.float32)
            with NoFloat64():
                found = assign(batch, *args)
            assert found == pytest.approx(expected, rel=1e-4)
            return found

        trainer._credit.assign = checked
        trainer.train()
        assert any("critic/value" in entry for entry in trainer.state.log_history)

    @pytest.mark.parametrize("reward", [0.0, 0.3])
    def test_a_batch_whose_returns_do_not_vary_leaves_the_policy_alone(self, tmp_path, tokenizer, reward):
        """The critic's noise is no advantage, and it learns."""

        class Same(Corridor):
            def step(self, action):
                observation, *_ = super().step(action)
                ends = self.num_steps == 3
                return observation, reward * ends, ends, False, {}

        trainer = make_trainer(
            tmp_path, tokenizer, factory=Same, advantage_estimator="gae", max_steps=1, entropy_coef=0.0
        )
        with torch.no_grad():
            value_head(trainer._critic.model).weight.normal_()
        before, critic = weights(trainer), critic_weights(trainer)
        batches = recorded(trainer)
        trainer.train()
        assert batches[0]["values"].std() > 0.1
        assert not batches[0]["advantages"].any()
        assert torch.equal(weights(trainer), before) and not torch.equal(critic_weights(trainer), critic)
        [logged] = [entry for entry in trainer.state.log_history if "critic/flat" in entry]
        assert logged["critic/flat"] == 1.0 and logged["critic/advantage_std"] > 0.1

    def test_it_learns_with_its_own_rate(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path, tokenizer, factory=Foretold, advantage_estimator="gae", max_steps=60, critic_learning_rate=3e-3,
            learning_rate=0.0, lr_scheduler_type="constant", per_device_train_batch_size=16,
        )  # fmt: skip
        before = weights(trainer)
        trainer.train()
        assert torch.equal(weights(trainer), before)  # the policy's rate is 0
        explained = [e.get("critic/explained_variance", 0.0) for e in trainer.state.log_history if "critic/value" in e]
        losses = [e["critic/value_loss"] for e in trainer.state.log_history if "critic/value" in e]
        assert min(explained[-3:]) > 0.5 > explained[0]
        assert max(losses[-3:]) < min(losses[:3])

    def test_its_optimizer(self, tmp_path, tokenizer):
        """The policy's schedule, no weight decay, gradients clipped without the policy's."""

        class Rates(TrainerCallback):
            seen = []

            def on_step_end(self, args, state, control, lr_scheduler, **kwargs):
                self.seen.append((lr_scheduler.get_last_lr()[0], *trainer._critic.schedule.get_last_lr()))

        trainer = make_trainer(
            tmp_path, tokenizer, factory=Steps, advantage_estimator="gae", max_steps=4, warmup_steps=1, weight_decay=0.1,
            max_grad_norm=1e-3, **SGD, trainer_kwargs={"callbacks": [Rates()]},
        )  # fmt: skip
        before = critic_weights(trainer)
        trainer.train()
        assert Rates.seen == [(rate, pytest.approx(0.1 * rate)) for rate in (1.0, 2 / 3, 1 / 3, 0.0)]
        assert [group["weight_decay"] for group in trainer._critic.optimizer.param_groups] == [0.0]
        # Rates 0, 0.1, 0.1·2/3 and 0.1·1/3, gradients of norm 1e-3 at most; the value head alone moves at first
        assert 1e-4 < (critic_weights(trainer) - before).norm() <= 2.01e-4

    def test_warm_up_leaves_the_policy_alone(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path, tokenizer, factory=Steps, advantage_estimator="gae", critic_warmup_steps=2, max_steps=2,
            weight_decay=0.1,
        )  # fmt: skip
        before, critic = weights(trainer), critic_weights(trainer)
        trainer.train()
        assert torch.equal(weights(trainer), before)
        assert not torch.equal(critic_weights(trainer), critic)

    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("context", ["transcript", "window"])
    def test_resume_equals_no_interruption(self, tmp_path, tokenizer, lora, context):
        kwargs = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "advantage_estimator": "gae"}
        kwargs |= {"context": context, "critic_learning_rate": 1e-2, "factory": Steps}
        peft = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])} if lora else {}
        whole = make_trainer(tmp_path / "whole", tokenizer, trainer_kwargs=peft, **kwargs)
        before = critic_weights(whole)
        whole.train()
        assert not torch.equal(critic_weights(whole), before)
        resumed = make_trainer(tmp_path / "resumed", tokenizer, trainer_kwargs=peft, **kwargs)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert torch.equal(critic_weights(resumed), critic_weights(whole))
        assert torch.equal(weights(resumed), weights(whole))

    def test_a_lora_policy_has_a_lora_critic(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path, tokenizer, factory=Steps, advantage_estimator="gae", save_strategy="steps", save_steps=2,
            trainer_kwargs={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
        )  # fmt: skip
        frozen = {n: w.clone() for n, w in trainer._critic.model.named_parameters() if not w.requires_grad}
        trainer.train()
        learning = {n for n, w in trainer._critic.model.named_parameters() if w.requires_grad}
        assert all("lora" in name or "score" in name for name in learning)
        assert any("lora" in name for name in learning) and any("score" in name for name in learning)
        after = dict(trainer._critic.model.named_parameters())
        assert all(torch.equal(weight, after[name]) for name, weight in frozen.items())
        assert (tmp_path / "checkpoint-2" / "critic" / "model" / "adapter_model.safetensors").exists()

    def test_a_saved_critic_can_be_given(self, tmp_path, tokenizer):
        kwargs = {"advantage_estimator": "gae", "critic_learning_rate": 1e-2, "factory": Steps}
        trainer = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2, **kwargs)
        trainer.train()
        folder = tmp_path / "checkpoint-2" / "critic" / "model"
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForTokenClassification"]
        assert AutoModelForTokenClassification.from_pretrained(folder).num_labels == 1
        other = make_trainer(tmp_path, tokenizer, critic_model=str(folder), **kwargs)
        assert torch.equal(critic_weights(other), critic_weights(trainer))

    def test_a_saved_adapter_can_be_given(self, tmp_path, tokenizer):
        peft = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)}
        kwargs = {"advantage_estimator": "gae", "critic_learning_rate": 1e-2, "factory": Steps, "trainer_kwargs": peft}
        trainer = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2, **kwargs)
        trainer.train()
        folder = str(tmp_path / "checkpoint-2" / "critic" / "model")
        other = make_trainer(tmp_path, tokenizer, critic_model=folder, **kwargs)
        assert torch.equal(critic_weights(other), critic_weights(trainer))
        assert not any(m.p for m in other._critic.model.modules() if isinstance(m, torch.nn.Dropout))
        with pytest.raises(ValueError, match="holds an adapter, but the policy has none"):
            make_trainer(tmp_path, tokenizer, critic_model=folder, **{**kwargs, "trainer_kwargs": {}})

    @pytest.mark.parametrize("lora", [False, True])
    def test_a_model_without_a_value_head_says_0(self, tmp_path, tokenizer, lora):
        make_model(seed=1).save_pretrained(tmp_path / "other")
        peft = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}
        critic = make_trainer(
            tmp_path, tokenizer, advantage_estimator="gae", critic_model=str(tmp_path / "other"), trainer_kwargs=peft
        )._critic.model
        assert not critic(input_ids=torch.randint(3, 300, (2, 9))).logits.any()
        embeddings = make_model(seed=1).get_input_embeddings().weight
        assert torch.equal(critic.get_input_embeddings().weight, embeddings)

    def test_a_model_that_cannot_be_the_critic(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="`critic_model` is 'no/model/here', but there is no model"):
            make_trainer(tmp_path, tokenizer, advantage_estimator="gae", critic_model="no/model/here")
        make_model(vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=f"knows {len(tokenizer) - 1} tokens.*tokenizer has {len(tokenizer)}"):
            make_trainer(tmp_path, tokenizer, advantage_estimator="gae", critic_model=str(tmp_path / "other"))

    @pytest.mark.parametrize("shape", [None, (-1, 1)], ids=["8 bits", "4 bits"])
    def test_a_quantized_policy_wants_a_critic_model(self, tmp_path, model, shape):
        """bitsandbytes keeps codes in the place of weights: a byte each, or two in a byte of one long column."""
        policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        layer = model.model.layers[1].self_attn.q_proj.base_layer
        codes = torch.full_like(layer.weight, 7, dtype=torch.int8)
        layer.weight = torch.nn.Parameter(codes.view(shape or codes.shape), requires_grad=False)
        with pytest.raises(
            ValueError, match=r"q_proj.base_layer.weight' is int8 .*Set `critic_model` to a whole model"
        ):
            make_critic(policy, None)
        make_model(seed=1).save_pretrained(tmp_path / "other")
        make_critic(policy, str(tmp_path / "other"))

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_policy_that_bitsandbytes_quantized(self, tmp_path, tokenizer, bits):
        pytest.importorskip("bitsandbytes")
        make_model(hidden_size=64).save_pretrained(tmp_path / "policy")
        quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        kwargs = {"advantage_estimator": "gae", "factory": Steps, "max_steps": 1, "bf16": True}
        kwargs["trainer_kwargs"] = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}

        def policy():
            return AutoModelForCausalLM.from_pretrained(tmp_path / "policy", quantization_config=quantization)

        with pytest.raises(ValueError, match="Set `critic_model` to a whole model"):
            make_trainer(tmp_path, tokenizer, model=policy(), **kwargs)
        make_trainer(tmp_path, tokenizer, model=policy(), critic_model=str(tmp_path / "policy"), **kwargs).train()

    def test_training_twice_and_a_given_optimizer(self, tmp_path, tokenizer):
        kwargs = {"advantage_estimator": "gae", "factory": Steps}
        trainer = make_trainer(tmp_path, tokenizer, **kwargs)
        trainer.train()
        before = critic_weights(trainer)
        trainer.train()
        assert not torch.equal(critic_weights(trainer), before)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        both = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
        given = make_trainer(tmp_path, tokenizer, **kwargs, trainer_kwargs={"optimizers": both})
        policy, critic = weights(given), critic_weights(given)
        given.train()
        assert torch.equal(weights(given), policy)  # the optimizer given is the policy's
        assert not torch.equal(critic_weights(given), critic)

    def test_gradients_of_a_skipped_step_are_forgotten(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, factory=Steps, advantage_estimator="gae", max_steps=1)
        weight = value_head(trainer._critic.model).weight
        weight.grad = torch.full_like(weight, math.inf)
        trainer.train()
        assert torch.isfinite(critic_weights(trainer)).all()

    def test_the_best_checkpoints_critic_is_loaded_too(self, tmp_path, tokenizer):
        steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(
            tmp_path, tokenizer, factory=Steps, advantage_estimator="gae", critic_learning_rate=1e-2, max_steps=3,
            load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=False,
            trainer_kwargs={"eval_dataset": Dataset.from_dict({"length": [2, 3]})}, **steps,
        )  # fmt: skip
        seen = {}
        save = trainer.save_extras
        trainer.save_extras = lambda folder: seen.update({folder: critic_weights(trainer).clone()}) or save(folder)
        trainer.train()
        [best] = [weights for folder, weights in seen.items() if folder == trainer.state.best_model_checkpoint]
        assert torch.equal(critic_weights(trainer), best)
        assert len({float(weights.sum()) for weights in seen.values()}) == 3

    def test_a_checkpoint_without_a_critic(self, tmp_path, tokenizer, caplog):
        kwargs = {"factory": Steps, "save_strategy": "steps", "save_steps": 1, "save_only_model": True, "max_steps": 1}
        make_trainer(tmp_path, tokenizer, **kwargs).train()
        kwargs |= {"advantage_estimator": "gae", "max_steps": 2}
        make_trainer(tmp_path, tokenizer, **kwargs).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert "There is no critic in" in caplog.text

    def test_gradient_checkpointing_in_bf16(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path, tokenizer, factory=Steps, advantage_estimator="gae", context="window", gradient_checkpointing=True,
            bf16=True, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_iterations=2,
        )  # fmt: skip
        before, critic = weights(trainer), critic_weights(trainer)
        trainer.train()
        assert not torch.equal(weights(trainer), before)
        assert not torch.equal(critic_weights(trainer), critic)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("lora", [False, True])
    def test_it_learns_in_32_bits_whatever_the_policy_is_in(self, dtype, lora):
        policy = make_model().to(dtype)
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"])) if lora else policy
        critic = make_critic(policy, None)
        learning = [weight for weight in critic.parameters() if weight.requires_grad]
        assert {weight.dtype for weight in learning} == {torch.float32}
        assert not lora or {w.dtype for w in critic.parameters() if not w.requires_grad} == {dtype}
        with torch.no_grad():
            value_head(critic).weight += 0.1
        ids = torch.randint(3, 300, (1, 9))
        with torch.autocast("cpu", torch.bfloat16):
            values = critic(input_ids=ids).logits
            hidden = (critic.get_base_model() if lora else critic).model(ids).last_hidden_state
        assert values.dtype == torch.float32
        torch.testing.assert_close(values[..., 0], 0.1 * hidden.float().sum(-1))
        scaler = torch.amp.GradScaler("cpu")
        optimizer = torch.optim.AdamW(learning)
        scaler.scale(values.sum()).backward()
        scaler.unscale_(optimizer)

    @pytest.mark.parametrize("lora", [False, True])
    def test_a_compiled_one_is_saved_as_any_other(self, tmp_path, lora):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="eager"))
        policy = make_model()
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"])) if lora else policy
        first, second = (accelerator.prepare_model(make_critic(policy, None)) for _ in range(2))
        with torch.no_grad():
            for weight in first.parameters():
                weight += 0.1 * weight.requires_grad
        save_model(accelerator, first, str(tmp_path), writes=True)
        load_model(accelerator, second, str(tmp_path))
        assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
        assert not any("_orig_mod" in name for path in tmp_path.glob("*.safetensors") for name in load_file(path))

    def test_weights_whose_optimizer_shares_a_table(self, tmp_path):
        def optimizer():
            weights = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
            return torch.optim.AdamW(weights), weights

        (first, weights), (second, _) = optimizer(), optimizer()
        for weight in weights:
            weight.sum().backward()
        first.step()
        table = torch.linspace(-1, 1, 256)  # as of bitsandbytes in 8 bits
        for state in first.state.values():
            state["qmap1"] = table
        _save_optimizer(first, str(tmp_path))
        _load_optimizer(second, str(tmp_path))
        for before, after in zip(first.state.values(), second.state.values(), strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)

    def test_a_gradient_scaler_serves_policy_and_critic(self, tmp_path, tokenizer):
        """As in fp16, which needs a GPU otherwise: both step with gradients that were scaled back, once."""
        losses, num_scheduled = [], []
        for scaled, overflows in ((False, False), (True, False), (True, True)):
            trainer = make_trainer(
                tmp_path, tokenizer, factory=Steps, advantage_estimator="gae", critic_learning_rate=1e-2,
                optim="adamw_torch",  # a fused one does not tell that it was left out
            )  # fmt: skip
            if scaled:
                trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
                trainer.accelerator.state._mixed_precision, trainer.accelerator.native_amp = "fp16", True
            if overflows:
                next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
            trainer.train()
            losses.append([e["critic/value_loss"] for e in trainer.state.log_history if "critic/value_loss" in e])
            num_scheduled.append((trainer.lr_scheduler.last_epoch, trainer._critic.schedule.last_epoch))
        assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[0][0] != losses[0][1]
        assert num_scheduled == [(2, 2), (2, 2), (0, 0)]  # a step whose gradients overflowed does not count

    def test_an_architecture_without_one(self):
        class Unknown(BloomConfig):
            model_type = "unknown-kind"

        policy = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=8, n_layer=1, n_head=2))
        policy.config = Unknown(vocab_size=50, hidden_size=8, n_layer=1, n_head=2)
        with pytest.raises(ValueError, match="(?s)unknown-kind.*critic_model"):
            make_critic(policy, None)


def test_a_windows_default_prompt_wants_the_tags(tmp_path, tokenizer):
    def invalid(**trainer_kwargs):
        trainer = make_any_trainer(
            tmp_path, tokenizer, context="window", max_steps=1, trainer_kwargs=trainer_kwargs, max_turn_length=9
        )
        trainer.train()
        return {turn.invalid for episode in trainer._batch.episodes for turn in episode.turns}

    assert invalid() == {True}
    assert False in invalid(prompt_builder=lambda turn: turn.observation)


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"context": "windows"}, "`context` is 'windows'.*'transcript', 'window'"),
            ({"context_overflow": "crash"}, "`context_overflow`"),
            ({"context_turns": -1}, "`context_turns` is -1"),
            ({"advantage_estimator": "ppo"}, "'grpo', 'gae', 'gigpo', 'turn'"),
            ({"gamma": 1.5}, "`gamma` is 1.5"),
            ({"gae_lambda": -0.1}, "`gae_lambda` is -0.1"),
            ({"critic_clip_range": 0.0}, "`critic_clip_range` is 0.0"),
            ({"critic_warmup_steps": -1}, "`critic_warmup_steps` is -1"),
            ({"filter_zero_variance_groups": "drop"}, "'mask', 'resample'"),
            ({"filter_zero_variance_groups": "mask", "advantage_estimator": "gae"}, "group-relative"),
            (
                {"advantage_estimator": "gae", "lr_scheduler_type": "greedy", "eval_strategy": "epoch"},
                "greedy.*'cosine'",
            ),
            (
                {"advantage_estimator": "turn", "multi_objective_aggregation": "normalize_then_sum"},
                "sum_then_normalize",
            ),
        ],
    )
    def test_config(self, tmp_path, kwargs, message):
        with pytest.raises(ValueError, match=message):
            EPOConfig(str(tmp_path), **kwargs)

    @pytest.mark.parametrize(("num_funcs", "weights"), [(0, [0.5, 0.5]), (1, []), (2, [0.5])])
    def test_reward_weights(self, tmp_path, tokenizer, num_funcs, weights):
        reward_funcs = [lambda episodes, **kwargs: [0.0] * len(episodes)] * num_funcs
        message = (
            rf"`reward_weights` is {re.escape(str(weights))}.*{num_funcs} `reward_funcs`.*{num_funcs + 1} numbers"
        )
        with pytest.raises(ValueError, match=message):
            make_trainer(
                tmp_path, tokenizer, reward_weights=weights, trainer_kwargs={"reward_funcs": reward_funcs or None}
            )

    def test_prompt_builder_is_tried_before_training(self, tmp_path, tokenizer):
        def wrong(turn):
            return turn.info["valid"]

        with pytest.raises(ValueError, match="prompt_builder.*KeyError"):
            make_trainer(tmp_path, tokenizer, context="window", trainer_kwargs={"prompt_builder": wrong})

    def test_a_prompt_builder_that_is_never_asked(self, tmp_path, tokenizer):
        builder = {"prompt_builder": lambda turn: turn.observation}
        with pytest.raises(ValueError, match="`prompt_builder` .*`context='transcript'`.*`context='window'`"):
            make_trainer(tmp_path, tokenizer, trainer_kwargs=builder)
        make_trainer(tmp_path, tokenizer, context_overflow="window", trainer_kwargs=builder)
        with pytest.raises(ValueError, match="`prompt_builder` is for text episodes"):
            make_trainer(tmp_path, tokenizer, factory=None, trainer_kwargs={**builder, "reward_funcs": [len]})

    def test_only_for_text_episodes(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="for text episodes"):
            make_trainer(tmp_path, tokenizer, factory=None, advantage_estimator="gae",
                         trainer_kwargs={"reward_funcs": [len]})  # fmt: skip
