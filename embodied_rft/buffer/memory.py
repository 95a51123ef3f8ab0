"""The memory that a buffer will take, announced before it is taken, and what the machine and its limits leave."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from embodied_rft.buffer.columns import BOOKKEEPING_BYTES, STORED_AS, Schema
from embodied_rft.data import Field
from embodied_rft.names import UserError


def announce(schema: Schema, capacity: int, available: int | None = None) -> str:
    """What a buffer will take, said before it is taken.

    Args:
        schema: its columns.
        capacity: its rows.
        available: bytes that are free; None asks the system (and its container).

    Returns:
        Such as "this run needs 3.1 GB of replay (2 images of 128x128x3, 100,000 rows)".

    Raises:
        ValueError: it does not fit.
    """
    columns = schema.columns().values()
    needed = capacity * (sum(map(_row_bytes, columns)) + BOOKKEEPING_BYTES)
    images: dict[str, int] = {}
    for column in columns:
        if column.kind == "dense" and column.dtype == "uint8" and len(column.shape) >= 2:
            size = "x".join(map(str, column.shape))
            images[size] = images.get(size, 0) + 1
    parts = [f"{n} image{'s' * (n > 1)} of {size}" for size, n in images.items()] + [f"{capacity:,} rows"]
    parts += ["text, tokens and images of varying size not counted"] * any(f.kind != "dense" for f in columns)
    sentence = f"this run needs {_bytes(needed)} of replay ({', '.join(parts)})"
    available = available_memory() if available is None else available
    if needed > available:
        raise UserError(
            f"{sentence}, but only {_bytes(available)} are free: at most {capacity * available // needed:,} rows fit. "
            "Lower buffer.capacity."
        )
    return sentence


def available_memory(root: Path = Path("/")) -> int:
    """Free bytes: the least of the machine's, those of every control group around this process, and `ulimit -v`.

    Args:
        root: where /proc and /sys lie.
    """
    free = [psutil.virtual_memory().available, *_group_memory(root)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def _group_memory(root: Path) -> Iterator[int]:
    """Free bytes in the control groups of this process and in all that they lie in, versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # no control groups: the machine's own number holds
    limits: tuple[str, ...]
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, limits, used, cache = root / "sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", ""
        elif "memory" in controllers.split(","):
            mount, limits = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes",)
            used, cache = "memory.usage_in_bytes", "total_"
        else:
            continue
        inside = Path(group.strip().lstrip("/"))
        for folder in (mount / inside, *(mount / parent for parent in inside.parents)):
            for name in limits:
                with contextlib.suppress(OSError, ValueError, KeyError):  # "max": no limit; elsewhere mounted: unseen
                    limit, taken = int((folder / name).read_text()), int((folder / used).read_text())
                    stat = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
                    yield limit - taken + int(stat[f"{cache}inactive_file"])


def _row_bytes(column: Field) -> int:
    if column.kind != "dense":
        return 16  # start and length; the values are not known beforehand
    return np.dtype(STORED_AS[column.dtype]).itemsize * math.prod(column.shape)


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
