"""
ScienceWorld: thirty kinds of elementary-science tasks in a simulated house. Needs `pip install "trl-epo[scienceworld]"`,
which brings its own Java.

One Java virtual machine (JVM) hosts all environments of a process. It starts with the first reset and ends with the
process. ScienceWorld keeps the simplifications in force, the last object identifier and its random numbers in static
variables, so only one environment at a time can use them. To use several processors, the JVM loads ScienceWorld's
classes several times (`java.py`), each with static variables of its own, and spreads the environments over them.
"""

from .environment import INSTRUCTIONS, SIMPLIFICATIONS, SPLITS, VARIATIONS, ScienceWorld, tasks
from .java import SimulatorDied, SimulatorError, SimulatorGivenUp


__all__ = [
    "INSTRUCTIONS",
    "SIMPLIFICATIONS",
    "SPLITS",
    "VARIATIONS",
    "ScienceWorld",
    "SimulatorDied",
    "SimulatorError",
    "SimulatorGivenUp",
    "tasks",
]
