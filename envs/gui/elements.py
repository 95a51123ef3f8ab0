"""Elements of pages and screens in a line each, as "state" tells them, and read again.

Boundary: pure functions of text; knows no browser and no screen.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from embodied_rft.envs.gui.actions import Box

LINE = re.compile(r'\[(\d+)\] (\S+) ("(?:[^"\\]|\\.)*") (-?\d+) (-?\d+) (\d+) (\d+)')


@dataclass(frozen=True, slots=True)
class Element:
    """Something that can be named: Element(3, "button", "OK", Box(20, 20, 60, 24)) is `[3] button "OK" 20 20 60 24`."""

    ref: int
    tag: str
    text: str
    box: Box

    def __str__(self) -> str:
        x, y, width, height = (round(number) for number in self.box)
        return f"[{self.ref}] {self.tag} {json.dumps(self.text, ensure_ascii=False)} {x} {y} {width} {height}"


def read_elements(state: str) -> list[Element]:
    """The elements of a state; lines that tell none are passed over."""
    found = (LINE.fullmatch(line) for line in state.split("\n"))
    return [
        Element(int(one[1]), one[2], json.loads(one[3]), Box(*map(float, one.groups()[3:]))) for one in found if one
    ]
