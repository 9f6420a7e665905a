"""An engine for tests in which requests come and go: each step samples a token of every one, from a real model."""

from dataclasses import dataclass, field
from itertools import count

import torch
from samplers import EOS

from trl_epo.sampling import Answer


@dataclass
class _Running:
    prompt_ids: list[int]
    room: int
    numbers: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class StepEngine:
    """
    Reads each request's whole context for each of its tokens, by itself: what it samples depends on the request alone.

    Args:
        model ([`~transformers.PreTrainedModel`]): Samples the tokens.
        gives_up (`Callable[[int], str | None]`): For each request, counted from 0: why it is given up at its first token.

    Attributes:
        running (`dict`): The requests under way, by id.
        requests (`list[tuple]`): Prompt, limit and seed of all there were.
        num_running (`list[int]`): How many there were in each step.
    """

    def __init__(self, model, gives_up=lambda number: None):
        self._model, self._gives_up = model, gives_up
        self._ids = count()
        self.running: dict[str, _Running] = {}
        self.requests, self.num_running = [], []

    @property
    def is_busy(self):
        return bool(self.running)

    def add(self, prompt_ids, max_new_tokens, seed):
        number = next(self._ids)
        self.requests.append((list(prompt_ids), max_new_tokens, seed))
        self.running[str(number)] = _Running(list(prompt_ids), max_new_tokens, torch.Generator().manual_seed(seed))
        return str(number)

    def abort(self, request_ids):
        for request_id in request_ids:
            self.running.pop(request_id, None)

    @torch.no_grad()
    def step(self):
        self.num_running.append(len(self.running))
        answers = []
        for request_id, request in list(self.running.items()):
            given_up = self._gives_up(int(request_id))
            scores = self._model(torch.tensor([request.prompt_ids + request.token_ids])).logits[0, -1].log_softmax(-1)
            token = int(torch.multinomial(scores.exp(), 1, generator=request.numbers))
            request.token_ids.append(token)
            request.logprobs.append(float(scores[token]))
            if given_up or token == EOS or len(request.token_ids) == request.room:
                del self.running[request_id]
                answers.append(Answer(request_id, request.token_ids, request.logprobs, given_up))
        return answers
