"""What an agent can do to a page, in a line of text: "click 30 40", "type hello", "press Enter".

`read` makes an `Action` of a line or says which kind of wrong it is, `write` the line of an action, `perform` does it.
Places are pixels, or cells of a grid. Boundary: knows no episode and no parser (`turns.parsing` comes before).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from embodied_rft.envs.gui.keys import chord
from embodied_rft.envs.gui.tab import Tab
from embodied_rft.names import UserError

Wrong = Literal[
    "unknown_verb",  # no verb of `VERBS`
    "bad_argument",  # not what the verb takes
    "outside",  # a place outside the view
    "no_element",  # no element has this number now
    "unknown_key",  # no key has this name
    "too_long",  # a text of more than `MOST_TYPED` characters
]
WRONG: tuple[Wrong, ...] = get_args(Wrong)
VERBS = {  # what each takes; X Y may be the number of an element, [REF]
    "click": "X Y", "double": "X Y", "move": "X Y", "drag": "X Y X Y", "scroll": "X Y DX DY",
    "type": "TEXT", "press": "KEY", "wait": "",
}  # fmt: skip
PLACES = {"click": 1, "double": 1, "move": 1, "drag": 2, "scroll": 1}  # so many of each
MOST_TYPED = 500
MOST_SCROLLED = 10_000  # pixels


class Box(NamedTuple):
    """Box(10, 20, 40, 16): left, top, width, height, in pixels of the view."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> tuple[float, float]:
        """Where it is clicked."""
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True, slots=True)
class Action:
    """Action("click", ((30.0, 40.0),)): a verb, its places in pixels, and for scroll how far, for others what."""

    verb: str
    places: tuple[tuple[float, float], ...] = ()
    by: tuple[float, float] = (0.0, 0.0)
    text: str = ""


@dataclass(frozen=True)
class Form:
    """How places are written: Form((160, 210)) in pixels, Form((160, 210), (8, 10)) in cells of 20 by 21 pixels."""

    size: tuple[int, int]
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and not all(1 <= cells <= pixels for cells, pixels in zip(self.grid, self.size)):
            raise UserError(f"grid is {list(self.grid)}; expected columns and rows, up to {list(self.size)}")

    @property
    def cells(self) -> tuple[int, int]:
        """How many columns and rows there are."""
        return self.size if self.grid is None else self.grid

    def pixel(self, x: float, y: float) -> tuple[float, float] | None:
        """What is meant; None: outside."""
        if not all(0 <= number < cells for number, cells in zip((x, y), self.cells)):
            return None
        if self.grid is None:
            return x, y
        width, height = (pixels / cells for pixels, cells in zip(self.size, self.grid))
        return (math.floor(x) + 0.5) * width, (math.floor(y) + 0.5) * height

    def written(self, place: tuple[float, float]) -> str:
        """How a pixel is written; those outside as the nearest inside."""
        found = (number * cells / pixels for number, cells, pixels in zip(place, self.cells, self.size))
        return " ".join(str(min(max(math.floor(at), 0), cells - 1)) for at, cells in zip(found, self.cells))

    def how(self, verbs: Sequence[str] = tuple(VERBS)) -> str:
        """What can be said, in a line."""
        (columns, rows), unit = self.cells, "pixels" if self.grid is None else "cells"
        said = ", ".join(f"{verb} {VERBS[verb]}".rstrip() for verb in verbs)
        return f"{said}. X is 0 to {columns - 1}, Y 0 to {rows - 1}, in {unit} from the top left."


def read(line: str, form: Form, boxes: Mapping[int, Box]) -> Action | Wrong:
    """What a line says.

    Args:
        line: "click 30 40".
        form: how places are written.
        boxes: of the elements that can be named now, by their numbers.
    """
    verb, _, rest = line.strip().partition(" ")
    verb = verb.lower()
    if verb not in VERBS:
        return "unknown_verb"
    if verb == "wait":
        return "bad_argument" if rest.strip() else Action(verb)
    if verb == "type":
        return "bad_argument" if not rest else "too_long" if len(rest) > MOST_TYPED else Action(verb, text=rest)
    if verb == "press":
        return _key(rest.strip())
    return _places(verb, rest.split(), form, boxes)


def _key(name: str) -> Action | Wrong:
    if not name:
        return "bad_argument"
    try:
        chord(name)
    except ValueError:
        return "unknown_key"
    return Action("press", text=name)


def _places(verb: str, words: list[str], form: Form, boxes: Mapping[int, Box]) -> Action | Wrong:
    places: list[tuple[float, float]] = []
    for _ in range(PLACES[verb]):
        if words and words[0].startswith("["):
            number = _number(words.pop(0).strip("[]"))
            if number is None:
                return "bad_argument"
            if (box := boxes.get(int(number))) is None:
                return "no_element"
            places.append(box.middle)
            continue
        x, y = (_number(word) for word in (*words[:2], "", "")[:2])
        if x is None or y is None:
            return "bad_argument"
        del words[:2]
        if (place := form.pixel(x, y)) is None:
            return "outside"
        places.append(place)
    by = [_number(word) for word in words]
    if len(by) != (2 if verb == "scroll" else 0):
        return "bad_argument"
    right, down = by or (0.0, 0.0)
    if right is None or down is None or max(abs(right), abs(down)) > MOST_SCROLLED:
        return "bad_argument"
    return Action(verb, tuple(places), (right, down))


def _number(word: str) -> float | None:
    """A plain decimal number: no exponent, no infinity."""
    plain = word.removeprefix("-").replace(".", "", 1)
    return float(word) if plain.isascii() and plain.isdigit() and len(plain) <= 9 else None


def write(action: Action, form: Form) -> str:
    """The line that `read` reads so."""
    said = [action.verb, *(form.written(place) for place in action.places)]
    if action.verb == "scroll":
        said += [f"{number:g}" for number in action.by]
    return " ".join([*said, action.text] if action.text else said)


def any_click(rng: np.random.Generator, form: Form) -> str:
    """The line of a click anywhere."""
    width, height = form.size
    return write(Action("click", ((rng.uniform(0, width), rng.uniform(0, height)),)), form)


async def perform(tab: Tab, action: Action) -> None:
    """Do it, in a tab."""
    if action.verb == "drag":
        await tab.drag(*action.places[0], *action.places[1])
    elif action.verb == "scroll":
        await tab.scroll(*action.places[0], *action.by)
    elif action.verb in ("click", "double"):
        await tab.click(*action.places[0], count=2 if action.verb == "double" else 1)
    elif action.verb == "move":
        await tab.move(*action.places[0])
    elif action.verb == "type":
        await tab.type(action.text)
    elif action.verb == "press":
        await tab.key(action.text)
