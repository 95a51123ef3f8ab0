"""Demonstration files: whole episodes in one safetensors file with a JSON description, written atomically, no pickle.

Knows trajectories and schemas, not the buffer. Every column is stored once for all episodes, one after the other; each
different image once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from embodied_rft.blobs import BlobStore
from embodied_rft.columns import Schema
from embodied_rft.data import Field, Ragged, Source, Trajectory
from embodied_rft.intake import check_column

FORMAT = "embodied_rft.trajectories.1"
HELP = "Write it again with `erft demos`, or check the download."
SCALARS = ("end", "source", "version", "group", "seed", "success")


def write_trajectories(path: str | Path, trajectories: Sequence[Trajectory]) -> None:
    """Write episodes to a file: all of it or nothing; an existing file is replaced.

    Raises:
        ValueError: no trajectory, or episodes with different columns.
        OSError: the disk is full or refuses; what was there before is untouched.
    """
    if not trajectories:
        raise ValueError(f"no trajectory was given for {path}: an empty file would be no use")
    rows = [_columns(t) for t in trajectories]
    for number, row in enumerate(rows):
        if set(row) != set(rows[0]):
            raise ValueError(f"trajectory {number} has columns {sorted(row)}, the first has {sorted(rows[0])}")
    arrays: dict[str, np.ndarray] = {}
    columns = {name: _pack(name, [row[name] for row in rows], arrays) for name in rows[0]}
    description = {
        "columns": columns,
        "lengths": [len(t) for t in trajectories],
        "episodes": [{name: getattr(t, name) for name in SCALARS} for t in trajectories],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        save_file(arrays, temporary, metadata={FORMAT: json.dumps(description)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_trajectories(path: str | Path, *, schema: Schema | None = None) -> list[Trajectory]:
    """The episodes of a file, checked against the columns of a buffer when `schema` is given.

    Raises:
        ValueError: the file is missing, empty, truncated or of another kind, or does not fit the schema.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no demonstration file {path}. {HELP}")
    if not path.stat().st_size:
        raise ValueError(f"demonstration file {path} is empty (0 bytes). {HELP}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise ValueError(f"{path} is a safetensors file, but not one of demonstrations. {HELP}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"demonstration file {path} is truncated or damaged ({error}). {HELP}") from None
    description = json.loads(metadata[FORMAT])
    lengths = description["lengths"]
    columns = {name: _unpack(name, kind, arrays) for name, kind in description["columns"].items()}
    ends = np.cumsum(lengths)
    trajectories = [
        _trajectory(columns, int(end) - length, int(end), number, scalars)
        for number, (length, end, scalars) in enumerate(zip(lengths, ends, description["episodes"], strict=True))
    ]
    if schema is not None:
        for number, trajectory in enumerate(trajectories):
            _check(f"episode {number} of {path}", trajectory, schema)
    return trajectories


def _columns(trajectory: Trajectory) -> dict[str, Any]:
    """Everything that has one value a row; observations have one row more than the rest."""
    columns = {f"observation/{k}": v for k, v in trajectory.observation.items()}
    columns |= {"action": trajectory.action, "reward": np.asarray(trajectory.reward, np.float32)}
    if trajectory.log_prob is not None:
        columns["log_prob"] = trajectory.log_prob
    columns |= {f"trace/{k}": v for k, v in trajectory.trace.items()}
    columns |= {f"rewards/{k}": v for k, v in trajectory.rewards.items()}
    for name, value in columns.items():
        expected = len(trajectory) + name.startswith("observation/")
        if len(value) != expected:
            raise ValueError(f"{name!r} has {len(value)} rows, expected {expected} in an episode of {len(trajectory)}")
    return columns


def _pack(name: str, parts: list[Any], arrays: dict[str, np.ndarray]) -> str:
    """Put a column of all episodes into `arrays`; returns its kind."""
    if isinstance(parts[0], Ragged):
        ragged = Ragged.of([row for part in parts for row in part], parts[0].values.dtype, parts[0].values.shape[1:])
        arrays[name], arrays[f"{name}#offsets"] = ragged.values, ragged.offsets
        return "ragged"
    if not isinstance(parts[0], (list, tuple)):
        arrays[name] = np.ascontiguousarray(np.concatenate(parts))
        return "dense"
    rows = [row for part in parts for row in part]
    if all(isinstance(row, str) for row in rows):
        text = Ragged.of([np.frombuffer(row.encode(), np.uint8) for row in rows], dtype=np.uint8)
        arrays[name], arrays[f"{name}#offsets"] = text.values, text.offsets
        return "text"
    store = BlobStore()
    ids = Ragged.of([[store.put(image) for image in row] for row in rows], dtype=np.int64)
    state = store.state_dict()
    arrays |= {name: ids.values, f"{name}#offsets": ids.offsets}
    for part in ("shapes", "bytes"):
        arrays |= {f"{name}#{part}": state[part].values, f"{name}#{part}#offsets": state[part].offsets}
    return "images"


def _unpack(name: str, kind: str, arrays: dict[str, np.ndarray]) -> Any:
    """The column of all episodes that `_pack` put there."""
    if kind == "dense":
        return arrays[name]
    ragged = Ragged(arrays[name], arrays[f"{name}#offsets"])
    if kind == "ragged":
        return ragged
    if kind == "text":
        return [row.tobytes().decode() for row in ragged]
    shapes, data = (Ragged(arrays[f"{name}#{part}"], arrays[f"{name}#{part}#offsets"]) for part in ("shapes", "bytes"))
    images = [raw.reshape(shape) for raw, shape in zip(data, shapes, strict=True)]
    return [[images[id] for id in row] for row in ragged]


def _trajectory(columns: dict[str, Any], start: int, stop: int, number: int, scalars: dict[str, Any]) -> Trajectory:
    """Decisions [start, stop) of all; `number` episodes came before, each with one observation more."""

    def section(prefix: str, first: int, last: int) -> dict[str, Any]:
        return {n.removeprefix(prefix): _cut(v, first, last) for n, v in columns.items() if n.startswith(prefix)}

    return Trajectory(
        observation=section("observation/", start + number, stop + number + 1),
        action=_cut(columns["action"], start, stop),
        reward=columns["reward"][start:stop],
        log_prob=_cut(columns["log_prob"], start, stop) if "log_prob" in columns else None,
        trace=section("trace/", start, stop),
        rewards=section("rewards/", start, stop),
        **{**scalars, "source": Source(scalars["source"])},
    )


def _cut(value: Any, start: int, stop: int) -> Any:
    return value.take(np.arange(start, stop)) if isinstance(value, Ragged) else value[start:stop]


def _check(what: str, trajectory: Trajectory, schema: Schema) -> None:
    """Observations and actions must fit; traces belong to a policy and are looked at when they are added."""

    def check(name: str, field: Field, values: Any, count: int) -> None:
        try:
            check_column(name, field, values, count)
        except ValueError as error:
            raise ValueError(f"{what} does not fit this environment: {error}") from None

    given, expected = set(trajectory.observation), set(schema.observation)
    if given != expected:
        raise ValueError(f"{what} has the observations {sorted(given)}, this environment {sorted(expected)}")
    for key, field in schema.observation.items():
        check(f"observation/{key}", field, trajectory.observation[key], len(trajectory) + 1)
    check("action", schema.action, trajectory.action, len(trajectory))
