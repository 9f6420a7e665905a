"""A critic in a checkpoint: as a model that can be used elsewhere, and what a resumed training needs beside it."""

import json
import logging
import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model, load_fsdp_optimizer, save_fsdp_optimizer
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForTokenClassification

from ..runs import sharded_like


logger = logging.getLogger(__name__)

OPTIMIZER_TENSORS, OPTIMIZER_REST, SCHEDULE_FILE = "optimizer.safetensors", "optimizer.json", "schedule.json"


def whole(accelerator: Accelerator, model: nn.Module) -> Any:
    """The model without what distributed training and `torch.compile` have put around it."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def save_model(accelerator: Accelerator, model: nn.Module, folder: str, writes: bool) -> None:
    """Write it as a model or an adapter on the process that `writes`; to be called on all of them."""
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in accelerator.get_state_dict(model).items()}
    if writes:
        whole(accelerator, model).save_pretrained(folder, state_dict=weights)


def load_model(accelerator: Accelerator, model: nn.Module, folder: str, trust_remote_code: bool = False) -> None:
    """Take the weights that [`save_model`] wrote."""
    model = whole(accelerator, model)
    if is_peft_model(model):
        load_adapter(model, os.path.join(folder, _adapter_subfolder(model)))
    else:
        saved = AutoModelForTokenClassification.from_pretrained(
            folder, dtype=model.dtype, trust_remote_code=trust_remote_code
        )
        model.load_state_dict(sharded_like(saved.state_dict(), model.state_dict()))


def load_adapter(critic: PeftModel, folder: str) -> None:
    """Take the adapter's weights, and the value head's, from a folder."""
    name = critic.active_adapter
    weights = load_peft_weights(folder, device="cpu")
    weights = sharded_like(weights, get_peft_model_state_dict(critic, adapter_name=name))
    set_peft_model_state_dict(critic, weights, adapter_name=name)


def _adapter_subfolder(model: PeftModel) -> str:
    """Where PEFT saves an adapter, below the folder it is given."""
    return "" if model.active_adapter == "default" else model.active_adapter


def save_training(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    folder: str,
    writes: bool,
) -> None:
    """Write the state of the optimizer and its schedule; with DeepSpeed and FSDP in their own formats."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.save_checkpoint(folder, exclude_frozen_parameters=is_peft_model(whole(accelerator, model)))
    elif accelerator.distributed_type == DistributedType.FSDP:
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)
    elif writes:
        _save_optimizer(optimizer, folder)
    if writes:
        _write(schedule.state_dict(), os.path.join(folder, SCHEDULE_FILE))


def load_training(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, folder: str
) -> None:
    """Take what [`save_training`] wrote; if there is nothing, say so and go on."""
    if not os.path.isfile(os.path.join(folder, SCHEDULE_FILE)):
        logger.warning("There is no state of the critic's optimizer in %s: it starts anew.", folder)
        return
    if accelerator.distributed_type == DistributedType.FSDP:
        load_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)
    elif accelerator.distributed_type != DistributedType.DEEPSPEED:  # whose engine has it with its weights
        _load_optimizer(optimizer, folder)
    schedule.load_state_dict(_read(os.path.join(folder, SCHEDULE_FILE)))


def load_engine(engine, folder: str) -> None:
    """Take a DeepSpeed engine's weights and its optimizer's state, which ZeRO-3 cannot load without each other."""
    is_adapter = is_peft_model(engine.module)
    engine.load_checkpoint(folder, load_module_strict=not is_adapter, load_lr_scheduler_states=False)


def _save_optimizer(optimizer: Optimizer, folder: str) -> None:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for weight, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else rest)[f"{weight}.{name}"] = value
    # Some optimizers give all weights one and the same tensor
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, os.path.join(folder, OPTIMIZER_TENSORS))
    _write({"state": rest, "param_groups": state["param_groups"]}, os.path.join(folder, OPTIMIZER_REST))


def _load_optimizer(optimizer: Optimizer, folder: str) -> None:
    rest = _read(os.path.join(folder, OPTIMIZER_REST))
    state: dict[int, dict[str, Any]] = {}
    for key, value in (load_file(os.path.join(folder, OPTIMIZER_TENSORS)) | rest["state"]).items():
        weight, name = key.split(".", 1)
        state.setdefault(int(weight), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def _write(content: dict[str, Any], path: str) -> None:
    with open(path, "w") as file:
        json.dump(content, file)


def _read(path: str) -> dict[str, Any]:
    with open(path) as file:
        return json.load(file)
