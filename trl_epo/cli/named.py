"""What is named on the command line: environments, things to call as "module:name", and configuration files."""

import inspect
import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium

from ..envs.names import ENVIRONMENTS
from ..text import did_you_mean
from .mistakes import UsageError


CONFIGS = Path(__file__).parents[1] / "configs"


def check_environment_name(name: str) -> None:
    """Raise a `UsageError` if it is neither one of this package's nor "module:name"."""
    if name not in ENVIRONMENTS and ":" not in name:
        raise UsageError(
            f"`environment` is {name!r}, but must be one of {', '.join(map(repr, ENVIRONMENTS))}, or 'module:name'."
            + did_you_mean(name, ENVIRONMENTS)
        )


def environment_maker(name: str, kwargs: dict[str, Any]) -> Callable[[], gymnasium.Env]:
    """What makes an environment; raises a `UsageError` if it makes none, or none that talks in text."""
    built_in = ENVIRONMENTS.get(name)
    factory = imported("environment", name if built_in is None else built_in.environment)

    def make() -> gymnasium.Env:
        wrong = f"`environment` is {name!r}, but called with {kwargs} it"
        try:
            environment = factory(**kwargs)
        except Exception as error:
            takes = f" It takes {inspect.signature(factory)}." if isinstance(error, TypeError) else ""
            raise UsageError(
                f"{wrong} raises {type(error).__name__}: {str(error).removesuffix('.')}.{takes}"
            ) from error
        if not isinstance(environment, gymnasium.Env):
            raise UsageError(
                f"{wrong} gives a {type(environment).__name__}. Name what makes a `gymnasium.Env`, such as a class "
                "of your own that inherits from `trl_epo.envs.TextEnv`; `trl_epo.check_env` shows how to wrap another's."
            )
        return environment

    return make


def imported(what: str, path: str) -> Callable:
    """What "module:name" names, something to call; raises a `UsageError` that says what was looked for and where."""
    wrong = f"`{what}` is {path!r}, but"
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UsageError(f"{wrong} must be 'module:name', such as 'my_code:{what}' for `{what}` in my_code.py.")
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever that code raises
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
            raise UsageError(
                f"{wrong} there is no module {error.name!r}, neither in the working directory {os.getcwd()} nor among "
                "Python's installed packages (PYTHONPATH adds folders)."
            ) from error
        raise UsageError(f"{wrong} importing {module_name!r} raises {type(error).__name__}: {error}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            where = getattr(module, "__file__", None) or "built into Python"
            raise UsageError(f"{wrong} {module_name!r} ({where}) has no {name!r}.{did_you_mean(part, vars(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{wrong} that is a {type(found).__name__}, and must be something to call.")
    return found


def json_object(name: str, value: dict | str | None) -> dict[str, Any]:
    """A mapping, which a command line gives as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UsageError(f"`{name}` is {value!r}, which is not JSON: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise UsageError(f'`{name}` is {value!r}, but must be a mapping, e.g. {{"rooms": 2}}.')
    return value or {}


def config_file(given: str) -> Path:
    """The configuration file of this path or, where there is none, the one of this name that comes with the package."""
    path = Path(given)
    if path.exists():
        return path
    packaged = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    if path.parent == Path() and path.suffix in ("", ".yaml") and path.stem in packaged:
        return packaged[path.stem]
    raise UsageError(
        f"`config` is {given!r}, but there is no such file in {os.getcwd()}, and none of that name comes with trl-epo, "
        f"which has {', '.join(packaged)}.{did_you_mean(path.stem, packaged)}"
    )
