"""Single environments stepped one after the other, each call guarded: what one of them does wrong is its own affair.

Boundary: knows Gymnasium's `Env` and nothing of pools. An exception, `sys.exit`, a hang or an answer that does not fit
the spaces ends the episode of that environment, which is made again where it may be damaged; the others go on.

Legend: N environments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
import numpy as np

from embodied_rft.data import Action
from embodied_rft.names import UserError
from embodied_rft.pools.answers import Unfit, as_reward, as_truth, leaves_of, statistics_of, success_of
from embodied_rft.pools.hosts import DEADLINE, FIRST_TIME, Answer, Host, told_of
from embodied_rft.pools.promises import (
    call_seed_method,
    find_seeding,
    first_moves,
    global_generators,
    narrow_seed,
)
from embodied_rft.pools.protocol import Seeding
from embodied_rft.pools.watch import Alarm, Hang, Watch
from embodied_rft.pools.wrappers import offers_state, set_single_state, single_state


@dataclass(slots=True)
class _Slot:
    """One place for an environment; `env` is None while it has to be made again."""

    env: gymnasium.Env | None
    young: bool = True  # it was never reset
    seed: int = 0
    steps: int = 0
    globals: Any = None  # the state of its own global generators, where it is seeded so


class Singles(Host):
    """N environments in this process; see the head of this file.

    Args:
        make: makes one environment.
        num_envs: N.
        watch: told of every call; default an alarm, which interrupts Python code of the main thread.
        deadline: seconds that a step or a reset may take; three times as many the first time.
        first: number of the first environment, for messages.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        num_envs: int,
        *,
        watch: Watch | None = None,
        deadline: float = DEADLINE,
        first: int = 0,
    ) -> None:
        self.make, self.num_envs, self.deadline, self.first = make, num_envs, deadline, first
        self.watch: Watch = watch or Alarm()
        self.slots: list[_Slot] = []
        try:
            with self.watch:
                for index in range(num_envs):
                    with self._watched(index, FIRST_TIME * deadline):
                        self.slots.append(_Slot(make()))
        except Hang as hang:
            raise UserError(f"environment {len(self.slots)} could not be made: {hang}") from None
        finally:
            if len(self.slots) < num_envs:
                self.close()
        env = self.slots[0].env
        assert env is not None
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.leaves = leaves_of(self.observation_space)
        self.observation: dict[str, Any] = {leaf.key: leaf.empty(num_envs) for leaf in self.leaves}
        self.offers_state = all(slot.env is not None and offers_state(slot.env) for slot in self.slots)

    @property
    def can_save(self) -> bool:
        """Whether the environments can be saved inside an episode."""
        return self.offers_state and (self.seeding is None or self.seeding.way in ("reset", "method"))

    @property
    def unwrapped(self) -> gymnasium.Env | None:
        """The first environment itself; None while it is broken."""
        env = self.slots[0].env
        return None if env is None else env.unwrapped

    @contextmanager
    def _watched(self, index: int, seconds: float) -> Any:
        self.watch.begin(index, seconds)
        try:
            yield
        finally:
            self.watch.end()

    # --- episodes ------------------------------------------------------------------------------------------------

    def reset(self, seeds: np.ndarray, mask: np.ndarray, options: Mapping[str, Any] | None) -> Answer:
        """New episodes where `mask`; see `pool.VectorPool.reset`."""
        answer = self._blank()
        with self.watch:
            if self.seeding is None:
                self.seeding = self._find_seeding(self.slots[int(np.argmax(mask))])
            for index in np.flatnonzero(mask).tolist():
                slot = self.slots[index]
                slot.seed, slot.steps = int(seeds[index]), 0
                seconds = self.deadline * (FIRST_TIME if slot.young else 1)
                self._try(answer, index, seconds, self._reset_one, answer, index, options)
        self.observation = answer.observation
        return answer

    def step(self, action: Action, running: np.ndarray) -> Answer:
        """One step of those that are `running` [N]."""
        answer = self._blank()
        actions = list(action) if isinstance(action, list) else np.array(action)  # environments write into theirs
        with self.watch:
            for index in np.flatnonzero(running).tolist():
                self._try(answer, index, self.deadline, self._step_one, answer, index, actions[index])
        with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and caught as such
            answer.reward = answer.reward.astype(np.float32)
        self.observation = answer.observation
        return answer

    def _blank(self) -> Answer:
        return Answer.blank({k: v.copy() for k, v in self.observation.items()}, self.num_envs)

    def _reset_one(self, answer: Answer, index: int, options: Mapping[str, Any] | None) -> None:
        slot = self.slots[index]
        assert self.seeding is not None
        said = self._seeded(slot, slot.seed, self.seeding, dict(options) if options else None)
        slot.young = False
        if not isinstance(said, tuple) or len(said) != 2:
            raise Unfit(f"reset returned {_form(said)}; expected (observation, info)")
        self._show(answer, index, said[0])

    def _step_one(self, answer: Answer, index: int, action: Any) -> None:
        slot = self.slots[index]
        slot.steps += 1
        said = self._stepped(slot, action)
        if not isinstance(said, tuple) or len(said) != 5:
            raise Unfit(f"step returned {_form(said)}; expected (observation, reward, terminated, truncated, info)")
        observation, reward, terminated, truncated, info = said
        self._show(answer, index, observation)
        answer.reward[index] = as_reward(reward)
        answer.terminated[index] = as_truth(terminated, "terminated")
        answer.truncated[index] = as_truth(truncated, "truncated")
        success = success_of(info)
        if success is not None:
            answer.told, answer.success[index] = True, success
        if answer.terminated[index] or answer.truncated[index]:
            for name, value in statistics_of(info).items():
                answer.note(name, index, value)

    def _stepped(self, slot: _Slot, action: Any) -> Any:
        assert slot.env is not None
        if slot.globals is None:
            return slot.env.step(action)
        with global_generators(slot.globals) as kept:
            said = slot.env.step(action)
        slot.globals = tuple(kept)
        return said

    def _show(self, answer: Answer, index: int, observation: Any) -> None:
        values = [leaf.find(observation) for leaf in self.leaves]  # all of them, before anything is written
        for leaf, value in zip(self.leaves, values, strict=True):
            answer.observation[leaf.key][index] = value

    def _try(self, answer: Answer, index: int, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """A guarded call for one environment: whatever goes wrong is written down as its failure."""
        slot = self.slots[index]
        try:
            if slot.env is None:
                with self._watched(index, FIRST_TIME * self.deadline):
                    slot.env, slot.young = self.make(), True
                seconds = max(seconds, FIRST_TIME * self.deadline)
            self.watch.begin(index, seconds)
            try:
                call(*arguments)
            finally:
                self.watch.end()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            kind, said = told_of(error)
            place = f"environment {self.first + index} (seed {slot.seed}, step {slot.steps})"
            answer.failed[index] = True
            answer.incidents.append((kind, f"{place}: {said}"))
            if not isinstance(error, Unfit):
                self._discard(slot)

    def _discard(self, slot: _Slot) -> None:
        """Close an environment that may be damaged; it is made again when its turn comes."""
        env, slot.env, slot.globals = slot.env, None, None
        if env is not None:
            with suppress(Exception, SystemExit, Hang), self._watched(-1, self.deadline):
                env.close()

    def render(self, index: int) -> Any:
        """A picture of one environment, None where there is none."""
        env = self.slots[index].env
        return None if env is None else env.render()

    # --- seeds ---------------------------------------------------------------------------------------------------

    def _seeded(self, slot: _Slot, seed: int, seeding: Seeding, options: dict[str, Any] | None) -> Any:
        """What the reset of an environment returns, seeded as `seeding` says."""
        seed = narrow_seed(seed) if seeding.narrow else seed
        own = seeding.way in ("global", "remake")
        generators: Any = global_generators(None, seed) if own else nullcontext([])
        with generators as kept:
            if seeding.way == "remake":
                assert slot.env is not None
                slot.env.close()
                slot.env = self.make()
            assert slot.env is not None
            if seeding.way == "method":
                call_seed_method(slot.env, seed)
            said = slot.env.reset(seed=seed, options=options)
        slot.globals = tuple(kept) if own else None
        return said

    def _find_seeding(self, slot: _Slot) -> Seeding:
        """Try the ways of seeding on one environment; what fails for other reasons is met in the run itself."""

        def tell(seed: int, seeding: Seeding) -> Any:
            try:
                with self._watched(0, FIRST_TIME * self.deadline):
                    if slot.env is None:
                        slot.env, slot.young = self.make(), True
                    said = [_copied(self._seeded(slot, seed, seeding, None)[0])]
                    slot.young = False
            except Exception:
                self._discard(slot)
                raise
            try:
                with self._watched(0, FIRST_TIME * self.deadline):
                    said += self._first_steps(slot)
            except Exception:  # what it showed before is all that there is to compare
                self._discard(slot)
            return said

        try:
            with global_generators(None, 0):  # what the trials draw is nobody's business
                return find_seeding(tell)
        except KeyboardInterrupt:
            raise
        except BaseException:
            self._discard(slot)
            return Seeding()

    def _first_steps(self, slot: _Slot) -> list[Any]:
        """What a few actions give, the same ones whenever asked."""
        said: list[Any] = []
        assert slot.env is not None
        for action in first_moves(slot.env):
            observation, reward, terminated, truncated, _ = self._stepped(slot, action)
            said.append(_copied((observation, reward)))
            if terminated or truncated:
                break
        return said

    # --- states --------------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, np.ndarray] | None:
        """The states of those that were ever reset, or None if the environments do not offer theirs."""
        if not self.can_save:
            return None
        saved: dict[str, np.ndarray] = {}
        for index, slot in enumerate(self.slots):
            if slot.env is not None and not slot.young:
                state = single_state(slot.env)
                if state is None:
                    self.offers_state = False  # what it calls `get_state` is something else
                    return None
                saved |= {f"env/{index}/{key}": value for key, value in state.items()}
                saved[f"env/{index}/slot"] = np.array([slot.seed, slot.steps], dtype=np.int64)
        return saved

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `get_state`; environments that are not in it wait for a reset."""
        for index, slot in enumerate(self.slots):
            prefix = f"env/{index}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if own:
                if slot.env is None:
                    slot.env, slot.young = self.make(), True
                if slot.young:  # fills what no state holds
                    slot.env.reset(seed=0)
                    slot.young = False
                slot.seed, slot.steps = (int(v) for v in own.pop("slot"))
                set_single_state(slot.env, own)

    def save(self, row: int) -> object:
        """The state of one environment, or a copy of it where it does not offer its state."""
        slot = self.slots[row]
        if slot.env is None or slot.young:
            raise UserError(f"environment {self.first + row} is in no episode: there is nothing to be saved")
        found: Any = single_state(slot.env) if self.can_save else None
        if found is None:
            try:
                found = copy.deepcopy(slot.env)
            except Exception as error:
                raise UserError(
                    f"environment {self.first + row} offers no get_state, and it cannot be copied ({error}): episodes "
                    "cannot branch in it. Give it get_state and set_state (docs/plugins.md)"
                ) from error
        return found, slot.seed, slot.steps, slot.globals

    def restore(self, row: int, saved: object) -> None:
        """Go on with one; copies are copied again, so that one can be gone on with often."""
        slot = self.slots[row]
        found, slot.seed, slot.steps, slot.globals = cast(Any, saved)
        if isinstance(found, gymnasium.Env):
            slot.env, slot.young = copy.deepcopy(found), False
            return
        if slot.env is None:
            slot.env, slot.young = self.make(), True
        if slot.young:  # fills what no state holds
            slot.env.reset(seed=0)
            slot.young = False
        set_single_state(slot.env, found)

    def close(self) -> None:
        """Close all environments."""
        for slot in self.slots:
            if slot.env is not None:
                slot.env.close()
                slot.env = None


def _form(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple) else f"one {type(value).__name__}"


def _copied(tree: Any) -> Any:
    """Arrays of a tree copied: environments may write into theirs again."""
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copied(value) for value in tree]
    return np.array(tree) if isinstance(tree, np.ndarray) else tree
