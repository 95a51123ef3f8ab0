"""NumberLine: walk from a number to a target by steps of one (Zhai et al. 2024, RL4VLM, arXiv:2405.10292, app. A.1).

Reward 1 at the target, which ends the episode, -1 for a step that comes no closer (one off the line is invalid and does
nothing), 0 otherwise; an episode has at most 2 * max_position steps.
"""

from __future__ import annotations

import numpy as np

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.game import Dice, Game, Moves, Player, Position
from embodied_rft.names import UserError
from embodied_rft.registry import register


class NumberLine(Game):
    """Walk to the target number, one step left or right at a time.

    Args:
        max_position: the last number; the first is 0. The larger, the harder.
    """

    words = (("left", "right"),)

    def __init__(self, *, max_position: int = 5) -> None:
        if not 1 <= max_position <= 99:
            raise UserError(f"max_position is {max_position}; expected 1 to 99")
        self.last, self.limit = max_position, 2 * max_position
        self.arrays = {"target": (), "current": ()}
        self.sizes = [max_position + 1] * 2
        self.rules = (
            f"You are on a number line from 0 to {max_position}. Reach the target: left is one less, right is one more."
        )
        self.background = drawing.canvas(1, 64, 80)
        drawing.put(self.background, drawing.text("TARGET:"), 10, 5)
        drawing.put(self.background, drawing.text("CURRENT:"), 40, 5)
        self.numbers = drawing.labels([str(number) for number in range(max_position + 1)], scale=2)

    def deal(self, dice: Dice) -> Position:
        """Target and start are never the same."""
        target = dice.roll(self.last + 1, 1)[:, 0]
        return {"target": target, "current": (target + 1 + dice.roll(self.last, 1)[:, 0]) % (self.last + 1)}

    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Whether the step stays on the line."""
        return np.where(actions == 0, now["current"] > 0, now["current"] < self.last)

    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """See the module."""
        before = np.abs(now["current"] - now["target"])
        now["current"] += np.where(valid, 2 * actions - 1, 0)
        after = np.abs(now["current"] - now["target"])
        there = after == 0
        return Moves(1.0 * there - (after >= before), there, there)

    def symbols(self, now: Position) -> np.ndarray:
        """Target and current number."""
        return np.stack([now["target"], now["current"]], 1)

    def draw(self, now: Position) -> np.ndarray:
        """Both in digits, [K, 64, 80, 3]."""
        pictures = self.background.repeat(len(now["target"]), 0)
        drawing.put(pictures, self.numbers[now["target"]], 7, 54)
        drawing.put(pictures, self.numbers[now["current"]], 37, 54)
        return pictures

    def tell(self, now: Position) -> str:
        """Both in digits."""
        return f"Target: {now['target'][0]}\nCurrent: {now['current'][0]}"


@register("demonstrator", "number_line", "embodied_rft/NumberLine-v0")
class NumberLinePlayer(Player):
    """Walks towards the target.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def play(self, state: np.ndarray) -> np.ndarray:
        """Right where the target is larger."""
        return (state[:, 0] > state[:, 1]).astype(np.int64)

    def choices(self, state: np.ndarray) -> int:
        """Left and right."""
        return 2
