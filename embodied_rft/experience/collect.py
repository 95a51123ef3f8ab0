"""Runs a policy in a pool of environments and records what happened.

Knows pools and decisions, not algorithms. A `Recording` is written into the buffer by its owner, so that physics may
run on one thread while the learner samples on another and the rows arrive between two updates, never during one.
Legend: N environments of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied_rft import distributed
from embodied_rft.data import CUT, Field, Source, Space, Tree, pick_tree
from embodied_rft.experience.curriculum import Sieve
from embodied_rft.experience.recording import Ahead, Broken, Last, Recording, Taken
from embodied_rft.experience.schedule import Act, Played, Say, Schedule
from embodied_rft.names import UserError
from embodied_rft.pools.protocol import Pool, StepResult, fields_of, is_statistic
from embodied_rft.seeding import training_seed

KEPT = ("episode", "seed", "step", "returned")  # of the schedule


class Collector:
    """Keeps the environments of a pool running from episode to episode.

    Episode e of process r starts from `training_seed(run_seed, r, e // group_size)`: every episode can be repeated
    alone, and the `group_size` siblings of a group share their initial state. Episodes go on from one call to the next.

    Args:
        pool: made with purpose="training".
        run_seed: of the run.
        first_episode: number of the first one.
        group_size: siblings of a group.
        source: what the rows are marked with.
        past: of a `Schedule`.
        say: told when no episode ends.
        sieve: which of the episodes that begin are played; None: all of them.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        run_seed: int,
        first_episode: int = 0,
        group_size: int = 1,
        source: Source = Source.ONLINE,
        past: bool = False,
        say: Say | None = None,
        sieve: Sieve | None = None,
    ) -> None:
        self.run_seed, self.group_size, self.source, self.sieve = run_seed, group_size, source, sieve
        self.next_episode = -(-first_episode // group_size) * group_size  # a group begins with its first sibling
        passes = None if sieve is None else self._passes
        self.schedule = Schedule(pool, self._deal, past=past, say=say, passes=passes)
        self._passed_over = 0  # episodes, since the last recording
        self._last_episode: int | None = None
        self._unsaved = False  # the running episodes are those of a checkpoint, the environments are not

    def collect(
        self, act: Act, *, decisions: int | None = None, episodes: int | None = None, version: int = 0
    ) -> Recording:
        """Run until at least `decisions` rows are recorded, or until exactly `episodes` more episodes have ended.

        With `episodes`, environments whose turn does not come stay idle, so that no episode is favoured for being
        short.
        """
        if (decisions is None) == (episodes is None):
            raise UserError("give either decisions or episodes")
        recording = Recording()
        self._last_episode = None if episodes is None else self.next_episode + episodes
        if episodes is not None and self.schedule.playing.any():
            raise UserError("episodes can only be counted from a fresh start; call cut() first")
        self.schedule.fill()
        while self.schedule.playing.any() and (decisions is None or recording.decisions < decisions):
            played = self.schedule.play(act, None if decisions is None else decisions - recording.decisions)
            self._take(recording, played, version)
            self._finish(recording, played)
            self.schedule.fill(played.over)
        if self.sieve is not None:
            recording.passed_over, self._passed_over = self._passed_over, 0
        running = self._running()
        if len(running):  # their newest decisions are learned from now, not when the next ones are known
            recording.rows.append(Ahead(running, self._shown(running)))
        return recording

    def cut(self) -> Recording:
        """End all running episodes here: their last observation only bootstraps."""
        recording, running = Recording(), self._running()
        if len(running):
            recording.rows.append(Last(running, self._shown(running)))
        self.schedule.episode[:] = -1
        return recording

    def begin_anew(self) -> Recording:
        """After `load_state_dict`: cut the episodes that the checkpoint could not hold, if there are any."""
        if not self._unsaved:
            return Recording()
        lost = len(self._running())
        recording = self.cut()
        recording.lost, self.schedule.observation, self._unsaved = lost, None, False
        return recording

    def _running(self) -> np.ndarray:
        """Environments in the middle of an episode."""
        return np.flatnonzero(self.schedule.playing & (self.schedule.step > 0))

    def _deal(self, count: int) -> list[tuple[int, int]]:
        if self._last_episode is not None:
            count = min(count, max(0, self._last_episode - self.next_episode))
        numbers, rank = range(self.next_episode, self.next_episode + count), distributed.rank()
        self.next_episode += count
        return [(number, training_seed(self.run_seed, rank, number // self.group_size)) for number in numbers]

    def _passes(self, streams: np.ndarray, observation: Tree) -> np.ndarray:
        """[K] bool: which episodes that begin are played. Groups whose first sibling is not among them have passed."""
        assert self.sieve is not None
        episode, size = self.schedule.episode[streams], self.group_size
        groups, passes = episode // size, np.ones(len(streams), bool)
        new = np.isin(groups, groups[episode % size == 0])
        if new.any():
            passes[new] = self.sieve.passes(streams[new], groups[new], pick_tree(observation, np.flatnonzero(new)))
        refused = np.unique(groups[~passes])
        if len(refused):
            end = (int(refused[-1]) + 1) * size
            if self._last_episode is not None:  # others take their places
                self._last_episode += len(refused) * size
            self.next_episode = max(self.next_episode, end)  # siblings that were not dealt yet are not played, either
            self._passed_over += len(refused) * size
        return passes

    def _take(self, recording: Recording, played: Played, version: int) -> None:
        """The decisions, as rows."""
        streams, result, schedule = played.streams, played.result, self.schedule
        shown, taken, rows = played.observation, played.decisions, streams - played.first
        if len(streams) < len(result.reward):
            shown, taken = pick_tree(shown, rows), taken.take(rows)
        span = result.info.get("env_steps", -1)  # of a chunk, how much of it
        recording.rows.append(
            Taken(
                streams=streams,
                observation=shown,
                decisions=taken,
                reward=pick_tree(_streams(result), rows),
                told={name: values[rows] for name, values in result.info.items() if is_statistic(name)},
                terminated=result.terminated[rows],
                truncated=result.truncated[rows],
                group=schedule.episode[streams] // self.group_size,
                seed=schedule.seed[streams],
                step=schedule.step[streams] - 1,
                version=version,
                source=self.source,
                span=span[rows] if isinstance(span, np.ndarray) else span,
            )
        )
        recording.decisions += len(streams)
        if CUT in taken.trace:
            recording.cut = (recording.cut or 0) + int(np.sum(taken.trace[CUT]))

    def _finish(self, recording: Recording, played: Played) -> None:
        """Close ended episodes, throw broken ones away."""
        failed, done, rows = played.broken, played.ended, played.ended - played.first
        if len(failed):
            recording.rows.append(Broken(failed))
            recording.invalid += len(failed)
            if self._last_episode is not None:  # a counted episode that failed is run again, from another state
                self._last_episode += len(failed)
        if len(done):
            recording.rows.append(Last(done, pick_tree(played.result.observation, rows)))
            success = played.result.info.get("success")
            recording.told |= success is not None
            recording.successes += [False] * len(done) if success is None else [bool(s) for s in success[rows]]
            recording.returns += self.schedule.returned[done].tolist()
            if self.sieve is not None:
                won = self.schedule.returned[done] > 0 if success is None else success[rows]
                self.sieve.hear(done, won.tolist())
            recording.lengths += self.schedule.step[done].tolist()
            for name, values in played.result.statistics(rows).items():
                recording.statistics.setdefault(name, []).extend(values)

    def _shown(self, streams: np.ndarray) -> Tree:
        """What these environments show now."""
        assert self.schedule.observation is not None
        return pick_tree(self.schedule.observation, streams)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly here; without "pool" if the environments cannot be saved."""
        observation = self.schedule.observation
        if observation is None:
            return {"next_episode": self.next_episode}
        pool, memory = self.schedule.pool.get_state(), self.schedule.memory
        past = {} if memory is None else {"past": memory.state_dict()}
        sieve = {} if self.sieve is None else {"sieve": self.sieve.state_dict(), "passed_over": self._passed_over}
        return (
            past
            | sieve
            | ({} if pool is None else {"pool": pool})
            | {
                "next_episode": self.next_episode,
                "turn": self.schedule.turn,
                **{name: getattr(self.schedule, name).copy() for name in KEPT},
                "observation": {
                    k: np.asarray(v) if not isinstance(v, list) else list(v) for k, v in observation.items()
                },
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; call `begin_anew` before anything else is collected."""
        self.next_episode = int(state["next_episode"])
        if "observation" not in state:
            return
        for name in KEPT:
            getattr(self.schedule, name)[:] = state[name]
        self.schedule.observation, self.schedule.turn = dict(state["observation"]), int(state.get("turn", 0))
        if self.schedule.memory is not None:
            self.schedule.memory.load_state_dict(state["past"])
        if self.sieve is not None:
            self.sieve.load_state_dict(state["sieve"])
            self._passed_over = int(state["passed_over"])
        self._unsaved = "pool" not in state
        if not self._unsaved:
            self.schedule.pool.reset(self.schedule.seed)  # builds what is built lazily; the state replaces its effect
            self.schedule.pool.set_state(state["pool"])


def _streams(result: StepResult) -> dict[str, np.ndarray]:
    """Streams of reward [N]: the environment's, and 1 for the last decision of a success if success is told."""
    success = result.info.get("success")
    if success is None:
        return {"env": result.reward}
    return {"env": result.reward, "success": (success & (result.terminated | result.truncated)).astype(np.float32)}


def action_field(space: Space) -> Field:
    """The buffer column for actions of a space."""
    return fields_of(space)["observation"]
