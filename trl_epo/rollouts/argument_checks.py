"""Arguments of `EPOTrainer` that do not go together, found before anything is loaded."""

import logging
from collections.abc import Callable, Sequence

from datasets import Dataset, IterableDataset
from trl import GRPOConfig

from ..config import EPOConfig, changed_settings
from ..sampling import make_logits_processors


COMPLETION_LENGTH = 512  # TRL's default, in tokens
SAMPLING_MODE = GRPOConfig.vllm_importance_sampling_mode
EPISODE_SAMPLING_MODE = "token_truncate"
TURN_LENGTH, THINKING_TURN_LENGTH = 512, 2048  # tokens


def set_defaults(args: EPOConfig, plays_text: bool) -> None:
    """Give those settings a value that are `None` since it depends on whether there are text episodes."""
    if args.vllm_importance_sampling_mode is None:
        args.vllm_importance_sampling_mode = EPISODE_SAMPLING_MODE if plays_text else SAMPLING_MODE
    if args.max_completion_length is None and not plays_text:
        args.max_completion_length = COMPLETION_LENGTH


logger = logging.getLogger(__name__)


def check_text_episode_arguments(
    args: EPOConfig, tools: Sequence | None, rollout_func: Callable | None, prompt_builder: Callable | None
) -> None:
    """Raise a `ValueError` that names what cannot be used with text episodes; warn of what ends them early."""
    if prompt_builder is not None and args.context != "window" and args.context_overflow != "window":
        raise ValueError(
            f"`prompt_builder` is given, but with `context={args.context!r}` and `context_overflow="
            f"{args.context_overflow!r}` no prompt is built. Set `context='window'` or `context_overflow='window'`, or leave "
            "it out."
        )
    if rollout_func is not None:
        raise ValueError("Give either `rollout_func` or a text environment: the latter has its own rollouts.")
    if tools:
        raise ValueError(
            "`tools` cannot be used with a text environment, whose actions are plain text. Make the "
            "environment a TRL tool environment (methods instead of `step`), or leave `tools` out."
        )
    generation_kwargs = args.generation_kwargs or {}
    if not (args.use_vllm or args.use_transformers_continuous_batching):
        make_logits_processors(**generation_kwargs)  # raises if it cannot honour them
    elif clash := {"n", "logprobs", "max_tokens", "max_new_tokens", "seed"} & generation_kwargs.keys():
        raise ValueError(
            f"`generation_kwargs` sets {sorted(clash)}, of which each turn of a text episode has its own. Leave them out; "
            "`max_turn_length` limits a turn, and `EPOConfig.seed` is the seed of a run."
        )
    if args.loss_type == "dr_grpo" and args.max_completion_length is None:
        raise ValueError(
            "`loss_type='dr_grpo'` divides by `max_completion_length`, which is not set: give the longest "
            "episode in tokens, observations included."
        )
    if args.use_vllm and args.world_size > 1 and (args.vllm_mode == "server" or args.vllm_tensor_parallel_size > 1):
        raise ValueError(
            "Text episodes on several processes cannot share a vLLM engine: TRL wants equally many requests from "
            "each, but episodes end at different turns. Use `vllm_mode='colocate'` with "
            "`vllm_tensor_parallel_size=1`."
        )
    bounds = (args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max)
    mode = args.vllm_importance_sampling_mode
    if args.use_vllm and args.vllm_importance_sampling_correction and mode is None and bounds == (None, None):
        raise ValueError(
            "`vllm_importance_sampling_clip_max` is None and `vllm_importance_sampling_clip_min` too, but text episodes "
            "truncate ratios by default. Set one of them, or `vllm_importance_sampling_mode='token_mask'` for ratios "
            "without a bound."
        )
    if not args.ds3_gather_for_generation and not args.use_vllm and args.world_size > 1:
        raise ValueError(
            "`ds3_gather_for_generation=False` makes every process call the model equally often, but text "
            "episodes end at different turns. Leave it `True`, or use vLLM."
        )


def set_turn_length(args: EPOConfig, thinks: bool) -> None:
    """
    Give `max_turn_length` a value if it has none, and warn of one that is too short for thoughts, or too long for the
    episode's budget. `thinks`: whether the chat template lets the model think first.
    """
    given = args.max_turn_length
    if given is None:
        args.max_turn_length = THINKING_TURN_LENGTH if thinks else TURN_LENGTH
    if thinks and (given is None or given < TURN_LENGTH):
        logger.warning(
            "The chat template lets the model think before it acts, and `max_turn_length` is %d tokens%s. A turn that is cut "
            "within a thought has no action. Set it to what the model's thoughts take, or switch them off where the "
            'template can: `EPOConfig(chat_template_kwargs={"enable_thinking": False})`.',
            args.max_turn_length,
            ", which it chooses for that"
            if given is None
            else f", thoughts included; {THINKING_TURN_LENGTH} is usual",
        )
    _warn_of_short_budget(args)


def _warn_of_short_budget(args: EPOConfig) -> None:
    """A `max_completion_length` from a script for GRPO, where it is the length of one answer, ends episodes early."""
    ends_episode = args.context == "transcript" and args.context_overflow == "stop"
    if args.max_completion_length is None or not ends_episode:
        return
    num_turns = args.max_completion_length // args.max_turn_length
    if num_turns < args.max_turns:
        logger.warning(
            "`max_completion_length` is %d tokens for a whole text episode, observations included: without any it holds no "
            "more than %d turns of `max_turn_length` (%d), but `max_turns` is %d. An episode that has used it up ends "
            "(`token_budget`). Leave it out for the rest of the model's context.",
            args.max_completion_length,
            num_turns,
            args.max_turn_length,
            args.max_turns,
        )


def episode_reward_weights(weights: Sequence[float] | None, num_reward_funcs: int) -> list[float]:
    """
    The weight of each of the user's reward functions and, last, of the episode's return.

    Raises:
        ValueError: If `reward_weights` has another length than the functions, with or without one for the return.

    >>> episode_reward_weights([0.5], num_reward_funcs=1)
    [0.5, 1.0]
    >>> episode_reward_weights([0.5], num_reward_funcs=0)
    [0.5]
    """
    if weights is None:
        return [1.0] * (num_reward_funcs + 1)
    if len(weights) == num_reward_funcs + 1:
        return list(weights)
    if len(weights) == num_reward_funcs and weights:
        return [*weights, 1.0]
    raise ValueError(
        f"`reward_weights` is {weights}, but there are {num_reward_funcs} `reward_funcs` and the episode's return: give "
        f"{num_reward_funcs + 1} numbers, the last one for the return, or leave that one out for a weight of 1."
    )


def check_other_arguments(args: EPOConfig, prompt_builder: Callable | None) -> None:
    """Raise a `ValueError` that names what is for text episodes only."""
    if prompt_builder is not None:
        raise ValueError(
            "`prompt_builder` is for text episodes, but there is no text environment. Give an `environment_factory`, or "
            "leave it out."
        )
    if meaningless := _changed(args, ("advantage_estimator", "filter_zero_variance_groups", "context")):
        raise ValueError(
            f"{meaningless}: for text episodes only, but there is no text environment. Give an `environment_factory`, or "
            "leave it out."
        )
    if ignored := _changed(args, ("max_turns", "max_turn_length", "max_observation_length", "invalid_action_penalty")):
        logger.warning("%s: for text episodes only, and ignored, since there is no text environment.", ignored)


def _changed(args: EPOConfig, names: Sequence[str]) -> str:
    """Those of the settings that are not the default, for a message."""
    return ", ".join(f"`{name}={value!r}`" for name, value in changed_settings(args, names).items())


def check_reward_is_given(reward_funcs, environment_factory) -> None:
    """Raise a `ValueError` if nothing tells what is good."""
    if reward_funcs is None and environment_factory is None:
        raise ValueError(
            "There are neither `reward_funcs` nor an `environment_factory`. Give a function that rewards completions, or the "
            "class of a text environment (`trl_epo.envs.TextEnv`), whose rewards count."
        )


def check_prompt_column(dataset: Dataset | IterableDataset | None) -> None:
    """Raise a `ValueError` if a dataset whose completions are no text episodes has no prompts."""
    columns = dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"`train_dataset` has the columns {columns}, but needs `prompt`: a text or a list of messages in each row. Rename "
            "one (`rename_column`), or give the `environment_factory` of a text environment, which needs none."
        )


def check_num_rows(args: EPOConfig, dataset: Dataset | IterableDataset | None) -> None:
    """Raise a `ValueError` if a dataset to train on has too few rows for one batch: TRL would end after no step."""
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} rows, but a batch of {args.generation_batch_size} completions with "
            f"`num_generations={args.num_generations}` takes {needed}. Give more rows (or the same ones again), a smaller "
            "batch (`per_device_train_batch_size`, `gradient_accumulation_steps`), or a larger `num_generations`."
        )
