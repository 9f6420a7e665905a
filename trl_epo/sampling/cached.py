"""The key/value cache kept across turns: a turn costs its new tokens only."""

import inspect
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from ..batches import length_groups
from .kv_cache import EpisodeCache
from .memory import Footprint
from .processors import READS_HISTORY
from .turns import Sample


FORWARD_OVERHEAD = 128  # a forward of its own costs about as much as this many padded tokens in a shared one


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
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation!r} (with 'sdpa' it would do)"
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
    number: float = field(init=False)  # draws its next token
    place: int = -1  # its row of the cache
    num_cached: int = 0  # how many tokens are in the cache
    room: int = 0  # tokens that this turn may still take
    token_ids: list[int] = field(default_factory=list)  # this turn's
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.number = self.numbers.random()

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

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy, in evaluation mode.
        eos_token_ids (`list[int]`): Tokens that end a turn.
        pad_token_id (`int`): Fills the forward; never attended to.
        temperature (`float`): Log-probabilities are reported at this temperature.
        processors ([`~transformers.LogitsProcessorList`]): Turn logits into the sampling distribution.
        tells_entropies (`bool`): Whether samples tell entropies too, at this temperature.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: list[int],
        pad_token_id: int,
        temperature: float,
        processors: LogitsProcessorList,
        tells_entropies: bool = False,
    ):
        self.model = model
        self.device = next(model.parameters()).device
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.temperature = temperature
        self.processors = processors
        self._tells_entropies = tells_entropies
        self._reads_history = any(isinstance(processor, READS_HISTORY) for processor in processors)
        config = model.config.get_text_config()
        self._sliding_window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            self._sliding_window = None
        one_kind = "full_attention" if self._sliding_window is None else "sliding_attention"
        self._layer_kinds = set(getattr(config, "layer_types", None) or [one_kind])
        self._mask_dtype = model.dtype if config._attn_implementation == "eager" else torch.bool
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
        self._footprint = Footprint.of(config, dtype)
        self._cache = EpisodeCache(config.num_hidden_layers, self.device)
        self._seed = int(torch.randint(2**62, ()))
        self._num_begun: Counter[int] = Counter()
        self._rows: list[_Row] = []  # by place
        self._asked: list[_Row] = []  # have new tokens that are still to be read
        self._running: list[_Row] = []
        self._idle_steps = 0  # tokens that the other rows have missed while these ran

    def add(self, episode: int, new_ids: Sequence[int], max_new_tokens: int) -> None:
        row = next((row for row in self._rows if row.episode == episode), None)
        if row is None:
            self._num_begun[episode] += 1  # a number comes again when its episode is played again
            row = _Row(episode, [], random.Random(f"{self._seed} {episode} {self._num_begun[episode]}"))
        row.tokens += new_ids
        row.room = max_new_tokens
        row.token_ids, row.logprobs, row.entropies = [], [], []
        self._asked.append(row)

    def rewind(self, episode: int, num_tokens: int) -> None:
        row = next(row for row in self._rows if row.episode == episode)
        del row.tokens[num_tokens:]
        row.num_cached = min(row.num_cached, num_tokens)

    def drop(self, episode: int) -> None:
        for row in self._rows:
            if row.episode == episode:
                row.episode = None

    def close(self) -> None:
        """Let go of the cache, also while something still holds the sampler, such as the traceback of an error."""
        self._cache.clear()

    @property
    def is_busy(self) -> bool:
        return bool(self._asked or self._running)

    @property
    def wants_turns(self) -> bool:
        # Reading a few turns' new tokens costs about as much as sampling one token for every row: those turns wait
        # until what they miss meanwhile is worth as much.
        return not self._running or self._idle_steps >= len(self._rows)

    @torch.no_grad()
    def advance(self) -> list[tuple[int, Sample]]:
        finished = self._begin_turns()
        while self._running and not finished:
            finished = self._sample(self._running, self._read(self._running))
            self._idle_steps += len(self._rows) - len(self._running)
            if self.wants_turns:
                break
        return [
            (row.episode, Sample(row.token_ids, row.logprobs, row.entropies if self._tells_entropies else None))
            for row in finished
        ]

    def _begin_turns(self) -> list[_Row]:
        """Read the new tokens of the turns that were asked for and sample the first of each; the turns it ends."""
        asked, self._asked = self._asked, []
        self._place([row for row in asked if row.place < 0])
        self._close_ranks()
        finished = []
        if asked:
            self._idle_steps = 0
        for rows in _groups(asked, [row.num_unread for row in asked]):
            logits = self._read(rows)
            self._running += rows
            finished += self._sample(rows, logits)
        return finished

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
        self._cache.resize(len(self._rows))
        reading = [row for row in readers.values() if len(row.tokens) > 1]
        for rows in _groups(reading, [len(row.tokens) - 1 for row in reading]):
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
            self._cache.resize(num_left)

    def _read(self, rows: list[_Row], leave: int = 0) -> Tensor:
        """
        Put the rows' tokens that are not cached yet, less the last `leave`, into the cache, in pieces of bounded memory;
        logits (rows, vocabulary).
        """
        context = max(len(row.tokens) for row in rows) - leave
        num_rows, num_tokens = self._footprint.piece(len(rows), context)
        width = max(row.num_unread for row in rows) - leave
        if width == 1:  # nothing is repeated, and next to nothing taken out of the cache
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
        columns = torch.tensor(columns, device=self.device)
        self._cache.aim(None if whole else [row.place for row in rows], columns, extent)
        output = self.model(
            input_ids=torch.tensor(token_ids, device=self.device),
            attention_mask=self._masks(columns, extent),
            position_ids=(columns - 1).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]
        return logits[[row.place for row in rows]] if whole else logits

    def _masks(self, columns: Tensor, extent: int) -> Tensor | dict[str, Tensor]:
        """What each token attends to, (rows, 1, tokens, extent), for each type of layer."""
        own = columns[:, None, :, None]
        others = torch.arange(extent, device=self.device)
        # Padding attends to the column of padding, so that no token attends to nothing.
        visible = (others <= own) & ((others > 0) | (own == 0))
        masks = {}
        for kind in self._layer_kinds:
            mask = visible if kind == "full_attention" else visible & (others > own - self._sliding_window)
            if self._mask_dtype != torch.bool:
                hidden = torch.finfo(self._mask_dtype).min
                mask = torch.zeros_like(mask, dtype=self._mask_dtype).masked_fill(~mask, hidden)
            masks[kind] = mask
        return masks if len(masks) > 1 else mask

    def _sample(self, rows: list[_Row], logits: Tensor) -> list[_Row]:
        """Draw a token for each of the running rows from its logits, (rows, vocabulary); the turns that it ends."""
        logits = logits.float()
        if self._reads_history:
            histories = [torch.tensor([row.tokens], device=self.device) for row in rows]
            scores = [self.processors(h, logits[i : i + 1]) for i, h in enumerate(histories)]
            scores = torch.cat(scores)
        else:
            scores = self.processors(None, logits)
        drawn = _draw(scores.softmax(dim=-1), [row.number for row in rows])  # (rows, 1)
        all_logprobs = (logits / self.temperature).log_softmax(dim=-1)  # (rows, vocabulary)
        if self._tells_entropies:
            entropies = -(all_logprobs.exp() * all_logprobs).nansum(
                dim=-1
            )  # a token of probability 0 adds 0·∞, which is 0
            for row, entropy in zip(rows, entropies.tolist(), strict=True):
                row.entropies.append(entropy)
        logprobs = all_logprobs.gather(1, drawn.clamp(min=0))  # (rows, 1)
        finished = []
        for row, token, logprob in zip(rows, drawn.flatten().tolist(), logprobs.flatten().tolist(), strict=True):
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
            row.number = row.numbers.random()
            row.room -= 1
            if token in self.eos_token_ids or not row.room:
                finished.append(row)
        self._running = [row for row in self._running if row not in finished]
        return finished


def _draw(probabilities: Tensor, numbers: list[float]) -> Tensor:
    """
    A token for each row, (rows, 1), −1 if there is none as the probabilities are not finite: where the cumulated
    probabilities, (rows, vocabulary), pass the row's random number of [0, 1). On a CPU this takes a third of the time of
    `torch.multinomial`, which draws a random number for every token.
    """
    dtype = torch.float32 if probabilities.device.type == "mps" else torch.float64  # MPS has no float64
    cumulated = probabilities.cumsum(dim=-1, dtype=dtype)
    numbers = torch.tensor(numbers, dtype=dtype, device=probabilities.device)[:, None]
    numbers = numbers.clamp(max=1 - torch.finfo(dtype).eps / 2)  # rounded up to 1 it would draw what has probability 0
    # `right`: never a token of probability 0
    drawn = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True).clamp(max=probabilities.size(1) - 1)
    return drawn.where(cumulated[:, -1:].isfinite(), -1)


def _groups(rows: list[_Row], lengths: list[int]) -> list[list[_Row]]:
    groups = length_groups(lengths, FORWARD_OVERHEAD)
    return [[rows[index] for index in group] for group in groups]
