"""Token sequences as a tree of shared prefixes: what has to be computed once, and in which passes of a decoder.

Rows that begin alike share those tokens: the prompt of a group, a system message, the earlier turns of an episode (one
turn's prompt and reply begin the next turn's prompt, so a whole episode is a single path). Pure integer arithmetic;
nothing here touches a model.
Legend: B rows, n nodes, P prompt tokens, C reply tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from embodied_rft.data import Ragged

OVERHEAD = 24.0  # what a further call of a decoder costs, in tokens
WORTHWHILE = 0.02  # a level of the tree that saves a smaller share of the tokens is not worth its passes


@dataclass(frozen=True, slots=True)
class Tree:
    """Every distinct token after its context belongs to one node; parents come before their children.

    Of the rows [7, 8, 1], [7, 8, 2] and [7, 8]: node 0 is [7, 8], its children are [1] and [2], and last is [1, 2, 0].
    """

    row: np.ndarray  # [n] a sequence that runs through the node
    start: np.ndarray  # [n] the node's tokens are its row's from `start`
    end: np.ndarray  # [n] up to here
    parent: np.ndarray  # [n], -1: none
    last: np.ndarray  # [B] the node in which each row ends
    distinct: int  # tokens that differ in themselves or their context: what must be computed at least

    @property
    def lengths(self) -> np.ndarray:
        """[n] tokens of each node."""
        lengths: np.ndarray = self.end - self.start
        return lengths

    @property
    def branches(self) -> np.ndarray:
        """[n] bool: whether other nodes continue it."""
        return np.isin(np.arange(len(self.row)), self.parent)

    def tokens(self, sequences: Ragged, nodes: np.ndarray) -> Ragged:
        """The tokens of some nodes."""
        rows = [sequences.row(self.row[node])[self.start[node] : self.end[node]] for node in nodes]
        return Ragged.of(rows, dtype=sequences.values.dtype)


@dataclass(slots=True)
class Usage:
    """Tokens that a decoder had to compute at least, and those that it was given: the rest is padding and repeats."""

    useful: int = 0
    computed: int = 0


@dataclass(frozen=True, slots=True)
class Pass:
    """Nodes that a decoder computes together, padded to the longest."""

    nodes: np.ndarray
    after: int | None  # the pass whose keys and values these nodes continue; None: they begin their texts
    branches: bool  # whether other passes continue this one


def in_order(sequences: Ragged) -> np.ndarray:
    """[B] row numbers sorted by their tokens: those that begin alike are neighbours."""
    keys = [row.tobytes() for row in sequences]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def shared_with_previous(sequences: Ragged, order: np.ndarray) -> np.ndarray:
    """[B] how many first tokens each row shares with the one before it.

    Of the rows [5, 6], [5, 7], [4] in the order [2, 0, 1]: [0, 0, 1].
    """
    common = np.zeros(len(order), dtype=np.int64)
    for place, (one, other) in enumerate(itertools.pairwise(sequences.take(order)), start=1):
        count = min(len(one), len(other))
        differ = np.flatnonzero(one[:count] != other[:count])
        common[place] = differ[0] if len(differ) else count
    return common


def computed(prompts: Ragged, replies: Ragged) -> Ragged:
    """What a decoder must read to predict every reply token: prompt and reply without its last token."""
    rows = [np.concatenate([p, r[:-1]]) for p, r in zip(prompts, replies, strict=True)]
    return Ragged.of(rows, dtype=prompts.values.dtype)


def prefix_tree(sequences: Ragged, *, share: bool = True, overhead: float = OVERHEAD) -> Tree:
    """The tree of some rows, without the branchings that would cost more than they save.

    Args:
        sequences: B rows, none empty.
        share: False makes every row a tree of its own.
        overhead: cost of a further call of the decoder, in tokens; 0 keeps nearly every branching.
    """
    if not share:
        own = np.arange(len(sequences))
        return Tree(own, np.zeros_like(own), sequences.lengths, np.full_like(own, -1), own, _distinct(sequences))
    return _pruned(_full_tree(sequences), overhead)


def prompt_tree(prompts: Ragged, sequences: Ragged, *, share: bool = True) -> Tree:
    """A tree of two levels, for decoders that look ahead in a prompt: prompts, and what continues each.

    Args:
        prompts: [B] rows, none empty.
        sequences: [B] the same rows, which go on.
        share: whether equal prompts are one node.
    """
    rows = np.arange(len(prompts))
    first, kind = distinct_rows(prompts) if share else (rows, rows)
    length, roots = prompts.lengths, len(first)
    longer = np.flatnonzero(sequences.lengths > length)
    last = kind.copy()
    last[longer] = roots + np.arange(len(longer))
    start = np.append(np.zeros(roots, np.int64), length[longer])
    parent = np.append(np.full(roots, -1), kind[longer])
    end = np.append(length[first], sequences.lengths[longer])
    return Tree(np.append(first, longer), start, end, parent, last, int((end - start).sum()))


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


def _full_tree(sequences: Ragged) -> Tree:
    """With every branching."""
    order = in_order(sequences)
    common = shared_with_previous(sequences, order)
    lengths = sequences.lengths[order]
    nodes: list[tuple[int, int, int, int]] = []  # row, start, end, parent
    last = np.zeros(len(order), dtype=np.int64)
    work = [(0, len(order), 0, -1)] if len(order) else []
    while work:
        low, high, start, parent = work.pop()
        ended: list[int] = []  # places of rows that end in this node
        while True:  # until the texts part; a row may end before that
            depth = int(common[low + 1 : high].min(initial=lengths[low]))
            bounds = [low, *(low + 1 + np.flatnonzero(common[low + 1 : high] == depth)), high]
            ended += [a for a in bounds[:-1] if lengths[a] == depth]
            parts = [(int(a), int(b)) for a, b in itertools.pairwise(bounds) if lengths[a] > depth]
            if len(parts) != 1:
                break
            low, high = parts[0]
        number = len(nodes) if depth > start else -1  # texts that begin differently have no common root
        if depth > start:
            nodes.append((int(order[low]), start, depth, parent))
            last[order[ended]] = number
        work += [(a, b, depth, number) for a, b in reversed(parts)]
    table = np.array(nodes, dtype=np.int64).reshape(-1, 4)
    return Tree(table[:, 0], table[:, 1], table[:, 2], table[:, 3], last, int((table[:, 2] - table[:, 1]).sum()))


def _pruned(tree: Tree, overhead: float) -> Tree:
    """Without branchings, or whole levels of them, that save too little: their tokens go to the children."""
    start, parent, last = tree.start.copy(), tree.parent.copy(), tree.last.copy()
    gone, everything = -2, np.arange(len(start))
    at_least = max(2 * overhead, WORTHWHILE * tree.lengths.sum()) if overhead else 0  # saved by a whole level
    level = np.flatnonzero(parent == -1)
    while len(inner := level[np.isin(level, parent)]):
        children = np.bincount(parent[parent >= 0], minlength=len(start))
        saved = (children[inner] - 1) * (tree.end[inner] - start[inner])
        poor = inner[saved < (overhead / 2 if saved.sum() > at_least else np.inf)]
        if not len(poor):
            level = everything[np.isin(parent, inner)]
            continue
        level = np.setdiff1d(level, poor)
        for node in poor:
            heirs = everything[parent == node]
            start[heirs], parent[heirs] = start[node], parent[node]
            last[last == node] = heirs[0]
            parent[node], level = gone, np.append(level, heirs)
    kept = everything[parent != gone]
    number = np.full(len(start) + 1, -1)  # one more, for the parent -1
    number[kept] = np.arange(len(kept))
    return Tree(tree.row[kept], start[kept], tree.end[kept], number[parent[kept]], number[last], tree.distinct)


def passes(tree: Tree, *, overhead: float = OVERHEAD) -> list[Pass]:
    """In which order and company a decoder computes the nodes; those of similar length are together."""
    found: list[Pass] = []
    branches = tree.branches
    work: list[tuple[np.ndarray, int | None]] = [(np.flatnonzero(tree.parent == -1), None)]
    while work:
        nodes, after = work.pop()
        for inner in (False, True):
            chosen = nodes[branches[nodes] == inner]
            for part in buckets(tree.lengths[chosen], overhead=overhead):
                members = np.sort(chosen[part])
                members = members[np.argsort(tree.parent[members], kind="stable")]  # children of one node in a row
                found.append(Pass(members, after, inner))
                if inner:
                    work.append((np.flatnonzero(np.isin(tree.parent, members)), len(found) - 1))
    return found


def buckets(lengths: np.ndarray, *, overhead: float = OVERHEAD) -> list[np.ndarray]:
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


def padded_tokens(tree: Tree, plan: list[Pass]) -> int:
    """Tokens that a decoder is given, padding included."""
    return sum(len(one.nodes) * int(tree.lengths[one.nodes].max()) for one in plan)


def count_tokens(prompts: Ragged, replies: Ragged, *, share: bool = True, overhead: float = OVERHEAD) -> Usage:
    """What scoring these replies costs."""
    answered = np.flatnonzero(replies.lengths > 0)
    tree = prefix_tree(computed(prompts.take(answered), replies.take(answered)), share=share, overhead=overhead)
    return Usage(tree.distinct, padded_tokens(tree, passes(tree, overhead=overhead)))


def _distinct(sequences: Ragged) -> int:
    return int(sequences.lengths.sum() - shared_with_previous(sequences, in_order(sequences)).sum())


@dataclass(frozen=True, slots=True)
class Spans:
    """Tokens of nodes that are asked for: `count` of them from `low` on, for the places `place`, place + 1, ..."""

    node: np.ndarray  # [spans]
    low: np.ndarray  # [spans] from the node's first token
    count: np.ndarray  # [spans]
    place: np.ndarray  # [spans]

    def inside(self, nodes: np.ndarray, width: int, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index, place): where in a flattened table [nodes, width] the tokens are whose states belong at `place`.

        Args:
            nodes: of a pass, [M].
            width: of the table.
            begin: [M] the column of each node's first token.
        """
        row = np.full(int(max(nodes.max(), self.node.max())) + 1, -1)
        row[nodes] = np.arange(len(nodes))
        chosen = np.flatnonzero(row[self.node] >= 0)
        at, count = row[self.node[chosen]], self.count[chosen]
        step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        index = np.repeat(at * width + begin[at] + self.low[chosen], count) + step
        return index, np.repeat(self.place[chosen], count) + step


def spans_of(tree: Tree, first: np.ndarray, count: np.ndarray, place: np.ndarray) -> Spans:
    """Where in the tree the tokens first ... first + count - 1 of every row are; all arguments [B]."""
    found: list[tuple[np.ndarray, ...]] = []
    node, rows = tree.last, np.arange(len(first))
    while len(rows):
        low = np.maximum(tree.start[node], first[rows])
        high = np.minimum(tree.end[node], first[rows] + count[rows])
        some = high > low
        found.append((node, low - tree.start[node], high - low, place[rows] + low - first[rows]))
        found[-1] = tuple(part[some] for part in found[-1])
        above = tree.parent[node] >= 0
        node, rows = tree.parent[node][above], rows[above]
    return Spans(*(np.concatenate(part) for part in zip(*found, strict=True)))
