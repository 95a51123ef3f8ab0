"""Swap: exchange neighbours so that three or more of a kind stand in a line (VLM-Gym, Chen et al. 2025, 2505.13426).

What stands in a line is taken, tiles fall, new ones come from above, until nothing stands in a line. n tiles taken at
once score n * (n - 1). Reward "sign" is G1's: 1 for a valid swap, else -1; "score" gives the score, and -1. A swap of
what are no neighbours, or that makes no line, is invalid and does nothing. A board without a valid swap is dealt anew.
A game has `moves` decisions and ends with success when the score reaches `goal`.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.game import Dice, Game, Moves, Player, Position, side_of
from embodied_rft.envs.games.shisen_sho import COLORS
from embodied_rft.names import UserError, nearest
from embodied_rft.registry import register

SHAPES = ("circle", "square", "triangle")
LOOKS = tuple((color, shape) for shape in SHAPES for color in [*COLORS][:4])
REWARDS = ("sign", "score")


def lines(board: np.ndarray) -> np.ndarray:
    """Which tiles of boards [..., size, size] stand in a line of three or more of a kind."""
    found = np.zeros(board.shape, bool)
    for tiles, marks in ((board, found), (np.swapaxes(board, -1, -2), np.swapaxes(found, -1, -2))):
        three = (tiles[..., :-2] == tiles[..., 1:-1]) & (tiles[..., 1:-1] == tiles[..., 2:])
        for i in range(3):
            marks[..., i : i + three.shape[-1]] |= three
    return found


@cache
def swaps(size: int) -> tuple[np.ndarray, np.ndarray]:
    """All swaps of neighbours: two squares each [M, 2], and the board's squares after it [M, size * size]."""
    squares = np.arange(size * size).reshape(size, size)
    across = np.stack([squares[:, :-1], squares[:, 1:]], -1).reshape(-1, 2)
    down = np.stack([squares[:-1], squares[1:]], -1).reshape(-1, 2)
    pairs = np.concatenate([across, down])
    after = np.tile(squares.ravel(), (len(pairs), 1))
    np.put_along_axis(after, pairs, pairs[:, ::-1], 1)
    return pairs, after


def gains(board: np.ndarray) -> np.ndarray:
    """How many tiles each swap of neighbours takes at once, [K, M] for boards [K, size, size]."""
    size = board.shape[1]
    after = board.reshape(len(board), -1)[:, swaps(size)[1]].reshape(len(board), -1, size, size)
    return lines(after).sum((2, 3))


class Swap(Game):
    """Exchange two neighbouring tiles so that three or more of a kind stand in a line.

    Args:
        size: squares on a side.
        kinds: kinds of tile, 3 to 12; more are harder.
        moves: decisions of a game.
        goal: the score that wins; a line of three is 6. The larger, the harder.
        reward: "sign" (1 for a valid swap, else -1) or "score" (what it scores, else -1).
    """

    def __init__(
        self, *, size: int = 8, kinds: int = 12, moves: int = 20, goal: int = 60, reward: str = "sign"
    ) -> None:
        if not 4 <= size <= 12 or not 3 <= kinds <= len(LOOKS):
            raise UserError(f"size is {size} and kinds {kinds}; expected 4 to 12, and 3 to {len(LOOKS)}")
        if moves < 1 or not 1 <= goal <= 1000:
            raise UserError(f"moves is {moves} and goal {goal}; expected at least 1, and 1 to 1000")
        if reward not in REWARDS:
            raise UserError(f"unknown reward {reward!r}; {nearest(reward, REWARDS)}")
        self.size, self.kinds, self.limit, self.goal, self.reward = size, kinds, moves, goal, reward
        self.arrays = {"board": (size, size), "score": ()}
        self.words = (tuple(map(str, range(size))),) * 4
        self.sizes = [*[len(LOOKS)] * size**2, goal + 1]
        self.rules = (
            "Exchange two neighbouring tiles so that 3 or more of the same color and shape stand in a line; they are "
            f"taken, tiles fall and new ones come. Score {goal} points. Answer with row and column of one, then row "
            "and column of the other, counted from 0."
        )
        self.sprites = np.stack([drawing.shape(shape, 14, COLORS[color]) for color, shape in LOOKS])
        self.scores = drawing.labels([f"{score}:{goal}" for score in range(goal + 1)])
        self.background = drawing.canvas(1, 14 * size + 11, max(14 * size, self.scores.shape[2]))

    def deal(self, dice: Dice) -> Position:
        """Boards without a line, on which one can be made."""
        board, missing = np.zeros((len(dice), self.size, self.size), np.int64), np.arange(len(dice))
        while len(missing):
            drawn = dice.of(missing).roll(self.kinds, self.size**2).reshape(-1, self.size, self.size)
            while len(bad := np.flatnonzero((standing := lines(drawn)).any((1, 2)))):
                new = dice.of(missing[bad]).roll(self.kinds, self.size**2).reshape(-1, self.size, self.size)
                drawn[bad] = np.where(standing[bad], new, drawn[bad])
            board[missing] = drawn
            missing = missing[~(gains(drawn) > 0).any(1)]
        return {"board": board, "score": np.zeros(len(dice), np.int64)}

    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Whether two tiles are neighbours and their swap makes a line."""
        neighbours = np.abs(actions[:, :2] - actions[:, 2:]).sum(1) == 1
        return neighbours & lines(self._swapped(now["board"], actions)).any((1, 2))

    @staticmethod
    def _swapped(board: np.ndarray, actions: np.ndarray) -> np.ndarray:
        after, every = board.copy(), np.arange(len(board))
        r1, c1, r2, c2 = actions.T
        after[every, r1, c1], after[every, r2, c2] = board[every, r2, c2], board[every, r1, c1]
        return after

    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """Swap, take, fall, and so on until all stand still."""
        moved = np.flatnonzero(valid)
        board, score = self._swapped(now["board"][moved], actions[moved]), np.zeros(len(valid), np.int64)
        while len(rows := np.flatnonzero((standing := lines(board)).any((1, 2)))):
            taken = standing[rows].sum((1, 2))
            score[moved[rows]] += taken * (taken - 1)
            board[rows] = self._fall(board[rows], standing[rows], dice.of(moved[rows]))
        stuck = np.flatnonzero(~(gains(board) > 0).any(1)) if len(moved) else moved
        if len(stuck):
            board[stuck] = self.deal(dice.of(moved[stuck]))["board"]
        now["board"][moved] = board
        now["score"] = np.minimum(now["score"] + score, self.goal)
        won = now["score"] >= self.goal
        reward = np.where(valid, 1.0 if self.reward == "sign" else score, -1.0)
        return Moves(reward, won, won)

    def _fall(self, board: np.ndarray, taken: np.ndarray, dice: Dice) -> np.ndarray:
        """What is left falls down in its column, new tiles fill the top."""
        order = np.argsort(~taken, axis=1, kind="stable")  # holes first
        fallen, holes = np.take_along_axis(board, order, 1), np.take_along_axis(taken, order, 1)
        return np.where(holes, dice.roll(self.kinds, self.size**2).reshape(board.shape), fallen)

    def symbols(self, now: Position) -> np.ndarray:
        """The kinds of the tiles, and the score."""
        return np.concatenate([now["board"].reshape(len(now["board"]), -1), now["score"][:, None]], 1)

    def draw(self, now: Position) -> np.ndarray:
        """The board, 14 pixels a square, and the score below."""
        side = 14 * self.size
        pictures = self.background.repeat(len(now["board"]), 0)
        drawing.put(pictures, drawing.board(now["board"], self.sprites), 0, 0)
        drawing.put(pictures, self.scores[now["score"]], side + 2, 0)
        return pictures

    def tell(self, now: Position) -> str:
        """The board in words."""
        names = [f"{color} {shape}" for color, shape in LOOKS]
        board = "\n".join(" | ".join(names[kind] for kind in line) for line in now["board"][0])
        return f"{board}\nScore: {now['score'][0]} of {self.goal}"


@register("demonstrator", "swap", "embodied_rft/Swap-v0")
class SwapPlayer(Player):
    """Makes the swap that takes most tiles at once.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def play(self, state: np.ndarray) -> np.ndarray:
        """Two squares [N, 4]."""
        size = self.choices(state)
        pairs = swaps(size)[0][gains(state[:, :-1].reshape(-1, size, size)).argmax(1)]
        return np.stack(np.divmod(pairs, size), -1).reshape(len(state), 4)

    def choices(self, state: np.ndarray) -> int:
        """Rows, and columns."""
        return side_of(state[:, :-1])
