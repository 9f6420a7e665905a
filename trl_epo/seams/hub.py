"""
The private names of TRL, and of transformers' Trainer below it, that pushing to the Hub relies on.

`PushingGRPOTrainer` is the lowest part of `SeamedGRPOTrainer`; `SIGNATURES` and `ATTRIBUTES` are checked like those of
`trl.py`.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from copy import copy
from functools import cache
from pathlib import Path
from shutil import copyfile
from typing import Any

import transformers.trainer
from accelerate.utils import is_peft_model
from transformers.utils import logging
from transformers.utils.hub import hf_api
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..runs import LOCK_FILE, TRAINING_ARGS_NAME, PushError
from .replacing import replaced


logger = logging.get_logger(__name__)

# Name of each method that is overridden or called -> its parameters.
SIGNATURES = {
    "init_hf_repo": ("self", "token", "private"),
    "push_to_hub": ("self", "commit_message", "blocking", "token", "revision", "private", "kwargs"),
    "save_model": ("self", "output_dir", "_internal_call"),
    "log": ("self", "logs", "start_time"),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_finish_current_push": ("self",),
}
# Attributes that GRPOTrainer or Trainer sets and this module reads or sets.
ATTRIBUTES = ("hub_model_id", "commit_scheduler")
CARD = "README.md"
# What stays on the machine when Trainer pushes a folder: notes that hold paths and tracebacks, and the viewer's page of them; a pickle
# of all settings, the token of the Hub included; a checkpoint that was downloaded to resume from, which would take the place of
# a newer one.
NOT_PUSHED = ("episodes/*", "viewer.html", TRAINING_ARGS_NAME, "last-checkpoint/*", LOCK_FILE)


@cache  # one thread for all pushes, so that they arrive in their order
def _careful_hub() -> Any:
    """
    Trainer's Hub, whose `upload_folder` leaves out what is `NOT_PUSHED`. If it fails it raises a [`PushError`] or, in the
    background, the log says so.
    """
    hub = copy(hf_api())
    upload = hub.upload_folder

    def upload_folder(*, repo_id: str, folder_path: str, ignore_patterns: Sequence[str] = (), **kwargs):
        try:
            pushed = upload(
                repo_id=repo_id, folder_path=folder_path, ignore_patterns=[*ignore_patterns, *NOT_PUSHED], **kwargs
            )
        except Exception as error:
            excluded = " ".join(f"--exclude '{pattern}'" for pattern in (*ignore_patterns, *NOT_PUSHED))
            raise PushError(
                f"The push to {repo_id} failed: {_told(error)}. What was to be pushed is in {folder_path}; "
                f"`hf upload {repo_id} {folder_path} . {excluded}` pushes it."
            ) from error
        if isinstance(pushed, Future):
            pushed.add_done_callback(_log_failed_push)
        return pushed

    hub.upload_folder = upload_folder
    return hub


def _log_failed_push(push: Future) -> None:
    if not push.cancelled() and (error := push.exception()) is not None:
        logger.error(f"A push to the Hub failed, so what it was to bring is not there: {_told(error)}")


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class PushingGRPOTrainer(GRPOTrainer):
    """
    `GRPOTrainer` whose pushes leave out what is private to the machine, and cost no run when they fail: in training they are
    errors in the log. What `log_completions_hub_repo` uploads is there when training ends.
    """

    # Of the class, so that methods also work on a trainer that was made without `__init__`.
    _trains = False
    _pushes_along = False  # whether a push is part of `save_model`

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        base = self.base_model_name
        pushes = self.args.push_to_hub and self.is_world_process_zero()
        if pushes and self.is_adapter and base and Path(base).is_dir():
            logger.warning(
                f"`push_to_hub=True`, but the base model of the adapter is the folder {base}: nobody else can load what is "
                "pushed. Push the base model first (`hf upload`), and begin from its name on the Hub."
            )

    @property
    def is_adapter(self) -> bool:
        """Whether what is trained and saved is an adapter."""
        return is_peft_model(self.model)

    @property
    def base_model_name(self) -> str | None:
        """The folder of the model that training began with, or its name on the Hub; `None` if it has neither."""
        return get_config_model_id(self.model.config) or None

    def train(self, *args, **kwargs):
        self._trains = True
        try:
            return super().train(*args, **kwargs)
        finally:
            self._trains = False
            self._push_completions()

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if not self._trains:
            self._push_completions()

    def _push_completions(self) -> None:
        """Bring what lies in `completions/` to `log_completions_hub_repo`: Python uploads nothing more once it ends."""
        scheduler = getattr(self, "commit_scheduler", None)  # on the first process, if there is such a repository
        if scheduler is None:
            return
        try:
            scheduler.trigger().result()
        except Exception as error:
            repo, folder = scheduler.repo_id, scheduler.folder_path
            logger.error(
                f"Completions could not be pushed to {repo}: {_told(error)}. They are in {folder}; "
                f"`hf upload {repo} {folder} . --repo-type dataset` pushes them."
            )

    def init_hf_repo(self, token=None, private=None):
        try:
            super().init_hf_repo(token, private)
        except Exception as error:
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            raise PushError(
                f"The repository {name!r} (`hub_model_id`) could not be made on the Hub: {_told(error)}. A token that may "
                "write comes from `hf auth login`, HF_TOKEN or `hub_token`; `push_to_hub=False` trains without."
            ) from error

    def save_model(self, output_dir=None, _internal_call=False):
        self._pushes_along = not _internal_call
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._pushes_along = False

    def push_to_hub(self, *args, **kwargs):
        along = self._pushes_along
        if not self.args.push_to_hub:
            self.save_model(_internal_call=True)  # before a repository is made, which may fail
        try:
            with replaced(transformers.trainer, "hf_api", _careful_hub):
                return super().push_to_hub(*args, **kwargs)
        except PushError as error:
            if not along:
                raise
            logger.error(str(error))

    def _push_from_checkpoint(self, checkpoint_folder):
        with replaced(transformers.trainer, "hf_api", _careful_hub):
            super()._push_from_checkpoint(checkpoint_folder)

    def replace_adapter_card(self, folder: Path) -> None:
        """
        Put the run's card in the place of PEFT's. That one is a form to fill in, and names the base model as its folder where
        it is one, for which the Hub refuses the whole checkpoint.
        """
        card, place = Path(self.args.output_dir, CARD), Path(folder, CARD)
        if card.resolve() != place.resolve():
            copyfile(card, place)

    def push_checkpoint(self, folder: Path, is_last: bool) -> None:
        """Begin to push a checkpoint; the last one of a run waits for the one before it, others are left out then."""
        if is_last:
            self._finish_current_push()
        try:
            self._push_from_checkpoint(str(folder))
        except Exception as error:  # the first process only: the run, and this process's part in it, go on
            logger.error(f"The checkpoint {folder} could not be pushed to the Hub: {_told(error)}", exc_info=error)
