"""Which of the tasks that come up are played: the contract of curricula (plug-ins of kind "curriculum"), and the sieve.

A task is what an episode shows first. Seeds go on as ever, and a curriculum lets some of the episodes that they begin
pass by: it works for any environment, with tasks that are few, or new each time, and needs no list of them. Boundary:
knows observations and outcomes, no agent; who can say what a task promises gives a `Foresee`.
Legend: N environments, K episodes that begin, in as many of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from embodied_rft import distributed
from embodied_rft.data import Tree
from embodied_rft.names import UserError
from embodied_rft.registry import contract
from embodied_rft.seeding import spawn_generator

Foresee = Callable[[Tree], np.ndarray]  # how likely a task is to be done, [K] in [0, 1], by what it shows first
STREAM = 2**32 - 1  # of the random numbers that are drawn here; those of episodes have numbers of processes


@contract("curriculum")
class Curriculum(ABC):
    """The chance of each task to be played. Made as `cls(config)`, where `Config` is a dataclass of its options.

    Whatever it learns from outcomes is in `state_dict`, so that a run that was killed goes on to the bit.
    """

    Config: ClassVar[Any]
    foresees: ClassVar[bool] = False  # it asks what a task promises: the objective must be able to say so

    def names(self, observation: Tree) -> Sequence[str]:
        """[K] the names of the tasks under which it wants to `hear` of them; nothing by default."""
        return [""] * len(next(iter(observation.values())))

    @abstractmethod
    def chances(self, names: Sequence[str], observation: Tree, foresee: Foresee) -> np.ndarray:
        """[K] in (0, 1]: the others are passed over, and other episodes take their places.

        Args:
            names: what `names` made of it.
            observation: what the episodes show first, each [K, ...].
            foresee: see `foresees`.
        """

    def hear(self, names: Sequence[str], success: np.ndarray) -> None:
        """How episodes have ended [K]; nothing by default."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What was learned: arrays and JSON scalars."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        return None


class Sieve:
    """Draws whether episodes are played, and remembers which tasks they are.

    Siblings of a group are played together or not at all: their draw is that of the group, and depends on the run, the
    process and the group's number alone.

    Args:
        curriculum: whose chances count.
        foresee: what it may ask.
        run_seed: of the run.
        num_envs: N.
    """

    def __init__(self, curriculum: Curriculum, foresee: Foresee, *, run_seed: int, num_envs: int) -> None:
        self.curriculum, self.foresee, self.run_seed = curriculum, foresee, run_seed
        self.names = [""] * num_envs  # of the episode of each environment

    def passes(self, streams: np.ndarray, groups: np.ndarray, observation: Tree) -> np.ndarray:
        """[K] bool: whether the group is played, for each of its episodes that begin in `streams` [K].

        Args:
            streams: [K] environments.
            groups: [K] numbers of the groups.
            observation: each [K, ...].
        """
        names = list(self.curriculum.names(observation))
        chances = np.asarray(self.curriculum.chances(names, observation, self.foresee), np.float64)
        if chances.shape != groups.shape or not ((chances > 0) & (chances <= 1)).all():
            raise UserError(
                f"curriculum {type(self.curriculum).__name__} gave chances {chances}: {groups.shape} numbers in (0, 1] "
                "are expected; a task of chance 0 would be waited for without end"
            )
        for stream, name in zip(streams.tolist(), names, strict=True):
            self.names[stream] = name
        drawn = [spawn_generator(self.run_seed, STREAM, distributed.rank(), int(g)).random() for g in groups]
        _, first, which = np.unique(groups, return_index=True, return_inverse=True)
        return np.asarray((np.array(drawn) < chances)[first][which])

    def hear(self, streams: np.ndarray, success: Sequence[bool]) -> None:
        """The episodes of these environments have ended so."""
        self.curriculum.hear([self.names[stream] for stream in streams.tolist()], np.asarray(success, bool))

    def state_dict(self) -> dict[str, Any]:
        """Everything that it needs to go on."""
        return {"names": list(self.names), "curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.names = list(state["names"])
        self.curriculum.load_state_dict(state["curriculum"])
