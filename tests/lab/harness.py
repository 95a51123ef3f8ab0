"""How learning tests run: real buffer, learner and collector; trained on training seeds, judged on held-out ones."""

import numpy as np
import pytest
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Source
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.experience.collect import Collector
from embodied_rft.learning.agent import build_agent, wrap_policy
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from tests.lab.point import PointReach

GAUSSIAN = {"id": "gaussian", "hidden": [64, 64]}
DETERMINISTIC = GAUSSIAN | {"deterministic": True}
CRITIC = {"critic_hidden": [64, 64], "batch_size": 128, "gamma": 0.95, "tau": 0.02}
FAST = LearnerConfig(learning_rate=1e-3)


def fails(check, *args, **kwargs):
    """The broken twin must fail the very assertion that the algorithm passes."""
    with pytest.raises(AssertionError):
        check(*args, **kwargs)


def require(condition, why):
    """A precondition of a learning test; if it does not hold, neither the algorithm nor its twin passes."""
    if not condition:
        raise RuntimeError(why)


class Lab:
    """One agent, one buffer, one task; each method is what a stage of a recipe does.

    `tamper(batch)` may break every batch before the learner sees it: that is how most broken twins are made.
    `make(num_envs, purpose=..., **task)` gives a pool of the task.
    """

    def __init__(self, agent, *, capacity=30_000, num_envs=16, seed=0, tamper=None, make=PointReach, **task):
        self.pool = make(num_envs, purpose="training", **task)
        self.judge = make(50, purpose="evaluation", **task)
        self.seed, self.capacity, self.tamper = seed, capacity, tamper
        self.rng = torch.Generator().manual_seed(seed)
        self.numbers = np.random.default_rng(seed)
        self.agent = build_agent(agent, self.pool.observation_space, self.pool.action_space, self.rng)
        self.collector = None
        self.new_buffer()

    def new_buffer(self):
        """Start with no experience (WSRL drops the offline data)."""
        schema = Schema(
            observation=dict(self.pool.fields),
            action=self.pool.action_field,
            trace=dict(self.agent.policy.trace_fields),
            units=self.agent.policy.num_units,
        )
        self.buffer = Buffer(schema, self.capacity)
        self.collector = None

    def demonstrate(self, demonstrator, *, episodes):
        """Episodes of a demonstrator, kept for good; returns its success."""

        def act(observation):
            action = demonstrator.act(observation, self.numbers)
            return Decisions(action, np.zeros((len(action), 1), np.float32))

        collector = Collector(self.pool, run_seed=self.seed, source=Source.DEMONSTRATION)
        recording = collector.collect(act, episodes=episodes)
        recording.write(self.buffer)
        self.buffer.pin()
        return float(np.mean(recording.successes))

    def objective(self, spec, config=FAST):
        """Change the objective; what the agent has learnt so far stays."""
        objective = build_objective(spec)
        objective.setup(self.agent)
        self.learner = Learner(self.agent, objective, config)
        if self.tamper is not None:
            update = self.learner.update
            self.learner.update = lambda batch, rng, **more: update(self.tamper(batch), rng, **more)
        return objective

    def pretrain(self, spec, *, updates, config=FAST):
        """Gradient steps on what is there."""
        self.objective(spec, config)
        return self.learner.learn(self.buffer, self.numbers, num_updates=updates)

    def act(self, observation):
        """How the agent explores."""
        explore = getattr(self.learner.objective, "explore", None)
        if explore is not None:
            return explore(self.agent, observation, rng=self.rng)
        return self.agent.policy.act(observation, rng=self.rng)

    def collect(self, decisions):
        """New experience of the current policy."""
        if self.collector is None:
            self.collector = Collector(self.pool, run_seed=self.seed + 1)
        recording = self.collector.collect(self.act, decisions=decisions, version=self.learner.version)
        recording.write(self.buffer)

    def wrap(self, id="residual", **options):
        """Put an adapter around the trained policy; the experience is carried over."""
        old = self.buffer
        self.agent.policy = wrap_policy(id, self.agent, self.rng, **options)
        self.new_buffer()
        for trajectory in old.trajectories():
            self.buffer.add_trajectory(trajectory, retrace=self.agent.policy.retrace)
        self.buffer.pin()

    def episodes(self, count, *, group_size):
        """Whole episodes of the current policy, `group_size` siblings from each start."""
        if self.collector is None:
            first = int(self.buffer.rows().size)  # a new collector must not repeat the states of an earlier one
            self.collector = Collector(self.pool, run_seed=self.seed + 1, first_episode=first, group_size=group_size)
        recording = self.collector.collect(self.act, episodes=count, version=self.learner.version)
        recording.write(self.buffer)

    def finetune(self, *, rounds, decisions, updates, judge_every=None):
        """Collect and learn in turns; returns the success at each point of the curve."""
        curve = []
        for i in range(rounds):
            self.collect(decisions)
            self.learner.learn(self.buffer, self.numbers, num_updates=updates)
            if judge_every and (i + 1) % judge_every == 0:
                curve.append(self.success(episodes=100, sheet=1))
        return curve

    def success(self, *, episodes=100, sheet=0):
        """Greedy success on held-out states."""

        def act(observation):
            return self.agent.policy.act(observation, greedy=True)

        return evaluate(act, self.judge, evaluation_seeds(episodes, sheet=sheet)).success
