"""The key/value cache kept across turns: a turn costs its new tokens only."""

import inspect
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedConfig, PreTrainedModel

from ..batches import length_groups
from .decoding import NUMBERS, DecodeStep, Drawing, Masks, number_dtype
from .kv_cache import EpisodeCache
from .memory import Footprint, free_memory, is_out_of_memory, num_fitting
from .processors import READS_HISTORY
from .turns import EpisodeNumbers, Sample


logger = logging.getLogger(__name__)

# A forward of its own costs about as much as this many padded tokens in a shared one: on a CPU, measured; on accelerators, which
# wait for launches while tokens are few, an estimate.
CPU_FORWARD_OVERHEAD = 128
ACCELERATOR_FORWARD_OVERHEAD = 2048
MASKED_ATTENTION = ("sdpa", "eager")  # implementations that take any mask and keys and values of any length


def forward_overhead(device: torch.device) -> int:
    """What one more forward costs, in tokens."""
    return CPU_FORWARD_OVERHEAD if device.type == "cpu" else ACCELERATOR_FORWARD_OVERHEAD


@contextmanager
def masked_attention(model: PreTrainedModel) -> Iterator[None]:
    """
    While this context lasts, a model whose attention is of another implementation (flash-attention, flex, kernels) computes it
    with `"sdpa"`, or with `"eager"` if it has no such. Its weights are not touched.
    """
    configs = {id(config): config for module in model.modules() if (config := _text_config(module)) is not None}
    before = [
        (config, config._attn_implementation)
        for config in configs.values()
        if config._attn_implementation not in (*MASKED_ATTENTION, None)
    ]
    try:
        for config, _ in before:
            config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _text_config(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else None


def unfit_for_cached_sampler(model: PreTrainedModel, longest_context: float) -> str | None:
    """
    Why [`CachedTurnSampler`] cannot sample from such a model, or `None` if it can. All of its layers must be attention
    over the whole context or over a sliding window, and take the mask they are given. Where a token is rotated (RoPE)
    must not depend on how long its context is, or another one beside it, up to `longest_context` tokens.
    """
    config = model.config.get_text_config()
    if getattr(config, "alibi", False) or config.model_type == "gpt_neo":
        return "it makes positions or masks of its own"
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layers <= {"full_attention", "sliding_attention"}:
        return f"its layers are of the types {', '.join(sorted(layers))}"
    if config._attn_implementation not in MASKED_ATTENTION and not model._can_set_attn_implementation():
        return f"its attention is {config._attn_implementation!r} and cannot be changed (with 'sdpa' it would do)"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no `position_ids`"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # of all layers, or by their type
        rope_type = parameters.get("rope_type", "default") if isinstance(parameters, dict) else "default"
        if "dynamic" in rope_type:
            constant_up_to = config.max_position_embeddings
        elif rope_type == "longrope":
            constant_up_to = parameters["original_max_position_embeddings"]
        else:
            continue
        if longest_context > constant_up_to:
            return (
                f"its rotary embedding is {rope_type!r}, which rotates the tokens that are cached otherwise as soon as "
                f"a context has more than {constant_up_to} tokens"
            )
    return None


@dataclass(eq=False)
class _Row:
    """An episode in the cache."""

    episode: int | None  # None: has ended
    tokens: list[int]  # all so far
    numbers: random.Random  # of its own, so that what is sampled beside it changes nothing
    coming: list[float] = field(default_factory=list)  # the first of them draws its next token
    num_sampled: int = 0  # tokens, in all turns
    place: int = -1  # its row of the cache
    num_cached: int = 0  # how many tokens are in the cache
    room: int = 0  # tokens that this turn may still take
    token_ids: list[int] = field(default_factory=list)  # this turn's
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    def next_numbers(self, count: int) -> list[float]:
        """Those that draw its next tokens."""
        self.coming += (self.numbers.random() for _ in range(count - len(self.coming)))
        return self.coming[:count]

    @property
    def num_unread(self) -> int:
        """How many tokens are not in the cache yet."""
        return len(self.tokens) - self.num_cached

    def has_cached(self, prefix: list[int]) -> bool:
        """Whether its first tokens in the cache are these."""
        return self.num_cached >= len(prefix) and self.tokens[: len(prefix)] == prefix


class CachedTurnSampler:
    """
    Samples with a key/value cache that lives as long as the episode: a turn costs its new tokens only.

    Turns are asked for and finished at any time. Those asked for meanwhile are read together, rows of like length in
    one forward; then all running turns are sampled token by token. Episodes that begin with the same prompt share its
    prefill. Rows of ended episodes are taken by new ones, or leave the cache. Each episode has random numbers of its own,
    which come of torch's generator for CPUs: what it samples depends on the others only as far as rounding does.

    When memory runs out the cache is given up. The episodes keep their tokens; half as many of those that were in the cache are
    read again, and the others as these end.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy, in evaluation mode.
        eos_token_ids (`list[int]`): Tokens that end a turn.
        pad_token_id (`int`): Fills the forward; never attended to.
        temperature (`float`): Log-probabilities are reported at this temperature.
        processors ([`~transformers.LogitsProcessorList`]): Turn logits into the sampling distribution.
        tells_entropies (`bool`): Whether samples tell entropies too, at this temperature.
        longest_context (`float`): Longest context of an episode, in tokens, as far as is known.
        bytes_to_come (`float`): What training will take of the device besides what it has, in bytes.

    Attributes:
        max_episodes (`float`): Episodes in the cache at most.
    """

    waits_for_turns = True

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: list[int],
        pad_token_id: int,
        temperature: float,
        processors: LogitsProcessorList,
        tells_entropies: bool = False,
        longest_context: float = math.inf,
        bytes_to_come: float = 0.0,
    ):
        self.model = model
        self.device = next(model.parameters()).device
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.processors = processors
        self._tells_entropies = tells_entropies
        self._longest_context = longest_context
        self._bytes_to_come = bytes_to_come
        self.max_episodes = math.inf
        self._reads_history = any(isinstance(processor, READS_HISTORY) for processor in processors)
        config = model.config.get_text_config()
        self._masks = Masks(model)
        self._drawing = Drawing(processors, temperature, tells_entropies)
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
        self._footprint = Footprint.of(config, dtype)
        self._num_layers, self._vocab_size = config.num_hidden_layers, config.vocab_size
        self._forward_overhead = forward_overhead(self.device)
        self._renew_cache()
        self._numbers = EpisodeNumbers()
        self._episodes: dict[int, _Row] = {}
        self._rows: list[_Row] = []  # those in the cache, by place, with those of ended episodes
        self._asked: list[_Row] = []  # have new tokens that are still to be read
        self._running: list[_Row] = []
        self._finished: list[_Row] = []  # their turns, that is
        self._idle_steps = 0  # tokens that the other rows have missed while these ran

    def _renew_cache(self) -> None:
        self._cache = EpisodeCache(self._num_layers, self.device, self._longest_context, self._reads_history)
        self._step = DecodeStep(self.model, self._cache, self._masks, self._drawing)
        self._stepping: list[tuple[_Row, int, int]] = []  # what the step is ready for: each row, its place, its tokens
        self._step_rows: list[int] = []  # the rows of the step's results that are theirs

    def num_fitting(self) -> float:
        """
        How many episodes of the longest context fit into what is free of the device; ∞ on a CPU. To be asked before there are
        any: samples a token to see what that takes.
        """
        if free_memory(self.device) == math.inf:
            return math.inf
        self.add(-1, [self.pad_token_id], 1)
        while self.is_busy:
            self.advance()
        free = free_memory(self.device) - self._bytes_to_come
        layer = self._cache.bytes_per_token / self._num_layers  # twice in memory, one at a time, when the cache grows
        token = self._cache.bytes_per_token + max(layer, self._footprint.repeated)
        self.drop(-1)
        return num_fitting(free, token, self._vocab_size, self._longest_context)

    def hold_at_most(self, num_episodes: float) -> None:
        """Have no more episodes in the cache at once."""
        self.max_episodes = num_episodes

    def add(self, episode: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        row = self._episodes.get(episode)
        if row is None:
            row = _Row(episode, [], self._numbers.begin(episode))
            self._episodes[episode] = row
        row.tokens += new_ids
        row.room = max_new_tokens
        row.token_ids, row.logprobs, row.entropies = [], [], []
        self._asked.append(row)

    def rewind(self, episode: int, num_tokens: int) -> None:
        row = self._episodes[episode]
        del row.tokens[num_tokens:]
        row.num_cached = min(row.num_cached, num_tokens)

    def drop(self, episode: int) -> None:
        if row := self._episodes.pop(episode, None):
            row.episode = None

    def close(self) -> None:
        """Let go of the cache, also while something still holds the sampler, such as the traceback of an error."""
        self._step.clear()
        self._cache.clear()

    @property
    def is_busy(self) -> bool:
        return bool(self._running or self._ready())

    @property
    def wants_turns(self) -> bool:
        # Reading a few turns' new tokens costs about as much as sampling one token for every row: those turns wait
        # until what they miss meanwhile is worth as much.
        return not self._running or self._idle_steps >= len(self._rows)

    def advance(self) -> list[tuple[int, Sample]]:
        refused = False
        try:
            self._advance()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(self._in_cache()) <= 1:
                raise MemoryError(
                    "Out of memory with a single episode in the key/value cache, of "
                    f"{max(len(row.tokens) for row in self._rows)} tokens: lower `max_completion_length`, or `max_turns`."
                ) from error
            refused = True
        if refused:  # here nothing holds the error any more, whose frames hold what filled the memory
            self._give_up_cache()
        finished, self._finished = self._finished, []
        return [
            (row.episode, Sample(row.token_ids, row.logprobs, row.entropies if self._tells_entropies else None))
            for row in finished
        ]

    @torch.no_grad()
    def _advance(self) -> None:
        self._begin_turns()
        while self._running and not self._finished:
            self._decode()
            self._idle_steps += len(self._rows) - len(self._running)
            if self.wants_turns:
                break

    def _in_cache(self) -> list[_Row]:
        return [row for row in self._rows if row.episode is not None]

    def _give_up_cache(self) -> None:
        """Memory has run out: keep what the episodes have sampled, and begin again with half as many in the cache."""
        rows = self._in_cache()
        self.max_episodes = len(rows) // 2
        self.close()
        self._renew_cache()
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()
        for row in rows:
            row.place, row.num_cached = -1, 0
        self._asked = self._running + self._asked
        self._rows, self._running = [], []
        logger.warning(
            "Out of memory with %d episodes in the key/value cache, the longest of %d tokens. No episode is lost: from now on "
            "at most %d are in it, and those that were are read again. `max_concurrent_episodes=%d` avoids this.",
            len(rows),
            max(len(row.tokens) for row in rows),
            self.max_episodes,
            self.max_episodes,
        )

    def _ready(self) -> list[_Row]:
        """Turns to be read: of episodes that have a place in the cache, or for which there is one."""
        num_free = self.max_episodes - len(self._in_cache())
        ready = []
        for row in self._asked:
            if row.place < 0:
                num_free -= 1
            if row.place >= 0 or num_free >= 0:
                ready.append(row)
        return ready

    def _begin_turns(self) -> None:
        """Read the new tokens of turns that were asked for and sample the first of each."""
        ready = self._ready()
        self._place([row for row in ready if row.place < 0])
        self._close_ranks()
        if ready:
            self._idle_steps = 0
        for rows in self._groups(ready, [row.num_unread for row in ready]):
            logits = self._read(rows)
            self._asked = [row for row in self._asked if row not in rows]
            self._running += rows
            self._sample(rows, logits)

    def _groups(self, rows: list[_Row], lengths: list[int]) -> list[list[_Row]]:
        groups = length_groups(lengths, self._forward_overhead)
        return [[rows[index] for index in group] for group in groups]

    def _place(self, new: list[_Row]) -> None:
        """Give new episodes their places in the cache, and read their prompts, each once, but for the last token."""
        readers: dict[tuple[int, ...], _Row] = {}
        copies: list[tuple[_Row, _Row]] = []
        for row in new:
            prefix = row.tokens[:-1]
            source = readers.get(tuple(prefix)) or next((old for old in self._rows if old.has_cached(prefix)), None)
            free = [old for old in self._rows if old.episode is None]
            if source in free:  # takes over what is there
                row.place, row.num_cached = source.place, len(prefix)
            else:
                row.place = free[0].place if free else len(self._rows)
                if source is None:
                    readers[tuple(prefix)] = row
                else:
                    copies.append((source, row))
            self._rows[row.place : row.place + 1] = [row]
        self._cache.resize(len(self._rows), self.max_episodes)
        reading = [row for row in readers.values() if len(row.tokens) > 1]
        for rows in self._groups(reading, [len(row.tokens) - 1 for row in reading]):
            self._read(rows, leave=1)
        for source, row in copies:
            row.num_cached = len(row.tokens) - 1
            self._cache.copy(source.place, row.place, row.num_cached)

    def _close_ranks(self) -> None:
        """Let the rows of ended episodes go; the last rows move into their places."""
        num_left = sum(row.episode is not None for row in self._rows)
        free = [row.place for row in self._rows[:num_left] if row.episode is None]
        moving = [row for row in self._rows[num_left:] if row.episode is not None]
        for place, row in zip(free, moving, strict=True):
            self._cache.copy(row.place, place, row.num_cached)
            row.place = place
            self._rows[place] = row
        if num_left < len(self._rows):
            del self._rows[num_left:]
            self._cache.resize(num_left, self.max_episodes)

    def _read(self, rows: list[_Row], leave: int = 0) -> Tensor:
        """
        Put the rows' tokens that are not cached yet, less the last `leave`, into the cache, in pieces of bounded memory;
        logits (rows, vocabulary).
        """
        context = max(len(row.tokens) for row in rows) - leave
        num_rows, num_tokens = self._footprint.piece(len(rows), context)
        width = max(row.num_unread for row in rows) - leave
        if width == 1:  # as in decoding, next to nothing is taken out of the cache
            return self._forward(rows, leave)
        logits = []
        for first in range(0, len(rows), num_rows):
            together = rows[first : first + num_rows]
            width = max(row.num_unread for row in together) - leave
            for later in range((width - 1) // num_tokens * num_tokens, 0, -num_tokens):
                longest = [row for row in together if row.num_unread > leave + later]
                self._forward(longest, leave + later)
            logits.append(self._forward(together, leave))
        return torch.cat(logits)

    def _forward(self, rows: list[_Row], leave: int) -> Tensor:
        """The same in one forward."""
        new = {row.place: row.tokens[row.num_cached : len(row.tokens) - leave] for row in rows}
        width = max(map(len, new.values()))
        # The whole cache is a view, some of its rows are a copy: rows that do nothing come along if they are the fewer.
        whole = len(rows) == len(self._rows) or (width == 1 and 2 * len(rows) >= len(self._rows))
        taking_part = self._rows if whole else rows
        token_ids, columns = [], []
        for row in taking_part:
            ids = new.get(row.place, [])
            padding = width - len(ids)
            token_ids.append([self.pad_token_id] * padding + ids)
            columns.append([0] * padding + list(range(row.num_cached + 1, row.num_cached + 1 + len(ids))))
        for row in rows:
            row.num_cached += len(new[row.place])
        extent = max(row.num_cached for row in rows) + 1
        self._cache.room(extent)
        token_ids = torch.tensor(token_ids, device=self.device)
        columns = torch.tensor(columns, device=self.device)
        places = torch.tensor([row.place for row in rows], device=self.device)
        self._cache.aim(None if whole else places, token_ids, columns, extent)
        output = self.model(
            input_ids=token_ids,
            attention_mask=self._masks.new(columns, extent, self._cache.cached_dtype),
            position_ids=(columns - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=self._step.last_position,
            **{self._step.cache_argument: self._cache},
        )
        logits = output.logits[:, -1]
        return logits[places] if whole else logits

    def _sample(self, rows: list[_Row], logits: Tensor) -> None:
        """Draw a token for each of these running rows, which have just been read, from its logits, (rows, vocabulary)."""
        history = None
        if self._reads_history:
            lengths = torch.tensor([[row.num_cached] for row in rows], device=self.device)
            places = torch.tensor([row.place for row in rows], device=self.device)
            history = self._cache.history(places, lengths, max(row.num_cached for row in rows), logits.size(1))
        numbers = [row.next_numbers(1) for row in rows]
        numbers = torch.tensor(numbers, dtype=number_dtype(self.device), device=self.device)
        self._note(rows, *self._drawing(logits, history, numbers).tolist())

    def _decode(self) -> None:
        """Read the last token of each running row, and sample the next."""
        rows = self._running
        stepping = [(row, row.place, row.num_sampled) for row in rows]
        if stepping != self._stepping or not self._step.is_ready:
            numbers = [row.next_numbers(NUMBERS) for row in rows]
            places, cached = [row.place for row in rows], [row.num_cached for row in rows]
            self._step_rows = self._step.begin(places, [row.tokens[-1] for row in rows], cached, numbers)
        results = self._step().tolist()  # the only wait for the device
        for row in rows:
            row.num_cached += 1
        self._stepping = [(row, place, num_sampled + 1) for row, place, num_sampled in stepping]
        self._note(rows, *([values[row] for row in self._step_rows] for values in results))

    def _note(self, rows: list[_Row], drawn: list[float], logprobs: list[float], entropies: list[float]) -> None:
        """Give these running rows what was sampled for them."""
        # Memory may run out up to here, where nothing is noted yet.
        for row, token, logprob, entropy in zip(rows, map(int, drawn), logprobs, entropies, strict=True):
            if token < 0:
                raise RuntimeError(
                    "There is no token to sample: the model's logits are not finite, or the generation settings suppress "
                    "all tokens. Look for weights that are not finite in the model that training began with, for fp16, "
                    "whose range bf16 and float32 do not leave, and at `generation_kwargs`; if training diverged, resume "
                    "from an earlier checkpoint with a lower `learning_rate`."
                )
            row.tokens.append(token)
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.entropies.append(entropy)
            del row.coming[0]
            row.num_sampled += 1
            row.room -= 1
            if token in self.eos_token_ids or not row.room:
                self._finished.append(row)
        self._running = [row for row in self._running if row not in self._finished]
