"""The inside of a worker process: it makes the host of a slice and answers the parent's commands.

Boundary: the counterpart of `workers`, which starts, watches and replaces these processes. Arrays travel through one
block of shared memory, text and small things through the pipe.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import cloudpickle  # comes with gymnasium, whose AsyncVectorEnv needs it for the same purpose
import numpy as np

from embodied_rft.data import Space
from embodied_rft.names import UserError
from embodied_rft.pools.hosts import Answer, Host
from embodied_rft.pools.protocol import Seeding, flatten_space, is_text
from embodied_rft.pools.watch import Note

SIGNALS = ("reward", "terminated", "truncated", "success", "failed")  # of an `Answer`, in its order
# Of an `Answer`, what goes through the pipe: texts, incidents, told, statistics; and the host's seeding.
Told = tuple[dict[str, list[str]], list[tuple[str, str]], bool, dict[str, np.ndarray], Seeding | None]
Layout = dict[str, tuple[tuple[int, ...], str, int]]  # name -> shape, dtype, offset in bytes
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
ALIGNMENT = 64  # bytes; a cache line, so that two arrays never share one


class SharedArrays:
    """Named arrays in one block of shared memory; the process that made it removes it."""

    def __init__(self, layout: Layout, *, name: str | None = None) -> None:
        size = max(offset + int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype, offset in layout.values())
        self.layout, self.owner = layout, name is None
        self.memory = SharedMemory(name=name, create=self.owner, size=size)
        if self.owner:
            _reserve(self.memory, size)
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


def _reserve(memory: SharedMemory, size: int) -> None:
    """Take the memory now: where /dev/shm is too small, its first use would kill the process."""
    path = Path("/dev/shm", memory.name.lstrip("/"))
    if not path.exists():
        return
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        memory.close()
        memory.unlink()
        room = os.statvfs(path.parent)
        raise UserError(
            f"worker processes need {size / 2**20:.1f} MiB of shared memory, and {path.parent} has "
            f"{room.f_bavail * room.f_frsize / 2**20:.1f} MiB left. Make it larger (docker run --shm-size=2g), "
            "take fewer environments or smaller images, or use the pool kind 'sync'."
        ) from None


def control_layout(num_workers: int) -> Layout:
    """Where `watch.Note` writes."""
    return {"due": ((num_workers,), "<f8", 0), "busy": ((num_workers,), "<i8", 8 * num_workers)}


def layout_of(observation_space: Space, action_space: Space, *, num_envs: int) -> Layout:
    """Where everything of fixed size lies; text is not in it."""
    leaves = {f"observation/{key}": leaf for key, leaf in flatten_space(observation_space).items()}
    leaves["action"] = action_space
    wanted = [(key, leaf.shape, leaf.dtype) for key, leaf in leaves.items() if not is_text(leaf)]
    wanted += [("reward", (), np.dtype(np.float32)), ("seed", (), np.dtype(np.int64))]
    wanted += [(name, (), np.dtype(np.bool_)) for name in (*SIGNALS[1:], "rows")]
    layout: Layout = {}
    offset = 0
    for name, shape, dtype in wanted:
        full = (num_envs, *(shape or ()))
        layout[name] = (full, np.dtype(dtype).str, offset)
        size = int(np.prod(full)) * np.dtype(dtype).itemsize
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return layout


def serve(
    connection: Connection,
    make_slice: bytes,
    worker: int,
    first: int,
    count: int,
    before: int,
    control: tuple[str, Layout],
    cores: set[int],
) -> None:
    """Main function of a worker: make the host of a slice, then answer commands until the parent hangs up.

    Args:
        connection: this end of the pipe.
        make_slice: pickled `make_slice(count, watch=..., first=...)`, which makes the host of `count` environments.
        worker: number of this worker.
        first: number of the first environment of the slice.
        count: environments in the slice.
        before: environments of other pools that come before, for messages.
        control: name and layout of the shared memory in which the worker says what it is busy with.
        cores: this worker's share of the processor: what counts its cores to start threads finds these.
    """
    _follow_parent()
    shared = SharedArrays(control[1], name=control[0])
    note = Note(shared.arrays["due"], shared.arrays["busy"], worker=worker, first=first)
    try:
        with _only(cores):
            own = _Slice(cloudpickle.loads(make_slice)(count, watch=note, first=before + first), first, count)
    except BaseException as error:
        connection.send(("failed", (_portable(error), traceback.format_exc())))
        return
    host = own.host
    connection.send(("ready", cloudpickle.dumps((host.observation_space, host.action_space, host.can_save))))
    while True:
        try:
            serial, command, arguments = connection.recv()
        except (EOFError, OSError):
            return own.close()
        if command == "close":
            return own.close()
        try:
            answer = (serial, "done", getattr(own, command)(*arguments))
        except BaseException:
            answer = (serial, "error", traceback.format_exc())
        connection.send(answer)


def _follow_parent() -> None:
    """Die when the parent dies, also from inside a step or while stopped; leave to it what a whole group is sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server: Any = forkserver._forkserver
    if (alive := getattr(server, "_forkserver_alive_fd", None)) is not None:
        os.close(alive)  # else the fork server lives as long as we do, although its owner is gone
        server._forkserver_alive_fd = None
    with suppress(OSError, AttributeError):  # Linux: killed after the fork server, which ends with the parent
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
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


class _Slice:
    """The commands of a worker. Arrays are exchanged through shared memory, text and small things in the answer."""

    def __init__(self, host: Host, first: int, count: int) -> None:
        self.host = host
        self.envs = slice(first, first + count)
        self.shared: SharedArrays | None = None

    def attach(self, name: str, layout: Layout) -> None:
        """Map the parent's shared memory."""
        self.shared = SharedArrays(layout, name=name)

    def _mine(self, name: str) -> np.ndarray:
        assert self.shared is not None
        return self.shared.arrays[name][self.envs]

    def _tell(self, answer: Answer) -> Told:
        """Arrays into shared memory; text and small things come back."""
        texts = {key: value for key, value in answer.observation.items() if isinstance(value, list)}
        for key in answer.observation.keys() - texts.keys():
            self._mine(f"observation/{key}")[:] = answer.observation[key]
        for name in SIGNALS:
            self._mine(name)[:] = getattr(answer, name)
        return texts, answer.incidents, answer.told, answer.statistics, self.host.seeding

    def reset(self, options: Any) -> Any:
        return self._tell(self.host.reset(self._mine("seed").copy(), self._mine("rows").copy(), options))

    def step(self, text_action: list[str] | None, skip_images: bool) -> Any:
        self.host.skip_images(skip_images)
        action = self._mine("action") if text_action is None else text_action
        return self._tell(self.host.step(action, self._mine("rows").copy()))

    def ask(self, name: str) -> Any:
        return self.host.ask(name)

    def get_state(self) -> dict[str, np.ndarray] | None:
        return self.host.get_state()

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        self.host.set_state(state)

    def save(self, row: int) -> object:
        return self.host.save(row)

    def restore(self, row: int, saved: object) -> None:
        self.host.restore(row, saved)

    def close(self) -> None:
        self.host.close()
        if self.shared is not None:
            self.shared.close()
