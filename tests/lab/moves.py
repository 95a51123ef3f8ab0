"""A toy of many turns: choose one of a few moves T times; what was chosen so far is seen, `pay` says what it is worth.

Legend: N environments, T moves of an episode, M kinds of moves.
"""

import gymnasium as gym
import numpy as np
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Field
from embodied_rft.experience.collect import Collector
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.incidents import Incidents
from embodied_rft.pools.protocol import StepResult

CATEGORICAL = {"id": "categorical", "hidden": [32]}


class Moves:
    """`pay(moves [N, t], secret [N]) -> (reward [N], success [N])` after each move; the secret is drawn by the seed.

    Args:
        num_envs: N.
        length: T.
        kinds: M.
        pay: see above.
        tell: (moves [N, t], secret) -> what is seen of the secret [N, K]; None: nothing.
        secrets: how many there are.
        told: K.
    """

    def __init__(self, num_envs, *, length, kinds, pay, tell=None, told=0, secrets=1):
        self.num_envs, self.length, self.kinds, self.pay, self.tell, self.secrets = (
            num_envs, length, kinds, pay, tell, secrets,
        )  # fmt: skip
        self.observation_space = gym.spaces.Box(0, 1, (length * kinds + told,), np.float32)
        self.action_space = gym.spaces.Discrete(kinds)
        self.fields = {"observation": Field((length * kinds + told,))}
        self.action_field = Field((), "int64")
        self.incidents = Incidents()
        self.moves = np.full((num_envs, length), -1, np.int64)
        self.secret, self.turn = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)

    def reset(self, seeds, mask=None, options=None):
        for i in range(self.num_envs) if mask is None else np.flatnonzero(mask):
            self.secret[i] = np.random.default_rng(int(seeds[i])).integers(self.secrets)
            self.moves[i], self.turn[i] = -1, 0
        return self._observe()

    def _observe(self):
        seen = np.eye(self.kinds + 1, dtype=np.float32)[self.moves][:, :, : self.kinds].reshape(self.num_envs, -1)
        if self.tell is not None:
            seen = np.concatenate([seen, self.tell(self.moves, self.turn, self.secret)], 1).astype(np.float32)
        return {"observation": seen}

    def step(self, action):
        rows = np.arange(self.num_envs)
        going = self.turn < self.length
        self.moves[rows[going], self.turn[going]] = np.asarray(action).reshape(-1)[going]
        self.turn += going
        reward, success = self.pay(self.moves, self.turn, self.secret)
        over, no = self.turn >= self.length, np.zeros(self.num_envs, bool)
        return StepResult(self._observe(), reward.astype(np.float32), over, no, {"success": over & success}, ~no)

    def get_state(self):
        return None

    def close(self):
        pass


class Lab:
    """One agent and one task, made by `make(num_envs)`; `tamper(batch)` may break what the learner sees."""

    def __init__(self, make, *, seed=0, num_envs=64, tamper=None, agent=CATEGORICAL):
        self.pool, self.tamper = make(num_envs), tamper
        self.rng, self.numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        self.agent = build_agent(agent, self.pool.observation_space, self.pool.action_space, self.rng)
        policy = self.agent.policy
        trace = dict(policy.trace_fields)
        schema = Schema(dict(self.pool.fields), self.pool.action_field, trace, policy.num_units, ("env", "success"))
        self.buffer, self.seed, self.episodes = Buffer(schema, 20_000), seed, 0

    def objective(self, spec, *, learning_rate=3e-3, **config):
        objective = build_objective(spec)
        objective.setup(self.agent, self.rng)
        self.learner = Learner(self.agent, objective, LearnerConfig(learning_rate=learning_rate, **config))
        if self.tamper is not None:
            update = self.learner.update
            self.learner.update = lambda batch, rng, **more: update(self.tamper(batch), rng, **more)
        return objective

    def act(self, observation):
        return self.agent.policy.act(observation, rng=self.rng)

    def collect(self, episodes, *, group_size=1, sieve=None):
        """Whole episodes of the policy, and how many of them succeeded."""
        first = self.episodes
        collector = Collector(self.pool, run_seed=self.seed, first_episode=first, group_size=group_size, sieve=sieve)
        recording = collector.collect(self.act, episodes=episodes, version=self.learner.version)
        recording.write(self.buffer)
        self.episodes = collector.next_episode
        return float(np.mean(recording.successes))

    def finetune(self, rounds, *, episodes=64, group_size=1, updates=None):
        """Collect and learn in turns; the success of each round."""
        curve = []
        for _ in range(rounds):
            curve.append(self.collect(episodes, group_size=group_size))
            self.learner.learn(self.buffer, self.numbers, num_updates=updates)
        return curve

    def play(self, episodes=500, *, seed=10**6):
        """Moves [episodes, T] of sampled episodes, and the secrets [episodes]."""
        pool = type(self.pool).__new__(type(self.pool))
        pool.__dict__.update(self.pool.__dict__)
        pool.num_envs = episodes
        pool.moves = np.full((episodes, pool.length), -1, np.int64)
        pool.secret, pool.turn = np.zeros(episodes, np.int64), np.zeros(episodes, np.int64)
        seen, rng = pool.reset(seed + np.arange(episodes)), torch.Generator().manual_seed(seed)
        for _ in range(pool.length):
            seen = pool.step(self.agent.policy.act(seen, rng=rng).action).observation
        return pool.moves, pool.secret
