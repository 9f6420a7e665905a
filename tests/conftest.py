"""Small real parts that tests share: a tokenizer, a model, a text environment."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import trl_epo
from trl_epo.envs import TextEnv


torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

# A busy machine may take any time for an example, and another run of the tests has the same ones.
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# Settings of trainings that are over in a second: in float32 on a CPU, each step in the log, nothing on the disk.
CPU_RUN = {
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
# Of such trainings with environments: a late answer would change what is sampled together, and so the result.
PATIENT_RUN = {**CPU_RUN, "environment_patience": float("inf")}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's special tokens, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["user assistant system", "You are at 3. The door is at 5.", "left right open look", "Nothing happens."]
    tokenizer.train_from_iterator(corpus * 10, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=chat_template,
        padding_side="left",
    )


def make_model(
    vocab_size: int = 400, seed: int = 0, context_length: int = 1024, hidden_size: int = 32, tied: bool = True
) -> LlamaForCausalLM:
    """A Llama of a few thousand weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


@contextmanager
def shapes_read(model: LlamaForCausalLM) -> Iterator[list[tuple[int, int]]]:
    """The shape of the token ids of each forward that the model makes in this context."""
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with hook:
        yield shapes


def child_environment(**more: str) -> dict[str, str]:
    """Environment variables of another process that imports the same package and these files."""
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, [tests, tests / "support", Path(trl_epo.__file__).parents[1]]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> bool:
    """Whether a condition comes true in this time."""
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return done


class Corridor(TextEnv):
    """Walk along a line to the door: any text with an "r" is a step to the right, any other one to the left."""

    def __init__(self, length: int = 3, turns: int = 6):
        self.length, self.turns = length, turns

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        self.door = options.get("length", self.length)
        self.place = int(self.np_random.integers(0, self.door))
        self.num_steps = 0
        return f"You are at {self.place}. The door is at {self.door}.", {"success": False}

    def step(self, action):
        self.num_steps += 1
        self.place += 1 if "r" in action else -1
        done = self.place == self.door
        info = {"success": done, "invalid_action": not action, "task": f"door {self.door}"}
        return f"You are at {self.place}.", float(done), done, not done and self.num_steps >= self.turns, info


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    """A saved model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_model(context_length=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model():
    return make_model()
