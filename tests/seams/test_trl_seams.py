"""
Private names of TRL, and of Trainer below it, that this package relies on. `python -m trl_epo.seams` says the same.
"""

import inspect
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import child_environment
from transformers import TrainerState
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from trl_epo import EPOTrainer
from trl_epo.seams import differences as seams
from trl_epo.seams.differences import ATTRIBUTES, SIGNATURES, differences, versions


REMEDY = f"{versions()} differ from what trl_epo was written for; adapt trl_epo/seams/."


def test_nothing_differs():
    assert differences() == [], REMEDY


def test_what_differs_is_named(monkeypatch):
    monkeypatch.setitem(seams.SIGNATURES, "_generate", ("self", "prompts", "images"))
    monkeypatch.setitem(seams.SIGNATURES, "_generate_turns", ("self",))
    monkeypatch.setattr(seams, "ATTRIBUTES", ["_metrics", "_numbers"])
    monkeypatch.setattr(seams, "SOURCES", [("GRPOTrainer.log", GRPOTrainer.log, ("the moon",), "a reason")])
    monkeypatch.delitem(seams.trl_seams.SIGNATURES, "_calculate_rewards")
    signature, gone, attribute, source, unlisted = differences()
    assert "GRPOTrainer._generate takes ('self', 'prompts') instead of" in signature and "gone ['images']" in signature
    assert gone == "GRPOTrainer has no method '_generate_turns' any more."
    assert attribute == "GRPOTrainer sets no attribute '_numbers' any more."
    assert "GRPOTrainer.log does not say ('the moon',)" in source
    assert unlisted.startswith("SeamedGRPOTrainer overrides GRPOTrainer._calculate_rewards")


def test_command():
    command = [sys.executable, "-m", "trl_epo.seams"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{versions()}: no differences\n"), done.stderr


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
