"""What every pool shares: the Pool protocol, its step result, observation trees, and the checks at the door.

Boundary: pure functions on Gymnasium spaces and arrays, and small types; no environment is made or stepped here.

Legend: N environments, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike

from embodied_rft.data import Action, Field, Ragged, Space, Tree
from embodied_rft.names import UserError
from embodied_rft.pools.incidents import Incidents as Incidents
from embodied_rft.seeding import FIRST_EVALUATION_SEED, check_training_seeds

Purpose = Literal["training", "evaluation"]
LARGEST = float(np.finfo(np.float32).max)


@dataclass(slots=True)
class StepResult:
    """What N environments answered to one step; the arrays are fresh, a pool never writes into them again.

    Two Fetch environments, the second just crashed: StepResult(observation={"observation": [2, 25], ...},
    reward=[-1., 0.], terminated=[False, False], truncated=[False, True], info={"success": [False, False]},
    valid=[True, False]).
    """

    observation: Tree  # each [N, ...], or a list of N strings; the last good observation where a step is invalid
    reward: np.ndarray  # [N] float32
    terminated: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool; True where invalid, so that every loop resets it
    # {"success": [N] bool} if the environment reports is_success or success; and where episodes end, what it tells of
    # them under names with a slash, as floats [N]: "invalid/no_answer", NaN of those that go on
    info: dict[str, np.ndarray]
    valid: np.ndarray  # [N] bool; False: crash, hang, non-finite numbers or idle: learn nothing from this row

    def statistics(self, rows: np.ndarray) -> dict[str, list[float]]:
        """What the environments tell of the episodes that ended in `rows` [K], by name; at most K numbers each."""
        found = {name: values[rows] for name, values in self.info.items() if is_statistic(name)}
        return {name: values[~np.isnan(values)].tolist() for name, values in found.items()}


@dataclass(frozen=True)
class Seeding:
    """How an environment is seeded, and what that promises.

    An environment that draws from `numpy.random` and takes C integers: Seeding("global", narrow=True, repeats=True).
    """

    way: str = "reset"
    narrow: bool = False  # seeds reach the environment with 31 bits
    repeats: bool = True  # one seed always gives one initial state
    varies: bool = True  # two seeds give two

    @property
    def held_out(self) -> bool:
        """Whether evaluation starts from states that can be promised, and that training never saw."""
        return self.repeats and self.varies

    @property
    def note(self) -> str:
        """What a run should say about it; empty where all is as it should be."""
        if not self.repeats:
            return (
                "the environment ignores its seed, and no other way of seeding it was found: held-out initial states "
                "cannot be promised, evaluations are not repeatable"
            )
        if not self.varies:
            return (
                "the environment starts from the same state whatever the seed: evaluation has no initial states that "
                "training never saw"
            )
        return ""


@dataclass(frozen=True, slots=True)
class Branch:
    """One environment of a pool in the middle of an episode: `pool.restore(row, branch)` goes on from there."""

    environment: object  # what its host saved
    observation: dict[str, Any]  # of one: what it shows
    seed: int  # from which its episode began
    idle: bool  # no episode is running


class Pool(Protocol):
    """N environments that step together. There is no autoreset: who steps a pool resets what has ended.

    An environment that has ended (or broke) and was not reset is idle: its row of the action is ignored, its
    observation stays, its steps come back with valid False. A class derived from this has the defaults.
    """

    num_envs: int
    observation_space: Space  # of a single environment
    action_space: Space
    fields: dict[str, Field]  # observation columns as a buffer stores them
    action_field: Field
    incidents: Incidents

    @property
    def can_save(self) -> bool:
        """Whether `get_state` works inside an episode."""

    @property
    def observation(self) -> Tree:
        """The current observation of all N, as the last call gave it."""

    @property
    def seeding(self) -> Seeding | None:
        """What seeds promise; None: not known (yet)."""
        return None

    def reset(self, seeds: ArrayLike, mask: np.ndarray | None = None, options: Mapping[str, Any] | None = None) -> Tree:
        """Start new episodes from `seeds` [N] where `mask` [N] (default: all); returns the observation of all N."""

    def step(self, action: Action) -> StepResult:
        """Execute `action` ([N, A], [N] integers or a list of N strings)."""

    def skip_images(self, skip: bool) -> None:
        """Steps may leave images as they were, but where an episode ends: nobody reads them. A hint."""
        return None

    def ask(self, name: str) -> Any:
        """What the (first) environment says under `name`, called if it is a method; None: nothing (see `states`)."""
        return None

    def get_state(self) -> dict[str, np.ndarray] | None:
        """Everything needed to continue exactly, or None if the environments cannot tell."""

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `get_state` gave."""

    def save(self, row: int) -> Branch:
        """One environment in the middle of its episode; UserError where it can be neither told nor copied."""
        raise UserError(f"in a {type(self).__name__} episodes cannot branch: take a pool of single steps")

    def restore(self, row: int, branch: Branch) -> None:
        """Go on from a branch in any place: one state may be gone on with in many environments at once."""
        raise UserError(f"in a {type(self).__name__} episodes cannot branch: take a pool of single steps")

    def close(self) -> None:
        """Free everything; a second call does nothing."""


# ---------------------------------------------------------------------------------------------------------------------
# Spaces and observations
# ---------------------------------------------------------------------------------------------------------------------


def is_text(space: Space) -> bool:
    """Whether values of this space are strings: Text, and spaces of one's own with dtype str."""
    return isinstance(space, spaces.Text) or (space.dtype is not None and np.dtype(space.dtype).kind == "U")


def untold_value(dtype: np.dtype[Any]) -> float:
    """What stands in a column of `info` where nothing is told: NaN, or 0 where there is none."""
    return np.nan if dtype.kind == "f" else 0


def is_statistic(name: object) -> bool:
    """Whether a key of `info` names a number that is told of a whole episode at its end: "invalid/no_answer"."""
    return isinstance(name, str) and "/" in name and not name.startswith("_")


def flatten_space(space: Space, *, prefix: str = "") -> dict[str, Space]:
    """Leaf spaces by key: Dict -> its keys, nesting joined by "/"; anything else -> {"observation": space}."""
    if not isinstance(space, spaces.Dict):
        return {prefix or "observation": space}
    leaves: dict[str, Space] = {}
    for key, child in space.spaces.items():
        leaves |= flatten_space(child, prefix=f"{prefix}/{key}" if prefix else str(key))
    return leaves


def fields_of(space: Space) -> dict[str, Field]:
    """Columns for observations of `space`: floats as float32, other dtypes as they are, text as strings.

    Raises:
        ValueError: for a space without fixed-size or text leaves (Tuple, Graph, Sequence, OneOf).
    """
    return {key: field_of(key, leaf) for key, leaf in flatten_space(space).items()}


def field_of(key: str, space: Space) -> Field:
    """The column for one leaf space; `key` is only for the error text."""
    if is_text(space):
        return Field((), "str", "ragged")
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        assert space.dtype is not None and space.shape is not None
        dtype = "float32" if np.issubdtype(space.dtype, np.floating) else np.dtype(space.dtype).name
        return Field(tuple(space.shape), dtype)
    raise UserError(
        f"{key!r} has the space {type(space).__name__}; expected Box, Discrete, MultiDiscrete, MultiBinary, Text or a "
        "Dict of them. Wrap the environment so that it gives one of these."
    )


def check_action(action: Action, space: Space, *, num_envs: int) -> np.ndarray | list[str]:
    """`action` for `num_envs` environments in the dtype of `space`; ValueError on a wrong shape, kind or value."""
    if is_text(space):
        if isinstance(action, str) or len(action) != num_envs or not all(isinstance(a, str) for a in action):
            raise UserError(f"expected a list of {num_envs} strings, one action per environment, given {action!r:.80}")
        return list(action)
    array = np.asarray(action)
    expected = (num_envs, *(space.shape or ()))
    if array.shape != expected:
        raise UserError(f"action has shape {array.shape}; expected {expected}: one row for each environment")
    if isinstance(space, spaces.Box):
        finite = np.isfinite(array)
        if not finite.all():
            bad = int(np.argmin(finite.reshape(num_envs, -1).all(axis=1)))
            raise UserError(
                f"action of environment {bad} is not finite: {array[bad]}. The policy produced NaN or infinity: "
                "look at its learning rate, its inputs and the gradient norm."
            )
    elif not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"action has dtype {array.dtype}; expected integers for the action space {space}")
    if isinstance(space, spaces.Discrete) and ((array < space.start) | (array >= space.start + space.n)).any():
        raise UserError(f"actions {array.tolist()} are not all in {space}")
    return array.astype(space.dtype, copy=False)


def check_seeds(seeds: ArrayLike, mask: np.ndarray, *, purpose: Purpose) -> np.ndarray:
    """`seeds` [N] as int64; those under `mask` must belong to `purpose` (see `seeding`)."""
    array = np.asarray(seeds)
    if array.shape != mask.shape or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"seeds are {array.dtype} {array.shape}; expected integers {mask.shape}: one per environment")
    used = array[mask]
    if purpose == "training":
        check_training_seeds(used)
    elif (used < FIRST_EVALUATION_SEED).any():
        bad = int(used[used < FIRST_EVALUATION_SEED][0])
        raise UserError(
            f"seed {bad} is a training seed (< 2**31): evaluation must start from states that training never saw. Use "
            "seeding.evaluation_seed(index)."
        )
    if (used < 0).any():
        raise UserError(f"seed {int(used.min())} is negative; expected 0 <= seed < 2**32")
    return array.astype(np.int64)


def check_mask(mask: np.ndarray | None, *, num_envs: int) -> np.ndarray:
    """`mask` as [N] bool with at least one True; None means all."""
    if mask is None:
        return np.ones(num_envs, dtype=np.bool_)
    mask = np.asarray(mask)
    if mask.shape != (num_envs,) or mask.dtype != np.bool_ or not mask.any():
        raise UserError(f"mask is {mask.dtype} {mask.shape}; expected bool ({num_envs},) with at least one True")
    return mask


def merge(mask: np.ndarray, new: Tree, old: Tree) -> dict[str, Any]:
    """Rows of `new` where `mask` [N], else rows of `old`; no copy when the mask is full."""
    if mask.all():
        return dict(new)

    def either(a: Any, b: Any) -> Any:
        if isinstance(a, list):
            return [x if chosen else y for x, y, chosen in zip(a, b, mask, strict=True)]
        return np.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return {key: either(value, old[key]) for key, value in new.items()}


def pack_observation(observation: Tree) -> dict[str, np.ndarray]:
    """An observation of N as arrays alone, for a state; copies."""
    packed: dict[str, np.ndarray] = {}
    for key, value in observation.items():
        if isinstance(value, list):
            text = Ragged.of_texts(value)
            packed |= {f"text/{key}": text.values, f"offsets/{key}": text.offsets}
        else:
            packed[f"observation/{key}"] = value.copy()
    return packed


def unpack_observation(packed: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `pack_observation` packed; copies."""
    observation: dict[str, Any] = {}
    for name, value in packed.items():
        kind, _, key = name.partition("/")
        if kind == "text":
            observation[key] = Ragged(value, packed[f"offsets/{key}"]).texts()
        elif kind == "observation":
            observation[key] = value.copy()
    return observation


def finite_rows(array: object, *, num_envs: int) -> np.ndarray | None:
    """[N] bool, or None when every number is finite as the float32 that is stored: the common case costs one pass."""
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        return None
    finite = np.isfinite(array) if array.dtype.itemsize <= 4 else np.abs(array) <= LARGEST
    return None if finite.all() else np.asarray(finite.reshape(num_envs, -1).all(axis=1))
