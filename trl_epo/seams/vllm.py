"""
The vLLM engine that TRL keeps in this process (colocate mode), driven step by step: every private name of TRL's
`VLLMGeneration` and of vLLM that this package relies on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from trl.generation import vllm_generation

from ..sampling import Answer, EngineTurnSampler
from .replacing import replaced


GIVEN_UP = ("abort", "error")  # vLLM's reasons for the end of a request whose turn is not over


class ColocatedEngine:
    """
    TRL's engine as [`~trl_epo.sampling.EngineTurnSampler`] wants it. TRL makes the requests, with its sampling parameters; they
    are begun here, not awaited.

    Args:
        generation (`VLLMGeneration`): TRL's, in colocate mode without tensor parallelism.
    """

    def __init__(self, generation: Any):
        self._generation = generation
        self._request_ids = generation.llm.request_counter
        self._engine = generation.llm.llm_engine

    @property
    def is_busy(self) -> bool:
        return self._engine.has_unfinished_requests()

    def add(self, prompt_ids: list[int], max_new_tokens: int, seed: int) -> str:
        request_id = str(next(self._request_ids))

        def begin(prompts, sampling_params, use_tqdm):
            [prompt] = prompts
            sampling_params.output_kind = type(sampling_params.output_kind).FINAL_ONLY
            self._engine.add_request(request_id, {"type": "token", **prompt}, sampling_params)
            return []

        generation = self._generation
        with (
            replaced(generation, "llm", SimpleNamespace(generate=begin)),
            replaced(generation, "enable_sleep_mode", False),  # it is awake for a whole rollout
            replaced(generation, "max_completion_length", max_new_tokens),
            replaced(generation, "generation_kwargs", {**generation.generation_kwargs, "seed": seed}),
        ):
            generation.generate([prompt_ids], images=None, num_generations=1)
        return request_id

    def step(self) -> list[Answer]:
        return [self._answer(output) for output in self._engine.step() if output.finished]

    def _answer(self, output: Any) -> Answer:
        [completion] = output.outputs
        logprobs, _ = vllm_generation.extract_logprobs([output])
        return Answer(
            output.request_id,
            list(completion.token_ids),
            None if logprobs is None else [token[0] for token in logprobs[0]],
            completion.finish_reason if completion.finish_reason in GIVEN_UP else None,
        )

    def abort(self, request_ids: list[str]) -> None:
        self._engine.abort_request(request_ids)


def sync_weights(generation: Any) -> None:
    """Give vLLM the policy's weights, without keys and values of older ones; called by all processes at once."""
    generation.sync_weights()
    if generation.mode == "colocate" and generation.llm.reset_prefix_cache() is False:
        raise RuntimeError(
            "vLLM could not forget the keys and values of older weights, since some of them are in use: another request is under "
            "way. Leave the trainer's engine to the trainer."
        )


@contextmanager
def engine_turns(generation: Any, device: torch.device) -> Iterator[EngineTurnSampler]:
    """
    A sampler over TRL's engine, which is awake meanwhile. Afterwards torch's random numbers go on as if the engine had drawn
    none: how many it draws depends on how fast environments answer.
    """
    sleeps = generation.enable_sleep_mode
    if sleeps:
        generation.llm.wake_up(tags=["kv_cache"])
    sampler = EngineTurnSampler(ColocatedEngine(generation))
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            yield sampler
    finally:
        sampler.close()
        if sleeps:
            generation.llm.sleep(level=2)
            generation._llm_weights_sleeping = True
