"""What a game is: pure array functions over K positions at once, dice, and players who show how it is played.

`batch.py` makes environments of a game. Boundary: a game is rules only; it knows no environment, no seed, no clock.

Legend: K positions, S symbols of a state, C choices of a decision.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from embodied_rft.names import UserError
from embodied_rft.options import check_share

Position = dict[str, np.ndarray]  # K of them: everything that a game changes, each [K, ...]
MOST_LISTED = 10_000  # actions that `legal` tries one by one
MOST_REMEMBERED = 100_000  # positions that a planner keeps
DIRECTIONS = ("left", "down", "right", "up")
SIDES = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]])  # the same as (row, column)


class Dice:
    """Random numbers for K positions, each from a key of its own: SplitMix64 (Steele et al. 2014, fig. 17).

    What one position throws depends on nothing but its key and how often it has thrown.

    Args:
        keys: [N] uint64.
        thrown: [N] uint64, how often; counted on here.
        rows: [K], whose dice these are.
    """

    def __init__(self, keys: np.ndarray, thrown: np.ndarray, rows: np.ndarray) -> None:
        self.keys, self.thrown, self.rows = keys, thrown, rows

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, which: np.ndarray) -> Dice:
        """The dice of some of the positions: a mask [K], or numbers."""
        return Dice(self.keys, self.thrown, self.rows[which])

    def uniform(self, count: int) -> np.ndarray:
        """Numbers in [0, 1), [K, count]."""
        turns = self.thrown[self.rows, None] + np.arange(1, count + 1, dtype=np.uint64)
        self.thrown[self.rows] += np.uint64(count)
        z = self.keys[self.rows, None] + turns * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53

    def roll(self, sides: int, count: int) -> np.ndarray:
        """Whole numbers in [0, sides), [K, count]."""
        return (self.uniform(count) * sides).astype(np.int64)

    def shuffle(self, count: int) -> np.ndarray:
        """Orders of `count` things, [K, count]."""
        return self.uniform(count).argsort(1, kind="stable")


class Moves(NamedTuple):
    """What K positions answered: Moves(np.array([1.]), np.array([True]), np.array([True]))."""

    reward: np.ndarray  # [K]
    over: np.ndarray  # [K] bool: the rules end the episode
    success: np.ndarray  # [K] bool


class Game(ABC):
    """The rules of a game, over K positions at once.

    Options are the arguments of the constructor, which sets the attributes below.
    """

    arrays: dict[str, tuple[int, ...]]  # shape of each array of one position; all are int64
    words: tuple[tuple[str, ...], ...]  # of each choice of a decision
    sizes: Sequence[int]  # how many values each of the S symbols has
    rules: str  # for one who reads: what the game is, and how an answer is written
    limit: int | None = None  # decisions of an episode; None: the game ends by itself

    @abstractmethod
    def deal(self, dice: Dice) -> Position:
        """New positions, as many as there are dice."""

    @abstractmethod
    def valid(self, now: Position, actions: np.ndarray) -> np.ndarray:
        """Whether the rules allow `actions` [K] or [K, C]: [K] bool."""

    @abstractmethod
    def move(self, now: Position, actions: np.ndarray, valid: np.ndarray, dice: Dice) -> Moves:
        """One decision each; changes `now` in place. `valid` [K] is what the method of that name said."""

    @abstractmethod
    def symbols(self, now: Position) -> np.ndarray:
        """What a player sees, as numbers [K, S]."""

    @abstractmethod
    def draw(self, now: Position) -> np.ndarray:
        """Pictures [K, H, W, 3] uint8."""

    @abstractmethod
    def tell(self, now: Position) -> str:
        """One position (K is 1) in words."""

    def empty(self, count: int) -> Position:
        """Positions before the first deal: zeros."""
        return {name: np.zeros((count, *shape), np.int64) for name, shape in self.arrays.items()}

    def legal(self, now: Position) -> np.ndarray | None:
        """All actions that the rules allow in one position, [L] or [L, C]; None: there are too many to try."""
        counts = [len(words) for words in self.words]
        if np.prod(counts, dtype=float) > MOST_LISTED:
            return None
        every = np.array(list(itertools.product(*map(range, counts))))
        every = every[:, 0] if len(counts) == 1 else every
        return every[self.valid({name: value.repeat(len(every), 0) for name, value in now.items()}, every)]

    def say(self, action: Any) -> str:
        """An action in words: "left", or "0 1 0 2"."""
        return " ".join(words[index] for words, index in zip(self.words, np.atleast_1d(action))).strip()


class Player(ABC):
    """Who plays well: reads "state" of the observation, remembers nothing, so it can label any state.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def __init__(self, *, noise: float = 0.0) -> None:
        self.noise = check_share("noise", noise, "random moves")

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """Actions [N] or [N, C] for N observations; `rng` is drawn from only if there is noise."""
        if "state" not in observation:
            raise UserError("players read the state: set env.options.observation to both (pictures, too) or to state")
        state = np.asarray(observation["state"])
        actions = self.play(state)
        if self.noise:
            random = rng.integers(self.choices(state), size=actions.shape)
            wrong = rng.random(len(actions)) < self.noise
            actions = np.where(wrong.reshape(-1, *[1] * (actions.ndim - 1)), random, actions)
        return actions

    @abstractmethod
    def play(self, state: np.ndarray) -> np.ndarray:
        """Good actions for states [N, S]."""

    @abstractmethod
    def choices(self, state: np.ndarray) -> int | np.ndarray:
        """How many actions there are, or options of each choice [C]."""


class Planner(Player):
    """Who searches, and remembers what to do on the whole way that was found.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def __init__(self, *, noise: float = 0.0) -> None:
        super().__init__(noise=noise)
        self.plans: dict[bytes, int | tuple[int, ...]] = {}  # by the bytes of a position [S] uint8

    def planned(self, state: np.ndarray) -> np.ndarray:
        """What `plan` found for states [N, S], now or earlier: [N], or [N, C]."""
        if len(self.plans) > MOST_REMEMBERED:
            self.plans.clear()
        positions = list(state.astype(np.uint8))
        for position in positions:
            if position.tobytes() not in self.plans:
                self.plan(position)
        return np.array([self.plans[position.tobytes()] for position in positions])

    @abstractmethod
    def plan(self, position: np.ndarray) -> None:
        """Search from a position [S] uint8, and put it and those on the way into `plans`."""


def side_of(state: np.ndarray) -> int:
    """How many squares a square board has on a side, whose squares are a state [N, S]."""
    return int(np.sqrt(state.shape[1]))
