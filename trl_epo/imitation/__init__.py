"""
The warm-up: a policy learns to do what someone has shown, so that reinforcement learning starts from one that sometimes
succeeds. Episodes are played with the trainer's own rules, limits and chat encoder while someone else says the actions, so
that the tokens, prompts and masks are those of its rollouts.

In come a trainer and dataset rows, chats or a run's folder (`sources.py`); out go episodes, and a trained model (`learning.py`). Open
`demonstrations.py` first.
"""

from .demonstrations import Demonstration, environment_expert
from .learning import check_until_success, token_rows, warm_up
from .sources import chat_episodes, check_noise, expert_episodes, kept_episodes, read_chats, teacher_episodes


__all__ = [
    "Demonstration",
    "chat_episodes",
    "check_noise",
    "check_until_success",
    "environment_expert",
    "expert_episodes",
    "kept_episodes",
    "read_chats",
    "teacher_episodes",
    "token_rows",
    "warm_up",
]
