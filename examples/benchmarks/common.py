"""What the benchmarks share: models, clocks, the forced action, results as a table, JSON and a plot."""

import ctypes
import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import trl
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)


sys.path.append(str(Path(__file__).parents[1]))
from quickstart import make_model, make_tokenizer
from shared import load_smollm2


# A template with tools, so that TRL's loop and ours read the same transcript.
CHAT_TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
# The published sizes of Qwen2.5
QWEN = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
ON_GPU = torch.cuda.is_available()
MODELS = ("smollm2", "tiny", *QWEN)
ACTION = '<tool_call>{"name":"go","arguments":{}}</tool_call>'


@dataclass
class BenchmarkArguments:
    model: str = field(
        default="smollm2",
        metadata={"help": "SmolLM2-135M, a tiny new one, or new weights of Qwen2.5's shapes.", "choices": MODELS},
    )
    threads: int = field(default=2, metadata={"help": "Threads of PyTorch."})
    seed: int = field(default=0, metadata={"help": "Of the random weights and tokens."})
    json: str | None = field(default=None, metadata={"help": "File for the rows as JSON, rewritten after each."})
    plot: str | None = field(default=None, metadata={"help": "File for a plot (PNG); needs the `plot` extra."})


def qwen_config(size: str) -> Qwen2Config:
    big = size == "7B"
    others = {"num_key_value_heads": 4 if big else 2, "vocab_size": 152_064 if big else 151_936}
    return Qwen2Config(tie_word_embeddings=not big, **others, **QWEN[size])


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in bfloat16, on the GPU if there is one, with a template that knows tools."""
    if name == "smollm2":
        model, tokenizer = load_smollm2()
    else:
        tokenizer = make_tokenizer([ACTION])
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
        if name == "tiny":
            model = make_model(tokenizer, context_length=8192).to(torch.bfloat16)
        else:
            with torch.device("cuda" if ON_GPU else "cpu"):
                model = AutoModelForCausalLM.from_config(qwen_config(name), dtype=torch.bfloat16)
            for special in ("eos_token_id", "pad_token_id"):
                setattr(model.generation_config, special, getattr(tokenizer, special))
    tokenizer.chat_template = CHAT_TEMPLATE
    return (model.to("cuda") if ON_GPU else model), tokenizer


class Forced(LogitsProcessor):
    """Makes all rows say the same tokens over and over, so that every loop samples equally many."""

    def __init__(self, token_ids: list[int]):
        self.token_ids = token_ids
        self.num_calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.token_ids[self.num_calls % len(self.token_ids)]
        self.num_calls += 1
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0.0
        return forced


@dataclass
class Cost:
    """What a piece of work took. CPU-seconds are summed over all threads."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_mb: float | None = None  # of the GPU's memory or, without one, of the process; with what was there before


@contextmanager
def measured() -> Iterator[Cost]:
    cost = Cost()
    has_peak = _reset_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    yield cost
    if ON_GPU:
        torch.cuda.synchronize()
    cost.cpu_s, cost.wall_s = time.process_time() - cpu, time.perf_counter() - wall
    if has_peak:
        cost.peak_mb = _peak_mb()


def _reset_peak() -> bool:
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier work has left
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak to what is resident now
    except OSError:
        return False
    return True


def _peak_mb() -> float:
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def save_json(path: str | None, rows: list[dict], settings: dict) -> None:
    """Write what there is so far, with what it was measured on."""
    if path is None:
        return
    machine = {
        "cpus": len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else psutil.cpu_count(),
        "gpu": torch.cuda.get_device_name() if ON_GPU else None,
        "torch": torch.__version__,
        "trl": trl.__version__,
    }
    Path(path).write_text(json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=2) + "\n")


def show(rows: list[dict], title: str) -> None:
    """Print rows as a table, each as a column."""
    table = Table(title=title, show_header=False)
    for name in rows[0]:
        values = [row[name] for row in rows]
        table.add_row(name, *("–" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)
