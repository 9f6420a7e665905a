"""
Kept episodes: some of each training batch and all of each evaluation, as tables with the columns of `episode_schema.py`.
Knows no trainer.
"""

import json
import logging
import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..batches import action_mask
from ..rollouts import Episode, PlayedBatch, Turn
from ..text import printable, without_surrogates
from .episode_files import EpisodeFiles, panel_file, training_file
from .episode_schema import SCHEMA, VERSION


logger = logging.getLogger(__name__)

NUM_SHOWN = 3  # episodes that a tracker shows at once
MAX_INT64 = 2**63 - 1


def choose(outcomes: Sequence[Any], number: int) -> list[int]:
    """
    The indices of `number` of these: one of each kind of outcome first, the others at equal distances. All if there are
    no more.

    >>> choose(["lost"] * 6 + ["won"] + ["lost"], 3)
    [0, 1, 6]
    """
    if len(outcomes) <= number:
        return list(range(len(outcomes)))
    kinds: dict[Any, int] = {}
    for index, outcome in enumerate(outcomes):
        kinds.setdefault(outcome, index)
    first = list(kinds.values())[:number]
    others = sorted(set(range(len(outcomes))) - set(first))
    room = number - len(first)
    return sorted(first + [others[index * len(others) // room] for index in range(room)])


class EpisodeKeeper:
    """
    Keeps episodes of a run.

    In training: [`begin_batch`] when a generation batch was played and credited, [`note_scores`] for each micro-batch of
    the first pass over it, then [`end_batch`]. In an evaluation: [`begin_panel`], [`add_to_panel`] for each batch, then
    [`end_panel`]. Every process calls all of them; the main one writes.

    Args:
        folder (`Path`): `episodes/` in the run's folder.
        accelerator ([`~accelerate.Accelerator`]): Gathers over all processes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tells what the model saw, as text.
        number (`int`): Episodes of a training batch that are kept; 0: none at all, of evaluations neither.
        max_bytes (`float`): What the files may take together.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        number: int,
        max_bytes: float,
    ):
        self._accelerator = accelerator
        self._tokenizer = tokenizer
        self._number = number
        self._files = EpisodeFiles(folder, max_bytes)
        self._pieces: dict[int, str] = {}  # by token
        self._is_open = False  # whether there is a training batch that has not been written; the same on all processes
        self._pending: dict[int, dict[str, Any]] = {}  # its rows of this process, by place
        self._panel: list[pa.Table] = []
        self._shown: list[dict[str, Any]] = []

    def begin_training(self) -> None:
        """Forget what an earlier training has left."""
        self._is_open, self._pending, self._shown = False, {}, []
        self._files.begin()

    # A training batch

    def begin_batch(
        self,
        batch: PlayedBatch,
        advantages: Tensor,
        turn_ids: Tensor,
        step: int,
        rl_step: int,
        temperature: float,
    ) -> None:
        """
        Choose episodes of a generation batch.

        Args:
            batch ([`PlayedBatch`]): The batch as it was played.
            advantages (`Tensor`): (B,) or (B, T), in units of reward.
            turn_ids (`Tensor`): (B, T), the turn of each token; −1 at those that the model did not sample.
            step (`int`): Optimizer steps made.
            rl_step (`int`): Index of the RL step, from 0.
            temperature (`float`): Of the sampling.
        """
        if not self._number:
            return
        if self._is_open:  # of a run that was resumed with other batches: what is left of it
            self.end_batch()
        chosen = set(choose([(each.success, each.stop_reason) for each in batch.summaries], self._number))
        where = {"mode": "train", "step": step, "rl_step": rl_step, "temperature": temperature}
        self._is_open, self._pending = True, {}
        for index, place in enumerate(batch.places):
            if place not in chosen:
                continue
            row = self._row(batch, index, where)
            if row is not None:
                self._pending[place] = row
                _set_advantages(row, advantages[index], turn_ids[index])

    def note_scores(
        self,
        batch: dict[str, Any],
        logprobs: Tensor,
        entropies: Tensor,
        reference: Tensor | float | None,
        corridor: tuple[float, float],
    ) -> None:
        """
        Take down what the loss computes of a micro-batch; all in nats and without gradient.

        Args:
            batch (`dict`): The micro-batch, with `turn_ids`, (B, T), and `places`, (B,): which episode each row is.
            logprobs (`Tensor`): (B, T).
            entropies (`Tensor`): (B, T).
            reference (`Tensor`, `float` or `None`): What the corridor is around, of each token, (B, T), or of all.
            corridor (`tuple[float, float]`): Its bounds, as multiples of the reference.
        """
        places = batch["places"].tolist() if "places" in batch and self._pending else []
        chosen = [index for index, place in enumerate(places) if place in self._pending]
        if not chosen:
            return
        is_action = batch["turn_ids"][chosen].ge(0).cpu()
        is_scored = action_mask(batch)[chosen].bool().cpu()
        values = torch.stack([logprobs[chosen], entropies[chosen]]).float().cpu()  # (2, chosen, T)
        for number, index in enumerate(chosen):
            row, tokens = self._pending[places[index]], is_action[number]
            if not tokens.any() or not is_scored[number][tokens].all():
                continue  # left out of the loss: what the sampler knows stays
            of_row, begin = values[:, number, tokens].tolist(), 0
            for turn in row["turns"]:
                end = begin + len(turn["token_ids"])
                turn["logprobs"], turn["entropies"] = (_finite(part[begin:end]) for part in of_row)
                begin = end
            center = reference
            if isinstance(reference, Tensor):
                of_tokens = reference[index].cpu()[tokens]
                center = of_tokens[~of_tokens.isnan()].double().mean().item()
            if center is not None and math.isfinite(center):
                bounds = [bound * center for bound in corridor]
                row["entropy_reference"], row["corridor_low"], row["corridor_high"] = center, *map(_bound, bounds)

    def end_batch(self) -> None:
        """Write the episodes of a training batch, also if some of its losses were not computed."""
        if not self._is_open:
            return
        table = self._one_table(gather_object(self._tables(list(self._pending.values()))))
        self._is_open, self._pending = False, {}
        if table is None:
            return
        rl_step = table["rl_step"][0].as_py()
        if self._files.wants(rl_step):
            self._files.write(training_file(rl_step), table)

    # An evaluation

    def begin_panel(self) -> None:
        """Forget what an evaluation that was interrupted has left."""
        self._panel, self._shown = [], []

    def add_to_panel(self, batch: PlayedBatch, panel: str | None, step: int, rl_step: int, temperature: float) -> None:
        """
        Add a batch of episodes.

        Args:
            batch ([`PlayedBatch`]): The batch as it was played.
            panel (`str` or `None`): The evaluation set's name; `None` if it has none.
            step (`int`): Optimizer steps made.
            rl_step (`int`): Generation batches of the training so far.
            temperature (`float`): Of the sampling.
        """
        if not self._number:
            return
        where = {"mode": "eval", "panel": panel, "step": step, "rl_step": rl_step, "temperature": temperature}
        rows = [self._row(batch, index, where) for index in range(len(batch.places))]
        gathered = gather_object(self._tables([row for row in rows if row is not None]))  # a batch: bounded memory
        if self._accelerator.is_main_process:
            self._panel += gathered

    def end_panel(self) -> None:
        """Write the episodes of an evaluation, in the place of an earlier one's of the same weights."""
        if not self._number:
            return
        table = self._one_table(self._panel)
        self._panel = []
        if table is not None:
            panel, step = table["panel"][0].as_py(), table["step"][0].as_py()
            self._files.write(panel_file(panel, step), table)

    # For the model card and trackers

    def example(self, step: int) -> dict[str, Any] | None:
        """
        One of the kept episodes, on the main process; `None` if there is none. It is of an evaluation after this optimizer
        step or, without one, of the last evaluation, else of the last training batch: one that succeeded, if any.
        """
        table = self._files.last(step)
        if table is None:
            return None
        success = table["success"].to_pylist()
        return table.slice(success.index(True) if True in success else 0, 1).to_pylist()[0]

    def take_shown(self) -> list[dict[str, Any]]:
        """A few of the last episodes that were kept, of different outcomes; each only once. None on other processes."""
        shown, self._shown = self._shown, []
        return shown

    # What a checkpoint holds, as JSON can carry it

    def state_dict(self) -> dict[str, Any]:
        return {"open": self._is_open, "pending": list(self._pending.values()), "files": self._files.state_dict()}

    def load_state_dict(self, state: dict[str, Any], step: int, rl_step: int) -> None:
        """Go on from a checkpoint of an optimizer step and an RL step."""
        self._is_open = bool(state["open"])
        self._pending = {row["row"]: row for row in state["pending"]}
        self._files.load_state_dict(state["files"], step, rl_step)

    # Rows and tables

    def _tables(self, rows: list[dict[str, Any]]) -> list[pa.Table]:
        """Rows as a table; none if they do not fit the columns."""
        try:
            return [pa.Table.from_pylist(rows, SCHEMA)] if rows else []
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            logger.warning("%d episodes could not be kept: %s", len(rows), printable(str(error)))
            return []

    def _one_table(self, tables: list[pa.Table]) -> pa.Table | None:
        """The tables of all processes as one, on the main process, each episode once, by their places."""
        if not tables or not self._accelerator.is_main_process:
            return None
        table = pa.concat_tables(tables)
        _, first = np.unique(table["row"].to_numpy(), return_index=True)
        table = table.take(first).combine_chunks()
        outcomes = zip(table["success"].to_pylist(), table["stop_reason"].to_pylist(), strict=True)
        self._shown = table.take(choose(list(outcomes), NUM_SHOWN)).to_pylist()
        return table

    def _row(self, batch: PlayedBatch, index: int, where: dict[str, Any]) -> dict[str, Any] | None:
        """An episode with the columns of the schema, as JSON can carry it; `None` if it cannot be told."""
        try:
            return self._told(batch.episodes[index], row=batch.places[index], group=batch.groups[index], **where)
        except Exception as error:  # an action or an option that cannot even be shown
            logger.warning("An episode could not be kept: %s: %s", type(error).__name__, printable(str(error)))
            return None

    def _told(self, episode: Episode, **where: Any) -> dict[str, Any]:
        prompts = [episode.prompt_ids, *(turn.observation_ids for turn in episode.turns[1:])]
        seed = episode.seed
        return {
            "version": VERSION,
            "panel": None,
            **where,
            "environment": _text(episode.environment),
            "task": _text(episode.task),
            "seed": int(seed) if isinstance(seed, Integral) and abs(int(seed)) <= MAX_INT64 else None,
            "options": _options(episode.options),
            "success": episode.success,
            "return": float(episode.episode_return),
            "stop_reason": episode.stop_reason.value,
            "num_turns": len(episode.turns),
            "num_invalid": episode.num_invalid_actions,
            "first_observation": _text(episode.first_observation),
            "turns": [self._turn(turn, ids) for turn, ids in zip(episode.turns, prompts, strict=False)],
            "failures": [
                {"kind": failure.kind.value, "turn": failure.num_turns, "cause": _text(failure.cause)}
                for failure in episode.failures
            ],
            "entropy_reference": None,
            "corridor_low": None,
            "corridor_high": None,
        }

    def _turn(self, turn: Turn, prompt_ids: Sequence[int]) -> dict[str, Any]:
        return {
            "prompt": self._tokenizer.decode(list(prompt_ids), skip_special_tokens=False),
            "starts_context": turn.starts_context,
            "text": _text(turn.text),
            "action": _text(turn.action),
            "valid": not turn.invalid,
            "cut": turn.cut,
            "observation": _text(turn.observation),
            "reward": float(turn.reward),
            "advantage": None,
            "token_ids": list(turn.action_ids),
            "tokens": [self._piece(token) for token in turn.action_ids],
            "logprobs": None if turn.logprobs is None else _finite(turn.logprobs),
            "entropies": None if turn.entropies is None else _finite(turn.entropies),
        }

    def _piece(self, token: int) -> str:
        """A token as text, with the space before it if it has one, which some tokenizers only write after another token."""
        if token not in self._pieces:
            before = self._tokenizer.encode("a", add_special_tokens=False)
            start = self._tokenizer.decode(before)
            both = self._tokenizer.decode([*before, token])
            self._pieces[token] = both[len(start) :] if both.startswith(start) else self._tokenizer.decode([token])
        return self._pieces[token]


def _set_advantages(row: dict[str, Any], advantages: Tensor, turn_ids: Tensor) -> None:
    """Note the mean advantage of each turn's tokens, (T,) or one for all; a turn that has none in the batch keeps null."""
    is_action = turn_ids >= 0
    ids = turn_ids[is_action].cpu()
    values = advantages.expand_as(turn_ids)[is_action].double().cpu()
    sums = torch.zeros(len(row["turns"]), dtype=torch.float64).index_add(0, ids, values)
    counts = torch.bincount(ids, minlength=len(row["turns"]))
    for turn, total, count in zip(row["turns"], sums.tolist(), counts.tolist(), strict=True):
        if count and math.isfinite(total):
            turn["advantage"] = total / count


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return None if value is None else without_surrogates(str(value))


def _options(options: dict[str, Any]) -> str:
    try:
        text = json.dumps(options, default=repr, ensure_ascii=False)
    except Exception as error:  # keys that are no text, in a circle, or that cannot even be shown
        text = json.dumps(f"{type(error).__name__}: they cannot be written as JSON")
    return without_surrogates(text)
