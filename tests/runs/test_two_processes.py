"""Two real processes (gloo, CPU): one entropy history, groups that span both, panels whose rows count once."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pyarrow.parquet as pq
import torch
from conftest import Corridor, child_environment, make_model, make_tokenizer
from datasets import Dataset

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.runs import gloo


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


class Uneven(Recording):
    """On the second process every episode ends after one turn."""

    def __init__(self):
        super().__init__()
        self.turns = 6 if os.environ["RANK"] == "0" else 1


def train(folder: str, settings: dict) -> None:
    args = EPOConfig(
        folder,
        **settings,
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
    factory = Uneven if args.entropy_reference == "turn_history" else Recording
    trainer = EPOTrainer(make_model(), args=args, processing_class=make_tokenizer(), environment_factory=factory)
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
        "slopes": [
            entry["epo/corridor_slope"] for entry in trainer.state.log_history if "epo/corridor_slope" in entry
        ],
        "critic": trainer._critic and sum(float(w.double().abs().sum()) for w in trainer._critic.model.parameters()),
        "turns": [entry["episode/turns"] for entry in trainer.state.log_history if "episode/turns" in entry],
    }
    Path(folder, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(state))


def evaluate(folder: str, settings: dict) -> None:
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
        **settings,
    )
    gloo._wait = Path(folder, f"waited{os.environ['RANK']}").touch  # when this process ends
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


def launch(script: str | Path, *arguments: str, **kwargs) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen([*launcher, script, *arguments], env=child_environment(), text=True, **kwargs)


def run(folder: Path, what: str = "train", **settings) -> tuple[dict, dict]:
    """What each of two processes says of a training or an evaluation."""
    process = launch(__file__, what, str(folder), json.dumps(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    errors = process.communicate(timeout=900)[1]
    assert process.returncode == 0, errors[-3000:]
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))
    return first, second


def test_every_row_of_a_panel_counts_as_often_as_it_should(tmp_path):
    first, second = run(tmp_path, "evaluate")
    assert {path.name for path in tmp_path.glob("waited*")} == {"waited0", "waited1"}
    for state in (first, second):
        assert state["metrics"]["eval_many_episode/count"] == 6
        assert state["metrics"]["eval_many_episode/success_rate"] == 2 / 6
        assert state["metrics"]["eval_many_episode/pass@2"] == 1 / 3
        assert state["metrics"]["eval_many_episode/stop/failure"] == 0.0
        assert state["metrics"]["eval_one_episode/count"] == 2
        assert state["metrics"]["eval_one_episode/success_rate"] == state["metrics"]["eval_one_reward"] == 1.0
    # All are kept, by their places, those of both processes in one file.
    for panel, doors in (("many", [1, 1, 90, 90, 90, 90]), ("one", [1, 1])):
        rows = pq.read_table(tmp_path / "episodes" / "eval" / panel / "step-000000.parquet").to_pylist()
        assert [(row["row"], json.loads(row["options"])["length"]) for row in rows] == list(enumerate(doors))
        assert [row["group"] for row in rows] == [index // 2 for index in range(len(rows))]
        assert all(turn["entropies"] for row in rows for turn in row["turns"])
    # Rows 0 and 2 and the other panel's row are the first process's; what would fill up a batch is not played.
    assert [len(first["seeds"]), len(second["seeds"])] == [6, 2]
    assert first["seeds"][0] == first["seeds"][1] != second["seeds"][0] == second["seeds"][1]


def test_history_weights_and_groups_are_shared(tmp_path):
    first, second = run(tmp_path)
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


def test_references_by_turn_are_shared(tmp_path):
    # One process sees turns that the other does not.
    first, second = run(tmp_path, entropy_reference="turn_history", entropy_coef=0.5, entropy_corridor_high=1.0)
    assert first["history"] == second["history"]
    assert first["weights"] == second["weights"]
    assert [len(means) for means in first["history"]["turn_means"]] == [2, 2, 2]


def test_side_of_the_batchs_corridor_is_shared(tmp_path):
    first, second = run(
        tmp_path, entropy_coef=0.0, entropy_corridor_coef=0.5, entropy_corridor_high=1.0, entropy_reference="linear"
    )
    assert first["history"] == second["history"]
    assert first["weights"] == second["weights"]
    assert first["slopes"] == second["slopes"] == [0, 1, 1]


def test_windows_and_a_critic(tmp_path):
    # Contexts differ in number and length from process to process.
    first, second = run(tmp_path, context="window", advantage_estimator="gae", critic_learning_rate=1e-2)
    assert first["history"] == second["history"]
    assert first["weights"] == second["weights"]
    assert first["critic"] == second["critic"]
    assert first["training_forwards"] > 3 and second["training_forwards"] > 3


COLLECTIVES = """
import torch
from trl_epo.runs.gloo import let_gloo_finish
torch.distributed.init_process_group("gloo")
let_gloo_finish()
for _ in range(5):
    torch.distributed.all_reduce(torch.ones(1000))
"""


def test_processes_end_well_just_after_a_collective(tmp_path):
    # Without a wait about half of them abort; side by side they disturb each other, which makes it more.
    (tmp_path / "collectives.py").write_text(COLLECTIVES)
    runs = [launch(tmp_path / "collectives.py", stderr=subprocess.PIPE) for _ in range(3)]
    for process in runs:
        errors = process.communicate(timeout=900)[1]
        assert process.returncode == 0, errors[-3000:]


if __name__ == "__main__":
    {"train": train, "evaluate": evaluate}[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3]))
