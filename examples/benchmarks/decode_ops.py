"""
What a sampled token asks of a device: operations, copies from the host, and waits for the device.

    python examples/benchmarks/decode_ops.py --json decode_ops.json

A GPU decodes as fast as the host can launch operations, and each copy or wait stops that. All three are counted on a CPU, where
the same calls are made: as a copy counts a tensor made of Python's numbers, as a wait whatever brings a tensor's numbers to
Python or depends on them. A new model with `--layers` layers, small, for the numbers depend on its architecture only, in
float32 and under bf16 autocast; `--episodes` at once, each with `--tokens` tokens. What reading their prompts and the
first tokens take is subtracted.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field

import torch
from common import BenchmarkArguments, save_json, show
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import TrlParser

from trl_epo.sampling import CachedTurnSampler, make_logits_processors


COPIES = {"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor"}
# Operations that end in the host's memory, whatever called them.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"}


@dataclass
class DecodeArguments(BenchmarkArguments):
    layers: int = field(default=36, metadata={"help": "Layers of the model."})
    episodes: int = field(default=8, metadata={"help": "Episodes at once."})
    tokens: int = field(default=128, metadata={"help": "Tokens that are counted."})


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts["operations"] += not (func.is_view or name in ("lift_fresh", "detach"))  # launches nothing
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for indices in args[1:2]
            for index in (indices if isinstance(indices, (list, tuple)) else ())
        )
        self.counts["waits"] += name in WAITS or by_mask
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Those that a CPU answers without an operation of its own."""

    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.counts["waits"] += name in ("tolist", "cpu", "numpy")
        self.counts["copies"] += name in COPIES
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.counts["copies"] += sum(isinstance(part, list) for part in index)
        return func(*args, **(kwargs or {}))


class DeviceCounts:
    """While this context lasts, counts `operations`, `copies` to the device and `waits` for it."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Counter:
        self._modes = [_Calls(self.counts), _Operations(self.counts)]
        for mode in self._modes:
            mode.__enter__()
        return self.counts

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def counts_of(model, episodes: int, tokens: int, autocast: bool, settings: dict) -> Counter:
    """Of a turn of so many tokens."""
    set_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        processors = make_logits_processors(**settings)
        sampler = CachedTurnSampler(model, [], 0, temperature=1.0, processors=processors)
        for episode in range(episodes):
            sampler.add(episode, [5, 6, 7 + episode], tokens)
        with DeviceCounts() as counts:
            while sampler.is_busy:
                sampler.advance()
    return counts


def main() -> None:
    (script,) = TrlParser((DecodeArguments,)).parse_args_and_config()
    torch.set_num_threads(script.threads)
    set_seed(script.seed)
    config = Qwen2Config(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=script.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config).eval()
    rows = []
    for name, autocast, settings in (
        ("float32", False, {}),
        ("autocast", True, {}),
        ("top-k, top-p", False, {"top_k": 20, "top_p": 0.9}),
        ("repetition", False, {"repetition_penalty": 1.1}),
        ("n-grams", False, {"no_repeat_ngram_size": 4}),
        ("bad words", False, {"bad_words_ids": [[5, 6], [9]]}),
    ):
        few, many = (counts_of(model, script.episodes, 3 + more, autocast, settings) for more in (0, script.tokens))
        per_token = {kind: (many[kind] - few[kind]) / script.tokens for kind in ("operations", "copies", "waits")}
        rows.append({"sampling": name, **per_token})
        save_json(script.json, rows, asdict(script))
    show(rows, f"a token of {script.episodes} episodes, {script.layers} layers")


if __name__ == "__main__":
    main()
