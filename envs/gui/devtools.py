"""The DevTools protocol: commands with a deadline, many in flight, and coroutines that wait for their answers together.

One `Connection` owns the pipes of one browser. Whatever is sent gives a `Waiting`, which a coroutine awaits; `together`
runs many coroutines, over any number of connections, until each has ended. There are no threads, and nothing sleeps:
`together` waits in `poll` for the pipes. Boundary: knows no page; commands are names and JSON.
"""

from __future__ import annotations

import json
import math
import os
import select
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from typing import Any, TypeVar

from embodied_rft.pools.incidents import Infrastructure

T = TypeVar("T")
Json = dict[str, Any]
Listener = Callable[[str, Json], None]  # an event's name, and what it says
PIPE = 1 << 20  # bytes read at once


class Refused(RuntimeError):
    """The browser does not do what a command says; the message has its reason."""


class Waiting:
    """What a coroutine waits for: the answer to a command, or an event. Awaiting it gives what was said."""

    def __init__(self, connection: Connection, what: str, session: str | None) -> None:
        self.connection, self.what, self.session = connection, what, session
        self.deadline = time.monotonic() + connection.patience
        self.done = False
        self.said: Json = {}
        self.error: Exception | None = None

    def __await__(self) -> Generator[Waiting, None, Json]:
        while not self.done:
            yield self
        if self.error is not None:
            raise self.error
        return self.said

    def end(self, said: Json | None = None, error: Exception | None = None) -> None:
        """Whoever waits goes on."""
        self.done, self.said, self.error = True, said or {}, error


class Turns:
    """One after the other: `async with turns:` lets in one coroutine at a time, in the order in which they came."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: list[Waiting] = []  # the first one is inside

    async def __aenter__(self) -> None:
        mine = Waiting(self._connection, "a turn", None)
        mine.deadline = math.inf  # who is inside has a deadline
        self._queue.append(mine)
        if self._queue[0] is mine:
            mine.end()
        try:
            await mine
        except BaseException:
            self._leave(mine)
            raise

    async def __aexit__(self, *raised: object) -> None:
        self._leave(self._queue[0])

    def _leave(self, mine: Waiting) -> None:
        inside = self._queue[0] is mine
        self._queue.remove(mine)
        if inside and self._queue:
            self._queue[0].end()


class Connection:
    """The one owner of a browser's pipes.

    Args:
        reads: descriptor that answers come from.
        writes: descriptor that commands go to.
        patience: seconds that an answer may take.
    """

    def __init__(self, reads: int, writes: int, *, patience: float) -> None:
        self.reads, self.writes, self.patience = reads, writes, patience
        os.set_blocking(reads, False)
        os.set_blocking(writes, False)
        self.dead: Infrastructure | None = None
        self.frames = Turns(self)  # a browser draws one frame at a time, whatever it is asked for
        self.listeners: dict[str | None, Listener] = {}  # of events, by session; None: of the browser itself
        self._answers: dict[int, Waiting] = {}
        self._events: dict[tuple[str | None, str], list[Waiting]] = {}
        self._count = 0
        self._unread, self._unsent = bytearray(), bytearray()

    def send(self, method: str, session: str | None = None, /, **parameters: object) -> Waiting:
        """Send a command; await the result for its answer, or leave it."""
        self._count += 1
        waiting = self._answers[self._count] = Waiting(self, method, session)
        if self.dead is not None:
            del self._answers[self._count]
            waiting.end(error=self.dead)
            return waiting
        command: Json = {"id": self._count, "method": method, "params": parameters}
        if session is not None:
            command["sessionId"] = session
        self._unsent += json.dumps(command).encode() + b"\0"
        self.flush()
        return waiting

    def expect(self, method: str, session: str | None = None, /) -> Waiting:
        """The next event of this name; to be called before what causes it."""
        waiting = Waiting(self, method, session)
        if self.dead is not None:
            waiting.end(error=self.dead)
        else:
            self._events.setdefault((session, method), []).append(waiting)
        return waiting

    def flush(self) -> None:
        """Write as much as the pipe takes."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self.writes, self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            self.die(f"its pipe is closed ({error.strerror})")

    @property
    def full(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._unsent)

    def pump(self) -> None:
        """Read what is there, and hand it to whoever waits."""
        try:
            while read := os.read(self.reads, PIPE):
                self._unread += read
                if len(read) < PIPE:
                    break
            else:
                self.die("its pipe is closed")
        except BlockingIOError:
            pass
        *messages, rest = self._unread.split(b"\0")
        self._unread = rest
        for message in messages:
            self._hear(json.loads(message))

    def _hear(self, message: Json) -> None:
        if (number := message.get("id")) is not None:
            if (waiting := self._answers.pop(number, None)) is not None:
                error = message.get("error")
                refused = Refused(f"{waiting.what}: {error['message']}") if error else None
                waiting.end(message.get("result"), refused)
            return
        session, method, said = message.get("sessionId"), message["method"], message["params"]
        for waiting in self._events.pop((session, method), []):
            waiting.end(said)
        if (listener := self.listeners.get(session)) is not None:
            listener(method, said)

    def fail(self, session: str, error: Exception) -> None:
        """Nothing more comes of this session."""
        self._end(error, lambda waiting: waiting.session == session)

    def die(self, why: str) -> None:
        """Nothing more comes at all."""
        if self.dead is None:
            self.dead = Infrastructure("dead_browser", f"the browser is gone: {why}")
            self._end(self.dead, lambda waiting: True)

    def _end(self, error: Exception, which: Callable[[Waiting], bool]) -> None:
        for number, waiting in list(self._answers.items()):
            if which(waiting):
                del self._answers[number]
                waiting.end(error=error)
        for key, waits in list(self._events.items()):
            for waiting in [waiting for waiting in waits if which(waiting)]:
                waits.remove(waiting)
                waiting.end(error=error)
            if not waits:
                del self._events[key]


def together(coroutines: Mapping[int, Coroutine[Any, Any, T]]) -> dict[int, T | Exception]:
    """Run coroutines side by side until all have ended; gives what each returned or raised, by its number.

    An answer that does not come in time is raised as `Infrastructure("timeout", ...)` where it is waited for.
    """
    ended: dict[int, T | Exception] = {}
    waits: dict[int, Waiting] = {}

    def resume(number: int, error: Exception | None = None) -> None:
        coroutine = coroutines[number]
        try:
            waits[number] = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            ended[number] = stop.value
        except Exception as raised:
            ended[number] = raised

    for number in coroutines:
        resume(number)
    try:
        while waits:
            _wait(waits.values())
            now = time.monotonic()
            for number, waiting in list(waits.items()):
                late = not waiting.done and waiting.deadline <= now
                if waiting.done or late:
                    del waits[number]
                    seconds = waiting.connection.patience
                    resume(number, _timeout(waiting.what, seconds) if late else None)
    finally:
        for coroutine in coroutines.values():
            coroutine.close()
    return ended


def alone(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run one coroutine; gives what it returned, or raises what it raised."""
    result = together({0: coroutine})[0]
    if isinstance(result, Exception):
        raise result
    return result


def _timeout(what: str, seconds: float) -> Infrastructure:
    return Infrastructure("timeout", f"no answer to {what} within {seconds:g} seconds")


def _wait(waits: Iterable[Waiting]) -> None:
    """Read what has come; where none of them has what it waits for, until something comes or a deadline is over."""
    waits = list(waits)
    connections = {waiting.connection.reads: waiting.connection for waiting in waits if waiting.connection.dead is None}
    poll = select.poll()
    for connection in connections.values():
        poll.register(connection.reads, select.POLLIN)
        if connection.full:
            poll.register(connection.writes, select.POLLOUT)
    patience = min(waiting.deadline for waiting in waits) - time.monotonic()
    patience = 0.0 if any(waiting.done for waiting in waits) else max(0.0, patience)
    ready = {descriptor for descriptor, _ in poll.poll(math.ceil(patience * 1000))}
    for connection in connections.values():
        if connection.writes in ready:
            connection.flush()
        if connection.reads in ready:
            connection.pump()
