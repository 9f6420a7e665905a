"""The step from one sampled token to the next, in buffers that stay where they are on the device."""

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel

from .kv_cache import EpisodeCache, bucket


NUMBERS = 64  # random numbers of a row that go to the device at once
# Experimental, never measured: on CUDA, record the model's forward for each bucket and replay it (`torch.cuda.graph`).
CAPTURES_GRAPHS = False


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its key/value cache; transformers has renamed it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter's forward hides it
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def number_dtype(device: torch.device) -> torch.dtype:
    """In what random numbers are compared with sums of probabilities."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """
    A token for each row, (rows, 1), −1 if there is none as the probabilities are not finite: where the cumulated
    probabilities, (rows, vocabulary), pass the row's random number of [0, 1), (rows, 1). On a CPU this takes a third of the time
    of `torch.multinomial`, which draws a random number for every token.
    """
    dtype = number_dtype(probabilities.device)
    cumulated = probabilities.cumsum(dim=-1, dtype=dtype)
    numbers = numbers.to(dtype).clamp(
        max=1 - torch.finfo(dtype).eps / 2
    )  # rounded up to 1 it would draw what has no chance
    # `right`: never a token of probability 0
    drawn = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True).clamp(max=probabilities.size(1) - 1)
    return drawn.where(cumulated[:, -1:].isfinite(), -1)


class Drawing:
    """
    Tokens from logits.

    Args:
        processors ([`~transformers.LogitsProcessorList`]): Turn logits into the sampling distribution.
        temperature (`float`): Log-probabilities are told at this temperature.
        tells_entropies (`bool`): Whether entropies are told too, at this temperature; zeros otherwise.
    """

    def __init__(self, processors: LogitsProcessorList, temperature: float, tells_entropies: bool):
        self.processors = processors
        self.temperature = temperature
        self.tells_entropies = tells_entropies

    def __call__(self, logits: Tensor, history: Tensor | None, numbers: Tensor) -> Tensor:
        """
        Token (−1: none), log-prob and entropy of each row, (3, rows): one tensor, for one way to the host.

        Args:
            logits (`Tensor`): (rows, vocabulary).
            history (`Tensor` or `None`): What [`EpisodeCache.history`] says, for processors that read it.
            numbers (`Tensor`): Of [0, 1), (rows, 1).
        """
        logits = logits.float()
        drawn = draw(self.processors(history, logits).softmax(dim=-1), numbers)
        all_logprobs = (logits / self.temperature).log_softmax(dim=-1)  # (rows, vocabulary)
        logprobs = all_logprobs.gather(1, drawn.clamp(min=0)).flatten()
        entropies = torch.zeros_like(logprobs)
        if self.tells_entropies:  # a token of probability 0 adds 0·∞, which is 0
            entropies = (-all_logprobs.exp() * all_logprobs).nansum(dim=-1)
        return torch.stack([part.to(number_dtype(logits.device)) for part in (drawn.flatten(), logprobs, entropies)])


class Masks:
    """
    What tokens attend to, for models whose layers attend to the whole context or to a sliding window.

    Args:
        model ([`~transformers.PreTrainedModel`]): Says of which kinds its layers are.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        self._window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            self._window = None
        one_kind = "full_attention" if self._window is None else "sliding_attention"
        self.kinds = sorted(set(getattr(config, "layer_types", None) or [one_kind]))
        self.eager_dtype = (
            model.dtype if config._attn_implementation == "eager" else None
        )  # which takes no boolean mask

    def visible(self, columns: Tensor, extent: int) -> dict[str, Tensor]:
        """For each kind of layer whether a token, of these columns (rows, tokens), sees a column, (rows, 1, tokens, extent)."""
        own = columns[:, None, :, None]
        others = torch.arange(extent, device=columns.device)
        # Padding attends to the column of padding, so that no token attends to nothing.
        visible = (others <= own) & ((others > 0) | (own == 0))
        return {
            kind: visible if kind == "full_attention" else visible & (others > own - self._window)
            for kind in self.kinds
        }

    def new(self, columns: Tensor, extent: int, dtype: torch.dtype | None) -> Tensor | dict[str, Tensor]:
        """
        The masks as the model takes them: to be added to scores of this type, so that no layer converts them; boolean if the
        type is not known yet.
        """
        masks = self.visible(columns, extent)
        if dtype := self.eager_dtype or dtype:
            masks = {
                kind: torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -math.inf)
                for kind, visible in masks.items()
            }
        return as_argument(masks)


def as_argument(masks: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """A model whose layers are all of one kind takes one mask."""
    return masks if len(masks) > 1 else next(iter(masks.values()))


class DecodeStep:
    """
    Samples the next token of running episodes again and again. Between two calls nothing goes to the device: where the
    tokens are, what they attend to, and the random numbers are there. [`begin`] brings them there; it is needed when other
    episodes run, and when the random numbers are used up.

    Buffers have as many rows and columns as the cache. Of these a forward takes a bucket (`kv_cache.bucket`), so that the same
    shapes at the same addresses come again and again: what a CUDA graph needs.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy.
        cache ([`EpisodeCache`]): Has read all of the episodes' tokens but the last.
        masks ([`Masks`]): What its layers attend to.
        drawing ([`Drawing`]): What draws tokens.
    """

    def __init__(self, model: PreTrainedModel, cache: EpisodeCache, masks: Masks, drawing: Drawing):
        self.model, self.cache, self._masks, self._drawing = model, cache, masks, drawing
        self.device = cache.device
        # As a tensor, for a slice of the hidden states is no plain matrix: on a CPU the head would then take its rows singly,
        # which costs ten times as much, in bfloat16 some hundred times.
        self.last_position = torch.tensor([-1], device=self.device)
        self.cache_argument = cache_argument(model)
        self._capacity = 0  # rows of the buffers
        self._mask_buffers: dict[str, Tensor] = {}
        self._graphs: dict[tuple[int, int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._addresses: tuple[int, ...] = ()  # of what these read and write, and its sizes
        self._numbers_left = 0
        self._num_rows = 0  # of the cache, when it was made ready

    @property
    def is_ready(self) -> bool:
        """Whether it can be called for the same episodes once more."""
        return self._numbers_left > 0 and self._num_rows == self.cache.num_rows

    def begin(
        self,
        places: Sequence[int],
        tokens: Sequence[int],
        num_cached: Sequence[int],
        numbers: Sequence[Sequence[float]],
    ) -> list[int]:
        """
        Bring what is running to the device, in one copy.

        Args:
            places (`Sequence[int]`): Each episode's row of the cache.
            tokens (`Sequence[int]`): Its last token.
            num_cached (`Sequence[int]`): How many tokens the cache has of it; all but that one.
            numbers (`Sequence[Sequence[float]]`): Its next `NUMBERS` random numbers.

        Returns:
            `list[int]`: Its row in what the calls return.
        """
        cache = self.cache
        # The whole cache is a view, some of its rows are a copy: rows that do nothing come along if they are the fewer.
        self._whole = 2 * len(places) >= cache.num_rows
        size = cache.padded_rows if self._whole else bucket(len(places), self.device, cache.row_capacity)
        idle = [0.0] * (4 + NUMBERS)
        table = [[row if self._whole else 0, *idle[1:]] for row in range(size)]
        rows = list(places) if self._whole else list(range(len(places)))
        for row, place, token, cached, coming in zip(rows, places, tokens, num_cached, numbers, strict=True):
            table[row] = [place, token, cached, 1, *coming]
        new = torch.tensor(table, dtype=number_dtype(self.device), device=self.device)
        if self._capacity != cache.row_capacity:
            self._capacity = cache.row_capacity
            self.places = torch.zeros(self._capacity, dtype=torch.long, device=self.device)
            self.ids, self.columns, self._steps = (self.places.new_zeros(self._capacity, 1) for _ in range(3))
            self._numbers = new.new_zeros(self._capacity, NUMBERS)
            self._number = self.places.new_zeros(1)
        self.places[:size] = new[:, 0]
        self.ids[:size], self.columns[:size], self._steps[:size] = (new[:, [i]] for i in (1, 2, 3))
        self._numbers[:size] = new[:, 4:]
        self._number.zero_()
        self._numbers_left, self._num_rows, self._size = NUMBERS, cache.num_rows, size
        self._extent = max(num_cached) + 1
        return rows

    def __call__(self) -> Tensor:
        """Token, log-prob and entropy of each row, (3, rows), on the device."""
        size = self._size
        self._extent += 1  # a token more, and the column of padding
        self._bucket = self.cache.room(self._extent)
        self._fit_masks()
        self.columns[:size] += self._steps[:size]
        logits = self._logits()
        history = None
        if self.cache.keeps_tokens:
            history = self.cache.history(self.places[:size], self.columns[:size], self._bucket - 1, logits.size(1))
        results = self._drawing(logits, history, self._numbers[:size].index_select(1, self._number))
        self.ids[:size, 0] = results[0].clamp(min=0)
        self._number += 1
        self._numbers_left -= 1
        return results

    def clear(self) -> None:
        """Let go of what is large, whoever still holds the step. It cannot be called any more."""
        self._mask_buffers.clear()
        self._graphs.clear()

    def _fit_masks(self) -> None:
        shape = (self._capacity, 1, 1, self.cache.column_capacity)
        if not self._mask_buffers or next(iter(self._mask_buffers.values())).shape != shape:
            dtype = self._masks.eager_dtype or self.cache.cached_dtype
            self._mask_buffers = {
                kind: torch.zeros(shape, dtype=dtype, device=self.device) for kind in self._masks.kinds
            }

    def _forward(self) -> Tensor:
        """Logits of the tokens in the buffers, (rows, vocabulary). Called again it writes and returns the same."""
        size, extent = self._size, self._bucket
        ids, columns = self.ids[:size], self.columns[:size]
        masks = {kind: mask[:size, ..., :extent] for kind, mask in self._mask_buffers.items()}
        for kind, visible in self._masks.visible(columns, extent).items():
            masks[kind].zero_().masked_fill_(~visible, -math.inf)
        self.cache.aim(None if self._whole else self.places[:size], ids, columns, extent)
        output = self.model(
            input_ids=ids,
            attention_mask=as_argument(masks),
            position_ids=(columns - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=self.last_position,
            **{self.cache_argument: self.cache},
        )
        return output.logits[:, -1]

    def _logits(self) -> Tensor:
        if not CAPTURES_GRAPHS or self.device.type != "cuda":
            return self._forward()
        buffers = (self.ids, self.columns, self.places, *self._mask_buffers.values())
        addresses = (*(buffer.data_ptr() for buffer in buffers), *self.cache.addresses)
        addresses += (self._capacity, self.cache.column_capacity)  # and with them the strides
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
        key = (self._size, self._bucket, self._whole)
        if key not in self._graphs:
            aside = torch.cuda.Stream(self.device)  # once without recording, for what libraries set up
            aside.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(aside):
                self._forward()
            torch.cuda.current_stream(self.device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward()
            self._graphs[key] = (graph, logits)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits
