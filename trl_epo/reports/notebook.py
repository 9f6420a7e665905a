"""What a notebook shows of text episodes while training runs: the table of `step_table.py` and curves that grow, in one display."""

import base64
import time
from collections import deque
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO

from IPython import get_ipython
from IPython.display import HTML, DisplayHandle, display
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from .plots import draw_training
from .step_table import COLUMNS, Panel, is_of_steps, panel_row, step_row


MAX_ROWS = 20
SECONDS_BETWEEN_UPDATES = 1.0  # of the bar alone
SECONDS_BETWEEN_FIGURES = 5.0
# Drawing takes at most this share of the time, however long the log has become.
DRAWING_SHARE = 0.03


class NotebookTable(TrainerCallback):
    """In the place of Trainer's in a notebook: a bar, the last steps and panels as tables, and the curves of the run."""

    def __init__(self):
        self._has_matplotlib = _can_draw()
        self._trains = False
        self._first_step = 0
        self._clear()

    def _clear(self) -> None:
        self._cell = _cell()
        self._display: DisplayHandle | None = None
        self._steps: deque[list[str]] = deque(maxlen=MAX_ROWS)
        self._panels: deque[Panel] = deque(maxlen=MAX_ROWS)
        self._status = self._bar = self._evaluating = self._figure = ""
        self._num_played = 0  # batches of the evaluation
        self._began = self._shown_at = time.monotonic()
        self._drawn_at, self._drawing_took = -float("inf"), 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._clear()
        self._trains, self._first_step = True, state.global_step
        self._note_progress(state)
        self._show(state)

    def on_step_end(self, args, state, control, **kwargs):
        self._note_progress(state)
        if time.monotonic() - self._shown_at > SECONDS_BETWEEN_UPDATES:
            self._show(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if (panel := panel_row(logs, state.global_step)) is not None:
            self._panels.append(panel)
        elif is_of_steps(logs):
            self._steps.append(step_row(logs, state.global_step, state.max_steps))
            pause = max(SECONDS_BETWEEN_FIGURES, self._drawing_took / DRAWING_SHARE)
            if time.monotonic() - self._drawn_at > pause:
                self._draw(state)
        else:
            return
        self._show(state)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._num_played == 0 and self._cell != _cell():  # training was interrupted, in another cell
            self._trains = False
            self._clear()
        self._num_played += 1
        total = f" of {len(eval_dataloader)}" if has_length(eval_dataloader) else ""
        self._evaluating = f"evaluation: {self._num_played}{total} batches"
        if time.monotonic() - self._shown_at > SECONDS_BETWEEN_UPDATES:
            self._show(state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._num_played, self._evaluating = 0, ""
        self._show(state)
        if not self._trains:
            self._clear()  # the next one has a display of its own

    on_predict = on_evaluate

    def on_train_end(self, args, state, control, **kwargs):
        self._note_progress(state)
        if self._steps:
            self._draw(state)
        self._show(state)
        self._trains = False
        self._clear()

    def _note_progress(self, state) -> None:
        step, total = state.global_step, state.max_steps
        took = time.monotonic() - self._began
        self._status = f"step {step} of {total}, {_clock(took)}"
        if self._first_step < step < total:
            left = took / (step - self._first_step) * (total - step)
            self._status += f", about {_clock(left)} left"
        self._bar = f'<progress value="{step}" max="{total}" style="width: 300px"></progress>'

    def _draw(self, state) -> None:
        if not (self._has_matplotlib and state.is_world_process_zero):
            return
        start = time.monotonic()
        image = BytesIO()
        draw_training(state.log_history, (12, 3)).savefig(image, format="png", dpi=80)
        self._figure = f'<img src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'
        self._drawn_at = time.monotonic()
        self._drawing_took = self._drawn_at - start

    def _show(self, state) -> None:
        if not state.is_world_process_zero:
            return
        parts = [f"<div>{self._bar} {self._status}</div>"] if self._status else []
        if self._evaluating:
            parts.append(f"<div>{self._evaluating}</div>")
        if self._figure:
            parts.append(self._figure)
        if self._steps:
            parts.append(_table([column.name for column in COLUMNS], self._steps))
        if self._panels:
            names = ("panel", "step", "success", "95 %", "return", "episodes")
            parts.append(_table(names, self._panels))
        html = HTML("\n".join(parts))
        if self._display is None:
            self._display = display(html, display_id=True)
        else:
            self._display.update(html)
        self._shown_at = time.monotonic()


def _cell() -> int | None:
    """The number of the notebook's cell that runs."""
    return getattr(get_ipython(), "execution_count", None)


def _can_draw() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f"<table>{_row(names, 'th')}{''.join(_row(row, 'td') for row in rows)}</table>"


def _row(texts: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in texts)}</tr>"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
