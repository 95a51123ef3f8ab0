"""Environments that are known but not there: what they show and take, written down, and a host that only says it.

Networks follow from spaces alone, so a policy can be built again where its environment is not installed. Boundary:
knows Gymnasium's spaces and those of `text_spaces`; a space of another class is not described.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Action, Space
from embodied_rft.pools.hosts import Answer, Host
from embodied_rft.pools.protocol import Pool
from embodied_rft.pools.text_spaces import AnyText, ChatText

KINDS: tuple[type[Space], ...] = (
    spaces.Dict, spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Text
)  # fmt: skip
TEXTS = {cls.__name__: cls for cls in (AnyText, ChatText)}  # they know their letters
Description = dict[str, Any]  # plain data and arrays, as a checkpoint holds them


def describe(space: Space) -> Description | None:
    """A space as plain data, from which `space_of` makes an equal one; None: a class that is not known here."""
    name = type(space).__name__
    if type(space) not in (*KINDS, *TEXTS.values()):
        return None
    if isinstance(space, spaces.Dict):
        leaves = {str(key): describe(child) for key, child in space.spaces.items()}
        return {"kind": name, "leaves": leaves, "keys": list(leaves)} if all(leaves.values()) else None
    if isinstance(space, spaces.Box):
        return {"kind": name, "low": space.low, "high": space.high}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": name, "n": list(space.shape)}
    if isinstance(space, spaces.Text):
        limits = {"max_length": space.max_length, "min_length": space.min_length}
        return {"kind": name, "charset": "".join(sorted(space.character_set)), **limits}
    assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    dtype = {"dtype": np.dtype(space.dtype).name}
    if isinstance(space, spaces.Discrete):
        return {"kind": name, "n": int(space.n), "start": int(space.start), **dtype}
    return {"kind": name, "nvec": space.nvec, "start": space.start, **dtype}


def space_of(given: Mapping[str, Any]) -> Space:
    """The space that `describe` wrote down."""
    options = {key: value for key, value in given.items() if key != "kind"}
    if given["kind"] in TEXTS:
        return TEXTS[given["kind"]](given["max_length"])
    kind = {cls.__name__: cls for cls in KINDS}[given["kind"]]
    if kind is spaces.Dict:
        return spaces.Dict({key: space_of(given["leaves"][key]) for key in given["keys"]})
    if kind is spaces.Box:
        return spaces.Box(**options, dtype=given["low"].dtype.type)
    if "dtype" in given:
        options["dtype"] = np.dtype(given["dtype"]).type
    return kind(**options)


def describe_pool(pool: Pool) -> Description | None:
    """What the environments of a pool show and take; None if one of the spaces cannot be described."""
    shown, taken = describe(pool.observation_space), describe(pool.action_space)
    return None if shown is None or taken is None else {"observation": shown, "action": taken}


class Described(Host):
    """One environment that cannot run: it has spaces."""

    num_envs = 1
    can_save = False

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.observation_space, self.action_space = space_of(given["observation"]), space_of(given["action"])
        self.observation = {}

    def reset(self, seeds: np.ndarray, mask: np.ndarray, options: Mapping[str, Any] | None) -> Answer:
        """Refused."""
        raise RuntimeError("these environments were not made: only what they show and take is known")

    def step(self, action: Action, running: np.ndarray) -> Answer:
        """Never asked: a pool steps what was reset."""
        raise NotImplementedError

    def get_state(self) -> None:
        """Nothing runs."""

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Likewise."""

    def close(self) -> None:
        """Nothing to free."""
