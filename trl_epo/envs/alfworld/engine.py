"""
Plays an ALFWorld game as TextWorld does, to the letter, many times as fast.

A game has two halves. Its rules (PDDL) are played by fast-downward's library, which knows what is possible and what
comes of it. Its words are a grammar whose rules ask what is true just now:

    "The {r.name} is open. In it, you see [{o.indefinite + ' ' + o.name | inreceptacle(o:object, r:receptacle)}]."

TextWorld parses these texts again each time that it says something, and copies all it knows for each part of them. Here
each text is parsed once in the life of a process, by TextWorld's own parsers. Nothing of TextWorld is changed.
"""

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import fast_downward
from alfworld.agents.utils.misc import Demangler
from alfworld.info import ALFRED_TWL2_PATH
from textworld.envs.pddl import logic, textgen
from textworld.generator.game import EntityInfo
from textworld.logic import Rule, Type, TypeHierarchy

from .translation import translate, translate_anew, translate_for_planner


_NOT_UNDERSTOOD = "Nothing happens."

Term = tuple[str, str]  # name and type, of an object or of a placeholder for one
Mapping = dict[Term, Term]  # placeholder -> object

_TASK = re.compile(r'"task":\s*\[\s*{\s*"rhs":\s*("(?:[^"\\]|\\.)*")\s*}\s*]')

_WORDS = ("id", "name", "definite", "indefinite")  # of an object, that a text may ask for

_libraries: list[Any] = []  # of fast-downward, loaded and not in use; each plays one game at a time


def prepare() -> None:
    """Do once, before processes are forked, what each of them would do: load the library, parse ALFWorld's own grammar."""
    translate_anew("(define (domain d) (:predicates (p)))", "(define (problem q) (:domain d) (:init (p)) (:goal (p)))")
    with open(ALFRED_TWL2_PATH) as file:
        Grammar(file.read())
    _libraries.append(fast_downward.load_lib())


class Predicate(NamedTuple):
    """A condition on facts."""

    name: str
    parameters: tuple[Term, ...]
    types: tuple[str, ...]  # of the parameters


@lru_cache(maxsize=10_000)
def _symbols(text: str) -> tuple[textgen.Symbol, ...]:
    return tuple(textgen._parse_and_convert(text, rule_name="symbols"))


@lru_cache(maxsize=10_000)
def _query(text: str) -> tuple[Predicate, ...]:
    """The predicates of a text like `openable(r:receptacle) & opened(r:receptacle)`."""
    return tuple(
        Predicate(part.name, tuple((term.name, term.type) for term in part.parameters), part.signature.types)
        for part in Rule.parse_conjunctive_query(text).preconditions
    )


@lru_cache(maxsize=10_000)
def _expression(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


def _value(expression: ast.expr, entities: dict[str, EntityInfo]) -> Any:
    """
    What an expression of a grammar says, such as `o.indefinite + ' ' + o.name`: texts, objects, what these are called, sums
    and alternatives. TextWorld would run any Python that a game's file holds.
    """
    match expression:
        case ast.Constant(value=str() as text):
            return text
        case ast.Name(id=name):
            return entities[name]
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if attribute in _WORDS:
            return getattr(entities[name], attribute)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left, entities) + _value(right, entities)
        case ast.BoolOp(op=ast.Or(), values=values):
            return next(filter(None, said := [_value(each, entities) for each in values]), said[-1])
    raise NotImplementedError(f"The grammar's expression {ast.unparse(expression)!r} is none of ALFWorld's")


class _Document(logic._ModelConverter):
    """Takes a grammar's document apart; its rules stay texts, which TextWorld would parse at once."""

    def walk_PddlDocumentNode(self, node: Any) -> tuple[list[Any], dict[str, list[dict[str, Any]]]]:
        actions, rules = [], {}
        for part in node.parts:
            if hasattr(part, "template"):
                action = self.walk(part)
                actions.append(action)
                lines = action.grammar.split("\n")
                rules.update(json.loads("\n".join(line for line in lines if not line.lstrip().startswith("#"))))
            else:
                rules.update(json.loads(self._unescape_block(part.code)))
        return actions, rules


@lru_cache(maxsize=10)
def _document(text: str) -> tuple[list[Any], dict[str, list[dict[str, Any]]]]:
    return _Document().walk(logic._PARSER.parse(text, rule_name="pddlStart"))


def _document_of(text: str) -> tuple[list[Any], dict[str, list[dict[str, Any]]]]:
    """The actions and rules of a grammar. Games differ in the sentence that says the task: all else is parsed once."""
    if task := _TASK.search(text):
        actions, rules = _document(text[: task.start(1)] + '""' + text[task.end(1) :])
        if rules.get("task") == [{"rhs": ""}]:
            return actions, {**rules, "task": [{"rhs": json.loads(task[1])}]}
    return _document(text)


class Grammar:
    """
    The words of a game.

    Args:
        text: The game's `grammar`.

    Attributes:
        templates (`dict[str, str]`): The command of an action, in the grammar's language.
        feedback (`dict[str, str]`): What an action is answered with, in the same.
    """

    def __init__(self, text: str):
        actions, rules = _document_of(text)
        self.templates = {action.name.lower(): action.template for action in actions}
        self.feedback = {action.name.lower(): action.feedback_rule for action in actions}
        self._rules = {
            name: [(rule.get("condition", ""), _symbols(rule["rhs"])) for rule in alternatives]
            for name, alternatives in rules.items()
        }

    def say(self, text: str, facts: "Facts", entities: dict[str, EntityInfo], mapping: Mapping) -> str:
        """
        What a text of the grammar's language says.

        Args:
            text: As `"#intro#"`, a template or a feedback.
            facts: What is true.
            entities: What objects are called, by name in PDDL.
            mapping: The objects that the text is about, by placeholder.
        """
        return "".join(self._say(symbol, facts, entities, mapping) for symbol in _symbols(text))

    def _say(self, symbol: textgen.Symbol, facts: "Facts", entities: dict[str, EntityInfo], mapping: Mapping) -> str:
        known = facts, entities, mapping
        if isinstance(symbol, textgen.TerminalSymbol):
            return str(symbol)
        if isinstance(symbol, textgen.EvalSymbol):
            values = {name: entities[value] for (name, _), (value, _) in mapping.items()}
            return str(_value(_expression(symbol.expression), values))
        if isinstance(symbol, textgen.NonterminalSymbol):
            return "".join(self._say(part, *known) for part in self._rule(symbol, facts, mapping))
        if isinstance(symbol, textgen.ConditionalSymbol):
            return "".join(self._each(symbol, *known))
        if isinstance(symbol, textgen.ListSymbol):
            items = self._each(symbol.symbol, *known)
            if not items:
                return self._say(textgen.NonterminalSymbol("list_empty"), *known)
            separators = ["list_separator"] * (len(items) - 2) + ["list_last_separator"] * (len(items) > 1)
            said = [self._say(textgen.NonterminalSymbol(name), *known) for name in separators]
            return "".join(part for pair in zip(items, [*said, ""], strict=True) for part in pair)
        raise NotImplementedError(f"Unknown symbol: {type(symbol)}")

    def _each(
        self, symbol: textgen.ConditionalSymbol, facts: "Facts", entities: dict[str, EntityInfo], mapping: Mapping
    ) -> list[str]:
        """What a text says of each way to make its condition true."""
        ways = list(facts.matches(symbol.given, mapping)) if symbol.given else [mapping]
        return [self._say(symbol.expression, facts, entities, way) for way in ways]

    def _rule(self, symbol: textgen.Symbol, facts: "Facts", mapping: Mapping) -> tuple[textgen.Symbol, ...]:
        if not (alternatives := self._rules.get(str(symbol))):
            raise textgen.CSGUnknownSymbolError(symbol)
        for condition, symbols in alternatives:
            if not condition or any(True for _ in facts.matches(condition, mapping)):
                return symbols
        raise IndexError(f"no rule for #{symbol}# applies")


class Facts:
    """
    What is true in a game just now.

    Args:
        types: The hierarchy of types.
    """

    def __init__(self, types: TypeHierarchy):
        self._types = types
        self._subtypes: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        self._facts: dict[tuple[str, tuple[str, ...]], set[tuple[Term, ...]]] = defaultdict(set)  # by name and types
        self._sorted: dict[tuple[str, tuple[str, ...]], list[tuple[Term, ...]]] = {}

    def add(self, name: str, arguments: tuple[Term, ...]) -> None:
        signature = name, tuple([type_ for _, type_ in arguments])
        self._facts[signature].add(arguments)
        self._sorted.pop(signature, None)

    def discard(self, name: str, arguments: tuple[Term, ...]) -> None:
        signature = name, tuple([type_ for _, type_ in arguments])
        if signature in self._facts:
            self._facts[signature].discard(arguments)
            self._sorted.pop(signature, None)

    def objects(self) -> Iterator[Term]:
        """The objects of all facts, some of them several times."""
        for facts in self._facts.values():
            for arguments in facts:
                yield from arguments

    def matches(self, condition: str, mapping: Mapping) -> Iterator[Mapping]:
        """
        The ways to make a condition true, as complete mappings, in TextWorld's order: by the facts' objects. Different
        placeholders stand for different objects.
        """
        return self._matches(_query(condition), dict(mapping), set(mapping.values()))

    def _matches(self, predicates: Sequence[Predicate], mapping: Mapping, used: set[Term]) -> Iterator[Mapping]:
        if not predicates:
            yield dict(mapping)
            return
        predicate, *others = predicates
        for candidate in self._candidates(predicate, mapping):
            new = []
            for placeholder, value in zip(predicate.parameters, candidate, strict=True):
                known = mapping.get(placeholder)
                if known is None and value not in used:
                    mapping[placeholder] = value
                    used.add(value)
                    new.append(placeholder)
                elif known != value:
                    break
            else:
                yield from self._matches(others, mapping, used)
            for placeholder in new:
                used.discard(mapping.pop(placeholder))

    def _candidates(self, predicate: Predicate, mapping: Mapping) -> list[tuple[Term, ...]]:
        """The facts that a predicate may be about, and perhaps some more; in order."""
        types = predicate.types
        if types not in self._subtypes:
            self._subtypes[types] = [
                tuple([type_.name for type_ in each])
                for each in self._types.multi_subtypes([self._types.get(name) for name in types])
            ]
        values = [mapping.get(placeholder) for placeholder in predicate.parameters]
        if None not in values:
            types_of_values = tuple([type_ for _, type_ in values])
            is_fact = tuple(values) in self._facts.get((predicate.name, types_of_values), ())
            return [tuple(values)] if is_fact and types_of_values in self._subtypes[types] else []
        candidates = []
        for each in self._subtypes[types]:
            if (signature := (predicate.name, each)) in self._facts:
                if signature not in self._sorted:
                    self._sorted[signature] = sorted(self._facts[signature])
                candidates += self._sorted[signature]
        return candidates


class Game:
    """
    A game of ALFWorld. One thread at a time may play games: TextWorld's parsers keep state of their process.

    Args:
        contents: The game's file, with the keys `pddl_domain`, `pddl_problem` and `grammar`.

    Attributes:
        admissible_commands (`list[str]`): What may be said now, ordered.
        won (`bool`): Whether the goal is reached.
    """

    _facts: Facts
    _can_plan: bool

    def __init__(self, contents: dict[str, Any]):
        self._domain, self._problem = contents["pddl_domain"], contents["pddl_problem"]
        self._translation = translate(self._domain, self._problem)
        self._grammar = Grammar(contents["grammar"])
        self._types = TypeHierarchy()
        for name, parents in self._translation.types:
            if name not in {type_.name for type_ in self._types}:  # PDDL's root, `object`, may be declared once more
                self._types.add(Type(name, parents))
        self._atoms: dict[str, tuple[str, tuple[Term, ...]]] = {}
        self._library = _libraries.pop() if _libraries else fast_downward.load_lib()
        try:
            self._begin()
        except BaseException:
            self.close()
            raise
        self._entities = {name: EntityInfo(name, type_) for name, type_ in self._facts.objects()}
        names = Demangler(game_infos=self._entities)
        for entity in self._entities.values():
            entity.name = names.demangle_alfred_name(entity.id)
            entity.definite, entity.indefinite = "the", "a"

    def reset(self) -> str:
        """Begin from the beginning; returns the first observation."""
        if not self._at_beginning:
            self._begin()
        observation = self._grammar.say("#intro#", self._facts, self._entities, {})
        self._look_what_is_possible()
        return observation

    def step(self, command: str) -> str:
        """Take a command; returns the observation."""
        operator = self._operators.get(command)
        if operator is None:
            return _NOT_UNDERSTOOD
        self._at_beginning = False
        try:
            self._apply(operator)
            name = operator.name.split()[0]
            feedback = self._grammar.feedback[name]
            observation = self._grammar.say(feedback, self._facts, self._entities, self._mapping(operator))
        except ValueError:  # whatever it is about: TextWorld answers so
            observation = _NOT_UNDERSTOOD
        self._look_what_is_possible()
        return observation

    def solution(self) -> list[str]:
        """Commands that reach the goal from here, by fast-downward's planner; none if it finds no way."""
        if not self._can_plan:
            self._library.load_sas_replan(translate_for_planner(self._domain, self._problem).encode())
            self._can_plan = True
        if not self._library.replan(False):
            return []
        operators = (fast_downward.Operator * self._library.get_last_plan_length())()
        self._library.get_last_plan(operators)
        return [self._command(operator) for operator in operators]

    def _begin(self) -> None:
        self._library.load_sas(self._translation.sas.encode())
        self._can_plan = False
        self._facts = Facts(self._types)
        for name, *arguments in self._translation.facts:
            self._facts.add(name, self._typed(arguments))
        atoms = (fast_downward.Atom * self._library.get_state_size())()
        self._library.get_state(atoms)
        for text in [atom.name for atom in atoms]:
            if not text.startswith("NegatedAtom "):
                self._facts.add(*self._fact(text))
        self._at_beginning = True

    def _apply(self, operator: fast_downward.Operator) -> None:
        effects = (fast_downward.Atom * operator.nb_effect_atoms)()
        self._library.apply_operator(operator.id, effects)
        for effect in effects:
            name, arguments = self._fact(effect.name)
            self._facts.discard(name.removeprefix("not_") if name.startswith("not_") else f"not_{name}", arguments)
            self._facts.add(name, arguments)

    def _look_what_is_possible(self) -> None:
        self.won = self._library.check_goal()
        operators = (fast_downward.Operator * self._library.get_applicable_operators_count())()
        self._library.get_applicable_operators(operators)
        self._operators: dict[str, fast_downward.Operator] = {}  # of several with one command, the first
        for operator in operators:
            self._operators.setdefault(self._command(operator), operator)
        self.admissible_commands = sorted(self._operators)

    def _command(self, operator: fast_downward.Operator) -> str:
        template = self._grammar.templates[operator.name.split()[0]]
        return self._grammar.say(template, self._facts, self._entities, self._mapping(operator))

    def _mapping(self, operator: fast_downward.Operator) -> Mapping:
        action, *arguments = operator.name.split()
        parameters = self._translation.parameters[action]
        return {(name, type_): (value, type_) for (name, type_), value in zip(parameters, arguments, strict=False)}

    def _fact(self, text: str) -> tuple[str, tuple[Term, ...]]:
        """The fact of a text like `NegatedAtom inreceptacle(mug_1, shelf_2)`."""
        if text not in self._atoms:
            kind, fact = text.split(" ", 1)
            name, arguments = fact.removesuffix(")").split("(", 1)
            prefix = "not_" if kind == "NegatedAtom" else ""
            self._atoms[text] = prefix + name, self._typed([each for each in arguments.split(", ") if each])
        return self._atoms[text]

    def _typed(self, names: list[str]) -> tuple[Term, ...]:
        return tuple([(name, self._translation.objects[name]) for name in names])

    def close(self) -> None:
        """Give back what the game is played with; it cannot be played any more."""
        if self._library is not None:
            _libraries.append(self._library)
            self._library = None
