"""
OpenEnv: environments behind a server, with OpenEnv's own client. Needs `pip install "trl-epo[openenv]"`.

A session is a WebSocket, and at its other end an environment of its own. All sessions of a process run on one event loop, in a
thread of its own, so that idle ones answer the server's pings while the model trains.
"""

import asyncio
import json
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from .base import EnvironmentDied, TextEnv, seeds_of


if TYPE_CHECKING:
    from datasets import Dataset
    from openenv.core.client_types import StepResult

CONNECTING = (
    10.0  # seconds in which a session is asked for again: a full server may have one that just ends, another restarts
)
CLOSING = 1.0  # seconds that a server has to say goodbye

_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process, as a fork leaves the thread behind
_starting = threading.Lock()


def tasks(split: str, size: int, seed: int = 0) -> "Dataset":
    """
    `size` rows with a `seed` each, for servers that make an episode of any seed; `"train"` and `"iid"` have none in common.

    Raises:
        ValueError: If the split is another one. What other tasks there are only the server knows.
    """
    from datasets import Dataset

    return Dataset.from_dict({"seed": seeds_of(split, size, seed)})


class OpenEnv(TextEnv):
    """
    A session with an OpenEnv server, which begins with the first reset and ends with `close`.

    ```python
    factory = partial(OpenEnv, "http://127.0.0.1:8000", success=1.0, instructions="Guess a number … For example: 50")
    trainer = EPOTrainer(..., train_dataset=tasks("train", 1000), environment_factory=factory)
    ```

    The columns of a dataset row are arguments of the server's `reset`, besides `seed`. `done` ends the episode as
    `terminated`; a step without a reward gives 0.0. An action that the server's model of actions refuses, or for which `to_action`
    raises a `ValueError`, is answered by a sentence and is an `invalid_action`.

    The server needs as many sessions at once as the run has environments: those that play, and one more for each evaluation set
    that plays meanwhile. An idle session that the server has ended is made anew.

    Args:
        url (`str`): Where the server is, e.g. `"http://127.0.0.1:8000"`.
        to_action (`Callable[[str], dict]`, *optional*): The fields of an action, from the model's text; a `ValueError` says why it
            is none. By default the text is the action's only field that must be given, or its only text, as the server's
            `GET /schema` tells.
        to_text (`Callable[[dict], str]`, *optional*): The text of an observation, from its fields. By default its only field, or
            a line `name: value` for each.
        success (`Callable[[StepResult], bool]` or `float`, *optional*): Tells success from `observation`, `reward` and `done` of a
            step; a number stands for a reward of at least as much. By default no success is told.
        instructions (`str`, *optional*): What the model is told to do; `None` for nothing.

    Raises:
        ImportError: If OpenEnv is not installed.
        ValueError: If the URL is none; from `reset`, if the action's field is not known.
        EnvironmentDied: From `reset` and `step`, if there is no connection, or it was lost.
        RuntimeError: From `reset` and `step`, with what the server raised, or if it has no free session.
    """

    def __init__(
        self,
        url: str,
        to_action: Callable[[str], dict[str, Any]] | None = None,
        to_text: Callable[[dict[str, Any]], str] | None = None,
        success: "Callable[[StepResult], bool] | float | None" = None,
        instructions: str | None = None,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}: expected the address of a server, such as 'http://127.0.0.1:8000'")
        try:
            from openenv.core import GenericEnvClient
        except ImportError as error:
            raise ImportError(f'OpenEnv needs {error.name}: pip install "trl-epo[openenv]".') from error
        self.url = url.rstrip("/")
        self.instructions = instructions
        self._new_client = GenericEnvClient
        self._to_action = to_action
        self._to_text = to_text or observation_text
        self._success = success
        self._client: Any = None  # of the session
        self._socket: Any = None  # that it was begun on
        self._answer: Future | None = None  # to the last call
        self._interrupted = False
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._running = False
        row = dict(options or {}) if seed is None else {**(options or {}), "seed": seed}
        result = self._ask(self._begin(row))
        if self._to_action is None:
            try:
                self._to_action = _field_setter(self.url)
            except ValueError:
                self.close()
                raise
        self._running = True
        return self._to_text(result.observation), self._info(result)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self._running:
            raise RuntimeError("no episode is running: it has ended or was never begun. Call env.reset() first.")
        try:
            fields = self._to_action(action)
        except ValueError as error:
            return self._refusal(f"This is no action: {error}")
        self._running = False  # should the server fail
        try:
            result = self._ask(self._step(fields))
        except _Refused:
            self._running = True
            return self._refusal("This is no action that the environment takes.")
        self._running = not result.done
        text, reward = self._to_text(result.observation), result.reward or 0.0
        return text, reward, bool(result.done), False, self._info(result)

    def close(self) -> None:
        self._running = self._interrupted = False
        if self._client is not None:
            self._ask(self._leave())

    def interrupt(self) -> None:
        """End the call that waits for the server, on another thread, or the next one if none does."""
        self._interrupted = True
        if (answer := self._answer) is not None:
            answer.cancel()

    def _refusal(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return text, 0.0, False, False, self._info(None)

    def _info(self, result: "StepResult | None") -> dict[str, Any]:
        """Of what the server answered; `None` if the action was none."""
        info = {"invalid_action": result is None}
        if callable(self._success):
            info["success"] = result is not None and bool(self._success(result))
        elif self._success is not None:
            info["success"] = result is not None and (result.reward or 0.0) >= self._success
        return info

    def _ask(self, call: Coroutine) -> Any:
        self._answer = asyncio.run_coroutine_threadsafe(call, _loop())
        if self._interrupted:  # before there was anything to cancel
            self._answer.cancel()
        try:
            return self._answer.result()
        except CancelledError:
            raise EnvironmentDied(f"the session with {self.url} was given up") from None
        finally:
            self._answer = None

    # On the event loop

    async def _begin(self, row: dict[str, Any]) -> "StepResult":
        """Begin an episode, in a new session if there is none."""
        from websockets.exceptions import ConnectionClosed

        loop = asyncio.get_running_loop()
        end, pause = loop.time() + CONNECTING, 0.1
        while True:
            try:
                return await self._reset(row)
            except (ConnectionError, ConnectionClosed, RuntimeError) as error:
                await self._leave()
                if isinstance(error, RuntimeError) and "CAPACITY_REACHED" not in str(error):
                    raise
                if loop.time() + pause < end:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 2.0)
                elif isinstance(error, ConnectionError):
                    raise EnvironmentDied(f"there is no connection to {self.url}: {error}") from error
                else:
                    raise RuntimeError(
                        f"{self.url} has begun no session: {error} If it has no free one, start it with more "
                        "(`max_concurrent_envs`), or lower `max_concurrent_episodes`."
                    ) from error
            except BaseException:
                await self._leave()
                raise

    async def _reset(self, row: dict[str, Any]) -> "StepResult":
        if self._client is None:
            self._client = self._new_client(self.url, message_timeout_s=None)
        result = await self._client.reset(**row)
        self._socket = _socket_of(self._client)
        return result

    async def _step(self, fields: dict[str, Any]) -> "StepResult":
        from websockets.exceptions import ConnectionClosed

        try:
            result, error = await self._client.step(fields), None
        except Exception as raised:
            result, error = None, raised
        except asyncio.CancelledError:
            await self._leave()
            raise
        # The client makes a connection that was lost anew, but the server at its other end knows nothing of this episode.
        if isinstance(error, ConnectionError | ConnectionClosed) or _socket_of(self._client) is not self._socket:
            await self._leave()
            raise EnvironmentDied(
                f"the connection to {self.url} has ended, and the episode with it: {error}"
            ) from error
        if error is None:
            return result
        if "VALIDATION_ERROR" in str(error):
            raise _Refused from error
        await self._leave()
        raise error

    async def _leave(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(Exception):
                await asyncio.wait_for(_close(client), CLOSING)


class _Refused(Exception):
    """The server's model of actions does not take this one."""


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process's sessions."""
    with _starting:
        if (process := os.getpid()) not in _loops:
            _loops[process] = asyncio.new_event_loop()
            threading.Thread(target=_loops[process].run_forever, name="openenv", daemon=True).start()
        return _loops[process]


def _socket_of(client: Any) -> Any:
    """Its connection, for which the client has no public name."""
    return getattr(client, "_ws", None)


async def _close(client: Any) -> None:
    await client.close()


def _field_setter(url: str) -> Callable[[str], dict[str, Any]]:
    """What makes an action of a text; raises a `ValueError` if the server does not tell which field that is for."""
    remedy = "Say how a text becomes an action, e.g. OpenEnv(…, to_action=lambda text: {"
    try:
        with urlopen(f"{url}/schema", timeout=CONNECTING) as answer:
            schema = json.load(answer)["action"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f'{url}/schema does not tell what the fields of an action are ({error}). {remedy}"message": text}})'
        ) from error
    name = text_field(schema)
    if name is None:
        fields = {name: field for name, field in schema.get("properties", {}).items() if name != "metadata"}
        told = (
            ", ".join(f"{name} ({field.get('type', 'of another kind')})" for name, field in fields.items()) or "none"
        )
        raise ValueError(
            f"the fields of an action of {url} are {told}: not clear which of them is the model's text. "
            f'{remedy}"{next(iter(fields), "message")}": …}})'
        )
    return lambda text: {name: text}


def text_field(schema: dict[str, Any]) -> str | None:
    """
    The field of an action that takes the model's text, by the JSON schema of actions: the only one that must be given or, if
    none must, the only one that is a text. `None` if it is not clear.

    >>> text_field({"properties": {"message": {"type": "string"}, "times": {"type": "integer"}}, "required": ["message"]})
    'message'
    """
    fields = {name: field for name, field in schema.get("properties", {}).items() if name != "metadata"}
    names = schema.get("required") or [name for name, field in fields.items() if _takes_text(field)]
    return names[0] if len(names) == 1 and _takes_text(fields.get(names[0], {})) else None


def _takes_text(field: dict[str, Any]) -> bool:
    """Whether a field of a JSON schema takes any text, not one constant."""
    kinds = [option.get("type") for option in (field, *field.get("anyOf", []))]
    return "string" in kinds and "const" not in field


def observation_text(observation: dict[str, Any]) -> str:
    r"""
    An observation's only field, or a line for each, without those that have no value, and without `metadata`.

    >>> observation_text({"text": "You are at 3.", "metadata": {}})
    'You are at 3.'
    >>> observation_text({"text": "You are at 3.", "left": 2, "error": None})
    'text: You are at 3.\nleft: 2'
    """
    fields = {name: value for name, value in observation.items() if value is not None and name != "metadata"}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in fields.items()
    }
    return "\n".join(texts.values() if len(texts) == 1 else (f"{name}: {text}" for name, text in texts.items()))
