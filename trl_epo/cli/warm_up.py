"""`trl-epo warm-up`."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from trl import get_peft_config

from ..imitation import (
    chat_episodes,
    check_noise,
    check_until_success,
    expert_episodes,
    kept_episodes,
    read_chats,
    teacher_episodes,
)
from ..imitation import warm_up as imitate
from ..rollouts import Episode
from ..runs import sole_run
from ..trainer import EPOTrainer
from .mistakes import UsageError
from .settings import ScriptArguments, parse, save_play_settings
from .train import check_output_dir, make_trainer


logger = logging.getLogger(__name__)


@dataclass
class WarmUpArguments:
    """
    Whom to imitate, and for how long.

    Parameters:
        noise (`float`, *optional*, defaults to `0.0`):
            The share of the environment's expert's actions that are mistakes.
        learn_mistakes (`bool`, *optional*, defaults to `False`):
            Learn these too, and not only how the expert goes on from them.
        learn_observations (`bool`, *optional*, defaults to `False`):
            Learn to write the environment's texts too, as a model that is new has to.
        chats (`str`, *optional*):
            A file with one chat a line, as JSON, instead of the expert.
        from_run (`str`, *optional*):
            A run whose kept episodes are imitated instead (`--from`).
        teacher, teacher_model (`str`, *optional*):
            The URL of a chat endpoint that speaks OpenAI's API, and the name of its model, instead of the expert.
        success (`bool`, *optional*, defaults to `False`):
            Imitate only what succeeds.
        until_success (`float`, *optional*):
            Stop when the evaluation sets are solved this often.
        check_every (`int`, *optional*, defaults to `50`):
            Optimizer steps between two looks at that.
        warm_up_epochs (`float`, *optional*, defaults to `1.0`):
            Passes over the episodes.
        warm_up_learning_rate (`float`, *optional*, defaults to `2e-5`):
            The learning rate of the imitation.
        warm_up_batch_size (`int`, *optional*, defaults to `4`):
            Episodes (turns, in windows) per optimizer step.
    """

    noise: float = field(default=0.0, metadata={"help": "The share of the expert's actions that are mistakes."})
    learn_mistakes: bool = field(
        default=False, metadata={"help": "Learn these too, and not only how the expert goes on from them."}
    )
    learn_observations: bool = field(
        default=False, metadata={"help": "Learn to write the environment's texts too: for a model that is new."}
    )
    chats: str | None = field(default=None, metadata={"help": "A file with one chat a line, as JSON."})
    from_run: str | None = field(
        default=None, metadata={"help": "A run whose kept episodes are imitated.", "aliases": ["--from"]}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "URL of a chat endpoint that speaks OpenAI's API, up to /v1."}
    )
    teacher_model: str | None = field(default=None, metadata={"help": "The name of the teacher's model."})
    success: bool = field(default=False, metadata={"help": "Imitate only what succeeds."})
    until_success: float | None = field(
        default=None, metadata={"help": "Stop when the evaluation sets are solved this often, e.g. 0.2."}
    )
    check_every: int = field(default=50, metadata={"help": "Optimizer steps between two looks at that."})
    warm_up_epochs: float = field(default=1.0, metadata={"help": "Passes over the episodes."})
    warm_up_learning_rate: float = field(default=2e-5, metadata={"help": "The learning rate of the imitation."})
    warm_up_batch_size: int = field(default=4, metadata={"help": "Episodes (turns, in windows) per optimizer step."})

    def __post_init__(self):
        check_noise(self.noise)
        check_until_success(self.until_success)
        sources = [name for name in ("chats", "from_run", "teacher") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(
                f"{' and '.join(f'`{name}`' for name in sources)} are given, but imitate one source at a time."
            )
        if sources and self.noise:
            raise ValueError(f"`noise` is {self.noise}, but is for the environment's expert, not for `{sources[0]}`.")


def warm_up(arguments: Sequence[str]) -> None:
    """Imitate, and leave the model and its tokenizer in `output_dir`, for `train` to begin with."""
    script, args, model_args, whom = parse("warm-up", arguments, WarmUpArguments)
    check_output_dir(args)
    args.beta, args.sync_ref_model, args.advantage_estimator = 0.0, False, "grpo"  # no reference model and no critic
    args.push_to_hub = False  # what a config file for `train` says
    args.eval_strategy = "no"
    trainer = make_trainer(
        script,
        args,
        model_args,
        train_dataset=None if script.tasks is None else script.rows(script.train_split, script.train_size),
        eval_dataset=None if whom.until_success is None else script.panels(),
        peft_config=get_peft_config(model_args),
    )
    with sole_run(args.output_dir) if trainer.is_world_process_zero() else nullcontext():
        episodes = _episodes(trainer, script, whom)
        success = imitate(
            trainer,
            episodes,
            learn_observations=whom.learn_observations,
            until_success=whom.until_success,
            check_every=whom.check_every,
            num_train_epochs=whom.warm_up_epochs,
            learning_rate=whom.warm_up_learning_rate,
            per_device_train_batch_size=whom.warm_up_batch_size,
            logging_steps=args.logging_steps,
        )
        trainer.save_model()
        save_play_settings(script, args, model_args)
    trainer.accelerator.end_training()
    reached = "" if success is None else f" Success on the evaluation sets: {success:.1%}."
    print(f"{len(episodes)} episodes were imitated.{reached} The model is in {Path(args.output_dir)}.")


def _episodes(trainer: EPOTrainer, script: ScriptArguments, whom: WarmUpArguments) -> list[Episode]:
    try:
        if whom.chats:
            return chat_episodes(trainer, read_chats(whom.chats))
    except OSError as error:
        raise UsageError(f"`chats` is {whom.chats!r}, but cannot be read: {error}.") from error
    if whom.from_run:
        return kept_episodes(trainer, whom.from_run, whom.success)
    if script.tasks is None:
        raise UsageError(
            f"There are no rows to show: `tasks` is not set, and the environment {script.environment!r} is not one of this "
            "package's. Give a 'module:function' that returns the dataset of a split."
        )
    if whom.teacher:
        episodes = teacher_episodes(trainer, trainer.train_dataset, whom.teacher, whom.teacher_model)
    else:
        episodes = expert_episodes(
            trainer, trainer.train_dataset, noise=whom.noise, learn_mistakes=whom.learn_mistakes
        )
    logger.warning("%d of %d episodes succeed.", sum(bool(e.success) for e in episodes), len(episodes))
    return [episode for episode in episodes if episode.success or not whom.success]
