"""Evaluation: its arithmetic by hand and by properties, and what `EPOTrainer` plays."""

import doctest
import math
import random
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import PATIENT_RUN, Corridor, make_model, shapes_read
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.reports import evaluation
from trl_epo.reports.evaluation import (
    RowOutcome,
    RunSuccess,
    evaluation_metrics,
    mean_success,
    pass_at_k,
    row_outcomes,
    run_success,
    success_curve,
    success_interval,
    t_quantile,
)
from trl_epo.reports.metrics import EpisodeSummary
from trl_epo.rollouts.episode import StopReason
from trl_epo.sampling.cached import CachedTurnSampler


def summary(row, success, stop=StopReason.TERMINATED, num_turns=1):
    return EpisodeSummary("door", success, float(success or 0), num_turns, 0, 0, stop, row)


def wilson(num_successes, num_episodes, z=evaluation.Z_95):
    """The textbook's form: the roots of (p̂ − p)² = z²·p·(1 − p)/n."""
    rate = num_successes / num_episodes
    a, b, c = 1 + z**2 / num_episodes, -(2 * rate + z**2 / num_episodes), rate**2
    root = math.sqrt(b**2 - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


OUTCOMES = st.lists(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))).map(lambda pair: RowOutcome(*pair)),
    min_size=1,
    max_size=30,
)


class TestInterval:
    def test_doctests(self):
        assert doctest.testmod(evaluation).failed == 0

    @given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
    def test_one_episode_a_row_is_wilsons(self, numbers):
        num_rows, num_successes = numbers
        outcomes = [RowOutcome(1, int(row < num_successes)) for row in range(num_rows)]
        expected = wilson(num_successes, num_rows)
        assert success_interval(outcomes) == pytest.approx(expected, abs=1e-7)

    def test_copies_of_an_episode_tell_nothing_new(self):
        once = [RowOutcome(1, 1)] * 6 + [RowOutcome(1, 0)] * 4
        eight_times = [RowOutcome(8, 8)] * 6 + [RowOutcome(8, 0)] * 4
        assert success_interval(eight_times) == pytest.approx(success_interval(once))

    @pytest.mark.parametrize(
        ("degrees", "table"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)]
    )
    def test_students_t(self, degrees, table):
        assert t_quantile(degrees) == pytest.approx(table, rel=2e-3)
        assert t_quantile(10**9) == pytest.approx(evaluation.Z_95)

    def test_rows_all_alike_count_each_episode_as_far_as_few_rows_tell(self):
        number = 80 * (evaluation.Z_95 / 2.2622) ** 2  # t of nine degrees of freedom
        assert success_interval([RowOutcome(8, 4)] * 10) == pytest.approx(wilson(number / 2, number), abs=1e-5)
        assert success_interval([RowOutcome(8, 4)] * 2) == pytest.approx(wilson(1, 2))
        assert success_interval([RowOutcome(8, 4)] * 10**4) == pytest.approx(wilson(40_000, 80_000), rel=1e-4)

    def test_hand_worked_effective_number(self):
        # Rates 1, 0 and six times 1/2, of four episodes each: p = 1/2, Var = 8/7 · (2² + 2²)/32² = 1/112, so 28
        # episodes before the correction.
        outcomes = [RowOutcome(4, successes) for successes in (4, 2, 2, 2, 2, 2, 2, 0)]
        number = 28 * (evaluation.Z_95 / 2.3646) ** 2  # t of seven degrees of freedom
        assert success_interval(outcomes) == pytest.approx(wilson(number / 2, number), abs=1e-5)

    def test_nothing_to_learn_a_variance_from(self):
        assert success_interval([RowOutcome(8, 8)] * 10) == pytest.approx(wilson(10, 10))
        assert success_interval([RowOutcome(8, 0)] * 10) == pytest.approx(wilson(0, 10))
        low, high = success_interval([RowOutcome(100, 50)])
        assert (low, high) == pytest.approx(wilson(0.5, 1))

    @given(OUTCOMES)
    def test_bounds(self, outcomes):
        low, high = success_interval(outcomes)
        episodes = sum(outcome.num_episodes for outcome in outcomes)
        rate = sum(outcome.num_successes for outcome in outcomes) / episodes
        assert 0.0 <= low <= rate + 1e-12
        assert rate - 1e-12 <= high <= 1.0
        narrowest, widest = (wilson(rate * number, number) for number in (episodes, len(outcomes)))
        assert narrowest[1] - narrowest[0] - 1e-9 <= high - low <= widest[1] - widest[0] + 1e-9

    @pytest.mark.parametrize("num_rows", [2, 3, 10, 30])
    @pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (2.0, 2.0), (50.0, 50.0), (0.1, 0.9)])
    def test_it_holds_the_rate_as_often_as_it_says(self, num_rows, a, b):
        # Rows of unequal difficulty, from very unequal to nearly equal, of 8 episodes each; drawn 500 times.
        draw = np.random.default_rng(0)
        intervals = [
            success_interval([RowOutcome(8, int(number)) for number in draw.binomial(8, draw.beta(a, b, num_rows))])
            for _ in range(500)
        ]
        coverage = sum(low <= a / (a + b) <= high for low, high in intervals) / 500
        assert coverage > 0.91
        assert coverage < 0.99 or num_rows <= 10  # of few rows rather too wide

    def test_no_outcomes(self):
        with pytest.raises(ValueError, match="no outcomes"):
            success_interval([])


class TestPassAtK:
    @given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
    def test_it_is_the_share_of_draws_with_a_success(self, numbers):
        num_episodes, num_successes, k = numbers
        draws = list(combinations([True] * num_successes + [False] * (num_episodes - num_successes), k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(RowOutcome(num_episodes, num_successes), k) == pytest.approx(expected)

    @pytest.mark.parametrize("k", [0, 5])
    def test_impossible_k(self, k):
        with pytest.raises(ValueError, match=f"k is {k}.*, 4"):
            pass_at_k(RowOutcome(4, 1), k)


class TestMetrics:
    def test_hand_worked(self):
        metrics = evaluation_metrics(
            [
                *(summary(0, success) for success in (True, False, False, False)),
                *(summary(1, success) for success in (True, True, True, True)),
                *(summary(2, success) for success in (False, False, False)),
                summary(2, True, StopReason.FAILURE),
                summary(3, None, num_turns=23),
            ]
        )
        assert metrics["episode/count"] == 13
        assert metrics["episode/success_rate"] == pytest.approx(5 / 11)
        assert metrics["episode/turns"] == pytest.approx((11 + 23) / 12)
        assert metrics["episode/pass@1"] == pytest.approx((1 / 4 + 1 + 0) / 3)
        assert metrics["episode/pass@2"] == pytest.approx((1 / 2 + 1 + 0) / 3)
        assert metrics["episode/pass@4"] == pytest.approx((1 + 1) / 2)  # of the third row only three count
        assert "episode/pass@8" not in metrics
        assert metrics["episode/success_low"] < 5 / 11 < metrics["episode/success_high"]

    def test_one_episode_a_row_has_no_pass_at_k(self):
        assert not any("pass@" in name for name in evaluation_metrics([summary(0, True), summary(1, False)]))

    def test_no_verdict(self):
        assert "episode/success_low" not in evaluation_metrics([summary(0, None)])
        assert evaluation_metrics([]) == {}

    @given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1), st.randoms())
    def test_order_does_not_matter(self, played, random):
        summaries = [summary(row, success) for row, success in played]
        shuffled = summaries.copy()
        random.shuffle(shuffled)
        assert evaluation_metrics(shuffled) == pytest.approx(evaluation_metrics(summaries))
        assert sum(outcome.num_episodes for outcome in row_outcomes(summaries)) == len(played)


def history(*rates, panel="iid"):
    entries = [{"step": 5 * i, f"eval_{panel}_episode/success_rate": rate} for i, rate in enumerate(rates)]
    return [{"step": 1, "episode/success_rate": 0.99}, *entries]


class TestRuns:
    def test_hand_worked(self):
        runs = [run_success(history(0.1, 0.8, 0.5, 0.6, 0.7), "iid"), run_success(history(0.2, 0.4), "iid")]
        assert runs == [RunSuccess(0.8, pytest.approx(0.65)), RunSuccess(0.4, 0.4)]  # the last 2 of 5, the last of 2
        assert mean_success(runs) == RunSuccess(pytest.approx(0.6), pytest.approx(0.525))

    def test_the_last_of_several_at_one_step_counts(self):
        entries = [*history(0.5, 0.7), {"step": 5, "eval_iid_episode/success_rate": 0.6}]
        assert success_curve(entries, "iid") == [(0, 0.5), (5, 0.6)]

    def test_a_single_panel_has_no_name(self):
        assert run_success([{"step": 5, "eval_episode/success_rate": 0.25}]) == RunSuccess(0.25, 0.25)

    @given(st.lists(st.floats(0, 1), min_size=1), st.floats(0.01, 1))
    def test_properties(self, rates, share):
        run = run_success(history(*rates), "iid", share)
        assert run.best == max(rates)
        assert min(rates) - 1e-12 <= run.converged <= run.best + 1e-12
        assert run_success(history(*rates), "iid", 1.0).converged == pytest.approx(sum(rates) / len(rates))

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"panel 'ood'; it has \['eval_iid_episode/success_rate'\]"):
            run_success(history(0.5), "ood")
        with pytest.raises(ValueError, match="no evaluation at all"):
            run_success([])
        with pytest.raises(ValueError, match="`converged_share` is 0"):
            run_success(history(0.5), "iid", 0)
        with pytest.raises(ValueError, match="no runs"):
            mean_success([])


BASE = {
    **PATIENT_RUN,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "per_device_eval_batch_size": 8,
    "num_generations_eval": 1,
    "max_turns": 3,
    "max_turn_length": 4,
    "max_steps": 2,
    "learning_rate": 1e-2,
}


def make_trainer(
    tmp_path, tokenizer, model=None, lengths=(1, 90, 90, 90, 90), factory=Corridor, parser=None, **kwargs
):
    return EPOTrainer(
        model or make_model(),
        args=EPOConfig(str(tmp_path), **{**BASE, **kwargs}),
        train_dataset=Dataset.from_dict({"length": [2, 3]}),
        eval_dataset=Dataset.from_dict({"length": list(lengths)}),
        processing_class=tokenizer,
        environment_factory=factory,
        action_parser=parser or (lambda text: "r"),
    )


@pytest.fixture
def temperatures(monkeypatch):
    """The temperature of each sampler that is made."""
    seen = []
    original = CachedTurnSampler.__init__

    def record(self, *args, **kwargs):
        original(self, *args, **kwargs)
        seen.append((kwargs["temperature"], *(p.temperature for p in self.processors if hasattr(p, "temperature"))))

    monkeypatch.setattr(CachedTurnSampler, "__init__", record)
    return seen


class TestTrainer:
    def test_metrics_of_a_panel(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, num_generations_eval=4)
        metrics = trainer.evaluate()
        assert metrics["eval_episode/count"] == 20
        assert metrics["eval_episode/success_rate"] == metrics["eval_episode/return"] == pytest.approx(0.2)
        assert metrics["eval_episode/success_rate/door 1"] == 1.0
        assert metrics["eval_episode/pass@1"] == metrics["eval_episode/pass@4"] == pytest.approx(0.2)
        expected = wilson(1, 5)  # the copies of a row all end alike
        assert (metrics["eval_episode/success_low"], metrics["eval_episode/success_high"]) == pytest.approx(expected)
        assert trainer.state.log_history[-1]["eval_episode/count"] == 20
        assert run_success(trainer.state.log_history).best == pytest.approx(0.2)

    def test_no_forward_but_the_rollouts(self, tmp_path, tokenizer):
        # A turn reads its new tokens only. A loss, or the reference model's log-probs, would read whole episodes.
        folder = str(tmp_path / "model")
        make_model().save_pretrained(folder)
        trainer = make_trainer(tmp_path, tokenizer, folder, beta=0.1, num_iterations=2)
        with shapes_read(trainer.model) as ours, shapes_read(trainer.ref_model) as reference:
            metrics = trainer.evaluate()
        longest_prompt = len(tokenizer("<|im_start|>user\nYou are at 89. The door is at 90.<|im_end|>\n")["input_ids"])
        assert max(width for _, width in ours) < longest_prompt + 40
        assert reference == []
        assert "eval_loss" not in metrics
        assert metrics["eval_reward"] is not None
        trainer.train()  # goes on as ever
        assert trainer.state.global_step == 2

    def test_same_rows_and_seeds_in_order_each_time(self, tmp_path, tokenizer):
        calls = []

        class Noting(Corridor):
            def reset(self, *, seed=None, options=None):
                calls.append((options["length"], seed))
                return super().reset(seed=seed, options=options)

        panels = []
        for seed in (1, 1):
            trainer = make_trainer(
                tmp_path,
                tokenizer,
                factory=Noting,
                lengths=range(2, 8),
                num_generations_eval=2,
                per_device_eval_batch_size=4,
                max_concurrent_episodes=1,
                seed=seed,
            )
            calls.clear()
            trainer.evaluate()
            panels.append(list(calls))
        assert panels[0] == panels[1]
        assert [length for length, _ in panels[0]] == [length for length in range(2, 8) for _ in range(2)]
        assert len(set(panels[0])) == 6

    @pytest.mark.parametrize(
        ("settings", "at_once"),
        [
            ({"per_device_eval_batch_size": 1}, 4),
            ({"per_device_eval_batch_size": 16}, 4),
            ({"max_concurrent_episodes": 3}, 3),
            ({"per_device_eval_batch_size": 1, "num_generations_eval": 3}, 3),  # batches of whole groups
        ],
    )
    def test_plays_as_many_at_once_as_training(self, tmp_path, tokenizer, settings, at_once):
        made = []

        def factory():
            made.append(1)
            return Corridor()

        trainer = make_trainer(tmp_path, tokenizer, factory=factory, **settings)
        metrics = trainer.evaluate()
        assert len(made) == at_once
        assert metrics["eval_episode/count"] == 5 * settings.get("num_generations_eval", 1)
        assert metrics["eval_episode/success_rate"] == pytest.approx(0.2)
        made.clear()
        trainer.predict(trainer.eval_dataset)
        assert not made  # they are kept, and no more are needed
        assert trainer.args.per_device_eval_batch_size == settings.get("per_device_eval_batch_size", 8)

    def test_training_does_not_notice(self, tmp_path, tokenizer):
        states = []
        for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_temperature": 0.4}):
            trainer = make_trainer(tmp_path, tokenizer, parser=lambda text: text, max_steps=3, **settings)
            trainer.train()
            trained = [entry for entry in trainer.state.log_history if "epo/entropy" in entry]
            assert len(trainer.state.log_history) == 4 + 3 * bool(settings)
            weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
            states.append((weights, trainer.entropy_history.state_dict(), [e["epo/policy_loss"] for e in trained]))
        assert torch.equal(states[0][0], states[1][0])
        assert states[0][1:] == states[1][1:]

    def test_same_weights_sample_alike(self, tmp_path, tokenizer):
        texts = []
        trainer = make_trainer(tmp_path, tokenizer, parser=lambda text: texts.append(text) or text, temperature=2.0)
        trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
        first = trainer.evaluate()
        torch.rand(1)
        played = list(texts)
        second = trainer.evaluate()
        assert texts == 2 * played
        assert len(set(played)) > 1
        measures = [name for name in first if "runtime" not in name and "_per_second" not in name]
        assert [first[name] for name in measures] == [second[name] for name in measures]
        assert first["eval_a_episode/return"] == first["eval_b_episode/return"]

    def test_an_interrupted_evaluation_leaves_nothing(self, tmp_path, tokenizer):
        calls = []

        def interrupt(text):
            calls.append(text)
            if len(calls) > 4:
                raise KeyboardInterrupt
            return "r"

        trainer = make_trainer(tmp_path, tokenizer, lengths=(2,) * 8, per_device_eval_batch_size=2, max_turns=1)
        expected = trainer.evaluate()
        trainer._player.action_parser = interrupt
        states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        with pytest.raises(KeyboardInterrupt):
            trainer.evaluate()
        assert states == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        trainer._player.action_parser = lambda text: "r"
        metrics = trainer.evaluate()
        assert metrics["eval_reward"] == expected["eval_reward"]
        assert metrics["eval_rewards/episode_return/std"] == expected["eval_rewards/episode_return/std"]
        assert not any("completions/" in name for name in metrics)  # of rows that fill up the last batch too
        assert metrics["eval_episode/count"] == 8

    def test_predict_leaves_nothing(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer)
        expected = trainer.evaluate()
        assert expected["eval_reward"] == pytest.approx(0.2)
        trainer.predict(Dataset.from_dict({"length": [1] * 8}))
        assert trainer.evaluate()["eval_reward"] == expected["eval_reward"]

    def test_no_rows(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="`train_dataset` is empty"):
            EPOTrainer(
                make_model(),
                args=EPOConfig(str(tmp_path), **BASE),
                train_dataset=Dataset.from_dict({"length": []}),
                processing_class=tokenizer,
                environment_factory=Corridor,
            )


# By default it takes most of the memory for its cache.
CONTINUOUS_BATCHING = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"max_memory_percent": 0.02},
}


class TestTemperature:
    def test_only_in_evaluations(self, tmp_path, tokenizer, temperatures):
        trainer = make_trainer(
            tmp_path, tokenizer, temperature=0.9, eval_temperature=0.4, eval_strategy="steps", eval_steps=1
        )
        trainer.train()
        assert temperatures == [(0.9, 0.9), (0.4, 0.4), (0.9, 0.9), (0.4, 0.4)]

    def test_by_default_the_training_temperature(self, tmp_path, tokenizer, temperatures):
        make_trainer(tmp_path, tokenizer, temperature=0.9).evaluate()
        assert temperatures == [(0.9, 0.9)]

    def test_restored_after_an_exception(self, tmp_path, tokenizer, temperatures):
        def interrupt(text):
            raise KeyboardInterrupt

        trainer = make_trainer(tmp_path, tokenizer, temperature=0.9, eval_temperature=0.4, parser=interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.evaluate()
        assert trainer.temperature == trainer.generation_config.temperature == 0.9
        trainer._player.action_parser = lambda text: "r"
        assert trainer.evaluate()["eval_episode/count"] == 5

    def test_nearly_greedy_evaluations(self, tmp_path, tokenizer):
        texts = []

        def parser(text):
            texts.append(text)
            return "l"

        trainer = make_trainer(
            tmp_path, tokenizer, lengths=[90] * 8, parser=parser, max_turns=1, eval_temperature=1e-5, temperature=5.0
        )
        trainer.eval_dataset = trainer.eval_dataset.add_column("seed", [7] * 8)
        trainer.evaluate()
        assert len(set(texts)) == 1

    @pytest.mark.parametrize("settings", [{}, CONTINUOUS_BATCHING])
    def test_trls_generation(self, tmp_path, tokenizer, settings):
        model = None
        if not settings:  # a model that the cached sampler does not fit
            sizes = {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4}
            model = BloomForCausalLM(BloomConfig(**sizes, bos_token_id=None, eos_token_id=2, pad_token_id=0))
        texts = []

        def parser(text):
            texts.append(text)
            return "l"

        trainer = make_trainer(
            tmp_path, tokenizer, model, [90] * 4, max_turns=1, parser=parser, eval_temperature=1e-5, **settings
        )
        trainer.eval_dataset = trainer.eval_dataset.add_column("seed", [7] * 4)
        trainer.evaluate()
        assert len(set(texts)) == 1
        assert trainer.generation_config.temperature == 1.0

    def test_bad_values(self, tmp_path):
        for value in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="`eval_temperature` is .* above 0"):
                EPOConfig(str(tmp_path), eval_temperature=value)
        with pytest.raises(ValueError, match="no effect beside the `temperature` in `generation_kwargs`"):
            EPOConfig(str(tmp_path), eval_temperature=0.4, generation_kwargs={"temperature": 0.9})


class TestWithoutTextEpisodes:
    def test_temperature_acts_and_the_loss_stays(self, tmp_path, tokenizer):
        completions = []

        def reward(completions, **kwargs):
            seen.extend(completions)
            return [0.0] * len(completions)

        seen = completions
        trainer = EPOTrainer(
            make_model(),
            reward_funcs=reward,
            args=EPOConfig(
                str(tmp_path), **{**BASE, "max_completion_length": 6, "eval_temperature": 1e-5, "temperature": 3.0}
            ),
            train_dataset=Dataset.from_dict({"prompt": ["left"] * 2}),
            eval_dataset=Dataset.from_dict({"prompt": ["right"] * 2}),
            processing_class=tokenizer,
        )
        assert "eval_loss" in trainer.evaluate()
        assert len(set(completions)) == 1
        assert torch.isfinite(torch.cat([weight.flatten() for weight in trainer.model.parameters()])).all()
