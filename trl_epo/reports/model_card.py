"""What TRL's model card does not say of a run: EPO's settings and how the agent did."""

import textwrap
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


def complete_model_card(path: Path, args: EPOConfig, log_history: list[dict[str, Any]]) -> None:
    """Add a section on the run to the model card at `path`, and mend what TRL writes for a model without a name."""
    text = path.read_text()
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
