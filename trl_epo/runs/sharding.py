"""Many processes: how long they wait for each other, and models whose weights are sharded (FSDP 2, DeepSpeed ZeRO)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments


def set_timeout(timeout: timedelta) -> None:
    """How long a process waits for the others."""
    distributed_c10d._set_pg_timeout(timeout)


def keep_output_precision(accelerator: Accelerator) -> None:
    """
    Have models that FSDP 2 will shard return what they compute: with bf16 accelerate rounds all outputs to it, of which
    log-probs and entropies would keep three digits.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def shards_with_fsdp1(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2


def shards_with_zero3(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3


def check_rollouts(accelerator: Accelerator, calls_whole_model: bool, casts_weights: bool = False) -> None:
    """
    Check that each process can play its episodes at its own pace, which the processes' weights must not wait for.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
        calls_whole_model (`bool`): Whether each turn goes through the `generate` of transformers.
        casts_weights (`bool`): Whether each turn begins with a cast of the model, as TRL's continuous batching does.

    Raises:
        ValueError: If the weights of all processes are needed again and again.
    """
    if accelerator.num_processes == 1:
        return
    if shards_with_fsdp1(accelerator):
        raise ValueError(
            "Text episodes end at different turns on different processes, but with the first version of FSDP these must "
            "call the model equally often. Set `fsdp_version: 2`, or use vLLM."
        )
    if shards_with_zero3(accelerator) and calls_whole_model:
        raise ValueError(
            "Text episodes end at different turns on different processes, but without the key/value cache kept over turns "
            "(continuous batching, or a model that it does not fit) ZeRO-3 gathers the weights for each turn, on all "
            "processes at once. Use ZeRO-2, FSDP 2 or vLLM."
        )

    if accelerator.is_fsdp2 and casts_weights:
        raise ValueError(
            "Text episodes end at different turns on different processes, but for continuous batching TRL casts the model each "
            "turn, after which FSDP 2 gathers its weights on all processes at once. Leave "
            "`use_transformers_continuous_batching` out, or use vLLM."
        )


def check_checkpointing(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise a `ValueError` if activations are computed again in a way that several replicas cannot do with several forwards."""
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if reentrant and accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            "`use_reentrant=True` in `gradient_checkpointing_kwargs` cannot be used on several processes, as the loss of episodes "
            "of different lengths takes several forwards. Leave it out."
        )


def check_critic(args: TrainingArguments, accelerator: Accelerator) -> None:
    """
    Check that a critic can be trained beside the policy.

    Raises:
        ValueError: If not.
    """
    if shards_with_fsdp1(accelerator):
        raise ValueError(
            "`advantage_estimator='gae'` cannot be used with the first version of FSDP, which makes the optimizer after "
            "the model is sharded. Set `fsdp_version: 2`."
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    config = accelerator.deepspeed_plugin.deepspeed_config
    if own := sorted({"optimizer", "scheduler"} & config.keys()):
        raise ValueError(
            f"The DeepSpeed configuration sets {own}, which would hold for policy and critic alike. Leave them out, and set "
            "`optim`, `learning_rate`, `critic_learning_rate` and `lr_scheduler_type`."
        )
    if args.critic_warmup_steps and args.weight_decay:
        raise ValueError(
            f"With DeepSpeed, `weight_decay={args.weight_decay}` changes the policy also in the first "
            f"`critic_warmup_steps={args.critic_warmup_steps}`. Set one of them to 0."
        )


def optimizer_bytes_to_come(accelerator: Accelerator, with_gradients: bool = False) -> int:
    """
    What the optimizers of a run will take of this process's device in their first step, in bytes: two states for each weight
    or shard of one, as Adam has, and if asked for its gradient; nothing afterwards.
    """
    optimizers = [optimizer for optimizer in accelerator._optimizers if not optimizer.state]
    weights = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    shards = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return sum((3 if with_gradients else 2) * shard.nbytes for shard in shards)


@contextmanager
def called_alone(model: nn.Module) -> Iterator[None]:
    """
    While this lasts each process calls a sharded model without the others, as often as it likes. To be entered on all
    processes; any other model is left as it is. FSDP 2: each has all weights. ZeRO-3: they must have been gathered.
    """
    with _whole_weights(model), _without_comparison(model):
        yield


@contextmanager
def _whole_weights(model: nn.Module) -> Iterator[None]:
    """While this lasts each process has all weights that FSDP 2 shards, also after a forward, and `generate` waits for no other."""
    managed = [module for module in model.modules() if getattr(module, "_is_fsdp_managed_module", False)]
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]
    after_forward = [group.post_forward_mesh_info for group in groups]
    for module in modules:
        module.unshard()
    for group in groups:
        # What `set_reshard_after_forward(False)` sets, which cannot be undone: nothing tells what it was.
        group.post_forward_mesh_info = None
    for module in managed:
        module._is_fsdp_managed_module = False
    try:
        yield
    finally:
        for module in managed:
            module._is_fsdp_managed_module = True
        for group, info in zip(groups, after_forward, strict=True):
            group.post_forward_mesh_info = info
        for module in modules:
            module.reshard()


@contextmanager
def _without_comparison(model: nn.Module) -> Iterator[None]:
    """While this lasts a forward with ZeRO-3 does not begin with a comparison of the processes. TRL leaves that hook on."""
    optimizer = getattr(model, "optimizer", None)
    zero3 = getattr(optimizer, "parameter_offload", optimizer)  # an engine that only evaluates has it as its optimizer
    if not hasattr(zero3, "fwd_pre_hook"):
        yield
        return
    compare = zero3.module._forward_pre_hooks[zero3.fwd_pre_hook.id]
    zero3.fwd_pre_hook.remove()
    try:
        yield
    finally:
        zero3.fwd_pre_hook = zero3.module.register_forward_pre_hook(compare)


def gathered_weights(*models: nn.Module):
    """
    While this lasts each process has all weights of models that ZeRO-3 has sharded as they were made; what the first
    process changes in there holds for all. Any other model is left as it is.
    """
    weights = [weight for model in models for weight in model.parameters() if hasattr(weight, "ds_id")]
    if not weights:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights, modifier_rank=0)


def sharded_like(weights: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights, the same on each process, as shards where those of the same name in `others` are (FSDP 2)."""
    return {
        name: distribute_tensor(weight.to(other.device), other.device_mesh, other.placements)
        if isinstance(other := others.get(name), DTensor)
        else weight
        for name, weight in weights.items()
    }
