"""Micro-batches by cost: which decisions of a batch share a backward pass.

Pure integer arithmetic; nothing here touches a model. Rows that begin alike (the members of a group, the turns of an
episode) stay together where they can, because what they share is computed once (`prefix_tree`).
Legend: B rows, P prompt tokens, C reply tokens.
"""

from __future__ import annotations

import numpy as np

from embodied_rft.data import Ragged
from embodied_rft.names import UserError
from embodied_rft.tokens.prefix_tree import computed, count_tokens, in_order, shared_with_previous

PASS = 256.0  # what a further micro-batch costs, in tokens


def plan_micro_batches(
    prompts: Ragged,
    replies: Ragged,
    *,
    budget: float,
    atoms: np.ndarray | None = None,
    share: bool = True,
) -> list[np.ndarray]:
    """Micro-batches of at most `budget` cost: sorted arrays of row numbers, together a permutation of all rows.

    Rows are laid side by side in the order of their tokens, so that those that begin alike are neighbours, and cut
    where that costs least: shared beginnings are computed anew behind a cut, and every micro-batch costs `PASS`. The
    best cuts are found exactly, by dynamic programming. What alone exceeds the budget gets a micro-batch of its own.

    Args:
        prompts: B rows of token ids.
        replies: B rows of token ids.
        budget: largest cost of a micro-batch: its number of tokens.
        atoms: [B] rows of one number are never separated (the two sides of a pair).
        share: whether shared beginnings will be computed once.
    """
    if budget < 1:
        raise UserError(f"budget is {budget}; expected the number of tokens that fit into one micro-batch, e.g. 8192")
    if not len(prompts):
        return []
    sequences = computed(prompts, replies)
    order, whose = in_order(sequences), np.arange(len(prompts)) if atoms is None else np.asarray(atoms)
    if atoms is not None:
        rank, kind = np.argsort(order), np.unique(whose, return_inverse=True)[1]
        leader = np.full(len(order), len(order))
        np.minimum.at(leader, kind, rank)
        order = np.lexsort((rank, leader[kind]))
    common = shared_with_previous(sequences, order) if share else np.zeros_like(order)
    whole, shared = sequences.lengths[order].astype(np.float64), common.astype(np.float64)
    new_atom = np.append(True, np.diff(whose[order]) != 0)
    return [np.sort(order[a:b]) for a, b in _cuts(whole, shared, np.flatnonzero(new_atom), budget)]


def _cuts(whole: np.ndarray, shared: np.ndarray, starts: np.ndarray, budget: float) -> list[tuple[int, int]]:
    """The cheapest partition of neighbours into intervals (from, to) that cost at most `budget`.

    Args:
        whole: [B] cost of each row alone.
        shared: [B] what it saves behind the one before it.
        starts: where an interval may begin.
        budget: kept, but by intervals that cannot be cut.
    """
    paid = np.append(0.0, np.cumsum(whole - shared))  # by the rows before
    ends = np.append(starts[1:], len(whole))
    best = np.zeros(len(starts) + 1)
    chosen = np.zeros(len(starts) + 1, dtype=np.int64)
    for number, end in enumerate(ends.tolist(), start=1):
        first = starts[:number]
        price = best[:number] + shared[first] + PASS
        price[:-1][(shared[first] + paid[end] - paid[first])[:-1] > budget] = np.inf
        chosen[number] = int(np.argmin(price))
        best[number] = price[chosen[number]]
    found, end = [], len(starts)
    while end > 0:
        found.append((int(starts[chosen[end]]), int(ends[end - 1])))
        end = int(chosen[end])
    return found[::-1]


def plan_within(
    prompts: Ragged, replies: Ragged, *, most: int, share: bool = True, atoms: np.ndarray | None = None
) -> list[np.ndarray]:
    """Micro-batches that send at most `most` tokens through a decoder, padding included: arrays of row numbers.

    What cannot be cut (a row, an atom) and alone exceeds it is computed alone. Other arguments as in
    `plan_micro_batches`; `share`: whether shared beginnings will be computed once.
    """
    target = float(most)
    while True:  # padding is known only when the rows of a micro-batch are: aim lower until it fits
        plan = plan_micro_batches(prompts, replies, budget=target, atoms=atoms, share=share)
        sizes = [count_tokens(prompts.take(rows), replies.take(rows), share=share).computed for rows in plan]
        cuttable = [len(rows if atoms is None else np.unique(atoms[rows])) > 1 for rows in plan]
        largest = max((size for size, cut in zip(sizes, cuttable, strict=True) if cut), default=0)
        if largest <= most or target == 1:
            return plan
        target = max(1.0, target * min(0.97, most / largest))


def plan_units(lengths: np.ndarray, *, most: int, atoms: np.ndarray | None = None) -> list[np.ndarray]:
    """The same for rows that share nothing, padded to the longest of their micro-batch: similar lengths together."""
    lengths = np.asarray(lengths)
    kind = np.arange(len(lengths)) if atoms is None else np.unique(atoms, return_inverse=True)[1]
    longest = np.zeros(len(lengths), dtype=np.int64)
    np.maximum.at(longest, kind, lengths)
    plan: list[np.ndarray] = []
    part: list[int] = []
    order = np.lexsort((kind, longest[kind]))
    for rows in np.split(order, np.flatnonzero(np.diff(kind[order])) + 1):
        if part and (len(part) + len(rows)) * longest[kind[rows[0]]] > most:
            plan.append(np.sort(part))
            part = []
        part += rows.tolist()
    return [*plan, np.sort(part)] if part else plan
