"""Small drawn screens that are clicked on for several turns, with tasks of differing difficulty and random pop-ups.

Boundary: as `screens`; the figures are `drawn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from embodied_rft.envs.gui.drawn import (
    BUTTON,
    COLORS,
    EDGE,
    FIRST_WORD,
    LEAST_ICON,
    NAMES,
    WORD_HEIGHT,
    WORDS,
    button,
    icons,
    inside,
    put,
    screen,
    split,
    word_width,
)
from embodied_rft.envs.gui.screens import Done, Part, Screens
from embodied_rft.names import UserError, nearest
from embodied_rft.options import check_share

TASKS = ("icon", "word", "pair", "page", "ticks")  # from the easiest on
ID = "embodied_rft/ClickScreen-v0"
PAGES, MOST, BAR = 2, 9, 12  # most elements of a page; pixels of the bar at the bottom
NOTHING, HIT, WRONG, BLOCKED, CLOSED, TICKED, TURNED = range(1, 8)
NOTES = (
    "", "There is nothing.", "Good, go on.", "That was wrong.", "A pop-up is in the way: close it.",
    "The pop-up is closed.", "Ticked or unticked.", "Another page.",
)  # fmt: skip
NONE = -1


class ClickScreen(Screens):
    """Small screens with a task in words, clicked on for several turns; pop-ups come at random and must be closed.

    A click on an element that is not asked for ends the episode without reward; one on nothing does nothing, nor does
    any but on the X while a pop-up is open. The reward is 1 where the task is done.

    icon: a figure; word: a button; pair: two figures in their order; page: a figure on the other page; ticks: those
    figures and no others, then OK.

    Args:
        num_envs: N.
        tasks: those that episodes draw from; `reset(options={"task": "pair"})` asks for one.
        popups: chance of a pop-up at the start and after each turn, where none is open.
        elements: of a page, 2 to 9.
        colors: how many the figures have, 1 to 6.
        shapes: likewise.
        forgiving: a click on a wrong element does nothing, either.
        turns: most of an episode.
        size, grid, parser, style, observe, state, expert, invalid: see `Screens`.
    """

    notes = NOTES
    verb = "click"
    reset_options = ("task",)
    held_arrays = ("task", "looks", "boxes", "plan", "done", "page", "ticked", "popup", "open", "closed")

    def __init__(
        self,
        *,
        num_envs: int,
        tasks: Sequence[str] = TASKS,
        popups: float = 0.2,
        elements: int = 4,
        colors: int = 6,
        shapes: int = 6,
        forgiving: bool = False,
        turns: int = 10,
        size: int = 64,
        grid: Sequence[int] | None = (8, 8),
        parser: str | Mapping[str, Any] | None = None,
        style: Literal["full", "short"] = "full",
        observe: Literal["image", "text", "both"] = "image",
        state: bool = False,
        expert: bool = False,
        invalid: float = 0.0,
    ) -> None:
        for task in tasks:
            if task not in TASKS:
                raise UserError(f"unknown task {task!r}; {nearest(task, TASKS)}")
        if not tasks or len(set(tasks)) < len(tasks):
            raise UserError(f"tasks are {list(tasks)}; expected at least one of {', '.join(TASKS)}, each once")
        if not 2 <= elements <= MOST or turns < 1:
            raise UserError(f"elements is {elements} and turns {turns}; expected 2 to {MOST}, and at least 1")
        self.icons = icons(colors, shapes)
        if elements > len(self.icons):
            raise UserError(f"elements is {elements}: {colors} colors and {shapes} shapes do not make so many figures")
        self.tasks, self.popups = tuple(tasks), check_share("popups", popups, "turns that bring a pop-up")
        self.elements, self.forgiving, self.max_episode_steps = elements, forgiving, turns
        self._set_arrays(num_envs)
        super().__init__(
            num_envs=num_envs,
            size=size,
            grid=grid,
            parser=parser,
            style=style,
            observe=observe,
            state=state,
            expert=expert,
            invalid=invalid,
        )
        self.least = max(LEAST_ICON, int(np.ceil(self.grid.cell.max())) + 1)  # on whose side a cell's middle lies
        if self.least > BAR - 1:
            raise UserError(
                f"grid is {self.grid.counts.tolist()}: cells of more than {BAR - 2} pixels miss what is small"
            )
        self.bar = size - BAR  # where it begins
        third = size // 3
        self.buttons = np.array([[0, self.bar, third, size], [size - third, self.bar, size, size]])
        for task in tasks:
            self._lay_out(np.random.default_rng(0), task)  # is there room?

    def _set_arrays(self, num_envs: int) -> None:
        self.task = np.zeros(num_envs, np.int64)  # number in TASKS
        self.looks = np.full((num_envs, PAGES, MOST), NONE)
        self.boxes = np.zeros((num_envs, PAGES, MOST, 4), np.int64)
        self.plan = np.full((num_envs, 2), NONE)  # elements that are asked for; of "page" on the second one
        self.done = np.zeros(num_envs, np.int64)  # how many of them were clicked
        self.page = np.zeros(num_envs, np.int64)
        self.ticked = np.zeros((num_envs, MOST), bool)
        self.popup = np.zeros((num_envs, 2, 4), np.int64)  # its box, and that of its X
        self.open = np.zeros(num_envs, bool)
        self.closed = np.zeros(num_envs, np.int64)  # pop-ups of the running episode that were closed

    @property
    def numbers(self) -> int:
        """A point."""
        return 2

    # --- an episode ----------------------------------------------------------------------------------------------

    def begin(self, row: int, rng: np.random.Generator, options: Mapping[str, Any]) -> None:
        """A task, and its elements."""
        task = options.get("task", None)
        if task is not None and task not in self.tasks:
            raise UserError(f"unknown task {task!r}; {nearest(str(task), self.tasks)}")
        drawn = self.tasks[int(rng.integers(len(self.tasks)))]
        task = drawn if task is None else task
        self.task[row], self.looks[row], self.ticked[row] = TASKS.index(task), NONE, False
        for page in range(PAGES if task == "page" else 1):
            looks, boxes = self._lay_out(rng, task)
            self.looks[row, page, : len(looks)], self.boxes[row, page, : len(looks)] = looks, boxes
        asked = rng.choice(len(looks), 2, replace=False)
        count = {"pair": 2, "ticks": 1 + int(rng.integers(2))}.get(task, 1)
        self.plan[row] = np.where(np.arange(2) < count, asked, NONE)
        self.done[row], self.page[row], self.closed[row], self.open[row] = 0, 0, 0, False
        self._maybe_pop_up(row, rng)

    def _lay_out(self, rng: np.random.Generator, task: str) -> tuple[np.ndarray, np.ndarray]:
        """Looks [E] that differ, and boxes [E, 4]."""
        boxes = []
        if task == "word":
            looks = FIRST_WORD + rng.permutation(len(WORDS))[: min(self.elements, self.bar // (WORD_HEIGHT + 1))]
            band = self.bar // len(looks)
            for number, look in enumerate(looks):
                most = self.size - (width := max(word_width(NAMES[look]), self.least))
                x, y = int(rng.integers(most + 1)), number * band + int(rng.integers(band - WORD_HEIGHT + 1))
                boxes.append((x, y, x + width, y + WORD_HEIGHT))
        else:
            looks = rng.permutation(self.icons)[: self.elements]
            for x1, y1, x2, y2 in split(rng, (0, 0, self.size, self.bar), len(looks), self.least + 2):
                room = np.minimum((x2 - x1 - 2, y2 - y1 - 2), max(self.size // 4, self.least))
                width, height = rng.integers(self.least, room + 1).tolist()
                x, y = int(rng.integers(x1 + 1, x2 - width)), int(rng.integers(y1 + 1, y2 - height))
                boxes.append((x, y, x + width, y + height))
        return looks, np.array(boxes)

    def _maybe_pop_up(self, row: int, rng: np.random.Generator) -> None:
        """One more pop-up, or none."""
        if self.open[row] or not self.popups or rng.random() >= self.popups:
            return
        close = self.least + 1
        width, height = rng.integers(close + 8, self.size * 3 // 4), rng.integers(close + 8, self.size // 2)
        x, y = rng.integers(self.size - width + 1), rng.integers(self.size - height + 1)
        left = x if rng.random() < 0.5 else x + width - close
        self.popup[row] = (x, y, x + width, y + height), (left, y, left + close, y + close)
        self.open[row] = True

    def do(self, row: int, numbers: list[int], rng: np.random.Generator) -> Done | None:
        """A click."""
        point = self.grid.point(numbers)
        if point is None:
            return None
        done = self._click(row, *point)
        if not done.over:
            self._maybe_pop_up(row, rng)
        return done

    def _click(self, row: int, x: float, y: float) -> Done:
        if self.open[row]:
            if not inside(self.popup[row, 1], x, y):
                return Done(0.0, False, False, BLOCKED)
            self.open[row] = False
            self.closed[row] += 1
            return Done(0.0, False, False, CLOSED)
        task, page = TASKS[self.task[row]], self.page[row]
        if task == "page" and y >= self.bar:
            for number, box in enumerate(self.buttons):
                if inside(box, x, y):
                    self.page[row] = number
                    return Done(0.0, False, False, TURNED)
        if task == "ticks" and inside(self.buttons[1], x, y):
            return self._judge(np.flatnonzero(self.ticked[row]).tolist() == sorted(self._asked(row)))
        for number in np.flatnonzero(self.looks[row, page] != NONE).tolist():
            if inside(self.boxes[row, page, number], x, y):
                return self._hit(row, task, number)
        return Done(0.0, False, False, NOTHING)

    def _hit(self, row: int, task: str, number: int) -> Done:
        """A click on an element."""
        if task == "ticks":
            self.ticked[row, number] ^= True
            return Done(0.0, False, False, TICKED)
        asked = self._asked(row)
        if number != asked[self.done[row]] or self.page[row] != (task == "page"):
            return self._judge(False)
        self.done[row] += 1
        return self._judge(True) if self.done[row] == len(asked) else Done(0.0, False, False, HIT)

    def _judge(self, right: bool) -> Done:
        return Done(float(right), right or not self.forgiving, right, HIT if right else WRONG)

    def _asked(self, row: int) -> list[int]:
        """The elements of the task, in their order."""
        return [number for number in self.plan[row].tolist() if number != NONE]

    # --- what is seen and said -----------------------------------------------------------------------------------

    def name(self, row: int) -> str:
        """The task."""
        return TASKS[self.task[row]]

    def ask(self, row: int) -> str:
        """The task, and its elements."""
        task = self.name(row)
        names = [NAMES[self.looks[row, int(task == "page"), number]] for number in self._asked(row)]
        if self.style == "short":
            return {"page": "2: ", "ticks": "tick "}.get(task, "") + ", ".join(names)
        first, then = f"the {names[0]}", f"the {names[-1]}"
        both = first if len(names) == 1 else f"{first} and {then}"
        return {
            "icon": f"Click on {first}.",
            "word": f'Click on "{names[0]}".',
            "pair": f"Click on {first}, then on {then}.",
            "page": f"Go to page 2 and click on {first}.",
            "ticks": f"Tick {both}, and nothing else, then click on OK.",
        }[task]

    def rules(self, row: int) -> str:
        """What stands in the way."""
        return "Close a pop-up by its X before anything else." if self.popups else ""

    def tell(self, row: int) -> list[Part]:
        """All that can be clicked on."""
        task, page = self.name(row), self.page[row]
        there = np.flatnonzero(self.looks[row, page] != NONE)
        parts = [(NAMES[self.looks[row, page, number]], self.boxes[row, page, number]) for number in there]
        if task == "page":
            said = ["page 1", "page 2"]
            said[page] += ", open"
            parts += zip(said, self.buttons)
        if task == "ticks":
            parts = [(f"{said} ticked" if self.ticked[row, n] else said, box) for n, (said, box) in zip(there, parts)]
            parts += [("ok", self.buttons[1])]
        if self.open[row]:
            parts += [("pop-up", self.popup[row, 0]), ("close", self.popup[row, 1])]
        return parts

    def draw(self, row: int) -> np.ndarray:
        """See `Screens`."""
        task, shown = self.name(row), self.page[row]
        there = self.looks[row, shown] != NONE
        picture = screen(self.size, self.looks[row, shown, there], self.boxes[row, shown, there])
        for x1, y1, x2, y2 in self.boxes[row, shown, there & self.ticked[row]].tolist():
            picture[y1:y2, x1 : x1 + 2], picture[y1:y2, x2 - 2 : x2] = 0, 0
            picture[y1 : y1 + 2, x1:x2], picture[y2 - 2 : y2, x1:x2] = 0, 0
        words = {"page": ("1", "2"), "ticks": ("", "OK")}.get(task, ("", ""))
        if any(words):
            picture[self.bar :] = EDGE
        for number, (word, box) in enumerate(zip(words, self.buttons)):
            if word:
                color = (255, 255, 255) if task == "page" and number == shown else BUTTON
                put(picture, button(word, box[3] - box[1], box[2] - box[0], color), box[0], box[1])
        if self.open[row]:
            self._draw_popup(picture, row)
        return picture

    def _draw_popup(self, picture: np.ndarray, row: int) -> None:
        (x1, y1, x2, y2), (left, top, right, bottom) = self.popup[row].tolist()
        picture[y1:y2, x1:x2] = EDGE
        picture[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] = (255, 250, 225)
        put(picture, button("X", bottom - top, right - left, COLORS["red"], (255, 255, 255)), left, top)

    def advise(self, row: int) -> list[int]:
        """The next click of who makes no mistake."""
        task, page, asked = self.name(row), int(self.page[row]), self._asked(row)
        if self.open[row]:
            box = self.popup[row, 1]
        elif task == "page" and page == 0:
            box = self.buttons[1]
        elif task == "ticks":
            wrong = [n for n in range(MOST) if self.ticked[row, n] != (n in asked)]
            box = self.boxes[row, page, wrong[0]] if wrong else self.buttons[1]
        else:
            box = self.boxes[row, page, asked[min(int(self.done[row]), len(asked) - 1)]]
        return self.grid.name_point(box)

    def any(self, rng: np.random.Generator) -> list[int]:
        """Any cell."""
        return self.grid.any_point(rng)

    def told(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """How many pop-ups were closed."""
        return {"popups/closed": self.closed[rows]}
