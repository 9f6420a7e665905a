"""The critic of PPO (`advantage_estimator="gae"`): a model with a scalar head that values the state before each token."""

import copy
import logging
import math
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from peft import PeftModel, TaskType, get_peft_model
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from trl.trainer.utils import disable_dropout_in_model

from ..batches import Run, action_mask, equal_number_of_forwards, in_forwards, keep_only, lay_out_contexts
from ..runs import check_critic, gathered_weights
from .critic_checkpoint import load_adapter, load_engine, load_model, load_training, save_model, save_training, whole


logger = logging.getLogger(__name__)

OWN_WEIGHTS = ("params", "model", "optimizer_dict")  # arguments of optimizers that choose their weights by themselves
PLAIN_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # other ones are quantized: codes of numbers
MODEL_FOLDER = "model"  # below the critic's folder of a checkpoint


def make_critic(
    policy: PreTrainedModel | PeftModel, critic_model: str | None, vocab_size: int = 0, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """
    A model with a value head.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Whose architecture it has and, unless
            `critic_model` is given, whose weights; whose kind of adapters, if it has any.
        critic_model (`str`, *optional*): A model on disk or the Hub, or a folder with a critic's adapter.
        vocab_size (`int`): Tokens of the tokenizer.
        trust_remote_code (`bool`): Whether the model's own code may run.

    Raises:
        ValueError: If there is no such model, no such head for the architecture, or it does not know all tokens, or the
            policy's weights cannot be copied.
    """
    language_model = policy.get_base_model() if is_peft_model(policy) else policy
    kind = language_model.config.model_type
    adapter = critic_model if critic_model and os.path.isfile(os.path.join(critic_model, ADAPTER_CONFIG)) else None
    if adapter is not None and not is_peft_model(policy):
        raise ValueError(
            f"`critic_model` ({critic_model}) holds an adapter, but the policy has none. Give a whole model, or a policy "
            "with the adapters that the critic was trained with."
        )
    copies_policy = critic_model is None or adapter is not None
    try:
        if copies_policy:
            config = copy.deepcopy(language_model.config)
            config.num_labels = 1
            critic, has_head = (
                AutoModelForTokenClassification.from_config(
                    config, dtype=language_model.dtype, trust_remote_code=trust_remote_code
                ),
                False,
            )
        else:
            critic, loading = AutoModelForTokenClassification.from_pretrained(
                critic_model,
                num_labels=1,
                dtype=language_model.dtype,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
            has_head = not any(is_of_head(name) for name in loading["missing_keys"])
    except OSError as error:
        raise ValueError(
            f"`critic_model` is {critic_model!r}, but there is no model in such a folder, and none of that name could be "
            f"had from the Hub: {str(error).splitlines()[0]}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"There is no critic for a policy of the type {kind!r}: {error} Set `critic_model` to a model of a type "
            "that transformers has a token classifier for."
        ) from error
    if not has_head:
        with torch.no_grad(), gathered_weights(value_head(critic)):
            for weight in value_head(critic).parameters():
                weight.zero_()
    num_known, of_policy = map(_num_tokens, (critic, language_model))
    if num_known < min(vocab_size, of_policy):  # which may be padded, one more than the other
        raise ValueError(
            f"`critic_model` ({critic_model}) knows {num_known} tokens, but the policy's tokenizer has {vocab_size}. Both "
            "read the same tokens: give a model with the policy's tokenizer."
        )
    critic.config.use_cache = False  # of which nothing would be read
    value_head(critic).__class__ = ValueHead
    if is_peft_model(policy):
        peft_config = copy.deepcopy(policy.peft_config[policy.active_adapter])
        peft_config.task_type, peft_config.inference_mode = TaskType.TOKEN_CLS, False
        critic = get_peft_model(critic, peft_config, adapter_name=policy.active_adapter)
    if copies_policy:
        with gathered_weights(policy, critic):
            _copy_weights(policy, critic)
    if adapter is not None:
        with gathered_weights(critic):
            load_adapter(critic, adapter)
    disable_dropout_in_model(critic)
    for weight in critic.parameters():
        # Steps of a usual size are lost in 16 bits, and a gradient scaler takes none of these
        if weight.requires_grad and weight.dtype in (torch.float16, torch.bfloat16) and not hasattr(weight, "ds_id"):
            weight.data = weight.data.float()
    return critic


def _num_tokens(model: PreTrainedModel) -> int:
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]


def _copy_weights(policy: nn.Module, critic: nn.Module) -> None:
    """Give the critic the policy's weights, all but the head's; raises a `ValueError` if they are not plain numbers."""
    weights = policy.state_dict()
    for name, weight in critic.state_dict().items():
        if is_of_head(name):
            continue
        found = weights.get(name)
        if found is None or found.shape != weight.shape or found.dtype not in PLAIN_DTYPES:
            has = "no weight" if found is None else f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
            raise ValueError(
                f"The policy's weights cannot be copied for a critic (is it quantized?): {name!r} is {has} there, but must "
                f"be {str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}. Set `critic_model` to a whole model, "
                "e.g. the one that the policy was quantized from."
            )
    critic.load_state_dict(weights, strict=False)


def is_of_head(name: str) -> bool:
    """Whether a weight of this name is the value head's."""
    return not {"score", "classifier"}.isdisjoint(name.split("."))


def value_head(critic: nn.Module) -> nn.Linear:
    """The last linear layer, which makes the one number."""
    heads = [module for module in critic.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    return heads[-1]


class ValueHead(nn.Linear):
    """A head that computes in its weights' own type, also under autocast: 16 bits would round values by half a percent."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


class Critic:
    """
    Values states, and learns to, with an optimizer of its own beside the policy's: of the same kind and with the same
    schedule, but with `critic_learning_rate` and without weight decay.

    Its part of an optimizer step: [`forget_gradients`], [`values`] and [`backward`] for each micro-batch, [`step`]. The rate of
    its `schedule` is moved on by [`TrainCritic`], after the policy's optimizer step.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Of [`make_critic`].
        args ([`EPOConfig`]): The settings.
        accelerator ([`~accelerate.Accelerator`]): The trainer's.

    Raises:
        ValueError: With settings of sharded weights, or an `optim`, that a second model cannot be trained with.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: TrainingArguments, accelerator: Accelerator):
        check_critic(args, accelerator)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            if is_peft_model(model):
                model.enable_input_require_grads()
        self.args = args
        self.accelerator = accelerator
        self.trains_alone = False  # in the warm-up
        self.model = model.train()
        self.optimizer: Any = None
        self._prepared: Any = None  # the optimizer as the accelerator knows it
        self.schedule: Any = None

    @property
    def _is_engine(self) -> bool:
        """Whether the model is, once prepared, an engine of DeepSpeed."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def prepare(self, num_steps: int) -> None:
        """Make ready to train for this many optimizer steps; each process has its part of the weights afterwards."""
        if self.optimizer is None:
            optimizer = make_optimizer(self.model, self.args)
            self.model, self._prepared = self.accelerator.prepare(self.model, optimizer)
            # Without accelerate's wrapper
            self.optimizer = self._prepared if self._is_engine else self._prepared.optimizer
        else:  # Trainer has made the accelerator forget it
            self.accelerator.prepare_optimizer(self._prepared)
        self.schedule = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=self.args.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )

    def values(self, batch: dict[str, Any]) -> Tensor:
        """The value of the state before each action token, (B, T), in units of reward; 0 at other tokens."""
        contexts = lay_out_contexts(
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            action_mask(batch),
            batch.get("context_ids"),
        )
        plain = whole(self.accelerator, self.model)
        backbone = (plain.get_base_model() if is_peft_model(plain) else plain).base_model
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = self.accelerator.sync_gradients

        def values_of(model: nn.Module) -> Run:
            def run(ids: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
                with keep_only(backbone, positions):
                    return (model(input_ids=ids).logits[0, :, 0].float(),)

            return run

        with self.accelerator.autocast():
            return in_forwards(
                values_of(self.model),
                contexts,
                max_rows=self.args.per_device_train_batch_size,
                recompute=values_of(plain),
                equal_number=equal_number_of_forwards(self.accelerator, self.model),
            )[0]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss to those of the optimizer step."""
        ends_step = self.accelerator.sync_gradients
        if self._is_engine:
            # Not the accelerator's, which knows the policy's engine
            self.model.set_gradient_accumulation_boundary(is_boundary=ends_step)
            self.model.backward(loss, scale_wrt_gas=False)
            return
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(ends_step)
        self.accelerator.backward(loss)

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm`, and return what their norm was. DeepSpeed does so in its step."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        return nn.utils.clip_grad_norm_(weights, self.args.max_grad_norm or math.inf)

    def step(self) -> None:
        """An optimizer step with the gradients at hand; without any it changes no weight."""
        if self._is_engine:
            self.model.step()
        else:
            self.clip_gradients()
            if self.accelerator.scaler is None:
                self.optimizer.step()
            else:  # its `update`, once for all optimizers, comes with the policy's step
                self.accelerator.scaler.step(self.optimizer)

    def forget_gradients(self) -> None:
        self.model.zero_grad()

    def save(self, folder: str) -> None:
        """
        Write it as a model, or an adapter, that `critic_model` can name, into `folder/model`, and what a resumed
        training needs into `folder`. To be called on all processes.
        """
        writes = self.args.should_save
        try:
            save_model(self.accelerator, self.model, os.path.join(folder, MODEL_FOLDER), writes)
        finally:  # the processes gather the rest together, also with one that has no room for the model
            if not self.args.save_only_model:
                save_training(self.accelerator, self.model, self.optimizer, self.schedule, folder, writes)

    def load(self, folder: str) -> None:
        """Go on from what [`save`] wrote; without any, say so and go on. To be called on all processes."""
        self.load_weights(folder)
        load_training(self.accelerator, self.model, self.optimizer, self.schedule, folder)

    def load_weights(self, folder: str) -> None:
        """Take the weights that [`save`] wrote; if there are none, say so and go on."""
        model_folder = os.path.join(folder, MODEL_FOLDER)
        if not os.path.isdir(model_folder):
            logger.warning("There is no critic in %s: it goes on as it is.", model_folder)
        elif self._is_engine:
            load_engine(self.model, folder)
        else:
            load_model(self.accelerator, self.model, model_folder, self.args.trust_remote_code)


def make_optimizer(critic: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """
    An optimizer of the policy's kind for the critic's weights.

    Raises:
        ValueError: If it is of a kind that cannot be made for given weights.
    """
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, critic)
    if (
        not isinstance(kind, type)
        or not issubclass(kind, torch.optim.Optimizer)
        or not kwargs.keys().isdisjoint(OWN_WEIGHTS)
        or args.optim.value.startswith(
            "schedule_free"
        )  # it wants to be told when training begins, which Trainer tells its own
    ):
        raise ValueError(
            f"`optim={args.optim.value!r}` chooses its weights by itself and cannot be used for a critic "
            "(`advantage_estimator='gae'`). Use an optimizer of single weights, e.g. 'adamw_torch'."
        )
    weights = [weight for weight in critic.parameters() if weight.requires_grad]
    kwargs |= {"lr": args.critic_learning_rate}
    return kind([{"params": weights, "weight_decay": 0.0}], **kwargs)


class TrainCritic(TrainerCallback):
    """Lets the critic step just before the policy does, which has no gradients while the critic trains alone."""

    def __init__(self, critic: Critic):
        self.critic = critic

    def on_step_begin(self, args, state, control, **kwargs):
        self.critic.forget_gradients()  # there are some after a step that was skipped

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.critic.step()
        if self.critic.trains_alone:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = None

    def on_optimizer_step(self, args, state, control, **kwargs):
        # As Trainer does with the policy's. A fused optimizer does not tell that fp16 has overflowed.
        if not self.critic.accelerator.optimizer_step_was_skipped:
            self.critic.schedule.step()
