"""
The private names of TRL, and of transformers' Trainer below it, that faults, checkpoints and resuming rely on.

`FaultTolerantGRPOTrainer` is the lower part of `SeamedGRPOTrainer`; `SIGNATURES` and `ATTRIBUTES` are checked like those of
`trl.py`.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from shutil import rmtree
from signal import Signals
from typing import Any

import torch
import transformers.trainer
from accelerate.utils import DistributedType
from torch.distributed import DistError
from torch.distributed.checkpoint import CheckpointException
from transformers import TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..runs import (
    NAMES,
    CheckpointError,
    Interruption,
    NonfiniteSteps,
    begin_checkpoint,
    checkpoint_to_resume,
    end,
    finish_checkpoint,
    gradient_is_finite,
    last_whole_checkpoint,
    leaves_overflow_to_scaler,
    let_gloo_finish,
    load_run_state,
    rotate,
    save_run_state,
)
from .hub import PushingGRPOTrainer
from .replacing import replaced


logger = logging.get_logger(__name__)

# Name of each method that is overridden or called -> its parameters.
SIGNATURES = {
    "_run_epoch": (
        "self",
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
    "_maybe_log_save_evaluate": (
        "self",
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ),
    "_get_output_dir": ("self", "trial"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_finish_current_push": ("self",),
    "save_model": ("self", "output_dir", "_internal_call"),
    "create_model_card": ("self", "model_name", "dataset_name", "tags"),
    "_determine_best_metric": ("self", "metrics", "trial"),
    "_load_best_model": ("self",),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
}
# Attributes that GRPOTrainer or Trainer sets and this module reads or sets.
ATTRIBUTES = (
    "_step",
    "_buffered_inputs",
    "_last_loaded_step",
    "_metrics",
    "_logs",
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
)
# What decides which rows a process's micro-batches are made of: a generation batch fits a run with the same.
GEOMETRY = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
)
# What Trainer knows of the best checkpoint.
BEST = ("best_metric", "best_global_step", "best_model_checkpoint")
# What saves sharded weights: the processes gather them together, then some of them write.
SHARDED_SAVES = ("save_fsdp_model", "save_fsdp_optimizer")


class FaultTolerantGRPOTrainer(PushingGRPOTrainer):
    """
    A trainer that survives what can go wrong in training: it leaves out optimizer steps that are not finite, ends with a
    checkpoint on SIGTERM and Ctrl-C, knows whole checkpoints from cut ones, and goes on from them as if nothing had happened.
    """

    control: TrainerControl
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(self, *args, **kwargs):
        self._interruption = Interruption()
        self._nonfinite = NonfiniteSteps()
        self._begun = time.time()  # the training
        self._must_save = False  # whether training ends without the next checkpoint
        self._saving = False
        self._save_error: Exception | None = None
        self._saved_step = -1
        self._former_best: dict[str, Any] = {}  # before this step's evaluation
        self._losses_to_log: dict[str, Any] | None = None  # of a resumed run, until Trainer has begun its loop
        self._logged_before_best: int | None = None  # entries of the log, when the best model was loaded
        super().__init__(*args, **kwargs)
        let_gloo_finish()

    # What a subclass may override

    def complete_saved_model(self, folder: Path) -> None:
        """Called when a model, not a checkpoint, has been saved in this folder, on the process that writes."""
        if self.is_adapter:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.create_model_card()
            self.replace_adapter_card(folder)

    def extend_model_card(self, path: Path) -> None:
        """Called with the file of the model card that was just written, on the process that writes."""

    def save_extras(self, checkpoint: str) -> None:
        """Called with the folder of a checkpoint that was just written, on every process."""

    def load_extras(self, checkpoint: str) -> None:
        """Called with the folder of the checkpoint that training resumes from, on every process."""

    def may_be_best(self, metrics: dict[str, float]) -> bool:
        """Whether an evaluation with these metrics may make its checkpoint the best one."""
        return True

    def load_best_extras(self, checkpoint: str) -> None:
        """Called with the folder of the best checkpoint, when the model was loaded from it at the end of training."""

    def pending_figures(self) -> dict[str, Any]:
        """What this process has collected for the next log entry, as JSON can carry it."""
        return {}

    def restore_pending_figures(self, figures: dict[str, Any]) -> None:
        """Take what [`pending_figures`] gave."""

    def weights_have_changed(self) -> None:
        """To be called where they have, other than by an optimizer step: vLLM then gets them before it samples again."""
        if self.use_vllm:
            self._last_loaded_step = -1

    def step_ended(self, logs: bool) -> None:
        """Called after each optimizer step, once the device has made it, on every process; `logs`: a log entry follows."""

    # Runs

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        self._begun = time.time()
        self._nonfinite = NonfiniteSteps()
        self._must_save, self._saved_step, self._former_best = False, -1, {}
        self._logged_before_best = None
        # What an earlier run of this trainer has left
        self._step, self._buffered_inputs, self._losses_to_log = 0, None, None
        self._metrics["train"].clear()
        self.weights_have_changed()
        with self._interruption as interruption:
            result = super().train(checkpoint, *args, **kwargs)
        if interruption.requested:
            logger.warning(
                f"{NAMES[interruption.signal]} came after the last step: training is complete, and what follows it is not cut "
                "short."
            )
        return result

    def _any_process(self, happened: bool) -> bool:
        """Whether it did on any process; called by all."""
        return bool(self.accelerator.reduce(torch.tensor(float(happened), device=self.accelerator.device), "sum"))

    def _signal_to_end(self) -> Signals | None:
        """What has asked this process, or another one, to end; called by all."""
        came = [float(self._interruption.signal == number) for number in NAMES]
        counts = self.accelerator.reduce(torch.tensor(came, device=self.accelerator.device), "sum").tolist()
        return next((number for number, count in zip(NAMES, counts, strict=True) if count), None)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed at the end: Trainer would make another step
            self.control.should_training_stop = True

    def training_step(self, model, inputs, num_items_in_batch):
        if self._losses_to_log is not None:
            self._restore_losses(self._losses_to_log)
            self._losses_to_log = None
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._nonfinite.observe(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)  # Trainer's last act before the optimizer's
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._check_deepspeeds_step(norm)
            return norm
        policy = set(model.parameters())
        others = [
            weight
            for optimizer in self.accelerator._optimizers
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight not in policy
        ]
        finite = leaves_overflow_to_scaler(self.accelerator) or gradient_is_finite(norm, others)
        finite = not self._any_process(not (finite and self._nonfinite.losses_are_finite()))
        self._nonfinite.end_step(finite)
        if not finite:
            logger.warning(
                f"The loss or the gradient of optimizer step {self.state.global_step + 1} is not finite: it is left out "
                f"({self._nonfinite.in_a_row} in a row)."
            )
            for optimizer in self.accelerator._optimizers:
                optimizer.zero_grad()  # no gradient at all, with which optimizers leave a weight and its state alone
        return norm

    def _check_deepspeeds_step(self, norm) -> None:
        """DeepSpeed steps in the backward pass, or leaves that out by itself, as its configuration has it."""
        left_out = self.accelerator.optimizer_step_was_skipped
        if not left_out and not gradient_is_finite(norm, ()):
            raise FloatingPointError(
                "The gradient is not finite, and DeepSpeed has already made the optimizer step, so the weights are lost. Resume "
                'from the last checkpoint with `"bf16": {"check_grad_overflow": true}` in DeepSpeed\'s configuration, with '
                "which it leaves out such steps."
            )
        self._nonfinite.end_step(not left_out or self.args.fp16)  # in fp16 it is looking for its scale

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        stops = self._signal_to_end()
        gives_up = self._nonfinite.in_a_row >= self.args.max_nonfinite_steps
        if stops or gives_up:
            self._must_save = True
            self.control.should_evaluate = False
            self.control.should_log = self.control.should_log or gives_up
            self.control.should_save = self._saved_step != self.state.global_step
        if self.control.should_log:
            self._metrics["train"]["faults/nonfinite_steps"] = [self._nonfinite.total]
        self.step_ended(self.control.should_log)
        took_time = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if took_time and not (stops or gives_up):
            stops = self._signal_to_end()
            self._must_save = bool(stops)
            if stops and self._saved_step != self.state.global_step:
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if stops or gives_up:
            self._finish_current_push()  # nothing can be uploaded while Python ends
        if gives_up:
            raise FloatingPointError(
                f"The loss or the gradient was not finite in {self._nonfinite.in_a_row} optimizer steps in a row "
                f"(`max_nonfinite_steps={self.args.max_nonfinite_steps}`), which were left out. The weights of the last good one "
                f"are in {PREFIX_CHECKPOINT_DIR}-{self.state.global_step}. Look for rewards that are infinite, "
                "lower `learning_rate`, use bf16 or float32 instead of fp16; then resume from there or, if the entropy or `kl` "
                "had run away before, from an earlier checkpoint."
            )
        if stops:
            logger.warning(
                f"Ended by {NAMES[stops]} after step {self.state.global_step}; `resume_from_checkpoint=True` (on the command line "
                "`--resume`) goes on from there."
            )
            end(stops)

    # Checkpoints

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """Keep the first exception in here for later, so that no process leaves the others alone in what all do together."""
        try:
            yield
        except DistError:
            raise
        except (Exception, CheckpointException) as error:  # the latter, of sharded files, is no `Exception`
            self._save_error = self._save_error or error

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        best = self._best()
        if best["best_global_step"] == self.state.global_step:
            best |= self._former_best
        self._save_error, self._saving = None, True
        try:
            with self._noting_errors():
                if self.args.should_save:
                    begin_checkpoint(folder)
            with self._noting_errors(), self._prudent_trainer():
                super()._save_checkpoint(model, trial)
            with self._noting_errors():
                if self.args.should_save and self.is_adapter:
                    self.replace_adapter_card(folder)
                self._save_run_state(folder)
            with self._noting_errors():
                self.save_extras(str(folder))
            failed = self._any_process(self._save_error is not None)  # from here on all have written
            if not failed:
                with self._noting_errors():
                    if self.args.should_save:
                        finish_checkpoint(folder, self.state.global_step, self.args.world_size, self._begun)
                failed = self._any_process(self._save_error is not None)
        finally:
            self._saving = False
        if failed:
            for name, value in best.items():
                setattr(self.state, name, value)
            self._give_up_checkpoint(folder)
        else:
            self._saved_step = self.state.global_step
            if self.args.push_to_hub:
                self.push_checkpoint(folder, self._must_save or self.state.global_step >= self.state.max_steps)
            if self.args.should_save:
                rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    @contextmanager
    def _prudent_trainer(self) -> Iterator[None]:
        """
        While Trainer saves: it deletes no older checkpoint, as the new one is not whole yet, and a process that cannot write
        one sharded part comes along to the gathering of the next.
        """
        with ExitStack() as stack:
            stack.enter_context(replaced(transformers.trainer, "rotate_checkpoints", lambda **kwargs: None))
            for name in SHARDED_SAVES:
                save = self._noting_errors()(getattr(transformers.trainer, name))
                stack.enter_context(replaced(transformers.trainer, name, save))
            yield

    def save_last_checkpoint(self) -> Path:
        """
        Write a checkpoint before training ends with an error, unless this step's is already there; its folder. Every process
        calls it.
        """
        self._must_save = True
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(self.model, trial=None)
        self._finish_current_push()
        return Path(self._get_output_dir(trial=None), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._saving:  # else it is not whole yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _give_up_checkpoint(self, folder: Path) -> None:
        if self.args.should_save:
            rmtree(folder, ignore_errors=True)  # room for the next
        last = last_whole_checkpoint(folder.parent)
        message = (
            f"The checkpoint {folder} could not be written: {self._save_error or 'on another process'}. The last whole one "
            f"is {last}. Is the disk full?"
        )
        if last is None or self._must_save or self.state.global_step >= self.state.max_steps:
            raise CheckpointError(message) from self._save_error
        logger.error(f"{message} Training goes on without it.", exc_info=self._save_error)

    def save_model(self, output_dir=None, _internal_call=False):
        with self._noting_errors() if self._saving else nullcontext():
            super().save_model(output_dir, _internal_call)
        if not self._saving and self.args.should_save:
            self.complete_saved_model(Path(output_dir or self.args.output_dir))

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        with self._noting_errors() if self._saving else nullcontext():
            super().create_model_card(model_name, dataset_name, tags)
            if self.is_world_process_zero():
                try:
                    self.extend_model_card(Path(self.args.output_dir) / "README.md")
                except Exception:  # a card is worth no checkpoint
                    logger.warning("The model card could not be completed and is TRL's.", exc_info=True)

    def _best(self) -> dict[str, Any]:
        return {name: getattr(self.state, name) for name in BEST}

    def _determine_best_metric(self, metrics, trial):
        self._former_best = self._best()
        return self.may_be_best(metrics) and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self):
        super()._load_best_model()
        self.weights_have_changed()
        self._logged_before_best = len(self.state.log_history)
        self.load_best_extras(self.state.best_model_checkpoint)

    @property
    def weights_log(self) -> tuple[int, list[dict[str, Any]]]:
        """After which optimizer step the weights are as they are, and the log entries that may be of them."""
        history = self.state.log_history
        if self._logged_before_best is None:
            return self.state.global_step, history
        best = self.state.best_global_step
        return best, [
            entry
            for number, entry in enumerate(history)
            if number >= self._logged_before_best or entry.get("step") == best
        ]

    def _load_optimizer_and_scheduler(self, checkpoint):
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # torch's, of the groups of weights
            raise ValueError(
                f"The optimizer in {checkpoint} had other weights: {error}. It was written with another model or adapter, or with "
                "a critic that had no optimizer of its own yet. To go on from its weights, begin a new run with this folder as "
                "`model` (and its critic/model, if there is one, as `critic_model`)."
            ) from error
        if checkpoint is not None:
            self.load_extras(checkpoint)
            self._load_run_state(Path(checkpoint))
            if Path(checkpoint).resolve().parent == Path(self._get_output_dir(trial=None)).resolve():
                self._saved_step = self.state.global_step

    # What a process remembers between two optimizer steps

    @property
    def _generate_every(self) -> int:
        """Micro-batches that are made of one generation batch, over all passes over it."""
        return self.args.steps_per_generation * self.num_iterations

    def _geometry(self) -> dict[str, int]:
        return {name: getattr(self.args, name) for name in GEOMETRY}

    def _save_run_state(self, folder: Path) -> None:
        first = self._step % self._generate_every
        needed = range(first, self._generate_every) if first else ()
        places = {step % self.args.steps_per_generation for step in needed}
        batches = [
            self._buffered_inputs[place] if place in places else None
            for place in range(self.args.steps_per_generation)
        ]
        state = {
            "geometry": self._geometry(),
            "step": self._step,
            "nonfinite": self._nonfinite.state_dict(),
            "metrics": self._metrics["train"],
            "figures": self.pending_figures(),
            "completions": self._completions_table() if self.log_completions else None,
            "losses": {"sum": self._tr_loss.item(), "since": self._globalstep_last_logged},
        }
        save_run_state(folder, self.args.process_index, state, batches)

    def _load_run_state(self, folder: Path) -> None:
        loaded = load_run_state(folder, self.args.process_index)
        if loaded is None:
            logger.warning(f"{folder} does not hold the generation batch in use: a new one begins.")
            return
        state, batches = loaded
        self._nonfinite.load_state_dict(state["nonfinite"])
        if self._nonfinite.in_a_row >= self.args.max_nonfinite_steps:  # what the run gave up for
            self._nonfinite.in_a_row = 0
        self.restore_pending_figures(state["figures"])
        before, now = state["geometry"], self._geometry()
        changes = [f"{name} {before[name]} -> {now[name]}" for name in GEOMETRY if before[name] != now[name]]
        if self._any_process(bool(changes)):
            logger.warning(
                f"{folder} was written with other batches ({', '.join(changes) or 'on another process'}): a new generation "
                "batch begins."
            )
            return
        self._step = state["step"]
        device = self.accelerator.device
        self._buffered_inputs = [
            batch
            and {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            for batch in batches
        ]
        self._metrics["train"].update(state["metrics"])
        if state["completions"] is not None:
            self._restore_completions_table(state["completions"])
        self._losses_to_log = state["losses"]

    def _restore_losses(self, losses: dict[str, Any]) -> None:
        """The sum of the losses since the last log entry, which Trainer averages in the next."""
        self._tr_loss += losses["sum"]
        self._total_loss_scalar -= losses["sum"]  # the mean at the end is of the steps of this call
        self._globalstep_last_logged = losses["since"]

    def _completions_table(self) -> dict[str, Any]:
        logs = self._logs
        nested = {
            name: {column: list(values) for column, values in logs[name].items()} for name in ("rewards", "extra")
        }
        return {name: list(logs[name]) for name in ("prompt", "completion", "advantages")} | nested

    def _restore_completions_table(self, table: dict[str, Any]) -> None:
        for name in ("prompt", "completion", "advantages"):
            self._logs[name].extend(table[name])
        for name in ("rewards", "extra"):
            for column, values in table[name].items():
                self._logs[name][column].extend(values)
