"""
What a process must remember of a run between two optimizer steps, besides what Trainer saves: the generation batch that it
is still using, and figures that have not been logged. Tensors as safetensors, all else as JSON.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


FOLDER = "run_state"

Batch = dict[str, Any]


def save_run_state(checkpoint: Path, process: int, state: dict[str, Any], micro_batches: list[Batch | None]) -> None:
    """
    Write what one process remembers.

    Args:
        checkpoint (`Path`): The checkpoint's folder.
        process (`int`): Its index.
        state (`dict`): What JSON can carry; a number or text stands for other values.
        micro_batches (`list[dict | None]`): Those of the generation batch by their place, `None` for used ones.
    """
    tensors: dict[str, Tensor] = {}
    others: list[dict[str, Any] | None] = []
    for index, batch in enumerate(micro_batches):
        others.append(None if batch is None else {})
        for name, value in (batch or {}).items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value.clone().contiguous()  # slices share their memory
            else:
                others[index][name] = value
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"process_{process}.safetensors")
    text = json.dumps({"micro_batches": json.dumps(others), **state}, default=_plain)
    (folder / f"process_{process}.json").write_text(text)


def load_run_state(checkpoint: Path, process: int) -> tuple[dict[str, Any], list[Batch | None]] | None:
    """What [`save_run_state`] wrote; the first process's, without a batch, for one that wrote nothing; `None` if none did."""
    folder = checkpoint / FOLDER
    own = folder / f"process_{process}.json"
    path = own if own.exists() else folder / "process_0.json"
    if not path.exists():
        return None
    state = json.loads(path.read_text())
    micro_batches = json.loads(state.pop("micro_batches"))
    if path != own:
        return state, [None] * len(micro_batches)
    with safe_open(own.with_suffix(".safetensors"), "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a dictionary
            index, name = key.split("/", 1)
            micro_batches[int(index)][name] = tensors.get_tensor(key)
    return state, micro_batches


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
