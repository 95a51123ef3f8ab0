"""2048: slide tiles, equal ones merge (Cirulli 2014; as in G1's VLM-Gym, Chen et al. 2025, arXiv:2505.13426).

After a move that changes the board, a tile appears: 2 with probability 0.9, else 4. Reward "sign" is G1's: 1 if tiles
merged, else -1, invalid moves (nothing changes, no tile appears) included; "score" is the sum of the merged tiles. The
game ends when no move is left, or with the tile `goal`: success.
"""

from __future__ import annotations

import numpy as np

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.game import Dice, Game, Moves, Player, Position, side_of
from embodied_rft.names import UserError, nearest
from embodied_rft.registry import register

KINDS = 18  # empty, 2, 4, ... 131072, as exponents
REWARDS = ("sign", "score")


def slide(boards: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Boards [K, size, size] after sliding up (0), right (1), down (2) or left (3), and what merged [K]."""
    turned = np.rot90(boards, (side + 1) % 4, (1, 2))  # the side is on the left now
    rows = _pack(turned.reshape(-1, turned.shape[2]))
    gained = np.zeros(len(rows), np.int64)
    for i in range(rows.shape[1] - 1):
        same = (rows[:, i] > 0) & (rows[:, i] == rows[:, i + 1])
        rows[:, i] += same
        rows[same, i + 1] = 0
        gained += np.where(same, 1 << rows[:, i], 0)
    moved = _pack(rows).reshape(turned.shape)
    return np.rot90(moved, -(side + 1) % 4, (1, 2)), gained.reshape(len(boards), -1).sum(1)


def _pack(rows: np.ndarray) -> np.ndarray:
    """Rows with their tiles to the left, in order."""
    return np.take_along_axis(rows, np.argsort(rows == 0, axis=1, kind="stable"), 1)


class TwentyFortyEight(Game):
    """Merge tiles until there is one of the goal's number.

    Args:
        size: squares on a side.
        goal: the tile that wins; the larger, the harder.
        reward: "sign" (1 if tiles merged, else -1) or "score" (the sum of the merged tiles).
    """

    words = (("up", "right", "down", "left"),)

    def __init__(self, *, size: int = 4, goal: int = 2048, reward: str = "sign") -> None:
        if not 2 <= size <= 6:
            raise UserError(f"size is {size}; expected 2 to 6 squares on a side")
        if goal not in [2**k for k in range(3, KINDS)]:
            raise UserError(f"goal is {goal}; expected a power of two from 8 to {2 ** (KINDS - 1)}")
        if reward not in REWARDS:
            raise UserError(f"unknown reward {reward!r}; {nearest(reward, REWARDS)}")
        self.size, self.goal, self.reward = size, goal.bit_length() - 1, reward
        self.arrays = {"board": (size, size)}
        self.sizes = [KINDS] * size**2
        self.rules = (
            f"Slide all tiles to one side. Two equal tiles that meet become their sum. Reach {goal}. After each move a "
            "2 or a 4 appears; the game is over when nothing can move."
        )
        self.sprites = np.stack([_tile(kind) for kind in range(KINDS)])

    def deal(self, dice: Dice) -> Position:
        """Two tiles."""
        board = np.zeros((len(dice), self.size, self.size), np.int64)
        for _ in range(2):
            _spawn(board, np.arange(len(dice)), dice)
        return {"board": board}

    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Whether anything moves."""
        return (self._slid(now["board"], actions)[0] != now["board"]).any((1, 2))

    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """Slide, and a new tile."""
        now["board"], gained = self._slid(now["board"], actions)
        _spawn(now["board"], np.flatnonzero(valid), dice)
        board = now["board"]
        won = np.asarray((board >= self.goal).any((1, 2)))
        room = (board == 0).any((1, 2))
        pairs = (board[:, 1:] == board[:, :-1]).any((1, 2)) | (board[:, :, 1:] == board[:, :, :-1]).any((1, 2))
        reward = np.where(gained > 0, 1.0, -1.0) if self.reward == "sign" else gained.astype(float)
        return Moves(reward, won | ~(room | pairs), won)

    @staticmethod
    def _slid(boards: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moved, gained = boards.copy(), np.zeros(len(boards), np.int64)
        for side in range(4):
            mine = np.flatnonzero(actions == side)
            if len(mine):
                moved[mine], gained[mine] = slide(boards[mine], side)
        return moved, gained

    def symbols(self, now: Position) -> np.ndarray:
        """Exponents of the tiles, 0: empty."""
        return now["board"].reshape(len(now["board"]), -1)

    def draw(self, now: Position) -> np.ndarray:
        """The board, 26 pixels a square."""
        return drawing.board(now["board"], self.sprites)

    def tell(self, now: Position) -> str:
        """The board in numbers."""
        return "\n".join(" | ".join(str(2**k) if k else "-" for k in line) for line in now["board"][0])


def _tile(kind: int) -> np.ndarray:
    """A tile [26, 26, 3]: its number, in thousands where it is long, on a colour that darkens."""
    first, last = (np.array(color) for color in ((240, 225, 200), (150, 30, 60)))
    red, green, blue = (first + (last - first) * kind / KINDS).astype(int).tolist() if kind else (204, 193, 178)
    number = 2**kind
    mark = "" if not kind else str(number) if number < 10_000 else f"{number // 1024}K"
    ink = drawing.BLACK if kind < 9 else drawing.WHITE
    return drawing.block(26, (red, green, blue), edge=(186, 172, 160), mark=mark, ink=ink)


def _spawn(board: np.ndarray, rows: np.ndarray, dice: Dice) -> None:
    """A tile on an empty square of each of some boards, changed in place."""
    if len(rows):
        luck = dice.of(rows).uniform(2)
        flat = board.reshape(len(board), -1)
        empty = flat[rows] == 0
        nth = (luck[:, 0] * empty.sum(1)).astype(np.int64)
        place = (empty.cumsum(1) == nth[:, None] + 1).argmax(1)
        flat[rows, place] = np.where(luck[:, 1] < 0.9, 1, 2)


@register("demonstrator", "2048", "embodied_rft/TwentyFortyEight-v0")
class TwentyFortyEightPlayer(Player):
    """Looks two moves ahead: large tiles in a row along the edge, many empty squares.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def play(self, state: np.ndarray) -> np.ndarray:
        """The side whose best answer is worth most, over a few of the tiles that may appear."""
        size = side_of(state)
        boards = state.reshape(-1, size, size).astype(np.int64)
        worth = np.full((len(boards), 4), -np.inf)
        for side in range(4):
            moved, gained = slide(boards, side)
            moves = np.flatnonzero((moved != boards).any((1, 2)))
            if len(moves):
                worth[moves, side] = gained[moves] + self._after(moved[moves])
        return worth.argmax(1)

    def _after(self, boards: np.ndarray) -> np.ndarray:
        """What boards are worth before a tile appears: the mean over empty squares of the best move after a 2 there."""
        count = len(boards)
        board, row, column = np.nonzero(boards == 0)
        spawned = boards[board]
        spawned[np.arange(len(board)), row, column] = 1
        best = np.full(len(board), -1e4)
        for side in range(4):
            moved, gained = slide(spawned, side)
            moves = (moved != spawned).any((1, 2))
            best = np.maximum(best, np.where(moves, gained + self._look(moved), -1e4))
        places = np.bincount(board, minlength=count)  # after a slide there is always one
        return np.bincount(board, weights=best, minlength=count) / places

    @staticmethod
    def _look(boards: np.ndarray) -> np.ndarray:
        """What boards look worth: tiles weighed along a snake from a corner, and empty squares."""
        size = boards.shape[1]
        order = np.arange(size * size).reshape(size, size)
        order[1::2] = order[1::2, ::-1]
        tiles = np.where(boards > 0, 1 << boards, 0).reshape(len(boards), -1)
        turns = [np.rot90(order, k) for k in range(4)] + [np.rot90(order.T, k) for k in range(4)]
        snakes = np.stack([(0.5 ** turn.astype(float)).ravel() for turn in turns], 1)
        largest = tiles.max(1)
        return 2 * (tiles @ snakes).max(1) + 0.1 * largest * (tiles == 0).sum(1)

    def choices(self, state: np.ndarray) -> int:
        """Four sides."""
        return 4
