"""Environments stepped together: the in-process pool and `make_pool`, the door to all kinds of pools.

Boundary: knows Gymnasium and nothing of policies, buffers or algorithms. Processes live in `workers`, the protocol and
its types in `stepping`. A pool never resets an environment by itself; it keeps NaN, wrong shapes and seeds of the
wrong purpose out.

Legend: N environments, A action dimensions.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Literal, cast

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from embodied_rft.data import Ragged, Tree
from embodied_rft.registry import load_plugins, nearest
from embodied_rft.stepping import (
    Incidents,
    Pool,
    Purpose,
    StepResult,
    check_action,
    check_mask,
    check_seeds,
    decode_text,
    encode_text,
    field_of,
    fields_of,
    finite_rows,
    flatten_observation,
    flatten_space,
    merge,
)
from embodied_rft.workers import WorkerPool

__all__ = [
    "Incidents",
    "Pool",
    "Purpose",
    "StepResult",
    "VectorPool",
    "WorkerPool",
    "decode_text",
    "encode_text",
    "fields_of",
    "find_spec",
    "flatten_space",
    "make_pool",
]

Kind = Literal["auto", "native", "sync", "workers"]
KINDS = ("auto", "native", "sync", "workers")


class VectorPool:
    """A Pool over a `gymnasium.vector.VectorEnv` in this process (native batch or SyncVectorEnv).

    The vector environment must have been made with AutoresetMode.DISABLED and honour `options={"reset_mask": mask}`.
    """

    def __init__(self, vector_env: VectorEnv, *, purpose: Purpose = "training") -> None:
        mode = vector_env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            raise ValueError(
                f"the vector environment resets by itself (autoreset_mode {mode}); a pool needs episodes that are "
                "reset from outside. Make it with autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED."
            )
        if purpose not in ("training", "evaluation"):
            raise ValueError(f"purpose is {purpose!r}; expected 'training' or 'evaluation'")
        self.vector_env = vector_env
        self.purpose: Purpose = purpose
        self.num_envs: int = vector_env.num_envs
        self.observation_space: spaces.Space = vector_env.single_observation_space
        self.action_space: spaces.Space = vector_env.single_action_space
        self.fields = fields_of(self.observation_space)
        self.action_field = field_of("action", self.action_space)
        self.incidents = Incidents()
        self._observation: dict[str, Any] = {}  # the latest of all N; empty before the first reset
        self._idle = np.ones(self.num_envs, dtype=np.bool_)  # no episode is running
        self._ended = np.ones(self.num_envs, dtype=np.bool_)  # the vector environment wants a reset
        self._bad_start = np.zeros(self.num_envs, dtype=np.bool_)  # the reset gave NaN: the first step is invalid
        self._reports_success = False
        self._closed = False

    @property
    def can_save(self) -> bool:
        """Whether `get_state` works inside an episode."""
        return _offers_state(self.vector_env)

    @property
    def observation(self) -> Tree:
        """The current observation of all N, as the last call gave it; empty before the first reset."""
        return dict(self._observation)

    def reset(self, seeds: Any, mask: np.ndarray | None = None, options: Mapping[str, Any] | None = None) -> Tree:
        """Start new episodes where `mask`; `options` go to every environment that is reset.

        Args:
            seeds: [N] integers; only those under the mask count.
            mask: [N] bool, None means all.
            options: per-reset options of the environment, the same for all.

        Returns:
            The current observation of all N environments.
        """
        mask = check_mask(mask, num_envs=self.num_envs)
        chosen = np.where(mask, check_seeds(seeds, mask, purpose=self.purpose), 0)
        # The very first reset of a vector environment must be a full one; environments outside the mask stay idle.
        applied = mask if self._observation else np.ones_like(mask)
        new = self._reset(chosen, applied, options)
        bad = self._clean(new, np.zeros(self.num_envs, dtype=np.float32))
        self._bad_start = np.where(mask, bad, self._bad_start)
        self._idle = self._idle & ~mask
        self._observation = merge(applied, new, self._observation)
        return dict(self._observation)

    def _reset(self, seeds: np.ndarray, mask: np.ndarray, options: Mapping[str, Any] | None) -> dict[str, Any]:
        seed = cast(Any, [int(seed) for seed in seeds])
        batch, _ = self.vector_env.reset(seed=seed, options={**(options or {}), "reset_mask": mask})
        self._ended = self._ended & ~mask
        return flatten_observation(self.observation_space, batch)

    def step(self, action: Any) -> StepResult:
        """Execute one action in every environment; see `StepResult`; idle ones are not heard."""
        idle = self._idle
        if idle.all():
            raise RuntimeError("no environment has a running episode: call reset before step")
        action = check_action(action, self.action_space, num_envs=self.num_envs)
        if self._ended.any():
            self._reset(np.zeros(self.num_envs, dtype=np.int64), self._ended.copy(), None)
        batch, rewards, terminations, truncations, infos = self.vector_env.step(
            tuple(action) if isinstance(action, list) else action
        )
        terminations, truncations = np.asarray(terminations, dtype=np.bool_), np.asarray(truncations, dtype=np.bool_)
        self._ended = terminations | truncations
        muted = idle | self._bad_start
        new = merge(~muted, flatten_observation(self.observation_space, batch), self._observation)
        reward = np.where(muted, np.float32(0), np.asarray(rewards, dtype=np.float32))
        broken = self._clean(new, reward)
        if broken.any():
            new = merge(~broken, new, self._observation)
        valid = ~(broken | muted)
        reward = np.where(valid, reward, np.float32(0))
        terminated, truncated = terminations & valid, truncations | ~valid
        self._idle, self._bad_start, self._observation = terminated | truncated, np.zeros_like(idle), new
        return StepResult(dict(new), reward, terminated, truncated, self._info(infos, valid), valid)

    def skip_images(self, skip: bool) -> None:
        """Whether steps may leave images as they were, but where an episode ends: nobody reads them. A hint."""
        if hasattr(self.vector_env, "skip_images"):
            self.vector_env.skip_images = skip

    def _clean(self, observation: dict[str, Any], reward: np.ndarray) -> np.ndarray:
        """[N] bool of rows with non-finite numbers; they are reported, and set to zero in place."""
        invalid = np.zeros(self.num_envs, dtype=np.bool_)
        for key, value in {**observation, "reward": reward}.items():
            finite = finite_rows(value, num_envs=self.num_envs)
            if finite is None:
                continue
            rows = np.flatnonzero(~finite)
            name = "reward" if value is reward else f"observation {key!r}"
            self.incidents.add("non_finite", f"{name} of environments {rows.tolist()} is NaN or infinite")
            invalid |= ~finite
            if value is not reward:
                observation[key] = np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
        return invalid

    def _info(self, infos: Mapping[str, Any], valid: np.ndarray) -> dict[str, np.ndarray]:
        """{"success": [N] bool}, always from the first time on that an environment reported it."""
        for key in ("is_success", "success"):
            if key in infos:
                self._reports_success = True
                present = np.asarray(infos.get(f"_{key}", True), dtype=np.bool_)
                return {"success": np.asarray(infos[key]).astype(np.bool_) & present & valid}
        return {"success": np.zeros(self.num_envs, dtype=np.bool_)} if self._reports_success else {}

    def get_state(self) -> dict[str, np.ndarray] | None:
        """The state of every environment and of this pool, or None if the environments do not offer `get_state`."""
        state = _vector_state(self.vector_env)
        if state is None or not self._observation:
            return None
        state |= {f"pool/{name}": getattr(self, f"_{name}").copy() for name in ("idle", "ended", "bad_start")}
        state["pool/reports_success"] = np.array(self._reports_success)
        for key, value in self._observation.items():
            if isinstance(value, list):
                text = encode_text(value)
                state |= {f"pool/text/{key}": text.values, f"pool/offsets/{key}": text.offsets}
            else:
                state[f"pool/observation/{key}"] = value.copy()
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue bit for bit from `get_state` of a pool of the same environments."""
        if len(state["pool/idle"]) != self.num_envs:
            raise ValueError(
                f"the state is of {len(state['pool/idle'])} environments; this pool has {self.num_envs}. "
                "Use the same num_envs as the run that wrote it."
            )
        if not self._observation:
            self.vector_env.reset(seed=cast(Any, [0] * self.num_envs))  # fills what no state holds
        _set_vector_state(self.vector_env, {k: v for k, v in state.items() if not k.startswith("pool/")})
        for name in ("idle", "ended", "bad_start"):
            setattr(self, f"_{name}", state[f"pool/{name}"].astype(np.bool_))
        if isinstance(self.vector_env, SyncVectorEnv):  # keeps this mark outside its environments
            self.vector_env._autoreset_envs = self._ended.copy()
        self._reports_success = bool(state["pool/reports_success"])
        for key, each in self.fields.items():
            if each.kind == "ragged":
                self._observation[key] = decode_text(Ragged(state[f"pool/text/{key}"], state[f"pool/offsets/{key}"]))
            else:
                self._observation[key] = state[f"pool/observation/{key}"].copy()

    def close(self) -> None:
        """Close the environments; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self.vector_env.close()


def _offers_state(env: VectorEnv) -> bool:
    if hasattr(env, "get_state") and hasattr(env, "set_state"):
        return True
    return isinstance(env, SyncVectorEnv) and all(
        _time_limits(single) is not None and hasattr(single.unwrapped, "get_state") for single in env.envs
    )


def _vector_state(env: VectorEnv) -> dict[str, np.ndarray] | None:
    if not _offers_state(env):
        return None
    if not isinstance(env, SyncVectorEnv):
        return dict(cast(Any, env).get_state())
    states = {index: single_state(single) for index, single in enumerate(env.envs)}
    return {f"env/{index}/{key}": value for index, one in states.items() for key, value in (one or {}).items()}


def _set_vector_state(env: VectorEnv, state: dict[str, np.ndarray]) -> None:
    if hasattr(env, "set_state"):
        env.set_state(state)
        return
    if not isinstance(env, SyncVectorEnv):
        raise ValueError(f"{env} offers no set_state: it cannot continue inside an episode")
    for index, single in enumerate(env.envs):
        prefix = f"env/{index}/"
        set_single_state(single, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _time_limits(env: gymnasium.Env) -> list[TimeLimit] | None:
    """The TimeLimit wrappers, outermost first; None if an unknown wrapper may hold further state."""
    limits: list[TimeLimit] = []
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, TimeLimit):
            limits.append(env)
        elif not isinstance(env, OrderEnforcing | PassiveEnvChecker):
            return None
        env = env.env
    return limits


def single_state(env: gymnasium.Env) -> dict[str, np.ndarray] | None:
    """State of one environment and its time limits; None if it offers no `get_state` or sits in an unknown wrapper."""
    limits, base = _time_limits(env), env.unwrapped
    if limits is None or not (hasattr(base, "get_state") and hasattr(base, "set_state")):
        return None
    steps = np.array([-1 if limit._elapsed_steps is None else limit._elapsed_steps for limit in limits], dtype=np.int64)
    return {**base.get_state(), "time_limit/elapsed_steps": steps}


def set_single_state(env: gymnasium.Env, state: Mapping[str, np.ndarray]) -> None:
    """The inverse of `single_state`."""
    limits, base = _time_limits(env), cast(Any, env.unwrapped)
    assert limits is not None
    base.set_state({key: value for key, value in state.items() if key != "time_limit/elapsed_steps"})
    for limit, steps in zip(limits, state["time_limit/elapsed_steps"], strict=True):
        cast(Any, limit)._elapsed_steps = None if steps < 0 else int(steps)


# ---------------------------------------------------------------------------------------------------------------------
# Making pools
# ---------------------------------------------------------------------------------------------------------------------


def find_spec(id: str | EnvSpec) -> EnvSpec:
    """The registered specification of an environment id; ValueError with the nearest known id.

    "package.module:Id-v0" imports the module first, as `gymnasium.make` does.
    """
    if isinstance(id, EnvSpec):
        return id
    module, _, name = id.rpartition(":")
    if module:
        importlib.import_module(module)
    if name not in gymnasium.registry:
        load_plugins()
    if name not in gymnasium.registry:
        raise ValueError(f"unknown environment {name!r}; {nearest(name, gymnasium.registry)}")
    return gymnasium.spec(name)


def supports_native(spec: EnvSpec) -> bool:
    """Whether the registered vector form lets itself be reset from outside (takes `autoreset_mode`)."""
    entry = spec.vector_entry_point
    if entry is None:
        return False
    creator = load_env_creator(entry) if isinstance(entry, str) else entry
    parameters = inspect.signature(creator).parameters
    return "autoreset_mode" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def make_pool(
    id: str | EnvSpec,
    num_envs: int,
    *,
    options: Mapping[str, Any] | None = None,
    kind: Kind = "auto",
    num_workers: int | None = None,
    purpose: Purpose = "training",
) -> Pool:
    """N environments of one id behind the Pool protocol.

    Args:
        id: a registered Gymnasium id, or its specification.
        num_envs: N >= 1.
        options: constructor arguments of the environment.
        kind: "native" (batched on native threads), "sync" (one after the other), "workers" (processes), or "auto":
            native if the id offers it, else sync.
        num_workers: processes of kind "workers" (default: one per core, at most N); an error with other kinds.
        purpose: which seeds the pool accepts: "training" (< 2**31) or "evaluation" (>= 2**31).

    Raises:
        ValueError: unknown id or kind, options that the environment refuses, a native form that does not exist.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of pool {kind!r}; {nearest(kind, KINDS)}")
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}; expected at least 1")
    if num_workers and kind != "workers":
        raise ValueError(f"num_workers={num_workers} has no effect with kind {kind!r}: use kind 'workers' or drop it")
    spec = find_spec(id)
    if kind == "workers":
        make_slice = functools.partial(make_pool, spec, options=options, purpose=purpose)
        return WorkerPool(make_slice, num_envs=num_envs, num_workers=num_workers, purpose=purpose)
    native = supports_native(spec)
    if kind == "native" and not native:
        raise ValueError(
            f"{spec.id!r} has no native vector form that takes autoreset_mode; use kind 'sync' or 'workers' for it"
        )
    vector_env = _make_vector(spec, num_envs, dict(options or {}), native=native and kind != "sync")
    return VectorPool(vector_env, purpose=purpose)


def _make_vector(spec: EnvSpec, num_envs: int, options: dict[str, Any], *, native: bool) -> VectorEnv:
    try:
        if native:
            options = {**options, "autoreset_mode": AutoresetMode.DISABLED}
            return gymnasium.make_vec(spec, num_envs=num_envs, vectorization_mode="vector_entry_point", **options)
        return SyncVectorEnv(
            [lambda: gymnasium.make(spec, **options) for _ in range(num_envs)], autoreset_mode=AutoresetMode.DISABLED
        )
    except TypeError as error:
        raise ValueError(f"environment {spec.id!r} refused its options {options}: {error}") from error
