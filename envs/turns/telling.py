"""What an environment says of itself, and what is said where it does not: states as text.

Boundary: spaces and values to text; knows no action, no parser and no episode.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.names import UserError
from embodied_rft.pools.protocol import flatten_space, is_text
from embodied_rft.turns.words import Words

MOST_NUMBERS = 64  # of a part of an observation: more are a picture, and are not told
LEGAL = "legal"  # key of the actions of a menu, one a line, for players
EXPERT = "expert"  # key of what an expert would do, beside the observation: nothing that one sees


class Told(Protocol):
    """A position for one who reads, as games tell theirs (`games.batch.Description`)."""

    @property
    def rules(self) -> str:
        """The same in all positions."""

    @property
    def state(self) -> str:
        """The position."""

    @property
    def words(self) -> Words:
        """Of each choice of an action."""

    @property
    def legal(self) -> tuple[str, ...] | None:
        """All actions that are legal now; None: there are too many to list."""


@runtime_checkable
class TellsRows(Protocol):
    """A batch that can put its positions into words."""

    def describe(self, row: int) -> Told:
        """The position of one row."""


@runtime_checkable
class Tells(Protocol):
    """A single environment that can."""

    def describe(self) -> Told:
        """Its position."""


@runtime_checkable
class TellsBriefly(Protocol):
    """A single environment that can in few characters, for `style: short`."""

    def brief(self) -> Told:
        """Its position; rules are not told."""


class Plain(NamedTuple):
    """What is told of an environment that tells nothing itself."""

    rules: str
    state: str
    words: Words
    legal: tuple[str, ...] | None = None


def state_text(space: Space, value: object, *, form: str) -> str:
    """An observation in words: numbers in a form as ".3g"; of a Dict one line for each part.

    Raises:
        ValueError: nothing of it can be told.
    """
    if not isinstance(space, spaces.Dict):
        if (said := _part(space, value, form)) is None:
            raise UserError(
                f"observations {space} cannot be told in words: set observe to image, or put a wrapper around the "
                "environment that has a method describe()"
            )
        return said
    shown = [(key, child) for key, child in space.spaces.items() if key != EXPERT]
    parts = {key: _part(child, cast(Any, value)[key], form) for key, child in shown}
    return "\n".join(f"{key}: {said}" for key, said in parts.items() if said is not None)


def _part(space: Space, value: object, form: str) -> str | None:
    if is_text(space):
        return str(value)
    if isinstance(space, spaces.Dict):
        return state_text(space, value, form=form)
    numbers = np.asarray(value).reshape(-1)
    if len(numbers) > MOST_NUMBERS:
        return None
    return " ".join(f"{number:{form}}" if numbers.dtype.kind == "f" else str(number) for number in numbers.tolist())


def number_form(digits: int | None, decimals: int | None) -> str:
    """How numbers are written: ".3g", or "+.2f".

    Raises:
        ValueError: both are given, or one is negative.
    """
    if digits is not None and decimals is not None:
        raise UserError("digits have no effect beside decimals: give one of them")
    if (digits or 0) < 0 or (decimals or 0) < 0:
        raise UserError(f"digits is {digits} and decimals {decimals}; expected at least 0")
    return f".{3 if digits is None else digits}g" if decimals is None else f"+.{decimals}f"


def untold(space: Space) -> list[str]:
    """The parts of an observation that neither `state_text` tells nor a picture shows, by key."""
    leaves = flatten_space(space).items()
    return [key for key, leaf in leaves if not is_text(leaf) and not is_picture(leaf) and _size(leaf) > MOST_NUMBERS]


def is_picture(space: Space) -> bool:
    """Whether it is drawn, not told."""
    return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) == 3
        and min(space.shape[:2]) > 15
    )


def _size(space: Space) -> int:
    return int(np.prod(space.shape or ()))
