"""What goes wrong in environments: told apart by kind, counted, put into words, and when it is too much to go on.

Boundary: knows no environment and no pool. A pool adds what happened and says how episodes ended; `Incidents` decides
when the run stops.
"""

from __future__ import annotations

import re
import subprocess
import traceback
from collections import Counter, deque
from dataclasses import dataclass, field

from embodied_rft.names import UserError
from embodied_rft.pools.watch import Hang

MAX_INCIDENTS = 0.9  # share of the latest episodes
WINDOW = 100  # so many episodes are the latest ones; at least ROUNDS for each environment
NEVER = 20  # so many failed episodes, and none ever that ended well, are enough; at least ROUNDS for each environment
ROUNDS = 4  # failures come before the first episodes can end, and a process that dies takes many with it


class Infrastructure(Exception):
    """What an environment stands on has failed, not whoever acts in it: Infrastructure("dead_server", "port 8000").

    The third outcome beside success and failure: the episode is void, is played again, is never learned from and never
    counted as a failure. An environment raises it where it knows better than Python's own errors (`kind_of`).

    Args:
        reason: in a word: "timeout", "dead_server", "crashed". Incidents are counted by it: "infrastructure/timeout".
        message: what happened.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        if not re.fullmatch("[a-z][a-z_0-9]*", reason):
            raise UserError(f"the reason is {reason!r}; expected a word like dead_server, by which it is counted")
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message or self.reason


def kind_of(error: BaseException) -> str:
    """By which kind an exception of an environment is counted: those of sockets and clocks are infrastructure, too."""
    if isinstance(error, Hang):
        return "hang"
    if isinstance(error, Infrastructure):
        return f"infrastructure/{error.reason}"
    if isinstance(error, TimeoutError | subprocess.TimeoutExpired):
        return "infrastructure/timeout"
    if isinstance(error, ConnectionError | EOFError):  # a pipe or socket whose other end is gone
        return "infrastructure/dead_server"
    return "error"


def is_infrastructure(kind: str) -> bool:
    """Whether incidents of this kind are nobody's fault who acts or plays."""
    return kind.startswith("infrastructure/")


class EnvironmentFailure(UserError, RuntimeError):
    """The environments fail too often to go on; the message has the latest incident."""


@dataclass(slots=True)
class Incidents:
    """What went wrong so far, counted by kind ("non_finite", "error", "hang", "crash", and those of
    `Infrastructure`), with the latest texts.

    Args:
        limit: share of the latest episodes that may fail; 1 goes on whatever happens.
        num_envs: how many run at once.
    """

    limit: float = MAX_INCIDENTS
    num_envs: int = 1
    counts: Counter[str] = field(default_factory=Counter)
    latest: deque[str] = field(default_factory=lambda: deque(maxlen=32))
    _told: Counter[str] = field(default_factory=Counter)  # of `counts`, by `news`
    _failed: deque[bool] = field(default_factory=deque)  # of the latest episodes, did it fail
    _good: bool = False  # an episode has ended well

    def __post_init__(self) -> None:
        self._failed = deque(maxlen=max(WINDOW, ROUNDS * self.num_envs))

    def add(self, kind: str, text: str) -> None:
        """Count one incident and keep its text."""
        self.counts[kind] += 1
        self.latest.append(f"{kind}: {text}")

    def news(self) -> tuple[dict[str, int], list[str]]:
        """Counts and texts (at most 32) since the last call."""
        fresh = self.counts - self._told
        self._told = self.counts.copy()
        count = min(fresh.total(), len(self.latest))
        return dict(fresh), list(self.latest)[len(self.latest) - count :]

    def take(self, others: Incidents) -> None:
        """What is new in `others`, which then count it as told."""
        counts, texts = others.news()
        self.counts.update(counts)
        self.latest.extend(texts)

    def judge(self, *, ended: int, failed: int) -> None:
        """Hear how many episodes just ended well and how many failed; EnvironmentFailure when too many do."""
        self._failed.extend([True] * failed + [False] * ended)
        self._good = self._good or ended > 0
        if not failed or self.limit >= 1:
            return
        count, of = sum(self._failed), len(self._failed)
        never = not self._good and of >= max(NEVER, ROUNDS * self.num_envs)
        if never or count > self.limit * (self._failed.maxlen or WINDOW):
            share = "none has ended well" if never else f"max_incidents allows {self.limit:g}"
            raise EnvironmentFailure(
                f"{count} of the latest {of} episodes failed in their environment ({share}); the latest incident is "
                f"{self.latest[-1] if self.latest else 'unknown'}\n"
                "Mend the environment, or raise env.max_incidents (1: go on whatever happens)."
            )


def describe_error(error: BaseException, *, frames: int = 3) -> str:
    """An exception for a log: "ZeroDivisionError: division by zero (arm.py:3 in step, called at bot.py:9 in step)"."""
    stack = [f for f in traceback.extract_tb(error.__traceback__) if "/embodied_rft/pools/singles.py" not in f.filename]
    places = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in stack[-frames:][::-1]]
    said = str(error).strip()
    if not said and stack and stack[-1].line:
        said = f"at `{stack[-1].line}`"  # an assert without a message
    where = f" ({', called at '.join(places)})" if places else ""
    return f"{type(error).__name__}{': ' if said else ''}{said}{where}"
