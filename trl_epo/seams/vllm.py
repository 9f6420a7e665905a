"""
The vLLM engine that TRL keeps in this process (colocate mode), driven step by step: every private name of TRL's
`VLLMGeneration` and of vLLM that this package relies on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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


def check_sampling_parameters(generation_kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if vLLM does not take one of these."""
    from vllm import SamplingParams

    try:
        SamplingParams(**generation_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`generation_kwargs` is {generation_kwargs}, which vLLM's `SamplingParams` does not take: {error}"
        ) from error


def sync_weights(generation: Any) -> None:
    """Give vLLM the policy's weights, without keys and values of older ones; called by all processes at once."""
    with _bases_kept(generation.model):
        generation.sync_weights()
    if generation.mode == "colocate" and generation.llm.reset_prefix_cache() is False:
        raise RuntimeError(
            "vLLM could not forget the keys and values of older weights, since some of them are in use: another request is under "
            "way. Leave the trainer's engine to the trainer."
        )


@contextmanager
def _bases_kept(model: nn.Module) -> Iterator[None]:
    """
    The weights below an adapter are the same afterwards. For vLLM TRL adds the adapter to them and takes it away again, which
    rounds them each time (and quantizes them again, in four bits): they would drift from those that the adapter is saved for.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)] if is_peft_model(model) else []
    bases = [layer.get_base_layer() for layer in layers]
    # What ZeRO-3 has sharded it takes back from the shards. On the host, as a device may have no room for all of them.
    kept = [
        (base, name, weight, _of_this_process(weight).to("cpu", copy=True))
        for base in bases
        for name, weight in base.named_parameters(recurse=False)
        if not hasattr(weight, "ds_id")
    ]
    try:
        yield
    finally:
        for base, name, weight, values in kept:
            base._parameters[name] = weight  # a quantized one is another object now
            _of_this_process(weight).copy_(values)


def _of_this_process(weight: Tensor) -> Tensor:
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


@contextmanager
def engine_turns(generation: Any, device: torch.device) -> Iterator[EngineTurnSampler]:
    """
    A sampler over TRL's engine, which is awake meanwhile. Afterwards torch's random numbers go on as if the engine had drawn
    none: how many it draws depends on how fast environments answer.
    """
    sleeps = generation.enable_sleep_mode
    if sleeps:
        if device.type != "cpu":
            torch.accelerator.empty_cache()  # what the weight sync has left: vLLM takes memory of the device itself
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
