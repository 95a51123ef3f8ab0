"""Sokoban: push all boxes onto targets (Racaniere et al. 2017, arXiv:1707.06203; as in VAGEN, arXiv:2510.16907).

Reward "dense", of the first paper: -0.1 a step, 1 for a box that comes onto a target, -1 for one that leaves it, 10
when all are there; "sparse", of the second: 1 when all are there. A step into a wall, or against a box that cannot
move, is invalid and does nothing. An episode has at most 100 steps.

Rooms are carved by a random walk; then the game is played backwards from boxes on their targets, by pulling, and the
position farthest from them is the start: every room can be solved.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from embodied_rft.envs.games import drawing
from embodied_rft.envs.games.game import DIRECTIONS, SIDES, Dice, Game, Moves, Planner, Position, side_of
from embodied_rft.names import UserError, nearest
from embodied_rft.registry import register

WALL, FLOOR, TARGET, BOX_ON_TARGET, BOX, PLAYER, PLAYER_ON_TARGET = range(7)
SIGNS = "#_O*XPS"
_GROUND, _WOOD = (225, 215, 195), (165, 105, 45)
REWARDS = ("dense", "sparse")
MOST_POSITIONS = 300_000  # that the player looks at before it gives up


class Sokoban(Game):
    """Push all boxes onto targets; they cannot be pulled.

    Args:
        size: squares on a side, walls around included.
        boxes: how many boxes and targets; more are harder.
        reward: "dense" (-0.1 a step, 1 for a box on a target, -1 for one off it, 10 at the end) or "sparse" (1 at the
            end).
    """

    words = (DIRECTIONS,)
    limit = 100

    def __init__(self, *, size: int = 6, boxes: int = 1, reward: str = "dense") -> None:
        if not 5 <= size <= 16 or not 1 <= boxes <= (size - 2) ** 2 // 5:
            raise UserError(
                f"size is {size} and boxes {boxes}; expected 5 to 16 squares on a side, walls included, and at least 5 "
                "squares inside them for each box"
            )
        if reward not in REWARDS:
            raise UserError(f"unknown reward {reward!r}; {nearest(reward, REWARDS)}")
        self.size, self.boxes, self.reward = size, boxes, reward
        self.arrays = {"room": (size, size), "boxes": (size, size), "place": (2,)}
        self.sizes = [len(SIGNS)] * size**2
        self.rules = (
            "Push all boxes onto targets; boxes cannot be pulled. Signs: # wall, _ floor, O target, X box, * box on "
            "target, P you, S you on target."
        )
        self.sprites = np.stack(
            [
                drawing.block(16, (70, 60, 60), edge=(110, 95, 90)),
                drawing.block(16, _GROUND),
                drawing.shape("diamond", 16, drawing.RED, _GROUND, edge=None),
                drawing.shape("square", 16, _WOOD, drawing.RED, edge=None),
                drawing.shape("square", 16, _WOOD, _GROUND, edge=None),
                drawing.shape("circle", 16, (30, 130, 60), _GROUND, edge=None),
                drawing.shape("circle", 16, (30, 130, 60), drawing.RED, edge=None),
            ]
        )

    def deal(self, dice: Dice) -> Position:
        """Rooms by a random walk, positions by playing backwards."""
        now = self.empty(len(dice))
        for row in range(len(dice)):
            mine = dice.of(np.array([row]))
            while (found := self._level(mine)) is None:
                pass
            floor, targets, boxes, place = found
            now["room"][row].flat[[*floor]] = FLOOR
            now["room"][row].flat[targets] = TARGET
            now["boxes"][row].flat[boxes] = 1
            now["place"][row] = divmod(place, self.size)
        return now

    def _level(self, dice: Dice) -> tuple[set[int], list[int], list[int], int] | None:
        """One try, in squares by number: floor, targets, boxes, player; None if no box got away from the targets."""
        floor = self._carve(dice.uniform(9 * self.size)[0].tolist())
        chances = dict(zip(sorted(floor), dice.uniform(len(floor))[0].tolist()))
        if len(floor) <= 2 * self.boxes:
            return None
        *targets, place = sorted(floor, key=chances.__getitem__)[: self.boxes + 1]
        return self._pull(floor, targets, place, dice.uniform(40 * (self.size + self.boxes))[0].tolist())

    def _carve(self, luck: list[float]) -> set[int]:
        """Squares of a room: those of a walk, each with one beside it."""
        last = self.size - 2
        row = column = self.size // 2
        floor, heading, sides = set[int](), int(4 * luck[0]), SIDES.tolist()
        for turn, side, beside in zip(luck[::3], luck[1::3], luck[2::3]):
            for step in (sides[int(4 * beside)], (0, 0)):
                r, c = (min(max(at + by, 1), last) for at, by in zip((row, column), step))
                floor.add(r * self.size + c)
            heading = int(4 * side) if turn < 0.5 else heading
            row, column = (min(max(at + by, 1), last) for at, by in zip((row, column), sides[heading]))
        return floor

    def _pull(
        self, floor: set[int], targets: list[int], place: int, luck: list[float]
    ) -> tuple[set[int], list[int], list[int], int] | None:
        """Play backwards to the last of the farthest positions: no box on a target, the longest way for all together.

        None if that way has not two squares a box.
        """
        size, boxes = self.size, list(targets)
        steps, far, best = [-1, size, 1, -size], 2 * len(boxes), None
        for side, pull in zip(luck[::2], luck[1::2]):
            step = steps[int(4 * side)]
            there, behind = place + step, place - step
            if there not in floor or there in boxes:
                continue
            if behind in boxes and pull < 0.8:
                boxes[boxes.index(behind)] = place
            place = there
            ways = sum(abs(b // size - t // size) + abs(b % size - t % size) for b, t in zip(boxes, targets))
            if ways >= far and not {*boxes} & {*targets}:
                far, best = ways, (floor, targets, list(boxes), place)
        return best

    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Whether the next square is free, or has a box that can move on."""
        step, every = SIDES[actions], np.arange(len(actions))
        there = now["place"] + step
        beyond = np.clip(there + step, 0, self.size - 1)

        def at(name: str, square: np.ndarray) -> np.ndarray:
            return now[name][every, square[:, 0], square[:, 1]]

        blocked = (at("room", beyond) == WALL) | (at("boxes", beyond) == 1)
        return (at("room", there) != WALL) & ~((at("boxes", there) == 1) & blocked)

    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """Walk, and push what is there."""
        before = ((now["boxes"] == 1) & (now["room"] == TARGET)).sum((1, 2))
        step = SIDES[actions] * valid[:, None]
        there = now["place"] + step
        pushes = np.flatnonzero(valid & (now["boxes"][np.arange(len(actions)), there[:, 0], there[:, 1]] == 1))
        (r1, c1), (r2, c2) = there[pushes].T, (there + step)[pushes].T
        now["boxes"][pushes, r1, c1], now["boxes"][pushes, r2, c2] = 0, 1
        now["place"] = there
        after = ((now["boxes"] == 1) & (now["room"] == TARGET)).sum((1, 2))
        solved = after == self.boxes
        reward = 1.0 * solved if self.reward == "sparse" else -0.1 + (after - before) + 10.0 * solved
        return Moves(reward, solved, solved)

    def symbols(self, now: Position) -> np.ndarray:
        """The squares, as numbers of `SIGNS`."""
        seen, every = now["room"].copy(), np.arange(len(now["room"]))
        boxes = now["boxes"] == 1
        seen[boxes] = np.where(seen[boxes] == TARGET, BOX_ON_TARGET, BOX)
        row, column = now["place"].T
        seen[every, row, column] = np.where(seen[every, row, column] == TARGET, PLAYER_ON_TARGET, PLAYER)
        return seen.reshape(len(seen), -1)

    def draw(self, now: Position) -> np.ndarray:
        """The room, 16 pixels a square."""
        return drawing.board(self.symbols(now).reshape(now["room"].shape), self.sprites)

    def tell(self, now: Position) -> str:
        """The room in signs."""
        return "\n".join("".join(SIGNS[kind] for kind in line) for line in self.symbols(now).reshape(self.size, -1))


@register("demonstrator", "sokoban", "embodied_rft/Sokoban-v0")
class SokobanPlayer(Planner):
    """Walks a shortest solution (breadth first), and remembers it; where there is none, it walks left.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def play(self, state: np.ndarray) -> np.ndarray:
        """Sides [N]."""
        return self.planned(state)

    def plan(self, position: np.ndarray) -> None:
        """Breadth first over (player, boxes), as squares by number; boxes in corners are given up."""
        position = position
        size = side_of(position[None])
        steps = [int(row * size + column) for row, column in SIDES]
        walls = frozenset(np.flatnonzero(position == WALL).tolist())
        targets = frozenset(np.flatnonzero(np.isin(position, (TARGET, BOX_ON_TARGET, PLAYER_ON_TARGET))).tolist())
        corners = {s for s in range(size * size) if {s - 1, s + 1} & walls and {s - size, s + size} & walls} - targets
        boxes = frozenset(np.flatnonzero(np.isin(position, (BOX, BOX_ON_TARGET))).tolist())
        start = (int(np.flatnonzero(position >= PLAYER)[0]), boxes) if (position >= PLAYER).any() else (-1, boxes)
        came: dict[tuple[int, frozenset[int]], tuple[tuple[int, frozenset[int]], int] | None] = {start: None}
        queue, found = deque([start] if start[0] >= 0 else []), None
        while queue and len(came) < MOST_POSITIONS:
            here = queue.popleft()
            place, boxes = here
            if boxes == targets:
                found = here
                break
            for side, step in enumerate(steps):
                there = place + step
                if there in walls:
                    continue
                after = boxes
                if there in boxes:
                    beyond = there + step
                    if beyond in walls or beyond in boxes or beyond in corners:
                        continue
                    after = boxes - {there} | {beyond}
                new = (there, after)
                if new not in came:
                    came[new] = (here, side)
                    queue.append(new)
        self.plans[position.tobytes()] = 0
        while found is not None and (before := came[found]) is not None:
            found, side = before
            self.plans[_signs(position, targets, *found)] = side

    def choices(self, state: np.ndarray) -> int:
        """Four sides."""
        return 4


def _signs(room: np.ndarray, targets: frozenset[int], place: int, boxes: frozenset[int]) -> bytes:
    """The bytes of a position in the same room."""
    seen = np.where(room == WALL, WALL, FLOOR).astype(np.uint8)
    seen[list(targets)] = TARGET
    for box in boxes:
        seen[box] = BOX_ON_TARGET if box in targets else BOX
    seen[place] = PLAYER_ON_TARGET if place in targets else PLAYER
    return seen.tobytes()
