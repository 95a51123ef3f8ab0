"""Hindsight: decisions are read as if a goal that was reached later had been wanted (Andrychowicz et al. 2017, HER).

For environments in the form of Gymnasium-Robotics' GoalEnv: observations with `achieved_goal` and `desired_goal`, and
`compute_reward(achieved_goal, desired_goal, info)` for rows of both. Strategy "future". What is stored never changes.
Legend: B rows, n steps of a window, G numbers of a goal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from embodied_rft.buffer.reading import Reading, Store
from embodied_rft.buffer.ring import Ring
from embodied_rft.data import Batch
from embodied_rft.names import UserError

ACHIEVED, DESIRED = "achieved_goal", "desired_goal"
REMEMBERED = {"u"}  # traces that do not depend on the goal


class Goals:
    """How an environment pays for goals; made when it is first asked.

    Args:
        make: one environment, as those that the experience is from.
    """

    def __init__(self, make: Callable[[], gym.Env]) -> None:
        self._make = make
        self._env: gym.Env | None = None
        self._checked = False

    def reward(self, achieved: np.ndarray, desired: np.ndarray) -> np.ndarray:
        """[N] for what was achieved and wanted, [N, G] each."""
        return np.asarray(self._compute()(achieved, desired, {}), np.float32).reshape(len(achieved))

    def _compute(self) -> Any:
        """The environment's `compute_reward`."""
        if self._env is None:
            self._env = self._make()
        try:
            return self._env.get_wrapper_attr("compute_reward")
        except AttributeError:
            raise UserError(
                f"hindsight: environment {self._env.spec.id if self._env.spec else self._env} has no compute_reward"
            ) from None

    def require(self, observation: Collection[str], trace: Collection[str]) -> None:
        """Refuse columns without goals, those of policies that remember them, and environments that cannot pay.

        Args:
            observation: keys of the observation.
            trace: names of what the policy keeps of its decisions.
        """
        missing = sorted({ACHIEVED, DESIRED} - set(observation))
        if missing:
            raise UserError(f"hindsight needs the observation keys {ACHIEVED} and {DESIRED}; {missing[0]} is missing")
        if remembered := sorted(set(trace) - REMEMBERED):
            raise UserError(
                f"hindsight changes goals, but what this policy keeps of its decisions ({', '.join(remembered)}) is of "
                "the old ones: use a policy that keeps nothing, such as gaussian"
            )
        self._compute()

    def relabel(self, store: Store, batch: Batch, reading: Reading, rng: np.random.Generator, count: int) -> Batch:
        """The batch, in which each decision has, with chance count / (count + 1), a goal that was reached later.

        The new goal is what was achieved after the decision itself or a later one of its episode, each as likely; the
        rewards of the whole window are those of the new goal. Endings stay as they were. Notes are of the old goal:
        NaN.

        Raises:
            ValueError: there are no goals, or rewards that the environment would not give again.
        """
        self._check(store, batch)
        assert batch.rows is not None
        chosen = np.flatnonzero(rng.random(len(batch)) < count / (count + 1))
        rows, achieved = batch.rows[chosen], f"observation/{ACHIEVED}"
        goal = store.dense.column(achieved, store.ring.next[later(store.ring, rows, rng)])
        steps, valid = store.ring.windows(rows, reading.num_steps)
        after = store.dense.column(achieved, store.ring.next[steps].ravel())
        paid = self.reward(after, np.tile(goal, (reading.num_steps, 1))).reshape(steps.shape)
        powers = reading.gamma ** np.arange(reading.num_steps)[:, None]
        where = torch.from_numpy(chosen)
        batch.reward[where] = torch.from_numpy(np.where(valid, powers * paid, 0).sum(0).astype(np.float32))
        for tree in (batch.observation, batch.next_observation):
            if tree:
                tree[DESIRED] = tree[DESIRED].clone()
                tree[DESIRED][where] = torch.from_numpy(goal).to(tree[DESIRED])
        for name, note in batch.notes.items():
            batch.notes[name] = note.clone()
            batch.notes[name][where] = torch.nan
        return batch

    def _check(self, store: Store, batch: Batch) -> None:
        """Whether rewards can be told again: those of the batch, one step each, are compared, once."""
        if self._checked:
            return
        self.require(batch.observation, batch.trace)
        assert batch.rows is not None
        after = store.dense.column(f"observation/{ACHIEVED}", store.ring.next[batch.rows])
        again = self.reward(after, store.dense.column(f"observation/{DESIRED}", batch.rows))
        same = np.isclose(again, store.dense.column("reward/env", batch.rows), rtol=1e-4, atol=1e-5)
        if same.mean() < 0.98:  # a goal at the border of success may round to the other side
            raise UserError(
                f"hindsight: compute_reward repeats {same.mean():.0%} of the stored rewards. It cannot where a wrapper "
                "changes rewards, a decision holds several steps, or the reward is not of the goal alone"
            )
        self._checked = True


def later(ring: Ring, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each readable row one of the readable rows from it to the end of its episode, each as likely, [B]."""
    chosen, here, alive, seen = rows.copy(), rows.copy(), np.arange(len(rows)), 1
    while len(alive):
        following = ring.next[here[alive]]
        goes_on = ring.next[following] >= 0
        alive, following = alive[goes_on], following[goes_on]
        here[alive], seen = following, seen + 1
        taken = rng.random(len(alive)) * seen < 1  # reservoir sampling
        chosen[alive[taken]] = following[taken]
    return chosen
