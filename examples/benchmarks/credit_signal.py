"""
How much of PPO's policy gradient is signal, with few episodes a step and one reward at the end.

    python examples/benchmarks/credit_signal.py --output_dir runs/signal --seeds 0 1 2 --json signal.json

The warm policies of `arms.py` play the household game in batches of eight episodes of one row and are not trained; critics
learn from one batch after the other. *progress* says how far a step of unit length (root mean square over batches) goes
uphill: the scalar product of the mean gradient and the unit vector of the true one, which is the gradient of returns
less their batch's mean, without any critic, on the other half of the batches. *always* whitens each batch's advantages
to mean 0 and deviation 1; *varied* sets those of batches whose returns do not vary to 0, as the trainer does.
"""

import math
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from common import save_json
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser


sys.path.append(str(Path(__file__).parents[1]))
from arms import GRPO, SETTINGS, ArmsArguments, warm_policy
from quickstart import make_household

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.batches import action_mask
from trl_epo.credit import gae, make_critic, rewards_at_turn_ends
from trl_epo.envs import household


@dataclass
class SignalArguments:
    output_dir: str = field(default="runs/signal", metadata={"help": "Folder for warm policies."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of warm-up and episodes."})
    batches: int = field(default=160, metadata={"help": "Batches of eight episodes."})
    skipped: int = field(default=20, metadata={"help": "First batches, from which only the critics learn."})
    critic_learning_rates: list[float] = field(default_factory=lambda: [1e-5, 1e-3], metadata={"help": "Of Adam."})
    gae_lambdas: list[float] = field(default_factory=lambda: [1.0, 0.95], metadata={"help": "λ, a token."})
    warm_up_episodes: int = field(default=7000, metadata={"help": "Expert episodes to imitate, each once."})
    json: str | None = field(default=None, metadata={"help": "File for the rows as JSON, rewritten after each seed."})


def play(script: SignalArguments, seed: int) -> tuple[AutoModelForCausalLM, list[dict[str, Tensor]]]:
    """The warm policy of a seed, and batches of its episodes with their rewards, (B, T)."""
    settings = {**SETTINGS, "output_dir": script.output_dir, "use_cpu": True, "max_steps": script.batches, **GRPO}
    settings |= {"per_device_train_batch_size": 8, "learning_rate": 0.0, "environment_patience": math.inf}
    folder = warm_policy(ArmsArguments(warm_up_episodes=script.warm_up_episodes), settings, "transcript", seed)
    batches = []

    class Recorder(EPOTrainer):
        def extend_batch(self, batch):
            batch = super().extend_batch(batch)
            earned = [[turn.reward for turn in episode.turns] for episode in self._batch.episodes]
            batches.append({**batch, "rewards": rewards_at_turn_ends(earned, batch["turn_ids"])})
            return batch

    trainer = Recorder(
        AutoModelForCausalLM.from_pretrained(folder),
        args=EPOConfig(**settings, seed=seed),
        train_dataset=household.tasks("train", script.batches, rooms=2, turns=12, seed=200 + seed),
        processing_class=AutoTokenizer.from_pretrained(folder),
        environment_factory=make_household,
    )
    trainer.train()
    return AutoModelForCausalLM.from_pretrained(folder), batches


class Gradients:
    """Those of one way to make advantages: their sums over even and odd batches, and their squared norms."""

    def __init__(self):
        self.sums, self.counts, self.squares = [0.0, 0.0], [0, 0], []

    def add(self, gradient: Tensor) -> None:
        half = len(self.squares) % 2
        self.sums[half] = self.sums[half] + gradient
        self.counts[half] += 1
        self.squares.append(gradient.square().sum().item())

    def product(self, other: "Gradients") -> float:
        """The scalar product of the means, of this on one half and of the other on the other half."""
        even, odd = (total / count for total, count in zip(self.sums, self.counts, strict=True))
        other_even, other_odd = (total / count for total, count in zip(other.sums, other.counts, strict=True))
        return ((even @ other_odd + odd @ other_even) / 2).item()

    def progress(self, true: "Gradients") -> float:
        length, of_true = fmean(self.squares) ** 0.5, true.product(true)
        # On few batches the estimate of a squared norm may be below 0
        return self.product(true) / of_true**0.5 / length if length and of_true > 0 else math.nan


def measure(script: SignalArguments, seed: int) -> list[dict]:
    policy, batches = play(script, seed)
    weights = list(policy.parameters())
    critics = {rate: make_critic(policy, None) for rate in script.critic_learning_rates}
    optimizers = {rate: torch.optim.Adam(c.parameters(), lr=rate, betas=(0.9, 0.95)) for rate, c in critics.items()}
    found, explained, deviations, flat_batches = defaultdict(Gradients), defaultdict(list), defaultdict(list), 0
    for number, batch in enumerate(batches):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        actions, places = action_mask(batch).bool(), slice(batch["prompt_ids"].size(1) - 1, -1)
        returns = batch["rewards"].sum(dim=1, keepdim=True).expand(actions.shape)
        flat = bool((returns == returns[0, 0]).all())
        counts = number >= script.skipped
        flat_batches += flat * counts
        advantages = {"centred returns": returns, "grpo": batch["advantages"][:, None].expand(actions.shape)}
        for rate, critic in critics.items():
            values = critic(**inputs).logits[:, places, 0]
            for lambda_ in script.gae_lambdas:
                advantages[rate, lambda_] = gae(batch["rewards"], values.detach(), actions, 1.0, lambda_)[0]
            errors = (returns - values)[actions]
            optimizers[rate].zero_grad()
            (0.5 * errors.square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
            optimizers[rate].step()
            if counts and not flat:
                explained[rate].append(1 - (errors.var() / returns[actions].var()).item())
            if counts and flat:
                deviations[rate].append(errors.std().item())
        if not counts:
            continue
        logits = policy(**inputs).logits[:, places]
        logprobs = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]

        def gradient(each: Tensor, logprobs=logprobs, actions=actions) -> Tensor:
            parts = torch.autograd.grad((logprobs * each)[actions].mean(), weights, retain_graph=True)
            return torch.cat([part.flatten() for part in parts])

        of_ones = gradient(torch.ones_like(logprobs))
        for name, each in advantages.items():
            plain, mean, deviation = gradient(each), each[actions].mean(), each[actions].std(correction=0) + 1e-8
            if name == "grpo":
                found[name].add(plain)
            elif name == "centred returns":
                found[name].add(plain - mean * of_ones)
            else:
                whitened = (plain - mean * of_ones) / deviation
                found[(*name, "always")].add(whitened)
                found[(*name, "varied")].add(0.0 * whitened if flat else whitened)
    true, share = found["centred returns"], flat_batches / (len(batches) - script.skipped)
    rows = [
        {"seed": seed, "flat": share, "advantages": name, "progress": found[name].progress(true)}
        for name in ("centred returns", "grpo")
    ]
    for rate, lambda_ in product(script.critic_learning_rates, script.gae_lambdas):
        row = {"seed": seed, "flat": share, "advantages": "gae", "critic_learning_rate": rate, "gae_lambda": lambda_}
        row |= {f"progress_{how}": found[rate, lambda_, how].progress(true) for how in ("always", "varied")}
        half = len(explained[rate]) // 2
        row["explained_variance"] = fmean(explained[rate][half:] or [math.nan])
        row["deviation_where_flat"] = fmean(deviations[rate] or [math.nan])
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    print("| seed | advantages | critic's rate | λ | explained | deviation where flat | always | varied |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [str(row["seed"]), row["advantages"]]
        if row["advantages"] == "gae":
            cells += [f"{row['critic_learning_rate']:g}", f"{row['gae_lambda']:g}"]
            names = ("explained_variance", "deviation_where_flat", "progress_always", "progress_varied")
            cells += [f"{row[name]:.3f}" for name in names]
        else:
            cells += ["", "", "", "", f"{row['progress']:.3f}", f"{row['progress']:.3f}"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    [script] = TrlParser((SignalArguments,)).parse_args_and_config()
    rows = []
    for seed in script.seeds:
        rows += measure(script, seed)
        save_json(script.json, rows, asdict(script))
    print_table(rows)


if __name__ == "__main__":
    main()
