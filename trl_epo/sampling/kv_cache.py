"""The key/value cache of a batch of episodes: one row each, preallocated, without holes; rows come and go."""

import math
import weakref

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


GROWTH = 1.25  # buffers that are full grow by this factor
COLUMN_STEP = 64  # and to a multiple of this many columns
# Where a row or column more costs its arithmetic, a forward has as many as there are. Elsewhere it costs next to nothing, and
# shapes that come again are worth more.
EXACT_DEVICES = frozenset({"cpu"})


def bucket(size: int, device: torch.device, most: float = math.inf) -> int:
    """How many rows or columns to have for so many: on accelerators the next power of two, but no more than `most`."""
    if device.type in EXACT_DEVICES or not size:
        return size
    return max(size, int(min(2 ** (size - 1).bit_length(), most)))


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
        rows = slice(cache.columns.size(0)) if cache.rows is None else cache.rows
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
    never attended to. Before each forward [`room`] makes room and [`aim`] says where its tokens
    go.

    Args:
        num_layers (`int`): Attention layers of the model.
        device (`torch.device`): Where the model is.
        longest_context (`float`, *optional*): Tokens of the longest context: no buffer grows beyond it unless one is longer.
        keeps_tokens (`bool`, *optional*): Whether to keep the tokens too, for [`history`].
    """

    def __init__(
        self, num_layers: int, device: torch.device, longest_context: float = math.inf, keeps_tokens: bool = False
    ):
        super().__init__(layers=[_Layer(self) for _ in range(num_layers)])
        self.device = device
        self.longest_context = longest_context
        self.keeps_tokens = keeps_tokens
        self.tokens = torch.zeros(0, 0, dtype=torch.long, device=device)  # (rows, columns)
        self.num_rows = 0
        self.row_capacity = 0
        self.column_capacity = 0
        self.extent = 0  # columns that the next forward attends to

    def resize(self, num_rows: int, most: float = math.inf) -> None:
        """
        Set the number of rows; there will be no more than `most`. Memory follows when more are needed, or at most half of
        them are left.
        """
        self.num_rows = num_rows
        if not num_rows > self.row_capacity // 2 or num_rows > self.row_capacity:
            self.row_capacity = bucket(num_rows, self.device, most)
            self._refit()

    @property
    def padded_rows(self) -> int:
        """Rows of a forward over the whole cache: the bucket of its number of rows."""
        return bucket(self.num_rows, self.device, self.row_capacity)

    def room(self, extent: int) -> int:
        """Have room for so many columns, that of padding included; how many a forward that decodes attends to, their bucket."""
        if extent > self.column_capacity:
            grown = (
                int(self.column_capacity * GROWTH)
                if self.device.type in EXACT_DEVICES
                else bucket(extent, self.device)
            )
            wanted = int(max(extent, min(grown, self.longest_context + 1)))
            self.column_capacity = -(-wanted // COLUMN_STEP) * COLUMN_STEP
            self._refit()
        if self.device.type in EXACT_DEVICES:
            return extent
        return bucket(max(extent, COLUMN_STEP), self.device, self.column_capacity)

    def aim(self, rows: Tensor | None, token_ids: Tensor, columns: Tensor, extent: int) -> None:
        """
        Say where the tokens of the next forward go.

        Args:
            rows (`Tensor` or `None`): The cache row of each row of the forward; `None`: the first ones, in order.
            token_ids (`Tensor`): The tokens, (rows of the forward, tokens).
            columns (`Tensor`): The column of each token, (rows of the forward, tokens); 0 for padding.
            extent (`int`): Columns to attend to, for which there is [`room`].
        """
        self.columns = columns
        self.extent = extent
        self.rows = rows
        self.row_index = (torch.arange(columns.size(0), device=self.device) if rows is None else rows)[:, None]
        if self.keeps_tokens:
            self.tokens[self.row_index, columns] = token_ids

    def history(self, rows: Tensor, lengths: Tensor, width: int, filler: int) -> Tensor:
        """
        What has been read of episodes, with the last tokens below each other, (rows, width).

        Args:
            rows (`Tensor`): Their rows of the cache, (rows,).
            lengths (`Tensor`): How many tokens of each, (rows, 1).
            width (`int`): At least the largest of these.
            filler (`int`): A token that comes in no episode, before those of shorter ones.
        """
        columns = lengths + torch.arange(1 - width, 1, device=self.device)
        return self.tokens[rows[:, None], columns.clamp(min=0)].masked_fill(columns < 1, filler)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy an episode's first tokens from one row to another."""
        if self.keeps_tokens:
            self.tokens[target, : num_tokens + 1] = self.tokens[source, : num_tokens + 1]
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

    @property
    def cached_dtype(self) -> torch.dtype | None:
        """
        What attention computes in; `None` as long as nothing has been read. (Not named `dtype`, by which accelerate, looking
        for tensors of 16 bits in a model's outputs, would take the cache for one.)
        """
        return next((layer.keys.dtype for layer in self.layers if layer.is_initialized), None)

    @property
    def addresses(self) -> list[int]:
        """Where the buffers are."""
        buffers = [buffer for layer in self.layers if layer.is_initialized for buffer in (layer.keys, layer.values)]
        return [buffer.data_ptr() for buffer in (*buffers, self.tokens)]

    def clear(self) -> None:
        """Let go of all memory, whoever still holds the cache. It cannot be used any more."""
        for layer in self.layers:
            layer.keys = layer.values = None
        self.layers.clear()

    def _refit(self) -> None:
        if self.keeps_tokens:
            rows, columns = min(self.row_capacity, self.tokens.size(0)), self.tokens.size(1)
            tokens = self.tokens.new_zeros(self.row_capacity, self.column_capacity)
            tokens[:rows, :columns] = self.tokens[:rows]
            self.tokens = tokens
        for layer in self.layers:
            layer.refit()
