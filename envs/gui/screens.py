"""Turns on screens that are drawn: what is asked and shown, how answers are read and counted, exact states.

A kind of screen says how episodes begin, what an answer does, how it looks and what a demonstrator would answer; the
rest is here, once. Boundary: knows no particular screen, no model and no browser; parsers are the engine's.

Legend: N environments, K of them named by `rows`; S pixels on a side.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.envs.gui.actions import Box
from embodied_rft.envs.gui.drawn import Grid, text_space
from embodied_rft.envs.gui.elements import Element
from embodied_rft.envs.serving import EnvBatch, Outcome
from embodied_rft.envs.turns.speech import BETWEEN
from embodied_rft.envs.turns.telling import EXPERT
from embodied_rft.names import UserError, nearest
from embodied_rft.turns.parsing import INVALID, Invalid, make_parser

PLAIN = {"id": "words", "strict": True}  # the answer and nothing else
STYLES, OBSERVE = ("full", "short"), ("image", "text", "both")
UNDERSTOOD = -1  # no kind of invalid answer


Part = tuple[str, np.ndarray]  # an element's name, and its box [4] in pixels


class Done(NamedTuple):
    """What an answer did."""

    reward: float
    over: bool
    success: bool
    said: int = 0  # which of `notes` tells of it


class Screens(EnvBatch):
    """N screens of S x S pixels, and answers that are places on them.

    Args:
        num_envs: N.
        size: S.
        grid: columns and rows of the places that answers name, as [8, 8]; None: pixels.
        parser: how an answer is read; by default it is nothing but the numbers.
        style: "full": what is asked, how to answer, what the last answer did; "short": what is asked, every turn.
        observe: the screen as an "image", as a "text" in each message, which names all elements and where their middles
            are, or "both".
        state: whether all elements and their boxes are told under "state": for players and critics.
        expert: whether the demonstrator's next answer is told under "expert".
        invalid: added to the reward of an answer that is not understood; nothing moves then.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}
    notes: ClassVar[tuple[str, ...]] = ("",)  # what the last answer did
    verb: ClassVar[str] = ""  # may stand before the numbers
    held_arrays: ClassVar[tuple[str, ...]] = ()  # of a kind of screen

    def __init__(
        self,
        *,
        num_envs: int,
        size: int,
        grid: Sequence[int] | None,
        parser: str | Mapping[str, Any] | None,
        style: Literal["full", "short"],
        state: bool,
        expert: bool,
        invalid: float,
        observe: Literal["image", "text", "both"] = "image",
    ) -> None:
        super().__init__(num_envs=num_envs)
        if style not in STYLES:
            raise UserError(f"style is {style!r}; {nearest(style, STYLES)}")
        if observe not in OBSERVE:
            raise UserError(f"observe is {observe!r}; {nearest(observe, OBSERVE)}")
        if not 48 <= size <= 1024:
            raise UserError(f"size is {size}; expected 48 to 1024 pixels on a side")
        pair = None if grid is None else (int(grid[0]), int(grid[1])) if len(grid) == 2 else (0, 0)
        self.grid, self.size = Grid(pair, size, size), size
        self.parser, self.style, self.invalid = make_parser(parser or PLAIN), style, float(invalid)
        self.tells_state, self.advises = state, expert
        self.shows, self.tells_places = observe != "text", observe != "image"
        self.counts = np.zeros((num_envs, len(INVALID)), np.int64)  # invalid answers of the running episodes, by kind
        self.trouble = np.full(num_envs, UNDERSTOOD, np.int64)  # kind of the latest answer
        self.said = np.zeros(num_envs, np.int64)  # which of `notes` tells of it
        self.turn = np.full(num_envs, -1, np.int64)  # of the running episodes; -1: none was started
        self.arrays = ("counts", "trouble", "said", "turn", *self.held_arrays)
        self.pictures = np.zeros((num_envs, size, size, 3), np.uint8)
        seen: dict[str, Space] = {"message": text_space()}
        if self.shows:
            seen["image"] = spaces.Box(0, 255, (size, size, 3), np.uint8)
        told = ["task"] + ["state"] * state + [EXPERT] * expert
        self.observation_space = spaces.Dict(seen | {key: text_space() for key in told})
        self.action_space = text_space()
        self._check_parser()

    def _check_parser(self) -> None:
        said = self.write([1] * self.numbers)
        if self.read(self.parser.parse(said).action or "") != [1] * self.numbers:
            raise UserError(
                f"the parser {self.parser} does not read {said!r} as it was said: set its option strict to true, or "
                "take one with a frame, as tags"
            )

    # --- a kind of screen ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many an answer has."""

    @abstractmethod
    def begin(self, row: int, rng: np.random.Generator, options: Mapping[str, Any]) -> None:
        """A new screen."""

    @abstractmethod
    def do(self, row: int, numbers: list[int], rng: np.random.Generator) -> Done | None:
        """What an answer does; None: it names no place on the screen."""

    @abstractmethod
    def draw(self, row: int) -> np.ndarray:
        """How it looks, [S, S, 3]."""

    @abstractmethod
    def ask(self, row: int) -> str:
        """What is to be done, in the words of the style."""

    @abstractmethod
    def rules(self, row: int) -> str:
        """What the first message says beside it."""

    @abstractmethod
    def name(self, row: int) -> str:
        """The kind of task."""

    @abstractmethod
    def tell(self, row: int) -> list[Part]:
        """All that can be clicked on."""

    @abstractmethod
    def advise(self, row: int) -> list[int]:
        """What a demonstrator would answer."""

    @abstractmethod
    def any(self, rng: np.random.Generator) -> list[int]:
        """Any answer."""

    def told(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Statistics of the running episodes, [K]."""
        return {}

    # --- answers -------------------------------------------------------------------------------------------------

    def write(self, numbers: Sequence[int]) -> str:
        """An answer that is read so."""
        said = " ".join(map(str, numbers))
        return self.parser.write(f"{self.verb} {said}" if self.verb and self.style == "full" else said)

    def read(self, said: str) -> list[int] | None:
        """The numbers of an answer; None: it has others than are asked for."""
        parts = [part for part in BETWEEN.split(said) if part]
        if self.verb and parts and parts[0].lower() == self.verb:
            parts = parts[1:]
        if len(parts) != self.numbers or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
            return None
        return [int(part) for part in parts]

    def how(self) -> str:
        """How one answers."""
        said = f"{self.verb} " if self.verb and self.style == "full" else ""
        unit = "pixels" if (self.grid.cell == 1).all() else "cells"
        columns, rows = self.grid.counts
        form = self.parser.how(said + Grid.FORMS[self.numbers])
        return f"Answer like {form}, in {unit} of a screen of {columns} x {rows}."

    # --- episodes ------------------------------------------------------------------------------------------------

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """New screens."""
        self.counts[rows], self.trouble[rows], self.said[rows], self.turn[rows] = 0, UNDERSTOOD, 0, 0
        for row in rows.tolist():
            self.begin(row, self.generators[row], options)

    def step(self, rows: np.ndarray, actions: Sequence[str]) -> Outcome:
        """Read the answers, and do what they say."""
        done = [self._answer(row, reply) for row, reply in zip(rows.tolist(), actions, strict=True)]
        self.turn[rows] += 1
        self.said[rows] = [each.said for each in done]
        reward, over, success = (np.array(column) for column in list(zip(*done))[:3])
        invalid = {f"invalid/{kind}": self.counts[rows, number] for number, kind in enumerate(INVALID)}
        return Outcome(reward.astype(np.float64), over, success, invalid | self.told(rows))

    def _answer(self, row: int, reply: str) -> Done:
        parsed = self.parser.parse(reply)
        invalid: Invalid | None = parsed.invalid
        if parsed.action is not None:
            numbers = self.read(parsed.action)
            done = None if numbers is None else self.do(row, numbers, self.generators[row])
            if done is not None:
                self.trouble[row] = UNDERSTOOD
                return done
            invalid = "unknown_word"
        assert invalid is not None
        self.trouble[row] = INVALID.index(invalid)
        self.counts[row, self.trouble[row]] += 1
        return Done(self.invalid, self.one_decision, False)

    def observe(self, rows: np.ndarray) -> dict[str, Any]:
        """Messages of all; pictures, drawn anew for `rows`."""
        running = (self.turn >= 0).tolist()
        if len(rows) and self.shows:
            self.pictures = self.pictures.copy()  # what was given away stays as it is
        for row in rows.tolist():
            if running[row] and self.shows:
                self.pictures[row] = self.draw(row)
        every = range(self.num_envs)
        seen: dict[str, Any] = {"message": tuple(self.message(row) if running[row] else "" for row in every)}
        seen |= {"image": self.pictures} if self.shows else {}
        seen |= {"task": tuple(self.name(row) if running[row] else "" for row in every)}
        if self.tells_state:
            seen["state"] = tuple(self.listed(row) if running[row] else "" for row in every)
        if self.advises:
            seen[EXPERT] = tuple(self.write(self.advise(row)) if running[row] else "" for row in every)
        return seen

    def message(self, row: int) -> str:
        """The new message of this turn."""
        full, kind, lines = self.style == "full", int(self.trouble[row]), []
        if kind != UNDERSTOOD:
            wrong = INVALID[kind].replace("_", " ")
            lines += [f"Your answer was not understood: {wrong}. {self.how()}" if full else f"? {wrong}"]
        places = self.places(row) if self.tells_places else []
        if not full:
            return "\n".join([*lines, self.ask(row), *places])
        lines += [self.ask(row), self.rules(row), self.how()] if self.turn[row] == 0 else [self.notes[self.said[row]]]
        return "\n".join(line for line in [*lines, *places] if line)

    def places(self, row: int) -> list[str]:
        """All elements, each with what one answers to click on its middle."""
        return [" ".join([said, *map(str, self.grid.name_point(box))]) for said, box in self.tell(row)]

    def listed(self, row: int) -> str:
        """All elements with their boxes, in pixels, one a line."""
        told = [(said, *box.tolist()) for said, box in self.tell(row)]
        boxes = [(said, Box(x1, y1, x2 - x1, y2 - y1)) for said, x1, y1, x2, y2 in told]
        return "\n".join(str(Element(number, "element", *each)) for number, each in enumerate(boxes))

    def guess(self, rng: np.random.Generator) -> str:
        """Any answer, in the form that is asked for."""
        return self.write(self.any(rng))

    def render(self, row: int, mode: str) -> np.ndarray | str | None:
        """The picture, or the message."""
        return self.message(row) if mode == "ansi" else self.draw(row)
