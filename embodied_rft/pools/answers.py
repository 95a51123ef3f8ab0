"""What one environment answered, held against its spaces: nothing of another shape, type or meaning gets further.

Boundary: pure functions on values and spaces. What does not fit raises `Unfit` with what was given and expected; the
pools make an incident of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.names import UserError
from embodied_rft.pools.protocol import is_statistic, is_text


class Unfit(UserError):
    """An answer that an environment of these spaces must not give."""


class Leaf:
    """One leaf of an observation: where it lies in the tree, and what it must look like.

    Args:
        key: of the flat tree, "image/front".
        path: the keys that lead there from the root, ("image", "front").
        space: of the leaf.
    """

    __slots__ = ("dtype", "key", "path", "shape", "text")

    def __init__(self, key: str, path: tuple[Any, ...], space: Space) -> None:
        self.key, self.path, self.text = key, path, is_text(space)
        self.shape: tuple[int, ...] = () if self.text else tuple(space.shape or ())
        self.dtype = np.dtype(object if self.text else space.dtype)

    def empty(self, num_envs: int) -> np.ndarray | list[str]:
        """Zeros [N, ...], or N empty strings."""
        return [""] * num_envs if self.text else np.zeros((num_envs, *self.shape), dtype=self.dtype)

    def at(self, observation: object) -> Any:
        """What lies here in an observation, of one environment or of many; Unfit if there is nothing."""
        value = observation
        for part in self.path:
            if not isinstance(value, Mapping) or part not in value:
                raise Unfit(f"the observation has no {self.key!r}: it is {_short(observation)}")
            value = value[part]
        return value

    def find(self, observation: object) -> np.ndarray | str:
        """This leaf of an observation, in the dtype and shape of the space; Unfit otherwise."""
        value = self.at(observation)
        if type(value) is np.ndarray and value.dtype == self.dtype and value.shape == self.shape:
            return value
        return self.fit(value)

    def fit(self, value: object, lead: tuple[int, ...] = ()) -> np.ndarray | str:
        """`value` of shape [*lead, ...] in the dtype of the space, where nothing is lost by it; Unfit otherwise."""
        if self.text:
            if not isinstance(value, str):
                raise Unfit(f"observation {self.key!r} is {_short(value)}; expected text")
            return value
        try:
            array = np.asarray(value)
        except ValueError:  # a ragged list
            array = np.empty((), dtype=object)
        if array.shape != (*lead, *self.shape) or not fits(array, self.dtype):
            raise Unfit(
                f"observation {self.key!r} is {_short(value)}; the observation space promises {self.dtype} "
                f"{(*lead, *self.shape)}"
            )
        return array.astype(self.dtype, copy=False)


def leaves_of(space: Space, path: tuple[Any, ...] = ()) -> list[Leaf]:
    """The leaves of a space, in the order and with the keys of `protocol.flatten_space`."""
    if not isinstance(space, spaces.Dict):
        return [Leaf("/".join(map(str, path)) or "observation", path, space)]
    return [leaf for key, child in space.spaces.items() for leaf in leaves_of(child, (*path, key))]


def fits(array: np.ndarray, dtype: np.dtype) -> bool:
    """Whether numbers keep their meaning in `dtype`: floats in floats, integers in integers that hold them."""
    if array.dtype == dtype or array.dtype == np.bool_:
        return array.dtype.kind in "bifu"
    if array.dtype.kind not in "ifu":
        return False
    if dtype.kind == "f":
        return True
    return array.dtype.kind in "iu" and bool((array.astype(dtype) == array).all())


def as_reward(value: object) -> float:
    """A reward as one number (an array of one element counts as one); Unfit otherwise."""
    if type(value) is float:
        return value
    if isinstance(value, (int, float, np.number, np.bool_, np.ndarray)) or type(value).__name__ == "Tensor":
        array = np.asarray(value)
        if array.size == 1 and array.dtype.kind in "bifu":
            return float(array.reshape(()))
    raise Unfit(f"the reward is {_short(value)}; expected one number")


def as_truth(value: object, name: str) -> bool:
    """`terminated`, `truncated` or success as a bool; Unfit for anything but True, False, 0 or 1."""
    if value is True or value is False:
        return value
    if isinstance(value, (int, float, np.number, np.bool_, np.ndarray)) or type(value).__name__ == "Tensor":
        array = np.asarray(value)
        if array.size == 1 and array.dtype.kind in "bifu" and array.reshape(()) in (0, 1):
            return bool(array.reshape(()))
    raise Unfit(f"{name} is {_short(value)}; expected True or False")


def success_of(info: object) -> bool | None:
    """Success as `info` tells it under "is_success" or "success"; None where it does not."""
    if not isinstance(info, Mapping):
        raise Unfit(f"info is {_short(info)}; expected a dict")
    for key in ("is_success", "success"):
        if key in info:
            return as_truth(info[key], f"info[{key!r}]")
    return None


def statistics_of(info: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers that `info` tells of an episode that has ended, by name."""
    found: dict[str, float] = {}
    for name, value in info.items():
        if is_statistic(name) and isinstance(value, (int, float, np.number, np.bool_, np.ndarray)):
            array = np.asarray(value)
            if array.size == 1 and array.dtype.kind in "bifu" and np.isfinite(array).all():
                found[name] = float(array.reshape(()))
    return found


def _short(value: object) -> str:
    """A value for a message: arrays by dtype and shape."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array {value.dtype} {value.shape}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {sorted(map(str, value))}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
