"""What sampling takes of a device's memory, by arithmetic, and how much of that is free."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedConfig
from transformers.integrations import sdpa_attention


GIB = 2**30
PIECE_BYTES = 2 * GIB  # at most, of what is in memory for a moment only, while tokens are read
FEWEST_TOKENS = 64  # in a piece of one row, however long its context is
PACKS_QUERIES = hasattr(sdpa_attention, "pack_gqa")  # a decode step repeats no keys and values (transformers ≥ 5.23)
UNKNOWN_HIDDEN = 4096  # the hidden size of a model that does not tell its own
USABLE = 0.9  # of the memory that is free; the rest is lost between tensors
LOGIT_BYTES = (
    32  # of a row and a token of the vocabulary, while one is drawn: scores, probabilities, their sums, log-probs
)


@dataclass(frozen=True)
class Footprint:
    """
    Bytes that a decoder takes to read tokens and to keep them. What is in memory for a moment only is one layer's.

    Args:
        cached (`int`): A token's keys and values, of all layers.
        attended (`int`): A token that others attend to: its keys and values, taken out of the cache and, where there is
            grouped-query attention, repeated for each query head.
        read (`int`): A token that is being read: its hidden states.
        pair (`int`): A token that is being read with one that it may attend to: masks, and scores where attention keeps
            them ("eager").
        repeated (`int`): A token that others attend to as they are sampled: its keys and values for each query head, where
            attention takes them so.
    """

    cached: int
    attended: int
    read: int
    pair: int
    repeated: int = 0

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> "Footprint":
        """
        Args:
            config ([`~transformers.PreTrainedConfig`]): Of the text model.
            dtype (`torch.dtype`): What it computes in.
        """
        size = dtype.itemsize
        hidden = _largest(config, "hidden_size", UNKNOWN_HIDDEN)
        heads = _largest(config, "num_attention_heads", 1)  # none where a state takes the place of attention
        key_heads = _largest(config, "num_key_value_heads", heads)
        head_size = _largest(config, "head_dim", hidden // heads)
        inner = _largest(config, "intermediate_size", 4 * hidden)
        token = 2 * key_heads * head_size * size  # keys and values in one layer
        repeated = 2 * heads * head_size * size if heads != key_heads else 0
        eager = config._attn_implementation == "eager"
        scores = heads * (2 * size + 4) if eager else 0
        kinds = len(set(getattr(config, "layer_types", None) or [None]))  # of layers, each with a mask of its own
        return cls(
            cached=_largest(config, "num_hidden_layers", 1) * token,
            attended=token + repeated,
            read=(3 * inner + 4 * hidden) * size,
            pair=2 + kinds * (1 + size) + scores,  # what a mask is made from, then it, boolean and as numbers
            repeated=repeated if eager or not PACKS_QUERIES else 0,
        )

    def piece(self, num_rows: int, context: int) -> tuple[int, int]:
        """
        What may be read at once.

        Args:
            num_rows (`int`): Rows that have tokens to read.
            context (`int`): Tokens of the longest context, those that are to be read included.

        Returns:
            `(rows, tokens)`: Rows, and tokens of each of them, that take `PIECE_BYTES` at most; of one row with a context
            that is longer than that `FEWEST_TOKENS`.
        """
        contexts = context * self.attended
        rows = max(1, min(num_rows, PIECE_BYTES // 2 // contexts))  # half for the contexts, half for the tokens
        left = PIECE_BYTES - rows * contexts
        return rows, max(FEWEST_TOKENS, left // (rows * (self.read + context * self.pair)))

    def requests(self, prompts: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """
        Which requests may be answered together, the longest first: padded to the longest, each read at once and kept to its
        end, they take `PIECE_BYTES` at most; or a single one.

        Args:
            prompts (`Sequence[int]`): Tokens of each request's prompt.
            max_new_tokens (`int`): Tokens that may be sampled for each.

        Returns:
            `list[list[int]]`: Their places.
        """
        order = sorted(range(len(prompts)), key=lambda place: -prompts[place])
        groups = []
        while order:
            longest = prompts[order[0]]
            reading = longest * (self.attended + self.read + longest * self.pair)
            rows = max(1, PIECE_BYTES // ((longest + max_new_tokens) * self.cached + reading))
            groups.append(sorted(order[:rows]))
            order = order[rows:]
        return groups


def _largest(config: PreTrainedConfig, name: str, default: int) -> int:
    """A model's size of this name, of its layers' the largest; the default if it has none."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # transformers' word for layers that differ in it
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    return max(filter(None, found if isinstance(found, list | tuple) else [found]), default=default)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether there was no room, whoever says so: PyTorch's allocators, CUDA, cuBLAS or Triton."""
    text = str(error)
    return should_reduce_batch_size(error) or "out of memory" in text.lower() or "ALLOC_FAILED" in text


def free_memory(device: torch.device) -> float:
    """Bytes that this process could still take of a device; ∞ on a CPU and MPS, which share it with all that runs there."""
    if device.type in ("cpu", "mps"):
        return math.inf
    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + unused


def num_fitting(free: float, token: float, vocab_size: int, length: float) -> int:
    """
    How many episodes may be in the cache at once; one at least. What is free is rounded down to whole GiB, so that it makes no
    difference if some more or less is from one run to the next.

    Args:
        free (`float`): Memory, in bytes.
        token (`float`): Bytes of a token's keys and values, those included that are in memory for a moment only.
        vocab_size (`int`): Tokens of the vocabulary.
        length (`float`): Tokens of the longest context.
    """
    usable = (USABLE * free - PIECE_BYTES) // GIB * GIB
    episode = length * token + vocab_size * LOGIT_BYTES
    return max(1, int(usable / episode))
