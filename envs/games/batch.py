"""N environments of one game: what is observed, dice from seeds, invalid moves counted, positions told in words.

`serving` makes Gymnasium environments of it. Boundary: knows no particular game, no model and no protocol of texts:
`describe` gives state and words, a wrapper may make a conversation of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.envs.games.game import Dice, Game, Position
from embodied_rft.envs.serving import EnvBatch, Outcome, State
from embodied_rft.names import UserError, nearest

OBSERVATIONS = {"image": ("image",), "state": ("state",), "both": ("image", "state")}


@dataclass(frozen=True)
class Description:
    """A position for one who reads: Description("Walk to the target.", "Target: 3", (("left", "right"),), ("left",)).

    An action is one word for each of its choices: the word of choice i with index j is `words[i][j]`.
    """

    rules: str  # the same in all positions: what the game is, and how an answer is written
    state: str
    words: tuple[tuple[str, ...], ...]  # of each choice
    legal: tuple[str, ...] | None  # all actions that are legal now; None: there are too many to list

    @property
    def text(self) -> str:
        """As a prompt; legal actions are listed where one word is an action, else they would be the solution."""
        listed = f"\nLegal: {', '.join(self.legal)}" if self.legal and len(self.words) == 1 else ""
        return f"{self.rules}\n{self.state}{listed}"


class GameBatch(EnvBatch):
    """N environments of a game.

    Args:
        task: the game.
        num_envs: N.
        observation: what is observed, by key: "image" (uint8 [H, W, 3]), "state" (symbols), or "both".
        scale: pixels on a side that stand for one of the picture.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}

    def __init__(self, task: Game, *, num_envs: int, observation: str = "image", scale: int = 1) -> None:
        super().__init__(num_envs=num_envs)
        if observation not in OBSERVATIONS:
            raise UserError(f"unknown observation {observation!r}; {nearest(observation, OBSERVATIONS)}")
        if scale < 1:
            raise UserError(f"scale is {scale}; expected at least 1")
        self.task, self.scale, self.max_episode_steps = task, scale, task.limit
        self.now = task.empty(num_envs)
        self.keys, self.thrown = np.zeros((2, num_envs), np.uint64)  # of the dice
        self.invalid_moves = np.zeros(num_envs, np.int64)  # of the running episodes
        self.arrays = ("keys", "thrown", "invalid_moves")
        counts = [len(words) for words in task.words]
        self.action_space = spaces.Discrete(counts[0]) if len(counts) == 1 else spaces.MultiDiscrete(counts)
        self._pictures = self._draw(np.arange(num_envs))
        seen: dict[str, Space] = {
            "image": spaces.Box(0, 255, self._pictures.shape[1:], np.uint8),
            "state": spaces.MultiDiscrete(list(task.sizes)),
        }
        self.shown = OBSERVATIONS[observation]
        self.observation_space = spaces.Dict({key: seen[key] for key in self.shown})

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """Of each choice of an action."""
        return self.task.words

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """New episodes in `rows`, each with dice of its own."""
        self.keys[rows] = [self.generators[row].integers(2**64, dtype=np.uint64) for row in rows]
        self.thrown[rows], self.invalid_moves[rows] = 0, 0
        self._put(rows, self.task.deal(self._dice(rows)))

    def step(self, rows: np.ndarray, actions: np.ndarray) -> Outcome:
        """One decision in `rows`; info counts the invalid moves of the episode."""
        now = self._at(rows)
        valid = self.task.valid(now, actions)
        moves = self.task.move(now, actions, valid, self._dice(rows))
        self._put(rows, now)
        self.invalid_moves[rows] += ~valid
        return Outcome(moves.reward, moves.over, moves.success, {"invalid/moves": self.invalid_moves[rows]})

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Pictures, drawn anew for `rows`, and states."""
        seen: dict[str, np.ndarray] = {}
        if "image" in self.shown:
            if len(rows) == self.num_envs:
                self._pictures = self._draw(rows)
            elif len(rows):
                self._pictures = self._pictures.copy()  # what was given away stays as it is
                self._pictures[rows] = self._draw(rows)
            seen["image"] = self._pictures
        if "state" in self.shown:
            seen["state"] = self.task.symbols(self.now).astype(np.int64)
        return seen

    def describe(self, row: int) -> Description:
        """The position of environment `row` for one who reads, and the words that actions are made of."""
        now = self._at(np.array([row]))
        legal = self.task.legal(now)
        said = None if legal is None else tuple(self.task.say(action) for action in legal)
        return Description(self.task.rules, self.task.tell(now), self.task.words, said)

    def render(self, row: int, mode: str) -> Any:
        """The picture, or the text."""
        return self.describe(row).text if mode == "ansi" else self._draw(np.array([row]))[0]

    def held(self) -> State:
        """With the positions."""
        return super().held() | {f"now/{name}": value for name, value in self.now.items()}

    def _at(self, rows: np.ndarray) -> Position:
        return {name: value[rows] for name, value in self.now.items()}

    def _put(self, rows: np.ndarray, position: Position) -> None:
        for name, value in self.now.items():
            value[rows] = position[name]

    def _dice(self, rows: np.ndarray) -> Dice:
        return Dice(self.keys, self.thrown, rows)

    def _draw(self, rows: np.ndarray) -> np.ndarray:
        pictures = self.task.draw(self._at(rows))
        return pictures if self.scale == 1 else pictures.repeat(self.scale, 1).repeat(self.scale, 2)
