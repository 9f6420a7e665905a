"""`EPOTrainer` with text environments: real environments, a real model, the real trainer."""

import gc
import weakref
from collections import Counter
from contextlib import contextmanager
from itertools import count

import gymnasium
import pytest
import torch
from conftest import CHATML, PATIENT_RUN, Corridor, make_model
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig
from torch.profiler import profile
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.rollouts.episode import StopReason
from trl_epo.sampling import memory
from trl_epo.sampling.cached import CachedTurnSampler
from trl_epo.sampling.kv_cache import EpisodeCache
from trl_epo.sampling.requests import RequestTurnSampler


BASE = {
    **PATIENT_RUN,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_turns": 4,
    "max_turn_length": 5,
    "max_steps": 2,
    "learning_rate": 1e-2,
}
ROWS = Dataset.from_dict({"length": [2, 3, 4, 5]})


def make_trainer(tmp_path, tokenizer, factory=Corridor, dataset=ROWS, trainer_kwargs=None, model=None, **kwargs):
    return EPOTrainer(
        model or make_model(),
        args=EPOConfig(str(tmp_path), **{**BASE, **kwargs}),
        train_dataset=dataset,
        processing_class=tokenizer,
        environment_factory=factory,
        **(trainer_kwargs or {}),
    )


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "episode/turns" in entry]


class Recording(Corridor):
    """Notes what it is reset with."""

    calls = []

    def reset(self, *, seed=None, options=None):
        Recording.calls.append((seed, options))
        return super().reset(seed=seed, options=options)


@pytest.fixture
def calls():
    Recording.calls = []
    return Recording.calls


class TestTraining:
    def test_weights_change_and_episodes_are_logged(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, max_steps=3)
        before = weights(trainer)
        trainer.train()
        assert not torch.equal(weights(trainer), before)
        first, second, _ = logs(trainer)
        for name in (
            "episode/success_rate",
            "episode/return",
            "episode/turns",
            "episode/invalid_actions",
            "episode/stop/terminated",
            "episode/stop/max_turns",
            "rewards/episode_return/mean",
            "epo/entropy",
            "epo/entropy_early_turns",
            "epo/entropy_late_turns",
            "epo/policy_loss",
            "epo/entropy_bonus",
            "epo/smoothing_loss",
            "epo/phase_weight",
        ):
            assert name in first
        assert any(name.startswith("episode/success_rate/door") for name in first)
        assert "epo/entropy_reference" not in first  # k = 0
        assert second["epo/entropy_reference"] == trainer.entropy_history.means[0]
        stops = [
            first[f"episode/stop/{r}"] for r in ("terminated", "truncated", "max_turns", "token_budget", "failure")
        ]
        assert sum(stops) == pytest.approx(1.0)

    def test_it_learns(self, tmp_path, tokenizer):
        # One turn decides: a text with an "r" is a step to the door, any other one leads away from it.
        dataset = Dataset.from_dict({"length": [1] * 4})
        kwargs = {"max_turns": 1, "max_turn_length": 2, "max_steps": 40, "per_device_train_batch_size": 16}
        trainer = make_trainer(tmp_path, tokenizer, dataset=dataset, num_train_epochs=1, **kwargs, seed=2)
        trainer.train()
        rates = [entry["episode/success_rate"] for entry in logs(trainer)]
        assert sum(rates[-3:]) / 3 > sum(rates[:3]) / 3 + 0.5

    def test_only_sampled_tokens_are_trained(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer)
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        assert torch.equal(mask.bool(), inputs["turn_ids"] >= 0)
        text = tokenizer.batch_decode([ids[m.bool()] for ids, m in zip(inputs["completion_ids"], mask, strict=True)])
        assert not any("You are at" in t for t in text)
        observed = [
            ids[(m == 0) & (c == 1)]
            for ids, m, c in zip(inputs["completion_ids"], mask, inputs["completion_mask"], strict=True)
        ]
        assert any("You are at" in tokenizer.decode(ids) for ids in observed)

    @pytest.mark.parametrize("estimator", ["grpo", "turn", "gae"])
    def test_what_a_limit_cut_off_is_masked_if_asked_for(self, tmp_path, tokenizer, estimator):
        """Whatever token an episode ends with."""

        class Turns(Corridor):
            """Ends as told: after 1 turn by itself, after 2 by its own limit, or not at all."""

            def step(self, action):
                self.num_steps += 1
                return "ok", float("r" in action), self.door == 1, self.door == 2 == self.num_steps, {}

        kwargs = {"mask_truncated_completions": True, "advantage_estimator": estimator, "max_steps": 1}
        kwargs |= {"num_generations": 2, "max_turn_length": 2}
        rows = Dataset.from_dict({"length": [1, 2, 3, 1]})
        trainer = make_trainer(tmp_path, tokenizer, Turns, rows, **kwargs)
        batches, extend = [], trainer.extend_batch
        trainer.extend_batch = lambda batch: batches.append(extend(batch)) or batches[-1]
        before = weights(trainer)
        trainer.train()
        [batch] = batches
        trained = (batch["completion_mask"] * batch["tool_mask"]).bool()
        assert batch["num_items_in_batch"] == trained.sum()
        assert torch.equal(trained, batch["turn_ids"] >= 0)
        ends = Counter()
        for mask, episode in zip(trained.any(dim=1).tolist(), trainer._batch.episodes, strict=True):
            assert mask == (episode.stop_reason is StopReason.TERMINATED), episode.stop_reason
            ends[episode.stop_reason, episode.turns[-1].action_ids[-1] == tokenizer.eos_token_id] += 1
        assert ends[StopReason.TERMINATED, False] and ends[StopReason.TRUNCATED, False]
        assert {reason for reason, _ in ends} >= {StopReason.TERMINATED, StopReason.TRUNCATED, StopReason.MAX_TURNS}
        assert not torch.equal(weights(trainer), before)

    @pytest.mark.parametrize("estimator", ["grpo", "gae"])
    def test_a_batch_of_masked_episodes_alone(self, tmp_path, tokenizer, estimator):
        kwargs = {"mask_truncated_completions": True, "advantage_estimator": estimator, "max_turns": 2}
        trainer = make_trainer(tmp_path, tokenizer, dataset=Dataset.from_dict({"length": [900] * 4}), **kwargs)
        before = weights(trainer)
        trainer.train()
        assert torch.equal(weights(trainer), before)

    def test_kept_logprobs_are_the_training_forwards(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, temperature=0.7)
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, length)
        mask = inputs["turn_ids"] >= 0
        torch.testing.assert_close(
            inputs["sampling_per_token_logps"][mask], logprobs[mask].detach(), atol=1e-4, rtol=1e-4
        )

    def test_same_seed_same_result(self, tmp_path, tokenizer):
        runs = []
        for _ in range(2):
            runs.append(make_trainer(tmp_path, tokenizer))
            runs[-1].train()
        assert torch.equal(weights(runs[0]), weights(runs[1]))
        of_the_clock = ("time", "per_second", "memory/")
        timeless = [
            [{k: v for k, v in entry.items() if not any(part in k for part in of_the_clock)} for entry in logs(run)]
            for run in runs
        ]
        assert timeless[0] == timeless[1]

    def test_micro_batches_do_not_matter(self, tmp_path, tokenizer):
        kwargs = {"entropy_coef": 0.5, "entropy_corridor_low": 0.99, "entropy_corridor_high": 1.0}
        kwargs |= {"optim": "sgd", "learning_rate": 1.0}  # Adam makes much of the rounding in tiny gradients
        whole = make_trainer(tmp_path, tokenizer, **kwargs)
        whole.train()
        split = make_trainer(
            tmp_path, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4, **kwargs
        )
        split.train()
        torch.testing.assert_close(weights(split), weights(whole), atol=1e-7, rtol=1e-6)
        assert split.entropy_history.means == pytest.approx(whole.entropy_history.means, rel=1e-5)

    def test_resume_equals_no_interruption(self, tmp_path, tokenizer):
        kwargs = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        whole = make_trainer(tmp_path / "whole", tokenizer, **kwargs)
        whole.train()
        resumed = make_trainer(tmp_path / "resumed", tokenizer, **kwargs)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert torch.equal(weights(resumed), weights(whole))
        assert resumed.entropy_history.state_dict() == whole.entropy_history.state_dict()


class TestRows:
    def test_a_group_shares_seed_and_options_and_steps_differ(self, tmp_path, tokenizer, calls):
        make_trainer(tmp_path, tokenizer, Recording).train()
        played = calls[1:]  # the first is the check of the first row
        assert len(played) == 16
        groups = Counter((seed, options["length"]) for seed, options in played)  # environments run side by side
        assert set(groups.values()) == {4}
        assert len({seed for seed, _ in groups}) == 4  # a new seed for each group of each step
        assert {length for _, length in groups} <= {2, 3, 4, 5}

    def test_seed_column_and_missing_values(self, tmp_path, tokenizer, calls):
        rows = Dataset.from_dict({"seed": [11, 12], "length": [3, None]})
        make_trainer(tmp_path, tokenizer, Recording, rows).train()
        assert {(seed, tuple(options)) for seed, options in calls[1:]} == {(11, ("length",)), (12, ())}

    def test_without_a_dataset(self, tmp_path, tokenizer, calls):
        trainer = make_trainer(tmp_path, tokenizer, Recording, dataset=None)
        trainer.train()
        assert trainer.state.global_step == 2
        assert all(options == {} for _, options in calls)
        with pytest.raises(ValueError, match="max_steps.*must be positive"):
            make_trainer(tmp_path, tokenizer, dataset=None, max_steps=-1)

    def test_iterable_dataset(self, tmp_path, tokenizer):
        rows = IterableDataset.from_generator(lambda: ({"length": 3} for _ in range(100)))
        trainer = make_trainer(tmp_path, tokenizer, dataset=rows)
        trainer.train()
        assert trainer.state.global_step == 2

    def test_prompt_column_comes_before_the_first_observation(self, tmp_path, tokenizer):
        system = {"role": "system", "content": "Go to the door."}
        seen = []

        def reward(prompts, completions, episodes, **kwargs):
            seen.extend(prompts)
            assert all(c[0]["role"] == "assistant" for c in completions)
            assert all(e.prompt == p for e, p in zip(episodes, prompts, strict=True))
            return [0.0] * len(prompts)

        rows = Dataset.from_dict({"prompt": [[system]] * 4})
        make_trainer(tmp_path, tokenizer, dataset=rows, trainer_kwargs={"reward_funcs": reward}).train()
        assert all(prompt[0] == system for prompt in seen)
        assert all(prompt[1]["content"].startswith("You are at") for prompt in seen)

    def test_dictionary_of_factories(self, tmp_path, tokenizer, calls):
        class Long(Corridor):
            def __init__(self):
                super().__init__(length=50)

        rows = Dataset.from_dict({"environment": ["short", "long", "short", "long"]})
        seen = []

        def reward(episodes, environment, **kwargs):
            seen.extend(
                (e.prompt[-1]["content"].split()[-1], name) for e, name in zip(episodes, environment, strict=True)
            )
            return [0.0] * len(episodes)

        factories = {"short": Recording, "long": Long}
        make_trainer(tmp_path, tokenizer, factories, rows, {"reward_funcs": reward}).train()
        assert set(seen) == {("3.", "short"), ("50.", "long")}


class TestRewards:
    def test_return_is_a_reward_besides_the_users(self, tmp_path, tokenizer):
        def constant(episodes, **kwargs):
            return [2.0] * len(episodes)

        trainer = make_trainer(tmp_path, tokenizer, trainer_kwargs={"reward_funcs": [constant]}, reward_weights=[0.5])
        trainer.train()
        for entry in logs(trainer):
            assert entry["rewards/constant/mean"] == 2.0
            assert entry["reward"] == pytest.approx(1.0 + entry["rewards/episode_return/mean"])

    def test_invalid_actions_are_counted_and_penalised(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path, tokenizer, invalid_action_penalty=0.25, trainer_kwargs={"action_parser": lambda text: None}
        )
        trainer.train()
        for entry in logs(trainer):
            assert entry["episode/invalid_actions"] == 1.0
            assert entry["episode/return"] == 0.0
            assert entry["rewards/episode_return/mean"] == pytest.approx(-0.25 * entry["episode/turns"])


class TestEvaluation:
    def test_the_panel_is_the_same_each_time(self, tmp_path, tokenizer, calls):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            Recording,
            trainer_kwargs={"eval_dataset": ROWS},
            per_device_eval_batch_size=2,
            num_generations_eval=1,
        )
        panels = []
        for _ in range(2):
            calls.clear()
            metrics = trainer.evaluate()
            panels.append(sorted((seed, options["length"]) for seed, options in calls))
            trainer.train()
        assert panels[0] == panels[1]
        assert len(set(panels[0])) == 4
        assert "eval_episode/success_rate" in metrics

    def test_evaluations_before_training_stay_in_its_log(self, tmp_path, tokenizer):
        """The last one of each panel, once, after a resume too."""

        def looks(trainer):
            log = trainer.state.log_history
            return [(e["step"], sorted(panel for panel in "ab" if f"eval_{panel}_runtime" in e)) for e in log]

        settings = {
            "trainer_kwargs": {"eval_dataset": {"a": ROWS, "b": ROWS}},
            "save_strategy": "steps",
            "save_steps": 1,
        }
        trainer = make_trainer(tmp_path, tokenizer, **settings)
        trainer.evaluate()
        trainer.evaluate()
        trainer.train()
        begun = [(0, ["a"]), (0, ["b"])]
        assert looks(trainer)[:3] == [*begun, (1, [])]
        trainer.evaluate()
        trainer.train()  # anew
        assert looks(trainer)[:2] == [(1, []), (2, [])]
        resumed = make_trainer(tmp_path, tokenizer, **settings, max_steps=3)
        resumed.evaluate()
        resumed.train(resume_from_checkpoint=True)
        assert begun[0] not in looks(resumed)  # the second training had none

    def test_several_eval_datasets_keep_their_own_metrics(self, tmp_path, tokenizer):
        panels = {name: Dataset.from_dict({"length": [length] * 4}) for name, length in (("near", 1), ("far", 90))}
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            trainer_kwargs={"eval_dataset": panels, "action_parser": lambda text: "r"},
            per_device_eval_batch_size=4,
        )
        metrics = trainer.evaluate()
        assert metrics["eval_near_episode/success_rate"] == metrics["eval_near_reward"] == 1.0
        assert metrics["eval_far_episode/success_rate"] == metrics["eval_far_reward"] == 0.0

    def test_every_row_counts_once(self, tmp_path, tokenizer):
        # 5 rows in batches of 4 and 1: the mean is over episodes, not over batches.
        rows = Dataset.from_dict({"length": [1, 90, 90, 90, 90]})
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            trainer_kwargs={"eval_dataset": rows, "action_parser": lambda text: "r"},
            per_device_eval_batch_size=4,
            num_generations_eval=1,
        )
        assert trainer.evaluate()["eval_episode/success_rate"] == pytest.approx(0.2)


class Crashing(Corridor):
    """Every other instance crashes in its second step."""

    numbers = count()

    def __init__(self):
        super().__init__()
        self.crashes = next(Crashing.numbers) % 2 == 1

    def step(self, action):
        answer = super().step(action)
        if self.crashes and self.num_steps == 2:
            raise RuntimeError("boom")
        return answer


class TestFaults:
    def test_failed_episodes_are_masked_out_of_loss_and_baseline(self, tmp_path, tokenizer):
        def reward(episodes, **kwargs):
            return [1000.0 if episode.failed else float(len(episode.turns)) for episode in episodes]

        trainer = make_trainer(
            tmp_path, tokenizer, Crashing, trainer_kwargs={"reward_funcs": reward}, env_max_retries=0
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        failed = (inputs["turn_ids"] < 0).all(dim=1)
        assert 0 < failed.sum() < 8
        assert (inputs["advantages"][failed] == 0).all()
        assert trainer._metrics["train"]["reward"][0] < 10  # the 1000s count nowhere
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        assert torch.isfinite(loss)

    def test_the_run_goes_on_and_counts_them(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, Crashing, env_max_retries=0)
        trainer.train()
        assert trainer.state.global_step == 2
        assert any(0 < entry["episode/stop/failure"] < 1 for entry in logs(trainer))
        assert torch.isfinite(weights(trainer)).all()

    def test_a_prompt_that_is_too_long_does_not_pad_the_others(self, tmp_path, tokenizer):
        class Talkative(Corridor):
            numbers = count()

            def __init__(self):
                super().__init__()
                self.words = 5000 if next(Talkative.numbers) == 2 else 0

            def reset(self, **kwargs):
                observation, info = super().reset(**kwargs)
                return observation + " door" * self.words, info

        trainer = make_trainer(tmp_path, tokenizer, Talkative)
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        assert (inputs["turn_ids"] < 0).all(dim=1).sum() == 1
        assert inputs["prompt_ids"].size(1) < 200

    def test_when_all_fail_nothing_is_learned_and_nothing_breaks(self, tmp_path, tokenizer):
        class Broken(Corridor):
            def step(self, action):
                raise RuntimeError("boom")

        trainer = make_trainer(tmp_path, tokenizer, Broken, weight_decay=0.0, max_failed_fraction=1.0)
        before = weights(trainer)
        trainer.train()
        torch.testing.assert_close(weights(trainer), before)
        assert all(entry["episode/stop/failure"] == 1.0 for entry in logs(trainer))
        assert trainer.entropy_history.means == []


@pytest.fixture
def without_collector():
    """CUDA's allocator does not ask for a collection when memory is out, so that caches must go without one."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def live_caches():
    return [thing for thing in gc.get_objects() if type(thing) is EpisodeCache]


class Counting(EPOTrainer):
    """Counts the key/value caches in memory whenever a loss is computed."""

    def compute_loss(self, *args, **kwargs):
        self.counts = [*getattr(self, "counts", []), len(live_caches())]
        return super().compute_loss(*args, **kwargs)


class TestCachesOfRollouts:
    @pytest.mark.parametrize(
        "factory",
        [Corridor, lambda: Corridor(turns=1), Crashing],
        ids=["rows end one by one", "rows end together", "some fail"],
    )
    def test_none_is_left_when_losses_are_computed(self, tmp_path, tokenizer, without_collector, factory):
        trainer = Counting(
            make_model(),
            args=EPOConfig(str(tmp_path), **{**BASE, "max_steps": 6}, env_max_retries=0, max_failed_fraction=1.0),
            train_dataset=ROWS,
            processing_class=tokenizer,
            environment_factory=factory,
        )
        trainer.train()
        assert trainer.counts == [0] * 6

    def test_a_trainer_whose_environments_failed_can_go(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, Crashing)
        trainer.train()
        seen = weakref.ref(trainer)
        del trainer
        gc.collect()
        assert seen() is None

    def test_an_error_in_the_middle_of_a_rollout_holds_no_memory(self, tmp_path, tokenizer, without_collector):
        trainer = make_trainer(tmp_path, tokenizer)
        caches = []

        def interrupt(*args):
            caches.extend(live_caches())
            if caches and caches[0].layers[0].is_initialized:
                raise KeyboardInterrupt

        trainer.model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt) as interruption:
            trainer.train()
        assert caches
        # The traceback holds the frames of the rollout, in a notebook until the next error
        assert live_caches()
        assert all(cache.layers == [] for cache in live_caches())
        caches.clear()
        del interruption
        assert live_caches() == []


class TestBadInput:
    def test_environment_that_cannot_be_reset(self, tmp_path, tokenizer):
        class Picky(Corridor):
            def reset(self, *, seed=None, options=None):
                raise KeyError("no such house")

        with pytest.raises(ValueError, match="Picky could not be reset.*no such house.*check_env"):
            make_trainer(tmp_path, tokenizer, Picky)

    def test_a_plain_class_that_plays_episodes(self, tmp_path, tokenizer):
        class Plain:
            def reset(self, seed=None):
                return "Guess."

            def step(self, action):
                return "No.", 0.0, False, False, {}

        with pytest.raises(ValueError, match="Plain has a `step` but is no `gymnasium.Env`.*derive it from"):
            make_trainer(tmp_path, tokenizer, Plain)

    def test_an_environment_in_place_of_what_makes_it(self, tmp_path, tokenizer):
        for factory in (Corridor(), {"corridor": Corridor()}):
            with pytest.raises(TypeError, match="is a Corridor, but must make one: pass the class"):
                make_trainer(tmp_path, tokenizer, factory)

    def test_environment_whose_observation_is_no_text(self, tmp_path, tokenizer):
        class Grid(gymnasium.Env):
            def reset(self, *, seed=None, options=None):
                return [[0, 1]], {}

        with pytest.raises(ValueError, match="must be a `str`"):
            make_trainer(tmp_path, tokenizer, Grid)

    def test_prompt_that_is_no_chat(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="'Go!'.*list of messages"):
            make_trainer(tmp_path, tokenizer, dataset=Dataset.from_dict({"prompt": ["Go!"] * 4}))

    def test_unknown_environment_name(self, tmp_path, tokenizer):
        rows = Dataset.from_dict({"environment": ["maze"] * 4})
        with pytest.raises(ValueError, match=r"'maze'.*\['corridor'\]"):
            make_trainer(tmp_path, tokenizer, {"corridor": Corridor}, rows)
        with pytest.raises(ValueError, match="environment.*None"):
            make_trainer(tmp_path, tokenizer, {"corridor": Corridor}, ROWS)
        with pytest.raises(ValueError, match="need a `train_dataset`"):
            make_trainer(tmp_path, tokenizer, {"corridor": Corridor}, None)

    def test_tools_and_rollout_func_do_not_go_with_text_episodes(self, tmp_path, tokenizer):
        for kwargs, message in (({"tools": [print]}, "`tools`"), ({"rollout_func": print}, "`rollout_func`")):
            with pytest.raises(ValueError, match=message):
                make_trainer(tmp_path, tokenizer, trainer_kwargs=kwargs)

    def test_dr_grpo_needs_a_length_to_divide_by(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="dr_grpo.*max_completion_length"):
            make_trainer(tmp_path, tokenizer, loss_type="dr_grpo")

    def test_mixed_kinds_of_environments(self, tmp_path, tokenizer):
        class Tools:
            def reset(self):
                return ""

        with pytest.raises(ValueError, match="mixes text environments and TRL tool environments"):
            make_trainer(tmp_path, tokenizer, {"a": Corridor, "b": Tools}, Dataset.from_dict({"environment": ["a"]}))

    def test_tokenizer_without_chat_template(self, tmp_path, tokenizer):
        tokenizer.chat_template = None
        try:
            with pytest.raises(ValueError, match="no chat template"):
                make_trainer(tmp_path, tokenizer)
        finally:
            tokenizer.chat_template = CHATML


class TestWithTrl:
    def test_peft_and_iterations(self, tmp_path, tokenizer):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = make_trainer(
            tmp_path, tokenizer, trainer_kwargs={"peft_config": lora}, num_iterations=2, max_steps=4, beta=0.1
        )
        trainer.train()
        assert trainer.entropy_history.step == 1
        assert all("kl" in entry for entry in trainer.state.log_history if "epo/entropy" in entry)

    def test_gradient_checkpointing_bf16_and_saved_completions(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            bf16=True,
            gradient_checkpointing=True,
            log_completions=True,
            num_completions_to_print=1,
        )
        trainer.train()
        assert trainer.model.training
        assert list((tmp_path / "completions").glob("*.parquet"))

    def test_default_episode_length_is_the_context_window(self, tmp_path, tokenizer):
        assert make_trainer(tmp_path, tokenizer).max_completion_length == 1024
        assert make_trainer(tmp_path, tokenizer, max_completion_length=33).max_completion_length == 33

    def test_a_budget_for_fewer_turns_than_allowed_is_told(self, tmp_path, tokenizer, caplog):
        """As in a script for GRPO, where it is the length of a completion."""
        for enough in ({"max_completion_length": 20}, {}, {"max_completion_length": 12, "context": "window"}):
            make_trainer(tmp_path, tokenizer, **enough)
        assert "max_completion_length" not in caplog.text
        make_trainer(tmp_path, tokenizer, max_completion_length=12)
        assert "`max_completion_length` is 12 tokens for a whole text episode" in caplog.text
        assert "2 turns of `max_turn_length` (5), but `max_turns` is 4" in caplog.text

    @pytest.mark.parametrize("seed", ["3", 1.5, -1, True])
    def test_a_seed_that_is_none(self, tmp_path, tokenizer, seed):
        with pytest.raises(ValueError, match=f"`seed` of the dataset's first row is {seed!r}.*whole number"):
            make_trainer(tmp_path, tokenizer, dataset=Dataset.from_dict({"seed": [seed] * 4}))

    def test_bf16_autocast_samples_what_it_trains(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, bf16=True)
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        score = trainer._get_per_token_logps_and_entropies
        logprobs, _, _ = score(trainer.model, ids, attention, inputs["completion_ids"].size(1))
        mask = inputs["turn_ids"] >= 0
        difference = (inputs["sampling_per_token_logps"][mask] - logprobs[mask].detach()).abs()
        assert 0.0 < float(difference.mean()) < 0.02

    def test_no_more_environments_than_concurrent_episodes(self, tmp_path, tokenizer):
        made = []

        def factory():
            made.append(1)
            return Corridor()

        trainer = make_trainer(tmp_path, tokenizer, factory, max_concurrent_episodes=3)
        trainer.train()
        assert trainer.state.global_step == 2
        assert len(made) == 3
        assert all(entry["episode/late_answers"] == 0.0 for entry in logs(trainer))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"generation_kwargs": {"num_beams": 2}}, r"cannot honour the generation settings \['num_beams'\]"),
            (
                {"generation_kwargs": {"n": 2}, "use_transformers_continuous_batching": True},
                r"`generation_kwargs` sets \['n'\]",
            ),
            (
                {"bf16": True, "use_transformers_continuous_batching": True},
                "TRL casts the model to torch.bfloat16 and leaves it so, but the weights that are trained are torch.float32",
            ),
        ],
    )
    def test_generation_settings_that_cannot_be_honoured(self, tmp_path, tokenizer, settings, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, tokenizer, **settings)

    def test_a_model_on_several_devices_is_refused(self, tmp_path, tokenizer):
        model = make_model()
        model.hf_device_map = {"model": 0, "lm_head": 1}
        with pytest.raises(ValueError, match="spread over 2 devices.*`accelerate launch`"):
            make_trainer(tmp_path, tokenizer, model=model)

    def test_prompt_tuning_is_refused(self, tmp_path, tokenizer):
        peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        with pytest.raises(ValueError, match="prompt-learning adapter"):
            make_trainer(tmp_path, tokenizer, trainer_kwargs={"peft_config": peft_config})

    def test_frozen_weights_are_cast_once_for_a_rollout(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, bf16=True, trainer_kwargs={"peft_config": LoraConfig(r=2)})
        frozen = [weight for weight in trainer.model.parameters() if not weight.requires_grad]
        with trainer.turn_sampler() as sampler, profile(record_shapes=True) as profiler:
            sampler.add(0, [5, 6, 7], 20)
            while sampler.is_busy:
                sampler.advance()
        shapes = [list(weight.shape) for weight in frozen if weight.dim() == 2]
        casts = [e for e in profiler.events() if e.name == "aten::_to_copy" and e.input_shapes[0] in shapes]
        assert 0 < len(casts) <= len(shapes)
        assert not any(weight.requires_grad for weight in frozen)

    @pytest.mark.parametrize(
        ("architecture", "config", "sizes"),
        [
            (BloomForCausalLM, BloomConfig, {"n_layer": 2, "n_head": 4}),
            (MambaForCausalLM, MambaConfig, {"num_hidden_layers": 2, "state_size": 4}),  # has no attention heads
        ],
    )
    def test_trls_generation_for_models_that_do_not_fit(
        self, tmp_path, tokenizer, monkeypatch, architecture, config, sizes
    ):
        monkeypatch.setattr(memory, "PIECE_BYTES", 1)  # each turn by itself
        config = config(vocab_size=400, hidden_size=32, bos_token_id=None, eos_token_id=2, pad_token_id=0, **sizes)
        args = EPOConfig(str(tmp_path), **BASE)
        trainer = EPOTrainer(
            architecture(config),
            args=args,
            train_dataset=ROWS,
            processing_class=tokenizer,
            environment_factory=Corridor,
        )
        generate, rows = trainer.model.generate, []
        monkeypatch.setattr(
            trainer.model, "generate", lambda input_ids, **kw: rows.append(len(input_ids)) or generate(input_ids, **kw)
        )
        trainer.train()
        assert set(rows) == {1}
        assert trainer.model.training
        assert all(entry["episode/turns"] > 1 for entry in logs(trainer))
        assert all(entry["episode/stop/failure"] == 0 for entry in logs(trainer))

    def test_the_loss_keeps_an_attention_that_rollouts_cannot_use(self, tmp_path, tokenizer, monkeypatch):
        calls = Counter()

        def noted(*args, **kwargs):  # takes what sdpa takes, but is not known to do so
            calls["sampling" if sampling else "loss"] += 1
            return sdpa_attention_forward(*args, **kwargs)

        sampling = []
        original = EPOTrainer.turn_sampler

        @contextmanager
        def turn_sampler(trainer, *args):
            with original(trainer, *args) as used:
                assert type(used) is CachedTurnSampler
                sampling.append(True)
                yield used
                sampling.pop()

        monkeypatch.setattr(EPOTrainer, "turn_sampler", turn_sampler)
        AttentionInterface.register("noted", noted)
        AttentionMaskInterface.register("noted", sdpa_mask)
        trained = []
        for implementation in ("noted", "sdpa"):
            model = make_model()
            model.set_attn_implementation(implementation)
            trainer = make_trainer(tmp_path, tokenizer, model=model)
            trainer.train()
            assert trainer.model.config._attn_implementation == implementation
            trained.append(weights(trainer))
        assert calls["loss"] > 0
        assert calls["sampling"] == 0
        assert torch.equal(*trained)

    @pytest.mark.parametrize(("original_length", "sampler"), [(32, RequestTurnSampler), (512, CachedTurnSampler)])
    def test_rotations_that_change_with_the_context(self, tmp_path, tokenizer, original_length, sampler):
        config = Phi3Config(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            original_max_position_embeddings=original_length,
            rope_parameters={"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
        trainer = EPOTrainer(
            Phi3ForCausalLM(config),
            args=EPOConfig(str(tmp_path), **BASE),
            train_dataset=ROWS,
            processing_class=tokenizer,
            environment_factory=Corridor,
        )
        with trainer.turn_sampler() as used:
            assert type(used) is sampler
        trainer.train()
        assert all(entry["episode/stop/failure"] == 0 for entry in logs(trainer))

    def test_a_second_training_begins_a_new_history(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer)
        trainer.train()
        first = trainer.entropy_history
        trainer.train()
        assert trainer.entropy_history is not first
        assert trainer.entropy_history.step == 1

    def test_a_grpo_baseline_logs_the_same_entropies(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, entropy_coef=0.0)
        trainer.train()
        last = logs(trainer)[-1]
        assert last["epo/entropy"] == pytest.approx(last["entropy"], rel=1e-5)
        assert "epo/corridor_high" in last
        assert "epo/entropy_bonus" not in last

    def test_model_card_tells_how_the_agent_did(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer)
        trainer.train()
        trainer.create_model_card(model_name="walker")
        card = (tmp_path / "README.md").read_text()
        rate = logs(trainer)[-1]["episode/success_rate"]
        assert f"| `episode/success_rate` | 2 | {rate:.3f} |" in card

    def test_saving_the_state_is_still_the_trainers(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer)
        trainer.save_state()
        assert (tmp_path / "trainer_state.json").exists()
