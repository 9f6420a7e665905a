"""
One run of the study: the warm start of its seed, training with an arm's settings, evaluations, and the row that tells of it.
"""

import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from regime import Regime
from rows import Key, Row
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)


sys.path.append(str(Path(__file__).parents[1]))
from quickstart import DEMO_SETTINGS, WARM_UP_SETTINGS, game_text, make_household, make_model, make_tokenizer

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs import household
from trl_epo.imitation import Demonstration, environment_expert, expert_episodes, warm_up
from trl_epo.runs import CheckpointError, last_whole_checkpoint


TEMPERATURES = (0.4, 1.0)  # of evaluations; the first is the primary one
CURVE = {  # what a row tells of training steps -> what it is in the log
    "success": "episode/success_rate",
    "turns": "episode/turns",
    "entropy": "epo/entropy",
    "entropy_early": "epo/entropy_early_turns",
    "entropy_late": "epo/entropy_late_turns",
    "gradient_norm": "grad_norm",
}
NOISE = 0.5  # of ln V: entropy from which on a policy says nearly anything
LOST = 0.5  # of the warm start's success
LAST_STEPS = 10

Log = list[dict[str, Any]]  # `trainer.state.log_history`


@dataclass(frozen=True)
class Run:
    """
    What is to be run.

    Args:
        phase (`str`), arm (`str`), seed (`int`): Its key.
        regime ([`Regime`]): The game and the training.
        settings (`dict`): What the arm sets in `EPOConfig`.
        commit (`str`): Of the code.
        output_dir (`Path`): Where warm starts and unfinished runs are.
    """

    phase: str
    arm: str
    seed: int
    regime: Regime
    settings: dict[str, Any]
    commit: str
    output_dir: Path

    @property
    def key(self) -> Key:
        return self.phase, self.arm, self.seed

    @property
    def folder(self) -> Path:
        """Holds the checkpoints. Another one for other settings or other code, which must not go on from them."""
        name = f"{self.arm}-{self.seed}".replace("/", "-").replace("*", "x")
        return self.output_dir / self.phase / f"{name}-{_digest(asdict(self.regime), self.settings, self.commit)}"

    @property
    def warm_folder(self) -> Path:
        """Holds the warm start, which all arms of a seed share."""
        regime = asdict(self.regime)
        shared = {name: regime[name] for name in ("rooms", "chores", "turns", "list_actions", "panel_rows")}
        shared |= {name: value for name, value in regime.items() if name.startswith("warm_up")}
        return self.output_dir / "warm" / f"{self.seed}-{_digest(shared, self.commit)}"

    def rows(self, what: int, split: str, size: int) -> Dataset:
        """Rows of the game for a purpose of this number, the same for all arms of a seed."""
        regime = self.regime
        knobs = {"rooms": regime.rooms, "chores": regime.chores, "turns": regime.turns}
        return household.tasks(split, size, **knobs, seed=10 * self.seed + what)

    def make_env(self) -> household.Household:
        return make_household(list_actions=self.regime.list_actions)

    def config(self, **settings) -> EPOConfig:
        regime = self.regime
        return EPOConfig(
            **{
                **DEMO_SETTINGS,
                "output_dir": str(self.folder),
                "seed": self.seed,
                "max_steps": regime.steps,
                "max_turns": regime.turns,
                "per_device_train_batch_size": regime.episodes,
                "num_generations": regime.group,
                "temperature": regime.temperature,
                "learning_rate": regime.learning_rate,
                "beta": regime.kl_weight,
                "eval_strategy": "steps",
                "eval_steps": regime.evaluate_every,
                "save_strategy": "steps",
                "save_steps": regime.save_every,
                "save_total_limit": 2,
                "logging_steps": regime.log_every,
                "logging_first_step": True,  # the entropy of the warm start
                "environment_patience": math.inf,  # the same results on a busy machine
                "keep_episodes": 0,
                "use_cpu": True,
                "disable_tqdm": True,
                **settings,
            }
        )


class StudyTrainer(EPOTrainer):
    """Evaluates at each of the temperatures."""

    def evaluate(self, ignore_keys: list[str] | None = None) -> dict[str, float]:
        metrics = {}
        for temperature in TEMPERATURES:
            self.args.eval_temperature = temperature
            metrics |= super().evaluate(self.eval_dataset, ignore_keys, f"eval_at_{temperature:g}")
        return metrics


class CpuSeconds(TrainerCallback):
    """Adds to each entry of the log the processor's time of the run so far, in seconds, those before a resume included."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time() - (_last(state.log_history, "cpu_seconds") or 0.0)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["cpu_seconds"] = round(time.process_time() - self.start, 1)


def perform(run: Run) -> Row:
    """Do a run, or what is left of it, and tell of it. A training that fails is told of as well."""
    warm = warm_start(run)
    trainer = _trainer(
        run,
        AutoModelForCausalLM.from_pretrained(run.warm_folder),
        AutoTokenizer.from_pretrained(run.warm_folder),
        run.rows(2, "train", run.regime.steps * run.regime.episodes // run.regime.group),
        run.config(**run.settings),
    )
    trainer.add_callback(CpuSeconds())
    error = None
    try:
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(run.folder))
    except CheckpointError:
        raise  # the disk's fault, not the arm's
    except (FloatingPointError, RuntimeError) as failure:
        error = f"{type(failure).__name__}: {failure}"
        _evaluate_last_weights(trainer)
    log = trainer.state.log_history
    evaluations = evaluations_in(log)
    final = evaluations[-1] if evaluations else {}
    return {
        "phase": run.phase,
        "arm": run.arm,
        "seed": run.seed,
        "commit": run.commit,
        "regime": asdict(run.regime),
        "settings": run.settings,
        "warm_start": {**warm, "entropy": _first(log, "epo/entropy")},
        # A policy that cannot be played any more has no success
        **{success_at(temperature): final.get(success_at(temperature), 0.0) for temperature in TEMPERATURES},
        "error": error,
        "diverged": what_went_wrong(log, error, warm, len(trainer.processing_class)),
        "steps": trainer.state.global_step,
        "evaluations": evaluations,
        "curve": curve_of(log),
        "cpu_seconds": _last(log, "cpu_seconds"),
    }


def warm_start(run: Run) -> dict[str, float]:
    """Make the warm start of a seed unless it is there; its success at each temperature, and the CPU-seconds it took."""
    told = run.warm_folder / "warm_start.json"
    if told.exists():
        return json.loads(told.read_text())
    start, regime, seed = time.process_time(), run.regime, run.seed
    set_seed(seed)
    rows = run.rows(1, "train", regime.warm_up_episodes)
    noise = regime.warm_up_noise
    env = Demonstration(run.make_env(), environment_expert, noise=noise, draw=random.Random(seed))
    tokenizer = make_tokenizer(game_text(env, rows))
    unfinished = run.warm_folder.with_name(run.warm_folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    trainer = _trainer(run, make_model(tokenizer), tokenizer, rows, run.config(output_dir=str(unfinished), beta=0.0))
    warm_up(
        trainer,
        expert_episodes(trainer, rows, noise=noise, learn_mistakes=True),
        learn_observations=True,
        per_device_train_batch_size=4,
        learning_rate=regime.warm_up_learning_rate,
        **WARM_UP_SETTINGS,
    )
    metrics = trainer.evaluate()
    warm = {success_at(temperature): _success(metrics, temperature) for temperature in TEMPERATURES}
    warm["cpu_seconds"] = round(time.process_time() - start, 1)
    tokenizer.save_pretrained(unfinished)
    trainer.model.save_pretrained(unfinished)
    (unfinished / told.name).write_text(json.dumps(warm) + "\n")
    os.replace(unfinished, run.warm_folder)
    return warm


def _trainer(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, args: EPOConfig
) -> StudyTrainer:
    return StudyTrainer(
        model,
        args=args,
        train_dataset=rows,
        eval_dataset=run.rows(3, "iid", run.regime.panel_rows),
        processing_class=tokenizer,
        environment_factory=run.make_env,
    )


def _evaluate_last_weights(trainer: StudyTrainer) -> None:
    try:
        trainer.evaluate()
    except RuntimeError as error:
        print(f"The last policy cannot be played: {error}", flush=True)


def success_at(temperature: float) -> str:
    """
    The name of a success rate in a row.

    >>> [success_at(temperature) for temperature in (0.4, 1.0)]
    ['success_at_0.4', 'success_at_1']
    """
    return f"success_at_{temperature:g}"


def _success(metrics: dict[str, float], temperature: float) -> float | None:
    return metrics.get(f"eval_at_{temperature:g}_episode/success_rate")


def evaluations_in(log: Log) -> list[dict[str, float]]:
    """The held-out success at each temperature, by step; of several evaluations at a step the last."""
    by_step = {}
    for entry in log:
        for temperature in TEMPERATURES:
            if (rate := _success(entry, temperature)) is not None:
                by_step.setdefault(entry["step"], {"step": entry["step"]})[success_at(temperature)] = rate
    complete = len(TEMPERATURES) + 1
    return [by_step[step] for step in sorted(by_step) if len(by_step[step]) == complete]


def curve_of(log: Log) -> dict[str, list[float | None]]:
    """The training steps of a log: the lists of `CURVE`, and of the steps, all of one length."""
    entries = [entry for entry in log if "loss" in entry]
    values = {name: [_rounded(entry.get(key)) for entry in entries] for name, key in CURVE.items()}
    return {"step": [entry["step"] for entry in entries], **values}


def _rounded(value: float | None) -> float | None:
    """Without NaN, which is not JSON."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def what_went_wrong(log: Log, error: str | None, warm: dict[str, float], vocabulary: int) -> list[str]:
    """
    In which ways a run diverged: `"error"` (training ended early), `"not finite"` (optimizer steps were left out),
    `"entropy"` (more than half of ln V in the last ten steps), `"lost"` (at each temperature less than half of the warm start's
    success). Empty if it did not.
    """
    found = ["error"] if error else []
    if _last(log, "faults/nonfinite_steps"):
        found.append("not finite")
    curve = curve_of(log)
    last = [
        entropy
        for step, entropy in zip(curve["step"], curve["entropy"], strict=True)
        if entropy is not None and step > curve["step"][-1] - LAST_STEPS
    ]
    if last and sum(last) / len(last) > NOISE * math.log(vocabulary):
        found.append("entropy")
    evaluations = evaluations_in(log)
    names = [success_at(temperature) for temperature in TEMPERATURES]
    if not evaluations or all(evaluations[-1][name] < LOST * warm[name] for name in names):
        found.append("lost")
    return found


def _first(log: Log, name: str) -> float | None:
    return next((entry[name] for entry in log if name in entry), None)


def _last(log: Log, name: str) -> float | None:
    return _first(log[::-1], name)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
