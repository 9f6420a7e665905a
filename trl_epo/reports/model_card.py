"""What TRL's model card does not say of a run: the environment, how the agent did, an episode, how to play it, EPO's settings."""

import ast
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from keyword import iskeyword
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..config import EPOConfig, changed_settings
from ..envs.names import ENVIRONMENTS
from ..saved import PLAY_SETTINGS_FILE
from ..text import name_of, printable, shortened


PAPER = {
    "title": "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning",
    "id": "2509.22576",
    "citation": textwrap.dedent("""\
        @article{xu2025epo,
            title        = {{EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning}},
            author       = {Wujiang Xu and others},
            year         = 2025,
            eprint       = {arXiv:2509.22576},
        }"""),
}

SETTINGS = (
    ("λ", "entropy_coef"),
    ("α", "entropy_smoothing_coef"),
    ("penalty", "entropy_smoothing"),
    ("κ_l", "entropy_corridor_low"),
    ("κ_r", "entropy_corridor_high"),
    ("reference", "entropy_reference"),
    ("weight of the batch's corridor", "entropy_corridor_coef"),
    ("γ_β", "entropy_smoothing_decay"),
    ("schedule of β_k", "entropy_smoothing_schedule"),
    ("aggregation", "entropy_aggregation"),
    ("δ", "entropy_turn_decay"),
    ("α of the shaped advantage", "entropy_advantage_coef"),
    ("context", "context"),
    ("advantage estimator", "advantage_estimator"),
    ("group size", "num_generations"),
    ("learning rate", "learning_rate"),
    ("seed", "seed"),
)
RESULTS = ("episode/success_rate", "episode/return", "episode/turns")


# What of `EPOConfig` an episode depends on
PLAY_SETTINGS = (
    *("max_turns", "max_turn_length", "max_completion_length", "max_observation_length"),
    *("context", "context_turns", "context_overflow", "chat_template_kwargs"),
    *("temperature", "eval_temperature", "top_p", "top_k", "min_p", "repetition_penalty", "bf16"),
)
CODE_SETTINGS = (
    "environment",
    "tasks",
    "prompt_builder",
    "action_parser",
)  # in that file: "module:name", if not built in
OWN_CODE = {path for built_in in ENVIRONMENTS.values() for path in built_in}

# Of the example episode
MAX_EXAMPLE_TURNS = 12
MAX_EXAMPLE_TEXT = 800  # characters of a text


@dataclass(frozen=True)
class RunFacts:
    """
    What a card tells of a run.

    Args:
        args ([`EPOConfig`]): The settings of training.
        log_history (`list[dict]`): The log.
        weights_step (`int`): The optimizer step after which the weights are as they are saved.
        weights_log (`list[dict]`): The entries of the log whose evaluations may be of these weights.
        repository (`str`, *optional*): The model's name on the Hub, if it is pushed.
        base_model (`str`, *optional*): The name on the Hub of what training began with.
        is_adapter (`bool`): Whether what is saved is an adapter.
        factories (`dict[str | None, Callable]`): What makes the text environments, by name; none if none were played.
        row (`dict`): A dataset row.
        num_rows (`int`, *optional*): Rows of the dataset.
        example (`dict`, *optional*): A kept episode.
    """

    args: EPOConfig
    log_history: list[dict[str, Any]]
    weights_step: int
    weights_log: list[dict[str, Any]]
    repository: str | None = None
    base_model: str | None = None
    is_adapter: bool = False
    factories: dict[str | None, Callable] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)
    num_rows: int | None = None
    example: dict[str, Any] | None = None

    @property
    def place(self) -> str:
        """What others write to get the model."""
        return self.repository or self.args.output_dir

    @property
    def saved_settings(self) -> dict[str, Any] | None:
        """The settings beside the model with which `trl-epo play` plays it, if they are there and name the environment."""
        return named_environment(Path(self.args.output_dir, PLAY_SETTINGS_FILE))


def play_settings(args: EPOConfig) -> dict[str, Any]:
    """The settings that an episode depends on and that are not the defaults."""
    return changed_settings(args, PLAY_SETTINGS)


def keep_limits(args: EPOConfig, folder: Path) -> None:
    """Leave beside a model what bounds an episode, for `trl-epo play`, where nothing is that also names the environment."""
    file = folder / PLAY_SETTINGS_FILE
    if named_environment(file) is None:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(play_settings(args), indent=2) + "\n")


def named_environment(file: Path) -> dict[str, Any] | None:
    """The settings in this file, if it is there, can be read and names an environment."""
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "environment" in settings else None


def foreign_code(settings: dict[str, Any]) -> dict[str, str]:
    """
    The settings beside a model that name code which is not this package's.

    >>> foreign_code({"environment": "household", "tasks": "my_code:rows", "max_turns": 3})
    {'tasks': 'my_code:rows'}
    """
    named = {name: str(settings[name]) for name in CODE_SETTINGS if settings.get(name)}
    return {name: path for name, path in named.items() if ":" in path and path not in OWN_CODE}


def complete_model_card(path: Path, facts: RunFacts) -> None:
    """Complete the model card at `path`, as TRL has written it."""
    card = ModelCard.load(path)
    _complete_metadata(card.data, facts)
    text = card.text
    # From the end to the beginning, so that what an episode says is not taken for a heading
    text = text.replace("- TRL:", f"{_versions(facts)}\n- TRL:", 1)
    text = text.replace("### Framework versions", f"{_training(facts)}\n### Framework versions", 1)
    if facts.factories:
        text = text.replace("## Training procedure", f"{_agent(facts)}\n\n## Training procedure", 1)
        start = f"{play_example(facts)}\n\n{_loading(facts)}"
        text = re.sub(r"(?<=## Quick start\n\n)```python\n.*?```", lambda _: start, text, count=1, flags=re.DOTALL)
    else:
        text = text.replace('model="None"', f'model="{facts.place}"')
    card.text = text.replace(
        "This model is a fine-tuned version of [None](https://huggingface.co/None)", _origin(facts), 1
    )
    card.save(path)


def _complete_metadata(data: Any, facts: RunFacts) -> None:
    data.pop("licence", None)  # a placeholder of TRL's, which is no key of a card
    data.base_model = facts.base_model
    if facts.is_adapter:
        data.library_name = "peft"
    if facts.factories:
        data.pipeline_tag = "text-generation"
        data.tags = [*data.tags, "agent"]


def _origin(facts: RunFacts) -> str:
    if facts.base_model is None:
        return "This model was trained from a model that is not on the Hub"
    return f"This model is a fine-tuned version of [{facts.base_model}](https://huggingface.co/{facts.base_model})"


def _versions(facts: RunFacts) -> str:
    try:
        lines = [f"- trl-epo: {version('trl-epo')}"]
    except PackageNotFoundError:  # it was copied, not installed
        lines = ["- trl-epo"]
    return "\n".join([*lines, f"- PEFT: {version('peft')}"] if facts.is_adapter else lines)


# How to play and load it


def play_example(facts: RunFacts) -> str:
    """How to let the model play an episode, as a block of code: a command where its settings are beside the model, else Python."""
    place, args = facts.place, facts.args
    settings = facts.saved_settings
    if settings is not None:
        # Code that a repository names is run only if the user names it too
        said = foreign_code(settings) if facts.repository else {}
        command = " ".join([f"trl-epo play {place}", *(f"--{name} {path}" for name, path in said.items())])
        return f"```bash\n{command}\n```"
    made = _as_code(facts.factories[None]) if list(facts.factories) == [None] else None
    imported, expression = made or ([], "make_environment")
    defined = [] if made else ["make_environment = ...  # the `environment_factory` of training"]
    row = {
        column: value
        for column, value in facts.row.items()
        if value is not None and len(repr(value)) <= MAX_EXAMPLE_TEXT
    }
    shown = "".join(f", {key}={value!r}" for key, value in play_settings(args).items())
    return "\n".join(
        [
            "```python",
            "from trl_epo import EPOConfig",
            *imported,
            "from trl_epo.play import play",
            "",
            *defined,
            f'args = EPOConfig("play"{shown})',
            f"play({place!r}, {expression}, row={row!r}, args=args)",
            "```",
        ]
    )


def _as_code(factory: Callable) -> tuple[list[str], str] | None:
    """Imports and an expression that make what makes environments again; `None` if others cannot import it."""
    made, args, kwargs = _unwrapped(factory)
    module, name = getattr(made, "__module__", None), getattr(made, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        return None
    try:
        text = repr([args, kwargs])
        if len(text) > MAX_EXAMPLE_TEXT or ast.literal_eval(text) != [args, kwargs]:
            return None
    except Exception:  # an object that its text does not make again, or that cannot even be shown
        return None
    if any(not key.isidentifier() or iskeyword(key) for key in kwargs):
        return None
    imported = [f"from {module} import {name}"]
    if not args and not kwargs:
        return imported, name
    given = ", ".join([name, *map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
    return ["from functools import partial", *imported], f"partial({given})"


def _unwrapped(factory: Callable) -> tuple[Callable, list[Any], dict[str, Any]]:
    """What makes an environment, and the arguments that it is called with, as far as they can be told."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    while isinstance(factory, partial):
        args, kwargs = [*factory.args, *args], factory.keywords | kwargs
        factory = factory.func
    return factory, args, kwargs


def _loading(facts: RunFacts) -> str:
    name, what = "AutoModelForCausalLM", "The weights alone:"
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if facts.is_adapter:
        base = f"`{facts.base_model}`" if facts.base_model else "its base model, which is not on the Hub"
        name, what = "AutoPeftModelForCausalLM", f"The weights are an adapter, which is loaded onto {base}:"
        imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
    return "\n".join(
        [
            "That needs [trl-epo](https://github.com/trl-epo/trl-epo), which plays a turn as in training. " + what,
            "",
            "```python",
            *imports,
            "",
            f'model = {name}.from_pretrained("{facts.place}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.place}")',
            "```",
        ]
    )


# The environment and how the agent did in it


def _agent(facts: RunFacts) -> str:
    parts = [_environment(facts), _evaluation(facts)]
    if facts.example is not None:
        parts.append(_episode(facts.example))
    return "\n\n".join(parts)


def _environment(facts: RunFacts) -> str:
    args, settings = facts.args, facts.saved_settings or {}
    made: dict[str | None, tuple[str, dict[str, Any]]]
    if "environment" in settings:
        made = {None: (settings["environment"], settings.get("environment_kwargs") or {})}
    else:
        made = {name: _described(factory) for name, factory in facts.factories.items()}
    rows = []
    for name, (what, kwargs) in made.items():
        rows.append((f"environment `{name}`" if name else "environment", f"`{what}`"))
        if kwargs:
            rows.append(("its arguments", _code(json.dumps(kwargs, default=repr, ensure_ascii=False))))
    if settings.get("tasks"):
        kwargs = settings.get("tasks_kwargs")
        rows.append(("rows", f"`{settings['tasks']}`" + (f" with {_code(json.dumps(kwargs))}" if kwargs else "")))
    if facts.num_rows is not None and any(value is not None for value in facts.row.values()):
        rows.append(("rows trained on", str(facts.num_rows)))
    rows.append(("an episode", f"at most {args.max_turns} turns of at most {args.max_turn_length} tokens"))
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(
        [
            "## Environment",
            "",
            "The model is an agent: turn by turn it reads what a text environment says, and answers with an action.",
            "",
            "| | |",
            "| --- | --- |",
            *lines,
        ]
    )


def _described(factory: Callable) -> tuple[str, dict[str, Any]]:
    """The name of what makes an environment, and the arguments that it is called with by name."""
    made, _, kwargs = _unwrapped(factory)
    module, name = getattr(made, "__module__", None), getattr(made, "__qualname__", type(made).__qualname__)
    return f"{module}.{name}" if module not in (None, "__main__") else name, kwargs


def _evaluation(facts: RunFacts) -> str:
    panels = _panels(facts.weights_log)
    lines = ["## Evaluation", "", f"The weights are those after {_steps(facts.weights_step)}."]
    if not panels:
        return "\n".join([*lines, "No evaluation of them was logged."])
    args = facts.args
    temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
    lines += [
        "",
        "| set | step | episodes | success | 95 % interval | return | turns | failed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for panel, (step, found) in panels.items():
        interval = f"{found['success_low']:.1%} to {found['success_high']:.1%}" if "success_low" in found else "-"
        success = f"{found['success_rate']:.1%}" if "success_rate" in found else "-"
        numbers = [f"{found[name]:.2f}" if name in found else "-" for name in ("return", "turns")]
        failed = f"{found.get('stop/failure', 0.0):.1%}"
        cells = [_code(panel) if panel else "-", step, int(found.get("count", 0)), success, interval, *numbers, failed]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"Sampled at temperature {temperature:g}. The interval tells how success may differ on other rows of the same kind, with "
        "this model. How much models of other seeds differ it does not tell.",
    ]
    return "\n".join(lines)


def _steps(number: int) -> str:
    return f"{number} optimizer step{'s' * (number != 1)}"


def _panels(log: list[dict[str, Any]]) -> dict[str, tuple[int, dict[str, float]]]:
    """The last evaluation of each set: name (empty if it has none) -> step, and its episode metrics under their short names."""
    panels: dict[str, tuple[int, dict[str, float]]] = {}
    for entry in log:
        found: dict[str, dict[str, float]] = {}
        for name, value in entry.items():
            if (parts := re.fullmatch(r"eval_(?:(.*)_)?episode/(.*)", name)) and value is not None:
                found.setdefault(parts[1] or "", {})[parts[2]] = value
        panels |= {panel: (entry["step"], metrics) for panel, metrics in found.items()}
    return panels


def _episode(row: dict[str, Any]) -> str:
    """A kept episode as `trl-epo play` shows one, bounded."""
    verdict = {True: "success", False: "no success", None: "the environment does not tell of success"}[row["success"]]
    of = (
        "training" if row["mode"] == "train" else f"evaluation {_code(row['panel'])}" if row["panel"] else "evaluation"
    )
    task = f", task {_code(name_of(row['task']))}" if row["task"] else ""
    turns = row["turns"]
    first = range(len(turns)) if len(turns) <= MAX_EXAMPLE_TURNS else range(MAX_EXAMPLE_TURNS - 3)
    last = range(max(len(first), len(turns) - 3), len(turns))
    lines = [_bounded(row["first_observation"]), *_turns(turns, first)]
    if len(turns) > len(first) + len(last):
        lines += ["", f"[… {len(turns) - len(first) - len(last)} turns left out …]"]
    episode = "\n".join([*lines, *_turns(turns, last)])
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", episode))])
    return "\n".join(
        [
            "## An episode",
            "",
            f"Of {of}, after {_steps(row['step'])}{task}: {verdict} after {len(turns)} turns, return "
            f"{row['return']:g}. What the model says begins with `>`.",
            "",
            f"{fence}text",
            episode,
            fence,
        ]
    )


def _turns(turns: list[dict[str, Any]], which: range) -> list[str]:
    lines = []
    for number in which:
        turn = turns[number]
        reward = f"  [reward {turn['reward']:g}]" if turn["reward"] else ""
        unread = "(no action was found in that) " if turn["action"] is None else ""
        lines += ["", f"> {_bounded(turn['text'])}", f"{unread}{_bounded(turn['observation'])}{reward}"]
    return lines


def _bounded(text: str | None) -> str:
    return printable(shortened(text or "", MAX_EXAMPLE_TEXT)).strip()


def _code(text: str) -> str:
    """Text as code in a table: on one line, without what would end the code or the cell."""
    return "`" + printable(shortened(text, 200)).replace("`", "'").replace("|", "/").replace("\n", " ") + "`"


# How it was trained


def _training(facts: RunFacts) -> str:
    rows = [f"| {symbol} | `{name}` | {getattr(facts.args, name)} |" for symbol, name in SETTINGS]
    section = ["### EPO", "", "| | setting | value |", "| --- | --- | --- |", *rows, ""]
    results = {
        name: (entry["step"], value)
        for entry in facts.log_history
        for name, value in entry.items()
        if value is not None and name in RESULTS
    }
    if results:
        section += ["Last logged in training:", "", "| metric | step | value |", "| --- | --- | --- |"]
        section += [f"| `{name}` | {step} | {value:.3f} |" for name, (step, value) in results.items()]
        section.append("")
    return "\n".join(section)
