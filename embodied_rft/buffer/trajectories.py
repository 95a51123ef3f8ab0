"""Demonstration files: whole episodes in one safetensors file with a JSON description, written atomically, no pickle.

Knows trajectories and schemas, not the buffer. Every column is stored once for all episodes, one after the other; each
different image once. A file carries the SHA-256 of all that it says: changed bits are noticed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.formats import recognise
from embodied_rft.buffer.images import BlobStore
from embodied_rft.buffer.intake import check_column
from embodied_rft.data import Field, Ragged, Source, Space, Trajectory, pick
from embodied_rft.names import UserError

FORMAT = "embodied_rft.buffer.trajectories.1"
HELP = "Write it again with `erft demos`, or check the download."
OUTSIDE = 0.01  # share of actions outside the action space up to which they are clipped
SCALARS = ("end", "source", "version", "group", "seed", "success")

logger = logging.getLogger(__name__)


def write_trajectories(path: str | Path, trajectories: Sequence[Trajectory]) -> None:
    """Write episodes to a file: all of it or nothing; an existing file is replaced.

    Raises:
        ValueError: no trajectory, or episodes with different columns.
        OSError: the disk is full or refuses; what was there before is untouched.
    """
    if not trajectories:
        raise UserError(f"no trajectory was given for {path}: an empty file would be no use")
    rows = [_columns(t) for t in trajectories]
    for number, row in enumerate(rows):
        if set(row) != set(rows[0]):
            raise UserError(f"trajectory {number} has columns {sorted(row)}, the first has {sorted(rows[0])}")
    arrays: dict[str, np.ndarray] = {}
    columns = {name: _pack(name, [row[name] for row in rows], arrays) for name in rows[0]}
    description = {
        "columns": columns,
        "lengths": [len(t) for t in trajectories],
        "episodes": [{name: getattr(t, name) for name in SCALARS} for t in trajectories],
    }
    description["sha256"] = _digest(arrays, description)
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


def read_trajectories(
    path: str | Path,
    *,
    schema: Schema | None = None,
    action_space: Space | None = None,
    outside: float = OUTSIDE,
) -> list[Trajectory]:
    """The episodes of a file, checked against the columns of a buffer when `schema` is given.

    Args:
        path: of the file.
        schema: what observations and actions must look like.
        action_space: of one step; see `within`.
        outside: share of actions that may lie outside of it.

    Raises:
        ValueError: the file is missing, empty, truncated, changed or of another kind, its parts contradict each other,
            a number is NaN or infinite, or it does not fit the schema or the action space.
    """
    path = Path(path)
    arrays, description = _read(path)
    try:
        lengths = _check_lengths(description, arrays)
        columns = {name: _unpack(name, kind, arrays) for name, kind in description["columns"].items()}
        for name, column in columns.items():
            expected = sum(lengths) + len(lengths) * name.startswith("observation/")
            if len(column) != expected:
                raise UserError(f"{name!r} has {len(column)} rows, its episodes have {expected}")
        ends = np.cumsum(lengths)
        trajectories = [
            _trajectory(columns, int(end) - length, int(end), number, scalars)
            for number, (length, end, scalars) in enumerate(zip(lengths, ends, description["episodes"], strict=True))
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"the parts of demonstration file {path} contradict each other: {error}. {HELP}") from None
    for number, trajectory in enumerate(trajectories):
        _check_finite(f"episode {number} of {path}", trajectory)
        if schema is not None:
            _check(f"episode {number} of {path}", trajectory, schema)
    if action_space is not None:
        trajectories = within(trajectories, action_space, outside=outside, what=str(path))
    return trajectories


def within(trajectories: list[Trajectory], space: Space, *, outside: float, what: str) -> list[Trajectory]:
    """The episodes with actions inside the action space: a few that are not are clipped, many are refused.

    Args:
        trajectories: of single steps; actions [T, A].
        space: of one action. Texts and other unbounded actions are left as they are.
        outside: share of steps that may have an action outside, by more than rounding.
        what: where they come from, for messages.

    Raises:
        ValueError: more than that share; actions that are no choice of a discrete space.
    """
    if not isinstance(space, (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)):
        return trajectories
    low, high = _ends(space)
    rounding = 1e-5 * np.maximum(np.abs(low), np.abs(high)) if isinstance(space, gym.spaces.Box) else 0
    actions = [np.asarray(t.action) for t in trajectories]
    wrong = [((a < low - rounding) | (a > high + rounding)).reshape(len(a), -1).any(1) for a in actions]
    count, total = sum(int(w.sum()) for w in wrong), sum(len(a) for a in actions)
    if count:
        index = next(i for i, w in enumerate(wrong) if w.any())
        example = actions[index][wrong[index]][0].tolist()
        said = f"{what}: {count:,} of {total:,} actions ({count / total:.2%}) lie outside of {space}, such as {example}"
        if count > outside * total or not isinstance(space, gym.spaces.Box):
            raise UserError(
                f"{said}. Are they in other units (degrees, +-100, another controller's scale)? Convert them to the "
                f"environment's. Up to a share of {outside:g} is clipped; the option `outside` of `load` sets it."
            )
        logger.warning("%s; they are clipped to it", said)
    if not isinstance(space, gym.spaces.Box):
        return trajectories
    return [
        replace(t, action=np.clip(a, low, high).astype(a.dtype)) for t, a in zip(trajectories, actions, strict=True)
    ]


def _ends(space: Any) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest action."""
    if isinstance(space, gym.spaces.Box):
        return space.low, space.high
    if isinstance(space, gym.spaces.MultiBinary):
        return np.asarray(0), np.asarray(1)
    start = np.asarray(space.start)
    return start, start + (space.n if isinstance(space, gym.spaces.Discrete) else space.nvec) - 1


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, description) of a file whose checksum is right."""
    if path.is_dir() or (path.is_file() and path.stat().st_size):
        other = recognise(path)
        if other is not None:
            raise UserError(
                f"{path} is {other}. Demonstrations are read from our own files: read it there, make a "
                "embodied_rft.Trajectory of each episode, and write them with embodied_rft."
                "write_trajectories (docs/foreign.md has an example)."
            )
    if not path.is_file():
        raise UserError(f"there is no demonstration file {path}. {HELP}")
    if not path.stat().st_size:
        raise UserError(f"demonstration file {path} is empty (0 bytes). {HELP}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise UserError(f"{path} is a safetensors file, but not one of demonstrations. {HELP}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"demonstration file {path} is truncated or damaged ({error}). {HELP}") from None
    try:
        description = json.loads(metadata[FORMAT])
        told = description.pop("sha256", None)
    except (ValueError, AttributeError) as error:
        raise UserError(f"demonstration file {path} is damaged: its description is no mapping ({error})") from None
    if told is None:
        logger.warning("%s was written without a checksum, by an older version: changed bits in it go unnoticed", path)
    elif told != _digest(arrays, description):
        raise UserError(f"demonstration file {path} was changed or damaged: its checksum is another one. {HELP}")
    return arrays, description


def _digest(arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a file says."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check_lengths(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[int]:
    """The lengths of the episodes; every list of offsets must climb from 0 to the number of its values."""
    lengths: list[int] = description["lengths"]
    if not lengths or not all(isinstance(length, int) and length > 0 for length in lengths):
        raise UserError(f"lengths of episodes must be positive whole numbers, given {str(lengths)[:80]}")
    for name, offsets in arrays.items():
        if name.endswith("#offsets"):
            values = arrays[name.removesuffix("#offsets")]
            if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
                raise UserError(f"{name!r} does not climb from 0 to {len(values)}")
    return lengths


def _check_finite(what: str, trajectory: Trajectory) -> None:
    """NaN and infinity are named: column and decision."""
    columns = {f"observation/{key}": value for key, value in trajectory.observation.items()}
    columns |= {"action": trajectory.action, "reward": trajectory.reward}
    for name, value in columns.items():
        array = value.values if isinstance(value, Ragged) else value
        if isinstance(array, np.ndarray) and array.dtype.kind == "f":
            bad = ~np.isfinite(array).reshape(len(array), -1).all(1)
            if bad.any():
                where = int(np.flatnonzero(bad)[0])
                raise UserError(
                    f"{what} holds NaN or infinity: {name!r} of decision {where} is {array[where].tolist()}"
                )


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
            raise UserError(f"{name!r} has {len(value)} rows, expected {expected} in an episode of {len(trajectory)}")
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
        text = Ragged.of_texts(rows)
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
        return ragged.texts()
    shapes, data = (Ragged(arrays[f"{name}#{part}"], arrays[f"{name}#{part}#offsets"]) for part in ("shapes", "bytes"))
    images = [raw.reshape(shape) for raw, shape in zip(data, shapes, strict=True)]
    return [[images[id] for id in row] for row in ragged]


def _trajectory(columns: dict[str, Any], start: int, stop: int, number: int, scalars: dict[str, Any]) -> Trajectory:
    """Decisions [start, stop) of all; `number` episodes came before, each with one observation more."""

    def section(prefix: str, first: int, last: int) -> dict[str, Any]:
        return {n.removeprefix(prefix): pick(v, slice(first, last)) for n, v in columns.items() if n.startswith(prefix)}

    return Trajectory(
        observation=section("observation/", start + number, stop + number + 1),
        action=pick(columns["action"], slice(start, stop)),
        reward=columns["reward"][start:stop],
        log_prob=pick(columns["log_prob"], slice(start, stop)) if "log_prob" in columns else None,
        trace=section("trace/", start, stop),
        rewards=section("rewards/", start, stop),
        **{**scalars, "source": Source(scalars["source"])},
    )


def _check(what: str, trajectory: Trajectory, schema: Schema) -> None:
    """Observations and actions must fit; traces belong to a policy and are looked at when they are added."""

    def check(name: str, field: Field, values: Any, count: int) -> None:
        try:
            check_column(name, field, values, count)
        except ValueError as error:
            raise UserError(f"{what} does not fit this environment: {error}") from None

    given, expected = set(trajectory.observation), set(schema.observation)
    if given != expected:
        raise UserError(f"{what} has the observations {sorted(given)}, this environment {sorted(expected)}")
    for key, field in schema.observation.items():
        check(f"observation/{key}", field, trajectory.observation[key], len(trajectory) + 1)
    check("action", schema.action, trajectory.action, len(trajectory))
