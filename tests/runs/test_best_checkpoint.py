"""`load_best_model_at_end` and `save_total_limit` in runs that meet with faults: what is best, and that it stays."""

from pathlib import Path

import pytest
import torch
from conftest import Corridor
from datasets import Dataset
from faulty_runs import When, make_trainer
from safetensors.torch import load_file

from trl_epo import EPOTrainer
from trl_epo.runs.checkpoints import last_whole_checkpoint


ROWS = Dataset.from_dict({"length": [2, 3, 4, 5]})


class Weather(Corridor):
    """A corridor, some of which are closed for a while, with a reward that depends on the day."""

    closed = ()
    reward = 0.0

    def reset(self, *, seed=None, options=None):
        if (options or {}).get("length") in Weather.closed:
            raise OSError("closed")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        observation, _, *others = super().step(action)
        return observation, Weather.reward, *others


@pytest.fixture(autouse=True)
def fair_weather():
    yield
    Weather.closed, Weather.reward = (), 0.0


def make(folder: Path, *callbacks, **kwargs) -> EPOTrainer:
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "save_strategy": "steps",
        "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True, "max_steps": 4, "env_max_retries": 0,
        "max_turns": 1, "steps_per_generation": 1, "num_iterations": 1,
    }  # fmt: skip
    return make_trainer(folder, *callbacks, dataset=ROWS, factory=Weather, **{**settings, **kwargs})


def close(*lengths: int):
    return lambda: setattr(Weather, "closed", lengths)


@pytest.mark.parametrize(
    ("metric", "closed"),
    [
        ("reward", (2, 3, 4, 5)),
        ("episode/success_rate", (2, 3, 4, 5)),
        # With one of four rows played an evaluation says little, however good it looks.
        ("episode/stop/failure", (2, 3, 4)),
    ],
)
def test_an_evaluation_whose_episodes_fail_costs_nothing(tmp_path, caplog, metric, closed):
    faults = When("on_step_end", 2, close(*closed)), When("on_evaluate", 2, close())
    trainer = make(tmp_path, *faults, metric_for_best_model=metric, greater_is_better=True)
    trainer.train()
    assert trainer.state.global_step == 4
    failed = [entry["eval_episode/stop/failure"] for entry in trainer.state.log_history if "eval_runtime" in entry]
    assert failed == [0.0, len(closed) / 4, 0.0, 0.0]
    assert trainer.state.best_global_step == 1
    assert "does not make this checkpoint the best one" in caplog.text


def test_the_best_stays_when_training_stops(tmp_path):
    kwargs = {"metric_for_best_model": "episode/count", "advantage_estimator": "gae", "critic_learning_rate": 1e-2}
    with pytest.raises(RuntimeError, match="4 of 4 episodes failed"):
        make(tmp_path, When("on_step_begin", 3, close(None)), **kwargs).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    Weather.closed = ()
    resumed = make(tmp_path, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.state.global_step, resumed.state.best_global_step) == (4, 1)
    for folder, model in (("", resumed.model), ("critic/model", resumed._critic.model)):
        best, now = load_file(tmp_path / "checkpoint-1" / folder / "model.safetensors"), model.state_dict()
        assert all(torch.equal(weight, now[name]) for name, weight in best.items())


def test_one_that_cannot_be_written_is_not_the_best(tmp_path):
    def rewards(step: int, reward: float) -> When:
        return When("on_step_end", step, lambda: setattr(Weather, "reward", reward))

    days = [rewards(step, reward) for step, reward in enumerate((1.0, 3.0, 2.0, 0.0), start=1)]
    (tmp_path / "checkpoint-2").write_text("in its place")
    trainer = make(tmp_path, *days, metric_for_best_model="reward", greater_is_better=True)
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (3, 2.0)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    # What the card tells of the weights
    step, log = trainer.weights_log
    assert step == 3 and {entry["step"] for entry in log if "eval_runtime" in entry} == {3}
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert (
        "The weights are those after 3 optimizer steps." in text and "Of evaluation, after 3 optimizer steps" in text
    )
    assert "| - | 3 | 16 | " in text
    trainer.evaluate()
    trainer.create_model_card()
    assert "| - | 4 | 16 | " in (tmp_path / "README.md").read_text()
