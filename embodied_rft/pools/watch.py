"""Deadlines of calls into environments: an alarm in this process, a note for the parent in a worker.

Boundary: knows no environment. Whoever calls one says `begin` before (which environment, -1: all at once; how many
seconds it may take) and `end` after, those of one round inside `with watch:`; what happens to a call that takes too
long is here (in process) or in `workers` (the process is killed).
"""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import numpy as np


class Hang(BaseException):
    """Raised inside a call that took too long; no `except Exception` of an environment may swallow it."""


class Alarm:
    """Interrupts a call of the main thread with `Hang`; it reaches neither native code that is stuck nor other threads.

    Somebody else's alarm (a test runner's time limit) waits for the end of the round and has what is left of its time.
    """

    def __init__(self) -> None:
        self._ours = self._armed = False
        self._seconds = 0.0

    def __enter__(self) -> Alarm:
        self._theirs = signal.getsignal(signal.SIGALRM)
        main = threading.current_thread() is threading.main_thread()
        self._ours = main and self._theirs is not None  # None: a handler that was not set from Python
        if self._ours:
            self._left, self._entered = signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._ring)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._ours:
            self._ours = self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._theirs)
            if self._left:
                gone = time.monotonic() - self._entered
                signal.setitimer(signal.ITIMER_REAL, max(self._left - gone, 1e-3))

    def begin(self, env: int, seconds: float) -> None:
        """Ring after so many seconds."""
        if self._ours:
            self._armed, self._seconds = True, seconds
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def end(self) -> None:
        """Be silent: a ring from here on is not heard."""
        self._armed = False

    def _ring(self, signum: int, frame: Any) -> None:
        if self._armed:
            self._armed = False
            raise Hang(f"no answer within {self._seconds:g} s (env.deadline)")


class Note:
    """Writes for the parent of a worker which environment is busy and until when it may be.

    Args:
        due: [W] seconds of `time.monotonic`, which all processes of a machine share.
        busy: [W] number of the environment, -1 for all or none.
        worker: whose place is ours.
        first: number of our first environment.
    """

    def __init__(self, due: np.ndarray, busy: np.ndarray, *, worker: int, first: int) -> None:
        self.due, self.busy, self.worker, self.first = due, busy, worker, first

    def __enter__(self) -> Note:
        return self

    def __exit__(self, *error: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def begin(self, env: int, seconds: float) -> None:
        """Write it down, and see to it that a call that never ends does not outlive a parent that is gone."""
        self.due[self.worker] = time.monotonic() + seconds
        self.busy[self.worker] = self.first + env if env >= 0 else -1
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)

    def end(self) -> None:
        """Nobody is busy."""
        self.busy[self.worker] = -1


Watch = Alarm | Note
