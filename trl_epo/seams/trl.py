"""
Every private name of TRL that this package relies on, and nothing else; those of single turns are in `sampling.py`, those of
faults and checkpoints in `checkpoints.py`, those of pushes in `hub.py`.

`SeamedGRPOTrainer` turns them into a few methods with names of their own, which `EPOTrainer` overrides. The list
`SIGNATURES` is checked against the installed TRL by `tests/seams/test_trl_seams.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations import TrackioCallback
from trl.trainer import grpo_trainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import RepeatSampler, pad

from ..batches import action_mask, equal_number_of_forwards, score_tokens
from ..entropy import cut_share
from ..reports import SAMPLING, SCORING, StepTimes
from ..rollouts import PlayedBatch
from ..runs import check_checkpointing, check_rollouts, keep_output_precision, set_timeout, shards_with_zero3
from ..text import printable_parts, shown
from .replacing import replaced
from .sampling import SamplingGRPOTrainer


# Name of each GRPOTrainer method that is overridden or called -> its parameters.
SIGNATURES = {
    "_get_per_token_logps_and_entropies": (
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ),
    "_generate_and_score_completions": ("self", "inputs"),
    "_generate": ("self", "prompts"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_get_train_sampler": ("self", "dataset"),
    "_get_eval_sampler": ("self", "eval_dataset"),
    "create_accelerator_and_postprocess": ("self",),
    "prediction_step": ("self", "model", "inputs", "prediction_loss_only", "ignore_keys"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "log": ("self", "logs", "start_time"),
}
# Attributes that GRPOTrainer.__init__ sets and this module reads or sets.
ATTRIBUTES = (
    "_entropy_bonus_enabled",
    "_metrics",
    "_step",
    "rollout_func",
    "reward_funcs",
    "reward_func_names",
    "reward_processing_classes",
    "reward_weights",
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_mode",
    "mask_truncated_completions",
    "num_generations",
    "num_generations_eval",
)

# Tokens of the vocabulary that TRL's fused head takes at once on a CPU, instead of its `_CHUNKED_LOGPROB_CHUNK_SIZE`. It
# takes up to 4,096 positions, so an intermediate result has at most 16 MB, which malloc keeps for the next one. Above
# 32 MB glibc asks the system for new pages each time, which costs as much as the head itself.
CPU_HEAD_TILE = 1024


class ResumableRepeatSampler(RepeatSampler):
    """TRL's sampler, whose order of rows in an epoch does not depend on whether training was resumed before it."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins; brings the generator to where that epoch finds it."""
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def head_tiles(device: torch.device) -> AbstractContextManager[None]:
    """While this context lasts, the forwards of TRL's fused head, and their backwards, use tiles that fit `device`."""
    if device.type != "cpu":
        return nullcontext()
    return replaced(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", CPU_HEAD_TILE)


def _escaped_samples() -> AbstractContextManager[None]:
    """While this context lasts, the table of completions that TRL prints (`log_completions`) cannot drive a terminal."""
    usual = grpo_trainer.print_prompt_completions_sample

    def print_sample(*args, **kwargs):
        usual(*printable_parts(args), **printable_parts(kwargs))

    return replaced(grpo_trainer, "print_prompt_completions_sample", print_sample)


def _checked(function: Callable, name: str) -> Callable:
    """A reward function that says so if it gives no list of numbers; a model, or one that is awaited, as it is."""
    if isinstance(function, nn.Module) or trl_utils.is_async_callable(function):
        return function

    def call(**kwargs):
        rewards = function(**kwargs)
        try:
            rewards = list(rewards)
            fits = torch.tensor([0.0 if reward is None else reward for reward in rewards]).dim() == 1
        except (TypeError, ValueError, RuntimeError):
            fits = False
        if not fits:
            raise TypeError(
                f"The reward function {name!r} gave {shown(rewards)}, but must give a list with a number, or None, for each of "
                f"the {len(kwargs['completions'])} completions."
            )
        return rewards

    return call


class SeamedGRPOTrainer(SamplingGRPOTrainer):
    """`GRPOTrainer` with its private seams under names of our own."""

    # Of the class, so that TRL's methods also work on a trainer that was made without `__init__`, as TRL's tests do.
    _captured_entropies: list[Tensor] | None = None
    _loss_inputs: dict[str, Any] | None = None  # what TRL's loss reads, while it is being computed
    times = StepTimes()  # where the seconds of a step go
    _plays_episodes = False
    _played_batch: PlayedBatch | None = None
    # The reward of each episode of the generation batch, over all processes; NaN for those that failed.
    episode_rewards: Tensor | None = None
    # Which completion tokens carry loss, (B, T), while they are being scored; None: all of them.
    _loss_mask: Tensor | None = None
    loss_context_ids: Tensor | None = None  # the context of each of them, (B, T); None: all are in one

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.times = StepTimes()
        self.add_callback(self.times)
        if self.args.use_cpu and self.accelerator.num_processes > 1:
            set_timeout(self.args.ddp_timeout_delta)  # which transformers passes on for other devices only

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        keep_output_precision(self.accelerator)

    # What a subclass may override

    def prepare_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Called with the dataset rows of a generation batch, G copies of a row next to each other."""
        return rows

    def extend_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Called with the scored batch before it is shuffled and split."""
        return batch

    def shape_advantages(self, advantages: Tensor, entropies: Tensor) -> Tensor:
        """
        Called in each loss with the micro-batch's advantages, (B,) or (B, T), and token entropies, (B, T), in nats and
        without gradient; returns the advantages that the policy loss uses, of either shape.
        """
        return advantages

    def note_scores(self, batch: dict[str, Any], logprobs: Tensor, entropies: Tensor) -> None:
        """
        Called in each loss with the micro-batch and its tokens' log-probs and entropies, (B, T), in nats and without
        gradient.
        """

    # What a subclass may use

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`."""
        return "train" if self.model.training else "eval"

    def disable_own_entropy_bonus(self) -> None:
        """Keep TRL from adding its bonus for `entropy_coef`."""
        self._entropy_bonus_enabled = False

    def add_reward_func(self, func, name: str) -> None:
        """Add a reward function after the user's, of which the weights do not know yet."""
        self.reward_funcs.append(func)
        self.reward_func_names.append(name)
        self.reward_processing_classes.append(None)

    def use_played_episodes(self) -> None:
        """
        Take completions from [`set_played_batch`] from now on, instead of generating them. Raises a `ValueError` for an
        adapter that puts virtual tokens before every prompt.
        """
        if self.learns_prompts:
            raise ValueError(
                "Text episodes cannot be played with a prompt-learning adapter (prompt tuning, prefix tuning): it puts "
                "virtual tokens before every turn. Use LoRA or another adapter of the weights."
            )
        if len(devices := set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            raise ValueError(
                f"The model is spread over {len(devices)} devices, on which text episodes cannot be played. Start a process for each "
                "with `accelerate launch`, or let this one see a single device, e.g. `CUDA_VISIBLE_DEVICES=0`."
            )
        check_checkpointing(self.args, self.accelerator)
        if not self.use_vllm:
            slow = self.use_transformers_continuous_batching or self._unfit_for_cached_sampler
            batching = self.use_transformers_continuous_batching
            check_rollouts(self.accelerator, calls_whole_model=bool(slow), casts_weights=batching)
            trained = {weight.dtype for weight in self.model.parameters() if weight.requires_grad}
            cast_to = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            if batching and cast_to and trained != {cast_to}:
                raise ValueError(
                    f"For `use_transformers_continuous_batching` TRL casts the model to {cast_to} and leaves it so, but the weights "
                    f"that are trained are {', '.join(map(str, trained))}. Set `bf16=False` and `fp16=False`, load the model in "
                    "that type, or leave continuous batching out, which text episodes do not need."
                )
        else:
            self._prepare_vllm()
        self._plays_episodes = True
        self.mask_truncated_completions = False  # TRL's looks at the last token; an episode knows why it ended
        self.rollout_func = lambda prompts, trainer: {
            "prompt_ids": self._played_batch.prompt_ids,
            "completion_ids": self._played_batch.completion_ids,
            "logprobs": self._played_batch.logprobs,
            "env_mask": self._played_batch.action_mask,
        }

    def set_played_batch(self, batch: PlayedBatch) -> None:
        """
        The completions of the current generation batch. Failed episodes get no reward at all; where there are `context_ids`
        each token is scored with the earlier tokens of its own context before it, and no others.
        """
        self._played_batch = batch

    def padded(self, rows: list[list[int]], value: int) -> Tensor:
        """Lists over the completion's tokens as a tensor of the batch, (B, T)."""
        tensors = [torch.tensor(row, device=self.accelerator.device) for row in rows]
        return pad(tensors, padding_value=value, pad_to_multiple_of=self.pad_to_multiple_of)

    def unwrapped_replica(self, model: nn.Module) -> nn.Module:
        """What to call for a forward that the backward pass computes again: DDP's wrapper counts the forwards."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    @property
    def _rows_per_forward(self) -> int:
        return self.args.per_device_train_batch_size if self.mode == "train" else self.args.per_device_eval_batch_size

    @property
    def optimizer_micro_step(self) -> int:
        """Index of the current backward pass within its generation batch, over all passes over that batch."""
        return self._step % (self.args.steps_per_generation * self.num_iterations)

    def set_metric(self, name: str, value: float) -> None:
        """Set a metric of the next log entry."""
        self._metrics[self.mode][name] = [value]

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Add a value to each of these metrics, which the next log entry averages."""
        for name, value in metrics.items():
            self._metrics[self.mode][name].append(value)

    def clear_eval_metrics(self, prefix: str = "") -> None:
        """Forget the metrics of an evaluation that were not logged and whose names begin like this."""
        for name in [name for name in self._metrics["eval"] if name.startswith(prefix)]:
            del self._metrics["eval"][name]

    def begin_tracking(self) -> None:
        """
        Begin what Trackio needs before anything is logged: TRL logs the time that a part of an evaluation took also before
        training has begun a run, and after it has ended that.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrackioCallback) and not callback._initialized:
                callback.setup(self.args, self.state, self.model)

    def label_eval_metrics(self, dataset_name: str) -> None:
        """Name the metrics of an evaluation after its dataset, as Trainer does: TRL gives those of all one name."""
        if dataset_name:
            metrics = {f"{dataset_name}_{name}": values for name, values in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            self._metrics["eval"].update(metrics)

    @contextmanager
    def capture_entropies(self) -> Iterator[list[Tensor]]:
        """Collect the token entropies, with gradient, that the loss computes inside this context."""
        self._captured_entropies = []
        try:
            yield self._captured_entropies
        finally:
            self._captured_entropies = None

    # TRL's methods

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ):
        if self._played_batch is not None and self.mode == "eval":
            # Nothing of an evaluation needs the model's log-probs, nor the reference model's.
            nothing = torch.full((len(input_ids), logits_to_keep), torch.nan, device=input_ids.device)
            return nothing, nothing if compute_entropy else None, None
        if self._loss_mask is None or self.learns_prompts or any(value is not None for value in multimodal.values()):
            outputs = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        else:
            # TRL's head does not know a weight of ZeRO-3 again when its forward is computed again
            recomputes = self.loss_context_ids is not None and not shards_with_zero3(self.accelerator)
            with self.accelerator.autocast(), head_tiles(input_ids.device):
                scores = score_tokens(
                    model,
                    self._causal_lm(model).base_model,
                    input_ids,
                    attention_mask,
                    self._loss_mask,
                    context_ids=self.loss_context_ids,
                    max_rows=batch_size if self.loss_context_ids is None else self._rows_per_forward,
                    aux_loss=compute_aux_loss,
                    recompute=self.unwrapped_replica(model) if recomputes else None,
                    equal_number=equal_number_of_forwards(self.accelerator, model),
                )
            outputs = (scores.logprobs, scores.entropies if compute_entropy else None, scores.aux_loss)
        if self._captured_entropies is not None and outputs[1] is not None:
            self._captured_entropies.append(outputs[1])
        if self._loss_inputs is not None and outputs[1] is not None:
            self.note_scores(self._loss_inputs, outputs[0].detach(), outputs[1].detach())
            # TRL's loss reads the advantages after this.
            advantages = self._loss_inputs["advantages"]
            self._loss_inputs["advantages"] = self.shape_advantages(advantages, outputs[1].detach())
        return outputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "tool_mask" in inputs:
            self._loss_mask = inputs["completion_mask"] * inputs["tool_mask"]
            self.loss_context_ids = inputs.get("context_ids")
        self._loss_inputs = dict(inputs)  # a copy: the batch may be used again
        try:
            return super().compute_loss(model, self._loss_inputs, return_outputs, num_items_in_batch)
        finally:
            self._loss_mask = self._loss_inputs = self.loss_context_ids = None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not self._plays_episodes:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._prepare_inputs(inputs)  # plays and scores the episodes; a loss of theirs would cost another forward
        return None, None, None

    def step_ended(self, logs):
        self.times.end_step(self.accelerator.device)
        for name, value in (self.times.metrics(self.accelerator) if logs else {}).items():
            self.set_metric(name, value)

    def _generate_and_score_completions(self, inputs):
        try:
            with self.times.part(SCORING):
                batch = super()._generate_and_score_completions(self.prepare_rows(inputs))
                if "importance_sampling_ratio" in batch and not (self._plays_episodes and self.mode == "eval"):
                    self._log_cut_ratios(batch)
                return self.extend_batch(batch)
        finally:
            self._played_batch = self._loss_mask = self.loss_context_ids = None

    def _log_cut_ratios(self, batch: dict[str, Any]) -> None:
        """Log the share of action tokens whose ratio of vLLM's and the trainer's probabilities TRL truncates or masks."""
        counts = cut_share(
            batch["old_per_token_logps"] - batch["sampling_per_token_logps"],
            action_mask(batch),
            (self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max),
            by_row=self.vllm_importance_sampling_mode.startswith("sequence"),
        )
        num_cut, num_tokens = self.accelerator.reduce(counts, reduction="sum").tolist()
        self.add_metrics({"sampling/importance_sampling_ratio/cut": num_cut / max(num_tokens, 1)})

    def _generate(self, prompts):
        # Of played episodes TRL decodes the tokens once more; as chats it would look for tool calls in them.
        if self._played_batch is None:
            with self.times.part(SAMPLING):
                outputs = list(super()._generate(prompts))
            self.times.count_tokens(sum(map(sum, outputs[2])) if outputs[2] else sum(map(len, outputs[1])))
        else:
            outputs = list(super()._generate([""] * len(prompts)))
            outputs[3] = [episode.completion for episode in self._played_batch.episodes]
        if outputs[2] is not None:
            self._loss_mask = self.padded(outputs[2], 0)
            if self._played_batch is not None and self._played_batch.context_ids is not None:
                self.loss_context_ids = self.padded(self._played_batch.context_ids, 0)
        return tuple(outputs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        checked = [_checked(*reward) for reward in zip(self.reward_funcs, self.reward_func_names, strict=True)]
        with replaced(self, "reward_funcs", checked):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._played_batch is not None:
            failed = [episode.failed for episode in self._played_batch.episodes]
            failed = gather(torch.tensor(failed, device=rewards.device))
            rewards[failed] = torch.nan  # no reward: neither loss nor baseline
            self.episode_rewards = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            self.episode_rewards[failed] = torch.nan
        return rewards

    def log(self, logs, start_time=None):
        with _escaped_samples():
            super().log(logs, start_time)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return ResumableRepeatSampler(
            data_source=sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )

    def _get_eval_sampler(self, eval_dataset):
        sampler = super()._get_eval_sampler(eval_dataset)
        if self._plays_episodes:
            sampler.shuffle = False  # a panel: what a row is played with depends on its place
        return sampler
