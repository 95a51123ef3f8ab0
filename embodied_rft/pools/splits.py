"""A pool of several pools that do not wait for one another: some step while somebody acts in others.

Boundary: knows pools and threads. Whose turn it is, and in which order things happen, is `experience.schedule`.

Legend: N environments of all, M of one part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from embodied_rft.data import Action, Tree, pick
from embodied_rft.pools.incidents import Incidents
from embodied_rft.pools.protocol import Branch, Pool, Seeding, StepResult, check_mask, untold_value

T = TypeVar("T")


class Splits(Pool):
    """N environments in pools of their own, which a `Schedule` steps in turns: double-buffered sampling.

    While the policy answers for one, the others step on threads of their own (Petrenko et al. 2020, Sample Factory,
    https://arxiv.org/abs/2006.11751, section 3.2, with any number of splits). All N step together as in any pool.

    Args:
        pools: of equal environments, which share nothing.
        like: the one whose environments these are in another form, with its threads and its incidents.
    """

    def __init__(self, pools: Sequence[Pool], *, like: Splits | None = None) -> None:
        self.pools, one = tuple(pools), pools[0]
        self.num_envs = sum(pool.num_envs for pool in pools)
        self.observation_space, self.fields = one.observation_space, one.fields
        self.action_space, self.action_field = one.action_space, one.action_field
        self.incidents: Incidents = Incidents() if like is None else like.incidents
        self.threads: ThreadPoolExecutor = ThreadPoolExecutor(len(pools)) if like is None else like.threads
        ends = np.cumsum([pool.num_envs for pool in pools]).tolist()
        self.places = [slice(end - pool.num_envs, end) for pool, end in zip(pools, ends, strict=True)]

    def fitted(self, fit: Callable[[Pool], Pool]) -> Splits:
        """The same environments, each pool as `fit` gives it."""
        return Splits([fit(pool) for pool in self.pools], like=self)

    @property
    def can_save(self) -> bool:
        """Whether `get_state` works inside an episode."""
        return all(pool.can_save for pool in self.pools)

    @property
    def seeding(self) -> Seeding | None:
        """What seeds promise: no more than in any of the pools."""
        known = [pool.seeding for pool in self.pools if pool.seeding is not None]
        return next((seeding for seeding in known if not seeding.held_out), known[0] if known else None)

    @property
    def observation(self) -> Tree:
        """The current observation of all N."""
        return joined([pool.observation for pool in self.pools])

    def reset(self, seeds: ArrayLike, mask: np.ndarray | None = None, options: Mapping[str, Any] | None = None) -> Tree:
        """Start new episodes where `mask`."""
        seeds, chosen = np.asarray(seeds), check_mask(mask, num_envs=self.num_envs)

        def reset(pool: Pool, rows: slice) -> None:
            if chosen[rows].any():
                pool.reset(seeds[rows], None if mask is None else chosen[rows], options)

        self._each(reset)
        return self.observation

    def step(self, action: Action) -> StepResult:
        """Execute one action in every environment; an episode must be running in each of the pools."""
        results = self._each(lambda pool, rows: pool.step(pick(action, rows)))
        names = ("reward", "terminated", "truncated", "valid")
        signals: Any = {name: np.concatenate([getattr(result, name) for result in results]) for name in names}
        infos = [{**_untold(results, len(result.valid)), **result.info} for result in results]
        return StepResult(joined([result.observation for result in results]), info=joined(infos), **signals)

    def _each(self, call: Callable[[Pool, slice], T]) -> list[T]:
        """`call` for all pools at once."""
        calls = [self.threads.submit(call, *pair) for pair in zip(self.pools, self.places, strict=True)]
        answers = [each.result() for each in calls]
        for pool in self.pools:
            self.incidents.take(pool.incidents)
        return answers

    def skip_images(self, skip: bool) -> None:
        """As of a Pool."""
        for pool in self.pools:
            pool.skip_images(skip)

    def ask(self, name: str) -> Any:
        """What the first environment says."""
        return self.pools[0].ask(name)

    def get_state(self) -> dict[str, np.ndarray] | None:
        """Of all pools; None if one of them cannot tell."""
        states = [pool.get_state() for pool in self.pools]
        if any(state is None for state in states):
            return None
        return {f"split/{i}/{k}": v for i, state in enumerate(states) for k, v in (state or {}).items()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `get_state` of as many pools of as many environments."""
        for i, pool in enumerate(self.pools):
            mark = f"split/{i}/"
            pool.set_state({k.removeprefix(mark): v for k, v in state.items() if k.startswith(mark)})

    def save(self, row: int) -> Branch:
        """One environment in the middle of its episode."""
        pool, place = self._of(row)
        return pool.save(place)

    def restore(self, row: int, branch: Branch) -> None:
        """Go on from a branch of any of the pools."""
        pool, place = self._of(row)
        pool.restore(place, branch)

    def _of(self, row: int) -> tuple[Pool, int]:
        """The pool of an environment, and its place there."""
        i = next(i for i, rows in enumerate(self.places) if rows.start <= row < rows.stop)
        return self.pools[i], row - self.places[i].start

    def close(self) -> None:
        """Close the pools, when what they are doing is done."""
        self.threads.shutdown(cancel_futures=True)
        for pool in self.pools:
            pool.close()


class Part:
    """Environments of a pool that step together: what a `Schedule` asks for at once, and need not wait for.

    Args:
        pool: of M environments.
        rows: their numbers among all.
        whole: the pool whose part they are; None: they are all of one, and a call is over when it returns.
    """

    def __init__(self, pool: Pool, rows: slice, whole: Splits | None) -> None:
        self.pool, self.rows, self.first, self.whole = pool, rows, rows.start, whole
        self.call: Future[Tree] | None = None  # the latest one, which gives what is shown after it
        self._result: StepResult | None = None

    @classmethod
    def of(cls, pool: Pool) -> list[Part]:
        """All of a pool, in their order."""
        if isinstance(pool, Splits):
            return [cls(each, rows, pool) for each, rows in zip(pool.pools, pool.places, strict=True)]
        return [cls(pool, slice(0, pool.num_envs), None)]

    @property
    def over(self) -> bool:
        """Whether the latest call is."""
        return self.call is None or self.call.done()

    @property
    def observation(self) -> Tree | None:
        """What the M environments show once the latest call is over; None: there was none."""
        if self.call is None:
            return None
        shown = self.call.result()
        if self.whole is not None:
            self.whole.incidents.take(self.pool.incidents)
        return shown

    def show(self, observation: Tree | None) -> None:
        """What they show now, as somebody else knows."""
        self.call = None
        if observation is not None:
            self.call = Future()
            self.call.set_result(observation)

    def reset(self, seeds: np.ndarray, mask: np.ndarray | None) -> None:
        """Begin a reset, as of a Pool."""
        self._begin(self.pool.reset, seeds, mask)

    def step(self, action: Action) -> None:
        """Begin a step."""
        self._begin(self._step, action)

    def outcome(self) -> StepResult:
        """What came of the step, once it is over."""
        assert self.observation is not None and self._result is not None
        return self._result

    def _step(self, action: Action) -> Tree:
        self._result = self.pool.step(action)
        return self._result.observation

    def _begin(self, call: Callable[..., Tree], *arguments: Any) -> None:
        if self.whole is None:
            self.show(call(*arguments))
        else:
            self.call = self.whole.threads.submit(call, *arguments)


def joined(trees: Sequence[Tree]) -> dict[str, Any]:
    """Trees of the same keys, their rows one after the other."""

    def join(columns: list[Any]) -> Any:
        return [*itertools.chain(*columns)] if isinstance(columns[0], list) else np.concatenate(columns)

    return {key: join([tree[key] for tree in trees]) for key in trees[0]}


def _untold(results: Sequence[StepResult], count: int) -> dict[str, np.ndarray]:
    """What stands in the info of `count` environments that tell nothing of what others tell."""
    told = {key: value.dtype for result in results for key, value in result.info.items()}
    return {key: np.full(count, untold_value(dtype), dtype) for key, dtype in told.items()}
