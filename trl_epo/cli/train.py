"""`trl-epo train`."""

import logging
import os
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import AutoConfig
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..config import EPOConfig
from ..runs import check_unused, last_whole_checkpoint, step_of
from ..saved import is_adapter, load_adapter
from ..trainer import EPOTrainer
from .mistakes import UsageError, settings_checked
from .settings import ScriptArguments, save_play_settings


logger = logging.getLogger(__name__)


# Flags of a new adapter and what they are in its configuration
LORA_FLAGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def make_trainer(
    script: ScriptArguments, args: EPOConfig, model_args: ModelConfig, train_dataset: Dataset | None, **kwargs
) -> EPOTrainer:
    """The trainer; an adapter is loaded onto its base model, quantized if asked for."""
    quantization = get_quantization_config(model_args)
    if quantization is not None and not is_bitsandbytes_available():
        name = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit"
        raise UsageError(f"`{name}` needs bitsandbytes: `pip install bitsandbytes`, or leave it out.")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    model = model_args.model_name_or_path
    kwargs |= script.functions()
    with settings_checked():
        if is_adapter(model, args.model_init_kwargs["revision"]):
            model, kwargs["processing_class"] = load_adapter(
                model, is_trainable=True, quantization_config=quantization, **args.model_init_kwargs
            )
            args.model_init_kwargs = quantization = None
            if wanted := kwargs.pop("peft_config", None):
                _tell_of_other_adapter(model_args.model_name_or_path, model.peft_config["default"], wanted)
        else:
            _check_model(model, model_args.model_revision, args.trust_remote_code)
        return EPOTrainer(
            model,
            args=args,
            train_dataset=train_dataset,
            quantization_config=quantization,
            environment_factory=script.environment_factory(),
            **kwargs,
        )


def check_output_dir(args: EPOConfig) -> None:
    """Look before the model is loaded whether the folder can be written in and nobody trains into it."""
    if args.process_index != 0:
        return
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`output_dir` is {str(folder)!r}, but cannot be made: {error}. Name another.") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"`output_dir` is {str(folder)!r}, but no file can be written there: name another.")
    check_unused(folder)


def _check_model(model: str, revision: str | None, trust_remote_code: bool) -> None:
    try:
        AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"`model_name_or_path` is {model!r}, but there is no model in such a folder, and none of that name could "
            f"be had from the Hub: {str(error).splitlines()[0]}"
        ) from error


def _tell_of_other_adapter(folder: str, has: PeftConfig, wanted: LoraConfig) -> None:
    """Log which LoRA settings have no effect on an adapter that is there already."""
    differences = []
    for flag, name in LORA_FLAGS.items():
        found, asked = (getattr(config, name, None) for config in (has, wanted))
        found, asked = (sorted(value) if isinstance(value, set | list) else value for value in (found, asked))
        chosen_by_peft = isinstance(asked, str | None)  # "all-linear", a pattern, or what fits the architecture
        if found != asked and not chosen_by_peft:
            differences.append(f"`{flag}` is {found}, not {asked}")
    if differences:
        logger.warning(
            "%s holds an adapter, which stays as it is: %s. Give a model without one to begin another adapter.",
            folder,
            ", ".join(differences),
        )


def make_train_trainer(script: ScriptArguments, args: EPOConfig, model_args: ModelConfig) -> EPOTrainer:
    """The trainer with the rows to train on and, if they are evaluated in training, the panels."""
    return make_trainer(
        script,
        args,
        model_args,
        train_dataset=None if script.tasks is None else script.rows(script.train_split, script.train_size),
        eval_dataset=None if args.eval_strategy == "no" else script.panels(),
        peft_config=get_peft_config(model_args),
    )


def _earlier_checkpoint(script: ScriptArguments, args: EPOConfig) -> str | None:
    """The checkpoint of `output_dir` to go on from with `--resume`; raises a `UsageError` if it cannot be of the run that is asked for."""
    found = last_whole_checkpoint(args.output_dir)  # which all processes look for together
    if found is None:
        if script.resume and args.process_index == 0:
            logger.warning("--resume: there is no whole checkpoint in %s, training begins anew.", args.output_dir)
        return None
    if not script.resume:
        raise UsageError(
            f"`output_dir` holds {found} of an earlier run. Go on from there with --resume, or name another folder, or remove that one."
        )
    if 0 < args.max_steps < step_of(Path(found).name):
        raise UsageError(
            f"--resume: {found} is of more steps than `max_steps={args.max_steps}`, so it is of another run. Name another `output_dir`, "
            "or a checkpoint with --resume_from_checkpoint."
        )
    if args.process_index == 0:
        logger.warning("--resume: training goes on from %s.", found)
    return found


def train(script: ScriptArguments, args: EPOConfig, model_args: ModelConfig) -> None:
    """Train, leave the model, its card and the log in `output_dir`, and push them if asked for."""
    check_output_dir(args)
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None:
        checkpoint = _earlier_checkpoint(script, args)
    trainer = make_train_trainer(script, args, model_args)
    if trainer.is_world_process_zero():
        save_play_settings(script, args, model_args)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()  # saves the model and its card first
    else:
        trainer.save_model()
        trainer.create_model_card(model_name=Path(args.output_dir).name)
    trainer.accelerator.end_training()
