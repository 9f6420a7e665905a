"""
What the user can mend, told in one line instead of a traceback.

A traceback says where code went wrong, which is of use to whoever mends that code. An exception is told by its message alone
where someone wrote that message for the user of a command, and that can be seen from how it was raised:

- A [`UsageError`] is the command line's own.
- An exception of one of the `TOLD` types that a `raise` statement of this package ends a run with: its messages name the
  value, what was expected and the remedy. The same type raised by Python itself (`int("x")`, `zip(strict=True)`, a missing
  file that nobody looked for) or by anyone else's code (a reward function, an environment, torch) is a bug in that place,
  and keeps its traceback.
- While the trainer is made, the same of the libraries that check its settings ([`settings_checked`]); once it trains, what they
  raise is no longer about settings.
- What the operating system refuses (`REFUSALS`: no room, no right to write, …) names the file by itself.
"""

import argparse
import dis
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..text import did_you_mean


TOLD = (ValueError, TypeError, RuntimeError, OSError, ImportError, FloatingPointError, MemoryError)
PACKAGE = "trl_epo"
CHECKERS = ("trl", "transformers", "peft", "accelerate", "datasets", "huggingface_hub")
CHECKED = (ValueError, OSError, ImportError)  # what those say of settings; their `RuntimeError`s are of all kinds
REFUSALS = {
    getattr(errno, name)
    for name in (
        "EACCES",
        "EPERM",
        "ENOSPC",
        "EROFS",
        "EDQUOT",
        "EISDIR",
        "ENOTDIR",
        "EEXIST",
        "ENAMETOOLONG",
        "EFBIG",
    )
    if hasattr(errno, name)
}
RAISE = dis.opmap["RAISE_VARARGS"]


class UsageError(ValueError):
    """A setting that cannot work; the command ends with its message, without a traceback."""


class OneLineParser(argparse.ArgumentParser):
    """Raises its errors as [`UsageError`]s."""

    def error(self, message: str):
        raise UsageError(message)

    def parse_known_args(self, args=None, namespace=None):
        check_options(args or (), self)
        return super().parse_known_args(args, namespace)


def check_options(arguments: Iterable[str], parser: argparse.ArgumentParser) -> None:
    """Raise a [`UsageError`] with the nearest name if an option is none of the parser's."""
    known = parser._option_string_actions
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in known or not name.startswith("-") or name == "-" or " " in name or _is_number(name):
            continue
        plain = "--" + name.lstrip("-").replace("-", "_")
        hint = did_you_mean(plain, [option for option in known if "-" not in option[2:]])
        raise UsageError(f"There is no option {name}.{hint or f' See {parser.prog} --help.'}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def one_line(error: BaseException) -> str:
    """Its message without line breaks."""
    return " ".join(str(error).split())


def is_told(
    error: BaseException, types: tuple[type[BaseException], ...] = TOLD, by: Iterable[str] = (PACKAGE,)
) -> bool:
    """
    Whether the message of an exception is meant for the user.

    Args:
        error (`BaseException`): It has been raised.
        types (`tuple`): Of which types it may be.
        by (`Iterable[str]`): The packages of which one must have raised it, with a `raise` statement.
    """
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return True
    place = error.__traceback__
    if place is None or not isinstance(error, types) or not str(error):
        return False
    while place.tb_next is not None:
        place = place.tb_next
    package = place.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package in by and place.tb_frame.f_code.co_code[place.tb_lasti] == RAISE


@contextmanager
def settings_checked() -> Iterator[None]:
    """What the libraries say of settings in this context is a [`UsageError`]."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if is_told(error) or is_told(error, CHECKED, CHECKERS):
            raise UsageError(one_line(error)) from error
        raise
