"""Environments written as arrays: a batch of N, served as `gymnasium.Env` and as native `gymnasium.vector.VectorEnv`.

A batch says how episodes start, go on and look. Seeds, autoreset, masks, the time limit and exact state are here, once.
`serve(id, batch)` registers both forms. docs/plugins.md has a batch of thirty lines.

Legend: N environments, K of them named by `rows`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from embodied_rft.data import Action, Space, pick
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.batches import BROKEN
from embodied_rft.pools.incidents import Infrastructure, describe_error, kind_of
from embodied_rft.pools.protocol import check_action, check_mask
from embodied_rft.seeding import pack_generator, unpack_generator

State = dict[str, np.ndarray]
RENDER_MODES = ("rgb_array", "ansi")


class Outcome(NamedTuple):
    """What K environments answered to one decision: Outcome(np.array([0., 1.]), np.array([False, True]))."""

    reward: np.ndarray  # [K]
    terminated: np.ndarray  # [K] bool
    success: np.ndarray | None = None  # [K] bool: solved at this moment; None: they do not say
    info: Mapping[str, np.ndarray] = {}  # each [K]: whatever else is told, the same names at every step
    truncated: np.ndarray | None = None  # [K] bool: cut off by a clock of its own


class EnvBatch(ABC):
    """N environments of one kind, kept as arrays. What a row computes depends on no other row.

    All randomness of row i comes from `generators[i]`, which is seeded as Gymnasium does.
    """

    observation_space: Space  # of one environment
    action_space: Space
    num_envs: int  # N
    max_episode_steps: int | None = None  # the time limit, where the id names none; it may depend on options
    arrays: tuple[str, ...] = ()  # names of the attributes, each [N, ...], that hold all that episodes change
    reset_options: Collection[str] = ()  # names of what `reset(options=...)` may hold
    one_decision: ClassVar[bool] = False  # every episode ends with its first one
    can_save: bool = True  # whether `get_state` tells everything
    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": 25}

    def __init__(self, *, num_envs: int) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}, expected at least 1")
        self.num_envs = num_envs
        self.generators = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self.broken: dict[int, tuple[str, str]] = {}  # row: kind and text, see `fail`

    @abstractmethod
    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """New episodes in `rows` [K]; their generators have been made from `seeds` [K] (None: they go on)."""

    @abstractmethod
    def step(self, rows: np.ndarray, actions: Any) -> Outcome:
        """One decision in `rows` [K], at least one; `actions` [K] as `check_actions` gave them."""

    @abstractmethod
    def observe(self, rows: np.ndarray) -> Any:
        """The observation of all N, fresh arrays; what costs much need only be made anew for `rows`."""

    def fail(self, row: int, error: BaseException) -> None:
        """Said inside `start`, `step` or `observe`: the episode of this row is void, the others are not touched.

        What the row answers counts for nothing; it is started anew, like one that has ended.
        """
        self.broken[row] = kind_of(error), describe_error(error)

    def check_actions(self, actions: Action) -> Action:
        """The actions of all N as `step` wants them. Raises ValueError if one cannot be executed."""
        return check_action(actions, self.action_space, num_envs=self.num_envs)

    def held(self) -> State:
        """All that episodes change, by name: the arrays themselves, not copies; by default the attributes `arrays`."""
        return {name: getattr(self, name) for name in self.arrays}

    def get_state(self) -> State:
        """All that the future depends on beside the generators, as arrays with leading N."""
        return _copied(self.held())

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `get_state`, bit by bit; the generators follow."""
        _put_back(self.held(), state)

    def save(self, row: int) -> object:
        """One row, beside its generator; see `states.Branches`."""
        return {name: value[row].copy() for name, value in self.get_state().items()}

    def restore(self, row: int, saved: object) -> None:
        """Go on with a row from what `save` gave; the generators follow."""
        state = self.get_state()
        for name, value in cast(State, saved).items():
            state[name][row] = value
        self.set_state(state)

    def render(self, row: int, mode: str) -> np.ndarray | str | None:
        """How one environment looks: "rgb_array" [H, W, 3] uint8, "ansi" a text; None where it has no such look."""
        return None

    def close(self) -> None:  # noqa: B027  (most have nothing to do)
        """Free what is not memory."""


Maker = str | Callable[..., Any]  # a class or function, or where it is: "module:Name"


def serve(
    id: str, batch: Maker, *, task: Maker | None = None, max_episode_steps: int | None = None, **options: object
) -> None:
    """Register both forms of a batch with Gymnasium.

    Args:
        id: "mine/Walk-v0".
        batch: an `EnvBatch`, or "module:Class", which is imported when it is needed.
        task: what makes the batch's first argument, of the options that it names.
        max_episode_steps: the time limit, in decisions; None: no limit.
        options: those that this id fixes.
    """
    gymnasium.register(
        id=id,
        entry_point=f"{__name__}:BatchEnv",
        vector_entry_point=f"{__name__}:BatchVectorEnv",
        max_episode_steps=max_episode_steps,
        kwargs={"batch": batch, "task": task, **options},
    )


def make_batch(batch: Maker, task: Maker | None = None, *, num_envs: int, **options: Any) -> EnvBatch:
    """N environments; options that the task names go there, all others to the batch."""
    if task is None:
        made = _load(batch)(num_envs=num_envs, **options)
    else:
        make = _load(task)
        of_task = {name: options.pop(name) for name in inspect.signature(make).parameters if name in options}
        made = _load(batch)(make(**of_task), num_envs=num_envs, **options)
    assert isinstance(made, EnvBatch), f"{batch} gives a {type(made).__name__}"
    return made


class BatchVectorEnv(gymnasium.vector.VectorEnv):
    """A batch as one native vector environment; what it knows beyond `EnvBatch` is an attribute here, too.

    Args:
        batch: as in `serve`.
        num_envs: N.
        autoreset_mode: NEXT_STEP (the step after an episode's end resets it: reward 0, action ignored) or DISABLED (the
            caller resets with `options={"reset_mask": mask}`).
        max_episode_steps: the time limit, in decisions; None: the batch's own, if it has one.
        render_mode: None, "rgb_array" or "ansi".
        options: of the batch, and of its task.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES)}  # noqa: RUF012

    def __init__(
        self,
        batch: Maker,
        *,
        num_envs: int,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            raise UserError("autoreset_mode SAME_STEP is not supported; use NEXT_STEP or DISABLED")
        if render_mode not in (None, *RENDER_MODES):
            raise UserError(f"unknown render_mode {render_mode!r}; expected None, 'rgb_array' or 'ansi'")
        self.batch = make_batch(batch, num_envs=num_envs, **options)
        if self.batch.one_decision and max_episode_steps is not None:
            raise UserError(
                f"max_episode_steps {max_episode_steps} has no effect where an episode is one decision: leave it out"
            )
        self.num_envs, self.render_mode = num_envs, render_mode
        self.max_episode_steps = self.batch.max_episode_steps if max_episode_steps is None else max_episode_steps
        self.metadata = {**self.batch.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_action_space, self.single_observation_space = self.batch.action_space, self.batch.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.elapsed = np.zeros(num_envs, dtype=np.int64)  # decisions of the running episodes
        self.started = np.zeros(num_envs, dtype=bool)
        self.ended = np.zeros(num_envs, dtype=bool)
        self.unborn = np.zeros(num_envs, dtype=bool)  # their start failed: nothing happens in them before another one
        self.skip_images = False  # True: a step draws only where an episode ends, other images are those of before

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "batch":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.batch, name)

    def reset(
        self, *, seed: int | Sequence[int | None] | np.ndarray | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes everywhere, or where `options["reset_mask"]` [N] bool says.

        Args:
            seed: one for each environment, or one number s for s, s+1, ...; None goes on with the generators as they
                are.
            options: "reset_mask", and the batch's own (`EnvBatch.reset_options`).
        """
        options = dict(options or {})
        rows = np.flatnonzero(check_mask(options.pop("reset_mask", None), num_envs=self.num_envs))
        every = _spread_seeds(seed, self.num_envs)
        seeds = [every[row] for row in rows]
        for row, one in zip(rows, seeds):
            if one is not None:
                self.batch.generators[row] = seeding.np_random(one)[0]
        return self.begin(rows, seeds, options), self._failures()

    def begin(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> Any:
        """New episodes in `rows`, whose generators are ready; gives the observation of all N."""
        for name in options:
            if name not in self.batch.reset_options:
                raise UserError(f"unknown reset option {name!r}; {nearest(name, self.batch.reset_options)}")
        self.batch.broken.clear()
        self.batch.start(rows, seeds, options)
        self.elapsed[rows], self.started[rows], self.ended[rows], self.unborn[rows] = 0, True, False, False
        seen = self.batch.observe(rows)
        failed = [row for row in rows.tolist() if row in self.batch.broken]
        where = self.unborn if self.autoreset_mode == AutoresetMode.DISABLED else self.ended
        where[failed] = True
        return seen

    def _failures(self) -> dict[str, Any]:
        """Which rows are broken, as Gymnasium's vector environments tell things."""
        if not self.batch.broken:
            return {}
        told, present = np.full(self.num_envs, None, dtype=object), np.zeros(self.num_envs, dtype=bool)
        for row, failure in self.batch.broken.items():
            told[row], present[row] = failure, True
        return {BROKEN: told, f"_{BROKEN}": present}

    def step(self, actions: Action) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One decision everywhere: observation, reward [N] float64, terminated, truncated [N] bool, info.

        info["is_success"] is float32 [N]; info["_is_success"] is False where the step was a reset.
        """
        if not self.started.all():
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        actions, stepped = self.batch.check_actions(actions), ~(self.ended | self.unborn)
        self.batch.broken.clear()
        rows = np.flatnonzero(stepped)
        if self.ended.any():
            self._start_again(np.flatnonzero(self.ended))
        if not stepped.all():
            actions = pick(actions, rows)
        info: dict[str, Any] = {}
        reward, (terminated, truncated) = np.zeros(self.num_envs), np.zeros((2, self.num_envs), dtype=bool)
        if len(rows):
            outcome = self.batch.step(rows, actions)
            reward[rows], terminated[rows] = outcome.reward, outcome.terminated
            if outcome.success is not None:
                info = _spread("is_success", np.asarray(outcome.success, np.float32), stepped)
            for name, told in outcome.info.items():
                info |= _spread(name, told, stepped)
            if outcome.truncated is not None:
                truncated[rows] = outcome.truncated
        self.elapsed[rows] += 1
        if self.max_episode_steps is not None:
            truncated[rows] |= self.elapsed[rows] >= self.max_episode_steps
        self.ended = terminated | truncated
        seen = self.batch.observe(np.flatnonzero(self.ended | (not self.skip_images)))
        if failures := self._failures():
            void = failures[f"_{BROKEN}"]
            reward[void], terminated[void], truncated[void], self.ended[void] = 0, False, True, True
            info |= failures
        return seen, reward, terminated, truncated, info

    def _start_again(self, rows: np.ndarray) -> None:
        """Autoreset of the episodes that have ended."""
        if self.autoreset_mode == AutoresetMode.DISABLED:
            raise gymnasium.error.ResetNeeded(
                f"environments {rows.tolist()} have ended and autoreset is disabled: call reset() first, with "
                'options={"reset_mask": mask} if others go on'
            )
        self.batch.start(rows, [None] * len(rows), {})
        self.elapsed[rows] = 0

    @property
    def can_save(self) -> bool:
        """Whether `get_state` tells everything."""
        return self.batch.can_save

    def get_state(self) -> State:
        """All that the future depends on, as arrays with leading N."""
        rng = np.stack([pack_generator(generator) for generator in self.batch.generators])
        return {**self.batch.get_state(), **_copied(self._clocks()), "rng": rng}

    def set_state(self, state: Mapping[str, np.ndarray]) -> Any:
        """Continue from `get_state()`, bit by bit; gives the observation there."""
        _put_back(self._clocks(), state)
        self.batch.set_state(state)
        for generator, packed in zip(self.batch.generators, state["rng"], strict=True):
            unpack_generator(generator, packed)
        return self.batch.observe(np.arange(self.num_envs))

    def save(self, row: int) -> object:
        """One environment, to go on from in any row; see `states.Branches`."""
        clocks = {name: value[row] for name, value in self._clocks().items()}
        return self.batch.save(row), clocks, pack_generator(self.batch.generators[row])

    def restore(self, row: int, saved: object) -> None:
        """Go on with one environment from what `save` gave."""
        inside, clocks, generator = cast(Any, saved)
        packed = [pack_generator(each) for each in self.batch.generators]
        packed[row] = generator
        for name, value in clocks.items():
            self._clocks()[name][row] = value
        self.unborn[row] = False
        self.batch.restore(row, inside)
        for each, words in zip(self.batch.generators, packed, strict=True):
            unpack_generator(each, words)

    def _clocks(self) -> State:
        return {"elapsed": self.elapsed, "started": self.started, "ended": self.ended}

    def render(self) -> tuple[Any, ...] | None:
        """How every environment looks; None without a render_mode."""
        mode = self.render_mode
        return None if mode is None else tuple(self.batch.render(row, mode) for row in range(self.num_envs))

    def close_extras(self, **kwargs: object) -> None:
        """Close the batch."""
        self.batch.close()


class BatchEnv(gymnasium.Env):
    """One environment: a batch of one. Arguments as in `BatchVectorEnv`.

    `gymnasium.make` adds the registered time limit as a wrapper; `max_episode_steps` is for those who construct
    directly.
    """

    metadata: dict[str, Any] = BatchVectorEnv.metadata

    def __init__(
        self, batch: Maker, *, max_episode_steps: int | None = None, render_mode: str | None = None, **options: Any
    ) -> None:
        mode = AutoresetMode.DISABLED
        limits: dict[str, Any] = {"max_episode_steps": max_episode_steps, "render_mode": render_mode}
        self.vector = BatchVectorEnv(batch, num_envs=1, autoreset_mode=mode, **limits, **options)
        self.batch, self.render_mode, self.metadata = self.vector.batch, render_mode, self.vector.batch.metadata
        self.observation_space, self.action_space = self.batch.observation_space, self.batch.action_space

    __getattr__ = BatchVectorEnv.__getattr__

    @staticmethod
    def describe(batch: Maker, task: Maker | None = None, **options: object) -> str:
        """One line about what is registered with these settings."""
        what = _load(task or batch)
        said = getattr(what, "describe", None)
        return (what.__doc__ or "").partition("\n")[0] if said is None else said(**options)

    @staticmethod
    def option_sources(batch: Maker, task: Maker | None = None, **options: object) -> tuple[Any, ...]:
        """Whose arguments are options, too."""
        return tuple(_load(one) for one in (task, batch) if one is not None)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start a new episode; `options` are the batch's own (`EnvBatch.reset_options`)."""
        super().reset(seed=seed)
        self.batch.generators[0] = self.np_random
        seen = self.vector.begin(np.arange(1), [seed], options or {})
        self._raise()
        return _first(seen), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One decision; info["is_success"] is 1.0 where the task is solved at this moment."""
        observation, reward, terminated, truncated, info = self.vector.step([action])
        self._raise()
        info = {name: float(value[0]) for name, value in info.items() if not name.startswith("_")}
        return _first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def _raise(self) -> None:
        """What is broken in a batch of one is an exception."""
        if self.batch.broken:
            kind, said = self.batch.broken[0]
            of, _, reason = kind.partition("/")
            raise Infrastructure(reason, said) if of == "infrastructure" else RuntimeError(said)

    @property
    def can_save(self) -> bool:
        """Whether `get_state` tells everything."""
        return self.batch.can_save

    def get_state(self) -> State:
        """As in `BatchVectorEnv`, with a leading 1. The steps counted by a TimeLimit wrapper are not in it."""
        return self.vector.get_state()

    def set_state(self, state: Mapping[str, np.ndarray]) -> Any:
        """Continue from `get_state()`, bit by bit; gives the observation there."""
        self.batch.generators[0] = self.np_random
        return _first(self.vector.set_state(state))

    def render(self) -> np.ndarray | str | None:
        """How it looks; None without a render_mode."""
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Close the batch."""
        self.vector.close()


def _load(what: Maker) -> Any:
    return load_env_creator(what) if isinstance(what, str) else what


def _first(tree: Any) -> Any:
    """The observation of the first environment."""
    return {key: _first(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree[0]


def _spread(name: str, told: np.ndarray, stepped: np.ndarray) -> dict[str, np.ndarray]:
    """What rows told, as Gymnasium's vector environments do: an array of all [N], and a mask of those who told."""
    every = np.zeros(len(stepped), told.dtype)
    every[stepped] = told
    return {name: every, f"_{name}": stepped}


def _copied(arrays: State) -> State:
    return {name: array.copy() for name, array in arrays.items()}


def _put_back(arrays: State, state: Mapping[str, np.ndarray]) -> None:
    """Copies into the arrays themselves. Raises ValueError, before anything is changed, if one does not fit."""
    for name, array in arrays.items():
        given = np.shape(state[name]) if name in state else "nothing"
        if given != array.shape:
            raise UserError(f"state[{name!r}] has shape {given}, expected {array.shape}: of another environment?")
    for name, array in arrays.items():
        array[:] = state[name]


def _spread_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """One seed for each environment from Gymnasium's forms: None, one number s (s, s+1, ...), or one for each."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        return [int(seed) + i for i in range(num_envs)]
    seeds = [None if s is None else int(s) for s in seed]
    if len(seeds) != num_envs:
        raise UserError(f"{len(seeds)} seeds were given for {num_envs} environments")
    return seeds
