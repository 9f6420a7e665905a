"""Which weights vLLM gets, and that those of the trainer stay what they are; without vLLM, with TRL's own code for both."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from peft import LoraConfig, get_peft_model
from trl.generation.vllm_generation import VLLMGeneration

from trl_epo.seams.vllm import sync_weights


NUM_SYNCS = 20


class RecordingEngine:
    """Takes the place of vLLM's `LLM`: keeps what it is given."""

    def __init__(self):
        self.weights = {}
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def _load(self, weights):
        self.weights |= {name: weight.clone() for name, weight in weights}

    def reset_prefix_cache(self):
        return True


def make_generation(model) -> VLLMGeneration:
    """TRL's, with everything but its engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLLMGeneration, "_init_vllm", lambda self: None)
        generation = VLLMGeneration(model, Accelerator(cpu=True), processing_class=None, mode="colocate")
    generation.llm = RecordingEngine()
    return generation


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("careful", [True, False])
def test_what_an_adapter_is_added_to_does_not_drift(use_dora, careful):
    model = make_model().to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=use_dora))
    generation = make_generation(model)
    bases = {name: weight.clone() for name, weight in model.named_parameters() if "lora_" not in name}
    torch.manual_seed(0)
    for _ in range(NUM_SYNCS):
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data += 0.02 * torch.randn_like(weight)
        (sync_weights if careful else VLLMGeneration.sync_weights)(generation)
    drifted = [
        name for name, weight in model.named_parameters() if name in bases and not torch.equal(weight, bases[name])
    ]
    assert bool(drifted) != careful
    if careful:
        merged = model.merge_and_unload()
        expected = dict(merged.named_parameters())
        assert generation.llm.weights.keys() == expected.keys()
        for name, weight in generation.llm.weights.items():
            assert torch.equal(weight, expected[name])
        assert not torch.equal(
            expected["model.layers.0.self_attn.q_proj.weight"], make_model().model.layers[0].self_attn.q_proj.weight
        )
