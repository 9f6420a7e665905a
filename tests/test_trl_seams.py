"""TRL's private names that this package relies on. If this fails, adapt `trl_epo/_trl_seams.py` to the new TRL."""

import inspect

import pytest
import trl
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from trl_epo import EPOTrainer
from trl_epo._trl_seams import ATTRIBUTES, SIGNATURES, SeamedGRPOTrainer


REMEDY = f"TRL {trl.__version__} differs from the TRL that trl_epo was written for; adapt trl_epo/_trl_seams.py."


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"GRPOTrainer has no method {name!r} any more. {REMEDY}"
    parameters = tuple(inspect.signature(method).parameters)
    assert parameters == SIGNATURES[name], f"GRPOTrainer.{name} takes {parameters} now. {REMEDY}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute(name):
    source = inspect.getsource(GRPOTrainer)
    assert f"self.{name}" in source, f"GRPOTrainer has no attribute {name!r} any more. {REMEDY}"


def test_tile_of_the_fused_head():
    source = inspect.getsource(trl_utils.add_fused_lm_head)
    assert "_CHUNKED_LOGPROB_CHUNK_SIZE" in source, f"The fused head's tile has another name. {REMEDY}"


def test_table_of_completions():
    source = inspect.getsource(GRPOTrainer.log)
    assert "print_prompt_completions_sample(" in source, f"The table of completions is printed otherwise. {REMEDY}"


def test_every_override_is_listed():
    overrides = {name for name in vars(SeamedGRPOTrainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
    assert overrides <= set(SIGNATURES), f"Overridden but not listed in SIGNATURES: {overrides - set(SIGNATURES)}"


def test_private_names_stay_in_one_module():
    private = {name for name in [*SIGNATURES, *ATTRIBUTES] if name.startswith("_")}
    source = inspect.getsource(EPOTrainer)
    used = {name for name in private if f".{name}" in source}
    assert used <= {"_tokenizer"}, f"EPOTrainer uses TRL's private {used}; put it into trl_epo/_trl_seams.py."


def test_same_constructor_as_grpo_trainer():
    ours = inspect.signature(EPOTrainer.__init__).parameters
    theirs = inspect.signature(GRPOTrainer.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs), f"The constructors differ. {REMEDY}"
    assert list(ours)[len(theirs) :] == ["action_parser", "prompt_builder"]


def test_entropies_are_returned_second_and_carry_a_gradient(model):
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    import torch

    ids = torch.randint(3, 300, (2, 9))
    output = model(input_ids=ids, labels=ids, fused_lm_head=True)
    logits = model(input_ids=ids).logits[:, :-1]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(output.entropy, expected, atol=1e-4, rtol=1e-4)
    output.entropy.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
