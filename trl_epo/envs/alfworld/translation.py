"""
From PDDL to what fast-downward plays, its SAS format: most of the time that a reset would take. So each translation is
kept on disk, for every process and every run.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import fast_downward

from .disk_cache import DiskCache, user_folder


CACHE_SIZE = 2**30  # bytes: some 20,000 games
FORMAT = 1  # of what is kept


@dataclass(frozen=True)
class Translation:
    """
    What a game's PDDL comes to.

    Attributes:
        sas: The game in the planner's format.
        types: Each type with its parents.
        objects: Each object's type.
        parameters: Each action's parameters, as pairs of name and type.
        facts: What is true in the beginning: name and objects.
    """

    sas: str
    types: list[list]
    objects: dict[str, str]
    parameters: dict[str, list[list[str]]]
    facts: list[list[str]]


def translate(domain: str, problem: str) -> Translation:
    """The translation of a PDDL domain and problem. What any process has translated before comes from the cache."""
    return Translation(**_kept("game", domain, problem, lambda: asdict(translate_anew(domain, problem))))


def translate_for_planner(domain: str, problem: str) -> str:
    """The same in the planner's format, as its planner wants it; from the cache, too."""
    return _kept("planner", domain, problem, lambda: _pddl2sas(domain, problem, optimize=True)[1])


def _kept(what: str, domain: str, problem: str, make: Callable[[], Any]) -> Any:
    key = hashlib.sha256(json.dumps([FORMAT, _versions(), what, domain, problem]).encode()).hexdigest()
    kept = DiskCache(user_folder("alfworld"), CACHE_SIZE)
    return json.loads(kept.get(key, lambda: json.dumps(make()).encode()))


@cache
def _versions() -> list[str]:
    return [version(name) for name in ("fast-downward-textworld", "textworld")]


def translate_anew(domain: str, problem: str) -> Translation:
    """The same without the cache."""
    task, sas = _pddl2sas(domain, problem)
    return Translation(
        sas=sas,
        types=[[type_.name, list(type_.supertype_names)] for type_ in task.types],
        objects={each.name: each.type_name for each in task.objects},
        # of several actions with one name, TextWorld takes the last one's parameters
        parameters={
            action.name: [[each.name.strip("?"), each.type_name] for each in action.parameters]
            for action in task.actions
        },
        facts=[fact for each in task.init if (fact := _fact(each))],
    )


def _pddl2sas(domain: str, problem: str, **kwargs) -> tuple[Any, str]:
    argv = sys.argv
    try:
        return fast_downward.pddl2sas(domain, problem, **kwargs)
    finally:
        sys.argv = argv  # the translator takes it for its own


def _fact(element: Any) -> list[str] | None:
    """A fact of the first state, as TextWorld sees it: without equalities, costs and distances."""
    if isinstance(element, fast_downward.translate.pddl.conditions.Atom):
        return [element.predicate, *element.args] if element.predicate != "=" else None
    if isinstance(element, fast_downward.translate.pddl.f_expression.Assign):
        value = str(element.expression.value)
        if element.fluent.symbol != "total-cost" and not value.isdigit():
            return [value, *element.fluent.args]
    return None
