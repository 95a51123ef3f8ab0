"""Checks at the buffer's door: shapes, dtypes, missing keys, NaN. What passes has the form that the columns store.

Knows fields and values, neither rows nor episodes. Everything is checked before anything is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embodied_rft.buffer.columns import STORED_AS, Schema
from embodied_rft.data import Decisions, Field, Ragged, Tree
from embodied_rft.names import UserError, nearest

FINITE = ("observation", "action", "reward")  # not the trace: it may hold masked logits


def check_decisions(
    schema: Schema, streams: np.ndarray, observation: Tree, decisions: Decisions, reward: ArrayLike | Tree
) -> dict[str, Any]:
    """All columns of N new decisions, in the form that is stored, or ValueError. `reward`: [N], or one a stream."""
    unknown = np.full(len(streams), np.nan, np.float32)
    told = reward if isinstance(reward, Mapping) else {"env": reward}
    log_prob = schema.no_log_prob(len(streams)) if decisions.log_prob is None else decisions.log_prob
    rewards = {name: unknown for name in schema.rewards if name != "env"} | dict(told)
    return {
        **check_tree("observation", observation, schema.observation, streams),
        **check_tree("trace", decisions.trace, schema.trace, streams, partial=True),
        **check_tree("action", {"": decisions.action}, {"": schema.action}, streams),
        **check_tree("reward", rewards, dict.fromkeys(schema.rewards, Field()), streams),
        **check_tree("log_prob", {"": log_prob}, {"": schema.log_prob}, streams),
    }


def per_row(count: int, numbers: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Each as an array: [count], or one number for all. Raises ValueError for other shapes."""
    arrays = {name: np.asarray(value) for name, value in numbers.items()}
    for name, array in arrays.items():
        if array.shape not in ((), (count,)):
            raise UserError(f"{name} has shape {array.shape}, expected one number or {count}, one for each decision")
    return arrays


def check_tree(
    section: str, tree: Tree, fields: Mapping[str, Field], streams: np.ndarray, *, partial: bool = False
) -> dict[str, Any]:
    """The columns "section/key" of one value for each of N streams.

    Args:
        section: observation, trace, action, reward or log_prob.
        tree: what was given, each [N, ...].
        fields: what is expected.
        streams: [N], for the error text.
        partial: whether keys may be missing.

    Raises:
        ValueError: unknown or missing keys, wrong shapes or dtypes, NaN or infinity.
    """
    for key in tree:
        if key not in fields:
            raise UserError(f"{section} {key!r} is not in the buffer's schema; {nearest(key, fields)}")
    missing = [] if partial else [key for key in fields if key not in tree]
    if missing:
        raise UserError(f"{section} {missing[0]!r} is missing; given: {', '.join(tree) or '(none)'}")
    columns = {}
    for key, given in tree.items():
        name, field = f"{section}/{key}", fields[key]
        columns[name] = check_column(name.rstrip("/"), field, given, len(streams))
        if section in FINITE and field.kind != "images":
            known = np.nan_to_num(columns[name], nan=0) if section == "reward" and key != "env" else columns[name]
            check_finite(name.rstrip("/"), known, streams)
    return columns


def check_label(name: str, rows: np.ndarray, values: ArrayLike, capacity: int) -> np.ndarray:
    """What a stream of reward is labelled with [B], for rows [B] of a buffer: numbers, or NaN where it is unknown.

    Raises:
        ValueError: it is the environment's own stream; another shape; a row that does not exist; infinity.
    """
    values = np.asarray(values, np.float32)
    if name == "env":
        raise UserError(
            "the stream 'env' is what the environment paid: label a stream of another name, and let the objective read "
            "it with reward_weights"
        )
    if values.shape != rows.shape or rows.ndim != 1:
        raise UserError(f"labels of {name!r} have shape {values.shape}; expected one number for each of {rows.shape}")
    if len(rows) and not 0 <= rows.min() <= rows.max() < capacity:
        raise UserError(f"rows {rows.min()} to {rows.max()} are labelled; this buffer has rows 0 to {capacity - 1}")
    if np.isinf(values).any():
        raise UserError(f"label {name!r} of row {rows[np.isinf(values)][0]} is infinite; NaN means unknown")
    return values


def check_column(name: str, column: Field, values: Any, count: int) -> Any:
    """Values [count, ...] for a column, in the form that it stores.

    Raises:
        ValueError: the wrong number of rows, shape or dtype, with what was given and what is expected.
    """
    if len(values) != count:
        raise UserError(f"{name!r} has {len(values)} rows, expected {count}: one for each decision")
    if column.kind == "images":
        return _check_images(name, [[image] for image in values] if isinstance(values, np.ndarray) else values)
    if column.kind == "ragged":
        return _check_ragged(name, column, values)
    array = np.asarray(values)
    if array.shape[1:] != column.shape:
        raise UserError(f"{name!r} has shape {array.shape}, expected {(count, *column.shape)}")
    _check_dtype(name, column.dtype, array)
    return array.astype(STORED_AS[column.dtype], copy=False)


def _check_dtype(name: str, dtype: str, array: np.ndarray) -> None:
    if array.size and array.dtype != dtype and not np.can_cast(array.dtype, dtype, "same_kind"):
        raise UserError(f"{name!r} has dtype {array.dtype}, expected {dtype}; convert it before it is stored")


def _check_ragged(name: str, column: Field, values: Any) -> Ragged:
    if isinstance(values, Ragged):
        _check_dtype(name, "uint8" if column.dtype == "str" else column.dtype, values.values)
        if values.values.shape[1:] != column.shape:
            raise UserError(f"{name!r} has rows of shape {values.values.shape[1:]}, expected {column.shape}")
        first, last = values.offsets[[0, -1]]
        if first or last != len(values.values):
            raise UserError(f"{name!r} has offsets from {first} to {last} for {len(values.values)} values")
        return values
    if column.dtype == "str" or any(isinstance(value, str) for value in values):
        strange = [type(value).__name__ for value in values if not isinstance(value, str)]
        if strange:
            raise UserError(f"{name!r} is text: a list of strings is expected, but it holds a {strange[0]}")
        if column.dtype != "str":
            raise UserError(f"{name!r} was given a string, expected rows of {column.dtype}")
        return Ragged.of_texts(values)
    for value in values:
        array = np.asarray(value)
        _check_dtype(name, column.dtype, array)
        if array.size and array.shape[1:] != column.shape:
            raise UserError(f"{name!r} has a row of shape {array.shape}, expected (any length, *{column.shape})")
    return Ragged.of(values, dtype=STORED_AS[column.dtype], shape=column.shape)


def _check_images(name: str, values: Any) -> Any:
    for images in values:
        for image in images:
            if not (isinstance(image, np.ndarray) and image.dtype == np.uint8):
                given = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
                raise UserError(f"{name!r} holds an image of {given}, expected a uint8 array with values in 0..255")
    return values


def check_finite(name: str, values: np.ndarray | Ragged, streams: np.ndarray) -> None:
    """Raise ValueError if any number of [B, ...] is NaN or infinite, naming the first stream [B] with one."""
    array = values.values if isinstance(values, Ragged) else np.asarray(values)
    if array.dtype.kind != "f":
        return
    # The sum of squares is finite only if every number is; where it overflows, each number is looked at.
    if math.isfinite(np.dot(flat := array.ravel(), flat)) or np.isfinite(array).all():
        return
    bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1))[0]
    row = np.searchsorted(values.offsets, bad, side="right") - 1 if isinstance(values, Ragged) else bad
    raise UserError(
        f"{name!r} of stream {int(streams[row])} is not finite (NaN or infinity). Nothing was stored; invalidate() the "
        "stream and start its episode again."
    )
