"""The environments of this package by name."""

from typing import NamedTuple


class BuiltIn(NamedTuple):
    """Where an environment of this package is, and the function that gives its rows: "module:name"."""

    environment: str
    tasks: str


# Each knows the splits "train", "iid" and, but for OpenEnv, "ood".
ENVIRONMENTS = {
    "household": BuiltIn("trl_epo.envs.household:Household", "trl_epo.envs.household:tasks"),
    "scienceworld": BuiltIn("trl_epo.envs.scienceworld:ScienceWorld", "trl_epo.envs.scienceworld:tasks"),
    "alfworld": BuiltIn("trl_epo.envs.alfworld:AlfWorld", "trl_epo.envs.alfworld:tasks"),
    "textarena": BuiltIn("trl_epo.envs.textarena:TextArena", "trl_epo.envs.textarena:tasks"),
    "openenv": BuiltIn("trl_epo.envs.openenv:OpenEnv", "trl_epo.envs.openenv:tasks"),
}
