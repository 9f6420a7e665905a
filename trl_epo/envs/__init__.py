from .base import TextEnv
from .checker import check_env


__all__ = ["TextEnv", "check_env"]
