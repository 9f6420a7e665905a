"""A run that is stopped after any optimizer step and resumed equals the uninterrupted one, bit by bit."""

import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import Corridor, make_model, make_tokenizer
from datasets import Dataset
from faulty_runs import SETTINGS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from trl_epo import EPOConfig, EPOTrainer


BASE = {**SETTINGS, "max_turns": 3, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
ROWS = Dataset.from_dict({"length": [2, 3, 4, 5, 6]})
# Times, and Trainer's summary at the end, which is of the steps since the resume
NOT_COMPARED = {
    "step_time",
    "rollout/tokens_per_second",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_tokens_per_second",
    "train_loss",
}


class Rewarding(Corridor):
    """Rewards every step to the right, so that there is much to learn."""

    def step(self, action):
        observation, reward, *others = super().step(action)
        return observation, reward + 0.1 * ("r" in action) + 0.01 * len(action), *others


def make_trainer(folder: Path, model: str, **kwargs) -> EPOTrainer:
    return EPOTrainer(
        model,
        args=EPOConfig(str(folder), **{**BASE, **kwargs}),
        train_dataset=ROWS,
        processing_class=make_tokenizer(),
        environment_factory=Rewarding,
    )


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def logs(trainer: EPOTrainer) -> list[dict]:
    return [
        {  # NaN differs from itself
            name: str(value)
            for name, value in entry.items()
            if name not in NOT_COMPARED and not name.startswith(("time/", "memory/"))
        }
        for entry in trainer.state.log_history
    ]


def assert_equal_optimizers(resumed: torch.optim.Optimizer, whole: torch.optim.Optimizer) -> None:
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert json.dumps(ours["param_groups"]) == json.dumps(
        theirs["param_groups"]
    )  # of which the critic's are stored as JSON
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert all(torch.equal(value, ours["state"][index][name]) for name, value in state.items())


def assert_equal(resumed: EPOTrainer, whole: EPOTrainer) -> None:
    assert torch.equal(weights(resumed.model), weights(whole.model))
    if whole._critic is not None:
        assert torch.equal(weights(resumed._critic.model), weights(whole._critic.model))
        assert_equal_optimizers(resumed._critic.optimizer, whole._critic.optimizer)
        assert resumed._critic.schedule.state_dict() == whole._critic.schedule.state_dict()
    assert_equal_optimizers(resumed.optimizer, whole.optimizer)
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    assert resumed.entropy_history.state_dict() == whole.entropy_history.state_dict()
    assert resumed.entropy_coef == whole.entropy_coef
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    assert logs(resumed) == logs(whole)


def assert_same_randomness(resumed: list, whole: list) -> None:
    assert torch.equal(resumed[0], whole[0])
    assert resumed[1] == whole[1]
    assert all(np.array_equal(a, b) for a, b in zip(resumed[2], whole[2], strict=True))


def randomness() -> list:
    return [torch.random.get_rng_state(), random.getstate(), np.random.get_state()]


def check(stop: int, **kwargs) -> None:
    """Resume from the checkpoint of a step, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder, "model"))
        make_model().save_pretrained(model)
        whole = make_trainer(Path(folder, "whole"), model, **kwargs)
        whole.train()
        after = randomness()
        resumed = make_trainer(Path(folder, "resumed"), model, **kwargs)
        resumed.train(resume_from_checkpoint=str(Path(folder, "whole", f"checkpoint-{stop}")))
        assert_same_randomness(randomness(), after)
        assert_equal(resumed, whole)


# The first of each makes the first example.
RUNS = st.fixed_dictionaries(
    {
        "stop": st.sampled_from([3, 1, 2, 4, 5]),
        "num_iterations": st.sampled_from([2, 1, 3]),
        "steps_per_generation": st.sampled_from([2, 1, 3, 4]),
        "gradient_accumulation_steps": st.integers(1, 2),
        "context": st.sampled_from(["window", "transcript"]),
        "advantage_estimator": st.sampled_from(["gae", "grpo", "gigpo", "turn"]),
        "entropy": st.sampled_from(
            [
                {"entropy_coef": 0.5, "entropy_corridor_high": 1.0, "entropy_reference": "turn_history"},
                {"entropy_coef": 0.5, "entropy_corridor_high": 1.0},
                {"entropy_coef": 0.0, "entropy_corridor_coef": 0.5, "entropy_corridor_high": 1.0},
                {"entropy_coef": 0.0, "use_adaptive_entropy": True, "entropy_coef_delta": 0.1, "entropy_target": 9.0},
            ]
        ),
        "beta": st.sampled_from([0.0, 0.1]),
        "logging_steps": st.integers(1, 3),
        "seed": st.integers(0, 99),
    }
)


@settings(
    max_examples=8,
    phases=[Phase.generate],  # a smaller example would cost a hundred runs
    suppress_health_check=list(HealthCheck),
)
@given(RUNS)
def test_resumed_at_any_step(run):
    check(**{name: value for name, value in run.items() if name != "entropy"}, **run["entropy"])
