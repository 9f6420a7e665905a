"""Configuration of `EPOTrainer`: TRL's `GRPOConfig` and the fields that EPO adds."""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging
from trl import GRPOConfig

from .envs.base import MAX_OBSERVATION_LENGTH
from .text import did_you_mean


logger = logging.get_logger(__name__)

SMOOTHING_KINDS = ("hinge", "indicator", "none")
SCHEDULES = ("exponential", "constant")
AGGREGATIONS = ("turn", "token")
REFERENCES = ("history", "turn_history", "linear")
CONTEXTS = ("transcript", "window")
OVERFLOWS = ("stop", "window")
ESTIMATORS = ("grpo", "gae", "gigpo", "turn")
GIGPO_GAMMA = 0.95  # Feng et al. 2025, arXiv 2505.10978
GROUP_FILTERS = ("mask", "resample")
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


class _InitSignature:
    """Lets a class with a `__new__` of its own be shown with the arguments of its `__init__`."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]  # `owner` is the very class that is shown
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def changed_settings(args: "EPOConfig", names: Iterable[str]) -> dict[str, Any]:
    """Those of the settings that are not the default, with their values."""
    defaults = {each.name: each.default for each in fields(args)}
    return {name: value for name in names if (value := getattr(args, name)) != defaults[name]}


@dataclass
class EPOConfig(GRPOConfig):
    r"""
    Configuration class for [`EPOTrainer`].

    Only the parameters that are new, or that differ, are listed here; everything else is inherited from
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
            κ_l, the corridor's lower bound as a multiple of the mean entropy of the steps so far, H̄_W, or of another
            `entropy_reference`. `0.0`: the lower bound never acts.
        entropy_corridor_high (`float`, *optional*, defaults to `2.0`):
            κ_r, the corridor's upper bound as a multiple of the same.
        entropy_corridor_coef (`float`, *optional*, defaults to `0.0`):
            Weight of a corridor for the batch instead of for each token, which is not in the paper: the distance of
            L_H (Eq. 2) itself from the corridor, in nats, is added to the policy loss with this weight and without a
            bonus. On which side of the corridor the policy is, is read off the optimizer step before. Excludes λ: set
            `entropy_coef=0.0`. `0.0`: off.
        entropy_reference (`str`, *optional*, defaults to `"history"`):
            What the corridor is around. `"history"`: H̄_W, the mean over all RL steps so far. `"turn_history"`: the
            same for each turn index by itself; tokens of a turn that was never reached before are not penalised.
            `"linear"`: the first RL step's entropy at first, falling in a straight line to `entropy_reference_end` of
            it at the last RL step; not in the paper.
        entropy_reference_end (`float`, *optional*, defaults to `0.2`):
            What share of the first RL step's entropy a `"linear"` reference has at the last RL step. No unit.
        entropy_smoothing_schedule (`str`, *optional*, defaults to `"exponential"`):
            β_k, the weight of the penalty at RL step k. `"exponential"`: 1 + exp(−γ_β·k/k_mid) of Eq. 5, from 2 at
            the start towards 1. `"constant"`: 1.
        entropy_smoothing_decay (`float`, *optional*, defaults to `3.0`):
            γ_β of Eq. 5, how fast β_k falls. No unit.
        entropy_aggregation (`str`, *optional*, defaults to `"turn"`):
            How entropies and penalties of tokens are averaged. `"turn"` (Eq. 2): over the action tokens of a turn,
            then over the turns of an episode, then over episodes. `"token"`: over all action tokens at once.
        entropy_turn_decay (`float`, *optional*, defaults to `0.0`):
            EPO-Decay: turn t of an episode's T turns weighs 1 + δ·(1 − 2t/(T − 1)) in the mean over turns, of entropies
            and penalties alike; this is δ, from 0 (all alike) to 1 (twice the weight for the first turn, none for the
            last). The mean weight is 1. Needs `entropy_aggregation="turn"`.
        entropy_advantage_coef (`float`, *optional*, defaults to `0.0`):
            α of the entropy-shaped advantage A + min(α·H, |A|/κ) of Cheng et al. (arXiv 2506.14758; GRPO 0.4, PPO 0.1),
            in units of advantage per nat; H is the token's entropy, without gradient. `0.0`: advantages are left alone.
            It acts besides the entropy term: for the paper's baseline "EA" set `entropy_coef=0.0`.
        entropy_advantage_limit (`float`, *optional*, defaults to `2.0`):
            κ of the same: at most |A|/κ is added, so that with κ > 1 no advantage changes its sign.
        max_turns (`int`, *optional*, defaults to `30`):
            Longest text episode, in turns (one action each).
        max_turn_length (`int`, *optional*):
            Longest action text of one turn, in new tokens, thoughts included. A turn that is cut there still acts, unless it
            is cut within a thought. `None`: 512, and 2048 where the chat template lets the model think first.
        max_completion_length (`int`, *optional*):
            Longest episode after its first prompt, in tokens, observations included; with `context="window"` the longest
            context. `None`: the rest of the model's context length for text episodes, and TRL's 512 without a text
            environment.
        reward_weights (`list[float]`, *optional*):
            With text episodes: the weight of each of the `reward_funcs` and, last, of the episode's return (less
            penalties); one number fewer leaves the return its weight of 1. `None`: all weigh 1.
        vllm_importance_sampling_mode (`str`, *optional*):
            How TRL corrects for tokens that vLLM sampled with other probabilities than training computes. `None`:
            `"token_truncate"` for text episodes, each token's ratio by itself, and TRL's `"sequence_mask"` without a text
            environment: the ratio of a whole episode, a product over thousands of tokens, is hardly ever within bounds.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            Leave text episodes that a limit cut off (stop reasons `truncated`, `max_turns` and `token_budget`) out of
            the loss and the entropy term; they stay in their group's baseline. An action that was cut at
            `max_turn_length` does not matter. (TRL looks at the last token, which is the last action's.)
        max_concurrent_episodes (`int`, *optional*):
            Text episodes that a process plays at once; the others of a generation batch follow as these end. Bounds
            the number of environments and the key/value cache, which holds this many episodes of the longest length
            at most. `None`: as many as fit into the device's free memory when the first batch is played, the same on each
            process; a checkpoint keeps the number. On a CPU, and with vLLM and continuous batching, which bound their cache
            themselves, the whole generation batch.
        environment_patience (`float`, *optional*, defaults to `1.0`):
            How long generation waits for an environment to answer before it goes on with the other episodes, in
            seconds. What is sampled together, and so every result, is the same from run to run as long as all answers
            come in that time (`episode/late_answers` counts the others); `float("inf")` waits for each. vLLM in colocate mode
            without tensor parallelism does not wait: its results do not depend on what is sampled together, but for rounding.
        ddp_timeout (`int`, *optional*, defaults to `7200`):
            How long a process waits for the others, in seconds, before it takes them for lost and the run ends. With text
            episodes a process that has played its own waits for the slowest environment of all: an episode may take
            `max_turns` times as long as the slowest answer. TRL's 1800 seconds would be a minute for each of 30 turns.
        env_timeout (`float`, *optional*, defaults to `300.0`):
            How long an environment may take for one answer, to `reset` or `step`, in seconds; `float("inf")` for any time.
            One that takes longer has failed. The time for the first answer holds the start of the environment.
        env_max_retries (`int`, *optional*, defaults to `1`):
            How often a text episode whose environment fails (raises, dies, gives no answer or one that breaks the
            contract) is played again from its start, with a new environment. If it fails each time it is left out of
            loss and baseline.
        max_failed_fraction (`float`, *optional*, defaults to `0.5`):
            Training stops, with a checkpoint and an error, when a larger share of a generation batch's episodes (over
            all processes) has failed in the end. `1.0`: never. An evaluation goes on, but does not make its checkpoint the
            best one.
        max_observation_length (`int`, *optional*, defaults to `100_000`):
            Longest observation, in characters. Of a longer one the model sees the beginning and the end, and between
            them how many characters are left out (`episode/cut_observations` counts these). The same bound holds for
            every other text of an environment that a prompt can quote, and for its list of admissible actions as a
            whole. `None`: no bound.
        invalid_action_penalty (`float`, *optional*, defaults to `0.0`):
            Subtracted from an episode's reward for each invalid action, in units of reward (paper: 0.1).
        context (`str`, *optional*, defaults to `"transcript"`):
            What the model sees before each action of a text episode. `"transcript"`: one growing chat, all turns so
            far. `"window"`: a prompt of the turn's own (the paper's way), made by the trainer's `prompt_builder`. A
            prompt that goes on, token by token, where the last action ended continues its context; any other begins a
            new one. No forward of the loss holds more than `per_device_train_batch_size` contexts of the longest
            length, however many turns an episode has.
        context_turns (`int`, *optional*, defaults to `2`):
            How many of the last turns such a prompt may tell about; fewer where they do not fit.
        context_overflow (`str`, *optional*, defaults to `"stop"`):
            What becomes of a transcript that has no room for another turn. `"stop"`: the episode ends, with the stop
            reason `token_budget`. `"window"`: as soon as there is no room for a whole turn, it goes on with a prompt
            as in `context="window"`, and grows again from there.
        advantage_estimator (`str`, *optional*, defaults to `"grpo"`):
            How the reward of a text episode is credited to its tokens. `"grpo"`: the episode's reward relative to its
            group, as TRL computes it. `"gae"`: PPO, with a critic. `"gigpo"`: the former plus each turn's discounted
            return relative to the other turns of the group in which the same was observed. `"turn"`: each turn's
            discounted return relative to all turns of its group, for environments that reward single turns.
        gamma (`float`, *optional*):
            γ, the discount: a turn for `"gigpo"` and `"turn"`, an action token for `"gae"`. `None`: the one of the
            estimator's paper, 0.95 for `"gigpo"` (with 1 and one reward at the end all turns of an episode would have the
            same return), else 1.0 (EPO's).
        gae_lambda (`float`, *optional*, defaults to `1.0`):
            λ of generalised advantage estimation, an action token.
        gigpo_step_coef (`float`, *optional*, defaults to `1.0`):
            ω, the weight of GiGPO's turn-level advantage.
        critic_model (`str`, *optional*):
            The critic of `"gae"`: a model on disk or the Hub that has the policy's tokenizer. `None`: the policy's weights
            at the start; for a policy with adapters, with adapters of the same kind. A quantized policy needs one. A model
            without a value head gets one that says 0.
        critic_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate of the critic; follows the policy's schedule. Its weights do not decay.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            RL steps at the beginning in which only the critic learns.
        critic_clip_range (`float`, *optional*, defaults to `0.2`):
            How far a value may move from the one at the rollout before its loss no longer falls, in units of reward;
            `float("inf")` for no clipping.
        filter_zero_variance_groups (`str`, *optional*):
            What to do with groups whose episodes all have the same reward, which teach nothing by comparison of episodes.
            `None`: they stay (and bear the entropy term and the KL penalty). `"mask"`: they are left out of
            the loss. `"resample"`: they are played again, up to three times, with new seeds where the dataset gives
            none, and then left out.
        max_nonfinite_steps (`int`, *optional*, defaults to `10`):
            Training ends with an error, after a checkpoint, when this many optimizer steps in a row had a loss or a
            gradient that is not finite. Such a step is left out: weights and optimizer stay as they are.
        eval_temperature (`float`, *optional*):
            Sampling temperature of evaluations, whatever generates (paper: 0.4). `None`: `temperature`.
        keep_episodes (`int`, *optional*, defaults to `64`):
            How many text episodes of each training batch are written to `episodes/` in `output_dir`, over all processes,
            turn by turn with the log-prob and the entropy of each token; there are some of every kind of outcome among
            them. Of evaluations all are. `0`: none, of evaluations neither.
        keep_episodes_megabytes (`float`, *optional*, defaults to `1000.0`):
            What these files may take of the disk, in MB (10⁶ bytes). When it is reached only those of every second RL step are
            kept, then of every fourth, and so on; of evaluations the first and the last always.
    """

    if TYPE_CHECKING:  # of GRPOConfig, set below
        use_cpu: bool = False
        ddp_broadcast_buffers: bool | None = None

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
    entropy_corridor_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a corridor for the batch's mean entropy instead of for each token's; not in the paper. "
            "Needs entropy_coef 0. 0.0: off."
        },
    )
    entropy_reference: str = field(
        default="history",
        metadata={
            "help": "What the corridor is around: 'history' (the mean of the steps so far), 'turn_history' (the same for "
            "each turn index) or 'linear' (falling over the run; not in the paper).",
            "choices": REFERENCES,
        },
    )
    entropy_reference_end: float = field(
        default=0.2,
        metadata={"help": "What share of the first RL step's entropy a 'linear' reference has at the last RL step."},
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
    entropy_turn_decay: float = field(
        default=0.0,
        metadata={
            "help": "EPO-Decay: weights of an episode's turns fall from 1 + this to 1 - this, mean 1. From 0 (all alike) "
            "to 1."
        },
    )
    entropy_advantage_coef: float = field(
        default=0.0,
        metadata={
            "help": "α of the entropy-shaped advantage A + min(α·H, |A|/κ) (Cheng et al. 2025: GRPO 0.4, PPO 0.1). 0.0: off."
        },
    )
    entropy_advantage_limit: float = field(
        default=2.0,
        metadata={"help": "κ of the entropy-shaped advantage: at most |A|/κ is added. Above 1."},
    )
    max_turns: int = field(default=30, metadata={"help": "Longest text episode, in turns."})
    max_turn_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest action text of one turn, in new tokens, thoughts included. A turn that is cut there still "
            "acts, unless within a thought. None: 512, and 2048 where the chat template lets the model think first."
        },
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest episode after its first prompt, in tokens, observations included. None: the rest of the "
            "model's context window for text episodes, 512 without a text environment."
        },
    )
    vllm_importance_sampling_mode: str | None = field(
        default=None,
        metadata={
            "help": "How ratios of vLLM's and the trainer's probabilities are taken and bounded: 'token_truncate', "
            "'token_mask', 'sequence_truncate' or 'sequence_mask'. None: 'token_truncate' for text episodes, else TRL's."
        },
    )
    max_concurrent_episodes: int | None = field(
        default=None,
        metadata={
            "help": "Text episodes that a process plays at once. None: as many as fit into the free memory of a GPU; on a "
            "CPU the whole generation batch."
        },
    )
    environment_patience: float = field(
        default=1.0,
        metadata={
            "help": "How long generation waits for an environment before it goes on with other episodes, in seconds. "
            "Results are the same from run to run as long as all answers come in that time."
        },
    )
    ddp_timeout: int = field(
        default=7200,
        metadata={
            "help": "How long a process waits for the others, in seconds: longer than the slowest episode takes."
        },
    )
    env_timeout: float = field(
        default=300.0, metadata={"help": "How long an environment may take for one answer, in seconds."}
    )
    env_max_retries: int = field(
        default=1,
        metadata={
            "help": "How often an episode whose environment fails is played again, with a new environment, before it is "
            "left out of training."
        },
    )
    max_failed_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Training stops, with a checkpoint and an error, when a larger share of a generation batch's episodes "
            "fails. 1.0: never."
        },
    )
    max_observation_length: int | None = field(
        default=MAX_OBSERVATION_LENGTH,
        metadata={
            "help": "Longest observation, in characters; of a longer one the middle is left out, visibly. None: no bound."
        },
    )
    invalid_action_penalty: float = field(
        default=0.0,
        metadata={"help": "Subtracted from an episode's reward for each invalid action."},
    )
    context: str = field(
        default="transcript",
        metadata={
            "help": "What the model sees before each action: 'transcript' (one growing chat) or 'window' (a prompt of "
            "the turn's own, the paper's way).",
            "choices": CONTEXTS,
        },
    )
    context_turns: int = field(
        default=2, metadata={"help": "How many of the last turns a window's prompt may tell about."}
    )
    context_overflow: str = field(
        default="stop",
        metadata={
            "help": "What becomes of a transcript that has no room for another turn: 'stop' (the episode ends) or "
            "'window' (it goes on with a window's prompt).",
            "choices": OVERFLOWS,
        },
    )
    advantage_estimator: str = field(
        default="grpo",
        metadata={
            "help": "How an episode's reward is credited to its tokens: 'grpo', 'gae' (PPO with a critic), 'gigpo' or "
            "'turn'.",
            "choices": ESTIMATORS,
        },
    )
    gamma: float | None = field(
        default=None,
        metadata={
            "help": "γ, the discount a turn ('gigpo', 'turn') or an action token ('gae'). None: 0.95 for 'gigpo', else 1.0."
        },
    )
    gae_lambda: float = field(default=1.0, metadata={"help": "λ of generalised advantage estimation."})
    gigpo_step_coef: float = field(default=1.0, metadata={"help": "ω, the weight of GiGPO's turn-level advantage."})
    critic_model: str | None = field(
        default=None, metadata={"help": "The critic of 'gae'. None: the policy's weights with a new value head."}
    )
    critic_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the critic."})
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "RL steps at the beginning in which only the critic learns."}
    )
    critic_clip_range: float = field(
        default=0.2, metadata={"help": "How far a value may move from the one at the rollout, in units of reward."}
    )
    filter_zero_variance_groups: str | None = field(
        default=None,
        metadata={
            "help": "Groups whose returns are all equal: None (they stay), 'mask' (left out of the loss) or 'resample' "
            "(played again, up to three times).",
            "choices": GROUP_FILTERS,
        },
    )
    max_nonfinite_steps: int = field(
        default=10,
        metadata={
            "help": "Training ends when this many optimizer steps in a row had a loss or a gradient that is not finite; "
            "each of them is left out."
        },
    )
    eval_temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature of evaluations. None: `temperature`."}
    )
    keep_episodes: int = field(
        default=64,
        metadata={
            "help": "How many episodes of each training batch are written to `episodes/` in the output folder; of "
            "evaluations all are. 0: none."
        },
    )
    keep_episodes_megabytes: float = field(
        default=1000.0,
        metadata={"help": "What kept episodes may take of the disk, in MB; then fewer steps' are kept."},
    )

    __signature__ = _InitSignature()

    def __new__(cls, *args, **kwargs):
        known = inspect.signature(cls.__init__).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            for name in kwargs:
                if name not in known:
                    raise TypeError(f"{cls.__name__} has no field {name!r}.{did_you_mean(name, known)}")
        return super().__new__(cls)

    def __post_init__(self):
        if not self.use_cpu and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.ddp_broadcast_buffers is None:
            # A collective operation in every forward, of which processes with different episodes make different numbers.
            self.ddp_broadcast_buffers = False
        super().__post_init__()
        if self.bf16 and not self.use_cpu and only_emulates_bf16():
            logger.warning_once(
                "`bf16` is on, TRL's default, but this GPU has no such arithmetic and emulates it, slowly. Set `bf16=False, fp16=True`."
            )
        if getattr(self, "enable_jit_checkpoint", False):
            logger.warning_once(
                "`enable_jit_checkpoint` is not needed: on SIGTERM EPOTrainer always writes a checkpoint."
            )
            self.enable_jit_checkpoint = False
        for name in ("max_nonfinite_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1.")
        if others := {"every_n_layers", "offload"} & (self.gradient_checkpointing_kwargs or {}).keys():
            raise ValueError(
                f"`gradient_checkpointing_kwargs` sets {sorted(others)}, which only Trainer knows: TRL switches checkpointing on "
                "again after each generation, without them. Leave them out."
            )
        sampled_at = (self.generation_kwargs or {}).get("temperature", self.temperature)
        if sampled_at != self.temperature:
            logger.warning_once(
                f"`generation_kwargs` samples at temperature {sampled_at}, but losses and entropies are those at "
                f"`temperature={self.temperature}`. Set `temperature` alone."
            )
        self._check_entropy_terms()
        self._check_episodes()
        self._check_credit()

    def _check_entropy_terms(self):
        _check_choice("entropy_smoothing", self.entropy_smoothing, SMOOTHING_KINDS)
        _check_choice("entropy_smoothing_schedule", self.entropy_smoothing_schedule, SCHEDULES)
        _check_choice("entropy_aggregation", self.entropy_aggregation, AGGREGATIONS)
        _check_choice("entropy_reference", self.entropy_reference, REFERENCES)
        for name in (
            "entropy_coef",
            "entropy_smoothing_coef",
            "entropy_corridor_low",
            "entropy_corridor_high",
            "entropy_corridor_coef",
            "entropy_reference_end",
            "entropy_smoothing_decay",
            "entropy_turn_decay",
            "entropy_advantage_coef",
            "entropy_advantage_limit",
            "invalid_action_penalty",
        ):
            _check_non_negative(name, getattr(self, name))
        if self.entropy_corridor_low > self.entropy_corridor_high:
            raise ValueError(
                f"`entropy_corridor_low` ({self.entropy_corridor_low}) is above `entropy_corridor_high` "
                f"({self.entropy_corridor_high}), which leaves no corridor. Both are multiples of the mean entropy so "
                "far; give low <= high, e.g. 0.0 and 2.0 (the paper's runs) or 0.5 and 1.5."
            )
        if self.entropy_turn_decay > 1:
            raise ValueError(
                f"`entropy_turn_decay` is {self.entropy_turn_decay}, but must be at most 1: beyond it the last turns "
                "would weigh less than nothing."
            )
        if self.entropy_turn_decay and self.entropy_aggregation != "turn":
            raise ValueError(
                f"`entropy_turn_decay={self.entropy_turn_decay}` weights turns, of which "
                f"`entropy_aggregation={self.entropy_aggregation!r}` knows none. Use `entropy_aggregation='turn'`, or "
                "`entropy_turn_decay=0.0`."
            )
        if self.entropy_advantage_limit <= 1:
            raise ValueError(
                f"`entropy_advantage_limit` is {self.entropy_advantage_limit}, but must be above 1, so that no advantage "
                "changes its sign; Cheng et al. use 2.0. `entropy_advantage_coef=0.0` switches the shaping off."
            )
        if self.use_adaptive_entropy and self.entropy_coef != 0.0:
            raise ValueError(
                f"`use_adaptive_entropy=True` is TRL's own entropy controller and cannot act together with EPO's terms "
                f"(`entropy_coef={self.entropy_coef}`). Set `entropy_coef=0.0` to use TRL's controller alone, or "
                "`use_adaptive_entropy=False` to use EPO."
            )
        if self.entropy_corridor_coef and (self.entropy_coef or self.use_adaptive_entropy):
            raise ValueError(
                f"`entropy_corridor_coef={self.entropy_corridor_coef}` steers the batch's entropy by itself, but "
                f"`entropy_coef={self.entropy_coef}` and `use_adaptive_entropy={self.use_adaptive_entropy}` pull at it "
                "too. Set `entropy_coef=0.0` and `use_adaptive_entropy=False`, or `entropy_corridor_coef=0.0`."
            )
        if self.entropy_corridor_coef and self.entropy_reference == "turn_history":
            raise ValueError(
                "`entropy_reference='turn_history'` has no value for a whole batch, which `entropy_corridor_coef="
                f"{self.entropy_corridor_coef}` needs. Use 'history' or 'linear', or `entropy_corridor_coef=0.0`."
            )
        if self.entropy_corridor_coef and self.entropy_reference == "history" and self.entropy_corridor_high > 1:
            logger.warning_once(
                f"`entropy_corridor_high={self.entropy_corridor_high}` is above 1: entropy that climbs takes the mean of the "
                "past, and with it the cap, along. With `entropy_corridor_coef` set it to at most 1.0, or set "
                "`entropy_reference='linear'`."
            )
        if self.entropy_smoothing != "none" and self.entropy_smoothing_coef >= 0.5:
            logger.warning_once(
                f"`entropy_smoothing_coef={self.entropy_smoothing_coef}` is outside the paper's α < 0.5 (Appendix "
                "A.4): where α·β_k > 1, entropy above the corridor is pushed down instead of up more slowly."
            )

    def _check_episodes(self):
        for name in ("max_turns", "max_turn_length"):
            value = getattr(self, name)
            if value is None and name == "max_turn_length":
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1.")
        _check_choice("context", self.context, CONTEXTS)
        _check_choice("context_overflow", self.context_overflow, OVERFLOWS)
        if not isinstance(self.context_turns, int) or self.context_turns < 0:
            raise ValueError(f"`context_turns` is {self.context_turns!r}, but must be a whole number of at least 0.")
        if self.max_concurrent_episodes is not None and self.max_concurrent_episodes < 1:
            raise ValueError(
                f"`max_concurrent_episodes` is {self.max_concurrent_episodes}, but must be at least 1, or `None` for "
                "as many as fit."
            )
        length = self.max_observation_length
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ValueError(
                f"`max_observation_length` is {length!r}, but must be a whole number of at least 1 character, or `None` "
                "for no bound."
            )
        if not self.environment_patience >= 0:
            raise ValueError(f"`environment_patience` is {self.environment_patience}, but must be at least 0 seconds.")
        if not self.env_timeout > 0:
            raise ValueError(f"`env_timeout` is {self.env_timeout}, but must be above 0 seconds.")
        if not isinstance(self.env_max_retries, int) or self.env_max_retries < 0:
            raise ValueError(
                f"`env_max_retries` is {self.env_max_retries!r}, but must be a whole number of at least 0."
            )
        if not 0.0 <= self.max_failed_fraction <= 1.0:
            raise ValueError(
                f"`max_failed_fraction` is {self.max_failed_fraction}, but must be from 0.0 (no episode may fail) to 1.0."
            )
        if not self.ddp_timeout > 0:
            raise ValueError(f"`ddp_timeout` is {self.ddp_timeout}, but must be above 0 seconds.")
        if not isinstance(self.keep_episodes, int) or self.keep_episodes < 0:
            raise ValueError(
                f"`keep_episodes` is {self.keep_episodes!r}, but must be a whole number of at least 0 (0: none are kept)."
            )
        if not self.keep_episodes_megabytes > 0:
            raise ValueError(
                f"`keep_episodes_megabytes` is {self.keep_episodes_megabytes}, but must be above 0; `keep_episodes=0` keeps "
                "no episodes."
            )
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

    def _check_credit(self):
        _check_choice("advantage_estimator", self.advantage_estimator, ESTIMATORS)
        if self.gamma is None:
            self.gamma = GIGPO_GAMMA if self.advantage_estimator == "gigpo" else 1.0
        if self.filter_zero_variance_groups is not None:
            _check_choice("filter_zero_variance_groups", self.filter_zero_variance_groups, GROUP_FILTERS)
        for name in ("gamma", "gae_lambda"):
            _check_non_negative(name, getattr(self, name))
            if getattr(self, name) > 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at most 1.")
        _check_non_negative("gigpo_step_coef", self.gigpo_step_coef)
        _check_non_negative("critic_learning_rate", self.critic_learning_rate)
        if not self.critic_clip_range > 0:
            raise ValueError(f"`critic_clip_range` is {self.critic_clip_range}, but must be above 0.")
        if not isinstance(self.critic_warmup_steps, int) or self.critic_warmup_steps < 0:
            raise ValueError(
                f"`critic_warmup_steps` is {self.critic_warmup_steps!r}, but must be a whole number of at least 0."
            )
        if self.advantage_estimator == "gae" and self.filter_zero_variance_groups is not None:
            raise ValueError(
                f"`filter_zero_variance_groups={self.filter_zero_variance_groups!r}` is for group-relative advantages; "
                "with `advantage_estimator='gae'` leave it `None`."
            )
        if self.advantage_estimator == "gae" and self.lr_scheduler_type in METRIC_SCHEDULES:
            raise ValueError(
                f"`lr_scheduler_type={self.lr_scheduler_type.value!r}` follows a metric, which the critic's schedule does not "
                "get. With `advantage_estimator='gae'` use one that follows the steps, e.g. 'linear' or 'cosine'."
            )
        if self.advantage_estimator != "grpo" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`advantage_estimator={self.advantage_estimator!r}` needs the sum of an episode's rewards, but "
                f"`multi_objective_aggregation` is {self.multi_objective_aggregation!r}: set it to 'sum_then_normalize'."
            )


def only_emulates_bf16() -> bool:
    """Whether there is a CUDA GPU from before 2020, such as a T4."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(map(repr, choices))}.")


def _check_non_negative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` is {value!r}, but must be a finite number of at least 0.")
