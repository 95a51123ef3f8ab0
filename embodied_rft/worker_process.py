"""The inside of a worker process: it makes the pool of a slice and answers the parent's commands.

Boundary: the counterpart of `workers`, which starts, watches and replaces these processes. Arrays travel through one
block of shared memory, text and small things through the pipe.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Tree
from embodied_rft.stepping import Pool, flatten_space

Layout = dict[str, tuple[tuple[int, ...], str, int]]  # name -> shape, dtype, offset in bytes
ALIGNMENT = 64  # bytes; a cache line, so that two arrays never share one


class SharedArrays:
    """Named arrays in one block of shared memory; the process that made it removes it."""

    def __init__(self, layout: Layout, *, name: str | None = None) -> None:
        size = max(offset + int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype, offset in layout.values())
        self.layout, self.owner = layout, name is None
        self.memory = SharedMemory(name=name, create=self.owner, size=size)
        self.arrays: dict[str, np.ndarray] = {
            key: np.ndarray(shape, dtype=dtype, buffer=self.memory.buf, offset=offset)
            for key, (shape, dtype, offset) in layout.items()
        }

    def close(self) -> None:
        """Let go of the memory; the owner also removes it. All views must be gone or unused."""
        self.arrays.clear()
        try:
            self.memory.close()
        except BufferError:  # somebody still holds a view; the mapping goes with the process
            pass
        if self.owner:
            self.memory.unlink()


def layout_of(observation_space: spaces.Space, action_space: spaces.Space, *, num_envs: int) -> Layout:
    """Where everything of fixed size lies; text is not in it."""
    leaves = {f"observation/{key}": leaf for key, leaf in flatten_space(observation_space).items()}
    leaves["action"] = action_space
    wanted = [(key, leaf.shape, leaf.dtype) for key, leaf in leaves.items() if not isinstance(leaf, spaces.Text)]
    wanted += [("reward", (), np.dtype(np.float32))]
    wanted += [(name, (), np.dtype(np.bool_)) for name in ("terminated", "truncated", "success", "valid")]
    layout: Layout = {}
    offset = 0
    for name, shape, dtype in wanted:
        full = (num_envs, *(shape or ()))
        layout[name] = (full, np.dtype(dtype).str, offset)
        size = int(np.prod(full)) * np.dtype(dtype).itemsize
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return layout


def serve(
    connection: Connection, make_slice: Callable[[int], Pool], first: int, count: int, patience: float, cores: set[int]
) -> None:
    """Main function of a worker: make the pool of a slice, then answer commands until the parent hangs up.

    Args:
        connection: this end of the pipe.
        make_slice: makes the Pool of `count` environments.
        first: number of the first environment of the slice.
        count: environments in the slice.
        patience: seconds after which a command that still runs ends this process, whoever is alive.
        cores: this worker's share of the processor: what counts its cores to start threads finds these.
    """
    _follow_parent()
    try:
        with _only(cores):
            host = _Host(make_slice(count), first, count)
    except BaseException as error:
        connection.send(("failed", (_portable(error), traceback.format_exc())))
        return
    connection.send(("ready", (host.pool.observation_space, host.pool.action_space, host.pool.can_save)))
    while True:
        try:
            serial, command, arguments = connection.recv()
        except (EOFError, OSError):
            return host.close()
        if command == "close":
            return host.close()
        try:
            signal.setitimer(signal.ITIMER_REAL, patience)  # ends a worker that hangs after its parent is gone
            answer = (serial, "done", getattr(host, command)(*arguments))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Exception:
            answer = (serial, "error", traceback.format_exc())
        connection.send(answer)


def _follow_parent() -> None:
    """Die when the parent dies, also from inside a step; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = mp.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


@contextmanager
def _only(cores: set[int]) -> Iterator[None]:
    """Run on some cores for a while, so that the native threads of all workers together make one for each core."""
    if not cores:
        yield
        return
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


def _portable(error: BaseException) -> BaseException | None:
    """The exception itself if it survives a trip between processes."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        return None
    return error


class _Host:
    """The commands of a worker. Arrays are exchanged through shared memory, text and small things in the answer."""

    def __init__(self, pool: Pool, first: int, count: int) -> None:
        self.pool = pool
        self.envs = slice(first, first + count)
        self.shared: SharedArrays | None = None
        self.told = 0  # incidents already reported

    def attach(self, name: str, layout: Layout) -> None:
        """Map the parent's shared memory."""
        self.shared = SharedArrays(layout, name=name)

    def _write(self, observation: Tree) -> dict[str, list[str]]:
        """Arrays into shared memory; what is text comes back."""
        assert self.shared is not None
        texts = {}
        for key, value in observation.items():
            if isinstance(value, list):
                texts[key] = value
            else:
                self.shared.arrays[f"observation/{key}"][self.envs] = value
        return texts

    def _news(self) -> list[str]:
        """Incident texts since the last answer."""
        total = self.pool.incidents.counts.total()
        news = list(self.pool.incidents.latest)[-(total - self.told) :] if total > self.told else []
        self.told = total
        return news

    def reset(self, seeds: np.ndarray, mask: np.ndarray, options: Any) -> tuple[dict[str, list[str]], list[str]]:
        texts = self._write(self.pool.reset(seeds, mask, options))
        return texts, self._news()

    def step(self, text_action: list[str] | None) -> tuple[dict[str, list[str]], list[str], bool]:
        assert self.shared is not None
        arrays = self.shared.arrays
        result = self.pool.step(arrays["action"][self.envs].copy() if text_action is None else text_action)
        texts = self._write(result.observation)
        for name in ("reward", "terminated", "truncated", "valid"):
            arrays[name][self.envs] = getattr(result, name)
        reports = "success" in result.info
        arrays["success"][self.envs] = result.info["success"] if reports else False
        return texts, self._news(), reports

    def get_state(self) -> dict[str, np.ndarray] | None:
        return self.pool.get_state()

    def set_state(self, state: dict[str, np.ndarray]) -> dict[str, list[str]]:
        self.pool.set_state(state)
        return self._write(self.pool.observation)

    def close(self) -> None:
        self.pool.close()
        if self.shared is not None:
            self.shared.close()
