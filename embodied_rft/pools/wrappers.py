"""The state of an environment with its wrappers: exact where every wrapper is known, honestly refused elsewhere.

Boundary: knows Gymnasium's wrappers and the contract `get_state`/`set_state` of environments (docs/plugins.md). A
wrapper of a third party takes part by offering the same two methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium import spaces, wrappers

from embodied_rft.pools.states import Saves, can_save

STATELESS: tuple[type, ...] = (
    wrappers.OrderEnforcing, wrappers.PassiveEnvChecker, wrappers.RecordEpisodeStatistics,
    wrappers.DtypeObservation, wrappers.DiscretizeObservation, wrappers.FilterObservation, wrappers.FlattenObservation,
    wrappers.GrayscaleObservation, wrappers.ResizeObservation, wrappers.ReshapeObservation, wrappers.RescaleObservation,
    wrappers.AddRenderObservation, wrappers.ClipAction, wrappers.DiscretizeAction, wrappers.RescaleAction,
    wrappers.RepeatAction, wrappers.MaxAndSkipObservation, wrappers.ClipReward,
)  # fmt: skip
COUNTERS = {wrappers.TimeLimit: "_elapsed_steps", wrappers.TimeAwareObservation: "timesteps"}


def _layers(env: gymnasium.Env) -> list[Any]:
    """The wrappers, outermost first, and the environment itself."""
    layers: list[Any] = []
    while isinstance(env, gymnasium.Wrapper):
        layers.append(env)
        env = env.env
    return [*layers, env]


def _has_methods(layer: Any) -> bool:
    """Of its own: not what a wrapper passes on from inside."""
    return issubclass(type(layer), Saves)


def _is_known(wrapper: gymnasium.Wrapper) -> bool:
    kind = type(wrapper)
    stacked = kind is wrappers.FrameStackObservation and isinstance(wrapper.env.observation_space, spaces.Box)
    return kind in STATELESS or kind in COUNTERS or stacked or _has_methods(wrapper)


def offers_state(env: gymnasium.Env) -> bool:
    """Whether `single_state` can tell everything that the future of this environment depends on."""
    *outside, base = _layers(env)
    return can_save(base) and all(_is_known(wrapper) for wrapper in outside)


def single_state(env: gymnasium.Env) -> dict[str, np.ndarray] | None:
    """State of one environment and its wrappers; None if it offers no `get_state` or sits in an unknown wrapper."""
    if not offers_state(env):
        return None
    *outside, base = _layers(env)
    state = cast(Any, base).get_state()
    if not isinstance(state, Mapping):
        return None
    state = dict(state)
    for depth, wrapper in enumerate(outside):
        state |= {f"wrapper/{depth}/{key}": value for key, value in _wrapper_state(wrapper).items()}
    return state


def _wrapper_state(wrapper: Any) -> dict[str, np.ndarray]:
    if _has_methods(wrapper):
        return dict(wrapper.get_state())
    if type(wrapper) in COUNTERS:
        count = getattr(wrapper, COUNTERS[type(wrapper)], None)
        return {"count": np.array(-1 if count is None else count, dtype=np.int64)}
    if isinstance(wrapper, wrappers.FrameStackObservation):
        return {"frames": np.stack([np.array(frame) for frame in wrapper.obs_queue])}
    return {}


def set_single_state(env: gymnasium.Env, state: Mapping[str, np.ndarray]) -> None:
    """The inverse of `single_state`, on an environment that has been reset."""
    *outside, base = _layers(env)
    cast(Any, base).set_state({key: value for key, value in state.items() if not key.startswith("wrapper/")})
    for depth, wrapper in enumerate(outside):
        prefix = f"wrapper/{depth}/"
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if _has_methods(wrapper):
            wrapper.set_state(own)
        elif type(wrapper) in COUNTERS:
            setattr(wrapper, COUNTERS[type(wrapper)], None if own["count"] < 0 else int(own["count"]))
        elif isinstance(wrapper, wrappers.FrameStackObservation):
            wrapper.obs_queue.clear()
            wrapper.obs_queue.extend(np.array(frame) for frame in own["frames"])
