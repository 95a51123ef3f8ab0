"""One process a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
from os import PathLike

from embodied_rft.names import UserError
from embodied_rft.runs.folder import RunFolder

_held_locks: set[int] = set()  # descriptors; forked children close them, or they would keep a dead run's lock


class RunLock:
    """Only one process works in a run folder: `with RunLock(folder): ...`.

    The kernel frees the lock however the process ends.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.path = RunFolder(folder).lock
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(f"{self.path} is a symbolic link, whose target would be overwritten") from None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise UserError(
                f"run folder {self.path.parent} is in use by process {owner}: two runs would overwrite each other. "
                "Wait for it, stop it, or choose another folder."
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        _held_locks.add(descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            _held_locks.discard(self._descriptor)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


def _close_locks_in_child() -> None:
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_close_locks_in_child)
