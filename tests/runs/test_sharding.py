"""What is refused with sharded weights; that the rest works is in `test_many_processes.py`."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import make_model
from transformers import Trainer

from trl_epo import EPOConfig
from trl_epo.credit.critic import make_critic, make_optimizer
from trl_epo.runs.sharding import check_checkpointing, check_critic, check_rollouts


def accelerator(kind: DistributedType, is_fsdp2: bool = False, zero_stage: int = 0, **config):
    """The part of an accelerator that is looked at: FSDP 1 wants GPUs, and DeepSpeed is not installed everywhere."""
    plugin = SimpleNamespace(zero_stage=zero_stage, deepspeed_config=config)
    return SimpleNamespace(num_processes=2, distributed_type=kind, is_fsdp2=is_fsdp2, deepspeed_plugin=plugin)


FSDP1, FSDP2 = accelerator(DistributedType.FSDP), accelerator(DistributedType.FSDP, is_fsdp2=True)
ZERO2, ZERO3 = (accelerator(DistributedType.DEEPSPEED, zero_stage=stage) for stage in (2, 3))
DDP = accelerator(DistributedType.MULTI_GPU)


def test_rollouts():
    with pytest.raises(ValueError, match="`fsdp_version: 2`, or use vLLM"):
        check_rollouts(FSDP1, calls_whole_model=False)
    with pytest.raises(ValueError, match="Use ZeRO-2, FSDP 2 or vLLM"):
        check_rollouts(ZERO3, calls_whole_model=True)
    check_rollouts(ZERO3, calls_whole_model=False)
    for fine in (DDP, FSDP2, ZERO2):
        check_rollouts(fine, calls_whole_model=True)
    with pytest.raises(ValueError, match="Leave `use_transformers_continuous_batching` out, or use vLLM"):
        check_rollouts(FSDP2, calls_whole_model=True, casts_weights=True)
    for fine in (DDP, ZERO2):
        check_rollouts(fine, calls_whole_model=True, casts_weights=True)


def test_checkpointing(tmp_path):
    args = EPOConfig(str(tmp_path), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="`use_reentrant=True`.*Leave it out"):
        check_checkpointing(args, DDP)
    check_checkpointing(args, FSDP2)
    check_checkpointing(EPOConfig(str(tmp_path), gradient_checkpointing=True), DDP)


def test_critic(tmp_path):
    args = EPOConfig(str(tmp_path), critic_warmup_steps=2, weight_decay=0.1)
    with pytest.raises(ValueError, match="`fsdp_version: 2`"):
        check_critic(args, FSDP1)
    with pytest.raises(ValueError, match="weight_decay=0.1.*critic_warmup_steps=2"):
        check_critic(args, ZERO2)
    without_warmup = EPOConfig(str(tmp_path), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"sets \['optimizer'\]"):
        check_critic(without_warmup, accelerator(DistributedType.DEEPSPEED, 2, optimizer={"type": "AdamW"}))
    check_critic(without_warmup, ZERO3)
    for fine in (DDP, FSDP2):
        check_critic(args, fine)


def test_an_optimizer_that_chooses_its_weights(tmp_path, monkeypatch):
    # As GaLore's, whose package is not installed
    chosen = (torch.optim.AdamW, {"lr": 0.1, "params": []})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda args, model: chosen)
    with pytest.raises(ValueError, match="`optim='adamw_torch.*'` chooses its weights by itself.*'adamw_torch'"):
        make_optimizer(make_critic(make_model(), None), EPOConfig(str(tmp_path)))
