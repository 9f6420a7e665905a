"""Configuration of `EPOTrainer`: TRL's `GRPOConfig` and the fields that EPO adds."""

import math
from dataclasses import dataclass, field

import torch
from transformers.utils import logging
from trl import GRPOConfig


logger = logging.get_logger(__name__)

SMOOTHING_KINDS = ("hinge", "indicator", "none")
SCHEDULES = ("exponential", "constant")
AGGREGATIONS = ("turn", "token")


@dataclass
class EPOConfig(GRPOConfig):
    r"""
    Configuration class for [`EPOTrainer`].

    Only the parameters that are new, or whose default differs, are listed here; everything else is inherited from
    [`~trl.GRPOConfig`]. Symbols and equations are those of the paper (arXiv 2509.22576). On a machine without an
    accelerator `use_cpu` is set, so that the defaults work there too.

    Parameters:
        entropy_coef (`float`, *optional*, defaults to `0.001`):
            λ, the weight of the whole entropy term: the loss is the policy loss − λ·(L_H − β_k·L_smooth). No unit.
            `0.0` switches EPO's terms off; what remains is GRPO. (TRL's own field of this name; here it never adds
            TRL's own bonus.)
        entropy_smoothing (`str`, *optional*, defaults to `"hinge"`):
            The penalty P of Eq. 3 on a token whose entropy leaves the corridor. `"hinge"`: its distance from the
            corridor, in nats. `"indicator"`: 1 outside and 0 inside, as in the paper's first version; it is constant
            in the weights and so has **no gradient**: offered for comparison only. `"none"`: no penalty (EPO-Base).
        entropy_smoothing_coef (`float`, *optional*, defaults to `0.1`):
            α of Eq. 4, the weight of the penalty inside the entropy term. No unit. The paper's stability argument
            wants α·β_k < 1, hence α < 0.5; but only α·β_k > 1 lets the penalty outweigh the bonus above the corridor,
            so larger values are allowed (and logged once).
        entropy_corridor_low (`float`, *optional*, defaults to `0.0`):
            κ_l, the corridor's lower bound as a multiple of the mean entropy of the steps so far, H̄_W. `0.0`: the
            lower bound never acts.
        entropy_corridor_high (`float`, *optional*, defaults to `2.0`):
            κ_r, the corridor's upper bound as a multiple of H̄_W.
        entropy_smoothing_schedule (`str`, *optional*, defaults to `"exponential"`):
            β_k, the weight of the penalty at RL step k. `"exponential"`: 1 + exp(−γ_β·k/k_mid) of Eq. 5, from 2 at
            the start towards 1. `"constant"`: 1.
        entropy_smoothing_decay (`float`, *optional*, defaults to `3.0`):
            γ_β of Eq. 5, how fast β_k falls. No unit.
        entropy_aggregation (`str`, *optional*, defaults to `"turn"`):
            How entropies and penalties of tokens are averaged. `"turn"` (Eq. 2): over the action tokens of a turn,
            then over the turns of an episode, then over episodes. `"token"`: over all action tokens at once.
        max_turns (`int`, *optional*, defaults to `30`):
            Longest text episode, in turns (one action each).
        max_turn_length (`int`, *optional*, defaults to `512`):
            Longest action text of one turn, in new tokens. A turn that is cut there still acts.
        max_completion_length (`int`, *optional*):
            Longest episode after its first prompt, in tokens, observations included. `None`: the rest of the model's
            context window for text episodes, and TRL's 512 without a text environment.
        max_concurrent_episodes (`int`, *optional*):
            Text episodes that a process plays at once; the others of a generation batch follow as these end. Bounds
            the number of environments and the key/value cache, which holds this many episodes of the longest length
            at most. `None`: the whole generation batch. (vLLM and continuous batching bound their cache themselves.)
        environment_patience (`float`, *optional*, defaults to `1.0`):
            How long generation waits for an environment to answer before it goes on with the other episodes, in
            seconds. What is sampled together, and so every result, is the same from run to run as long as all answers
            come in that time (`episode/late_answers` counts the others); `float("inf")` waits for each.
        invalid_action_penalty (`float`, *optional*, defaults to `0.0`):
            Subtracted from an episode's reward for each invalid action, in units of reward (paper: 0.1).
        eval_temperature (`float`, *optional*):
            Sampling temperature of evaluations, whatever generates (paper: 0.4). `None`: `temperature`.
    """

    entropy_coef: float = field(
        default=0.001,
        metadata={
            "help": "λ, the weight of EPO's entropy term: policy loss − λ·(L_H − β_k·L_smooth). 0.0 switches EPO's "
            "terms off."
        },
    )
    entropy_smoothing: str = field(
        default="hinge",
        metadata={
            "help": "Penalty on tokens whose entropy leaves the corridor (Eq. 3): 'hinge' (its distance in nats), "
            "'indicator' (the paper's first version; has no gradient) or 'none'.",
            "choices": SMOOTHING_KINDS,
        },
    )
    entropy_smoothing_coef: float = field(
        default=0.1,
        metadata={"help": "α (Eq. 4), the weight of the smoothing penalty inside the entropy term."},
    )
    entropy_corridor_low: float = field(
        default=0.0,
        metadata={"help": "κ_l, the corridor's lower bound as a multiple of the mean entropy of the steps so far."},
    )
    entropy_corridor_high: float = field(
        default=2.0,
        metadata={"help": "κ_r, the corridor's upper bound as a multiple of the mean entropy of the steps so far."},
    )
    entropy_smoothing_schedule: str = field(
        default="exponential",
        metadata={
            "help": "β_k, the weight of the penalty at RL step k: 'exponential' (Eq. 5, from 2 towards 1) or "
            "'constant' (1).",
            "choices": SCHEDULES,
        },
    )
    entropy_smoothing_decay: float = field(
        default=3.0,
        metadata={"help": "γ_β (Eq. 5), how fast β_k falls."},
    )
    entropy_aggregation: str = field(
        default="turn",
        metadata={
            "help": "How token values are averaged: 'turn' (Eq. 2: tokens of a turn, turns of an episode, episodes) or "
            "'token' (all action tokens at once).",
            "choices": AGGREGATIONS,
        },
    )
    max_turns: int = field(default=30, metadata={"help": "Longest text episode, in turns."})
    max_turn_length: int = field(
        default=512,
        metadata={"help": "Longest action text of one turn, in new tokens. A turn that is cut there still acts."},
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest episode after its first prompt, in tokens, observations included. None: the rest of the "
            "model's context window for text episodes, 512 without a text environment."
        },
    )
    max_concurrent_episodes: int | None = field(
        default=None,
        metadata={"help": "Text episodes that a process plays at once. None: the whole generation batch."},
    )
    environment_patience: float = field(
        default=1.0,
        metadata={
            "help": "How long generation waits for an environment before it goes on with other episodes, in seconds. "
            "Results are the same from run to run as long as all answers come in that time."
        },
    )
    invalid_action_penalty: float = field(
        default=0.0,
        metadata={"help": "Subtracted from an episode's reward for each invalid action."},
    )
    eval_temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature of evaluations. None: `temperature`."}
    )

    def __post_init__(self):
        if not self.use_cpu and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.ddp_broadcast_buffers is None:
            # A collective operation in every forward, of which processes with different episodes make different numbers.
            self.ddp_broadcast_buffers = False
        super().__post_init__()
        self._check_entropy_terms()
        self._check_episodes()

    def _check_entropy_terms(self):
        _check_choice("entropy_smoothing", self.entropy_smoothing, SMOOTHING_KINDS)
        _check_choice("entropy_smoothing_schedule", self.entropy_smoothing_schedule, SCHEDULES)
        _check_choice("entropy_aggregation", self.entropy_aggregation, AGGREGATIONS)
        for name in (
            "entropy_coef",
            "entropy_smoothing_coef",
            "entropy_corridor_low",
            "entropy_corridor_high",
            "entropy_smoothing_decay",
            "invalid_action_penalty",
        ):
            _check_non_negative(name, getattr(self, name))
        if self.entropy_corridor_low > self.entropy_corridor_high:
            raise ValueError(
                f"`entropy_corridor_low` ({self.entropy_corridor_low}) is above `entropy_corridor_high` "
                f"({self.entropy_corridor_high}), which leaves no corridor. Both are multiples of the mean entropy so "
                "far; give low <= high, e.g. 0.0 and 2.0 (the paper's runs) or 0.5 and 1.5."
            )
        if self.use_adaptive_entropy and self.entropy_coef != 0.0:
            raise ValueError(
                f"`use_adaptive_entropy=True` is TRL's own entropy controller and cannot act together with EPO's terms "
                f"(`entropy_coef={self.entropy_coef}`). Set `entropy_coef=0.0` to use TRL's controller alone, or "
                "`use_adaptive_entropy=False` to use EPO."
            )
        if self.entropy_smoothing != "none" and self.entropy_smoothing_coef >= 0.5:
            logger.warning_once(
                f"`entropy_smoothing_coef={self.entropy_smoothing_coef}` is outside the paper's α < 0.5 (Appendix "
                "A.4): where α·β_k > 1, entropy above the corridor is pushed down instead of up more slowly."
            )

    def _check_episodes(self):
        for name in ("max_turns", "max_turn_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1.")
        if self.max_concurrent_episodes is not None and self.max_concurrent_episodes < 1:
            raise ValueError(
                f"`max_concurrent_episodes` is {self.max_concurrent_episodes}, but must be at least 1, or `None` for "
                "the whole generation batch."
            )
        if not self.environment_patience >= 0:
            raise ValueError(f"`environment_patience` is {self.environment_patience}, but must be at least 0 seconds.")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(
                f"`max_completion_length` is {self.max_completion_length}, but must be at least 1 token, or `None` "
                "for the default."
            )
        if self.eval_temperature is not None:
            if not self.eval_temperature > 0:
                raise ValueError(
                    f"`eval_temperature` is {self.eval_temperature}, but must be above 0, or `None` for `temperature`."
                )
            if "temperature" in (self.generation_kwargs or {}):
                raise ValueError(
                    "`eval_temperature` has no effect beside the `temperature` in `generation_kwargs`, which always "
                    "holds. Set `temperature` of its own instead."
                )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(map(repr, choices))}.")


def _check_non_negative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` is {value!r}, but must be a finite number of at least 0.")
