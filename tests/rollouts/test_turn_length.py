"""How long a turn may be by default: templates that let the model think ask for more."""

import pytest
from conftest import CHATML, CPU_RUN, Corridor, make_model, make_tokenizer

from trl_epo import EPOConfig, EPOTrainer


HEADER = "<|im_start|>assistant\n{% endif %}"
# As Qwen3's: thoughts unless they are switched off, which writes an empty one.
SWITCH = CHATML.replace(
    HEADER,
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)
OPENS = CHATML.replace(HEADER, "<|im_start|>assistant\n<think>\n{% endif %}")
OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize(
    ("template", "kwargs", "length", "warned"),
    [
        (CHATML, {}, 512, None),
        (CHATML, {"max_turn_length": 8}, 8, None),
        (SWITCH, {}, 2048, "2048 tokens, which it chooses for that"),
        (OPENS, {}, 2048, "2048 tokens, which it chooses for that"),
        (SWITCH, OFF, 512, None),
        (SWITCH, {"max_turn_length": 32}, 32, "32 tokens, thoughts included; 2048 is usual"),
        (SWITCH, {"max_turn_length": 32, **OFF}, 32, None),
        (SWITCH, {"max_turn_length": 1000}, 1000, None),
    ],
)
def test_it_follows_from_the_template(tmp_path, caplog, template, kwargs, length, warned):
    trainer = EPOTrainer(
        make_model(),
        args=EPOConfig(str(tmp_path), max_steps=1, **CPU_RUN, **kwargs),
        processing_class=make_tokenizer(template),
        environment_factory=Corridor,
    )
    assert trainer.args.max_turn_length == length
    said = [record.getMessage() for record in caplog.records if "lets the model think" in record.getMessage()]
    assert said == [] if warned is None else warned in said[0]
