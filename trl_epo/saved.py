"""A saved model and what lies beside it: in a folder, or in a repository on the Hub."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import AutoPeftModelForCausalLM
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE


PLAY_SETTINGS_FILE = "trl_epo.json"  # beside a model: the config file with which `trl-epo play` plays it


def saved_file(model: str | os.PathLike, name: str, revision: str | None = None) -> Path | None:
    """
    A file beside a saved model, downloaded if it lies on the Hub; `None` if there is none, or none can be had.

    Args:
        model (`str`): A folder or, where there is none, a name on the Hub.
        name (`str`): The file's name.
        revision (`str`, *optional*): A branch, tag or commit of the repository.
    """
    if os.path.isdir(model):
        path = Path(model, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(model), name, revision=revision))
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None


def play_settings_file(model: str | os.PathLike, revision: str | None = None) -> Path | None:
    """Where the settings with which a model is played are, if they are beside it; a checkpoint's are those of its run."""
    file = saved_file(model, PLAY_SETTINGS_FILE, revision)
    beside = Path(model).parent / PLAY_SETTINGS_FILE
    return beside if file is None and Path(model).is_dir() and beside.is_file() else file


def is_adapter(model: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether what is saved there is an adapter."""
    return saved_file(model, ADAPTER_CONFIG, revision) is not None


def load_adapter(model: str, revision: str | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """
    An adapter on its base model, and the tokenizer that was saved with it; `None` in its place if none was.

    Args:
        model (`str`): A folder or a name on the Hub.
        revision (`str`, *optional*): Of the adapter's repository.
        kwargs: More of `AutoPeftModelForCausalLM.from_pretrained`.
    """
    loaded = AutoPeftModelForCausalLM.from_pretrained(model, revision=revision, **kwargs)
    if saved_file(model, TOKENIZER_CONFIG_FILE, revision) is None:
        return loaded, None
    tokenizer = AutoTokenizer.from_pretrained(
        model,
        revision=revision,
        trust_remote_code=kwargs.get("trust_remote_code", False),
        truncation_side="left",
        padding_side="left",
    )
    return loaded, tokenizer


def name_on_hub(model: str | None) -> str | None:
    """The name of a model on the Hub: its own or, of a folder, that of the model that the folder's card says it comes from."""
    if not model:
        return None
    if os.path.isdir(model):
        try:
            base = ModelCard.load(Path(model, "README.md")).data.get("base_model")
        except Exception:  # no card, or none that can be read, whatever its YAML raises
            return None
        return name_on_hub(base) if isinstance(base, str) and not os.path.isdir(base) else None
    try:
        validate_repo_id(model)
    except HFValidationError:  # a folder that was there once
        return None
    return model
