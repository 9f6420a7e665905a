"""TRL's tools and tool environments under `EPOTrainer`: TRL's own loop, turns from the tool mask."""

from pathlib import Path

import pytest
import torch
import trl
from conftest import make_model, make_tokenizer
from datasets import Dataset

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.entropy.objective import turn_ids_from_mask


CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


def look() -> str:
    """Look around."""
    return "The door is open."


class Room:
    """TRL's kind of environment: methods are tools, `reset` gives the first observation."""

    def reset(self, **kwargs):
        self.num_looks = 0
        return "You are at 3."

    def look(self) -> str:
        """Look around."""
        self.num_looks += 1
        return "The door is open."

    def get_reward(self) -> float:
        return float(self.num_looks)


@pytest.fixture(scope="module")
def tool_tokenizer():
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer = make_tokenizer(template.read_text())
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    return tokenizer


@pytest.fixture(scope="module")
def caller(tool_tokenizer):
    """A model that has learned to answer every prompt of these tests with one tool call."""
    model = make_model(vocab_size=len(tool_tokenizer), context_length=2048)
    prompt = [{"role": "user", "content": "You are at 3."}]
    head = tool_tokenizer.apply_chat_template(
        prompt, tools=[look], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    ids = torch.tensor([[*head, *tool_tokenizer.encode(CALL), tool_tokenizer.eos_token_id]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(input_ids=ids[:, :-1]).logits[0, len(head) - 1 :]
        torch.nn.functional.cross_entropy(logits, ids[0, len(head) :]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def make_trainer(tmp_path, tokenizer, weights, **kwargs):
    model = make_model(vocab_size=len(tokenizer), context_length=2048)
    model.load_state_dict(weights)
    args = EPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=120,
        max_tool_calling_iterations=2,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-4,
        temperature=0.2,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    return EPOTrainer(model, args=args, processing_class=tokenizer, **kwargs)


def check(trainer):
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert "tool_mask" in inputs
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    assert torch.equal(inputs["turn_ids"], turn_ids_from_mask(mask))
    assert inputs["turn_ids"].max() >= 1  # a tool call, its answer, and another turn
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "epo/entropy_bonus" in entry]
    assert len(entries) == 2
    assert "epo/entropy_late_turns" in entries[0]
    assert trainer.entropy_history.step >= 1
    return entries


def test_tools(tmp_path, tool_tokenizer, caller):
    def reward(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "You are at 3."}]] * 4})
    trainer = make_trainer(tmp_path, tool_tokenizer, caller, reward_funcs=reward, train_dataset=rows, tools=[look])
    entries = check(trainer)
    assert entries[0]["tools/call_frequency"] > 0


def test_tool_environment(tmp_path, tool_tokenizer, caller):
    trainer = make_trainer(tmp_path, tool_tokenizer, caller, environment_factory=Room)
    entries = check(trainer)
    assert entries[0]["rewards/Room/mean"] > 0


def test_openenv_with_tools(tmp_path, tool_tokenizer, caller):
    """An OpenEnv server used in TRL's way: a class around its client, whose methods are tools."""
    pytest.importorskip("openenv", reason='needs pip install "trl-epo[openenv]"')
    from openenv.core import GenericEnvClient
    from openenv_servers import servers

    class RemoteRoom:
        def __init__(self):
            self.client = GenericEnvClient(server.url).sync()
            made.append(self.client)

        def reset(self, **kwargs):
            self.reward = 0.0
            self.client.reset(number=3)
            return "You are at 3."

        def look(self) -> str:
            """Look around."""
            result = self.client.step({"text": "3"})
            self.reward += result.reward
            return result.observation["text"]

        def get_reward(self) -> float:
            return self.reward

    made = []
    with servers() as start:
        server = start(16)
        trainer = make_trainer(tmp_path, tool_tokenizer, caller, environment_factory=RemoteRoom)
        entries = check(trainer)
        assert server.sessions() == 4  # one for each episode of a batch
        for client in made:
            client.close()
    assert entries[0]["rewards/RemoteRoom/mean"] > 0
