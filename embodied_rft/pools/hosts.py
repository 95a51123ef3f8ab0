"""What holds the environments of a pool: the contract of `singles`, `batches` and `workers`, and what they answer.

A host steps environments and says what failed; it judges no number and no seed, that is `pool.VectorPool`.

Legend: N environments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from embodied_rft.data import Action, Space
from embodied_rft.names import UserError
from embodied_rft.pools.answers import Unfit
from embodied_rft.pools.incidents import describe_error, kind_of
from embodied_rft.pools.protocol import Seeding
from embodied_rft.pools.watch import Hang

DEADLINE = 60.0  # seconds
FIRST_TIME = 3  # deadlines that making an environment, and its first reset, may take


@dataclass(slots=True)
class Answer:
    """What N environments answered to one call, failures among them."""

    observation: dict[str, Any]  # [N, ...]; as before where nothing new came
    reward: np.ndarray  # [N]; float32 of a step
    terminated: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool
    success: np.ndarray  # [N] bool
    failed: np.ndarray  # [N] bool
    told: bool = False  # somebody said something about success
    incidents: list[tuple[str, str]] = field(default_factory=list)  # kind and text of what went wrong
    statistics: dict[str, np.ndarray] = field(default_factory=dict)  # of episodes that ended, [N]; NaN: not told

    @classmethod
    def blank(cls, observation: dict[str, Any], num_envs: int) -> Answer:
        """Nothing has happened yet."""
        none = np.zeros((4, num_envs), dtype=np.bool_)
        return cls(observation, np.zeros(num_envs), none[0], none[1], none[2], none[3])

    def note(self, name: str, rows: int | slice | np.ndarray, values: float | np.ndarray) -> None:
        """A statistic of the episodes that ended in `rows`."""
        self.statistics.setdefault(name, np.full(len(self.reward), np.nan))[rows] = values


@runtime_checkable
class SkipsImages(Protocol):
    """A vector environment that need not draw what nobody reads."""

    skip_images: bool  # True: a step draws only where an episode ends


class Host(Protocol):
    """N environments, each call guarded: what one of them does wrong is in the answer."""

    num_envs: int
    first: int = 0  # number of the first environment, for messages
    observation_space: Space  # of a single environment
    action_space: Space
    observation: dict[str, Any]  # the latest of all N, as it was judged good
    seeding: Seeding | None = None  # what seeds promise; found at the first reset

    @property
    def can_save(self) -> bool:
        """Whether the environments can be saved inside an episode."""

    @property
    def unwrapped(self) -> object:
        """The (first) environment itself; None while it is broken, or elsewhere."""
        return None

    def reset(self, seeds: np.ndarray, mask: np.ndarray, options: Mapping[str, Any] | None) -> Answer:
        """New episodes where `mask`; see `pool.VectorPool.reset`."""

    def step(self, action: Action, running: np.ndarray) -> Answer:
        """One step of those that are `running` [N]."""

    def ask(self, name: str) -> object:
        """What the (first) environment says under `name`, called if it is a method; None if it does not have it."""
        found = getattr(self.unwrapped, name, None)
        return found() if callable(found) else found

    def skip_images(self, skip: bool) -> None:
        """Steps may leave images as they were, but where an episode ends: nobody reads them. A hint."""
        if isinstance(env := self.unwrapped, SkipsImages):
            env.skip_images = skip

    def get_state(self) -> dict[str, np.ndarray] | None:
        """Everything needed to continue exactly, or None if the environments cannot tell."""

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `get_state`."""

    def save(self, row: int) -> object:
        """One environment inside its episode, see `states.Branches`; UserError where it cannot be told or copied."""
        raise UserError(f"environments of a {type(self).__name__} cannot be saved one by one")

    def restore(self, row: int, saved: object) -> None:
        """Go on with one from what `save` gave."""
        raise UserError(f"environments of a {type(self).__name__} cannot be restored one by one")

    def close(self) -> None:
        """Close all environments."""


def told_of(error: BaseException) -> tuple[str, str]:
    """(kind of incident, text) of what an environment raised."""
    said = str(error) if isinstance(error, Hang | Unfit) else describe_error(error)
    return kind_of(error), said
