"""Runs a policy in a pool of environments and records what happened.

Knows pools and decisions, not algorithms. A `Recording` is written into the buffer by its owner, so that physics may
run on one thread while the learner samples on another and the rows arrive between two updates, never during one.
Legend: N environments of the pool, K of them active.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embodied_rft import distributed
from embodied_rft.data import Decisions, Field, Source, Space, Tree, pick_tree
from embodied_rft.experience.recording import Ahead, Broken, Last, Recording, Taken
from embodied_rft.names import UserError
from embodied_rft.pools.protocol import Pool, StepResult, fields_of
from embodied_rft.seeding import training_seed

Act = Callable[[Tree], Decisions]
Say = Callable[[str], None]


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
        say: told when no episode ends.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        run_seed: int,
        first_episode: int = 0,
        group_size: int = 1,
        source: Source = Source.ONLINE,
        say: Say | None = None,
    ) -> None:
        self.pool, self.run_seed, self.group_size, self.source = pool, run_seed, group_size, source
        self.next_episode = -(-first_episode // group_size) * group_size  # a group begins with its first sibling
        count = pool.num_envs
        self.episode = np.full(count, -1, dtype=np.int64)  # -1: idle
        self.seed = np.zeros(count, dtype=np.int64)
        self.step = np.zeros(count, dtype=np.int64)
        self.returned = np.zeros(count, dtype=np.float64)
        self.observation: Tree | None = None
        self._last_episode: int | None = None
        self._unsaved = False  # the running episodes are those of a checkpoint, the environments are not
        self._endless = Endless(say)

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
        if episodes is not None and (self.episode >= 0).any():
            raise UserError("episodes can only be counted from a fresh start; call cut() first")
        self._begin(np.flatnonzero(self.episode < 0))
        while (self.episode >= 0).any() and (decisions is None or recording.decisions < decisions):
            self._advance(act, recording, version)
        running = self._running()
        if len(running):  # their newest decisions are learned from now, not when the next ones are known
            recording.rows.append(Ahead(running, self._shown(running)))
        return recording

    def cut(self) -> Recording:
        """End all running episodes here: their last observation only bootstraps."""
        recording, running = Recording(), self._running()
        if len(running):
            recording.rows.append(Last(running, self._shown(running)))
        self.episode[:] = -1
        return recording

    def begin_anew(self) -> Recording:
        """After `load_state_dict`: cut the episodes that the checkpoint could not hold, if there are any."""
        if not self._unsaved:
            return Recording()
        lost = len(self._running())
        recording = self.cut()
        recording.lost, self.observation, self._unsaved = lost, None, False
        return recording

    def _running(self) -> np.ndarray:
        """Environments in the middle of an episode."""
        return np.flatnonzero((self.episode >= 0) & (self.step > 0))

    def _begin(self, idle: np.ndarray) -> None:
        if not len(idle):
            return
        mask = np.zeros(self.pool.num_envs, dtype=bool)
        mask[idle] = True  # those that stay idle start an old episode again, which nobody records
        if self._last_episode is not None:
            idle = idle[: max(0, self._last_episode - self.next_episode)]
        self.episode[idle] = self.next_episode + np.arange(len(idle))
        self.next_episode += len(idle)
        rank, group = distributed.rank(), self.episode[idle] // self.group_size
        self.seed[idle] = [training_seed(self.run_seed, rank, int(number)) for number in group]
        self.step[idle] = 0
        self.returned[idle] = 0.0
        first = self.observation is None  # the pool has never been reset: all of it must be, once
        self.observation = self.pool.reset(self.seed, None if first else mask)

    def _advance(self, act: Act, recording: Recording, version: int) -> None:
        """One decision in every environment."""
        assert self.observation is not None
        taken = act(self.observation)
        result = self.pool.step(taken.action)
        active = self.episode >= 0
        valid = active & result.valid
        chosen, observation, kept = np.arange(self.pool.num_envs), self.observation, taken
        if not valid.all():
            chosen = np.flatnonzero(valid)
            observation, kept = pick_tree(observation, chosen), taken.take(chosen)
        span = result.info.get("env_steps", -1)  # of a chunk, how much of it
        recording.rows.append(
            Taken(
                streams=chosen,
                observation=observation,
                decisions=kept,
                reward=pick_tree(_streams(result), chosen),
                terminated=result.terminated[chosen],
                truncated=result.truncated[chosen],
                group=self.episode[chosen] // self.group_size,
                seed=self.seed[chosen],
                step=self.step[chosen],
                version=version,
                source=self.source,
                span=span[chosen] if isinstance(span, np.ndarray) else span,
            )
        )
        recording.decisions += len(chosen)
        if "cut" in kept.trace:
            recording.cut = (recording.cut or 0) + int(np.sum(kept.trace["cut"]))
        self.returned[chosen] += result.reward[chosen]
        self.step[chosen] += 1
        self.observation = result.observation
        over = result.terminated | result.truncated
        self._endless.step((over & active).any())
        self._finish(recording, active & ~result.valid, valid & over, result.info)
        if (over | ~result.valid).any():
            self._begin(np.flatnonzero(self.episode < 0))

    def _finish(self, recording: Recording, broken: np.ndarray, ended: np.ndarray, info: Mapping[str, Any]) -> None:
        """Close ended episodes, throw broken ones away."""
        if broken.any():
            failed = np.flatnonzero(broken)
            recording.rows.append(Broken(failed))
            recording.invalid += len(failed)
            if self._last_episode is not None:  # a counted episode that failed is run again, from another state
                self._last_episode += len(failed)
            self.episode[failed] = -1
        if ended.any():
            done = np.flatnonzero(ended)
            recording.rows.append(Last(done, self._shown(done)))
            success = info.get("success")
            recording.told |= success is not None
            recording.successes += [False] * len(done) if success is None else [bool(s) for s in success[done]]
            recording.returns += self.returned[done].tolist()
            recording.lengths += self.step[done].tolist()
            self.episode[done] = -1

    def _shown(self, streams: np.ndarray) -> Tree:
        """What these environments show now."""
        assert self.observation is not None
        return pick_tree(self.observation, streams)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly here; without "pool" if the environments cannot be saved."""
        if self.observation is None:
            return {"next_episode": self.next_episode}
        pool = self.pool.get_state()
        return ({} if pool is None else {"pool": pool}) | {
            "next_episode": self.next_episode,
            "episode": self.episode.copy(),
            "seed": self.seed.copy(),
            "step": self.step.copy(),
            "returned": self.returned.copy(),
            "observation": {
                k: np.asarray(v) if not isinstance(v, list) else list(v) for k, v in self.observation.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; call `begin_anew` before anything else is collected."""
        self.next_episode = int(state["next_episode"])
        if "observation" not in state:
            return
        self.episode[:], self.seed[:], self.step[:] = state["episode"], state["seed"], state["step"]
        self.returned[:] = state["returned"]
        self.observation = dict(state["observation"])
        self._unsaved = "pool" not in state
        if not self._unsaved:
            self.pool.reset(self.seed)  # builds what is built lazily; the state below replaces its effect
            self.pool.set_state(state["pool"])


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


def _streams(result: StepResult) -> dict[str, np.ndarray]:
    """Streams of reward [N]: the environment's, and 1 for the last decision of a success if success is told."""
    success = result.info.get("success")
    if success is None:
        return {"env": result.reward}
    return {"env": result.reward, "success": (success & (result.terminated | result.truncated)).astype(np.float32)}


def action_field(space: Space) -> Field:
    """The buffer column for actions of a space."""
    return fields_of(space)["observation"]
