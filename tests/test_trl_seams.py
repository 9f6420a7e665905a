"""
Private names of TRL, and of Trainer below it, that this package relies on. If this fails, adapt `trl_epo/_trl_seams.py` or
`trl_epo/_fault_seams.py` to the new TRL.
"""

import inspect
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
import trl
from accelerate import Accelerator
from transformers import Trainer, TrainerState
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from trl_epo import EPOTrainer, _fault_seams, _trl_seams


SEAMS = {_trl_seams.SeamedGRPOTrainer: _trl_seams, _fault_seams.FaultTolerantGRPOTrainer: _fault_seams}
SIGNATURES = _trl_seams.SIGNATURES | _fault_seams.SIGNATURES
ATTRIBUTES = _trl_seams.ATTRIBUTES + _fault_seams.ATTRIBUTES
REMEDY = (
    f"TRL {trl.__version__} or transformers {transformers.__version__} differs from what trl_epo was written for; adapt "
    "trl_epo/_trl_seams.py or trl_epo/_fault_seams.py."
)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"GRPOTrainer has no method {name!r} any more. {REMEDY}"
    parameters = tuple(inspect.signature(method).parameters)
    assert parameters == SIGNATURES[name], f"GRPOTrainer.{name} takes {parameters} now. {REMEDY}"


@pytest.mark.parametrize("name", sorted(set(ATTRIBUTES)))
def test_attribute(name):
    source = inspect.getsource(GRPOTrainer) + inspect.getsource(Trainer)
    assert f"self.{name}" in source, f"GRPOTrainer has no attribute {name!r} any more. {REMEDY}"


def test_tile_of_the_fused_head():
    source = inspect.getsource(trl_utils.add_fused_lm_head)
    assert "_CHUNKED_LOGPROB_CHUNK_SIZE" in source, f"The fused head's tile has another name. {REMEDY}"


def test_table_of_completions():
    source = inspect.getsource(GRPOTrainer.log)
    assert "print_prompt_completions_sample(" in source, f"The table of completions is printed otherwise. {REMEDY}"


def test_rotation_of_checkpoints():
    # A function of the module, which can be put off; called last, with keywords only.
    source = inspect.getsource(Trainer._save_checkpoint)
    assert source.rstrip().endswith("use_mtime=True,\n            )"), (
        f"Trainer deletes old checkpoints elsewhere. {REMEDY}"
    )
    assert "rotate_checkpoints(\n                output_dir=run_dir," in source, f"Rotation has another name. {REMEDY}"
    assert callable(transformers.trainer.rotate_checkpoints)


def test_norm_of_the_gradient_comes_just_before_the_optimizers_step():
    source = inspect.getsource(Trainer._run_epoch)
    order = [
        "self._get_grad_norm(",
        "self.optimizer.step()",
        "self.state.global_step += 1",
        "self._maybe_log_save_evaluate(",
    ]
    places = [source.find(part) for part in order]
    assert -1 not in places and places == sorted(places), f"Trainer's optimizer step has another order. {REMEDY}"


@pytest.mark.parametrize("trainer", SEAMS, ids=lambda trainer: trainer.__name__)
def test_every_override_is_listed(trainer):
    overrides = {name for name in vars(trainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
    unlisted = overrides - set(SEAMS[trainer].SIGNATURES) - {"train"}
    assert not unlisted, f"Overridden but not listed in SIGNATURES: {unlisted}"


def test_private_names_stay_in_one_module():
    private = {name for name in [*SIGNATURES, *ATTRIBUTES] if name.startswith("_")}
    source = inspect.getsource(EPOTrainer)
    used = {name for name in private if f".{name}" in source}
    assert used <= {"_tokenizer"}, f"EPOTrainer uses TRL's private {used}; put it into a module of seams."


def test_same_constructor_as_grpo_trainer():
    ours = inspect.signature(EPOTrainer.__init__).parameters
    theirs = inspect.signature(GRPOTrainer.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs), f"The constructors differ. {REMEDY}"
    assert list(ours)[len(theirs) :] == ["action_parser", "prompt_builder"]


def test_entropies_are_returned_second_and_carry_a_gradient(model):
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, 300, (2, 9))
    output = model(input_ids=ids, labels=ids, fused_lm_head=True)
    logits = model(input_ids=ids).logits[:, :-1]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(output.entropy, expected, atol=1e-4, rtol=1e-4)
    output.entropy.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, EPOTrainer])
def test_methods_of_a_trainer_that_was_made_without_init(trainer_class, model):
    trainer = object.__new__(trainer_class)
    trainer.model = model
    trainer.accelerator = Accelerator(cpu=True)
    trainer.args = SimpleNamespace(report_to=[])
    trainer.state = TrainerState()
    trainer.environments = None
    trainer._metrics = {"train": defaultdict(list)}
    trainer.reward_funcs, trainer.reward_func_names = [lambda completions, **kwargs: [1.0, None]], ["one"]
    trainer.reward_processing_classes = [None]
    rewards = trainer._calculate_rewards([{}, {}], ["a", "b"], ["c", "d"], [[1], [2]])
    torch.testing.assert_close(rewards, torch.tensor([[1.0], [torch.nan]]), equal_nan=True)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, 300, (2, 9))
    logprobs, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 4)
    assert logprobs.shape == (2, 4)
