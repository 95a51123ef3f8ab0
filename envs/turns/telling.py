"""What an environment says of itself, and what is said where it does not: states as text, words of actions.

Boundary: spaces and values to text; knows no parser and no episode.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.names import UserError
from embodied_rft.pools.protocol import is_text
from embodied_rft.turns.words import Words

MOST_NUMBERS = 64  # of a part of an observation: more are a picture, and are not told
MOST_LISTED = 30  # words of a choice that are written out


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
class NamesActions(Protocol):
    """As the games of ALE do."""

    def get_action_meanings(self) -> list[str]:
        """["NOOP", "FIRE"]."""


class Plain(NamedTuple):
    """What is told of an environment that tells nothing itself."""

    rules: str
    state: str
    words: Words
    legal: tuple[str, ...] | None = None


def state_text(space: Space, value: object, *, digits: int) -> str:
    """An observation in words: numbers with so many significant digits; of a Dict one line for each part.

    Raises:
        ValueError: nothing of it can be told.
    """
    if not isinstance(space, spaces.Dict):
        if (said := _part(space, value, digits)) is None:
            raise UserError(
                f"observations {space} cannot be told in words: set observe to image, or put a wrapper around the "
                "environment that has a method describe()"
            )
        return said
    parts = {key: _part(child, cast(Any, value)[key], digits) for key, child in space.spaces.items()}
    return "\n".join(f"{key}: {said}" for key, said in parts.items() if said is not None)


def _part(space: Space, value: object, digits: int) -> str | None:
    if is_text(space):
        return str(value)
    if isinstance(space, spaces.Dict):
        return state_text(space, value, digits=digits)
    numbers = np.asarray(value).reshape(-1)
    if len(numbers) > MOST_NUMBERS:
        return None
    return " ".join(f"{number:.{digits}g}" if numbers.dtype.kind == "f" else str(number) for number in numbers.tolist())


def words_of(space: Space, env: object, *, given: Sequence[Any] | None, bins: int) -> Words:
    """The words of an action space: those given, the environment's names, or numbers.

    Args:
        space: of actions.
        env: who may have names for them.
        given: ["left", "right"], or a list of them for each choice; None: not given.
        bins: of a Box, so many values of each dimension, evenly spaced.

    Raises:
        ValueError: a space that has no words, or words that are not as many as its actions.
    """
    sizes = sizes_of(space, bins)
    if given is not None:
        choices = [given] if given and all(isinstance(word, str) for word in given) else list(given)
        words = tuple(tuple(map(str, choice)) for choice in choices)
        if tuple(map(len, words)) != sizes:
            raise UserError(f"words are {given}; expected as many as there are actions, {list(sizes)}")
        return words
    if isinstance(space, spaces.Box):
        values = grid_of(space, bins)
        return tuple(tuple(f"{value:.3g}" for value in column) for column in values)
    if len(sizes) == 1 and (names := _names(env, sizes[0])):
        return (names,)
    starts = np.broadcast_to(np.reshape(getattr(space, "start", 0), -1), len(sizes)).tolist()
    return tuple(
        tuple(str(start + number) for number in range(size)) for start, size in zip(starts, sizes, strict=True)
    )


def _names(env: object, count: int) -> tuple[str, ...] | None:
    """The environment's own names of its actions, where it has any."""
    actions = getattr(env, "actions", None)
    names: list[str] = []
    if isinstance(env, NamesActions):
        names = [str(name).lower() for name in env.get_action_meanings()]
    elif isinstance(actions, type) and issubclass(actions, enum.IntEnum):
        names = [member.name for member in sorted(actions)]
    return tuple(names) if len(names) == count == len(set(names)) else None


def sizes_of(space: Space, bins: int) -> tuple[int, ...]:
    """How many words each choice of an action has.

    Raises:
        ValueError: the space is no Discrete, MultiDiscrete, MultiBinary or bounded Box of one dimension.
    """
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(size) for size in space.nvec.reshape(-1))
    if isinstance(space, spaces.MultiBinary):
        return (2,) * int(np.prod(space.shape))
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and space.is_bounded():
        return (bins,) * space.shape[0]
    raise UserError(
        f"actions {space} cannot be said in words: expected Discrete, MultiDiscrete, MultiBinary, or a bounded Box of "
        "one dimension"
    )


def grid_of(space: spaces.Box, bins: int) -> np.ndarray:
    """The values that stand for the words of a Box, [A, bins]."""
    return np.linspace(space.low.astype(np.float64), space.high.astype(np.float64), bins, axis=1)


def action_of(space: Space, chosen: tuple[int, ...], bins: int) -> np.ndarray:
    """The action that numbers of words mean, in the form and dtype of the space."""
    index = np.array(chosen, dtype=np.int64)
    if isinstance(space, spaces.Discrete):
        return np.asarray(space.start + index[0], dtype=space.dtype)
    if isinstance(space, spaces.Box):
        return grid_of(space, bins)[np.arange(len(index)), index].astype(space.dtype)
    start = getattr(space, "start", 0)
    return (index.reshape(space.shape) + start).astype(space.dtype)


def chosen_of(space: Space, action: np.ndarray, bins: int) -> tuple[int, ...]:
    """The inverse of `action_of`; of a Box, the words of the nearest values."""
    if isinstance(space, spaces.Box):
        away = np.abs(grid_of(space, bins) - np.asarray(action, dtype=np.float64)[:, None])
        return tuple(away.argmin(1).tolist())
    return tuple((np.asarray(action) - getattr(space, "start", 0)).reshape(-1).tolist())


def choices_text(words: Words) -> str:
    """The words of an action, for the rules."""

    def one(choice: tuple[str, ...]) -> str:
        said = [word for word in choice if word]
        if len(said) > MOST_LISTED:
            said = [*said[:3], "...", said[-1]]
        return ", ".join(said)

    if len(words) == 1:
        return one(words[0])
    if len(set(words)) == 1:
        few = "up to " if "" in words[0] else ""
        return f"{few}{len(words)} words, with blanks between them, of: {one(words[0])}"
    return "; then ".join(map(one, words))
