"""
The registered plan as data: arms, trials of the tuning, and the phases with their seeds. `PLAN.md` says why.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from regime import Regime


CHOSEN = Path(__file__).parent / "tuned.yaml"

Settings = dict[str, Any]  # of EPOConfig

GRPO: Settings = {"entropy_coef": 0.0}
PAPER: Settings = {
    "entropy_coef": 0.001,
    "entropy_smoothing_coef": 0.1,
    "entropy_corridor_low": 0.0,
    "entropy_corridor_high": 2.0,
}
PPO: Settings = {
    "advantage_estimator": "gae",
    "gae_lambda": 0.95,
    "critic_learning_rate": 1e-3,
    "critic_warmup_steps": 5,
}


def epo(coef: float, smoothing: float, high: float) -> Settings:
    """EPO with λ, α and κ_r."""
    return {
        **PAPER,
        "entropy_coef": coef,
        "entropy_smoothing_coef": smoothing,
        "entropy_corridor_high": high,
    }


def bonus(weight: float) -> Settings:
    """
    L_MT − weight·L_H. λ is not negative, so that a penalty is a batch corridor that lies at 0 and whose upper bound is
    always crossed: L_MT + |weight|·L_H from the second RL step on.
    """
    if weight >= 0:
        return {"entropy_coef": weight, "entropy_smoothing": "none"}
    at_zero = {"entropy_corridor_low": 0.0, "entropy_corridor_high": 0.0}
    return {"entropy_coef": 0.0, "entropy_corridor_coef": -weight, **at_zero}


def corridor(end: float) -> Settings:
    """The batch corridor around a line from the first RL step's L_H to this share of it at the last."""
    return {
        "entropy_coef": 0.0,
        "entropy_corridor_coef": 0.1,
        "entropy_corridor_low": 0.8,
        "entropy_corridor_high": 1.1,
        "entropy_reference": "linear",
        "entropy_reference_end": end,
    }


# The tuned arms, with as many trials each.
TRIALS: dict[str, list[Settings]] = {
    "epo-tuned": [
        epo(0.001, 2.0, 1.0),
        epo(0.001, 5.0, 1.0),
        epo(0.003, 2.0, 1.0),
        epo(0.003, 2.0, 1.5),
        epo(0.003, 5.0, 1.0),
        epo(0.01, 2.0, 1.0),
        epo(0.01, 5.0, 1.0),
        epo(0.01, 5.0, 1.5),
    ],
    "bonus": [bonus(weight) for weight in (-0.03, -0.01, -0.003, -0.001, 0.001, 0.003, 0.01, 0.03)],
    "corridor": [corridor(end) for end in (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5)],
}

SIX = ("grpo", "epo", "epo-tuned", "epo-tuned-unsmoothed", "bonus", "corridor")
ARMS = (*SIX, "ppo", "ppo+epo-tuned")


@dataclass(frozen=True)
class Phase:
    """Runs that belong together: each arm with each seed."""

    arms: Sequence[str]
    seeds: Sequence[int]


PHASES = {
    "pilot": Phase((), ()),  # as the command line says
    "tuning": Phase([f"{arm}/{n}" for arm in TRIALS for n in range(1, len(TRIALS[arm]) + 1)], range(800, 803)),
    "main": Phase(SIX, range(16)),
    "rates": Phase([f"{arm}*{factor}" for factor in (2, 4) for arm in SIX], range(5)),
    "ppo": Phase(("ppo", "ppo+epo-tuned"), range(10)),
}

# (hypothesis, arm, arm that it is compared with), confirmatory.
HYPOTHESES = (
    ("H1", "epo", "grpo"),
    ("H2", "epo-tuned", "grpo"),
    ("H3", "epo-tuned", "epo-tuned-unsmoothed"),
    ("H4", "corridor", "grpo"),
)


def arm_settings(name: str, regime: Regime, chosen: Path = CHOSEN) -> Settings:
    """
    What an arm sets in EPOConfig. `ARM/3` is the third trial of a tuned arm, `ARM*4` an arm at four times the learning rate.

    Raises:
        ValueError: If there is no such arm, or the tuning has not chosen its trial yet.
    """
    arm, trial, factor = re.fullmatch(r"(.*?)(?:/(\d+))?(?:\*(\d+))?", name).groups()
    rate = {"learning_rate": regime.learning_rate * int(factor)} if factor else {}
    if trial:
        if arm not in TRIALS or not 1 <= int(trial) <= len(TRIALS[arm]):
            raise ValueError(f"There is no trial {name!r}: {', '.join(TRIALS)} have trials 1 to 8, as in 'bonus/3'.")
        return {**TRIALS[arm][int(trial) - 1], **rate}
    if arm not in ARMS:
        raise ValueError(f"There is no arm {arm!r}; choose from {', '.join(ARMS)}.")
    return {**_by_name(arm, chosen), **rate}


def _by_name(arm: str, chosen: Path) -> Settings:
    if arm in ("grpo", "ppo"):
        return {**GRPO, **(PPO if arm == "ppo" else {})}
    if arm == "epo":
        return PAPER
    if arm == "epo-tuned-unsmoothed":
        return bonus(_tuned("epo-tuned", chosen)["entropy_coef"])
    if arm == "ppo+epo-tuned":
        return {**_tuned("epo-tuned", chosen), **PPO}
    return _tuned(arm, chosen)


def _tuned(arm: str, chosen: Path) -> Settings:
    number = yaml.safe_load(chosen.read_text())[arm]
    if number is None:
        raise ValueError(f"{chosen} does not say which trial {arm!r} takes: run the tuning, then set it there.")
    return TRIALS[arm][number - 1]
