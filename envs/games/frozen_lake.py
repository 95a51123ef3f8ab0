"""FrozenLake: cross a lake without falling into a hole (Towers et al. 2024, Gymnasium; as in VAGEN, arXiv:2510.16907).

Reward 1 at the goal, else 0; goal and holes end the episode. A step off the board is invalid and does nothing. Maps are
drawn: each square is ice with probability `ice`, until there is a way from the upper left to the lower right corner. An
episode has at most 25 steps for each square on a side: 100 on 4x4 and 200 on 8x8, as in Gymnasium.
"""

from __future__ import annotations

import numpy as np

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.game import DIRECTIONS, SIDES, Dice, Game, Moves, Player, Position, side_of
from embodied_rft.names import UserError
from embodied_rft.registry import register

ICE, HOLE, GOAL, PLAYER, FALLEN, THERE = range(6)
SIGNS = "_OGPX*"  # of VAGEN, but its check mark, which not every font has
_BLUE, _DARK, _GREEN = (205, 230, 250), (25, 45, 95), (20, 130, 40)
LOOKS = (  # colour, letter and its colour
    (_BLUE, "", drawing.BLACK),
    (_DARK, "", drawing.BLACK),
    (_BLUE, "G", _GREEN),
    (_BLUE, "P", drawing.RED),
    (_DARK, "X", drawing.RED),
    ((250, 215, 60), "P", drawing.RED),
)


class FrozenLake(Game):
    """Cross the ice to the goal without falling into a hole.

    Args:
        size: squares on a side.
        ice: probability that a square is ice and no hole.
        slip: probability to slide to one of the two sides of where one wanted to go; 2/3 is Gymnasium's slippery lake.
    """

    words = (DIRECTIONS,)

    def __init__(self, *, size: int = 4, ice: float = 0.8, slip: float = 0.0) -> None:
        if not 2 <= size <= 16:
            raise UserError(f"size is {size}; expected 2 to 16 squares on a side")
        if not 0.3 <= ice <= 1 or not 0 <= slip <= 1:
            raise UserError(f"ice is {ice} and slip {slip}; expected 0.3 to 1 (else hardly a map has a way) and 0 to 1")
        self.size, self.ice, self.slip, self.limit = size, ice, slip, 25 * size
        self.arrays = {"map": (size, size), "place": (2,)}
        self.sizes = [len(SIGNS)] * size**2
        self.rules = (
            f"Cross the lake to the goal. Signs: {SIGNS[PLAYER]} you, {SIGNS[GOAL]} goal, {SIGNS[ICE]} ice, "
            f"{SIGNS[HOLE]} hole: never step on it." + (" Ice is slippery." if slip else "")
        )
        self.sprites = np.stack(
            [drawing.block(16, color, edge=(160, 190, 215), mark=m, ink=i) for color, m, i in LOOKS]
        )

    def deal(self, dice: Dice) -> Position:
        """Maps with a way to the goal; the player starts in the upper left corner."""
        count, size = len(dice), self.size
        maps = np.zeros((count, size, size), np.int64)
        missing = np.arange(count)
        while len(missing):
            drawn = np.where(dice.of(missing).uniform(size**2) < self.ice, ICE, HOLE).reshape(-1, size, size)
            drawn[:, 0, 0], drawn[:, -1, -1] = ICE, GOAL
            maps[missing] = drawn
            missing = missing[np.isinf(distances(drawn)[:, 0, 0])]
        return {"map": maps, "place": np.zeros((count, 2), np.int64)}

    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Whether the step stays on the board."""
        there = now["place"] + SIDES[actions]
        return ((there >= 0) & (there < self.size)).all(1)

    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """One step, or a slide to the side."""
        if self.slip:
            luck = dice.uniform(1)[:, 0]
            turn = np.where(luck < self.slip, np.where(luck < self.slip / 2, 1, 3), 0)
            actions = (actions + turn) % 4
        now["place"] = np.clip(now["place"] + SIDES[actions], 0, self.size - 1)
        found = now["map"][np.arange(len(actions)), now["place"][:, 0], now["place"][:, 1]]
        return Moves(1.0 * (found == GOAL), found != ICE, found == GOAL)

    def symbols(self, now: Position) -> np.ndarray:
        """The squares, with the player on his."""
        seen, rows = now["map"].copy(), np.arange(len(now["map"]))
        row, column = now["place"].T
        seen[rows, row, column] += PLAYER  # FALLEN on a hole, THERE on the goal
        return seen.reshape(len(seen), -1)

    def draw(self, now: Position) -> np.ndarray:
        """The board, 16 pixels a square."""
        return drawing.board(self.symbols(now).reshape(now["map"].shape), self.sprites)

    def tell(self, now: Position) -> str:
        """The board in signs."""
        return "\n".join("".join(SIGNS[kind] for kind in line) for line in self.symbols(now).reshape(self.size, -1))


def distances(maps: np.ndarray) -> np.ndarray:
    """Steps to the goal from every square of maps [K, size, size]; infinite where there is no way, and in holes."""
    size = maps.shape[1]
    steps = np.where(maps == GOAL, 0.0, np.inf)
    for _ in range(size * size):
        wide = np.pad(steps, ((0, 0), (1, 1), (1, 1)), constant_values=np.inf)
        nearest = np.minimum.reduce([wide[:, 1:-1, :-2], wide[:, 1:-1, 2:], wide[:, :-2, 1:-1], wide[:, 2:, 1:-1]])
        better = np.where((maps == HOLE) | (maps == GOAL), steps, np.minimum(steps, nearest + 1))
        if np.array_equal(better, steps):
            break
        steps = better
    return steps


@register("demonstrator", "frozen_lake", "embodied_rft/FrozenLake-v0")
class FrozenLakePlayer(Player):
    """Walks a shortest way, or, where ice is slippery, what value iteration says.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
        slip: how slippery the ice is thought to be, as in the environment's option.
    """

    def __init__(self, *, noise: float = 0.0, slip: float = 0.0) -> None:
        super().__init__(noise=noise)
        self.slip = slip

    def play(self, state: np.ndarray) -> np.ndarray:
        """The side with the largest value (Bellman 1957), discounted by 0.99 a step."""
        size = side_of(state)
        seen = state.reshape(-1, size, size)
        place = (seen >= PLAYER).reshape(len(seen), -1).argmax(1)
        maps = seen % PLAYER
        value = np.where(maps == GOAL, 1.0, 0.0)
        for _ in range(4 * size * size if self.slip else size * size):
            new = np.where(maps == ICE, self._sides(value).max(1), value)
            if np.abs(new - value).max() < 1e-6:
                break
            value = new
        return self._sides(value).reshape(len(seen), 4, -1)[np.arange(len(seen)), :, place].argmax(1)

    def _sides(self, value: np.ndarray) -> np.ndarray:
        """What going to each side is worth, [K, 4, size, size]."""
        wide = np.pad(value, ((0, 0), (1, 1), (1, 1)), mode="edge")
        moved = np.stack([wide[:, 1:-1, :-2], wide[:, 2:, 1:-1], wide[:, 1:-1, 2:], wide[:, :-2, 1:-1]], 1)
        slid = (np.roll(moved, 1, 1) + np.roll(moved, -1, 1)) / 2
        return 0.99 * ((1 - self.slip) * moved + self.slip * slid)

    def choices(self, state: np.ndarray) -> int:
        """Four sides."""
        return 4
