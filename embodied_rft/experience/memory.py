"""What happened so far in the episodes that run, for policies that read it (`data.Past`).

Knows decisions, no environments. Legend: N environments, K of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied_rft.data import PAST, Decisions, Past, Ragged, Tree, is_picture

Turn = dict[str, Any]  # one decision: a row of each column, by "section/key"


class Memory:
    """The decisions of N running episodes: the same window over them that a buffer reads.

    Args:
        num_envs: N.
    """

    def __init__(self, num_envs: int) -> None:
        self.turns: list[list[Turn]] = [[] for _ in range(num_envs)]

    def add(self, streams: np.ndarray, rows: np.ndarray, observation: Tree, decisions: Decisions) -> None:
        """One decision in each of K environments, at `rows` [K] of trees and decisions."""
        for stream, row in zip(streams.tolist(), rows.tolist(), strict=True):
            turn = {f"observation/{key}": _row(value, row) for key, value in observation.items()}
            turn |= {f"trace/{key}": _row(value, row) for key, value in decisions.trace.items()}
            self.turns[stream].append(turn | {"action/": _row(decisions.action, row)})

    def forget(self, streams: np.ndarray) -> None:
        """New episodes begin in K environments."""
        for row in streams.tolist():
            self.turns[row] = []

    def with_past(self, observation: Tree, rows: np.ndarray) -> Tree:
        """What environments `rows` [K] show, each [K, ...], with what happened before."""
        counts = [len(self.turns[row]) for row in rows.tolist()]
        table = [turn for row in rows.tolist() for turn in self.turns[row]]
        index = Ragged(np.arange(len(table)), np.append(0, np.cumsum(counts)))
        parts: dict[str, dict[str, Any]] = {"observation": {}, "trace": {}, "action": {"": []}}
        for name in table[0] if table else ():
            section, key = name.split("/", 1)
            parts[section][key] = _column([turn[name] for turn in table])
        return {**observation, PAST: Past(index, parts["observation"], parts["action"][""], parts["trace"])}

    def state_dict(self) -> list[list[Turn]]:
        """Everything."""
        return [list(turns) for turns in self.turns]

    def load_state_dict(self, state: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Go on where `state_dict` was taken."""
        self.turns = [[dict(turn) for turn in turns] for turns in state]


def spread(decisions: Decisions, rows: np.ndarray, count: int) -> Decisions:
    """Decisions of K environments as those of all: the others, who do not hear theirs, get a copy."""
    place = np.zeros(count, np.int64)
    place[rows] = np.arange(len(rows))
    return decisions.take(place)


def _row(column: Any, row: int) -> Any:
    """One row, of which `_column` makes a column again."""
    if isinstance(column, Ragged):
        return column.take(np.array([row]))
    return column[row] if isinstance(column, list) else np.array(column[row])


def _column(rows: list[Any]) -> Any:
    """Rows as a buffer gives them: texts, units of any number, pictures (one a row), or an array [D, ...]."""
    first = rows[0]
    if isinstance(first, Ragged):
        return Ragged.of([row.values for row in rows], first.values.dtype, first.values.shape[1:])
    if not isinstance(first, np.ndarray):
        return rows
    return [[picture] for picture in rows] if is_picture(first.shape, first.dtype) else np.stack(rows)
