"""The key/value cache of a batch of episodes: one row each, preallocated, without holes; rows come and go."""

import math
import weakref

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


GROWTH = 1.25  # buffers that are full grow by this factor
COLUMN_STEP = 64  # and to a multiple of this many columns


class _Layer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, columns, head size)."""

    def __init__(self, cache: "EpisodeCache"):
        super().__init__()
        # The cache holds its layers: held by them in turn, only the garbage collector would free its memory, some time.
        self.cache = weakref.proxy(cache)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        device = key_states.device.type
        if torch.is_autocast_enabled(device):  # attention computes in this type, whatever rotation makes of the keys
            dtype = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        self.keys, self.values = (self._fitted(None, states) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        self.keys[cache.row_index, :, cache.columns] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[cache.row_index, :, cache.columns] = value_states.transpose(1, 2).to(self.values.dtype)
        rows = slice(cache.num_rows) if cache.rows is None else cache.rows
        return self.keys[rows, :, : cache.extent], self.values[rows, :, : cache.extent]

    def refit(self) -> None:
        """Move what is cached into buffers of the cache's present capacity."""
        if self.is_initialized:
            self.keys = self._fitted(self.keys, self.keys)
            self.values = self._fitted(self.values, self.values)

    def _fitted(self, old: Tensor | None, like: Tensor) -> Tensor:
        rows, columns = self.cache.row_capacity, self.cache.column_capacity
        new = like.new_zeros(rows, like.size(1), columns, like.size(3))
        if old is not None:
            rows, columns = min(rows, old.size(0)), min(columns, old.size(2))
            new[:rows, :, :columns] = old[:rows, :, :columns]
        return new

    def get_seq_length(self) -> int:
        return self.cache.extent

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.extent, 0

    def get_max_length(self) -> int:
        return -1


class EpisodeCache(Cache):
    """
    Keys and values of a batch of episodes, for any decoder of `transformers` that takes an explicit attention mask.

    The token at position p of the episode in row r is in row r, column p + 1. Column 0 takes what padding writes and is
    never attended to. Before each forward [`aim`] says where its tokens go.

    Args:
        num_layers (`int`): Attention layers of the model.
        device (`torch.device`): Where the model is.
        longest_context (`float`, *optional*): Tokens of the longest context: no buffer grows beyond it unless one is longer.
    """

    def __init__(self, num_layers: int, device: torch.device, longest_context: float = math.inf):
        super().__init__(layers=[_Layer(self) for _ in range(num_layers)])
        self.device = device
        self.longest_context = longest_context
        self.num_rows = 0
        self.row_capacity = 0
        self.column_capacity = 0
        self.extent = 0  # columns that the next forward attends to

    def resize(self, num_rows: int) -> None:
        """Set the number of rows. Memory follows when more are needed, or at most half of them are left."""
        self.num_rows = num_rows
        if not num_rows > self.row_capacity // 2 or num_rows > self.row_capacity:
            self.row_capacity = num_rows
            self._refit()

    def aim(self, rows: list[int] | None, columns: Tensor, extent: int) -> None:
        """
        Say where the tokens of the next forward go.

        Args:
            rows (`list[int]` or `None`): The cache row of each row of the forward; `None`: all, in order.
            columns (`Tensor`): The column of each token, (rows of the forward, tokens); 0 for padding.
            extent (`int`): Columns to attend to: the largest of `columns`, and one more.
        """
        if extent > self.column_capacity:
            wanted = max(extent, min(int(self.column_capacity * GROWTH), self.longest_context + 1))
            self.column_capacity = -(-wanted // COLUMN_STEP) * COLUMN_STEP
            self._refit()
        self.columns = columns
        self.extent = extent
        self.rows = None if rows is None else torch.tensor(rows, device=self.device)
        self.row_index = (torch.arange(self.num_rows, device=self.device) if rows is None else self.rows)[:, None]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy an episode's first tokens from one row to another."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[target, :, : num_tokens + 1] = layer.keys[source, :, : num_tokens + 1]
                layer.values[target, :, : num_tokens + 1] = layer.values[source, :, : num_tokens + 1]

    @property
    def bytes_per_token(self) -> float:
        """Of its keys and values in all layers, once there are any."""
        layers = [layer for layer in self.layers if layer.is_initialized]
        num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return num_bytes / (self.row_capacity * self.column_capacity)

    def clear(self) -> None:
        """Let go of all memory, whoever still holds the cache. It cannot be used any more."""
        for layer in self.layers:
            layer.keys = layer.values = None
        self.layers.clear()

    def _refit(self) -> None:
        for layer in self.layers:
            layer.refit()
