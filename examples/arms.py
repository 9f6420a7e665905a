"""
Compare arms of the method on the embedded game: the same warm policy, the same held-out panels, several seeds.

    python examples/arms.py --output_dir runs/arms --arms grpo epo ppo-window --seeds 0 1 2

For each context (growing transcripts, or a prompt for each turn) and seed a small policy imitates the scripted expert;
each arm then trains a copy of it and plays 100 rows of each panel, before and after. Rows go to `results.jsonl` as they
come and arms that are in it are not run again, so several of these can share a folder; `--summary` prints the table.
Of EPOConfig's flags only --max_steps, --learning_rate, --per_device_train_batch_size and --use_cpu act.
"""

from trl_epo import EPOConfig, EPOTrainer  # before torch: docs/speed.md, Few cores


# isort: split
import json
import random
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from quickstart import DEMO_SETTINGS, WARM_UP_SETTINGS, game_text, make_household, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from trl_epo.envs import household
from trl_epo.imitation import Demonstration, environment_expert, expert_episodes, warm_up
from trl_epo.rollouts import TurnView


GRPO = {"entropy_coef": 0.0}
EPO = {"entropy_coef": 0.001, "entropy_smoothing_coef": 0.1, "entropy_corridor_low": 0.0, "entropy_corridor_high": 2.0}
PPO = {"advantage_estimator": "gae", "critic_learning_rate": 1e-3, "critic_warmup_steps": 5}
CORRIDOR = {**GRPO, "entropy_corridor_coef": 0.1, "entropy_corridor_low": 0.8, "entropy_corridor_high": 1.1}

ARMS = {
    "grpo": GRPO,
    "epo": EPO,
    "ppo": {**GRPO, **PPO},
    "ppo+epo": {**EPO, **PPO},
    "ppo-lambda": {**GRPO, **PPO, "gae_lambda": 0.95},
    "gigpo": {**GRPO, "advantage_estimator": "gigpo", "gamma": 0.95},
    "turn": {**GRPO, "advantage_estimator": "turn", "gamma": 0.95},
    "grpo+resample": {**GRPO, "filter_zero_variance_groups": "resample"},
    "epo-base": {**EPO, "entropy_smoothing": "none"},
    "epo-constant": {**EPO, "entropy_smoothing_schedule": "constant"},
    "epo-decay": {**EPO, "entropy_smoothing": "none", "entropy_turn_decay": 1.0},
    "epo-indicator": {**EPO, "entropy_smoothing": "indicator"},
    "epo-turn-history": {**EPO, "entropy_reference": "turn_history"},
    "epo-strong": {**EPO, "entropy_coef": 0.01, "entropy_smoothing_coef": 5.0, "entropy_corridor_high": 1.0},
    "ea": {**GRPO, "entropy_advantage_coef": 0.4},
    "adaptive": {**GRPO, "use_adaptive_entropy": True},
    "corridor": {**CORRIDOR, "entropy_reference": "linear", "entropy_reference_end": 0.2},
    "corridor-history": {**CORRIDOR, "entropy_corridor_high": 1.0, "entropy_corridor_low": 0.0},
}


@dataclass
class ArmsArguments:
    arms: list[str] = field(default_factory=lambda: ["grpo", "epo"], metadata={"help": "Names; see ARMS."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the warm-up and the training."})
    contexts: list[str] = field(default_factory=lambda: ["transcript"], metadata={"help": "'transcript', 'window'."})
    warm_up_episodes: int = field(default=7000, metadata={"help": "Expert episodes to imitate, each once."})
    panel_size: int = field(default=100, metadata={"help": "Rows of each held-out panel."})
    summary: bool = field(default=False, metadata={"help": "Only print what results.jsonl holds."})


SETTINGS = {
    **DEMO_SETTINGS,
    "output_dir": "runs/arms",
    "max_steps": 60,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 100,
    "disable_tqdm": True,
}


def window_prompt(turn: TurnView) -> str:
    """A short prompt, for a policy that learns to read it from scratch: the last turns and what is seen now."""
    past = " ".join(f"{past.observation} > {past.action}" for past in turn.history)
    return f"{past} {turn.observation}".strip()


def warm_policy(script: ArmsArguments, settings: dict, context: str, seed: int) -> Path:
    """A folder with a policy that imitates the expert; made once."""
    folder = Path(settings["output_dir"]) / "warm" / f"{context}-{seed}"
    if (folder / "model.safetensors").exists():
        return folder
    args = EPOConfig(**{**settings, "output_dir": str(folder), "seed": seed, "context": context})
    set_seed(seed)
    rows = household.tasks("train", script.warm_up_episodes, rooms=2, turns=args.max_turns, seed=100 + seed)
    env = Demonstration(make_household(), environment_expert, noise=0.3, draw=random.Random(seed))
    tokenizer = make_tokenizer(game_text(env, rows))
    trainer = EPOTrainer(
        make_model(tokenizer),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        environment_factory=make_household,
        prompt_builder=window_prompt if args.context == "window" else None,
    )
    warm_up(
        trainer,
        expert_episodes(trainer, rows, noise=0.3, learn_mistakes=True),
        learn_observations=True,
        per_device_train_batch_size=4 if args.context == "transcript" else 16,
        learning_rate=6e-3,
        **WARM_UP_SETTINGS,
    )
    tokenizer.save_pretrained(folder)
    trainer.model.save_pretrained(folder)
    return folder


def run_arm(script: ArmsArguments, settings: dict, arm: str, context: str, seed: int) -> dict:
    """Train a copy of the warm policy; the arm's row of `results.jsonl`."""
    output_dir = Path(settings["output_dir"]) / f"{arm}-{context}-{seed}"
    args = EPOConfig(**{**settings, "output_dir": str(output_dir), "seed": seed, "context": context, **ARMS[arm]})
    folder = warm_policy(script, settings, context, seed)
    knobs = {"rooms": 2, "turns": args.max_turns}
    trainer = EPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args=args,
        train_dataset=household.tasks("train", args.max_steps * 8, **knobs, seed=200 + seed),
        eval_dataset={split: household.tasks(split, script.panel_size, **knobs, seed=3) for split in ("iid", "ood")},
        processing_class=AutoTokenizer.from_pretrained(folder),
        environment_factory=make_household,
        prompt_builder=window_prompt if context == "window" else None,
    )

    def play_panels() -> dict[str, float]:
        metrics = trainer.evaluate()
        return {split: metrics[f"eval_{split}_episode/success_rate"] for split in ("iid", "ood")}

    before = play_panels()
    trainer.train()
    after = play_panels()
    trainer.save_state()
    history = trainer.state.log_history
    entropies = [entry["epo/entropy"] for entry in history if "epo/entropy" in entry and "loss" in entry]
    tokens = [entry["episode/turns"] for entry in history if "loss" in entry]
    return {
        "arm": arm,
        "context": context,
        "seed": seed,
        "steps": args.max_steps,
        "learning_rate": args.learning_rate,
        **{f"{split}_before": before[split] for split in before},
        **{f"{split}_after": after[split] for split in after},
        "entropy_first": statistics.fmean(entropies[:3]),
        "entropy_last": statistics.fmean(entropies[-3:]),
        "turns_first": statistics.fmean(tokens[:3]),
        "turns_last": statistics.fmean(tokens[-3:]),
    }


def print_summary(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    groups = defaultdict(list)
    for row in rows:
        groups[row["context"], row["learning_rate"], row["arm"]].append(row)
    print("| context | learning rate | arm | seeds | iid before | iid after | ood before | ood after | entropy |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (context, rate, arm), found in sorted(groups.items()):
        cells = [context, f"{rate:g}", arm, str(len(found))]
        for name in ("iid_before", "iid_after", "ood_before", "ood_after"):
            values = [100 * row[name] for row in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}")
        cells.append(
            " → ".join(f"{statistics.fmean(r[n] for r in found):.2f}" for n in ("entropy_first", "entropy_last"))
        )
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = TrlParser((ArmsArguments, EPOConfig))
    parser.set_defaults(**SETTINGS)
    script, args = parser.parse_args_and_config()
    file = Path(args.output_dir) / "results.jsonl"
    if not script.summary:
        if unknown := set(script.arms) - ARMS.keys():
            raise ValueError(f"There are no arms {sorted(unknown)}; choose from {', '.join(ARMS)}.")
        settings = {**SETTINGS, "output_dir": args.output_dir, "max_steps": args.max_steps}
        settings |= {"learning_rate": args.learning_rate, "use_cpu": args.use_cpu}
        settings |= {"per_device_train_batch_size": args.per_device_train_batch_size}
        file.parent.mkdir(parents=True, exist_ok=True)
        for seed in script.seeds:
            for context in script.contexts:
                for arm in script.arms:
                    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
                    key = {"arm": arm, "context": context, "seed": seed, "learning_rate": args.learning_rate}
                    if not any(key.items() <= row.items() for row in done):
                        row = run_arm(script, settings, arm, context, seed)
                        with open(file, "a") as results:
                            results.write(json.dumps(row) + "\n")
    print_summary(file)


if __name__ == "__main__":
    main()
