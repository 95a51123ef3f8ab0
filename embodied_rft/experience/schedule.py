"""Which environment of a pool plays which episode: collecting, evaluating and filming deal their episodes out alike.

Knows pools and decisions, and keeps nothing of what happened.

The parts of a pool (`splits.Splits`; of most pools there is one) are answered in turns: while `act` decides in one, the
others step, or begin episodes. Decisions are taken in a fixed order, and their outcomes are heard in the same order.
Neither of the two reads what the other one writes but in the same part, so that a run is the same to the bit, whichever
part is faster.

Legend: N environments of the pool, M of them in a part, K of those played.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass

import numpy as np

from embodied_rft.data import Decisions, Tree, pick_tree
from embodied_rft.experience.memory import Memory, spread
from embodied_rft.pools.protocol import Pool, StepResult, is_text
from embodied_rft.pools.splits import Part, joined

Act = Callable[[Tree], Decisions]
Say = Callable[[str], None]
Deal = Callable[[int], Sequence[tuple[int, int]]]  # (number, seed) of the next episodes, at most so many
# (streams [K], what their episodes show first, each [K, ...]) -> [K] bool: which of them are played
Passes = Callable[[np.ndarray, Tree], np.ndarray]


@dataclass(frozen=True, slots=True)
class Played:
    """One decision in every environment of a part that has an episode."""

    first: int  # number of the first of the M environments: number `first + i` has row i of the next three
    observation: Tree  # each [M, ...]: on what was decided
    decisions: Decisions  # M
    result: StepResult  # of all M
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
        passes: which of the episodes that begin are played; in place of the others the next ones begin.
    """

    def __init__(
        self, pool: Pool, deal: Deal, *, past: bool = False, say: Say | None = None, passes: Passes | None = None
    ) -> None:
        self.pool, self.deal, self.passes = pool, deal, passes
        self.memory = Memory(pool.num_envs) if past else None
        self._costly = is_text(pool.action_space)  # nothing is written for environments that are idle
        count = pool.num_envs
        self.episode = np.full(count, -1, dtype=np.int64)  # -1: idle
        self.seed = np.zeros(count, dtype=np.int64)
        self.step = np.zeros(count, dtype=np.int64)
        self.returned = np.zeros(count, dtype=np.float64)  # undiscounted sum of rewards
        self.asked = np.zeros(0, dtype=np.int64)  # [K] environments on whose observations `act` decides
        self.turn = 0  # number of the part that is answered next, if it has an episode
        self._parts = self._heard = Part.of(pool)  # all, and those that were heard last
        self._stepping: deque[tuple[Part, Tree, Decisions]] = deque()  # in the order in which they were answered
        self._endless = Endless(say, len(self._parts))

    @property
    def playing(self) -> np.ndarray:
        """[N] bool: environments that have an episode."""
        return self.episode >= 0

    @property
    def observation(self) -> Tree | None:
        """What all N show, once nothing is under way; None: nothing was ever reset."""
        shown = [tree for part in self._parts if (tree := part.observation) is not None]
        return joined(shown) if len(shown) > 1 else shown[0] if shown else None

    @observation.setter
    def observation(self, observation: Tree | None) -> None:
        for part in self._parts:
            part.show(None if observation is None else pick_tree(observation, part.rows))

    def fill(self, over: np.ndarray | None = None) -> None:
        """Start the next episodes wherever there is none; after `play`, in its part, where the environments `over` are.

        Where there are fewer episodes than environments, each part has its share.
        """
        if over is not None:
            self.episode[over] = -1
        parts = self._parts if over is None else self._heard
        while len(begun := self._begin(parts)) and self.passes is not None:
            self.episode[begun[~self.passes(begun, self._shown(parts, begun))]] = -1

    def _begin(self, parts: Sequence[Part]) -> np.ndarray:
        """Start the next episodes wherever there is none in these parts; the environments in which they begin."""
        free = [np.flatnonzero(~self.playing[part.rows]) for part in parts]
        idle = np.concatenate([part.first + places for part, places in zip(parts, free, strict=True)])
        dealt = self.deal(len(idle)) if len(idle) else ()
        if not dealt:
            return idle[:0]
        rows = np.sort(idle[np.argsort(np.concatenate(free), kind="stable")][: len(dealt)])
        mask = np.zeros(self.pool.num_envs, dtype=bool)
        mask[rows] = True
        if parts[0].call is None:
            self.seed[:] = dealt[0][1]  # the pool was never reset: all of it must be, once
        self.episode[rows], self.seed[rows] = np.array(dealt, dtype=np.int64).T
        self.step[rows], self.returned[rows] = 0, 0.0
        if self.memory is not None:
            self.memory.forget(rows)
        for part in parts:
            if part.call is None or mask[part.rows].any():
                part.reset(self.seed[part.rows], None if part.call is None else mask[part.rows])
        return rows

    def _shown(self, parts: Sequence[Part], streams: np.ndarray) -> Tree:
        """What these environments of parts show, each [K, ...]."""
        shown = []
        for part in parts:
            rows = streams[(streams >= part.rows.start) & (streams < part.rows.stop)] - part.first
            if len(rows) and (tree := part.observation) is not None:
                shown.append(pick_tree(tree, rows))
        return joined(shown)

    def play(self, act: Act, most: int | None = None) -> Played:
        """The next part in which a decision has been carried out, one everywhere; idle environments do not hear theirs.

        Args:
            act: asked for the decisions of parts that wait, in turns, until the part that was answered first is done.
            most: so many decisions are wanted yet: no part is answered while as many are being carried out.
        """
        while (part := self._waiting(most)) is not None:
            if self._stepping:
                first = self._stepping[0][0]
                wait([each.call for each in (part, first) if each.call is not None], return_when=FIRST_COMPLETED)
                if first.over:
                    break
            self._answer(act, part)
        return self._hear()

    def _waiting(self, most: int | None) -> Part | None:
        """The part that is to be answered next; None: not before another one is heard."""
        under_way = [part for part, _, _ in self._stepping]
        if most is not None and sum(int(self.playing[part.rows].sum()) for part in under_way) >= most:
            return None
        order = [*self._parts[self.turn :], *self._parts[: self.turn]]
        part = next((part for part in order if self.playing[part.rows].any()), None)
        return None if part in under_way else part

    def _answer(self, act: Act, part: Part) -> None:
        shown, count = part.observation, part.pool.num_envs
        assert shown is not None
        rows = np.flatnonzero(self.playing[part.rows])
        if not self._costly or len(rows) == count:
            rows = np.arange(count)
        self.asked, seen = part.first + rows, shown if len(rows) == count else pick_tree(shown, rows)
        taken = act(seen if self.memory is None else self.memory.with_past(seen, self.asked))
        taken = taken if len(rows) == count else spread(taken, rows, count)
        part.step(taken.action)
        self._stepping.append((part, shown, taken))
        self.turn = (self._parts.index(part) + 1) % len(self._parts)

    def _hear(self) -> Played:
        """What came of the decisions in the part that was answered first."""
        part, shown, taken = self._stepping.popleft()
        self._heard = [part]
        result, playing = part.outcome(), self.playing[part.rows]
        valid, over = playing & result.valid, result.terminated | result.truncated
        happened = np.flatnonzero(valid)
        streams = part.first + happened
        self.returned[streams] += result.reward[happened]
        self.step[streams] += 1
        if self.memory is not None:
            self.memory.add(streams, happened, shown, taken)
        self._endless.step(bool((over & playing).any()))
        ended, broken = (part.first + np.flatnonzero(each) for each in (valid & over, playing & ~result.valid))
        return Played(part.first, shown, taken, result, streams, ended, broken)


class Endless:
    """Says when no episode ends: after a thousand steps of each environment, and whenever it has been twice as long."""

    ADVICE = (
        "returns and success are those of episodes that end. If some should have by now, give the environment a limit: "
        "env: {wrappers: [{id: TimeLimit, max_episode_steps: 200}]}"
    )

    def __init__(self, say: Say | None, parts: int = 1) -> None:
        self.say, self.parts, self.steps, self.limit = say, parts, 0, 1_000 * parts

    def step(self, ended: bool) -> None:
        """One step of every environment of a part; whether an episode ended or broke in any of them."""
        self.steps = 0 if ended else self.steps + 1
        if self.steps >= self.limit:
            if self.say is not None:
                steps = f"{self.steps // self.parts:,} steps of each environment"
                self.say(f"no episode has ended in the last {steps}; {self.ADVICE}")
            self.limit *= 2
