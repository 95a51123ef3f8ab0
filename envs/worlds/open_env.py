"""Environments behind a URL: a client of OpenEnv's protocol (reset, step and state as JSON over a WebSocket).

Any server made with the package openenv-core can be opened; the package itself is not needed here. An observation is
a text, {"message": ...}, an action is a text: the server's one text field, or a JSON object. Nothing that comes over
the wire is executed or imported: it is JSON, held against what the protocol promises. What the server does wrong ends
the episode as an infrastructure error, never as a failure; the next reset connects again.
"""

from __future__ import annotations

import json
import math
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import gymnasium
from gymnasium import spaces

from embodied_rft.envs.games.batch import Description
from embodied_rft.envs.worlds.world import Seen, need
from embodied_rft.names import UserError
from embodied_rft.pools.incidents import Infrastructure
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.seeding import FIRST_EVALUATION_SEED

SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
LARGEST_MESSAGE = 16 * 2**20  # bytes of an answer
LARGEST_SCHEMA = 2**20
REFUSALS = ("VALIDATION_ERROR", "INVALID_JSON")  # the action is at fault, and the episode goes on
ERRORS = ("UNKNOWN_TYPE", "EXECUTION_ERROR", "CAPACITY_REACHED", "FACTORY_ERROR", "SESSION_ERROR")
OURS = ("metadata",)  # fields of every action and observation that no model reads or writes


class _Refused(Exception):
    """The server does not take an action."""


class Answer(NamedTuple):
    """What a server says of a reset or a step: Answer({"echoed": "hi"}, 0.2, False)."""

    observation: dict[str, Any]
    reward: float
    done: bool


class OpenEnv(gymnasium.Env[Seen, str]):
    """An environment on a server of OpenEnv, opened by its URL.

    Args:
        url: of the server, "http://127.0.0.1:8000"; of https the connection is encrypted.
        action: the field of an action that a text is written into; "json": the text is a JSON object with all fields;
            None: the field if there is one only and it takes a text, else JSON.
        message: the field of an observation that is shown; None: all as JSON, or the only one as it is.
        success: the field of an observation that says whether the task is solved; None: nothing is called success.
        refused: reward of an action that the server does not take; the message then says why.
        length: decisions of an episode.
        timeout: seconds that the server may take for an answer, and for a connection.
        max_chars: longest message and action.
        render_mode: None or "ansi".
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        *,
        url: str,
        action: str | None = None,
        message: str | None = None,
        success: str | None = None,
        refused: float = 0.0,
        length: int = 100,
        timeout: float = 30.0,
        max_chars: int = 65_536,
        render_mode: str | None = None,
    ) -> None:
        need("websockets", "websockets")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.hostname:
            raise UserError(f"url is {url!r}; expected one like http://127.0.0.1:8000")
        if length < 1 or not timeout > 0 or max_chars < 1:
            raise UserError(f"length is {length}, timeout {timeout}, max_chars {max_chars}; expected numbers above 0")
        self.url, self.field, self.shown, self.success = url.rstrip("/"), action, message, success
        self.refused, self.length, self.timeout, self.max_chars = refused, length, timeout, max_chars
        self.render_mode = render_mode
        self.observation_space = spaces.Dict({"message": AnyText(max_chars)})
        self.action_space = AnyText(max_chars)
        self.link: Any = None  # the connection; the session, and its episode, live as long
        self.open = ExitStack()  # closes it
        self.rules: str | None = None  # once the server has told what an action is
        self.running, self.evaluates, self.news = False, False, ""
        self.steps, self.wasted = 0, 0  # of the running episode: all, and refused ones

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Seen, dict[str, Any]]:
        """A new episode; `options` go to the server's reset. Raises Infrastructure if there is none."""
        super().reset(seed=seed)
        if seed is not None:
            self.evaluates = seed >= FIRST_EVALUATION_SEED
        named = 2 * int(self.np_random.integers(2**30)) + self.evaluates
        self.running = False
        if self.rules is None:
            self._learn_actions()
        try:
            answer = self._ask("reset", {**(options or {}), "seed": named}, again=True)
        except _Refused as error:
            raise Infrastructure("server_error", f"{self.url} refuses to reset: {error}") from None
        self.running, self.steps, self.wasted, self.news = True, 0, 0, self._text(answer.observation)
        return {"message": f"{self.rules}\n\n{self.news}"[: self.max_chars]}, {}

    def step(self, action: str) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """One action; info counts those that were refused. Raises Infrastructure if the server does not answer."""
        if not self.running:
            raise gymnasium.error.ResetNeeded("call reset() before step(): no episode is running")
        try:
            answer = self._ask("step", self._written(action))
            self.news = self._text(answer.observation)
        except _Refused as error:
            answer = Answer({}, self.refused, False)
            self.news = f"That action is not possible: {error}"[: self.max_chars]
            self.wasted += 1
        told: dict[str, Any] = {"invalid/moves": float(self.wasted)}
        self.steps += 1
        late = not answer.done and self.steps >= self.length
        self.running = not (answer.done or late)
        if self.success is not None:
            told["is_success"] = float(answer.observation.get(self.success) is True)
        return {"message": self.news}, answer.reward, answer.done, late, told

    def state(self) -> dict[str, Any]:
        """What the server says of the running episode, such as its id and the number of steps."""
        return self._exchange({"type": "state"}, expected="state")

    def describe(self) -> Description:
        """What an action is, and the latest message."""
        return Description(self.rules or "", self.news, (), None)

    def render(self) -> str | None:
        """The latest message."""
        return self.news if self.render_mode == "ansi" else None

    def close(self) -> None:
        """End the session."""
        link, self.link, self.running = self.link, None, False
        if link is not None:
            with suppress(Exception):  # a broken connection may complain of anything
                link.send(json.dumps({"type": "close"}))
            with suppress(Exception):
                self.open.close()

    # --- actions and observations --------------------------------------------------------------------------------

    def _learn_actions(self) -> None:
        """Ask the server what an action is, and find the field that a text is written into."""
        scheme = {"ws": "http", "wss": "https"}.get(self.url.partition(":")[0], self.url.partition(":")[0])
        address = f"{scheme}:{self.url.partition(':')[2]}/schema"
        local = urllib.parse.urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
        try:
            with opener.open(address, timeout=self.timeout) as answer:
                schema = json.loads(answer.read(LARGEST_SCHEMA))["action"]
            fields = {str(name): dict(each) for name, each in schema["properties"].items() if name not in OURS}
        except OSError as error:
            raise Infrastructure("no_server", f"no server of OpenEnv answers at {address}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Infrastructure("bad_answer", f"{address} gives no schema of actions") from None
        if self.field is None:
            texts = [name for name, each in fields.items() if each.get("type") == "string"]
            self.field = texts[0] if len(fields) == len(texts) == 1 else "json"
        elif self.field not in (*fields, "json"):
            raise UserError(f"an action has no field {self.field!r}; it has {', '.join(fields)} (or json for all)")
        if self.field == "json":
            listed = "; ".join(
                f'"{n}": {each.get("description") or each.get("type", "any")}' for n, each in fields.items()
            )
            self.rules = f"An action is a JSON object. Its fields: {listed}."
        else:
            said = fields[self.field].get("description")
            self.rules = f"An action is a text{f': {said}' if said else ''}."

    def _written(self, action: str) -> dict[str, Any]:
        """An action as the server takes it; _Refused if it is no JSON object where one is asked for."""
        if self.field != "json":
            return {str(self.field): action}
        try:
            made = json.loads(action)
        except (ValueError, RecursionError):
            raise _Refused("it is not JSON") from None
        if not isinstance(made, dict):
            raise _Refused("it is no JSON object")
        return made

    def _text(self, observation: Mapping[str, Any]) -> str:
        """What is shown of an observation."""
        if self.shown is not None:
            if self.shown not in observation:
                raise Infrastructure(
                    "bad_answer", f"the observation has no field {self.shown!r}; it has {sorted(observation)}"
                )
            told: Any = observation[self.shown]
        else:
            fields = {name: value for name, value in observation.items() if name not in OURS}
            told = next(iter(fields.values())) if len(fields) == 1 else fields
        text = told if isinstance(told, str) else json.dumps(told, ensure_ascii=False, sort_keys=True)
        return text[: self.max_chars]

    # --- the wire ------------------------------------------------------------------------------------------------

    def _ask(self, kind: str, data: dict[str, Any], *, again: bool = False) -> Answer:
        """The answer to a reset or a step, checked; `again`: a broken connection is made anew once."""
        fresh = self.link is None
        try:
            told = self._exchange({"type": kind, "data": data}, expected="observation")
        except Infrastructure as error:
            if not again or fresh or error.reason != "dead_server":
                raise
            told = self._exchange({"type": kind, "data": data}, expected="observation")
        observation, reward, done = told.get("observation"), told.get("reward"), told.get("done", False)
        reward = 0.0 if reward is None else reward
        fits = isinstance(observation, dict) and isinstance(reward, int | float) and isinstance(done, bool)
        if not fits or not math.isfinite(reward):
            self.close()
            raise Infrastructure("bad_answer", f"{self.url} answers {kind} with {str(told)[:200]}")
        assert isinstance(observation, dict)
        return Answer(observation, float(reward), bool(done))

    def _exchange(self, message: dict[str, Any], *, expected: str) -> dict[str, Any]:
        """The data of the answer to a message; after anything unexpected the connection is given up."""
        from websockets.exceptions import WebSocketException

        try:
            if self.link is None:
                self.link = self._connect()
            self.link.send(json.dumps(message))
            said = json.loads(self.link.recv(timeout=self.timeout))
            kind, data = said["type"], said["data"]
            if not isinstance(data, dict) or kind not in (expected, "error"):
                raise ValueError(kind)
        except TimeoutError:
            self.close()
            raise Infrastructure("timeout", f"{self.url} gave no answer within {self.timeout:g} s") from None
        except (OSError, WebSocketException) as error:
            self.close()
            raise Infrastructure("dead_server", f"{self.url} broke the connection: {error}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            self.close()
            raise Infrastructure("bad_answer", f"{self.url} does not answer as OpenEnv does") from None
        if kind == "error":
            self._blame(data)
        return data

    def _connect(self) -> Any:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        parts = urllib.parse.urlsplit(self.url)
        address = urllib.parse.urlunsplit((SCHEMES[parts.scheme], parts.netloc, f"{parts.path}/ws", "", ""))
        proxy: Any = {} if parts.hostname not in ("127.0.0.1", "localhost", "::1") else {"proxy": None}
        try:
            link = connect(address, open_timeout=self.timeout, close_timeout=1, max_size=LARGEST_MESSAGE, **proxy)
            return self.open.enter_context(link)
        except (OSError, WebSocketException) as error:
            raise Infrastructure("no_server", f"no server of OpenEnv answers at {address}: {error}") from None

    def _blame(self, data: Mapping[str, Any]) -> None:
        """What an error of the server means: a refused action, or that the episode is lost."""
        code, said = str(data.get("code")), str(data.get("message"))[:300]
        if code in REFUSALS:
            wrong = data.get("errors")
            places = [e for e in wrong if isinstance(e, dict)] if isinstance(wrong, list) else []
            listed = [f"{'.'.join(map(str, e.get('loc', ())))}: {e.get('msg')}" for e in places[:3]]
            raise _Refused("; ".join(listed)[:300] or said)
        self.close()
        raise Infrastructure(code.lower() if code in ERRORS else "server_error", f"{self.url}: {said}")
