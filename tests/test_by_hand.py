"""
Whole trainings once more in plain torch: from the episodes that were played, one turn at a time, with a forward of its own for
each, to the weights at the end. Nothing of the package computes here but the episodes.
"""

import math
import statistics
from itertools import accumulate

import pytest
import torch
from conftest import CPU_RUN, Corridor, make_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.credit.critic import make_critic, value_head
from trl_epo.rollouts.rollout import parse_action


GROUP = 4
GAMMA, LAMBDA, VALUE_CLIP, PENALTY = 0.9, 0.8, 0.05, 0.1
COEF, SMOOTHING, LOW, HIGH = 0.3, 0.6, 0.9, 1.05
RATE, CRITIC_RATE = 0.004, 2e-4
RL_STEPS, PASSES, MICRO_BATCHES, ACCUMULATED = 3, 2, 4, 2
SETTINGS = {
    **CPU_RUN,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": ACCUMULATED,
    "steps_per_generation": MICRO_BATCHES,
    "num_iterations": PASSES,
    "max_steps": RL_STEPS * PASSES * MICRO_BATCHES // ACCUMULATED,
    "num_generations": GROUP,
    "max_turns": 4,
    "max_turn_length": 5,
    "optim": "sgd",
    "learning_rate": RATE,
    "critic_learning_rate": CRITIC_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
    "gamma": GAMMA,
    "gae_lambda": LAMBDA,
    "critic_clip_range": VALUE_CLIP,
    "invalid_action_penalty": PENALTY,
    "entropy_coef": COEF,
    "entropy_smoothing_coef": SMOOTHING,
    "entropy_corridor_low": LOW,
    "entropy_corridor_high": HIGH,
    "entropy_smoothing_decay": 3.0,
}


class Walk(Corridor):
    """Rewards that differ from turn to turn."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, len(action) / 10 - 0.2 * ("a" in action), *rest


def sharp_model():
    """Entropies that differ, and turns of different lengths."""
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight *= 10
        model.model.embed_tokens.weight[2] *= 2
    return model


def played(tmp_path, tokenizer, adapter, **settings):
    """A trained trainer, its policy and critic before, the episodes of each RL step and the rows of each micro-batch."""
    trainer = EPOTrainer(
        sharp_model(),
        args=EPOConfig(str(tmp_path), **SETTINGS, **settings),
        train_dataset=Dataset.from_dict({"length": [2, 3, 4, 5]}),
        processing_class=tokenizer,
        environment_factory=Walk,
        action_parser=parse_action,
        peft_config=adapter,
    )
    policy = get_peft_model(sharp_model(), adapter) if adapter else sharp_model()
    policy.load_state_dict(trainer.model.state_dict())
    critic = None
    if trainer._critic is not None:
        with torch.no_grad():
            value_head(trainer._critic.model).weight.normal_(std=0.01)
        critic = make_critic(policy, None)
        critic.load_state_dict(trainer._critic.model.state_dict())
    steps, rows = [], []
    extend, compute = trainer.extend_batch, trainer.compute_loss

    def names(batch):  # of its rows
        columns = [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        return [(*p[m.bool()].tolist(), -1, *c[n.bool()].tolist()) for p, m, c, n in zip(*columns, strict=True)]

    def extend_batch(batch):
        batch = extend(batch)
        steps.append(
            dict(zip(names(batch), range(len(trainer._batch.episodes)), strict=True))
            | {"all": trainer._batch.episodes}
        )
        return batch

    def compute_loss(model, inputs, *args, **kwargs):
        rows.append([steps[-1][name] for name in names(inputs)])
        return compute(model, inputs, *args, **kwargs)

    trainer.extend_batch, trainer.compute_loss = extend_batch, compute_loss
    trainer.train()
    return trainer, policy, critic, [step["all"] for step in steps], rows


def contexts(episode):
    """For each turn what the model read and what it wrote."""
    context = list(episode.prompt_ids)
    for turn in episode.turns:
        context = [*([] if turn.starts_context else context), *turn.observation_ids]
        yield context, list(turn.action_ids)
        context = [*context, *turn.action_ids]


def scores(policy, episode):
    """For each turn the log-probability and the entropy of each of its tokens."""
    for context, action in contexts(episode):
        logits = policy(input_ids=torch.tensor([context + action])).logits[0, len(context) - 1 : -1].float()
        logs = logits.log_softmax(-1)
        yield logs[range(len(action)), action], -(logs.exp() * logs).sum(-1)


def values(critic, episode):
    """For each turn the value before each of its tokens."""
    for context, action in contexts(episode):
        yield critic(input_ids=torch.tensor([context + action])).logits[0, len(context) - 1 : -1, 0].float()


def rewards(episode):
    return [turn.reward - PENALTY * turn.invalid for turn in episode.turns]


def returns(episode):
    return list(accumulate(reversed(rewards(episode)), lambda after, reward: reward + GAMMA * after))[::-1]


def relative(value, others):
    return (value - statistics.mean(others)) / (statistics.stdev(others) + 1e-4) if len(others) > 1 else 0.0


def advantages(episodes, estimator):
    """For each episode and turn, of all its tokens."""
    for index, episode in enumerate(episodes):
        group = episodes[index // GROUP * GROUP :][:GROUP]
        whole = relative(sum(rewards(episode)), [sum(rewards(other)) for other in group])
        every = [value for other in group for value in returns(other)]
        seen = [place for other in group for place in zip(other.observations, returns(other), strict=True)]
        yield {
            "grpo": [whole] * len(episode.turns),
            "turn": [relative(value, every) for value in returns(episode)],
            "gigpo": [
                whole + relative(value, [other for there, other in seen if there == here])
                for here, value in zip(episode.observations, returns(episode), strict=True)
            ],
        }[estimator]


def estimates(critic, episode):
    """PPO: values, advantages and returns of an episode's tokens, one after the other."""
    held = [turn.tolist() for turn in values(critic, episode)]
    flat = [value for turn in held for value in turn]
    pairs = zip(held, rewards(episode), strict=True)
    earned = [value for turn, reward in pairs for value in (*[0.0] * (len(turn) - 1), reward)]
    found, after, following = [], 0.0, 0.0
    for value, reward in zip(reversed(flat), reversed(earned), strict=True):
        after = reward + GAMMA * following - value + GAMMA * LAMBDA * after
        following = value
        found.insert(0, after)
    return torch.tensor(flat), torch.tensor(found), torch.tensor(found) + torch.tensor(flat)


@pytest.mark.parametrize(
    ("estimator", "context", "lora"),
    [
        ("grpo", "transcript", False),
        ("turn", "transcript", True),
        ("gigpo", "window", False),
        ("gae", "transcript", False),
        ("gae", "window", True),
    ],
)
def test_weights_are_those_of_the_equations(tmp_path, tokenizer, estimator, context, lora):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None
    trainer, policy, critic, steps, rows = played(
        tmp_path, tokenizer, adapter, advantage_estimator=estimator, context=context
    )
    before = torch.cat([weight.detach().flatten() for weight in policy.parameters()])
    history, rows = [], iter(rows)
    for k, episodes in enumerate(steps):
        num_tokens = sum(len(turn.action_ids) for episode in episodes for turn in episode.turns)
        with torch.no_grad():
            old = [torch.cat([logprobs for logprobs, _ in scores(policy, episode)]) for episode in episodes]
            if critic is None:
                credit = [
                    torch.tensor([a for a, t in zip(each, episode.turns, strict=True) for _ in t.action_ids])
                    for each, episode in zip(advantages(episodes, estimator), episodes, strict=True)
                ]
            else:
                held, credit, targets = zip(*(estimates(critic, episode) for episode in episodes), strict=True)
                every = torch.cat(credit)
                credit = [(each - every.mean()) / every.std(correction=0) for each in credit]
        reference = statistics.mean(history) if history else None
        beta = 1 + math.exp(-3.0 * k / (RL_STEPS // 2))
        seen = []
        for micro_batch in range(PASSES * MICRO_BATCHES):
            loss = value_loss = 0.0
            for index in next(rows):
                logprobs, entropies = zip(*scores(policy, episodes[index]), strict=True)
                seen += torch.cat(entropies).tolist() if micro_batch < MICRO_BATCHES else []
                ratio = (torch.cat(logprobs) - old[index]).exp()
                gain = torch.minimum(ratio * credit[index], ratio.clamp(0.8, 1.2) * credit[index]).sum() / num_tokens
                smoothness = 0.0
                if reference is not None:
                    outside = [(LOW * reference - h).relu() + (h - HIGH * reference).relu() for h in entropies]
                    smoothness = SMOOTHING * sum(p.mean() for p in outside) / len(outside) / len(episodes)
                entropy = sum(h.mean() for h in entropies) / len(entropies) / len(episodes)
                loss = loss - gain - COEF * (entropy - beta * smoothness)
                if critic is not None:
                    now = torch.cat(list(values(critic, episodes[index])))
                    clipped = held[index] + (now - held[index]).clamp(-VALUE_CLIP, VALUE_CLIP)
                    errors = torch.maximum((now - targets[index]) ** 2, (clipped - targets[index]) ** 2)
                    value_loss = value_loss + errors.sum() / 2 / num_tokens
            # An optimizer step is over a part of the batch: its share of the means counts as the whole
            scale = MICRO_BATCHES / ACCUMULATED
            (scale * loss).backward()
            if critic is not None:
                (scale * value_loss).backward()
            if (micro_batch + 1) % ACCUMULATED == 0:
                for model, rate in ((policy, RATE), (critic, CRITIC_RATE)):
                    for weight in model.parameters() if model is not None else ():
                        if weight.grad is not None:
                            weight.data -= rate * weight.grad
                            weight.grad = None
        assert len(seen) == num_tokens
        history.append(statistics.mean(seen))
    trainer.entropy_history.begin_step()
    assert trainer.entropy_history.means == pytest.approx(history, rel=1e-5)
    pairs = [(policy, trainer.model)] + ([(critic, trainer._critic.model)] if critic is not None else [])
    for expected, found in pairs:
        for (name, weight), other in zip(expected.named_parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(
                other, weight, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
    after = torch.cat([weight.detach().flatten() for weight in policy.parameters()])
    assert (after - before).abs().max() > 1e-3
