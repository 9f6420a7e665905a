"""TRL's `SFTTrainer` on demonstrated episodes."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..rollouts import Episode, episode_row
from ..runs import own_randomness
from ..seams import head_tiles, replaced
from ..trainer import EPOTrainer
from .demonstrations import DemonstratedEpisode, player_of


logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a token without loss


def token_rows(episode: Episode, learn_observations: bool = False) -> list[dict[str, list[int]]]:
    """
    An episode as rows for supervised training, one for each context in which something is to be learned: `input_ids`, and
    `labels`, which are −100 at all tokens but the actions', and at those of mistakes.

    Args:
        episode ([`Episode`]): As it was played.
        learn_observations (`bool`, *optional*, defaults to `False`): All tokens are labels, but those of mistakes.
    """
    row = episode_row(episode, 0)
    mistakes = episode.mistakes if isinstance(episode, DemonstratedEpisode) else frozenset()
    rows = []
    for context in range(row.context_ids[-1] + 1):
        places = [place for place, its in enumerate(row.context_ids) if its == context]
        prompt = [] if context else list(episode.prompt_ids)
        ids = prompt + [row.completion_ids[place] for place in places]
        turns = [-1] * len(prompt) + [row.turn_ids[place] for place in places]
        labels = [
            token if (turn >= 0 or learn_observations) and turn not in mistakes else IGNORED
            for token, turn in zip(ids, turns, strict=True)
        ]
        if any(label != IGNORED for label in labels):
            rows.append({"input_ids": ids, "labels": labels})
    return rows


def warm_up(
    trainer: EPOTrainer,
    episodes: Iterable[Episode],
    learn_observations: bool = False,
    until_success: float | None = None,
    check_every: int = 50,
    **kwargs,
) -> float | None:
    """
    Train the trainer's model, an adapter or all weights, on the actions of `episodes` with TRL's [`~trl.SFTTrainer`]. Then
    `trainer.train()` goes on as if it had been made with the model that comes out.

    Args:
        trainer ([`EPOTrainer`]): Its model is trained.
        episodes (`Iterable[Episode]`): What to imitate.
        learn_observations (`bool`, *optional*, defaults to `False`):
            Learn to write observations too: a model that is new learns to read from them.
        until_success (`float`, *optional*):
            Stop as soon as the trainer's evaluation sets are solved this often (the mean over the sets), so that there is
            something left to learn.
        check_every (`int`, *optional*, defaults to `50`):
            Optimizer steps between two of these evaluations.
        kwargs:
            Of [`~trl.SFTConfig`], such as `num_train_epochs` (1 if it is not given), `learning_rate` (2e-5) and
            `per_device_train_batch_size` (4). Precision, gradient checkpointing, device and seed are the trainer's.

    Returns:
        `float` or `None`: The last evaluation's success, if there was one.

    Raises:
        ValueError: If there is nothing to learn from, or nothing to evaluate on, or success cannot be told.
    """
    player_of(trainer)
    rows = [row for episode in episodes for row in token_rows(episode, learn_observations)]
    if not rows:
        raise ValueError("There are no episodes to learn from.")
    check_until_success(until_success)
    if until_success is not None:
        if trainer.eval_dataset is None:
            raise ValueError("`until_success` needs an `eval_dataset`, the rows on which success is told.")
        if check_every < 1:
            raise ValueError(f"`check_every` is {check_every}, but must be at least 1.")
    log = trainer.state.log_history
    num_logged = len(log)
    stop = _StopAtSuccess(trainer, until_success, check_every)
    if until_success is not None and stop.is_reached():
        logger.warning("The model's success is %.1f %% without any warm-up.", 100 * stop.success)
    else:
        with own_randomness(trainer.args.seed, trainer.accelerator.device):
            _imitate(trainer, rows, [] if until_success is None else [stop], kwargs)
        trainer.weights_have_changed()
    # Of the looks the last one is of the policy that training begins with
    log[num_logged:] = [entry | {"step": 0} for entry in log[num_logged:] if entry["step"] == stop.last_look]
    if until_success is not None and stop.success < until_success:
        logger.warning(
            "The warm-up ends before `until_success=%s` was seen: the last evaluation's success is %.1f %%. Give more episodes, "
            "more passes over them or a higher learning rate.",
            until_success,
            100 * stop.success,
        )
    return stop.success


def check_until_success(until_success: float | None) -> None:
    """Raise a `ValueError` if no evaluation could have this success."""
    if until_success is not None and not 0.0 < until_success <= 1.0:
        raise ValueError(f"`until_success` is {until_success}, but must be above 0 and at most 1.")


def _imitate(trainer: EPOTrainer, rows: list[dict], callbacks: list[TrainerCallback], kwargs: dict[str, Any]) -> None:
    args = trainer.args
    settings = {
        "output_dir": str(Path(args.output_dir, "warm_up")),
        "max_length": None,  # episodes have their bounds
        "num_train_epochs": 1,
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        **{
            name: getattr(args, name)
            for name in (
                *("bf16", "fp16", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
                *("use_cpu", "seed", "disable_tqdm"),
            )
        },
        **kwargs,
    }
    with _forward_kept(trainer.model), head_tiles(trainer.accelerator.device):
        imitation = SFTTrainer(
            trainer.model,
            args=SFTConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=trainer.processing_class,
            callbacks=callbacks,
        )
        imitation.train()
        imitation.accelerator.free_memory()


@contextmanager
def _forward_kept(model: nn.Module) -> Iterator[None]:
    """What another trainer has put around the model's forward is taken off in the end."""
    modules = [model, model.get_base_model()] if is_peft_model(model) else [model]
    names = ("forward", "_original_forward")
    before = [{name: module.__dict__[name] for name in names if name in module.__dict__} for module in modules]
    try:
        yield
    finally:
        for module, had in zip(modules, before, strict=True):
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(had)


class _StopAtSuccess(TrainerCallback):
    """Ends training when the trainer's evaluation sets are solved often enough."""

    def __init__(self, trainer: EPOTrainer, until_success: float | None, check_every: int):
        self.trainer, self.until_success, self.check_every = trainer, until_success, check_every
        self.success: float | None = None
        self.last_look = 0  # the optimizer steps of the warm-up before it

    def is_reached(self, step: int = 0) -> bool:
        with replaced(self.trainer.state, "global_step", step):  # for what the evaluation tells and keeps
            metrics = self.trainer.evaluate()
        rates = [rate for name, rate in metrics.items() if name.endswith("episode/success_rate")]
        if not rates:
            raise ValueError(
                'The environment does not tell of success (`info["success"]`): leave `until_success` out.'
            )
        self.success, self.last_look = sum(rates) / len(rates), step
        return self.success >= self.until_success

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step == state.max_steps
        if state.global_step % self.check_every == 0 or last:
            control.should_training_stop = self.is_reached(state.global_step) or last
