"""Small pools with known answers for tests of collection and evaluation."""

import gymnasium
import numpy as np

from embodied_rft.data import Field
from embodied_rft.pools.incidents import Incidents
from embodied_rft.pools.protocol import Pool, StepResult


class SeedPool(Pool):
    """Episode of seed s: 1 + s % 5 steps, reward 1 each, success if s % 3 == 0; the observation is [seed, step]."""

    can_save = True

    def __init__(self, num_envs, *, break_once=(), break_always=(), break_at=1, can_save=True):
        self.num_envs = num_envs
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.fields, self.action_field = {"observation": Field((2,))}, Field((1,))
        self.incidents = Incidents()
        self.seeds = np.zeros(num_envs, np.int64)
        self.steps = np.zeros(num_envs, np.int64)
        self.over = np.ones(num_envs, bool)
        self.break_once, self.break_always, self.can_save = set(break_once), set(break_always), can_save
        self.break_at = break_at  # step

    def _observe(self):
        return {"observation": np.stack([self.seeds % 100_000, self.steps], 1).astype(np.float64)}

    @property
    def observation(self):
        return self._observe()

    def reset(self, seeds, mask=None, options=None):
        mask = np.ones(self.num_envs, bool) if mask is None else mask
        self.seeds[mask], self.steps[mask], self.over[mask] = np.asarray(seeds)[mask], 0, False
        return self._observe()

    def step(self, action):
        running = ~self.over
        assert running.any(), "no environment has a running episode"
        self.steps += running
        terminated = self.steps >= 1 + self.seeds % 5
        broken = np.array([s in self.break_once or s in self.break_always for s in self.seeds])
        broken &= running & (self.steps == self.break_at)
        self.break_once -= set(self.seeds[broken].tolist())
        self.over, valid = self.over | terminated | broken, running & ~broken
        reward, info = valid.astype(np.float32), {"success": terminated & (self.seeds % 3 == 0)}
        return StepResult(self._observe(), reward, terminated & valid, ~valid, info, valid)

    def get_state(self):
        if not self.can_save:
            return None
        return {"seeds": self.seeds.copy(), "steps": self.steps.copy(), "over": self.over.copy()}

    def set_state(self, state):
        self.seeds, self.steps, self.over = (state[k].copy() for k in ("seeds", "steps", "over"))

    def close(self):
        pass


class Corridor(gymnasium.Env):
    """Walks forward whatever is done, like most environments without get_state: `length` steps, reward 1 each.

    Args:
        length: steps of an episode; 0: it never ends. With `spread`, up to so many more, decided by the seed.
        spread: see `length`.
        end: what the last step says, "terminated" or "truncated".
        success: when an episode counts as a success: "end", "middle" (lost again), "never", or "" (nothing is told).
        tell: "always", or "end": success is told with the last step only.
        fails: seeds of which each first step is NaN.
    """

    metadata = {"render_modes": []}

    def __init__(
        self, *, length=5, spread=0, end="terminated", success="end", tell="always", fails=(), render_mode=None
    ):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.length, self.spread, self.end, self.success, self.tell = length, spread, end, success, tell
        self.fails, self.render_mode = set(fails), render_mode

    def _observe(self):
        return np.array([self.t / 10, self.place], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.broken = 0, seed in self.fails
        self.place = float(self.np_random.normal())
        self.last = self.length + (int(self.np_random.integers(self.spread + 1)) if self.spread else 0)
        return self._observe(), {}

    def step(self, action):
        self.t += 1
        over = self.t == self.last
        won = {"end": over, "middle": self.t == self.last // 2}.get(self.success, False)
        info = {"success": won} if self.success and (over or self.tell == "always") else {}
        reward = float("nan") if self.broken else 1.0
        return self._observe(), reward, over and self.end == "terminated", over and self.end == "truncated", info


if "Corridor-v0" not in gymnasium.registry:
    gymnasium.register("Corridor-v0", Corridor)
