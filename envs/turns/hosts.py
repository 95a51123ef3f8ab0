"""Who is lifted: N environments behind one face, a batch of ours with its arrays, or single environments of anybody.

Boundary: what they show and take stays as it is; `lifted` makes text of it. Legend: N environments, K of them `rows`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator

from embodied_rft.data import Space
from embodied_rft.envs.games.batch import GameBatch
from embodied_rft.envs.serving import BatchEnv, EnvBatch, Outcome, State, make_batch
from embodied_rft.envs.turns.telling import (
    EXPERT,
    Plain,
    Tells,
    TellsBriefly,
    TellsRows,
    Told,
    is_picture,
    state_text,
)
from embodied_rft.names import UserError
from embodied_rft.pools.answers import leaves_of
from embodied_rft.pools.hosts import Answer
from embodied_rft.pools.making import find_spec, make_single
from embodied_rft.pools.protocol import (
    flatten_space,
    is_text,
    pack_observation,
    unpack_observation,
)
from embodied_rft.pools.singles import Singles
from embodied_rft.pools.watch import Alarm


class Host(ABC):
    """N environments as they are; see the head of this file."""

    observation_space: Space  # of one
    action_space: Space
    limit: int | None  # decisions of an episode, where somebody else must count them
    can_save: bool
    env: object  # who may name the actions
    describes: bool  # it puts its positions into words itself

    @abstractmethod
    def start(
        self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]
    ) -> Mapping[int, tuple[str, str]]:
        """New episodes in `rows`; gives which of them failed: kind and text."""

    @abstractmethod
    def step(self, rows: np.ndarray, actions: Sequence[Any]) -> tuple[Outcome, Mapping[int, tuple[str, str]]]:
        """One decision in each of `rows` [K]; likewise."""

    @abstractmethod
    def observation(self) -> dict[str, Any]:
        """The flat observation of all N: arrays [N, ...], texts as lists."""

    @abstractmethod
    def tell(self, row: int, *, form: str, briefly: bool) -> Told:
        """A position for one who reads; briefly where the environment can."""

    @abstractmethod
    def picture(self, row: int) -> np.ndarray | None:
        """How one looks, [H, W, 3] uint8; None: it cannot be drawn."""

    def pictures(self, rows: np.ndarray) -> dict[int, np.ndarray | None]:
        """How `rows` look."""
        return {row: self.picture(row) for row in rows.tolist()}

    @abstractmethod
    def get_state(self) -> State:
        """All that the future depends on, beside the generators."""

    @abstractmethod
    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from it."""

    @abstractmethod
    def save(self, row: int) -> object:
        """One of them; see `states.Branches`."""

    @abstractmethod
    def restore(self, row: int, saved: object) -> None:
        """Go on with one."""

    @abstractmethod
    def close(self) -> None:
        """Free everything."""


class BatchHost(Host):
    """A batch of ours: nothing but its arrays.

    Args:
        spec: as registered by `serving.serve`.
        options: of the batch and its task.
        generators: of the batch around it, of which the batch draws.
        needs: "image", "state" or both, of a game.
    """

    def __init__(
        self, spec: EnvSpec, options: Mapping[str, Any], generators: list[np.random.Generator], needs: str
    ) -> None:
        given = {**spec.kwargs, **options}
        maker = given["batch"]
        kind: Any = load_env_creator(maker) if isinstance(maker, str) else maker
        is_game = isinstance(kind, type) and issubclass(kind, GameBatch)
        if is_game and "observation" in options:
            raise UserError("options.observation has no effect here: observe, state and told say what is shown")
        self.batch: EnvBatch = make_batch(
            **given | ({"observation": needs} if is_game else {}), num_envs=len(generators)
        )
        if is_text(self.batch.action_space):
            raise UserError(f"{spec.id!r} reads answers itself: use it as it is")
        self.batch.generators, self.is_game = generators, is_game
        self.observation_space, self.action_space = self.batch.observation_space, self.batch.action_space
        self.limit = spec.max_episode_steps or self.batch.max_episode_steps
        self.can_save, self.env, self.describes = self.batch.can_save, self.batch, isinstance(self.batch, TellsRows)
        self._seen: Any = None

    def start(
        self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]
    ) -> Mapping[int, tuple[str, str]]:
        """Its own start."""
        self.batch.broken.clear()
        self.batch.start(rows, seeds, options)
        self._seen = None
        return self.batch.broken

    def step(self, rows: np.ndarray, actions: Sequence[Any]) -> tuple[Outcome, Mapping[int, tuple[str, str]]]:
        """Its own step."""
        self.batch.broken.clear()
        outcome = self.batch.step(rows, np.stack(actions))
        self._seen = None
        return outcome, self.batch.broken

    def observation(self) -> dict[str, Any]:
        """Its own, made when it is asked for."""
        if self._seen is None:
            whole = self.batch.observe(np.arange(self.batch.num_envs))
            parts = ((leaf, leaf.at(whole)) for leaf in leaves_of(self.observation_space))
            self._seen = {leaf.key: list(part) if leaf.text else part for leaf, part in parts}
        return dict(self._seen)

    def tell(self, row: int, *, form: str, briefly: bool) -> Told:
        """Its own words, which are few, or its numbers."""
        if isinstance(self.batch, TellsRows):
            return self.batch.describe(row)
        return Plain(
            "",
            state_text(self.observation_space, _one(self.observation_space, self.observation(), row), form=form),
            (),
        )

    def picture(self, row: int) -> np.ndarray | None:
        """As it renders."""
        drawn = self.batch.render(row, "rgb_array")
        return drawn if isinstance(drawn, np.ndarray) else None

    def pictures(self, rows: np.ndarray) -> dict[int, np.ndarray | None]:
        """Games draw all at once."""
        if not self.is_game:
            return super().pictures(rows)
        drawn = self.observation()["image"]
        return {row: drawn[row] for row in rows.tolist()}

    def get_state(self) -> State:
        """Its own."""
        return self.batch.get_state()

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Its own."""
        self.batch.set_state(state)
        self._seen = None

    def save(self, row: int) -> object:
        """Its own."""
        return self.batch.save(row)

    def restore(self, row: int, saved: object) -> None:
        """Its own."""
        self.batch.restore(row, saved)
        self._seen = None

    def close(self) -> None:
        """Its own."""
        self.batch.close()


class Unwatched(Alarm):
    """Nobody is watching: whoever is around these environments does."""

    def __enter__(self) -> Unwatched:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def begin(self, env: int, seconds: float) -> None:
        """Nothing."""


class SinglesHost(Host):
    """Single environments, one after the other; what one of them does wrong costs nobody else.

    Args:
        spec: of one.
        options: of each.
        wrappers: around each, as of `env.wrappers`.
        generators: of the batch around them, which seed them where nobody else does.
        draws: whether they are drawn.
    """

    def __init__(
        self,
        spec: EnvSpec,
        options: Mapping[str, Any],
        wrappers: Sequence[Mapping[str, Any]],
        generators: list[np.random.Generator],
        *,
        draws: bool,
    ) -> None:
        mode = "rgb_array" if draws else None
        make = functools.partial(make_single, spec, options=options, wrappers=wrappers, render_mode=mode)
        self.singles, self.generators = Singles(make, len(generators), watch=Unwatched()), generators
        self.observation_space, self.action_space = self.singles.observation_space, self.singles.action_space
        self.limit = spec.max_episode_steps  # their own clocks stand still where an answer moves nothing
        self.can_save, self.env = self.singles.can_save, self.singles.unwrapped
        self.describes = _teller(self.singles.slots[0].env) is not None

    def start(
        self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]
    ) -> Mapping[int, tuple[str, str]]:
        """Reset one by one."""
        every, mask = np.zeros(self.singles.num_envs, dtype=np.int64), np.zeros(self.singles.num_envs, dtype=np.bool_)
        every[rows] = [self.generators[row].integers(2**31) if s is None else s for row, s in zip(rows.tolist(), seeds)]
        mask[rows] = True
        return _failures(self.singles.reset(every, mask, options))

    def step(self, rows: np.ndarray, actions: Sequence[Any]) -> tuple[Outcome, Mapping[int, tuple[str, str]]]:
        """Stepped one by one."""
        every, running = [actions[0]] * self.singles.num_envs, np.zeros(self.singles.num_envs, dtype=np.bool_)
        for row, action in zip(rows.tolist(), actions, strict=True):
            every[row], running[row] = action, True
        answer = self.singles.step(every, running)
        success = answer.success[rows] if answer.told else None
        outcome = Outcome(answer.reward[rows], answer.terminated[rows], success, truncated=answer.truncated[rows])
        return outcome, _failures(answer)

    def observation(self) -> dict[str, Any]:
        """As they showed it last."""
        return dict(self.singles.observation)

    def tell(self, row: int, *, form: str, briefly: bool) -> Told:
        """Their own words, or their numbers."""
        if (teller := _teller(self.singles.slots[row].env)) is not None:
            if briefly and isinstance(teller, TellsBriefly):
                return teller.brief()
            return teller.describe()
        seen = _one(self.observation_space, self.observation(), row)
        return Plain("", state_text(self.observation_space, seen, form=form), ())

    def picture(self, row: int) -> np.ndarray | None:
        """As it renders."""
        drawn = self.singles.render(row)
        return drawn if isinstance(drawn, np.ndarray) and drawn.ndim == 3 else None

    def get_state(self) -> State:
        """Of all that offer theirs, with what they showed."""
        return {**(self.singles.get_state() or {}), **pack_observation(self.singles.observation)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue."""
        self.singles.set_state(state)
        self.singles.observation = unpack_observation(state)

    def save(self, row: int) -> object:
        """With what it showed."""
        return self.singles.save(row), {key: value[row] for key, value in self.observation().items()}

    def restore(self, row: int, saved: object) -> None:
        """Go on."""
        inside, shown = cast(Any, saved)
        self.singles.restore(row, inside)
        seen = {key: value.copy() for key, value in self.singles.observation.items()}
        for key, value in shown.items():
            seen[key][row] = value
        self.singles.observation = seen

    def close(self) -> None:
        """Close them."""
        self.singles.close()


def make_host(
    id: str,
    options: Mapping[str, Any],
    wrappers: Sequence[Mapping[str, Any]],
    generators: list[np.random.Generator],
    *,
    draws: bool,
    shows_state: bool,
) -> Host:
    """N environments of an id: of ours the batch itself, else one by one."""
    spec = find_spec(id)
    if spec.entry_point == f"{BatchEnv.__module__}:{BatchEnv.__name__}":
        if wrappers:
            raise UserError(f"wrap has no effect on {id!r}, which is a batch: leave it out")
        needs = "both" if draws and shows_state else "image" if draws else "state"
        return BatchHost(spec, options, generators, needs)
    return SinglesHost(spec, options, wrappers, generators, draws=draws)


def _teller(env: Any) -> Tells | None:
    """The outermost wrapper that puts positions into words, or the environment itself."""
    while env is not None:
        if isinstance(env, Tells):
            return env
        env = getattr(env, "env", None)
    return None


def _failures(answer: Answer) -> dict[int, tuple[str, str]]:
    return dict(zip(np.flatnonzero(answer.failed).tolist(), answer.incidents, strict=True))


def _one(space: Space, flat: Mapping[str, Any], row: int, prefix: str = "") -> Any:
    """The observation of one row, as a tree of the space, of the flat one of all."""
    if isinstance(space, spaces.Dict):
        return {key: _one(child, flat, row, f"{prefix}/{key}" if prefix else str(key)) for key, child in space.items()}
    return flat[prefix or "observation"][row]


def state_space(space: Space) -> Space | None:
    """The space of the symbols or numbers of an observation, without texts and pictures; None: there are none."""
    leaves = number_leaves(space)
    if len(leaves) == 1:
        only = next(iter(leaves.values()))
        if isinstance(only, spaces.Box):
            return spaces.Box(only.low.reshape(-1), only.high.reshape(-1), dtype=only.dtype.type)
        return only
    sizes = [int(np.prod(leaf.shape or ())) for leaf in leaves.values()]
    return spaces.Box(-np.inf, np.inf, (sum(sizes),), np.float32) if sizes else None


def number_leaves(space: Space) -> dict[str, Space]:
    """The leaves of a space that are no texts, no pictures and no expert's."""
    leaves = flatten_space(space).items()
    return {key: leaf for key, leaf in leaves if not is_text(leaf) and not is_picture(leaf) and key != EXPERT}


def state_of(space: Space, flat: Mapping[str, Any]) -> np.ndarray:
    """The values of `state_space` of all N."""
    leaves = number_leaves(space)
    if len(leaves) == 1:
        ((key, leaf),) = leaves.items()
        value: np.ndarray = flat[key]
        return value.reshape(len(value), -1).copy() if isinstance(leaf, spaces.Box) else value.copy()
    parts = [np.asarray(flat[key]).reshape(len(flat[key]), -1).astype(np.float32) for key in leaves]
    return np.concatenate(parts, axis=1)
