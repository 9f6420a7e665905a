"""What differs between the installed TRL and transformers and the private names that the seams rely on."""

import inspect

import transformers
import transformers.trainer
import trl
from transformers import Trainer
from transformers.integrations import TrackioCallback
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import utils as trl_utils

from . import checkpoints, hub, sampling
from . import trl as trl_seams


MODULES = {
    trl_seams.SeamedGRPOTrainer: trl_seams,
    sampling.SamplingGRPOTrainer: sampling,
    checkpoints.FaultTolerantGRPOTrainer: checkpoints,
    hub.PushingGRPOTrainer: hub,
}
SIGNATURES = {name: parameters for module in MODULES.values() for name, parameters in module.SIGNATURES.items()}
ATTRIBUTES = sorted({name for module in MODULES.values() for name in module.ATTRIBUTES})

# What sources must say, in this order: (where, its source, parts, what it is for).
SOURCES = (
    (
        "trl.trainer.utils.add_fused_lm_head",
        trl_utils.add_fused_lm_head,
        ("_CHUNKED_LOGPROB_CHUNK_SIZE",),
        "the tile of the fused head",
    ),
    ("GRPOTrainer.log", GRPOTrainer.log, ("print_prompt_completions_sample(",), "the printed table of completions"),
    (
        "VLLMGeneration.generate",
        VLLMGeneration.generate,
        (
            "max_completion_length = self.max_completion_length",
            "generation_kwargs.update(self.generation_kwargs)",
            'vllm_prompts = [{"prompt_token_ids": ids} for ids in all_prompts]',
            "self.llm.generate(vllm_prompts, sampling_params=sampling_params, use_tqdm=False)",
        ),
        "a turn's request to vLLM",
    ),
    (
        "VLLMGeneration.sync_weights",
        VLLMGeneration.sync_weights,
        ("self._llm_weights_sleeping = False", "self.llm.reset_prefix_cache()"),
        "vLLM forgets keys and values with the weights that they are of",
    ),
    (
        "TrackioCallback.on_log",
        TrackioCallback.on_log,
        ("if not self._initialized:", "self.setup(args, state, model)"),
        "a run of Trackio that has ended begins again",
    ),
    (
        "Trainer._save_checkpoint",
        Trainer._save_checkpoint,
        ("rotate_checkpoints(\n                output_dir=run_dir,", "use_mtime=True,\n            )"),
        "old checkpoints are deleted last, by a function of the module",
    ),
    (
        "Trainer._run_epoch",
        Trainer._run_epoch,
        (
            "self._get_grad_norm(",
            "self.optimizer.step()",
            "self.state.global_step += 1",
            "self._maybe_log_save_evaluate(",
        ),
        "the order of an optimizer step",
    ),
)


def versions() -> str:
    """The versions that are installed."""
    return f"TRL {trl.__version__}, transformers {transformers.__version__}"


def differences() -> list[str]:
    """A sentence for each name that is not as the seams expect it; none if this TRL fits."""
    found = []
    for name, expected in SIGNATURES.items():
        method = getattr(GRPOTrainer, name, None)
        parameters = None if method is None else tuple(inspect.signature(method).parameters)
        if method is None:
            found.append(f"GRPOTrainer has no method {name!r} any more.")
        elif parameters != expected:
            more = [parameter for parameter in parameters if parameter not in expected]
            fewer = [parameter for parameter in expected if parameter not in parameters]
            found.append(f"GRPOTrainer.{name} takes {parameters} instead of {expected}: new {more}, gone {fewer}.")
    source = inspect.getsource(GRPOTrainer) + inspect.getsource(Trainer)
    found += [
        f"GRPOTrainer sets no attribute {name!r} any more." for name in ATTRIBUTES if f"self.{name}" not in source
    ]
    for where, function, parts, purpose in SOURCES:
        text = inspect.getsource(function)
        places = [text.find(part) for part in parts]
        if -1 in places or places != sorted(places):
            found.append(f"{where} does not say {parts} in this order any more ({purpose}).")
    for trainer, module in MODULES.items():
        overrides = {name for name in vars(trainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
        for name in sorted(overrides - set(module.SIGNATURES) - {"train"}):
            found.append(
                f"{trainer.__name__} overrides GRPOTrainer.{name}, which {module.__name__}.SIGNATURES does not list."
            )
    return found
