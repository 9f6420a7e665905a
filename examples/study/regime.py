"""
The regime: the game, the warm start and the training that all arms share.

The pilot varies it from the command line; every later phase takes it from `regime.yaml`, as it was registered.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml


REGISTERED = Path(__file__).parent / "regime.yaml"


@dataclass(frozen=True)
class Regime:
    rooms: int = field(default=2, metadata={"help": "Rooms of a house."})
    chores: int = field(default=1, metadata={"help": "Things to bring somewhere in an episode."})
    turns: int = field(default=20, metadata={"help": "Turns of an episode at most."})
    list_actions: bool = field(default=False, metadata={"help": "Whether observations say what is possible now."})
    warm_up_episodes: int = field(default=3000, metadata={"help": "Expert episodes to imitate, each once."})
    warm_up_noise: float = field(default=0.3, metadata={"help": "Share of mistakes in these."})
    warm_up_learning_rate: float = field(default=6e-3, metadata={"help": "Of the imitation."})
    steps: int = field(default=60, metadata={"help": "RL steps, one optimizer step each."})
    episodes: int = field(default=64, metadata={"help": "Episodes of an RL step."})
    group: int = field(default=8, metadata={"help": "Episodes of a row."})
    temperature: float = field(default=1.0, metadata={"help": "At which training episodes are sampled."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of the RL steps."})
    kl_weight: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the warm start."})
    panel_rows: int = field(default=200, metadata={"help": "Held-out rows of a seed."})
    evaluate_every: int = field(default=20, metadata={"help": "RL steps between two evaluations; divides `steps`."})
    log_every: int = field(default=2, metadata={"help": "RL steps between two points of the training curve."})
    save_every: int = field(default=10, metadata={"help": "RL steps between two checkpoints."})
    take_off: float = field(
        default=0.3, metadata={"help": "Held-out success at temperature 0.4 from which on a run has taken off."}
    )

    def __post_init__(self):
        if self.steps % self.evaluate_every:
            raise ValueError(
                f"`steps` is {self.steps}, but must be a multiple of `evaluate_every` ({self.evaluate_every}), so that the "
                "last policy is evaluated."
            )
        if self.episodes % self.group:
            raise ValueError(f"`episodes` is {self.episodes}, but must be a multiple of `group` ({self.group}).")


def registered_regime(file: Path = REGISTERED) -> Regime:
    """
    The regime of the plan.

    Raises:
        ValueError: If a field is missing or not set yet.
    """
    values = yaml.safe_load(file.read_text())
    names = [each.name for each in fields(Regime)]
    if unset := [name for name in names if values.get(name) is None]:
        raise ValueError(
            f"{file} does not say {', '.join(unset)}: the pilot has to set them before the first registered run."
        )
    if unknown := sorted(values.keys() - set(names)):
        raise ValueError(f"{file} has {', '.join(unknown)}, but a regime has only {', '.join(names)}.")
    return Regime(**values)


def changed(regime: Regime) -> dict[str, int | float]:
    """Which fields differ from the defaults."""
    return {name: value for name, value in asdict(regime).items() if value != getattr(Regime(), name)}
