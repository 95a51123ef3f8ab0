"""Environments stepped together: the in-process pool and `make_pool`, the door to all kinds of pools.

Boundary: knows Gymnasium and nothing of policies, buffers or algorithms. Single environments live in `singles`, a
native form in `batches`, processes in `workers`, the protocol and its types in `protocol`. A pool never resets an
environment by itself; it keeps NaN, answers that do not fit and seeds of the wrong purpose out.

Legend: N environments, A action dimensions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import ArrayLike

from embodied_rft.data import Action, Tree
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.batches import Batch
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.hosts import DEADLINE, Answer, Host
from embodied_rft.pools.incidents import MAX_INCIDENTS, Incidents
from embodied_rft.pools.making import find_spec, make_single
from embodied_rft.pools.protocol import (
    Branch,
    Pool,
    Purpose,
    Seeding,
    StepResult,
    check_action,
    check_mask,
    check_seeds,
    field_of,
    fields_of,
    finite_rows,
    merge,
    pack_observation,
    unpack_observation,
)
from embodied_rft.pools.singles import Singles
from embodied_rft.pools.splits import Splits
from embodied_rft.pools.watch import Watch
from embodied_rft.pools.workers import Workers, num_cores

Kind = Literal["auto", "native", "sync", "workers"]
KINDS = ("auto", "native", "sync", "workers")
TimeLimitIs = Literal["truncated", "terminal"]


class VectorPool(Pool):
    """A Pool over a host: single environments, worker processes, or a `gymnasium.vector.VectorEnv`.

    A vector environment must have been made with AutoresetMode.DISABLED and honour `options={"reset_mask": mask}`.

    Args:
        envs: who holds the environments.
        purpose: which seeds are accepted.
        max_incidents: share of the latest episodes that may fail; see `incidents`.
        time_limit: "terminal" makes every truncation a terminal state, which does not bootstrap.
    """

    def __init__(
        self,
        envs: Host | VectorEnv,
        *,
        purpose: Purpose = "training",
        max_incidents: float = MAX_INCIDENTS,
        time_limit: TimeLimitIs = "truncated",
    ) -> None:
        if purpose not in ("training", "evaluation"):
            raise UserError(f"purpose is {purpose!r}; expected 'training' or 'evaluation'")
        self.host: Host = Batch(envs) if isinstance(envs, VectorEnv) else envs
        self.purpose: Purpose = purpose
        self.time_limit: TimeLimitIs = time_limit
        self.num_envs: int = self.host.num_envs
        self.observation_space, self.action_space = self.host.observation_space, self.host.action_space
        self.fields = fields_of(self.observation_space)
        self.action_field = field_of("action", self.action_space)
        self.incidents = Incidents(max_incidents, self.num_envs)
        self._observation: dict[str, Any] = {}  # the latest of all N; empty before the first reset
        self._idle = np.ones(self.num_envs, dtype=np.bool_)  # no episode is running
        self._bad_start = np.zeros(self.num_envs, dtype=np.bool_)  # the reset failed: the first step is invalid
        self._seeds = np.zeros(self.num_envs, dtype=np.int64)  # of the running episodes, for messages
        self._reports_success = False
        self._closed = False

    @property
    def seeding(self) -> Seeding | None:
        """What seeds promise here; None before the first reset."""
        return self.host.seeding

    @property
    def can_save(self) -> bool:
        """Whether `get_state` works inside an episode."""
        return self.host.can_save

    @property
    def observation(self) -> Tree:
        """The current observation of all N, as the last call gave it; empty before the first reset."""
        return dict(self._observation)

    def reset(self, seeds: ArrayLike, mask: np.ndarray | None = None, options: Mapping[str, Any] | None = None) -> Tree:
        """Start new episodes where `mask`; `options` go to every environment that is reset.

        An environment that fails here keeps its old observation (zeros at first), and its first step is invalid.

        Args:
            seeds: [N] integers; only those under the mask count.
            mask: [N] bool, None means all.
            options: per-reset options of the environment, the same for all.

        Returns:
            The current observation of all N environments.
        """
        mask = check_mask(mask, num_envs=self.num_envs)
        chosen = np.where(mask, check_seeds(seeds, mask, purpose=self.purpose), 0)
        self._seeds = np.where(mask, chosen, self._seeds)
        answer = self.host.reset(chosen, mask, options)
        new, bad = self._clean(answer)
        self._bad_start = np.where(mask, bad, self._bad_start)
        self._idle = self._idle & ~mask
        self._observation = self.host.observation = new
        return dict(new)

    def step(self, action: Action) -> StepResult:
        """Execute one action in every environment; see `StepResult`; idle ones are not heard."""
        idle = self._idle
        if idle.all():
            raise RuntimeError("no environment has a running episode: call reset before step")
        action = check_action(action, self.action_space, num_envs=self.num_envs)
        running = ~(idle | self._bad_start)
        answer = self.host.step(action, running)
        new, bad = self._clean(answer)
        valid = running & ~bad
        reward = np.where(valid, answer.reward, np.float32(0))
        terminated, truncated = answer.terminated & valid, answer.truncated | ~valid
        if self.time_limit == "terminal":
            terminated, truncated = terminated | (truncated & valid), ~valid
        self._reports_success |= answer.told
        info = {"success": answer.success & valid} if self._reports_success else {}
        info |= {name: np.where(valid, values, np.nan) for name, values in answer.statistics.items()}
        self._idle, self._bad_start, self._observation = terminated | truncated, np.zeros_like(idle), new
        self.host.observation = new
        failed = ~valid & ~idle
        self.incidents.judge(ended=int((self._idle & valid).sum()), failed=int(failed.sum()))
        return StepResult(dict(new), reward, terminated, truncated, info, valid)

    def ask(self, name: str) -> Any:
        """What the (first) environment says under `name`, called if it is a method; None if it does not have it."""
        return self.host.ask(name)

    def skip_images(self, skip: bool) -> None:
        """Whether steps may leave images as they were, but where an episode ends: nobody reads them. A hint."""
        self.host.skip_images(skip)

    def _clean(self, answer: Answer) -> tuple[dict[str, Any], np.ndarray]:
        """The observation, with old rows where new ones are no good, and [N] bool of the environments that failed."""
        invalid = answer.failed.copy()
        for incident in answer.incidents:
            self.incidents.add(*incident)
        new = answer.observation
        for key, value in {**new, "reward": answer.reward}.items():
            finite = finite_rows(value, num_envs=self.num_envs)
            if finite is None:
                continue
            name = "reward" if value is answer.reward else f"observation {key!r}"
            for row in np.flatnonzero(~finite & ~invalid):
                who = f"environment {self.host.first + row} (seed {self._seeds[row]})"
                self.incidents.add("non_finite", f"{who}: {name} is NaN or infinite")
            invalid |= ~finite
        if not invalid.any():
            return new, invalid
        old = self._observation or {
            k: [""] * len(v) if isinstance(v, list) else np.zeros_like(v) for k, v in new.items()
        }
        return merge(~invalid, new, old), invalid

    def get_state(self) -> dict[str, np.ndarray] | None:
        """The state of every environment and of this pool, or None if the environments do not offer `get_state`."""
        state = self.host.get_state() if self._observation else None
        if state is None:
            return None
        state |= {f"pool/{name}": getattr(self, f"_{name}").copy() for name in ("idle", "bad_start")}
        state["pool/reports_success"] = np.array(self._reports_success)
        return state | {f"pool/{key}": value for key, value in pack_observation(self._observation).items()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue bit for bit from `get_state` of a pool of the same environments."""
        if len(state["pool/idle"]) != self.num_envs:
            raise UserError(
                f"the state is of {len(state['pool/idle'])} environments; this pool has {self.num_envs}. "
                "Use the same num_envs as the run that wrote it."
            )
        self.host.set_state({k: v for k, v in state.items() if not k.startswith("pool/")})
        for name in ("idle", "bad_start"):
            setattr(self, f"_{name}", state[f"pool/{name}"].astype(np.bool_))
        self._reports_success = bool(state["pool/reports_success"])
        own = {key.removeprefix("pool/"): value for key, value in state.items() if key.startswith("pool/")}
        self._observation = self.host.observation = unpack_observation(own)

    def save(self, row: int) -> Branch:
        """One environment in the middle of its episode."""
        if not self._observation or self._bad_start[row]:
            raise UserError(f"environment {row} is in no episode: there is nothing to be saved")
        shown = {key: value[row] for key, value in self._observation.items()}
        return Branch(self.host.save(row), shown, int(self._seeds[row]), bool(self._idle[row]))

    def restore(self, row: int, branch: Branch) -> None:
        """Go on from a branch of a pool of the same environments; others are not touched. UserError before a reset."""
        if not self._observation:
            raise UserError("the pool was never reset: call reset before restore")
        self.host.restore(row, branch.environment)
        new = {key: value.copy() for key, value in self._observation.items()}
        for key, value in branch.observation.items():
            new[key][row] = value
        self._observation = self.host.observation = new
        self._idle, self._bad_start, self._seeds = self._idle.copy(), self._bad_start.copy(), self._seeds.copy()
        self._idle[row], self._bad_start[row], self._seeds[row] = branch.idle, False, branch.seed

    def close(self) -> None:
        """Close the environments; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self.host.close()


# ---------------------------------------------------------------------------------------------------------------------
# Making pools
# ---------------------------------------------------------------------------------------------------------------------


def supports_native(spec: EnvSpec) -> bool:
    """Whether the registered vector form says that it can be reset from outside (takes `autoreset_mode`)."""
    entry = spec.vector_entry_point
    if entry is None:
        return False
    creator = load_env_creator(entry) if isinstance(entry, str) else entry
    parameters = inspect.signature(creator).parameters
    return "autoreset_mode" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def num_envs_for(env: EnvConfig, purpose: Purpose) -> int:
    """How many environments a recipe has for "training" or "evaluation"."""
    return env.evaluation_envs or env.num_envs if purpose == "evaluation" else env.num_envs


def open_pool(env: EnvConfig, *, purpose: Purpose, num_envs: int | None = None) -> Pool:
    """The environments of a recipe.

    Args:
        env: as the recipe says.
        purpose: "training" or "evaluation".
        num_envs: how many; None: as the recipe says.
    """
    count = num_envs or num_envs_for(env, purpose)
    splits = min(env.splits, count)
    make = functools.partial(
        make_pool,
        env.id,
        options=env.options,
        wrappers=env.wrappers,
        kind=env.pool,
        purpose=purpose,
        deadline=env.deadline,
        max_incidents=env.max_incidents,
        time_limit=env.time_limit,
    )
    if splits > 1:
        pool: Pool = _split(make, count, splits, env.num_workers or max(splits, num_cores()))
    else:
        pool = make(count, num_workers=env.num_workers)
    idle = sorted({*env.options} & {*(pool.ask("batch_options") or ())})
    if idle and (env.wrappers or (isinstance(pool, VectorPool) and isinstance(pool.host, Singles))):
        pool.close()
        raise UserError(
            f"env.options.{idle[0]} has no effect where environments step one after the other (env.wrappers, env.pool "
            "sync): leave it out"
        )
    return pool


def _split(make: Callable[..., Pool], num_envs: int, splits: int, num_workers: int) -> Splits:
    """Pools of an equal share of the environments, and of the processes."""
    pools: list[Pool] = []
    bounds, shares = ([total * i // splits for i in range(splits + 1)] for total in (num_envs, num_workers))
    try:
        for i in range(splits):
            share = shares[i + 1] - shares[i]
            pools.append(make(bounds[i + 1] - bounds[i], num_workers=share, first=bounds[i]))
    except BaseException:
        for pool in pools:
            pool.close()
        raise
    return Splits(pools)


def make_pool(
    id: str | EnvSpec,
    num_envs: int,
    *,
    options: Mapping[str, Any] | None = None,
    wrappers: Sequence[Mapping[str, Any]] = (),
    kind: Kind = "auto",
    num_workers: int | None = None,
    purpose: Purpose = "training",
    deadline: float = DEADLINE,
    max_incidents: float = MAX_INCIDENTS,
    time_limit: TimeLimitIs = "truncated",
    first: int = 0,
) -> VectorPool:
    """N environments of one id behind the Pool protocol.

    Args:
        id: a registered Gymnasium id, or its specification.
        num_envs: N >= 1.
        options: constructor arguments of the environment.
        wrappers: around each environment, innermost first; see `making.make_single`.
        kind: "native" (batched on native threads), "sync" (one after the other), "workers" (processes), or "auto":
            native if the id offers it, else sync.
        num_workers: processes of kind "workers" (default: one per core, at most N); an error with other kinds.
        purpose: which seeds the pool accepts: "training" (< 2**31) or "evaluation" (>= 2**31).
        deadline: seconds that a step or a reset of one environment (of the batch, if native) may take.
        max_incidents: share of the latest episodes that may fail in their environment before EnvironmentFailure.
        time_limit: "truncated" bootstraps where an episode is cut off, "terminal" does not.
        first: number of the first environment, for messages.

    Raises:
        ValueError: unknown id or kind, options that the environment refuses, a native form that does not exist.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of pool {kind!r}; {nearest(kind, KINDS)}")
    if num_envs < 1:
        raise UserError(f"num_envs is {num_envs}; expected at least 1")
    if num_workers and kind != "workers":
        raise UserError(f"num_workers={num_workers} has no effect with kind {kind!r}: use kind 'workers' or drop it")
    spec = find_spec(id)
    make = functools.partial(make_host, spec, options=options, wrappers=wrappers, deadline=deadline)
    if kind == "workers":
        host: Host = Workers(
            make, num_envs, num_workers=num_workers, deadline=deadline, preload=[__name__], first=first
        )
    else:
        host = make(num_envs, kind=kind, first=first)
    return VectorPool(host, purpose=purpose, max_incidents=max_incidents, time_limit=time_limit)


def make_host(
    spec: EnvSpec,
    num_envs: int,
    *,
    options: Mapping[str, Any] | None = None,
    wrappers: Sequence[Mapping[str, Any]] = (),
    kind: Kind = "auto",
    deadline: float = DEADLINE,
    watch: Watch | None = None,
    first: int = 0,
) -> Host:
    """N environments in this process: as of `make_pool`, and as of `Singles`."""
    made = None if kind == "sync" else _make_native(spec, num_envs, options or {}, wrappers, must=kind == "native")
    if made is not None:
        return Batch(made[0], make=made[1], watch=watch, deadline=deadline, first=first)
    single = functools.partial(make_single, spec, options=options, wrappers=wrappers)
    return Singles(single, num_envs, watch=watch, deadline=deadline, first=first)


def _make_native(
    spec: EnvSpec, num_envs: int, options: Mapping[str, Any], wrappers: Sequence[Any], *, must: bool
) -> tuple[VectorEnv, Callable[[], VectorEnv]] | None:
    """The registered vector form, and how to make another; None (ValueError if it `must`) where it resets by itself."""
    why = ""
    if wrappers:
        why = "has wrappers, which are made for single environments"
    elif not supports_native(spec):
        why = "has no native vector form that takes autoreset_mode"
    else:
        make = functools.partial(
            gymnasium.make_vec, spec, num_envs=num_envs, vectorization_mode="vector_entry_point", **options
        )
        disabled = functools.partial(make, autoreset_mode=AutoresetMode.DISABLED)
        try:
            env = disabled()
        except Exception as error:
            try:  # does it refuse its options, or to leave resets to others?
                make().close()
            except Exception:
                if isinstance(error, TypeError):
                    raise UserError(f"environment {spec.id!r} refused its options {dict(options)}: {error}") from error
                raise error from None
            why = f"has a native vector form that cannot leave resets to others ({error})"
        else:
            if env.metadata.get("autoreset_mode") == AutoresetMode.DISABLED:
                return env, disabled
            env.close()
            why = "has a native vector form that resets by itself"
    if must:
        raise UserError(f"{spec.id!r} {why}; use kind 'sync' or 'workers' for it")
    return None
