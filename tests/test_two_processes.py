"""Two real processes (gloo, CPU): one entropy history, groups that span both, panels whose rows count once."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import torch
from conftest import Corridor, make_model, make_tokenizer
from datasets import Dataset

from trl_epo import EPOConfig, EPOTrainer


class Recording(Corridor):
    """Notes its seeds. On the first process one environment begins with a long text, on the second none."""

    seeds = []
    numbers = count()

    def __init__(self):
        super().__init__()
        self.is_long = next(Recording.numbers) == 1 and os.environ["RANK"] == "0"

    def reset(self, *, seed=None, options=None):
        Recording.seeds.append(seed)
        observation, info = super().reset(seed=seed, options=options)
        return observation + " Look!" * 150 * self.is_long, info


def train(folder: str) -> None:
    args = EPOConfig(
        folder,
        per_device_train_batch_size=4,
        num_generations=8,  # more than a process holds
        max_turns=3,
        max_turn_length=4,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = EPOTrainer(make_model(), args=args, processing_class=make_tokenizer(), environment_factory=Recording)
    forwards = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(torch.is_grad_enabled()), with_kwargs=True
    )
    trainer.train()
    state = {
        "training_forwards": sum(forwards),
        "history": trainer.entropy_history.state_dict(),
        "seeds": Recording.seeds[1:],
        "weights": sum(float(parameter.double().abs().sum()) for parameter in trainer.model.parameters()),
        "turns": [entry["episode/turns"] for entry in trainer.state.log_history if "episode/turns" in entry],
    }
    Path(folder, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(state))


def evaluate(folder: str) -> None:
    """Panels whose last batch is not full: 3 rows and 1 row, of which two episodes are played, two on a process."""
    args = EPOConfig(
        folder,
        per_device_eval_batch_size=2,
        num_generations_eval=2,
        per_device_train_batch_size=2,
        num_generations=2,
        max_turns=3,
        max_turn_length=4,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    lengths = {"many": [1, 90, 90], "one": [1]}
    trainer = EPOTrainer(
        make_model(),
        args=args,
        eval_dataset={name: Dataset.from_dict({"length": each}) for name, each in lengths.items()},
        processing_class=make_tokenizer(),
        environment_factory=Recording,
        action_parser=lambda text: "r",
    )
    Recording.seeds.clear()
    state = {"metrics": trainer.evaluate(), "seeds": Recording.seeds}
    Path(folder, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(state))


def run(tmp_path, what: str) -> list[dict]:
    """The states that the two processes write."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [*launcher, __file__, what, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_every_row_of_a_panel_counts_as_often_as_it_should(tmp_path):
    first, second = run(tmp_path, "evaluate")
    for state in (first, second):
        assert state["metrics"]["eval_many_episode/count"] == 6
        assert state["metrics"]["eval_many_episode/success_rate"] == 2 / 6
        assert state["metrics"]["eval_many_episode/pass@2"] == 1 / 3
        assert state["metrics"]["eval_many_episode/stop/failure"] == 0.0
        assert state["metrics"]["eval_one_episode/count"] == 2
        assert state["metrics"]["eval_one_episode/success_rate"] == state["metrics"]["eval_one_reward"] == 1.0
    # Rows 0 and 2 and the other panel's row are the first process's; what would fill up a batch is not played.
    assert [len(first["seeds"]), len(second["seeds"])] == [6, 2]
    assert first["seeds"][0] == first["seeds"][1] != second["seeds"][0] == second["seeds"][1]


def test_history_weights_and_groups_are_shared(tmp_path):
    first, second = run(tmp_path, "train")
    assert first["history"] == second["history"]
    assert len(first["history"]["means"]) == 2
    assert first["weights"] == second["weights"]
    # One process needs more forwards than the other, and neither waits for ever.
    assert (first["training_forwards"], second["training_forwards"]) == (6, 3)
    # A group of eight: four episodes on each process, one seed; a new one each step.
    assert first["seeds"] == second["seeds"]
    assert [first["seeds"].count(seed) for seed in sorted(set(first["seeds"]))] == [4, 4, 4]
    saved = json.loads((tmp_path / "checkpoint-3" / "entropy_history.json").read_text())
    assert saved == first["history"]


if __name__ == "__main__":
    {"train": train, "evaluate": evaluate}[sys.argv[1]](sys.argv[2])
