"""Hugging Face's way to write docstrings, as the API pages show them."""

import re

import griffe


# name (`int`, *optional*, defaults to `3`): the signature has the rest
PARAMETER = re.compile(
    r"^( *\*{0,2}\w+(?:, \*{0,2}\w+)*) \((`[^\n]*?)(?:, \*optional\*(?:, defaults to `.*?`)?)?\):", re.MULTILINE
)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\[|\()")  # [`~trl.GRPOConfig`]
DOCTEST = re.compile(r"^( *)>>> (?:.+\n?)+", re.MULTILINE)  # up to an empty line


class Docstrings(griffe.Extension):
    """Types without markup, references as code, doctests as blocks."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is None:
            return
        text = REFERENCE.sub(lambda found: f"`{found[1].split('.')[-1]}`", obj.docstring.value)
        text = PARAMETER.sub(lambda found: f"{found[1]} ({found[2].replace('`', '')}):", text)
        obj.docstring.value = DOCTEST.sub(_fenced, text)


def _fenced(found: re.Match) -> str:
    return f"{found[1]}```pycon\n{found[0].rstrip()}\n{found[1]}```\n"
