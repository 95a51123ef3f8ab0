"""Which environment of a pool plays which episode: collecting, evaluating and filming deal their episodes out alike.

Knows pools and decisions, and keeps nothing of what happened. Legend: N environments of the pool, K of them played.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from embodied_rft.data import Decisions, Tree, pick_tree
from embodied_rft.experience.memory import Memory, spread
from embodied_rft.pools.protocol import Pool, StepResult, is_text

Act = Callable[[Tree], Decisions]
Say = Callable[[str], None]
Deal = Callable[[int], Sequence[tuple[int, int]]]  # (number, seed) of the next episodes, at most so many


@dataclass(frozen=True, slots=True)
class Played:
    """One decision in every environment that has an episode."""

    observation: Tree  # each [N, ...]: on what was decided
    decisions: Decisions  # N
    result: StepResult  # of all N
    streams: np.ndarray  # [K] the environments in which it happened
    ended: np.ndarray  # [E] those of K whose episode came to its end
    broken: np.ndarray  # [F] environments that failed: their episodes are void

    @property
    def over(self) -> np.ndarray:
        """Environments that have no episode any more."""
        return np.concatenate([self.ended, self.broken])


class Schedule:
    """An environment that is done takes the next episode at once; one for which there is none stays idle.

    Until `fill` is called, an environment whose episode is over still says which one it was, how long, what it gave.

    Args:
        pool: of N environments.
        deal: gives the next episodes.
        past: whoever acts is shown what happened before in the episodes (`data.Past`).
        say: told when no episode ends.
    """

    def __init__(self, pool: Pool, deal: Deal, *, past: bool = False, say: Say | None = None) -> None:
        self.pool, self.deal = pool, deal
        self.memory = Memory(pool.num_envs) if past else None
        self._costly = is_text(pool.action_space)  # nothing is written for environments that are idle
        count = pool.num_envs
        self.episode = np.full(count, -1, dtype=np.int64)  # -1: idle
        self.seed = np.zeros(count, dtype=np.int64)
        self.step = np.zeros(count, dtype=np.int64)
        self.returned = np.zeros(count, dtype=np.float64)  # undiscounted sum of rewards
        self.observation: Tree | None = None  # what all N show now; None: nothing was ever reset
        self._endless = Endless(say)

    @property
    def playing(self) -> np.ndarray:
        """[N] bool: environments that have an episode."""
        return self.episode >= 0

    def fill(self, over: np.ndarray | None = None) -> None:
        """Start the next episodes wherever there is none, and in the environments `over`."""
        if over is not None:
            self.episode[over] = -1
        idle = np.flatnonzero(~self.playing)
        dealt = self.deal(len(idle)) if len(idle) else ()
        if not dealt:
            return
        rows, first = idle[: len(dealt)], self.observation is None
        if first:
            self.seed[:] = dealt[0][1]  # the pool was never reset: all of it must be, once
        self.episode[rows], self.seed[rows] = np.array(dealt, dtype=np.int64).T
        self.step[rows], self.returned[rows] = 0, 0.0
        if self.memory is not None:
            self.memory.forget(rows)
        mask = np.zeros(self.pool.num_envs, dtype=bool)
        mask[rows] = True
        self.observation = self.pool.reset(self.seed, None if first else mask)

    def play(self, act: Act) -> Played:
        """One decision everywhere; idle environments do not hear theirs."""
        assert self.observation is not None
        shown = self.observation
        taken = self._decide(act, shown)
        result = self.pool.step(taken.action)
        valid, over = self.playing & result.valid, result.terminated | result.truncated
        streams = np.flatnonzero(valid)
        self.returned[streams] += result.reward[streams]
        self.step[streams] += 1
        if self.memory is not None:
            self.memory.add(streams, shown, taken)
        self.observation = result.observation
        self._endless.step(bool((over & self.playing).any()))
        broken = np.flatnonzero(self.playing & ~result.valid)
        return Played(shown, taken, result, streams, np.flatnonzero(valid & over), broken)

    def _decide(self, act: Act, shown: Tree) -> Decisions:
        rows, count = np.flatnonzero(self.playing), self.pool.num_envs
        if not self._costly or len(rows) == count:
            rows = np.arange(count)
        seen = shown if len(rows) == count else pick_tree(shown, rows)
        taken = act(seen if self.memory is None else self.memory.with_past(seen, rows))
        return taken if len(rows) == count else spread(taken, rows, count)


class Endless:
    """Says when no episode ends: after a thousand steps of each environment, and whenever it has been twice as long."""

    ADVICE = (
        "returns and success are those of episodes that end. If some should have by now, give the environment a limit: "
        "env: {wrappers: [{id: TimeLimit, max_episode_steps: 200}]}"
    )

    def __init__(self, say: Say | None) -> None:
        self.say, self.steps, self.limit = say, 0, 1_000

    def step(self, ended: bool) -> None:
        """One step of every environment; whether an episode ended or broke in any of them."""
        self.steps = 0 if ended else self.steps + 1
        if self.steps >= self.limit:
            if self.say is not None:
                self.say(f"no episode has ended in the last {self.steps:,} steps of each environment; {self.ADVICE}")
            self.limit *= 2
