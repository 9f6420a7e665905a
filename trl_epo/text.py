"""Text from outside: made encodable, bounded, and safe to show. Nothing in here changes harmless text."""

import difflib
import re
import textwrap
from collections import deque
from collections.abc import Iterable
from typing import Any


MAX_FAILURE_LENGTH = 20_000  # characters of a traceback
MAX_NAME_LENGTH = 100  # characters of a name that an environment gives

_RUN = re.compile(r"[^\n\t]+")


def without_surrogates(text: str) -> str:
    r"""
    `text` as it can be encoded: a lone surrogate becomes U+FFFD, the two halves of a character become that character.

    >>> without_surrogates("a\ud800b") == "a\ufffdb"
    True
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """
    A question after the nearest of `names`, to end a sentence with; empty if none is near.

    >>> did_you_mean("entropie_coef", ["entropy_coef", "seed"]), did_you_mean("dance", ["train"])
    (" Did you mean 'entropy_coef'?", '')
    """
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def shortened(text: str, length: int | None) -> str:
    """
    The beginning and the end of a text that is longer than `length`, and between them how much was left out, in
    `length` characters altogether.

    >>> shortened("left " * 100, 50)
    'left left l[… 479 characters left out …]left left '
    """
    if length is None or len(text) <= length:
        return text
    room = max(length - len(_left_out(len(text))), 0)
    start, end = text[: (room + 1) // 2], text[len(text) - room // 2 :]
    return (start + _left_out(len(text) - len(start) - len(end)) + end)[:length]


def _left_out(number: int) -> str:
    return f"[… {number:,} characters left out …]"


def shown(value: Any) -> str:
    """A value for an error message."""
    return shortened(repr(value), 200)


def printable(text: str) -> str:
    r"""
    `text` for a log: what would drive a terminal or hide (control characters, escape sequences, marks of direction,
    characters of no width, lone surrogates) is written out. Line breaks and tabs stay; backslashes are not doubled.

    >>> print(printable("\x1b]0;title\x07 go\u202e"))
    \x1b]0;title\x07 go\u202e
    """
    return _RUN.sub(lambda run: run[0] if run[0].isprintable() else "".join(map(_printable_character, run[0])), text)


def _printable_character(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def printable_parts(value: Any) -> Any:
    """[`printable`] on every text inside sequences and dictionaries; anything else stays as it is."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {key: printable_parts(part) for key, part in value.items()}
    if isinstance(value, list | tuple | deque):
        return [printable_parts(part) for part in value]
    return value


def set_apart(text: str) -> str:
    """[`printable`], as a block within a log entry: no line of it can pass for an entry of its own."""
    return textwrap.indent(printable(text), "  | ")


def name_of(value: Any) -> str:
    """What an environment or a dataset row calls its task, as it may stand in the name of a metric."""
    name = printable(shortened(str(value), MAX_NAME_LENGTH)).replace("\n", "\\n").replace("\t", "\\t")
    return shortened(name, MAX_NAME_LENGTH)


def whole_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents can be encoded; those that are no messages stay as they are, for others to complain."""
    return [
        {**message, "content": without_surrogates(message["content"])}
        if isinstance(message, dict) and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def taken_in(text: str, length: int | None) -> str:
    """A text of an environment: whole characters, at most `length` of them."""
    return without_surrogates(shortened(text, length))


def info_taken_in(info: dict[str, Any], length: int | None) -> dict[str, Any]:
    """The same for the texts in an environment's `info`; of a list of texts the first that have room in `length`."""
    return {key: _value_taken_in(value, length) for key, value in info.items()}


def _value_taken_in(value: Any, length: int | None) -> Any:
    if isinstance(value, str):
        return taken_in(value, length)
    if isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value):
        kept: list[str] = []
        room = float("inf") if length is None else length
        for text in value:
            room -= len(text) + 2  # with what separates them
            if room < 0:
                return [*kept, f"[… {len(value) - len(kept):,} more left out …]"]
            kept.append(without_surrogates(text))
        return kept
    return value
