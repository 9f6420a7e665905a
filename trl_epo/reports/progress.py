"""
What is shown of text episodes while training runs: a line a step in a terminal, a table and curves in a notebook.

Trackers and `log_history` get every metric as before; only what is printed is chosen here.
"""

import math
import shutil
import sys
from itertools import accumulate
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # another one in a notebook
from transformers.trainer_utils import has_length

from .step_table import COLUMNS, Entry, is_of_steps, panel_row, step_row


ROWS_PER_HEADER = 20


class StepLines:
    """
    Log entries as lines: a table row for steps, with the columns' names above it now and then, one line for the evaluation
    of a panel, one for the end.
    """

    def __init__(self):
        self._names = ""
        self._num_rows = 0

    def of(self, entry: Entry, step: int, max_steps: int, width: float) -> list[str] | None:
        """
        The lines for a log entry, of at most `width` characters; columns that do not fit are left out. `None` if it is an
        entry of somebody else.
        """
        if (panel := panel_row(entry, step)) is not None:
            name = f" {panel.panel}" if panel.panel else ""
            parts = [f"eval{name} at step {step}: success {panel.success}"]
            if panel.interval != "-":
                parts.append(f" (95 %: {panel.interval})")
            parts += [f", return {panel.episode_return}", f", episodes {panel.episodes}"]
            return [_fitting(parts, width)]
        if "train_runtime" in entry:
            return [f"{step} steps, {entry['train_runtime']:,.0f} seconds of training"]
        if not is_of_steps(entry):
            return None
        lines = []
        names = _line([column.name for column in COLUMNS], width)
        if names != self._names or self._num_rows == ROWS_PER_HEADER:
            self._names, self._num_rows = names, 0
            lines.append(names)
        self._num_rows += 1
        return [*lines, _line(step_row(entry, step, max_steps), width)]


def _line(texts: list[str], width: float) -> str:
    cells = [text.rjust(column.width) for column, text in zip(COLUMNS, texts, strict=True)]
    return _fitting([cells[0], *("  " + cell for cell in cells[1:])], width)


def _fitting(parts: list[str], width: float) -> str:
    """The first of the parts that fit, one at least: a number that is cut would be another number."""
    ends = accumulate(map(len, parts))
    return "".join(
        part for index, (part, end) in enumerate(zip(parts, ends, strict=True)) if not index or end <= width
    )


def _width() -> float:
    """How many characters fit on a line of standard output; any number where it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf


class BarAndLines(ProgressCallback):
    """In the place of Trainer's: its bar, in a terminal only, and lines above it."""

    training_bar: Any
    prediction_bar: Any

    def __init__(self):
        super().__init__()
        self._lines = StepLines()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = _bar(state.max_steps)
        self.current_step = 0

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader) and self.prediction_bar is None:
            self.prediction_bar = _bar(len(eval_dataloader), leave=False)
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        lines = self._lines.of(logs or {}, state.global_step, state.max_steps, _width())
        if lines is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif state.is_world_process_zero:
            _write(lines)


def _write(lines: list[str]) -> None:
    tqdm.write("\n".join(lines))  # above a bar, if there is one
    sys.stdout.flush()


def _bar(total: int, leave: bool = True) -> tqdm:
    return tqdm(total=total, leave=leave, dynamic_ncols=True, disable=None)  # None: unless it is a terminal


class Lines(PrinterCallback):
    """In the place of Trainer's where it has no bar (`disable_tqdm`): lines alone."""

    def __init__(self):
        self._lines = StepLines()

    def on_log(self, args, state, control, logs=None, **kwargs):
        lines = self._lines.of(logs or {}, state.global_step, state.max_steps, _width())
        if lines is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif state.is_local_process_zero:
            _write(lines)


def show_progress(trainer: Trainer) -> None:
    """Show what matters of text episodes instead of what Trainer shows, if that is still there."""
    usual = PrinterCallback if trainer.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK
    shown = next((each for each in trainer.callback_handler.callbacks if type(each) is usual), None)
    if shown is None:
        return
    trainer.remove_callback(shown)
    if usual is PrinterCallback:
        trainer.add_callback(Lines())
    elif usual is ProgressCallback:
        trainer.add_callback(BarAndLines())
    else:
        from .notebook import NotebookTable  # needs IPython

        trainer.add_callback(NotebookTable())
