"""Screens drawn in NumPy without a browser: elements with exact boxes, their names, where they stand.

Boundary: arrays in, arrays and uint8 pictures [S, S, 3] out; knows no task, no answer and no episode. A look is a
number: a figure in a colour, or a button with a word on it. Boxes are pixels (x1, y1, x2, y2), without the last two.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import numpy as np

from embodied_rft.data import Space
from embodied_rft.envs.games.drawing import BLACK, WHITE, Color, shape, text
from embodied_rft.names import UserError
from embodied_rft.pools.text_spaces import AnyText

COLORS: dict[str, Color] = {
    "red": (214, 39, 40), "green": (44, 140, 44), "blue": (31, 90, 200), "yellow": (240, 190, 20),
    "purple": (140, 60, 170), "cyan": (20, 180, 190),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
WORDS = (
    "go", "up", "cut", "add", "run", "new", "save", "open",
    "send", "edit", "help", "copy", "undo", "stop", "back", "next",
)  # fmt: skip
ICONS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
NAMES = (*ICONS, *WORDS)  # of looks, by their number
FIRST_WORD = len(ICONS)
PAGE, BUTTON, EDGE = (236, 238, 242), (205, 212, 222), (120, 126, 136)
LONGEST = 65_536  # characters of a message and of an answer
LEAST_ICON, WORD_HEIGHT = 8, 11  # pixels


def icons(colors: int, shapes: int) -> np.ndarray:
    """Looks of the figures in the first colours and shapes.

    Raises:
        ValueError: there are not so many.
    """
    for name, count, known in (("colors", colors, tuple(COLORS)), ("shapes", shapes, SHAPES)):
        if not 1 <= count <= len(known):
            raise UserError(f"{name} is {count}; expected 1 to {len(known)}: {', '.join(known)}")
    return (np.arange(colors)[:, None] * len(SHAPES) + np.arange(shapes)).ravel()


def text_space() -> Space:
    """Of messages and answers."""
    return AnyText(LONGEST)


def word_width(word: str) -> int:
    """Pixels of the narrowest button with a word on it."""
    return 6 * len(word) + 3


@cache
def sprite(look: int, height: int, width: int) -> np.ndarray:
    """What an element looks like, [height, width, 3]; not to be written to."""
    if look >= FIRST_WORD:
        return button(WORDS[look - FIRST_WORD], height, width)
    color, _, figure = ICONS[look].partition(" ")
    side = max(height, width)
    drawn = shape(figure, side, COLORS[color], WHITE, edge=None)
    rows, columns = (np.arange(size) * side // size for size in (height, width))
    drawn = drawn[rows][:, columns]
    drawn[[0, -1]], drawn[:, [0, -1]] = EDGE, EDGE
    return drawn


@cache
def button(word: str, height: int, width: int, color: Color = BUTTON, ink: Color = BLACK) -> np.ndarray:
    """A button with a word in its middle, as large as fits, [height, width, 3]."""
    drawn = np.full((height, width, 3), color, np.uint8)
    drawn[[0, -1]], drawn[:, [0, -1]] = EDGE, EDGE
    scale = max(1, min((height - 4) // 7, (width - 2) // (6 * len(word))))
    said = text(word.upper(), scale=scale, color=ink, background=color)[:, :-scale]
    y, x = (height - said.shape[0]) // 2, (width - said.shape[1]) // 2
    if min(y, x) >= 0:
        drawn[y : y + said.shape[0], x : x + said.shape[1]] = said
    return drawn


def put(picture: np.ndarray, drawn: np.ndarray, x: int, y: int) -> None:
    """Draw something with its upper left corner at (x, y)."""
    picture[y : y + drawn.shape[0], x : x + drawn.shape[1]] = drawn


def screen(size: int, looks: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """A screen with elements on it, [size, size, 3]; their looks [E], their boxes [E, 4]."""
    picture = np.full((size, size, 3), PAGE, np.uint8)
    for look, (x1, y1, x2, y2) in zip(looks.tolist(), boxes.tolist(), strict=True):
        put(picture, sprite(look, y2 - y1, x2 - x1), x1, y1)
    return picture


def split(rng: np.random.Generator, box: tuple[int, int, int, int], count: int, least: int) -> list[tuple[int, ...]]:
    """A box cut at random into `count` boxes, each at least `least` on a side.

    Raises:
        ValueError: there is no room for so many.
    """
    x1, y1, x2, y2 = box
    columns, rows = (x2 - x1) // least, (y2 - y1) // least
    if count > columns * rows:
        raise UserError(f"{count} elements of at least {least} pixels a side have no room on {x2 - x1} x {y2 - y1}")
    if count == 1:
        return [box]
    lines, across = max(columns, rows), min(columns, rows)  # cut the longer side, so that both parts have room
    first = int(rng.integers(1, lines))
    fewest, most = max(1, count - (lines - first) * across), min(count - 1, first * across)
    inside = int(rng.integers(fewest, most + 1))
    length = x2 - x1 if columns >= rows else y2 - y1
    at = int(rng.integers(first * least, length - (lines - first) * least + 1))
    if columns >= rows:
        one, other = (x1, y1, x1 + at, y2), (x1 + at, y1, x2, y2)
    else:
        one, other = (x1, y1, x2, y1 + at), (x1, y1 + at, x2, y2)
    return [*split(rng, one, inside, least), *split(rng, other, count - inside, least)]


def inside(box: np.ndarray, x: float, y: float) -> bool:
    """Whether a point is in a box."""
    return bool(box[0] <= x < box[2] and box[1] <= y < box[3])


class Grid:
    """Places that answers name: pixels, or cells of a grid, whose middle a point is and whose edges a box has.

    Args:
        grid: columns and rows; None: pixels.
        width: of the screen, in pixels.
        height: likewise.
    """

    FORMS: ClassVar[dict[int, str]] = {2: "X Y", 4: "X1 Y1 X2 Y2"}

    def __init__(self, grid: tuple[int, int] | None, width: int, height: int) -> None:
        if grid is not None and (len(grid) != 2 or not all(1 <= n <= side for n, side in zip(grid, (width, height)))):
            raise UserError(f"grid is {list(grid)}; expected columns and rows, at most one a pixel, as [8, 8]")
        self.counts = np.array((width, height) if grid is None else grid)
        self.cell = np.array((width, height)) / self.counts  # pixels

    def point(self, numbers: list[int]) -> tuple[float, float] | None:
        """The middle of a cell, in pixels; None: it is not on the screen."""
        x, y = numbers
        if not (0 <= x < self.counts[0] and 0 <= y < self.counts[1]):
            return None
        return float((x + 0.5) * self.cell[0]), float((y + 0.5) * self.cell[1])

    def box(self, numbers: list[int]) -> np.ndarray | None:
        """A box in pixels, from the edges of cells; None: it has no inside, or leaves the screen."""
        x1, y1, x2, y2 = numbers
        if not (0 <= x1 < x2 <= self.counts[0] and 0 <= y1 < y2 <= self.counts[1]):
            return None
        return np.array([x1, y1, x2, y2]) * np.tile(self.cell, 2)

    def name_point(self, box: np.ndarray) -> list[int]:
        """The cell whose middle is nearest to that of a box, of those with theirs inside if there are any."""
        named = []
        for low, high, count in zip(*(box.reshape(2, 2) / self.cell), self.counts):
            near = int(np.floor((low + high) / 2))
            inside = [cell for cell in (near, near - 1) if low <= cell + 0.5 < high]
            named.append(min(max([*inside, near][0], 0), int(count) - 1))
        return named

    def name_box(self, box: np.ndarray) -> list[int]:
        """The edges of cells that are nearest to a box, of those whose middle is inside if there are any."""
        lows, highs = box.reshape(2, 2) / self.cell
        ends = [self._name_ends(low, high, int(count)) for low, high, count in zip(lows, highs, self.counts)]
        return [ends[0][0], ends[1][0], ends[0][1], ends[1][1]]

    @staticmethod
    def _name_ends(low: float, high: float, count: int) -> tuple[int, int]:
        near = [{int(np.floor(end)), int(np.ceil(end))} for end in (low, high)]
        near[1].add(min(near[0]) + 1)  # whatever is smaller than a cell
        pairs = [(a, b) for a in sorted(near[0]) for b in sorted(near[1]) if a < b <= count]
        return min(pairs, key=lambda p: (not low <= (p[0] + p[1]) / 2 < high, abs(p[0] - low) + abs(p[1] - high)))

    def any_point(self, rng: np.random.Generator) -> list[int]:
        """Any cell."""
        return [int(rng.integers(count)) for count in self.counts]

    def any_box(self, rng: np.random.Generator) -> list[int]:
        """Any box."""
        edges = [np.sort(rng.choice(count + 1, 2, replace=False)) for count in self.counts]
        return [int(edges[0][0]), int(edges[1][0]), int(edges[0][1]), int(edges[1][1])]
