"""How a turn's tokens are sampled: with the key/value cache kept across turns, or by TRL's own generation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    PretrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class Sample(NamedTuple):
    """
    The tokens sampled for one turn of one episode.

    Args:
        token_ids (`list[int]`): At least one token; ends with an end-of-turn token unless cut by the limit.
        logprobs (`list[float]` or `None`): Their log-probabilities at the sampling temperature, in nats.
    """

    token_ids: list[int]
    logprobs: list[float] | None


class TurnSampler(Protocol):
    """What a rollout needs of a generation backend."""

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin a batch of episodes, numbered in the order of their prompts (token ids)."""

    def sample(
        self, episodes: Sequence[int], new_ids: Sequence[Sequence[int]], max_new_tokens: Sequence[int]
    ) -> list[Sample]:
        """
        Sample one turn of each listed episode. `new_ids` are the tokens that follow the episode's last sampled token
        (empty in the first turn); `max_new_tokens` limits each turn. Episodes that are not listed have ended and are
        never listed again.
        """


def fits_cached_sampler(config: PretrainedConfig) -> bool:
    """
    Whether [`CachedTurnSampler`] samples from such a model exactly: every layer must see the whole context. A sliding
    window would count the holes that padding leaves in the cache; a state-space layer cannot skip them.
    """
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return set(layer_types) <= {"full_attention"}
    return getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)


def make_logits_processors(
    temperature: float, top_p: float, top_k: int, min_p: float | None, repetition_penalty: float
) -> LogitsProcessorList:
    """The sampling distribution that `GRPOConfig`'s fields of the same names ask for; neutral values add nothing."""
    processors = LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    return processors


class CachedTurnSampler:
    """
    Samples with a key/value cache that lives as long as the episode: a turn costs its new tokens only.

    Each turn's new tokens are put left-padded behind what the cache holds; the holes that padding leaves are masked,
    and positions are counted without them. Ended episodes leave the cache.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy, in evaluation mode.
        eos_token_ids (`list[int]`): Tokens that end a turn.
        pad_token_id (`int`): Fills holes; never seen by the model.
        temperature (`float`): Log-probabilities are reported at this temperature.
        processors ([`~transformers.LogitsProcessorList`]): Turn logits into the sampling distribution.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: list[int],
        pad_token_id: int,
        temperature: float,
        processors: LogitsProcessorList,
    ):
        self.model = model
        self.device = next(model.parameters()).device
        self.eos_token_ids = torch.tensor(eos_token_ids, device=self.device)
        self.pad_token_id = pad_token_id
        self.temperature = temperature
        self.processors = processors
        self._needs_history = any(isinstance(p, RepetitionPenaltyLogitsProcessor) for p in processors)

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self._cache = DynamicCache()
        self._rows = list(range(len(prompts)))  # the episode in each row of the cache
        self._visible = torch.zeros(len(prompts), 0, dtype=torch.long, device=self.device)  # (rows, cached), 0 = hole
        self._tokens = [list(prompt) for prompt in prompts]  # by episode: all tokens, for the repetition penalty
        self._pending = [list(prompt) for prompt in prompts]  # by episode: tokens that are not in the cache yet

    @torch.no_grad()
    def sample(
        self, episodes: Sequence[int], new_ids: Sequence[Sequence[int]], max_new_tokens: Sequence[int]
    ) -> list[Sample]:
        self._keep(episodes)
        for episode, ids in zip(episodes, new_ids, strict=True):
            self._tokens[episode] += ids
            self._pending[episode] += ids
        input_ids, visible = self._pad_left([self._pending[episode] for episode in episodes])
        limits = torch.tensor(max_new_tokens, device=self.device)
        running = torch.ones(len(episodes), dtype=torch.bool, device=self.device)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []  # per token: ids, log-probs, whether the row was running
        while True:
            logits = self._forward(input_ids, visible)
            next_ids, logprobs = self._draw(logits, episodes)
            steps.append((next_ids, logprobs, running))
            if self._needs_history:
                for episode, token, is_running in zip(episodes, next_ids.tolist(), running.tolist(), strict=True):
                    self._tokens[episode] += [token] * is_running
            running = running & ~torch.isin(next_ids, self.eos_token_ids) & (len(steps) < limits)
            if not running.any():
                break
            input_ids = torch.where(running, next_ids, self.pad_token_id)[:, None]
            visible = running.long()[:, None]
        ids_by_row = torch.stack([step[0] for step in steps], dim=1).tolist()
        logprobs_by_row = torch.stack([step[1] for step in steps], dim=1).tolist()
        lengths = torch.stack([step[2] for step in steps], dim=1).sum(dim=1).tolist()
        samples = []
        for row, (episode, length) in enumerate(zip(episodes, lengths, strict=True)):
            samples.append(Sample(ids_by_row[row][:length], logprobs_by_row[row][:length]))
            self._pending[episode] = ids_by_row[row][length - 1 : length]  # the last one was drawn, not read
        return samples

    def _keep(self, episodes: Sequence[int]) -> None:
        """Drop the rows of ended episodes from the cache."""
        if list(episodes) == self._rows:
            return
        position = {episode: row for row, episode in enumerate(self._rows)}
        rows = torch.tensor([position[episode] for episode in episodes], device=self.device)
        if self._visible.size(1):
            self._cache.batch_select_indices(rows)
        self._visible = self._visible[rows]
        self._rows = list(episodes)

    def _pad_left(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences))
        ids = [[self.pad_token_id] * (width - len(sequence)) + sequence for sequence in sequences]
        visible = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
        return torch.tensor(ids, device=self.device), torch.tensor(visible, device=self.device)

    def _forward(self, input_ids: Tensor, visible: Tensor) -> Tensor:
        """Logits after the last position of each row, (rows, vocabulary)."""
        num_seen = self._visible.sum(dim=1, keepdim=True)
        positions = (num_seen + visible.cumsum(dim=1) - 1).clamp(min=0)
        self._visible = torch.cat([self._visible, visible], dim=1)
        output = self.model(
            input_ids=input_ids,
            attention_mask=self._visible,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _draw(self, logits: Tensor, episodes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sampled token and its log-probability for each row, both (rows,)."""
        history = None
        if self._needs_history:  # padded with a token of the row itself, so that padding is not penalised
            width = max(len(self._tokens[episode]) for episode in episodes)
            rows = [self._tokens[episode] for episode in episodes]
            history = torch.tensor([row[:1] * (width - len(row)) + row for row in rows], device=self.device)
        scores = self.processors(history, logits)
        next_ids = torch.multinomial(scores.softmax(dim=-1), num_samples=1)  # (rows, 1)
        logprobs = (logits / self.temperature).log_softmax(dim=-1).gather(1, next_ids)  # (rows, 1)
        return next_ids.squeeze(1), logprobs.squeeze(1)


class RequestTurnSampler:
    """
    Samples each turn as a request of its own, the whole transcript as the prompt: for vLLM, whose prefix cache makes
    that cheap, for transformers' continuous batching, and for models that [`CachedTurnSampler`] does not fit.

    Args:
        generate (`Callable`): `(prompts, max_new_tokens) -> (token ids, log-probs or None)`, each a list by prompt.
    """

    def __init__(self, generate: Callable[[list[list[int]], int], tuple[list[list[int]], list[list[float]] | None]]):
        self._generate = generate

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self._transcripts = [list(prompt) for prompt in prompts]

    def sample(
        self, episodes: Sequence[int], new_ids: Sequence[Sequence[int]], max_new_tokens: Sequence[int]
    ) -> list[Sample]:
        for episode, ids in zip(episodes, new_ids, strict=True):
            self._transcripts[episode] += ids
        prompts = [list(self._transcripts[episode]) for episode in episodes]
        # One limit for the batch: a row that may take fewer tokens is cut to its own.
        token_ids, logprobs = self._generate(prompts, max(max_new_tokens))
        if len(token_ids) != len(prompts) or not all(token_ids):
            raise RuntimeError(
                f"The generation backend answered {len(prompts)} prompts with {len(token_ids)} completions, of which "
                f"{sum(not ids for ids in token_ids)} are empty; see its own log for the reason."
            )
        samples = []
        for row, (episode, limit) in enumerate(zip(episodes, max_new_tokens, strict=True)):
            sampled = token_ids[row][:limit]
            samples.append(Sample(sampled, logprobs[row][:limit] if logprobs is not None else None))
            self._transcripts[episode] += sampled
        return samples
