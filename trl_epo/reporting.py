"""
What `EPOTrainer` tells of a run, apart from how it trains: evaluations, logs, progress, kept episodes, what is wrong, the
model card; and what of it a checkpoint must hold.
"""

import logging
from collections.abc import Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from .entropy import EntropyHistory
from .reports import (
    Diagnosis,
    EpisodeKeeper,
    RunFacts,
    complete_model_card,
    enough_played,
    episode_metrics,
    evaluation_metrics,
    keep_limits,
    show_episodes,
    show_progress,
)
from .rollouts import EPISODES_FOLDER, EpisodePlayer, PlayedBatch
from .runs import own_randomness
from .saved import name_on_hub
from .seams import SeamedGRPOTrainer, replaced


logger = logging.getLogger(__name__)


class FirstEvaluations(TrainerCallback):
    """Keeps the evaluations from before a training at the head of its log, which Trainer begins anew."""

    def __init__(self):
        self._entries: list[dict[str, Any]] = []

    def note(self, state: TrainerState) -> None:
        """
        A training is about to begin where another one, if any, has left `state`. Of several evaluations of a panel the last
        counts; those of another training are not of the policy that this one begins with.
        """
        panels = {}
        for entry in state.log_history if state.global_step == 0 else ():
            names = [name for name in entry if name.startswith("eval") and name.endswith("_runtime")]
            if names:
                panels[names[0]] = entry
        self._entries = list(panels.values())

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # else they are in the log that was resumed
            state.log_history[:0] = self._entries


class ReportingTrainer(SeamedGRPOTrainer):
    """`GRPOTrainer` that tells what its text episodes were like, if it plays any."""

    _player: EpisodePlayer | None = None  # where there are text episodes
    _keeper: EpisodeKeeper | None = None  # the same
    _batch: PlayedBatch | None = None  # the generation batch
    _eval_prefix = "eval"

    def report_episodes(self, player: EpisodePlayer, tokenizer: PreTrainedTokenizerBase) -> None:
        """Report the episodes of this player from now on."""
        args = self.args
        self._player = player
        self._keeper = EpisodeKeeper(
            Path(args.output_dir, EPISODES_FOLDER),
            self.accelerator,
            tokenizer,
            number=args.keep_episodes,
            max_bytes=args.keep_episodes_megabytes * 10**6,
        )
        self._diagnosis = Diagnosis(args, len(tokenizer), tokenizer.decode)
        show_progress(self)
        self._first_evaluations = FirstEvaluations()
        self.add_callback(self._first_evaluations)

    @property
    def player(self) -> EpisodePlayer | None:
        """What plays text episodes; `None` where there are none."""
        return self._player

    def train(self, *args, **kwargs):
        if self._player is not None:
            if self.is_world_process_zero():
                keep_limits(self.args, Path(self.args.output_dir))
            self._player.begin_training()
            self._keeper.begin_training()
            self._diagnosis.load_state_dict({})
            self._first_evaluations.note(self.state)
        result = super().train(*args, **kwargs)
        if self._keeper is not None:
            self._keeper.end_batch()  # of which some losses were not computed any more
        return result

    def report_batch(self, batch: dict[str, Any], history: EntropyHistory) -> None:
        """A generation batch was played and credited; it gets the `places` of its rows, (B,)."""
        messages = self._diagnosis.observe(self._batch, self.episode_rewards.tolist(), history.means)
        for message in messages if self.accelerator.is_main_process else ():
            logger.warning("%s", message)
        batch["places"] = torch.tensor(self._batch.places, device=self.accelerator.device)
        self._keeper.begin_batch(
            self._batch,
            batch["advantages"],
            batch["turn_ids"],
            self.state.global_step,
            history.step,
            self.sampling_temperature,
        )

    def report_scores(
        self, batch: dict[str, Any], logprobs: Tensor, entropies: Tensor, reference: Tensor | float | None
    ) -> None:
        """The first loss of a micro-batch has been computed, with the corridor around `reference`."""
        corridor = (self.args.entropy_corridor_low, self.args.entropy_corridor_high)
        self._keeper.note_scores(batch, logprobs, entropies, reference, corridor)
        if self.optimizer_micro_step == self.args.steps_per_generation - 1:
            self._keeper.end_batch()

    def report_panel_batch(self, num_rl_steps: int) -> None:
        """A batch of an evaluation set was played."""
        self._keeper.add_to_panel(
            self._batch, self._panel or None, self.state.global_step, num_rl_steps, self.sampling_temperature
        )

    # Evaluation and logs

    def evaluate(self, *args, **kwargs):
        with self._large_panel_batches():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self._large_panel_batches():
            return super().predict(*args, **kwargs)

    def _large_panel_batches(self) -> AbstractContextManager[None]:
        """
        While this context lasts, batches of text episodes are at least as large as training's: they hold no activations,
        which `per_device_eval_batch_size` bounds elsewhere.
        """
        if self._player is None:
            return nullcontext()
        return replaced(self.args, "per_device_eval_batch_size", self._player.panel_batch_size)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_prefix = metric_key_prefix
        self.begin_tracking()
        randomness: AbstractContextManager[None] = nullcontext()
        if self._player is not None:
            self._player.begin_panel(dataloader.dataset)
            self._keeper.begin_panel()
            self.clear_eval_metrics()  # what an evaluation that was interrupted, or `predict`, has left
            randomness = own_randomness(self.args.seed, self.accelerator.device)
        with self.sampling_at(self.args.eval_temperature), randomness:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._keeper is not None:
            self._keeper.end_panel()
        return output

    @property
    def _panel(self) -> str:
        """The name of the evaluation set that is being played; empty if it has none."""
        return self._eval_prefix.removeprefix("eval").lstrip("_")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._player is not None:
            summaries = self._player.summaries[self.mode]
            metrics = episode_metrics(summaries) if self.mode == "train" else evaluation_metrics(summaries)
            for name, value in {**metrics, **self._player.failures.metrics(self.mode)}.items():
                self.set_metric(name, value)
            summaries.clear()
        if self.mode == "eval":
            if self._player is not None:
                self.clear_eval_metrics("completions/")  # TRL counts the rows that fill up the last batch too
            self.label_eval_metrics(self._panel)
        super().log(logs, start_time)
        if self._keeper is not None:
            table = "episodes" if self.mode == "train" else "_".join(filter(None, ("eval", self._panel, "episodes")))
            show_episodes(self._keeper.take_shown(), table, self.state.global_step, self.callback_handler.callbacks)

    def may_be_best(self, metrics: dict[str, float]) -> bool:
        return enough_played(metrics, self.args.metric_for_best_model, self.args.max_failed_fraction)

    def extend_model_card(self, path: Path) -> None:
        step, log = self.weights_log
        facts = RunFacts(
            self.args,
            self.state.log_history,
            weights_step=step,
            weights_log=log,
            repository=self.hub_model_id,
            base_model=name_on_hub(self.base_model_name),
            is_adapter=self.is_adapter,
        )
        if self._player is not None:
            facts = replace(
                facts,
                factories=self._player.environments.factories,
                row=self._first_row,
                num_rows=len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None,
                example=self._keeper.example(step),
            )
        complete_model_card(path, facts)

    @cached_property
    def _first_row(self) -> dict[str, Any]:
        return next(iter(self.train_dataset))

    def complete_saved_model(self, folder: Path) -> None:
        if self._player is not None:
            keep_limits(self.args, folder)
        super().complete_saved_model(folder)

    # Checkpoints

    def pending_figures(self) -> dict[str, Any]:
        if self._player is None:
            return {}
        parts = {"kept_episodes": self._keeper.state_dict(), "diagnosis": self._diagnosis.state_dict()}
        return {**self._player.state_dict(), **parts}

    def restore_pending_figures(self, figures: dict[str, Any]) -> None:
        if self._player is not None:
            self._player.load_state_dict(figures)
            self._diagnosis.load_state_dict(figures.get("diagnosis", {}))
            if kept := figures.get("kept_episodes"):
                self._keeper.load_state_dict(kept, self.state.global_step, self.entropy_history.step)
