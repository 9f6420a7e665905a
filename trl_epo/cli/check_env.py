"""`trl-epo check-env`."""

import sys
from collections.abc import Sequence

from ..envs import check_env
from .mistakes import OneLineParser, UsageError
from .named import check_environment_name, environment_maker, json_object


def check_environment(arguments: Sequence[str]) -> None:
    """
    Check an environment, and say that it keeps to the contract.

    Raises:
        SystemExit: If it does not, with a line for each problem.
    """
    parser = OneLineParser(
        "trl-epo check-env",
        description="Play a few steps in an environment and say in plain words what keeps it from training.",
    )
    parser.add_argument(
        "name", nargs="?", metavar="ENVIRONMENT", help="module:name of your own, or a name of trl-epo's."
    )
    parser.add_argument("--environment", metavar="NAME", help="The same, as the other commands call it.")
    parser.add_argument("--environment_kwargs", metavar="JSON", help="Its keyword arguments.")
    parser.add_argument("--options", metavar="JSON", help="A dataset row to reset it with.")
    given = parser.parse_args(arguments)
    if (given.name is None) == (given.environment is None):
        raise UsageError("Name one environment: trl-epo check-env module:name, or --environment household.")
    name = given.name or given.environment
    check_environment_name(name)
    options = json_object("options", given.options)
    env = environment_maker(name, json_object("environment_kwargs", given.environment_kwargs))()
    try:
        check_env(env, options)
    except ValueError as error:
        sys.exit(f"trl-epo check-env: {error}")
    finally:
        env.close()
    print(f"{name} is a text environment that trl-epo can train in.")
