"""What the model is told to do: an environment's `instructions`, and where they come in its prompt."""

from functools import partial

import gymnasium
import pytest
from conftest import CHATML, PATIENT_RUN, Corridor, make_model, make_tokenizer
from datasets import Dataset

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs.household import Household
from trl_epo.envs.process import ProcessEnv


TOLD = "Walk to the door. Answer with left or right."
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DROPS_SYSTEM = CHATML.replace("%}<|im_start|>", "%}{% if message['role'] != 'system' %}<|im_start|>", 1).replace(
    "<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor", 1
)


class ToldCorridor(Corridor):
    instructions = TOLD


class Other(Corridor):
    instructions = "Do as you like."


def prompts(tmp_path, factory, tokenizer, dataset=None, **kwargs):
    """The messages and the text of the first prompt of each episode of a step."""
    args = {"per_device_train_batch_size": 4, "num_generations": 2, "max_turns": 2, "max_turn_length": 3, **kwargs}
    trainer = EPOTrainer(
        make_model(),
        args=EPOConfig(str(tmp_path), max_steps=1, **PATIENT_RUN, **args),
        train_dataset=dataset,
        processing_class=tokenizer,
        environment_factory=factory,
    )
    trainer.train()
    return [(episode.prompt, tokenizer.decode(episode.prompt_ids)) for episode in trainer._batch.episodes]


@pytest.mark.parametrize(
    "factory", [ToldCorridor, lambda: gymnasium.Wrapper(ToldCorridor())], ids=["plain", "wrapped"]
)
def test_a_system_message_comes_first(tmp_path, tokenizer, factory):
    for messages, text in prompts(tmp_path, factory, tokenizer):
        assert [message["role"] for message in messages] == ["system", "user"]
        assert messages[0]["content"] == TOLD
        assert text.startswith(f"<|im_start|>system\n{TOLD}<|im_end|>\n<|im_start|>user\nYou are at ")


def test_an_environment_in_a_process_is_asked_there(tmp_path, tokenizer):
    game = partial(Household, instructions=TOLD)
    found = prompts(tmp_path, lambda: ProcessEnv(game), tokenizer, max_turns=1, per_device_train_batch_size=2)
    assert [messages[0] for messages, _ in found] == [{"role": "system", "content": TOLD}] * 2


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["rejects", "drops"])
def test_without_a_system_role_they_begin_the_first_user_message(tmp_path, template):
    for messages, text in prompts(tmp_path, ToldCorridor, make_tokenizer(template)):
        assert [message["role"] for message in messages] == ["user"]
        assert text.startswith(f"<|im_start|>user\n{TOLD}\n\nYou are at ")


def test_the_prompt_of_a_row_is_used_as_it_is(tmp_path, tokenizer, caplog):
    own = [{"role": "system", "content": "Be quick."}]
    dataset = Dataset.from_dict({"prompt": [own, [], None, own]})
    found = [
        messages for messages, _ in prompts(tmp_path, ToldCorridor, tokenizer, dataset, per_device_train_batch_size=8)
    ]
    assert "`prompt` takes the place of the environment's `instructions`" in caplog.text
    assert {tuple(m["content"].split()[0] for m in messages[:-1]) for messages in found} == {("Be",), (), ("Walk",)}


def test_an_environment_without_instructions_says_nothing(tmp_path, tokenizer):
    for messages, text in prompts(tmp_path, Corridor, tokenizer):
        assert [message["role"] for message in messages] == ["user"]
        assert text.startswith("<|im_start|>user\nYou are at ")


def test_each_of_several_environments_has_its_own(tmp_path, tokenizer):
    dataset = Dataset.from_dict({"environment": ["told", "other"]})
    found = prompts(tmp_path, {"told": ToldCorridor, "other": Other}, tokenizer, dataset)
    assert {messages[0]["content"] for messages, _ in found} == {TOLD, "Do as you like."}


def test_windows_tell_them_too(tmp_path, tokenizer):
    for _, text in prompts(tmp_path, ToldCorridor, tokenizer, context="window"):
        assert text.startswith(f"<|im_start|>system\n{TOLD}<|im_end|>\n<|im_start|>user\nYou are an expert agent")


def test_what_is_no_text_is_an_error_at_once(tmp_path, tokenizer):
    class Wrong(Corridor):
        instructions = ("left", "right")

    with pytest.raises(
        ValueError, match=r"`instructions` of the environment Wrong.*\('left', 'right'\) \(tuple\).*`str`"
    ):
        prompts(tmp_path, Wrong, tokenizer)
