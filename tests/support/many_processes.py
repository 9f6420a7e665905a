"""
What `test_many_processes.py` starts on each process: `many_processes.py CASES FOLDER` plays each case, one after the
other, and writes what came of it to FOLDER.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import make_model, make_tokenizer
from datasets import Dataset
from faulty_runs import When, limit_files
from peft import LoraConfig

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs import TextEnv
from trl_epo.rollouts.rollout import parse_action
from trl_epo.runs.checkpoints import CheckpointError


NUM_EPISODES = 8  # of a generation batch, over all processes
BEGIN = "begin"  # the folder of the model before training, beside those of the cases
SLOWNESS = 2  # seconds that a slow environment takes for a reset
FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "cpu_ram_efficient_loading": False,
    "state_dict_type": "FULL_STATE_DICT",
}
DEEPSPEED = {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"} | dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu"), "auto"
)


class Placed(TextEnv):
    """What happens depends on the episode's place in the batch and on nothing else: the second half's are longer."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.options, self.place, self.num_steps = options, options.get("place", 0), 0
        if self.place in options.get("broken", ()):
            raise OSError(f"place {self.place} is broken")
        if self.place in options.get("slow", ()):
            time.sleep(SLOWNESS)
        long = 2 * (self.place >= NUM_EPISODES // 2)
        self.turns = 3 if options.get("even") else 1 + self.place % 2 + long
        return "Look! " * (1 + self.place), {}

    def step(self, action):
        self.num_steps += 1
        done = self.num_steps == self.turns
        reward = 0.1 * len(action) + done * (self.place % 3)
        if self.place in self.options.get("flat", ()):
            reward = float(done)
        return f"You are at {self.place + self.num_steps}.", reward, done, False, {"success": self.place % 3 == 2}


class PlacedTrainer(EPOTrainer):
    """Tells the environments each episode's place. In the step `overflow` the last process' gradient is not finite."""

    case = {}

    def prepare_rows(self, rows):
        first = self.accelerator.process_index * len(rows)
        told = {name: self.case[name] for name in ("broken", "even", "flat", "slow") if name in self.case}
        return super().prepare_rows([{**row, **told, "place": first + i} for i, row in enumerate(rows)])

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.accelerator.is_last_process and self.state.global_step == self.case.get("overflow"):
            loss = loss + (loss - loss.detach()).sqrt()  # nothing, with a gradient that is infinite
        return loss


class GeneratingTrainer(PlacedTrainer):
    """Plays as if its model were one that the cache does not fit: by `generate`."""

    _unfit_for_cached_sampler = "a test wants it"


def make_trainer(folder: str, case: dict) -> PlacedTrainer:
    """The trainer of a case; its settings are of all processes together."""
    kind = case.get("kind", "replicated")
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    settings = {
        "max_steps": 3,
        "learning_rate": 0.5,
        "critic_learning_rate": 0.5,
        "optim": "sgd",
        "optim_args": "momentum=0.5",
        "num_generations": 4,
        "max_turns": 6,
        "max_turn_length": 4,
        "top_k": 1,  # greedy: the same episodes on any number of processes
        "environment_patience": float("inf"),
        "env_max_retries": 0,
        "max_failed_fraction": 1.0,
        "entropy_coef": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    } | case["settings"]
    settings["gradient_accumulation_steps"] = settings.pop("micro_batches", 1)
    settings["per_device_train_batch_size"] = NUM_EPISODES // num_processes // settings["gradient_accumulation_steps"]
    settings["per_device_eval_batch_size"] = NUM_EPISODES // num_processes
    AcceleratorState._reset_state(reset_partial_state=True)
    if kind == "fsdp2":
        # Accelerate shards on GPUs only, but its sharding does not need one: tell it that there are some. Backend (gloo) and
        # device (CPU) stay what they are.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        settings |= {"accelerator_config": {"use_configured_state": True}, "fsdp": True, "fsdp_config": FSDP}
    elif kind.startswith("zero"):
        PartialState(cpu=False, backend="gloo")
        zero = {"stage": int(kind[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        settings |= {"accelerator_config": {"use_configured_state": True}, "use_cpu": False}
        settings |= {"deepspeed": DEEPSPEED | {"zero_optimization": zero}}
    args = EPOConfig(folder, **settings)
    model = str(Path(folder).parent / BEGIN) if case.get("from_folder") else make_model(**case.get("model", {}))
    rows = Dataset.from_dict({"prompt": [[]] * 4})
    trainer = (GeneratingTrainer if case.get("generates") else PlacedTrainer)(
        model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(3)),  # twelve episodes: the second batch is not full
        processing_class=make_tokenizer(),
        environment_factory=Placed,
        action_parser=parse_action,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if case.get("lora") else None,
    )
    trainer.case = case
    if trainer.is_world_process_zero():
        for step in case.get("no_room", ()):
            trainer.add_callback(When("on_step_end", step, lambda: limit_files(10_000)))
            trainer.add_callback(When("on_step_begin", step, limit_files))
    return trainer


def outcome(trainer: PlacedTrainer, folder: Path, error: str | None) -> None:
    """Write what came of the training: on the first process also all weights."""
    models = {"policy": trainer.model_wrapped}
    if trainer._critic is not None:
        models["critic"] = trainer._critic.model
    weights = {name: trainer.accelerator.get_state_dict(model) for name, model in models.items()}
    rank = trainer.accelerator.process_index
    state = {
        "logs": trainer.state.log_history,
        "history": trainer.entropy_history.state_dict(),
        "kind": trainer.accelerator.distributed_type.value,
        "world": trainer.accelerator.num_processes,
        "error": error,
    }
    (folder / f"{rank}.json").write_text(json.dumps(state))
    if rank == 0:
        torch.save(weights, folder / "weights.pt")


def play(case: dict, folder: Path) -> None:
    trainer, message = make_trainer(str(folder), case), None
    if case.get("train", True):
        try:
            trainer.train(resume_from_checkpoint=case.get("resume"))
        except CheckpointError as error:
            limit_files()
            message = str(error)
    if case.get("evaluate"):
        trainer.evaluate()
    outcome(trainer, folder, message)


def main(cases: str, folder: str) -> None:
    for name, case in json.loads(cases).items():
        path = Path(folder, name)
        path.mkdir(parents=True, exist_ok=True)
        play(case, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
