"""What answers mean: actions as words, as numbers or as texts, in both directions.

Boundary: spaces, and texts that a parser has read; knows no parser, no state and no episode.
"""

from __future__ import annotations

import enum
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.names import UserError
from embodied_rft.pools.protocol import is_text
from embodied_rft.turns.words import Vocabulary, Words

Legal = tuple[str, ...] | None  # all actions that are legal now, as they are said; None: nobody tells
MOST_LEGAL = 999  # numbers of a menu
MOST_LISTED = 30  # words of a choice that are written out
DIGITS = 3  # of numbers that are said
BETWEEN = re.compile(r"[\s,;()\[\]]+")  # numbers


@runtime_checkable
class HasWords(Protocol):
    """An environment that says what its actions are called: () where they are texts of their own."""

    @property
    def words(self) -> Words:
        """Of each choice."""


@runtime_checkable
class NamesActions(Protocol):
    """As the games of ALE do."""

    def get_action_meanings(self) -> list[str]:
        """["NOOP", "FIRE"]."""


class Speech(ABC):
    """How actions of one space are said."""

    words: Words = ()  # of each choice, for the parser; (): it takes any answer
    example: str  # an action as it is said
    choices: str  # what may be said, for the rules

    @abstractmethod
    def read(self, said: str, legal: Legal = None) -> object:
        """The action that is meant, in the form of the space; None: none is. `legal`: see `InMenu`."""

    @abstractmethod
    def say(self, action: object, legal: Legal = None) -> str:
        """The inverse."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, legal: Legal = None) -> str:
        """Any action."""

    def lists(self, legal: Legal) -> bool:
        """Whether legal actions are worth telling."""
        return bool(legal)


class InWords(Speech):
    """A word for each choice.

    Args:
        space: of actions.
        words: of its choices, in their order; of a Box, of evenly spaced values of each dimension.
    """

    def __init__(self, space: Space, words: Words) -> None:
        self.space, self.words, self.vocabulary = space, words, Vocabulary(words)
        first = next(number for number, word in enumerate(words[0]) if word)
        self.example = self.vocabulary.say([first, *(choice.index("") if "" in choice else 0 for choice in words[1:])])
        self.choices = choices_text(words)
        self.grid = grid_of(space, len(words[0])) if isinstance(space, spaces.Box) else None

    def read(self, said: str, legal: Legal = None) -> np.ndarray | None:
        """Read word by word."""
        chosen = self.vocabulary.read(said)
        if chosen is None:
            return None
        index, dtype = np.array(chosen, dtype=np.int64), self.space.dtype
        if self.grid is not None:
            return self.grid[np.arange(len(index)), index].astype(dtype)
        start, shape = getattr(self.space, "start", 0), self.space.shape
        return (index.reshape(shape or ()) + start).astype(dtype)

    def say(self, action: object, legal: Legal = None) -> str:
        """Of a Box, the words of the nearest values."""
        if self.grid is not None:
            chosen = np.abs(self.grid - np.asarray(action, dtype=np.float64)[:, None]).argmin(1)
        else:
            chosen = (np.asarray(action) - getattr(self.space, "start", 0)).reshape(-1)
        return self.vocabulary.say(chosen.tolist())

    def draw(self, rng: np.random.Generator, legal: Legal = None) -> str:
        """All alike."""
        return self.vocabulary.say([int(rng.integers(len(choice))) for choice in self.words])

    def lists(self, legal: Legal) -> bool:
        """Where some words are not legal now."""
        return bool(legal) and len(self.words) == 1 and len(legal or ()) < len(self.words[0])


class InNumbers(Speech):
    """Numbers within the bounds of a Box, as many as it has: "0.25 -1"."""

    def __init__(self, space: spaces.Box) -> None:
        self.space, self.size = space, space.shape[0]
        self.example = self.say((space.low.astype(np.float64) + space.high) / 2)
        bounds = [f"from {low:.{DIGITS}g} to {high:.{DIGITS}g}" for low, high in zip(space.low, space.high)]
        if self.size == 1:
            self.choices = f"a number {bounds[0]}"
        else:
            each = f"each {bounds[0]}" if len(set(bounds)) == 1 else f"in turn {', '.join(bounds)}"
            self.choices = f"{self.size} numbers, with blanks between them, {each}"

    def read(self, said: str, legal: Legal = None) -> np.ndarray | None:
        """Neither more nor less of them, all within the bounds."""
        parts = [part for part in BETWEEN.split(said) if part]
        try:
            numbers = np.array([float(part) for part in parts])
        except ValueError:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            action = numbers.astype(self.space.dtype)
        whole = np.issubdtype(action.dtype, np.floating) or bool((action == numbers).all())
        return action if whole and self.space.contains(action) else None

    def say(self, action: object, legal: Legal = None) -> str:
        """Rounded, where that stays within the bounds."""
        inside = np.clip(np.asarray(action, np.float64), self.space.low, self.space.high)
        rounded = " ".join(f"{number:.{DIGITS}g}" for number in inside)
        return rounded if self.read(rounded) is not None else " ".join(f"{number:.9g}" for number in inside)

    def draw(self, rng: np.random.Generator, legal: Legal = None) -> str:
        """All alike."""
        return self.say(rng.uniform(self.space.low, self.space.high))


class InText(Speech):
    """Actions that are texts: what a parser finds is handed on."""

    example, choices = "look", "any text"

    def read(self, said: str, legal: Legal = None) -> str:
        """Itself."""
        return said

    def say(self, action: object, legal: Legal = None) -> str:
        """Itself."""
        return str(action)

    def draw(self, rng: np.random.Generator, legal: Legal = None) -> str:
        """There is no telling what is one.

        Raises:
            ValueError: always.
        """
        raise UserError("actions that are texts cannot be drawn at random: let noise be less than 1")


class InMenu(Speech):
    """The number of a legal action: "2", where ("go west", "open box") are legal and each stands behind its number."""

    words, example, choices = (tuple(map(str, range(1, MOST_LEGAL + 1))),), "1", "the number of a legal one"

    def __init__(self, inside: Speech) -> None:
        self.inside = inside

    def read(self, said: str, legal: Legal = None) -> object:
        """Of those that are legal now."""
        place = int(said) - 1
        return self.inside.read(legal[place]) if legal and place < len(legal) else None

    def say(self, action: object, legal: Legal = None) -> str:
        """Nothing where it is not legal."""
        said = self.inside.say(action)
        return str(legal.index(said) + 1) if legal and said in legal else ""

    def draw(self, rng: np.random.Generator, legal: Legal = None) -> str:
        """Of those that are legal now."""
        return str(rng.integers(min(len(legal or ()), MOST_LEGAL) or 1) + 1)


def speech_of(space: Space, env: object, *, words: Sequence[Any] | None, bins: int | None, numbers: bool) -> Speech:
    """How actions of a space are said: in those words, the environment's, or numbers.

    Args:
        space: of actions.
        env: who may have names for them.
        words: ["left", "right"], or a list of them for each choice; None: not given.
        bins: of a Box, so many values of each dimension, evenly spaced; None: 5.
        numbers: of a Box, any values.

    Raises:
        ValueError: a space that has no words, words that are not as many as its actions, an option without effect.
    """
    box = isinstance(space, spaces.Box)
    for name, given in (("bins", bins is not None), ("numbers", numbers)):
        if given and not box:
            raise UserError(f"{name} have no effect on actions {space}: leave them out")
    if numbers and (bins is not None or words is not None):
        raise UserError("bins and words have no effect beside numbers, which are any within the bounds: leave them out")
    if bins is not None and bins < 2:
        raise UserError(f"bins is {bins}; expected at least 2 values of each number")
    if is_text(space):
        if words is not None:
            raise UserError(f"words have no effect on actions {space}: leave them out")
        return InText()
    sizes = sizes_of(space, 5 if bins is None else bins)
    if numbers:
        assert isinstance(space, spaces.Box)
        return InNumbers(space)
    return InWords(space, words_of(space, env, sizes, given=words))


def words_of(space: Space, env: object, sizes: tuple[int, ...], *, given: Sequence[Any] | None) -> Words:
    """The words of an action space: those given, the environment's names, or numbers."""
    if given is not None:
        choices = [given] if given and all(isinstance(word, str) for word in given) else list(given)
        words = tuple(tuple(map(str, choice)) for choice in choices)
        if tuple(map(len, words)) != sizes:
            raise UserError(f"words are {given}; expected as many as there are actions, {list(sizes)}")
        return words
    if isinstance(space, spaces.Box):
        return tuple(tuple(f"{value:.{DIGITS}g}" for value in column) for column in grid_of(space, sizes[0]))
    if isinstance(env, HasWords):
        return env.words
    if len(sizes) == 1 and (names := _names(env, sizes[0])):
        return (names,)
    starts = np.broadcast_to(np.reshape(getattr(space, "start", 0), -1), len(sizes)).tolist()
    return tuple(
        tuple(str(start + number) for number in range(size)) for start, size in zip(starts, sizes, strict=True)
    )


def _names(env: object, count: int) -> tuple[str, ...] | None:
    """What other packages call their actions, where they have names for them."""
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
