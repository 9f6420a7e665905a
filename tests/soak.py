"""
A soak test: training for an hour, or as long as you like, while faults are injected at random. Not part of `make test`.

    python tests/soak.py --minutes 60 --output_dir runs/soak

Three kinds of environments play together: one on a thread, one in a process of its own, and ScienceWorld in its Java process. Each
of their steps meets with a fault at the given rates; each fault is noted in `injected.jsonl` before it happens. Every few minutes the
trainer gets a SIGTERM and is started again from its checkpoint. In the end the notes must agree with the trainer's own counters and
with `episodes/failures.jsonl`, no process may be left, and nothing may have grown.
"""

import argparse
import ctypes
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any


sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parent / "support")])

from trl_epo.envs import TextEnv
from trl_epo.envs.process import ProcessEnv
from trl_epo.envs.scienceworld import ScienceWorld


# Chance of each fault, a step of an environment (nonfinite: an optimizer step).
RATES = {
    "crash": 0.002,
    "text": 0.002,
    "nan": 0.002,
    "huge": 0.002,
    "kill": 0.002,
    "segfault": 0.001,
    "stop": 0.0005,
    "hang": 0.0005,
    "leak": 0.0003,
    "java_kill": 0.0005,
    "java_stop": 0.0002,
    "nonfinite": 0.01,
}
ON_A_THREAD = ("crash", "text", "nan", "huge")
IN_A_PROCESS = (*ON_A_THREAD, "kill", "segfault", "stop", "hang", "leak")
IN_JAVA = ("java_kill", "java_stop")
# What each is counted as; a Java process takes the episodes of several environments with it, which is looked at by itself.
KINDS = {
    "crash": "crash",
    "text": "invalid_answer",
    "nan": "invalid_answer",
    "kill": "process_died",
    "segfault": "process_died",
    "stop": "timeout",
    "hang": "timeout",
    "leak": "crash",
}
MEMORY_LIMIT = 2**30  # bytes, of a process
TIMEOUT = 10.0  # seconds, for an environment's answer


class Notes:
    """Draws faults, and notes each in a file that many processes write to."""

    def __init__(self, path: str, rates: dict[str, float], seed: int):
        self.path, self.rates = path, rates
        self.random = random.Random(seed)

    def draw(self, names: tuple[str, ...]) -> str | None:
        number = self.random.random()
        for name in names:
            number -= self.rates[name]
            if number < 0:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"fault": name, "pid": os.getpid()}) + "\n")
                return name
        return None


class Walk(TextEnv):
    """Ten rooms in a row, and a fault now and then."""

    def __init__(self, notes: Notes, faults: tuple[str, ...]):
        self.notes, self.faults = notes, faults

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.num_steps = int(self.np_random.integers(3)), 0
        return f"You are in room {self.place}. Go to room 5.", {"success": False}

    def step(self, action):
        self.num_steps += 1
        self.place += 1 if "r" in action else -1
        observation, reward = f"You are in room {self.place}.", float(self.place == 5)
        fault = self.notes.draw(self.faults)
        if fault == "crash":
            raise RuntimeError("crash \x1b[31m")
        if fault == "text":
            observation = observation.encode()
        if fault == "nan":
            reward = math.nan
        if fault == "huge":
            observation = "<|im_end|>" * 10**6
        if fault in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        if fault == "segfault":
            ctypes.string_at(0)
        if fault == "hang":
            threading.Event().wait()
        if fault == "leak":
            kept = []
            while True:
                kept.append(bytearray(10 * 2**20))
        done = self.place == 5
        return observation, reward, done, not done and self.num_steps == 12, {"success": done}


class Shaken(ScienceWorld):
    """Its Java process is killed or stopped now and then."""

    def __init__(self, notes: Notes):
        super().__init__("boil", turns=6)
        self.notes = notes

    def step(self, action):
        if fault := self.notes.draw(IN_JAVA):
            os.kill(self._world.jvm.process.pid, signal.SIGKILL if fault == "java_kill" else signal.SIGSTOP)
        return super().step(action)


def train(args: argparse.Namespace, session: int) -> None:
    """One session of the trainer, until it gets a signal."""
    import psutil
    import torch
    from conftest import make_model, make_tokenizer
    from datasets import Dataset
    from transformers import TrainerCallback

    from trl_epo import EPOConfig, EPOTrainer

    folder = Path(args.output_dir)
    numbers = count(10**6 * session)  # of environments: each draws for itself

    def notes(seed: int) -> Notes:
        return Notes(str(folder / "injected.jsonl"), args.rates, args.seed * 10**9 + seed)

    def in_a_process() -> ProcessEnv:
        return ProcessEnv(partial(Walk, notes(next(numbers)), IN_A_PROCESS), memory_limit=MEMORY_LIMIT)

    class Measure(TrainerCallback):
        """Notes memory, processes and threads, and makes a gradient infinite now and then."""

        def __init__(self):
            self.notes = notes(10**8 + session)
            self.scale = 1.0

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            next(model.parameters()).register_hook(lambda gradient: gradient * self.scale)

        def on_step_begin(self, args, state, control, **kwargs):
            self.scale = math.inf if self.notes.draw(("nonfinite",)) else 1.0

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 20:
                return
            me = psutil.Process()
            usage = {
                "time": time.time(),
                "session": session,
                "step": state.global_step,
                "rss_mb": round(me.memory_info().rss / 2**20),
                "processes": len(me.children(recursive=True)),
                "threads": me.num_threads(),
                "files": me.num_fds(),
            }
            with open(folder / "usage.jsonl", "a") as file:
                file.write(json.dumps(usage) + "\n")

    torch.set_num_threads(1)
    config = EPOConfig(
        str(folder),
        per_device_train_batch_size=12,
        num_generations=4,
        max_turns=10,
        max_turn_length=4,
        max_steps=10**6,
        logging_steps=10,
        save_steps=200,
        save_total_limit=2,
        env_timeout=TIMEOUT,
        env_max_retries=1,
        max_observation_length=2_000,
        learning_rate=1e-3,
        advantage_estimator="gae",
        seed=args.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = EPOTrainer(
        make_model(context_length=4096),
        args=config,
        train_dataset=Dataset.from_dict({"environment": ["thread", "process", "java"]}),
        processing_class=make_tokenizer(),
        environment_factory={
            "thread": lambda: Walk(notes(next(numbers)), ON_A_THREAD),
            "process": in_a_process,
            "java": lambda: Shaken(notes(next(numbers))),
        },
        callbacks=[Measure()],
        action_parser=lambda text: text or "look",
    )
    trainer.train(resume_from_checkpoint=session > 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(folder: Path, sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """What was injected against what was counted, and what has grown."""
    injected = Counter(line["fault"] for line in lines(folder / "injected.jsonl"))
    failures = lines(folder / "episodes" / "failures.jsonl")
    expected, written = Counter(), Counter()
    for fault, kind in KINDS.items():
        expected[kind] += injected[fault]
    of_java = [line for line in failures if line["environment"] == "java"]
    written.update(line["kind"] for line in failures)
    written.subtract(line["kind"] for line in of_java)
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "run_state" / "process_0.json").read_text())  # of the next entry of the log
    counters = Counter(state["figures"]["failures"])
    counters.subtract(line["kind"] for line in of_java)
    usage = lines(folder / "usage.jsonl")
    steps = int(last.name.split("-")[1])
    return {
        "optimizer_steps": steps,
        "episodes": 12 * steps,
        "sessions": sessions,
        "injected": dict(injected),
        "expected": dict(expected),
        "failures.jsonl": {kind: written[kind] for kind in expected},
        "counters": {kind: counters[kind] for kind in expected},
        "java": {
            "injected": injected["java_kill"] + injected["java_stop"],
            "episodes lost": dict(Counter(line["kind"] for line in of_java)),
        },
        "nonfinite": {"injected": injected["nonfinite"], "skipped": state["nonfinite"]["total"]},
        "retried": sum(line["retried"] for line in failures),
        "masked": sum(not line["retried"] for line in failures),
        "usage": [usage[round(share * (len(usage) - 1))] for share in (0.02, 0.25, 0.5, 0.75, 1.0)] if usage else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--restart_minutes", type=float, default=6.0, help="minutes between two SIGTERMs")
    parser.add_argument("--output_dir", default="runs/soak")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--session", type=int, help="internal: run this session of the trainer")
    for name, rate in RATES.items():
        parser.add_argument(f"--{name}", type=float, default=rate, help=f"chance a step, default {rate}")
    args = parser.parse_args()
    args.rates = {name: getattr(args, name) for name in RATES}
    if args.session is not None:
        train(args, args.session)
        return
    import psutil

    folder = Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty: name another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}, rates {args.rates}", flush=True)
    end, sessions = time.time() + 60 * args.minutes, []
    while (left := end - time.time()) > 0:
        command = [sys.executable, __file__, *sys.argv[1:], "--seed", str(args.seed), "--session", str(len(sessions))]
        with open(folder / f"session{len(sessions)}.log", "w") as log:
            trainer = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            trainer.wait(max(min(60 * args.restart_minutes, left), 30))
            print(f"session {len(sessions)} ended by itself: see {log.name}", flush=True)
            break
        except subprocess.TimeoutExpired:
            family = psutil.Process(trainer.pid).children(recursive=True)
            trainer.send_signal(signal.SIGTERM)
            sent = time.time()
            trainer.wait(600)
            _, alive = psutil.wait_procs(family, timeout=15)
        sessions.append(
            {"exit": trainer.returncode, "seconds_to_end": round(time.time() - sent, 1), "left_alive": len(alive)}
        )
        print(sessions[-1], flush=True)
    results = report(folder, sessions)
    (folder / "soak.json").write_text(json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))
    agree = results["expected"] == results["failures.jsonl"] == results["counters"]
    agree &= results["nonfinite"]["injected"] == results["nonfinite"]["skipped"]
    print("The counters agree." if agree else "THE COUNTERS DIFFER.")
    sys.exit(not agree)


if __name__ == "__main__":
    main()
