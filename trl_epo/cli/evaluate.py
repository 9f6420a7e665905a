"""`trl-epo evaluate`."""

import json
import os
import sys
from pathlib import Path

from trl import ModelConfig

from ..config import EPOConfig
from ..reports import failed_share
from ..rollouts import FAILURES_FILE
from .mistakes import UsageError
from .settings import ScriptArguments
from .train import make_trainer


def evaluate(script: ScriptArguments, args: EPOConfig, model_args: ModelConfig) -> None:
    """
    Play the panels, print a table of them and write it as JSON.

    Raises:
        SystemExit: In the end, if more than `max_failed_fraction` of a panel's episodes failed.
    """
    path = _writable(Path(script.results or Path(args.output_dir, "evaluation.json")))
    panels = script.panels()
    args.beta, args.sync_ref_model, args.advantage_estimator = 0.0, False, "grpo"  # no reference model and no critic
    args.push_to_hub = False  # what a config file for `train` says
    trainer = make_trainer(script, args, model_args, train_dataset=next(iter(panels.values())), eval_dataset=panels)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        results = {
            "model": model_args.model_name_or_path,
            "environment": script.environment,
            "temperature": args.temperature if args.eval_temperature is None else args.eval_temperature,
            "episodes_per_row": trainer.num_generations_eval,
            "seed": args.seed,
            "panels": {name: panel_results(metrics, name) for name in panels},
        }
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(table(results["panels"]))
        print(f"\nAll figures: {path}")
    trainer.accelerator.end_training()
    failed = {name: failed_share(metrics, f"eval_{name}_") for name in panels}
    if too_many := [name for name, share in failed.items() if share > args.max_failed_fraction]:
        sys.exit(
            f"trl-epo evaluate: more episodes of {', '.join(too_many)} failed than `max_failed_fraction="
            f"{args.max_failed_fraction}` allows; why is in {Path(args.output_dir, FAILURES_FILE)}."
        )


def panel_results(metrics: dict[str, float], panel: str) -> dict[str, float]:
    """The episode metrics of a panel out of all of an evaluation's, under their short names."""
    prefix = f"eval_{panel}_episode/"
    results = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: int(value) if name == "count" else value for name, value in results.items()}


def table(panels: dict[str, dict[str, float]]) -> str:
    """
    A table of results by panel, and by task within it, and below it how many episodes failed, if any.

    >>> print(table({"iid": {"count": 8, "success_rate": 0.5, "success_low": 0.21, "success_high": 0.785,
    ...     "return": 0.5, "turns": 7.25, "invalid_actions": 0.1, "success_rate/heat": 1.0}}))
    panel     episodes  success         95 %  return  turns  invalid
    iid              8    50.0%   21.0-78.5%    0.50    7.2    10.0%
      heat               100.0%
    """
    width = max(
        [8, *(2 + len(name.split("/")[-1]) for results in panels.values() for name in results if "rate/" in name)]
    )
    passes = sorted({name for results in panels.values() for name in results if name.startswith("pass@")}, key=_k)
    header = f"{'panel':<{width}}  episodes  success         95 %  return  turns  invalid"
    lines = [header + "".join(f"  {name:>8}" for name in passes)]
    for panel, results in panels.items():
        interval = (
            f"{100 * results['success_low']:.1f}-{results['success_high']:.1%}" if "success_low" in results else "-"
        )
        lines.append(
            f"{panel:<{width}}  {results.get('count', 0):>8}  {_percent(results, 'success_rate'):>7}  {interval:>11}"
            f"  {_number(results, 'return', 2):>6}  {_number(results, 'turns', 1):>5}"
            f"  {_percent(results, 'invalid_actions'):>7}"
            + "".join(f"  {_percent(results, name):>8}" for name in passes)
        )
        for name in results:
            if name.startswith("success_rate/"):
                lines.append(f"{'  ' + name.split('/', 1)[1]:<{width}}  {'':>8}  {_percent(results, name):>7}")
    for panel, results in panels.items():
        if num_failed := round(results.get("count", 0) * results.get("stop/failure", 0.0)):
            lines.append(
                f"{panel}: {num_failed} of {results['count']} episodes failed (see the log): the other figures are "
                "without them."
            )
    return "\n".join(lines)


def _k(name: str) -> int:
    return int(name.removeprefix("pass@"))


def _number(results: dict[str, float], name: str, digits: int) -> str:
    return f"{results[name]:.{digits}f}" if name in results else "-"


def _percent(results: dict[str, float], name: str) -> str:
    return f"{results[name]:.1%}" if name in results else "-"


def _writable(path: Path) -> Path:
    """A file's path in a folder that exists by now, and in which it can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"`results` is {str(path)!r}, but its folder cannot be made: {error}. Name another."
        ) from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"`results` is {str(path)!r}, but no file can be written there: name another.")
    return path
