"""A vector environment as one thing that works or fails: the native form of many environments behind `pool.VectorPool`.

Boundary: knows `gymnasium.vector.VectorEnv`. What it raises, or answers in a wrong form, costs the running episodes of
all N, and it is made again; success that is no truth value costs the episode that told it. A vector environment that
knows which rows are broken says so and keeps the others: infos["broken"][row] = (kind, text), the mask is "_broken".

Legend: N environments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from embodied_rft.data import Action, Space
from embodied_rft.names import UserError
from embodied_rft.pools.answers import Unfit, as_truth, leaves_of
from embodied_rft.pools.hosts import DEADLINE, FIRST_TIME, Answer, Host, told_of
from embodied_rft.pools.promises import find_seeding, narrow_seed
from embodied_rft.pools.protocol import Seeding, is_statistic, merge
from embodied_rft.pools.states import Branches, Saves, can_save
from embodied_rft.pools.watch import Alarm, Watch

BROKEN = "broken"  # key of infos


class Batch(Host):
    """N environments that only step together.

    Args:
        vector_env: made with AutoresetMode.DISABLED; honours `options={"reset_mask": mask}`.
        make: makes another one after a failure; None: a failure ends the run.
        watch: told of every call.
        deadline: seconds that a step or a reset of all may take; three times as many the first time.
        first: number of the first environment, for messages.
    """

    def __init__(
        self,
        vector_env: VectorEnv,
        *,
        make: Callable[[], VectorEnv] | None = None,
        watch: Watch | None = None,
        deadline: float = DEADLINE,
        first: int = 0,
    ) -> None:
        mode = vector_env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            raise UserError(
                f"the vector environment resets by itself (autoreset_mode {mode}); a pool needs episodes that are "
                "reset from outside. Make it with autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED."
            )
        self.vector_env, self.make, self.deadline, self.first = vector_env, make, deadline, first
        self.watch: Watch = watch or Alarm()
        self.num_envs: int = vector_env.num_envs
        self.observation_space: Space = vector_env.single_observation_space
        self.action_space: Space = vector_env.single_action_space
        self.leaves = leaves_of(self.observation_space)
        self.observation: dict[str, Any] = {leaf.key: leaf.empty(self.num_envs) for leaf in self.leaves}
        self._started = False  # the first reset of a vector environment must be of all
        self._broken = False  # to be made again
        self._ended = np.ones(self.num_envs, dtype=np.bool_)  # those that the vector environment wants to be reset

    @property
    def can_save(self) -> bool:
        """Whether the environments can be saved inside an episode."""
        return can_save(self.vector_env)

    @property
    def unwrapped(self) -> VectorEnv:
        """The vector environment itself."""
        return self.vector_env.unwrapped

    def reset(self, seeds: np.ndarray, mask: np.ndarray, options: Mapping[str, Any] | None) -> Answer:
        """New episodes where `mask`; see `pool.VectorPool.reset`."""

        def call() -> Answer:
            if self.seeding is None and not self._started:
                self.seeding = self._find_seeding()
            fresh, infos = self._reset(seeds, mask, options)
            answer = self._answer(merge(mask, fresh, self.observation))
            self._hear(answer, infos, mask)
            return answer

        return self._guarded(call, mask, FIRST_TIME if self._broken or not self._started else 1)

    def step(self, action: Action, running: np.ndarray) -> Answer:
        """One step of those that are `running` [N]."""

        def call() -> Answer:
            if self._ended.any():
                self._reset(np.zeros(self.num_envs, dtype=np.int64), self._ended.copy(), None)
            given = tuple(action) if isinstance(action, list) else np.array(action)
            batch, rewards, terminated, truncated, infos = self.vector_env.step(given)
            new = self._fitted(batch)
            answer = self._answer(new if running.all() else merge(running, new, self.observation))
            with np.errstate(over="ignore"):
                answer.reward = np.where(running, self._rows(rewards, "reward", "bifu"), 0).astype(np.float32)
            terminated = self._rows(terminated, "terminated", "b")
            truncated = self._rows(truncated, "truncated", "b")
            self._ended = terminated | truncated
            answer.terminated[:], answer.truncated[:] = terminated & running, truncated & running
            self._hear(answer, infos, running)
            self._tell(answer, infos, running)
            self._note(answer, infos, self._ended & running)
            return answer

        if self._broken or not running.any():  # a reset of others failed: those that were running are lost
            answer = self._answer(dict(self.observation))
            answer.failed = running
            return answer
        return self._guarded(call, running)

    def _answer(self, observation: dict[str, Any]) -> Answer:
        self.observation = observation
        return Answer.blank(dict(observation), self.num_envs)

    def _guarded(self, call: Callable[[], Answer], rows: np.ndarray, times: int = 1) -> Answer:
        """A call for all; what goes wrong is written down as the failure of those in `rows`."""
        try:
            with self.watch:
                self.watch.begin(-1, times * self.deadline)
                try:
                    if self._broken:
                        self._remake()
                    return call()
                finally:
                    self.watch.end()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if self.make is None:
                raise
            kind, said = told_of(error)
            self._broken, self._started = True, False
            answer = self._answer(dict(self.observation))
            last = self.first + self.num_envs - 1
            answer.failed = rows
            answer.incidents.append((kind, f"environments {self.first} to {last}: {said}"))
            return answer

    def _remake(self) -> None:
        assert self.make is not None
        with suppress(Exception, SystemExit):
            self.vector_env.close()
        self.vector_env = self.make()
        self._ended[:], self._broken = True, False

    def _reset(self, seeds: np.ndarray, mask: np.ndarray, options: Mapping[str, Any] | None) -> tuple[Any, Any]:
        applied = mask if self._started else np.ones_like(mask)
        narrow = self.seeding is not None and self.seeding.narrow
        seed = cast(Any, [narrow_seed(int(s)) if narrow else int(s) for s in seeds])
        batch, infos = self.vector_env.reset(seed=seed, options={**(options or {}), "reset_mask": applied})
        self._started = True
        self._ended = self._ended & ~applied
        return self._fitted(batch), infos

    def _fitted(self, batch: Any) -> dict[str, Any]:
        parts = ((leaf, leaf.at(batch)) for leaf in self.leaves)
        return {each.key: list(part) if each.text else each.fit(part, (self.num_envs,)) for each, part in parts}

    def _rows(self, value: Any, name: str, kinds: str) -> np.ndarray:
        array = np.asarray(value)
        if array.shape != (self.num_envs,) or array.dtype.kind not in kinds:
            raise Unfit(f"{name} is {array.dtype} {array.shape}; expected ({self.num_envs},), one for each environment")
        return array

    def _hear(self, answer: Answer, infos: Any, rows: np.ndarray) -> None:
        """Which of `rows` the vector environment says are broken: the others go on."""
        present = np.broadcast_to(np.asarray(infos.get(f"_{BROKEN}", False), dtype=np.bool_), rows.shape)
        for row in np.flatnonzero(present & rows).tolist():
            kind, said = infos[BROKEN][row]
            answer.failed[row] = True
            answer.incidents.append((str(kind), f"environment {self.first + row}: {said}"))

    def _tell(self, answer: Answer, infos: Any, running: np.ndarray) -> None:
        key = next((key for key in ("is_success", "success") if key in infos), None)
        if key is None:
            return
        answer.told = True
        present = np.broadcast_to(np.asarray(infos.get(f"_{key}", True), dtype=np.bool_), running.shape) & running
        values = np.asarray(infos[key])
        if values.shape == running.shape and values.dtype == np.bool_:
            answer.success[:] = values & present
            return
        for row in np.flatnonzero(present).tolist():
            try:
                answer.success[row] = as_truth(values[row], f"info[{key!r}]")
            except (Unfit, IndexError) as error:
                answer.failed[row] = True
                answer.incidents.append(("error", f"environment {self.first + row}: {error}"))

    def _note(self, answer: Answer, infos: Any, ended: np.ndarray) -> None:
        """What is told of the episodes that ended."""
        if not ended.any():
            return
        for name in filter(is_statistic, infos):
            values = np.asarray(infos[name])
            if values.shape == ended.shape and values.dtype.kind in "bifu":
                told = np.broadcast_to(np.asarray(infos.get(f"_{name}", True), dtype=np.bool_), ended.shape)
                rows = np.flatnonzero(ended & told & np.isfinite(values))
                if len(rows):
                    answer.note(name, rows, values[rows])

    def _find_seeding(self) -> Seeding:
        every = np.ones(self.num_envs, dtype=np.bool_)

        def tell(seed: int, seeding: Seeding) -> Any:
            self.seeding = seeding
            shown, _ = self._reset(np.full(self.num_envs, seed), every, None)
            return {key: value[0] for key, value in shown.items()}

        try:
            return find_seeding(tell, ways=("reset",))
        finally:
            self.seeding = None

    def get_state(self) -> dict[str, np.ndarray] | None:
        """The state of the vector environment, or None if it offers none."""
        if not isinstance(self.vector_env, Saves) or not self.can_save or self._broken:
            return None
        return {**self.vector_env.get_state(), "batch/ended": self._ended.copy()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `get_state`."""
        if not isinstance(self.vector_env, Saves):
            raise UserError(f"{self.vector_env} offers no set_state: it cannot continue inside an episode")
        if not self._started:
            self.vector_env.reset(seed=cast(Any, [0] * self.num_envs))  # fills what no state holds
            self._started = True
        self.vector_env.set_state({k: v for k, v in state.items() if k != "batch/ended"})
        self._ended = state["batch/ended"].astype(np.bool_)

    def save(self, row: int) -> object:
        """One of them, if the vector environment can tell them apart."""
        if not isinstance(self.vector_env, Branches) or self._broken:
            raise UserError(f"{self.vector_env} cannot save one of its environments: episodes cannot branch in it")
        return self.vector_env.save(row), bool(self._ended[row])

    def restore(self, row: int, saved: object) -> None:
        """Go on with one."""
        assert isinstance(self.vector_env, Branches)
        if not self._started:
            self.vector_env.reset(seed=cast(Any, [0] * self.num_envs))
            self._started = True
        inside, self._ended[row] = cast(Any, saved)
        self.vector_env.restore(row, inside)

    def close(self) -> None:
        """Close it."""
        self.vector_env.close()
