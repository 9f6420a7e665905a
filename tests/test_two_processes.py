"""Two real processes (gloo, CPU): one entropy history, and groups that span both."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import torch
from conftest import Corridor, make_model, make_tokenizer

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


def test_history_weights_and_groups_are_shared(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [*launcher, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
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
    train(sys.argv[1])
