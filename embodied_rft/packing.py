"""Which ragged rows to compute together: micro-batches by cost, and buckets of similar length inside them.

Pure integer arithmetic on lengths; nothing here touches a model. Rows that share a prompt (the members of a group) stay
together, because their prompt is computed once.
Legend: B rows, P prompt tokens, C reply tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embodied_rft.data import Batch, Ragged


@dataclass(frozen=True, slots=True)
class Cost:
    """What a row costs, in units of one token through the linear layers.

    A 0.5B decoder of width 896 spends as much on attention as on its linear layers at about 6 * 896 tokens of context:
    Cost(quadratic=1 / (6 * 896)). An image of 256 patches: Cost(patch=0.6) when its tower has 0.6 of the decoder's
    size.
    """

    quadratic: float = 1 / 5376  # of a pair of tokens that attend to each other
    patch: float = 1.0  # of an image patch, encoded once for a prompt

    @classmethod
    def of_width(cls, hidden_size: int, *, patch: float = 1.0) -> Cost:
        """For a decoder of this width (24 h^2 linear and 4 h L attention operations a token and layer)."""
        return cls(quadratic=1 / (6 * hidden_size), patch=patch)

    def prompt(self, tokens: np.ndarray, patches: np.ndarray | float = 0.0) -> np.ndarray:
        """Cost of prompts of these lengths, alone."""
        tokens = np.asarray(tokens, dtype=np.float64)
        return tokens + self.quadratic * tokens**2 / 2 + self.patch * np.asarray(patches)

    def reply(self, prompt: np.ndarray, reply: np.ndarray) -> np.ndarray:
        """Cost of replies after prompts that are already there."""
        prompt, reply = np.asarray(prompt, dtype=np.float64), np.asarray(reply, dtype=np.float64)
        return reply + self.quadratic * reply * (prompt + reply / 2)


def distinct_rows(ragged: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Rows with equal content: (a row of each kind [D], the kind of every row [B]), kinds in order of appearance.

    distinct_rows(Ragged.of([[7, 8], [9], [7, 8]])) is ([0, 1], [0, 1, 0]).
    """
    known: dict[bytes, int] = {}
    first: list[int] = []
    kind = np.empty(len(ragged), dtype=np.int64)
    for index in range(len(ragged)):
        number = known.setdefault(ragged.row(index).tobytes(), len(known))
        if number == len(first):
            first.append(index)
        kind[index] = number
    return np.array(first, dtype=np.int64), kind


def plan_micro_batches(
    prompt_lengths: np.ndarray,
    reply_lengths: np.ndarray,
    group: np.ndarray,
    *,
    budget: float,
    cost: Cost | None = None,
    patches: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Micro-batches of at most `budget` cost: arrays of row numbers that together are a permutation of all rows.

    Groups are placed first-fit in the order of falling cost (Johnson 1973: at most 11/9 of the best number of bins). A
    group that alone exceeds the budget is cut between members, and pays its prompt once a piece; a single row that
    exceeds it gets a micro-batch of its own.

    Args:
        prompt_lengths: [B] tokens, equal within a group.
        reply_lengths: [B] tokens.
        group: [B] integers; rows of one number share their prompt.
        budget: largest cost of a micro-batch, about its number of tokens.
        cost: what tokens cost; default `Cost()`.
        patches: [B] image patches of the prompt.
    """
    if budget <= 0:
        raise ValueError(f"budget is {budget}; expected the number of tokens that fit into one micro-batch, e.g. 8192")
    cost = cost or Cost()
    prompt = cost.prompt(prompt_lengths, 0.0 if patches is None else patches)
    reply = cost.reply(prompt_lengths, reply_lengths)
    pieces: list[tuple[float, np.ndarray]] = []
    for members in _members(np.asarray(group)):
        members = members[np.argsort(-reply[members], kind="stable")]  # similar lengths side by side
        piece: list[int] = []
        used = float(prompt[members[0]])
        for row in members:
            if piece and used + reply[row] > budget:
                pieces.append((used, np.array(piece)))
                piece, used = [], float(prompt[row])
            piece.append(int(row))
            used += float(reply[row])
        pieces.append((used, np.array(piece)))
    pieces.sort(key=lambda item: -item[0])
    bins: list[tuple[float, list[np.ndarray]]] = []
    for used, rows in pieces:
        for index, (filled, content) in enumerate(bins):
            if filled + used <= budget:
                bins[index] = (filled + used, [*content, rows])
                break
        else:
            bins.append((used, [rows]))
    return [np.concatenate(content) for _, content in bins]


def _members(group: np.ndarray) -> list[np.ndarray]:
    """Row numbers of every group."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else []


def split_by_cost(batch: Batch, *, budget: float, cost: Cost | None = None) -> list[Batch]:
    """Micro-batches of a batch with "prompt" and "reply" in its trace; their losses add up to that of the whole."""
    prompt, reply = batch.trace["prompt"], batch.trace["reply"]
    _, kind = distinct_rows(prompt)
    plan = plan_micro_batches(prompt.lengths, reply.lengths, kind, budget=budget, cost=cost)
    return [batch.take(rows) for rows in plan]


def buckets(lengths: np.ndarray, *, overhead: float = 24.0) -> list[np.ndarray]:
    """Rows to pad to one length: the partition that minimises padded tokens plus `overhead` tokens a bucket.

    Exact, by dynamic programming over the sorted distinct lengths.

    Args:
        lengths: [B] tokens.
        overhead: what a further call of the model costs, in tokens.

    Returns:
        Arrays of row numbers, from short to long; together a permutation of all rows.
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return []
    order = np.argsort(lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])  # rows shorter than the i-th distinct length
    best = np.zeros(len(values) + 1)
    start = np.zeros(len(values) + 1, dtype=np.int64)
    for end in range(1, len(values) + 1):
        total = best[:end] + (before[end] - before[:end]) * values[end - 1] + overhead
        start[end] = int(np.argmin(total))
        best[end] = total[start[end]]
    parts, end = [], len(values)
    while end > 0:
        parts.append(order[before[start[end]] : before[end]])
        end = int(start[end])
    return parts[::-1]


def padded_tokens(lengths: np.ndarray, parts: list[np.ndarray]) -> int:
    """Tokens that are computed when each bucket is padded to its longest row."""
    return int(sum(len(rows) * int(lengths[rows].max()) for rows in parts))
