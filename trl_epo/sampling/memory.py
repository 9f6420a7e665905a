"""What sampling takes of a device's memory, by arithmetic; no tensor is made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


PIECE_BYTES = 2 * 2**30  # at most, of what is in memory for a moment only, while tokens are read
FEWEST_TOKENS = 64  # in a piece of one row, however long its context is


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
    """

    cached: int
    attended: int
    read: int
    pair: int

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> "Footprint":
        """
        Args:
            config ([`~transformers.PreTrainedConfig`]): Of the text model.
            dtype (`torch.dtype`): What it computes in.
        """
        size = dtype.itemsize
        hidden, heads = config.hidden_size, config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head_size = getattr(config, "head_dim", None) or hidden // heads
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        token = 2 * key_heads * head_size * size  # keys and values in one layer
        scores = heads * (2 * size + 4) if config._attn_implementation == "eager" else 0
        return cls(
            cached=config.num_hidden_layers * token,
            attended=token + (2 * heads * head_size * size if heads != key_heads else 0),
            read=(3 * inner + 4 * hidden) * size,
            pair=1 + size + scores,
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
        Which requests may be answered together: those of a like length, padded to the longest, each read at once and kept
        to its end, that take `PIECE_BYTES` at most; or a single one.

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
