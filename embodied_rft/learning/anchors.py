"""Which decisions were taken on the same observation: numbers of contents, exact (no digest, no collision).

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from embodied_rft.data import PAST, Ragged
from embodied_rft.names import UserError, nearest

STATE = "state"  # key of an observation: what an environment of many turns says about itself in symbols


def anchors(observation: Mapping[str, Any], keys: Iterable[str] | None = None) -> np.ndarray:
    """[B] int64: equal where the observations are, byte by byte; numbered in order of appearance.

    anchors({"state": [[1, 2], [3, 4], [1, 2]]}) is [0, 1, 0].

    Args:
        observation: columns of B rows: numbers, texts, ragged values, lists of pictures (each looked at once, however
            many rows show it).
        keys: what is compared; None: "state" where there is one, else all but the past.

    Raises:
        ValueError: there is no such key.
    """
    if keys is None:
        keys = [STATE] if STATE in observation else [key for key in observation if key != PAST]
    for key in keys:
        if key not in observation or key == PAST:
            raise UserError(f"there is no observation {key!r} to compare; {nearest(key, set(observation) - {PAST})}")
    columns = [_contents(observation[key]) for key in keys]
    if not columns:
        raise UserError("no observation key was given to compare: name at least one, or leave `keys` out")
    return columns[0] if len(columns) == 1 else number(zip(*(c.tolist() for c in columns), strict=True))


def number(things: Iterable[Hashable]) -> np.ndarray:
    """[B] int64: which of the distinct things each is, in order of appearance."""
    seen: dict[Hashable, int] = {}
    return np.fromiter((seen.setdefault(thing, len(seen)) for thing in things), np.int64)


def _contents(column: Any) -> np.ndarray:
    """[B] numbers of the contents of one column."""
    if isinstance(column, Ragged):
        return number(row.tobytes() for row in column)
    if isinstance(column, (Tensor, np.ndarray)):
        array = column.numpy() if isinstance(column, Tensor) else column
        return number(row.tobytes() for row in array)
    if len(column) and not isinstance(column[0], str):  # pictures: a row refers to any number of them
        distinct = {id(picture): picture for row in column for picture in row}
        numbers = number((p.shape, p.dtype.str, p.tobytes()) for p in distinct.values())
        place = dict(zip(distinct, numbers.tolist(), strict=True))
        return number(tuple(place[id(picture)] for picture in row) for row in column)
    return number(column)
