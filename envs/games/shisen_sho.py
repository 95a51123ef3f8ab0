"""Shisen-Sho: take pairs of equal tiles that a line of at most two turns joins (VLM-Gym, Chen et al. 2025, 2505.13426).

The line crosses no tile and may run around the board. Every kind lies four times on the board. Reward 1 for a pair, -1
for anything else, which is invalid and does nothing. The game ends when the board is empty, success, or when no pair
can be taken; it has as many decisions as tiles. Deals are random, and some cannot be cleared.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.game import Dice, Game, Moves, Planner, Position, side_of
from embodied_rft.names import UserError
from embodied_rft.registry import register

COLORS = {
    "red": (220, 30, 30), "green": (20, 160, 40), "blue": (40, 60, 220),
    "yellow": (220, 190, 0), "magenta": (210, 40, 200), "cyan": (0, 180, 190),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
LOOKS = tuple(itertools.product(COLORS, SHAPES))
MOST_POSITIONS = 300  # that the player looks at before it takes what comes


def joined(board: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether a line of at most two turns joins two squares, [K, P] for squares [K, P] of boards [K, size, size].

    Such a line is across, down, across, or down, across, down; a part may have no length. It is free when it meets as
    many tiles as its own two ends.
    """
    size = board.shape[1]
    tiles = np.pad(board > 0, ((0, 0), (1, 1), (1, 1))).astype(np.int64)
    free = np.zeros(one.shape, bool)
    for across in (tiles, tiles.transpose(0, 2, 1)):
        (r1, c1), (r2, c2) = (np.divmod(square, size) for square in (one, other))
        if across is not tiles:
            r1, c1, r2, c2 = c1, r1, c2, r2
        r1, c1, r2, c2 = r1 + 1, c1 + 1, r2 + 1, c2 + 1
        in_row = np.pad(across.cumsum(2), ((0, 0), (0, 0), (1, 0)))
        in_column = np.pad(across.cumsum(1), ((0, 0), (1, 0), (0, 0)))
        k = np.arange(len(board))[:, None]

        def meets(sums: np.ndarray, line: Any, a: Any, b: Any, *, rows: bool) -> np.ndarray:
            low, high = np.minimum(a, b), np.maximum(a, b) + 1
            return sums[k, line, high] - sums[k, line, low] if rows else sums[k, high, line] - sums[k, low, line]  # noqa: B023

        for turn in range(size + 2):
            met = meets(in_row, r1, c1, turn, rows=True) + meets(in_row, r2, c2, turn, rows=True)
            met += meets(in_column, turn, r1, r2, rows=False)
            ends = 2 + (c1 == turn) + (c2 == turn)
            same_row = r1 == r2
            ends += same_row & (np.minimum(c2, turn) <= c1) & (c1 <= np.maximum(c2, turn))
            ends += same_row & (np.minimum(c1, turn) <= c2) & (c2 <= np.maximum(c1, turn))
            free |= met == ends
    return free


class ShisenSho(Game):
    """Clear the board: take two equal tiles that a line of at most two turns joins.

    Args:
        size: squares on a side, an even number; the larger, the harder.
        colors: how many colours tiles have, up to 6; fewer look more alike.
        shapes: how many figures tiles have, up to 6.
    """

    def __init__(self, *, size: int = 6, colors: int = 6, shapes: int = 6) -> None:
        if size not in (2, 4, 6, 8, 10, 12):
            raise UserError(f"size is {size}; expected an even number from 2 to 12")
        self.looks = np.array([i for i, (c, s) in enumerate(LOOKS) if c in [*COLORS][:colors] and s in SHAPES[:shapes]])
        self.num_kinds = size * size // 4
        if not (1 <= colors <= 6 and 1 <= shapes <= 6) or len(self.looks) < self.num_kinds:
            raise UserError(
                f"{colors} colors and {shapes} shapes (1 to 6 each) make {len(self.looks)} kinds of tile; a board of "
                f"size {size} has {self.num_kinds}"
            )
        self.size, self.limit = size, size * size
        self.arrays = {"board": (size, size), "pairs": (6 * self.num_kinds, 2)}
        self.words = (tuple(map(str, range(size))),) * 4
        self.sizes = [len(LOOKS) + 1] * size**2
        self.rules = (
            "Take two equal tiles (same color, same shape) that a line of at most 2 turns can join without crossing "
            "other tiles; it may run around the board. Answer with row and column of one, then row and column of the "
            "other, counted from 0."
        )
        blank = drawing.block(16, drawing.WHITE, edge=(200, 200, 200))
        self.sprites = np.stack([blank, *(drawing.shape(shape, 16, COLORS[color]) for color, shape in LOOKS)])

    def deal(self, dice: Dice) -> Position:
        """Kinds of tile, and a board of four of each."""
        kinds = self.looks[dice.shuffle(len(self.looks))[:, : self.num_kinds]]  # [K, kinds]
        squares = dice.shuffle(self.size**2).reshape(len(dice), self.num_kinds, 4)
        board = np.zeros((len(dice), self.size**2), np.int64)
        np.put_along_axis(board, squares.reshape(len(dice), -1), np.repeat(kinds + 1, 4, 1), 1)
        pairs = squares[:, :, list(itertools.combinations(range(4), 2))]  # [K, kinds, 6, 2]
        return {"board": board.reshape(-1, self.size, self.size), "pairs": pairs.reshape(len(dice), -1, 2)}

    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Whether two tiles are equal and joined."""
        one, other = (actions[:, :2] @ [self.size, 1])[:, None], (actions[:, 2:] @ [self.size, 1])[:, None]
        flat = now["board"].reshape(len(actions), self.size**2)
        first, second = np.take_along_axis(flat, one, 1), np.take_along_axis(flat, other, 1)
        equal = ((first == second) & (first > 0) & (one != other))[:, 0]
        equal[equal] = joined(now["board"][equal], one[equal], other[equal])[:, 0]
        return equal

    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """Take the pair."""
        taken, board = np.flatnonzero(valid), now["board"]
        for row, column in (actions[taken, :2].T, actions[taken, 2:].T):
            board[taken, row, column] = 0
        cleared = (board == 0).all((1, 2))
        over = np.zeros(len(actions), bool)  # a board that has not changed has a move
        over[taken] = ~self._open(board[taken], now["pairs"][taken]).any(1)
        return Moves(np.where(valid, 1.0, -1.0), over, cleared)

    @staticmethod
    def _open(board: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Which pairs [K, P, 2] of squares can be taken, [K, P]."""
        one, other = pairs[..., 0], pairs[..., 1]
        flat = board.reshape(len(board), board.shape[1] ** 2)
        both = (np.take_along_axis(flat, one, 1) > 0) & (np.take_along_axis(flat, other, 1) > 0)
        return both & joined(board, one, other)

    def symbols(self, now: Position) -> np.ndarray:
        """What lies on the squares: 0 nothing, else a kind of tile."""
        return now["board"].reshape(len(now["board"]), -1)

    def draw(self, now: Position) -> np.ndarray:
        """The board, 16 pixels a square."""
        return drawing.board(now["board"], self.sprites)

    def tell(self, now: Position) -> str:
        """The board in words."""
        names = ["empty", *(f"{color} {shape}" for color, shape in LOOKS)]
        return "\n".join(" | ".join(names[kind] for kind in line) for line in now["board"][0])


@register("demonstrator", "shisen_sho", "embodied_rft/ShisenSho-v0")
class ShisenShoPlayer(Planner):
    """Searches for an order that clears the board, and remembers it; finds it none, it takes what comes first.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def play(self, state: np.ndarray) -> np.ndarray:
        """Two squares [N, 4]."""
        return np.stack(np.divmod(self.planned(state), side_of(state)), -1).reshape(len(state), 4)

    def plan(self, position: np.ndarray) -> None:
        """Depth first; the way to the end, or to the deepest board that was seen, is remembered."""
        looked, dead = 0, set[bytes]()
        way: list[tuple[np.ndarray, list[tuple[int, int]]]] = [(position, _takes(position))]
        best = [(position, (0, 0))]
        while way:
            here, left = way[-1]
            steps = [(before, taken[0]) for before, taken in way if taken]
            if len(steps) > len(best) or not best[0][1][1]:
                best = steps or best
            if not here.any() or looked > MOST_POSITIONS:
                break
            if not left:
                dead.add(here.tobytes())
                way.pop()
                if way:
                    way[-1][1].pop(0)
                continue
            after = here.copy()
            after[[*left[0]]] = 0
            if after.tobytes() in dead:
                left.pop(0)
                continue
            looked += 1
            way.append((after, _takes(after)))
        for before, pair in best:
            self.plans.setdefault(before.tobytes(), pair)

    def choices(self, state: np.ndarray) -> int:
        """Rows, and columns."""
        return side_of(state)


def _takes(board: np.ndarray) -> list[tuple[int, int]]:
    """All pairs of squares of one board [size * size] that can be taken."""
    size = side_of(board[None])
    equal = np.triu((board[:, None] == board) & (board > 0), 1)
    one, other = np.nonzero(equal)
    free = joined(board.reshape(1, size, size), one[None], other[None])[0]
    return list(zip(one[free].tolist(), other[free].tolist()))
