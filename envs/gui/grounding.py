"""Find the element: a drawn screen, an instruction that names one of its elements, and one answer, its box or a point.

The reward is a mixture of parts that are told one by one. Boundary: as `screens`; the figures are `drawn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from embodied_rft.envs.gui.drawn import (
    FIRST_WORD,
    ICONS,
    LEAST_ICON,
    NAMES,
    WORD_HEIGHT,
    WORDS,
    icons,
    inside,
    screen,
    split,
    word_width,
)
from embodied_rft.envs.gui.screens import Done, Part, Screens
from embodied_rft.names import UserError, nearest

ID = "embodied_rft/Grounding-v0"
KINDS = ("icon", "word")
ANSWERS = {"box": 4, "point": 2}  # and how many numbers each has
PARTS = {"box": ("hit", "iou", "edges"), "point": ("hit",)}  # of the reward
MOST, NONE = 16, -1


class Fit(NamedTuple):
    """How an answer lies to the element: Fit(hit=1.0, iou=0.5, edges=0.9, area=2.0)."""

    hit: float  # 1: its middle is inside
    iou: float  # intersection over union
    edges: float  # harmonic mean of the closeness of the four edges
    area: float  # of the answer over the element's


def fit(box: np.ndarray, target: np.ndarray, size: int) -> Fit:
    """Hit, IoU and closeness of edges (Zhou et al. 2025, GUI-G1, arXiv:2505.15810, section 4.2).

    edges = 4 / sum_i 1 / (1 - |b_i - t_i| / size), over x1, y1, x2, y2; 0 where an edge is a whole screen away.

    Args:
        box: x1, y1, x2, y2 of the answer, in pixels [4].
        target: of the element [4].
        size: of the screen.
    """
    middle = (box[:2] + box[2:]) / 2
    both = np.clip(np.minimum(box[2:], target[2:]) - np.maximum(box[:2], target[:2]), 0, None).prod()
    areas = (box[2:] - box[:2]).prod(), (target[2:] - target[:2]).prod()
    near = 1 - np.abs(box - target) / size
    edges = 4 / (1 / near).sum() if (near > 0).all() else 0.0
    hit, shared = float(inside(target, *middle)), float(both / (sum(areas) - both))
    return Fit(hit, shared, float(edges), float(areas[0] / areas[1]))


class Grounding(Screens):
    """One turn: the instruction names an element of a drawn screen, the answer is its box, or a point on it.

    Success is a hit: the middle of the answer is inside the element. `info` tells the parts of the reward one by one
    ("reward/hit", "reward/iou", "reward/edges"), the element's share of the screen ("box/target") and the answer's area
    over the element's ("box/area"; 0: it is no box).

    Args:
        num_envs: N.
        answer: "box" (X1 Y1 X2 Y2: edges of cells, or pixels) or "point" (X Y).
        rewards: weights of "hit", "iou" and "edges" in the reward; of points, only "hit".
        elements: of a screen, 1 to 16.
        kinds: of elements: "icon" (a figure in a colour), "word" (a button with a word on it).
        sides: shortest and longest side of an icon, in pixels; words are as long as they are.
        colors: how many the icons have, 1 to 6.
        shapes: likewise.
        alike: the other icons share colour or shape with the one that is named.
        size, grid, parser, style, state, expert, invalid: see `Screens`.
    """

    one_decision: ClassVar[bool] = True
    held_arrays = ("looks", "boxes", "target", "parts")

    def __init__(
        self,
        *,
        num_envs: int,
        answer: Literal["box", "point"] = "box",
        rewards: Mapping[str, float] | None = None,
        elements: int = 4,
        kinds: Sequence[str] = KINDS,
        sides: Sequence[int] = (8, 32),
        colors: int = 6,
        shapes: int = 6,
        alike: bool = False,
        size: int = 64,
        grid: Sequence[int] | None = None,
        parser: str | Mapping[str, Any] | None = None,
        style: Literal["full", "short"] = "full",
        state: bool = False,
        expert: bool = False,
        invalid: float = 0.0,
    ) -> None:
        if answer not in ANSWERS:
            raise UserError(f"answer is {answer!r}; {nearest(str(answer), ANSWERS)}")
        self.answer, self.weights = answer, {"hit": 1.0} if rewards is None else dict(rewards)
        for part in self.weights:
            if part not in PARTS[answer]:
                raise UserError(
                    f"rewards: {part!r} is no part of the reward of a {answer}; {nearest(part, PARTS[answer])}"
                )
        for kind in kinds:
            if kind not in KINDS:
                raise UserError(f"unknown kind of element {kind!r}; {nearest(kind, KINDS)}")
        if not kinds or not 1 <= elements <= MOST:
            raise UserError(f"kinds are {list(kinds)} and elements {elements}; expected a kind, and 1 to {MOST}")
        if len(sides) != 2 or not LEAST_ICON <= sides[0] <= sides[1] or sides[1] > size - 2:
            raise UserError(
                f"sides are {list(sides)}; expected the shortest and the longest, {LEAST_ICON} to {size - 2}"
            )
        if alike and "icon" not in kinds:
            raise UserError("alike has no effect without icons: leave it out")
        self.icons = icons(colors, shapes)
        if elements > len(self.icons) and "icon" in kinds:
            raise UserError(f"elements is {elements}: {colors} colors and {shapes} shapes do not make so many icons")
        self.elements, self.kinds, self.sides, self.alike = elements, tuple(kinds), tuple(sides), alike
        self.looks = np.full((num_envs, MOST), NONE)
        self.boxes = np.zeros((num_envs, MOST, 4), np.int64)
        self.target = np.zeros(num_envs, np.int64)
        self.parts = np.zeros((num_envs, len(Fit._fields)))  # of the latest answer; 0 of what is none
        super().__init__(
            num_envs=num_envs,
            size=size,
            grid=grid,
            parser=parser,
            style=style,
            state=state,
            expert=expert,
            invalid=invalid,
        )
        self._lay_out(np.random.default_rng(0))  # is there room?

    @property
    def numbers(self) -> int:
        """Of the form of answers."""
        return ANSWERS[self.answer]

    def begin(self, row: int, rng: np.random.Generator, options: Mapping[str, Any]) -> None:
        """Elements, one of which is asked for."""
        looks, boxes = self._lay_out(rng)
        self.looks[row], self.parts[row] = NONE, 0
        self.looks[row, : len(looks)], self.boxes[row, : len(looks)] = looks, boxes
        self.target[row] = rng.integers(len(looks)) if not self.alike else np.argmax(looks < FIRST_WORD)

    def _lay_out(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Looks [E] that differ, and boxes [E, 4]."""
        least = self.sides[0] if "icon" in self.kinds else WORD_HEIGHT
        parts = np.array(split(rng, (0, 0, self.size, self.size), self.elements, least + 2))
        icons, words = iter(self._icons(rng).tolist()), iter((FIRST_WORD + rng.permutation(len(WORDS))).tolist())
        looks: list[int] = []
        boxes: list[tuple[int, ...]] = []
        for x1, y1, x2, y2 in parts[rng.permutation(len(parts))].tolist():
            room = np.array((x2 - x1 - 2, y2 - y1 - 2))
            word = next(words)
            needed = np.array((word_width(NAMES[word]), WORD_HEIGHT))
            fits = "word" in self.kinds and (needed <= room).all()
            if fits and ("icon" not in self.kinds or (rng.random() < 0.5 and (looks or not self.alike))):
                look, sides = word, needed
            elif "icon" in self.kinds:
                look, most = next(icons), np.minimum(room, self.sides[1])
                sides = np.exp(rng.uniform(np.log(self.sides[0]), np.log(most + 1))).astype(int)
            else:
                continue  # no room for a word here
            x, y = (int(rng.integers(low + 1, high - side)) for low, high, side in zip((x1, y1), (x2, y2), sides))
            looks.append(look)
            boxes.append((x, y, x + sides[0], y + sides[1]))
        if not looks:
            return self._lay_out(rng)
        return np.array(looks), np.array(boxes)

    def _icons(self, rng: np.random.Generator) -> np.ndarray:
        """Numbers of icons in an order; if they are to be alike, behind the first come those that share something."""
        order = rng.permutation(self.icons)
        if not self.alike:
            return order
        shared = [len({*ICONS[order[0]].split(), *ICONS[other].split()}) > 3 for other in order]
        return order[np.argsort(shared, kind="stable")]

    # --- an answer -----------------------------------------------------------------------------------------------

    def do(self, row: int, numbers: list[int], rng: np.random.Generator) -> Done | None:
        """See the class."""
        target = self.boxes[row, self.target[row]]
        if self.answer == "point":
            point = self.grid.point(numbers)
            if point is None:
                return None
            found = Fit(float(inside(target, *point)), 0.0, 0.0, 0.0)
        else:
            box = self.grid.box(numbers)
            if box is None:
                return None
            found = fit(box, target, self.size)
        self.parts[row] = found
        told = found._asdict()
        return Done(sum(weight * told[part] for part, weight in self.weights.items()), True, bool(found.hit))

    def told(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The parts of the reward and how large things are; 0 of what is no answer."""
        parts = dict(zip(Fit._fields, self.parts[rows].T, strict=True))
        shown = {f"reward/{part}": parts[part] for part in PARTS[self.answer]}
        targets = self.boxes[rows, self.target[rows]]
        shown["box/target"] = (targets[:, 2:] - targets[:, :2]).prod(1) / self.size**2
        return shown | ({"box/area": parts["area"]} if self.answer == "box" else {})

    # --- what is seen and said -----------------------------------------------------------------------------------

    def name(self, row: int) -> str:
        """The kind of the element."""
        return KINDS[int(self.looks[row, self.target[row]] >= FIRST_WORD)]

    def ask(self, row: int) -> str:
        """Its name."""
        named = NAMES[self.looks[row, self.target[row]]]
        if self.style == "short":
            return named
        said = f'the button "{named}"' if self.name(row) == "word" else f"the {named}"
        return f"Where is {said}? Give {'its box' if self.answer == 'box' else 'a point on it'}."

    def rules(self, row: int) -> str:
        """There are none."""
        return ""

    def tell(self, row: int) -> list[Part]:
        """All elements."""
        there = np.flatnonzero(self.looks[row] != NONE)
        return [(NAMES[self.looks[row, n]], self.boxes[row, n]) for n in there]

    def draw(self, row: int) -> np.ndarray:
        """See `Screens`."""
        there = self.looks[row] != NONE
        return screen(self.size, self.looks[row, there], self.boxes[row, there])

    def advise(self, row: int) -> list[int]:
        """The nearest box, or the cell at its middle."""
        box = self.boxes[row, self.target[row]]
        return self.grid.name_box(box) if self.answer == "box" else self.grid.name_point(box)

    def any(self, rng: np.random.Generator) -> list[int]:
        """Any box or cell."""
        return self.grid.any_box(rng) if self.answer == "box" else self.grid.any_point(rng)
