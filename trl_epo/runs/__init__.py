"""
A run of days comes out whole.

In: a trainer's state. Out: whole checkpoints and how to find them, optimizer steps that are left out, signals, sharded weights.
Imports: rollouts and what is below. Open first: `checkpoints.py`.
"""

from .checkpoints import (
    TRAINING_ARGS_NAME,
    CheckpointError,
    PushError,
    begin_checkpoint,
    checkpoint_to_resume,
    finish_checkpoint,
    last_whole_checkpoint,
    rotate,
    step_of,
)
from .folder_lock import LOCK_FILE, FolderInUse, check_unused, sole_run
from .gloo import let_gloo_finish
from .interruption import NAMES, Interruption, end
from .nonfinite import NonfiniteSteps, gradient_is_finite, leaves_overflow_to_scaler
from .randomness import own_randomness
from .run_state import load_run_state, save_run_state
from .sharding import (
    called_alone,
    check_checkpointing,
    check_critic,
    check_rollouts,
    gathered_weights,
    keep_output_precision,
    optimizer_bytes_to_come,
    set_timeout,
    sharded_like,
    shards_with_zero3,
)


__all__ = [
    "LOCK_FILE",
    "NAMES",
    "TRAINING_ARGS_NAME",
    "CheckpointError",
    "FolderInUse",
    "Interruption",
    "NonfiniteSteps",
    "PushError",
    "begin_checkpoint",
    "called_alone",
    "check_checkpointing",
    "check_critic",
    "check_rollouts",
    "check_unused",
    "checkpoint_to_resume",
    "end",
    "finish_checkpoint",
    "gathered_weights",
    "gradient_is_finite",
    "keep_output_precision",
    "last_whole_checkpoint",
    "leaves_overflow_to_scaler",
    "let_gloo_finish",
    "load_run_state",
    "optimizer_bytes_to_come",
    "own_randomness",
    "rotate",
    "save_run_state",
    "set_timeout",
    "sharded_like",
    "shards_with_zero3",
    "sole_run",
    "step_of",
]
