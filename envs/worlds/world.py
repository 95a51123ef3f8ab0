"""What environments of other packages have in common: seeds, exact states, words, pictures, an expert's advice.

A world is made of one environment of a package, which is imported when it is made. Boundary: knows no particular
package. States are exact because an episode is what it started from and the actions since: `set_state` plays it again.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Generic, TypeVar

import gymnasium
import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.envs.games.batch import OBSERVATIONS, Description
from embodied_rft.names import UserError, nearest
from embodied_rft.options import check_share
from embodied_rft.seeding import FIRST_EVALUATION_SEED, pack_generator, unpack_generator
from embodied_rft.turns.words import Words

A = TypeVar("A", int, str)  # what an action is
Seen = dict[str, Any]  # an observation


def need(module: str, package: str) -> ModuleType:
    """A module of another package; ValueError with what to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UserError(
            f"this environment comes with the package {package}: pip install '{package}', or what our own tasks need, "
            "pip install 'embodied-rft[tasks]'"
        ) from None


def shown_of(observation: str) -> tuple[str, ...]:
    """The keys that an option `observation` names; ValueError for another word."""
    if observation not in OBSERVATIONS:
        raise UserError(f"unknown observation {observation!r}; {nearest(observation, OBSERVATIONS)}")
    return OBSERVATIONS[observation]


class World(gymnasium.Env[Seen, A], ABC, Generic[A]):
    """One environment of another package.

    Args:
        shown: what is observed, by key, with its space.
        action_space: of the actions.
        expert: whether the observation holds the expert's action under "expert"; see `advise`.
        render_mode: None, "rgb_array" or "ansi".
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 10}  # noqa: RUF012
    words: Words = ()  # of each choice of an action; (): actions are texts

    def __init__(
        self, shown: Mapping[str, Space], action_space: Space, *, expert: bool = False, render_mode: str | None = None
    ) -> None:
        if render_mode is not None and render_mode not in (modes := self.metadata["render_modes"]):
            raise UserError(f"unknown render_mode {render_mode!r}; {nearest(render_mode, modes)}")
        self.expert, self.render_mode, self.action_space = expert, render_mode, action_space
        self.observation_space = spaces.Dict({**shown, **({"expert": action_space} if expert else {})})
        self.start: int | None = None  # what the running episode was begun from
        self.evaluates = False
        self.actions: list[A] = []  # of the running episode
        self.over = False

    # --- what a package does -------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, start: int) -> None:
        """A new episode; all that is random in it follows from `start`."""

    @abstractmethod
    def advance(self, action: A) -> tuple[float, bool, bool, dict[str, Any]]:
        """One decision: reward, terminated, truncated, info."""

    @abstractmethod
    def observe(self) -> dict[str, Any]:
        """What is shown now, without the expert's advice."""

    @abstractmethod
    def describe(self) -> Description:
        """The position for one who reads, and the words that actions are made of."""

    @abstractmethod
    def picture(self) -> np.ndarray | None:
        """How it looks, [H, W, 3] uint8; None: it has no look."""

    def advise(self) -> A:
        """What an expert would do now, who may know more than is observed."""
        raise NotImplementedError

    def choose(self, seed: int | None) -> int:
        """What the next episode is begun from: even numbers in training, odd ones in evaluation."""
        return 2 * int(self.np_random.integers(2**30)) + self.evaluates

    # --- Gymnasium -----------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Seen, dict[str, Any]]:
        """A new episode; there are no reset options."""
        super().reset(seed=seed)
        if options:
            raise UserError(f"unknown reset option {next(iter(options))!r}; this environment has none")
        if seed is not None:
            self.evaluates = seed >= FIRST_EVALUATION_SEED
        self._begin(self.choose(seed))
        return self._seen(), {}

    def step(self, action: A) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """One decision; the environment asks for `reset()` when the episode has ended."""
        if self.start is None or self.over:
            raise gymnasium.error.ResetNeeded("call reset() before step(): no episode is running")
        if not self.action_space.contains(action):
            raise UserError(f"action {action!r:.60} is not in {self.action_space}")
        reward, terminated, truncated, info = self._advance(action)
        return self._seen(), reward, terminated, truncated, info

    def render(self) -> np.ndarray | str | None:
        """The picture, or the text."""
        return self.describe().text if self.render_mode == "ansi" else self.picture() if self.render_mode else None

    def get_state(self) -> dict[str, np.ndarray]:
        """What the running episode was begun from, its actions, and the generator."""
        said = json.dumps(self.actions).encode()
        return {
            "rng": pack_generator(self.np_random),
            "start": np.array([-1 if self.start is None else self.start, self.evaluates], np.int64),
            "actions": np.frombuffer(said, np.uint8).copy(),
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> Seen | None:
        """Continue from `get_state()`, bit by bit: the episode is played again; gives the observation there."""
        unpack_generator(self.np_random, state["rng"])
        start, evaluates = (int(number) for number in state["start"])
        self.evaluates = bool(evaluates)
        if start < 0:
            self.start = None
            return None
        self._begin(start)
        for action in json.loads(bytes(np.asarray(state["actions"], np.uint8))):
            self._advance(action)
        return self._seen()

    def _begin(self, start: int) -> None:
        self.start, self.actions, self.over = start, [], False
        self.begin(start)

    def _advance(self, action: A) -> tuple[float, bool, bool, dict[str, Any]]:
        self.actions.append(action if isinstance(action, str) else int(action))  # a NumPy integer is no JSON
        reward, terminated, truncated, info = self.advance(self.actions[-1])
        self.over = terminated or truncated
        return reward, terminated, truncated, info

    def _seen(self) -> dict[str, Any]:
        return {**self.observe(), **({"expert": self.advise()} if self.expert else {})}


class Follower(ABC, Generic[A]):
    """A demonstrator that does what the environment's expert advises.

    Args:
        noise: share of decisions that are something else, in [0, 1].
    """

    def __init__(self, *, noise: float = 0.0) -> None:
        self.noise = check_share("noise", noise, "other decisions")

    def act(self, observation: Mapping[str, Any], rng: np.random.Generator) -> list[str] | np.ndarray:
        """Actions for N observations; `rng` is drawn from only if there is noise."""
        if "expert" not in observation:
            raise UserError("the expert's advice is not observed: set env.options.expert to true")
        advice = list(observation["expert"])
        if self.noise:
            wrong = rng.random(len(advice)) < self.noise
            advice = [self.other(rng) if w else a for a, w in zip(advice, wrong)]
        return advice if advice and isinstance(advice[0], str) else np.array(advice)

    @abstractmethod
    def other(self, rng: np.random.Generator) -> A:
        """Something else than what is advised."""
