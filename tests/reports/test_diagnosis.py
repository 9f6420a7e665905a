"""A run says what is wrong with it: real trainings that are broken on purpose, and healthy ones that stay silent."""

import logging
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import CHATML, PATIENT_RUN, Corridor, make_model, make_tokenizer

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.reports.diagnosis import FLAT_GROUPS, Diagnosis
from trl_epo.rollouts import EpisodeSummary, PlayedBatch, StopReason


BASE = {
    **PATIENT_RUN,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_turns": 4,
    "max_turn_length": 5,
    "max_steps": 2,
    "learning_rate": 1e-3,
}
END = 2  # the end-of-turn token


class Deaf(Corridor):
    """Understands nothing; its reward is the same for all."""

    def step(self, action):
        observation, _, _, truncated, info = super().step(action)
        return "Nothing happens.", 0.0, False, truncated, {**info, "success": False, "invalid_action": True}


class Goalless(Corridor):
    """Understands all, but nothing is ever a success."""

    def step(self, action):
        observation, _, _, truncated, info = super().step(action)
        return observation, 0.0, False, truncated, {**info, "success": False}


class Broken(Corridor):
    def step(self, action):
        raise RuntimeError("The server is gone.")


class Judged(Corridor):
    """One turn; the reward is random and so is success: what a policy does makes no difference."""

    def step(self, action):
        good = bool(self.np_random.integers(2)) ^ ("e" in action)
        return "Well.", float(good), True, False, {"success": good}


def run(tmp_path, tokenizer, factory=Corridor, model=None, resume=None, **kwargs):
    trainer = EPOTrainer(
        model or make_model(),
        args=EPOConfig(str(tmp_path), **{**BASE, **kwargs}),
        processing_class=tokenizer,
        environment_factory=factory,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def says(caplog):
    """The paragraphs that the trainer has logged."""
    return [r.getMessage() for r in caplog.records if r.name == "trl_epo.reporting" and r.levelno == logging.WARNING]


def only(caplog, *parts):
    (message,) = says(caplog)
    for part in parts:
        assert part in message
    return message


def talking_model(tokenizer, letters="re", sharpness=8.0):
    """A policy that mostly writes one of these letters and then ends its turn, whatever it reads."""
    model = make_model()
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in letters]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embeddings = model.model.embed_tokens.weight
        model.model.norm.weight.fill_(1.0)
        # The model's blocks add nothing: the last token alone decides. Tied weights: e(a)·e(b) is the logit of b after a.
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(embeddings))
        embeddings[:, 0] = 1.0  # after any token: a letter …
        embeddings[letters] = 0.0
        embeddings[letters, 1] = 1.0  # … and after a letter the end
        scale = sharpness / math.sqrt(embeddings.shape[1])
        model.lm_head.weight[letters, 0] = scale
        model.lm_head.weight[END, 1] = 10 * scale
    return model


class TestBrokenRuns:
    def test_invalid_actions(self, tmp_path, tokenizer, caplog):
        trainer = run(tmp_path, tokenizer, Deaf, max_steps=3)
        messages = says(caplog)
        (message,) = [each for each in messages if "actions were invalid" in each]
        assert "100% (32 of 32) of the actions were invalid" in message
        assert "`instructions`" in message
        assert Path(re.search(r"More: (.+?troubleshooting\.md)\.", message)[1]).exists()
        assert "\n  | <|im_start|>user\n  | You are at " in message  # what the model read, in full
        assert "<|im_start|>assistant" in message
        assert message.endswith("The environment answered:\n  | Nothing happens.")
        assert trainer.state.log_history[0]["episode/invalid_actions"] == 1.0

    def test_cut_turns(self, tmp_path, tokenizer, caplog):
        trainer = run(tmp_path, tokenizer)
        message = only(caplog, "of the turns were cut by the limit on tokens", "`max_turn_length` (5 tokens)")
        assert "It wrote:\n  | " in message
        assert trainer.state.log_history[0]["episode/cut_turns"] > 0.5

    def test_cut_thoughts(self, tmp_path, caplog):
        tokenizer = make_tokenizer(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
        run(tmp_path, tokenizer)
        only(
            caplog,
            "100% (32 of 32) of the turns ended within a thought",
            "enable_thinking",
            "The parser found no action",
        )

    def test_no_group_has_variance(self, tmp_path, tokenizer, caplog):
        run(tmp_path, tokenizer, Goalless, model=talking_model(tokenizer), max_steps=FLAT_GROUPS // 2 + 3)
        only(
            caplog, "For 10 RL steps (20 groups)", "0 of 8 episodes of the last batch succeeded", "Advantages compare"
        )

    def test_short_budget(self, tmp_path, tokenizer, caplog):
        run(tmp_path, tokenizer, model=talking_model(tokenizer), max_completion_length=30, max_turns=6)
        only(caplog, "`token_budget`", "`max_turns` is 6", "`max_completion_length`")

    def test_all_episodes_fail(self, tmp_path, tokenizer, caplog):
        run(tmp_path, tokenizer, Broken, max_failed_fraction=1.0, env_max_retries=0)
        only(caplog, "8 of 8 episodes failed", "episodes/failures.jsonl")

    def test_entropy_collapses(self, tmp_path, tokenizer, caplog):
        run(tmp_path, tokenizer, Judged, model=talking_model(tokenizer, "r", 60.0), max_steps=5)
        only(caplog, "The policy's entropy is ", "writes nearly the same each time", "`entropy_corridor_low`")

    def test_entropy_is_that_of_noise(self, tmp_path, tokenizer, caplog):
        run(tmp_path, tokenizer, Judged, max_steps=5)
        assert any("It writes noise" in message and "5.76 are those" in message for message in says(caplog))


class TestHealthyRuns:
    """Healthy: varied, valid, and some of it good."""

    @pytest.mark.parametrize(
        ("factory", "kwargs"),
        [
            (Corridor, {}),
            (Judged, {"advantage_estimator": "turn"}),
            (
                Corridor,
                {"context": "window", "max_completion_length": 400, "prompt_builder": lambda turn: turn.observation},
            ),
        ],
        ids=["corridor", "judged", "windows"],
    )
    def test_stay_silent(self, tmp_path, tokenizer, caplog, factory, kwargs):
        builder = kwargs.pop("prompt_builder", None)
        trainer = EPOTrainer(
            talking_model(tokenizer),
            args=EPOConfig(str(tmp_path), **{**BASE, "max_steps": 14, **kwargs}),
            processing_class=tokenizer,
            environment_factory=factory,
            prompt_builder=builder,
        )
        trainer.train()
        assert says(caplog) == []
        assert trainer.state.log_history[-2]["episode/success_rate"] > 0
        assert trainer.state.log_history[-2]["episode/cut_turns"] < 0.2


class TestOverARun:
    def test_once_a_run_also_after_a_resume(self, tmp_path, tokenizer, caplog):
        run(tmp_path, tokenizer, max_steps=3, save_strategy="steps", save_steps=2)
        assert len(says(caplog)) == 1
        caplog.clear()
        run(tmp_path, tokenizer, max_steps=3, resume=str(tmp_path / "checkpoint-2"))
        assert says(caplog) == []
        trainer = run(tmp_path / "again", tokenizer)
        assert len(says(caplog)) == 1
        caplog.clear()
        trainer.train()
        assert len(says(caplog)) == 1


def observed(diagnosis, entropies, success=False, rewards=(0.0, 1.0, 0.0, 1.0)):
    summary = EpisodeSummary(None, success, 0.0, 4, 0, 0, StopReason.TERMINATED)
    batch = PlayedBatch([], [], [], None, [], [], None, summaries=[summary] * len(rewards))
    return diagnosis.observe(batch, rewards, entropies)


class TestEntropies:
    """The paragraph that a history of entropies gets (nats); ln V is 6.9."""

    @pytest.mark.parametrize(
        ("entropies", "said"),
        [
            ([1.0, 1.1, 0.9, 0.5, 0.3], None),
            ([1.0, 1.1, 0.9, 0.04, 0.03, 0.02], "nearly the same"),
            ([0.5, 0.5, 0.5, 1.4, 1.5, 1.6], None),
            ([0.5, 0.5, 0.5, 2.4, 2.5, 2.6], "towards noise"),
            ([0.5, 0.5, 0.5, 0.5, 2.5, 2.6], None),  # not for three steps
            ([6.8, 6.8, 6.8], "writes noise"),
            ([5.0, 5.0, 5.0, 5.9, 5.8, 5.9], None),
        ],
    )
    def test_what_is_said(self, tmp_path, entropies, said):
        diagnosis = Diagnosis(EPOConfig(str(tmp_path), num_generations=4, **PATIENT_RUN), 1000, str)
        messages = observed(diagnosis, entropies)
        assert messages == [] if said is None else said in messages[0]
        assert observed(diagnosis, entropies) == []  # once

    def test_a_solved_task_is_as_it_should_be(self, tmp_path):
        diagnosis = Diagnosis(EPOConfig(str(tmp_path), num_generations=4, **PATIENT_RUN), 1000, str)
        for _ in range(30):
            assert observed(diagnosis, [1.0, 1.0, 1.0, 0.01, 0.01, 0.01], True, [1.0] * 4) == []
