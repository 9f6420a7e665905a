"""
The private names of TRL that sampling the turns of text episodes relies on, whatever samples them: the cached sampler, TRL's own
generation, or vLLM.

`SamplingGRPOTrainer` is the middle of `SeamedGRPOTrainer`; `SIGNATURES` and `ATTRIBUTES` are checked like those of `trl.py`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext

import torch
from accelerate.utils import is_peft_model, set_seed
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.models import unwrap_model_for_generation

from ..runs import called_alone, optimizer_bytes_to_come
from ..sampling import (
    CachedTurnSampler,
    Footprint,
    RequestTurnSampler,
    TurnSampler,
    make_logits_processors,
    masked_attention,
    unfit_for_cached_sampler,
)
from .checkpoints import FaultTolerantGRPOTrainer
from .vllm import check_sampling_parameters, engine_turns, sync_weights


logger = logging.get_logger(__name__)

# Name of each GRPOTrainer method that is overridden or called -> its parameters.
SIGNATURES = {
    "_generate_single_turn": (
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ),
}
# Arguments of GRPOConfig that GRPOTrainer keeps as attributes and that make up the sampling distribution.
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Attributes that GRPOTrainer.__init__ sets and this module reads or sets.
ATTRIBUTES = (
    "_last_loaded_step",
    "_tokenizer",
    "eos_token_ids",
    "max_completion_length",
    "temperature",
    "generation_config",
    "generation_kwargs",
    "vllm_generation",
)


@contextmanager
def _kept_casts(model: nn.Module) -> Iterator[None]:
    """Let autocast keep what it casts of frozen weights too (an adapter's base); it does so if they want a gradient."""
    weights = list(model.parameters()) if torch.is_autocast_enabled(next(model.parameters()).device.type) else []
    frozen = [weight for weight in weights if not weight.requires_grad and weight.is_floating_point()]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


class SamplingGRPOTrainer(FaultTolerantGRPOTrainer):
    """`GRPOTrainer` that samples turns of episodes, each after what came before it."""

    @property
    def model_context_length(self) -> int | None:
        """The longest context, in tokens, that the model takes; `None` if it has no bound. No episode has a longer one."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def context_length(self) -> int | None:
        """The same of the model and, if there is one, the vLLM engine, as far as this process knows."""
        bounds = [self.model_context_length]
        if self.use_vllm:
            bounds.append(self.args.vllm_max_model_length)
            if self.vllm_mode == "colocate":
                bounds.append(self.vllm_generation.llm.llm_engine.model_config.max_model_len)
            elif self.accelerator.is_main_process:
                bounds.append(self.vllm_generation.vllm_client.get_server_info()["model_config"]["max_model_len"])
        return min((bound for bound in bounds if bound is not None), default=None)

    @contextmanager
    def sampling_at(self, temperature: float | None) -> Iterator[None]:
        """Sample at this temperature in here, with whatever backend; `None` changes nothing."""
        before = self.temperature
        self._set_temperature(before if temperature is None else temperature)
        try:
            yield
        finally:
            self._set_temperature(before)

    @property
    def sampling_temperature(self) -> float:
        """At which text episodes are sampled now."""
        return (self.args.generation_kwargs or {}).get("temperature", self.temperature)

    def _set_temperature(self, temperature: float) -> None:
        self.temperature = temperature
        if self.use_vllm:
            self.vllm_generation.temperature = temperature
        elif "temperature" not in (self.args.generation_kwargs or {}):
            self.generation_config.temperature = self.generation_kwargs["temperature"] = temperature

    @contextmanager
    def turn_sampler(self, longest_context: float = math.inf) -> Iterator[TurnSampler]:
        """
        A sampler over the current weights, for contexts of up to so many tokens as far as is known; the model is in evaluation
        mode meanwhile.
        """
        was_training = self.model.training
        by_request = self.use_vllm or self.use_transformers_continuous_batching
        unfit = None if by_request else self._unfit_for_cached_sampler
        if by_request or unfit:
            if unfit:
                logger.warning_once(f"Each turn of a text episode reads its whole transcript again: {unfit}.")
            self.model.eval()
            try:
                if self.use_vllm:
                    self._sync_vllm()
                with self._request_sampler(None if by_request else self._footprint.requests) as sampler:
                    yield sampler
            finally:
                self.model.train(was_training)
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            called_alone(self.model_wrapped),
            masked_attention(self._causal_lm(self.model)),
            self.accelerator.autocast(),  # around all forwards, so that it casts each weight once
            _kept_casts(model),
        ):
            model.eval()
            settings = {name: getattr(self, name) for name in SAMPLING_SETTINGS} | (self.args.generation_kwargs or {})
            try:
                sampler = CachedTurnSampler(
                    getattr(model, "_orig_mod", model),  # compiled, it would be anew for each width
                    eos_token_ids=self.eos_token_ids,
                    pad_token_id=self._tokenizer.pad_token_id,
                    temperature=settings["temperature"],
                    processors=make_logits_processors(self.accelerator.device, **settings),
                    tells_entropies=not was_training and self.args.keep_episodes > 0,
                    longest_context=longest_context,
                    bytes_to_come=optimizer_bytes_to_come(
                        self.accelerator,
                        # Some batches are then played while gradients are being added up
                        with_gradients=self.args.steps_per_generation < self.args.gradient_accumulation_steps,
                    ),
                )
                with closing(sampler):
                    yield sampler
            finally:
                model.train(was_training)

    def _sync_vllm(self) -> None:
        """Every process at once, also one that will have nothing to ask."""
        has_no_weights = self.vllm_mode == "colocate" and self.vllm_generation._llm_weights_sleeping
        if self.state.global_step != self._last_loaded_step or has_no_weights:
            sync_weights(self.vllm_generation)
            self._last_loaded_step = self.state.global_step

    @contextmanager
    def _request_sampler(self, together: Callable[[list[int], int], list[list[int]]] | None) -> Iterator[TurnSampler]:
        """A sampler whose turns are requests. vLLM and continuous batching bound their cache themselves: `together` is `None`."""
        if self._drives_engine:
            with engine_turns(self.vllm_generation, self.accelerator.device) as sampler:
                yield sampler
            return
        with nullcontext() if self.use_vllm else called_alone(self.model_wrapped):
            yield RequestTurnSampler(self._generate_request, together)

    @property
    def learns_prompts(self) -> bool:
        """Whether an adapter puts virtual tokens before the prompt."""
        return is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning

    def _causal_lm(self, model) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    @property
    def _footprint(self) -> Footprint:
        model = self._causal_lm(self.model)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, model.dtype)
        return Footprint.of(model.config.get_text_config(), dtype)

    def _generate_request(
        self, prompts: list[list[int]], max_new_tokens: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if self.use_vllm:
            self.vllm_generation.max_completion_length = max_new_tokens
        else:
            self.generation_config.max_new_tokens = max_new_tokens
        # Each episode asks for its own next turn: one generation a prompt.
        return self._generate_single_turn(prompts, None, {}, num_generations=1)

    def _prepare_vllm(self) -> None:
        """Make a vLLM engine sample as the trainer's other generation does; called once."""
        generation = self.vllm_generation
        if self.args.vllm_enable_sleep_mode and not self._drives_engine:
            logger.warning_once(
                "With `vllm_enable_sleep_mode` vLLM sleeps after every turn of a text episode, and each waking costs a "
                "weight sync and the prefix cache."
            )
        # The engine knows the end-of-turn tokens of the model's folder, whose tokenizer may not be the trainer's.
        given = generation.generation_kwargs
        ends = {*self.eos_token_ids, *given.get("stop_token_ids", ())}
        generation.generation_kwargs = {**given, "stop_token_ids": sorted(ends)}
        if self._drives_engine:
            check_sampling_parameters(given)
            # TRL starts the engine with a seed of its own, which also seeds this process.
            set_seed(self.args.seed, device_specific=True)

    @property
    def _drives_engine(self) -> bool:
        """Whether turns go to a vLLM engine of this process alone, which goes on with some while others come and go."""
        return self.use_vllm and self.vllm_mode == "colocate" and self.args.vllm_tensor_parallel_size == 1

    @property
    def _unfit_for_cached_sampler(self) -> str | None:
        longest = self.model_context_length or math.inf
        return unfit_for_cached_sampler(self._causal_lm(self.model), longest)

    # TRL's methods

    def _generate_single_turn(self, *args, **kwargs):
        was_training = self.model.training
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.model.train(was_training)  # TRL's continuous batching leaves it in training mode
