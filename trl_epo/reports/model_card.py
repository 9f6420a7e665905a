"""What TRL's model card does not say of a run: EPO's settings and how the agent did."""

import re
import textwrap
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import EPOConfig


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


PLAY_SETTINGS_FILE = "trl_epo.json"  # beside a model: the config file with which `trl-epo play` plays it
# What of `EPOConfig` an episode depends on
PLAY_SETTINGS = (
    *("max_turns", "max_turn_length", "max_completion_length", "max_observation_length"),
    *("context", "context_turns", "context_overflow", "chat_template_kwargs"),
    *("temperature", "eval_temperature", "top_p", "top_k", "min_p", "repetition_penalty", "bf16"),
)


def play_settings(args: EPOConfig) -> dict[str, Any]:
    """The settings that an episode depends on and that are not the defaults."""
    defaults = {field.name: field.default for field in fields(args)}
    settings = {name: getattr(args, name) for name in PLAY_SETTINGS}
    return {name: value for name, value in settings.items() if value != defaults[name]}


def play_example(
    args: EPOConfig, factories: dict[str | None, Callable], row: dict[str, Any], hub_model_id: str | None = None
) -> str:
    """
    How to let the model play an episode, as a block of code: a command where its settings are beside the model, else Python.

    Args:
        args ([`EPOConfig`]): The settings of training.
        factories (`dict[str | None, Callable]`): What makes the environments, by name.
        row (`dict`): A dataset row.
        hub_model_id (`str`, *optional*): The model's name on the Hub, if it is pushed.
    """
    folder = hub_model_id or args.output_dir
    if Path(args.output_dir, PLAY_SETTINGS_FILE).exists():
        lines = [f"trl-epo play {folder}"]
        if hub_model_id:
            lines = [f"hf download {folder} --local-dir model", "trl-epo play model"]
        return "\n".join(["```bash", *lines, "```"])
    factory = factories[None] if list(factories) == [None] else None
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "")
    if module not in (None, "__main__") and name.isidentifier():
        imported, defined = [f"from {module} import {name}"], []
    else:
        name = "make_environment"
        imported, defined = [], [f"{name} = ...  # the `environment_factory` of training"]
    row = {column: value for column, value in row.items() if value is not None}
    settings = "".join(f", {key}={value!r}" for key, value in play_settings(args).items())
    return "\n".join(
        [
            "```python",
            "from trl_epo import EPOConfig",
            *imported,
            "from trl_epo.play import play",
            "",
            *defined,
            f'args = EPOConfig("play"{settings})',
            f"play({folder!r}, {name}, row={row!r}, args=args)",
            "```",
        ]
    )


def complete_model_card(
    path: Path, args: EPOConfig, log_history: list[dict[str, Any]], example: str | None = None
) -> None:
    """
    Add a section on the run to the model card at `path`, mend what TRL writes for a model without a name, and put `example`
    in the place of TRL's question.
    """
    text = path.read_text()
    if example is not None:
        text = re.sub(r"(?<=## Quick start\n\n)```python\n.*?```", lambda _: example, text, count=1, flags=re.DOTALL)
    text = text.replace(
        "This model is a fine-tuned version of [None](https://huggingface.co/None)",
        "This model was trained from a model that is not on the Hub",
    )
    text = text.replace('model="None"', f'model="{args.hub_model_id or args.output_dir}"')
    rows = [f"| {symbol} | `{name}` | {getattr(args, name)} |" for symbol, name in SETTINGS]
    section = ["### EPO", "", "| | setting | value |", "| --- | --- | --- |", *rows, ""]
    results = {
        name: (entry["step"], value)
        for entry in log_history
        for name, value in entry.items()
        if value is not None and name.endswith(RESULTS) and "success_rate/" not in name
    }
    if results:
        section += ["Last logged:", "", "| metric | step | value |", "| --- | --- | --- |"]
        section += [f"| `{name}` | {step} | {value:.3f} |" for name, (step, value) in results.items()]
        section.append("")
    path.write_text(text.replace("### Framework versions", "\n".join(section) + "\n### Framework versions", 1))
