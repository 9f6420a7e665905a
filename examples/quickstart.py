"""
Train an agent with EPO in a few minutes on a laptop: `make demo`, or

    python examples/quickstart.py --output_dir runs/quickstart

A small Llama is made on the spot with a tokenizer trained on the game's text. It imitates a scripted expert on training
rows for a minute or two (the warm-up); then EPO trains it on episodes of up to 12 turns whose only reward is 1 at the
goal. A panel of rows that were never trained on is played before and after.

Every flag of EPOConfig works, and another environment or model:

    python examples/quickstart.py --output_dir runs/sw --environment scienceworld --task lifespan-longest-lived
    python examples/quickstart.py --output_dir runs/big --model Qwen/Qwen2.5-1.5B-Instruct --warm_up_episodes 0

Left out for brevity: checkpoints during the run (--save_steps), wandb (--report_to wandb), LoRA (peft_config=…).
"""

from trl_epo import EPOConfig, EPOTrainer  # before torch: docs/speed.md, Few cores


# isort: split
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from datasets import Dataset
from shared import train_between_panels
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import TrlParser

from trl_epo.envs import household, scienceworld
from trl_epo.imitation import Demonstration, environment_expert, expert_episodes, warm_up


@dataclass
class QuickstartArguments:
    environment: str = field(
        default="household", metadata={"help": "Where to act.", "choices": ("household", "scienceworld")}
    )
    model: str | None = field(
        default=None, metadata={"help": "A model on disk or the Hub; by default a small new one."}
    )
    rooms: int = field(default=2, metadata={"help": "Household: rooms of a house."})
    task: str = field(default="lifespan-longest-lived", metadata={"help": "ScienceWorld: the task."})
    warm_up_episodes: int = field(default=7000, metadata={"help": "Expert episodes to imitate, each once."})
    warm_up_learning_rate: float = field(default=6e-3, metadata={"help": "Learning rate of the imitation."})
    panel_size: int = field(default=200, metadata={"help": "Held-out rows to play before and after."})


# What differs from EPOConfig's defaults: a model of half a million weights wants other settings than one of billions.
DEMO_SETTINGS = {
    "output_dir": "runs/quickstart",
    "max_steps": 150,
    "eval_strategy": "no",
    "per_device_train_batch_size": 64,  # episodes per RL step …
    "num_generations": 8,  # … in groups of eight
    "per_device_eval_batch_size": 200,
    "num_generations_eval": 1,
    "max_turns": 12,
    "max_turn_length": 12,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "max_grad_norm": 0.5,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
}

WARM_UP_SETTINGS = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 50,
    "adam_beta2": 0.98,
    "logging_steps": 100,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def game_text(env: Demonstration, rows: Iterable[dict]) -> Iterator[str]:
    """What is said in the expert's episodes."""
    for row in rows:
        row = dict(row)
        observation, _ = env.reset(seed=row.pop("seed", 0), options=row)
        while env.text is not None:
            yield from (observation, env.text)
            observation, *_ = env.step(env.text)
    env.close()


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on the environment's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def make_model(tokenizer: PreTrainedTokenizerFast, context_length: int = 2048, **size) -> LlamaForCausalLM:
    """Two layers are enough to copy a name from a sentence, which is most of the game. `size` is for `LlamaConfig`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, **size},
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def make_household(instructions: str | None = None, **settings) -> household.Household:
    """
    The game, with the task repeated at the end of each observation. A policy that has learned the commands in a warm-up
    needs no instructions.
    """
    return household.Household(instructions=instructions, repeat_task=True, **settings)


def repeated(rows: Dataset, size: int) -> Dataset:
    """The first `size` rows, from the beginning again if there are fewer."""
    return rows.select([i % len(rows) for i in range(size)])


def main() -> None:
    parser = TrlParser((QuickstartArguments, EPOConfig))
    parser.set_defaults(**DEMO_SETTINGS)
    script, args = parser.parse_args_and_config()
    set_seed(args.seed)
    start = time.perf_counter()

    # The environment: rows to train on, and rows that are never trained on.
    if script.environment == "household":
        knobs = {"rooms": script.rooms, "turns": args.max_turns}
        told = None if script.warm_up_episodes else household.INSTRUCTIONS
        factory = partial(make_household, told)
        warm_up_rows = household.tasks("train", script.warm_up_episodes, **knobs, seed=1)
        train_rows = household.tasks("train", args.max_steps * 8, **knobs, seed=2)
        panels = {split: household.tasks(split, script.panel_size, **knobs, seed=3) for split in ("iid", "ood")}
        noise = 0.3  # imitated as well: the warm policy wanders, and EPO has to find out what leads to the goal
    else:
        told = None if script.warm_up_episodes else scienceworld.INSTRUCTIONS
        factory = partial(scienceworld.ScienceWorld, turns=args.max_turns, instructions=told)
        train_rows = scienceworld.tasks("train", [script.task])
        warm_up_rows = repeated(train_rows, script.warm_up_episodes)
        panels = {split: scienceworld.tasks(split, [script.task]).shuffle(seed=3) for split in ("iid", "ood")}
        panels = {split: rows.select(range(min(script.panel_size, len(rows)))) for split, rows in panels.items()}
        noise = 0.0

    # The policy: a given one, or a new one.
    if script.model is None:
        env = Demonstration(factory(), environment_expert, noise=noise, draw=random.Random(args.seed))
        tokenizer = make_tokenizer(game_text(env, warm_up_rows))
        model = make_model(tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(script.model)
        model = AutoModelForCausalLM.from_pretrained(script.model)
    trainer = EPOTrainer(
        model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=panels,
        processing_class=tokenizer,
        environment_factory=factory,
    )

    # The warm-up, then EPO.
    print(f"Policy: {model.num_parameters():,} weights. Warm-up on {len(warm_up_rows)} expert episodes …", flush=True)
    if len(warm_up_rows):
        warm_up(
            trainer,
            expert_episodes(trainer, warm_up_rows, noise=noise, learn_mistakes=True),
            learn_observations=script.model is None,  # a pretrained one can read
            per_device_train_batch_size=4,
            learning_rate=script.warm_up_learning_rate,
            **WARM_UP_SETTINGS,
        )
    train_between_panels(trainer, script.environment, start)


if __name__ == "__main__":
    main()
