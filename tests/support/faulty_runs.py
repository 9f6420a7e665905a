"""Runs in processes of their own, to be interrupted and killed: `python faulty_runs.py FUNCTION FOLDER`."""

import atexit
import faulthandler
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from conftest import PATIENT_RUN, Corridor, child_environment, make_model, make_tokenizer, wait_for
from transformers import TrainerCallback

from trl_epo import EPOConfig, EPOTrainer, cli
from trl_epo.runs.checkpoints import last_whole_checkpoint


SETTINGS = {
    **PATIENT_RUN,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_turns": 2,
    "max_turn_length": 4,
    "max_steps": 7,
    "learning_rate": 1e-2,
    "entropy_coef": 0.5,
}


class Poisoned(EPOTrainer):
    """Its loss, but not the gradient, is infinite in the first micro-batch of some steps, counted from 0."""

    poisoned_steps = ()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        first = self.optimizer_micro_step % self.args.gradient_accumulation_steps == 0
        return loss + math.inf if first and self.state.global_step in self.poisoned_steps else loss


def make_trainer(
    folder: Path, *callbacks, dataset=None, trainer_class=EPOTrainer, factory=Corridor, **kwargs
) -> EPOTrainer:
    return trainer_class(
        make_model(),
        args=EPOConfig(str(folder), **{**SETTINGS, **kwargs}),
        eval_dataset=dataset,
        processing_class=make_tokenizer(),
        environment_factory=factory,
        callbacks=list(callbacks),
    )


def weights(trainer: EPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def same(first: EPOTrainer, second: EPOTrainer) -> bool:
    histories = [trainer.entropy_history.state_dict() for trainer in (first, second)]
    return torch.equal(weights(first), weights(second)) and histories[0] == histories[1]


def kept(folder: Path, *names: str) -> dict[str, list[dict]]:
    """The kept episodes of a run, by file; only those of some files, if they are named."""
    files = {path.relative_to(folder / "episodes").as_posix(): path for path in folder.rglob("*.parquet")}
    return {name: pq.read_table(files[name]).to_pylist() for name in sorted(names or files)}


def say(text: str) -> None:
    """Tell the test, in one piece, whatever other processes write."""
    sys.stdout.write(text + "\n")


class When(TrainerCallback):
    """Calls something when a step has had an event."""

    def __init__(self, event: str, step: int, act):
        def happen(args, state, control, **kwargs):
            if state.global_step == step:
                act()

        setattr(self, event, happen)


def limit_files(size: int = resource.RLIM_INFINITY) -> None:
    """No file of this process can be larger, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Steps(TrainerCallback):
    """Tells of each step on standard output; at the end of the third it waits for a signal and for the file `go`."""

    def __init__(self, trainer: EPOTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        say(f"step {state.global_step}")
        if state.global_step == 3:
            wait_for(lambda: self.trainer._interruption.requested and Path(args.output_dir, "go").exists())


class Halt(TrainerCallback):
    """Waits to be killed when it has seen two checkpoints."""

    num_seen = 0

    def on_save(self, args, state, control, **kwargs):
        self.num_seen += 1
        if self.num_seen == 2:
            time.sleep(600)


def start(function: str, folder: Path, processes: int = 1) -> subprocess.Popen:
    """Call a function of this file in another process, or in several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with open(folder / "stderr.txt", "w") as errors:
        return subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else ()), __file__, function, str(folder)],
            env=child_environment(PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stdout:
        if line.strip() == f"step {step}":
            return
    raise AssertionError(f"The run ended before step {step}.")


def one(folder: Path) -> None:
    """A run that leaves files where a `finally` and an `atexit` come by."""
    rank = os.environ.get("RANK", "0")
    atexit.register(lambda: Path(folder, f"atexit{rank}").touch())
    trainer = make_trainer(folder)
    trainer.add_callback(Steps(trainer))
    try:
        trainer.train()
    except KeyboardInterrupt:
        Path(folder, f"ctrl-c{rank}").write_text(str(trainer.state.global_step))
        raise
    finally:
        Path(folder, f"finally{rank}").touch()


def two(folder: Path) -> None:
    """
    On two processes: a run that is interrupted on one of them and resumed, compared to one that is not; and another run
    until it is interrupted.
    """
    rank = int(os.environ["RANK"])
    kwargs = {"num_generations": 8, "max_steps": 5, "keep_episodes": 6}
    whole = make_trainer(folder / "whole", **kwargs)
    whole.train()
    terminates = When("on_step_end", 3, lambda: rank == 1 and signal.raise_signal(signal.SIGTERM))
    try:
        make_trainer(folder / "stopped", terminates, **kwargs).train()
    except SystemExit as exit:
        code = exit.code
    resumed = make_trainer(folder / "stopped", **kwargs)
    resumed.train(resume_from_checkpoint=True)
    results = {"code": code, "checkpoint": last_whole_checkpoint(folder / "stopped"), "same": same(resumed, whole)}
    whole.accelerator.wait_for_everyone()  # the first process writes what all have played
    results["kept"] = kept(folder / "whole")
    results["same episodes"] = results["kept"] == kept(folder / "stopped")
    poisoned = make_trainer(folder / "poisoned", trainer_class=Poisoned, **kwargs)
    poisoned.poisoned_steps = (1, 2) if rank == 1 else ()
    poisoned.train()
    results["nonfinite"] = [entry["faults/nonfinite_steps"] for entry in poisoned.state.log_history[:-1]]
    results["weights"] = weights(poisoned).tolist()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))
    one(folder / "last")


def kills(folder: Path) -> None:
    """
    Kills a run at a random moment of writing a checkpoint, and resumes it until it is through; says which checkpoint was
    whole each time, and whether the end is that of a run that nobody killed.
    """
    draw = random.Random(0)
    kwargs = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 8}

    def has_ended(child: int) -> bool:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def train(where: Path, *callbacks: TrainerCallback) -> int:
        """In a fork, since this takes a fraction of a new process's time."""
        child = os.fork()
        if not child:
            try:
                sys.stdout = sys.stderr
                resume = where.exists() and last_whole_checkpoint(where) is not None
                trainer = make_trainer(where, *callbacks, **kwargs)
                trainer.train(resume_from_checkpoint=resume)
                torch.save([weights(trainer), json.dumps(trainer.entropy_history.state_dict())], where / "end.pt")
                os._exit(0)
            finally:
                os._exit(1)
        return child

    os.waitpid(train(folder / "whole"), 0)
    times = [path.stat().st_mtime for path in Path(folder, "whole", "checkpoint-8").rglob("*") if path.is_file()]
    killed = folder / "killed"
    for _ in range(12):
        before = set(killed.glob("checkpoint-*"))
        child = train(killed, Halt())  # so that it is not through if this process comes late
        while set(killed.glob("checkpoint-*")) <= before and not has_ended(child):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0.0, 1.5 * (max(times) - min(times))))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        say(f"killed {sorted(path.name for path in killed.glob('checkpoint-*'))} {last_whole_checkpoint(killed)}")
    else:
        os.waitpid(train(killed), 0)
    ends = [torch.load(folder / name / "end.pt") for name in ("whole", "killed")]
    say("same" if torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1] else "different")
    say("same episodes" if kept(folder / "whole") == kept(killed) else "different episodes")


def full_disk(folder: Path) -> None:
    """Two of a run's checkpoints, the last one included, cannot be written: there is no room for large files."""
    trainer = make_trainer(
        folder / "run",
        *(When("on_step_end", step, lambda: limit_files(10_000)) for step in (3, 7)),
        When("on_step_begin", 3, limit_files),
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    try:
        trainer.train()
    except Exception as error:
        limit_files()
        say(json.dumps([type(error).__name__, str(error), trainer.state.global_step]))


def views(folder: Path) -> None:
    """On two processes, each of which looks for its run in a folder of its own: `True`, and `--resume`."""
    where = folder / f"view{os.environ['RANK']}"
    try:
        make_trainer(where).train(resume_from_checkpoint=True)
    except ValueError as error:
        Path(folder, f"refused{os.environ['RANK']}").write_text(str(error))
    flags = {**SETTINGS, "environment": "conftest:Corridor", "model_name_or_path": folder / "model", "max_steps": 1}
    flags = [part for name, value in {**flags, "output_dir": where}.items() for part in (f"--{name}", str(value))]
    cli.main(["train", *flags, "--resume"])  # which ends the talk between processes


if __name__ == "__main__":
    faulthandler.dump_traceback_later(600, exit=True)  # rather than hang
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script has what it starts in the background ignore it
    globals()[sys.argv[1]](Path(sys.argv[2]))
