"""Who waits for whom: collecting and learning in turn, or at the same time on two threads.

Both collect, add and learn in the order that a stage asks for; results do not depend on which thread is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from embodied_rft.data import Decisions, Tree
from embodied_rft.experience.recording import Recording
from embodied_rft.learning.objective import Metrics
from embodied_rft.runs.session import Session
from embodied_rft.stages.learning import FromReplay, Learning, LearningProgress


class InTurn:
    """First an iteration is collected, then it is learned from.

    Args:
        session: whose collector and agent collect.
        learning: how it is learned from.
        decisions: of an iteration.
        episodes: of an iteration, whole ones, in place of decisions; updates are then for what they turned out to hold.
    """

    def __init__(self, session: Session, learning: Learning, *, decisions: int, episodes: int | None) -> None:
        self.session, self.learning, self.decisions, self.episodes = session, learning, decisions, episodes
        self.how_much: dict[str, Any] = {"decisions": decisions} if episodes is None else {"episodes": episodes}
        self.act = session.actor()

    def collect(self) -> Recording:
        """An iteration of new experience."""
        session = self.session
        return session.running_collector.collect(self.act, **self.how_much, version=session.running_learner.version)

    def learn(self, recording: Recording, rows: np.ndarray) -> Metrics:
        """Learn from it."""
        return self.learning.learn(recording.decisions if self.episodes is not None else self.decisions, rows)


class Overlapped:
    """While an iteration is collected with the weights of the last one, it is learned from what was there before.

    Rows arrive between two iterations, never during one: overlapped runs repeat to the bit.
    """

    def __init__(self, session: Session, learning: FromReplay, executor: ThreadPoolExecutor, *, decisions: int) -> None:
        self.session, self.learning, self.executor, self.decisions = session, learning, executor, decisions
        self.act, self.refresh = delayed_actor(session)

    def collect(self) -> Recording:
        """An iteration of new experience; not before the first one, it is learned meanwhile."""
        session = self.session
        self.refresh()
        future: Future[Recording] = self.executor.submit(
            session.running_collector.collect,
            self.act,
            decisions=self.decisions,
            version=session.running_learner.version,
        )
        try:
            if session.progress_as(LearningProgress).decisions:
                self.learning.learn(self.decisions)
        finally:
            recording = future.result()
        return recording

    def learn(self, recording: Recording, rows: np.ndarray) -> Metrics:
        """Nothing: it is learned from them while the next ones are collected."""
        return {}


@contextmanager
def overlapped(session: Session, learning: FromReplay, *, decisions: int) -> Iterator[Overlapped]:
    """An `Overlapped` with a thread of its own; each of the two then computes on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            yield Overlapped(session, learning, executor, decisions=decisions)
    finally:
        torch.set_num_threads(threads)


def delayed_actor(session: Session) -> tuple[Callable[[Tree], Decisions], Callable[[], None]]:
    """(act, refresh): acts with a copy of the agent that `refresh` brings up to date, safe beside a learning thread."""
    copied = copy.deepcopy(session.agent)
    generator, objective = session.generator("act"), session.objective

    def refresh() -> None:
        copied.load_state_dict(session.agent.state_dict())

    return lambda observation: objective.explore(copied, observation, generator), refresh
