"""The critic of PPO (`advantage_estimator="gae"`): a model with a scalar head that values the state before each token."""

import copy
import logging
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from peft import PeftModel, TaskType, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForTokenClassification, PreTrainedModel, TrainerCallback
from trl.trainer.utils import disable_dropout_in_model

from .batching import action_mask
from .scoring import REPLICATED, Run, equal_number_of_forwards, in_forwards, keep_only, lay_out_contexts


logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"


def make_critic(policy: PreTrainedModel | PeftModel, critic_model: str | None) -> PreTrainedModel | PeftModel:
    """
    A model with a value head.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Whose architecture it has and, unless
            `critic_model` is given, whose weights; whose kind of adapters, if it has any.
        critic_model (`str`, *optional*): A model on disk or the Hub, or a folder with a critic's adapter.

    Raises:
        ValueError: If there is no such head for the architecture, or the policy's weights cannot be copied.
    """
    language_model = policy.get_base_model() if is_peft_model(policy) else policy
    kind = language_model.config.model_type
    adapter = critic_model if critic_model and os.path.isfile(os.path.join(critic_model, ADAPTER_FILE)) else None
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
            critic = AutoModelForTokenClassification.from_config(config, dtype=language_model.dtype)
            with torch.no_grad():
                for weight in value_head(critic).parameters():
                    weight.zero_()
        else:
            critic = AutoModelForTokenClassification.from_pretrained(
                critic_model, num_labels=1, dtype=language_model.dtype
            )
    except ValueError as error:
        raise ValueError(
            f"There is no critic for a policy of the type {kind!r}: {error} Set `critic_model` to a model of a type "
            "that transformers has a token classifier for."
        ) from error
    if is_peft_model(policy):
        peft_config = copy.deepcopy(policy.peft_config[policy.active_adapter])
        peft_config.task_type, peft_config.inference_mode = TaskType.TOKEN_CLS, False
        critic = get_peft_model(critic, peft_config, adapter_name=policy.active_adapter)
    if copies_policy:
        missing = critic.load_state_dict(policy.state_dict(), strict=False).missing_keys
        if not_copied := [name for name in missing if not {"score", "classifier"} & set(name.split("."))]:
            raise ValueError(
                f"The policy has no weights named {not_copied[:3]} for its critic (is it quantized?). Set "
                "`critic_model`."
            )
    if adapter is not None:
        load_adapter(critic, adapter)
    disable_dropout_in_model(critic)
    return critic


def load_adapter(critic: PeftModel, folder: str) -> None:
    """Take the adapter's weights, and the value head's, from a folder."""
    weights = load_peft_weights(folder, device="cpu")
    set_peft_model_state_dict(critic, weights, adapter_name=critic.active_adapter)


def value_head(critic: nn.Module) -> nn.Linear:
    """The last linear layer, which makes the one number."""
    heads = [module for module in critic.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    return heads[-1]


class Critic:
    """
    Values states, and learns to, in the policy's optimizer with a learning rate of its own.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Of [`make_critic`].
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
        max_rows (`int`): Contexts of the longest length in one forward, at most.
        gradient_checkpointing (`bool`): Whether a forward's activations are computed again in the backward pass.
        gradient_checkpointing_kwargs (`dict`, *optional*): How.

    Raises:
        ValueError: With sharded weights (FSDP, DeepSpeed): their checkpoints know one model for an optimizer.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        accelerator: Accelerator,
        max_rows: int,
        gradient_checkpointing: bool = False,
        gradient_checkpointing_kwargs: dict | None = None,
    ):
        if accelerator.distributed_type not in (DistributedType.NO, *REPLICATED):
            raise ValueError(
                "`advantage_estimator='gae'` cannot be used with sharded weights "
                f"({accelerator.distributed_type.value}): the critic is a second model in the policy's optimizer. Use "
                "DDP, with LoRA for models that do not fit otherwise."
            )
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
            if is_peft_model(model):
                model.enable_input_require_grads()
        self.accelerator = accelerator
        self.max_rows = max_rows
        self.trains_alone = False  # in the warm-up
        self.model = accelerator.prepare_model(model.train())

    def values(self, batch: dict[str, Any]) -> Tensor:
        """The value of the state before each action token, (B, T), in units of reward; 0 at other tokens."""
        contexts = lay_out_contexts(
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            action_mask(batch),
            batch.get("context_ids"),
        )
        plain = self.accelerator.unwrap_model(self.model)
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
                max_rows=self.max_rows,
                recompute=values_of(plain),
                equal_number=equal_number_of_forwards(self.accelerator, self.model),
            )[0]

    def join(self, optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float) -> None:
        """
        Have the critic's weights trained by the policy's optimizer, without weight decay, their gradients clipped on
        their own. While it [`trains_alone`] the optimizer leaves all other weights as they are. Once for an optimizer.
        """
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        others = [weight for group in optimizer.param_groups for weight in group["params"]]
        if weights[0] in set(others):
            return
        optimizer.add_param_group({"params": weights, "lr": learning_rate, "weight_decay": 0.0})

        def prepare_step(*args):
            if max_grad_norm:
                nn.utils.clip_grad_norm_(weights, max_grad_norm)
            if self.trains_alone:
                for weight in others:
                    weight.grad = None

        optimizer.register_step_pre_hook(prepare_step)

    def save(self, folder: str) -> None:
        """Write it as a model, or an adapter, that `critic_model` can name."""
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder)

    def load(self, folder: str) -> None:
        """Take the weights that [`save`] wrote; if there are none, say so and go on."""
        model = self.accelerator.unwrap_model(self.model)
        if not os.path.isdir(folder):
            logger.warning("There is no critic in %s: it goes on as it is.", folder)
        elif is_peft_model(model):
            load_adapter(model, os.path.join(folder, _adapter_subfolder(model)))
        else:
            saved = AutoModelForTokenClassification.from_pretrained(folder, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())


def _adapter_subfolder(model: PeftModel) -> str:
    """Where PEFT saves an adapter, below the folder it is given."""
    return "" if model.active_adapter == "default" else model.active_adapter


class ForgetGradients(TrainerCallback):
    """Clears the critic's gradients where the trainer clears the policy's, also after a step that was skipped."""

    def __init__(self, critic: Critic):
        self.critic = critic

    def on_step_begin(self, args, state, control, **kwargs):
        self.critic.model.zero_grad()
