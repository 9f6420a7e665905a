"""A few kept episodes in a run's tracker, as a table of texts: Weights & Biases, Trackio, TensorBoard."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..text import printable, shortened


logger = logging.getLogger(__name__)

MAX_TEXT_LENGTH = 10_000  # characters of a cell
COLUMNS = ("step", "task", "prompt", "turns", "success", "return", "stop_reason")


def show_episodes(rows: Sequence[dict[str, Any]], name: str, step: int, callbacks: Sequence[TrainerCallback]) -> None:
    """
    Show episodes in each tracker that takes tables or texts. What goes wrong there is a warning.

    Args:
        rows (`Sequence[dict]`): Episodes with the columns of `episode_schema.py`.
        name (`str`): Of the table.
        step (`int`): Optimizer steps made.
        callbacks (`Sequence[TrainerCallback]`): The trainer's; those of trackers among them are at work.
    """
    if not rows:
        return
    cells = [_cells(row) for row in rows]
    for callback in callbacks:
        for kind, show in _TRACKERS.items():
            if not isinstance(callback, kind):
                continue
            try:
                show(callback, cells, name, step)
            except Exception as error:
                logger.warning(
                    "Episodes could not be shown by %s: %s: %s",
                    kind.__name__,
                    type(error).__name__,
                    printable(str(error)),
                )


def _cells(row: dict[str, Any]) -> list[Any]:
    """The cells of an episode, by `COLUMNS`."""
    turns = []
    for number, turn in enumerate(row["turns"], start=1):
        action = "no action" if turn["action"] is None else f"> {turn['action']}"
        invalid = "" if turn["valid"] else " (invalid)"
        turns.append(f"[{number}] {turn['text']}\n{action}{invalid}\n{turn['observation']}")
    prompt = row["turns"][0]["prompt"] if row["turns"] else row["first_observation"]
    texts = [printable(shortened(text, MAX_TEXT_LENGTH)) for text in (prompt, "\n\n".join(turns))]
    return [row["step"], row["task"], *texts, row["success"], row["return"], row["stop_reason"]]


def _show_in_wandb(callback: WandbCallback, cells: list[list[Any]], name: str, step: int) -> None:
    import wandb

    if wandb.run is not None:
        table = wandb.Table(columns=list(COLUMNS), data=cells, allow_mixed_types=True)
        wandb.log({name: table, "train/global_step": step})


def _show_in_trackio(callback: TrackioCallback, cells: list[list[Any]], name: str, step: int) -> None:
    import pandas
    import trackio

    trackio.log({name: trackio.Table(dataframe=pandas.DataFrame(cells, columns=list(COLUMNS)))})


def _show_in_tensorboard(callback: TensorBoardCallback, cells: list[list[Any]], name: str, step: int) -> None:
    if callback.tb_writer is None:
        return
    texts = []
    for _, task, prompt, turns, success, total, stop_reason in cells:
        title = f"**{stop_reason}**, success {success}, return {total:g}" + (f", task {task}" if task else "")
        # Four spaces: shown as it is, no Markdown
        block = "\n".join(f"    {line}" for line in f"{prompt}\n\n{turns}".splitlines())
        texts.append(f"{title}\n\n{block}")
    callback.tb_writer.add_text(name, "\n\n---\n\n".join(texts), step)


_TRACKERS = {
    WandbCallback: _show_in_wandb,
    TrackioCallback: _show_in_trackio,
    TensorBoardCallback: _show_in_tensorboard,
}
