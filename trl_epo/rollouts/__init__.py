"""
Environments to episodes.

In: dataset rows, environments, a sampler of turns. Out: `Episode`s, and a batch of them as rows of tokens.
Imports: sampling and what is below; knows no trainer. Open first: `episode.py`, then `rollout.py` (the loop over turns) and `player.py`
(batches and panels, over all processes).
"""

from .argument_checks import (
    check_num_rows,
    check_other_arguments,
    check_prompt_column,
    check_reward_is_given,
    check_text_episode_arguments,
    episode_reward_weights,
    set_defaults,
    set_turn_length,
)
from .chat import ChatEncoder
from .contexts import ContextRules, PastTurn, PromptBuilder, TurnView, build_prompt, describe_turn
from .dataset_rows import FirstRow, check_first_row, environment_options, placeholder_dataset
from .environment_pool import EnvironmentPool, make_environment_pool
from .episode import Episode, EpisodeSummary, StopReason, Turn, episode_return, episode_row
from .player import EPISODES_FOLDER, FAILURES_FILE, EpisodePlayer, PlayedBatch, TooManyFailures
from .rollout import ActionParser, EpisodeStart, Limits, parse_action, parse_tagged_action, play_episodes


__all__ = [
    "EPISODES_FOLDER",
    "FAILURES_FILE",
    "ActionParser",
    "ChatEncoder",
    "ContextRules",
    "EnvironmentPool",
    "Episode",
    "EpisodePlayer",
    "EpisodeStart",
    "EpisodeSummary",
    "FirstRow",
    "Limits",
    "PastTurn",
    "PlayedBatch",
    "PromptBuilder",
    "StopReason",
    "TooManyFailures",
    "Turn",
    "TurnView",
    "build_prompt",
    "check_first_row",
    "check_num_rows",
    "check_other_arguments",
    "check_prompt_column",
    "check_reward_is_given",
    "check_text_episode_arguments",
    "describe_turn",
    "environment_options",
    "episode_return",
    "episode_reward_weights",
    "episode_row",
    "make_environment_pool",
    "parse_action",
    "parse_tagged_action",
    "placeholder_dataset",
    "play_episodes",
    "set_defaults",
    "set_turn_length",
]
