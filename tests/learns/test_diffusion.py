"""Chunk policies learn: two-mode imitation, PPO through the chain, steering, queued residual; broken twins do not."""

import numpy as np
import pytest
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Field, Source, Trajectory
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.experience.collect import Collector
from embodied_rft.experience.recut import chunk_trajectories
from embodied_rft.learning.agent import build_agent, wrap_policy
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.chunks import ChunkPool
from tests.lab.point import PointDemonstrator, PointReach

pytestmark = [pytest.mark.learning, pytest.mark.usefixtures("one_thread")]
SHEET = 7  # of the states that judge; none of the numbers below was chosen on it
SMALL = {"width": 64, "num_blocks": 1, "horizon": 2}
DIFFUSION = {"id": "diffusion", "denoising_steps": 5, **SMALL}
FLOW = {"id": "flow", "num_steps": 4, **SMALL}
CONSISTENCY = {"id": "consistency", "num_steps": 2, **SMALL}
GAUSSIAN = {"id": "gaussian", "hidden": [64, 64]}
FAST = LearnerConfig(learning_rate=2e-3)


class Lab:
    """One agent on PointReach with the pool that its spec asks for; each method is what a stage of a recipe does."""

    def __init__(self, spec, *, seed=0):
        self.seed, self.rng, self.numbers = seed, torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        pool, judge = PointReach(16), PointReach(50, purpose="evaluation")
        self.agent = build_agent(spec, pool.observation_space, pool.action_space, self.rng)
        self.pool, self.judge = (self.agent.policy.fit_pool(each) for each in (pool, judge))
        self.new_buffer()

    def new_buffer(self):
        policy = self.agent.policy
        schema = Schema(
            observation=dict(self.pool.fields),
            action=self.pool.action_field,
            trace=dict(policy.trace_fields),
            units=policy.num_units,
        )
        self.buffer, self.collector = Buffer(schema, 20_000), Collector(self.pool, run_seed=self.seed + 1)

    def clone(self, *, updates, **demonstrator):
        """Imitate a demonstrator of single steps; returns the success of the clone."""
        pool = PointReach(16)
        person = PointDemonstrator(pool, noise=0.1, **demonstrator)
        act = lambda o: Decisions(person.act(o, self.numbers), np.zeros((16, 1), np.float32))  # noqa: E731
        schema = Schema(observation=dict(pool.fields), action=pool.action_field, trace={}, units=1)
        steps = Buffer(schema, 10_000)
        Collector(pool, run_seed=self.seed, source=Source.DEMONSTRATION).collect(act, episodes=150).write(steps)
        for each in chunk_trajectories(list(steps.trajectories()), horizon=2):
            self.buffer.add_trajectory(each)
        self.learn({"id": "bc"}, FAST)
        self.learner.learn(self.buffer, self.numbers, num_updates=updates)
        return self.success()

    def learn(self, spec, config):
        objective = build_objective(spec)
        objective.setup(self.agent)
        self.learner = Learner(self.agent, objective, config)
        self.new_buffer() if spec["id"] != "bc" else None
        return objective

    def collect(self, decisions):
        act = lambda o: self.agent.policy.act(o, rng=self.rng)  # noqa: E731
        self.collector.collect(act, decisions=decisions, version=self.learner.version).write(self.buffer)

    def ppo(self, *, rounds, shuffle, learning_rate=1e-3):
        """PPO; the broken twin gives the advantages to the wrong decisions."""
        spec = {"id": "ppo", "num_epochs": 4, "batch_size": 400, "gamma": 0.9, "value_hidden": [64, 64]}
        objective = self.learn(spec, LearnerConfig(learning_rate=learning_rate, clip_norm=1.0))
        loss = objective.losses["policy"]

        def shuffled(agent, batch, rng):
            batch.notes["advantage"] = batch.notes["advantage"][torch.randperm(len(batch), generator=rng)]
            return loss(agent, batch, rng)

        if shuffle:
            objective.losses["policy"] = shuffled
        for _ in range(rounds):
            self.collect(800)
            self.learner.learn(self.buffer, self.numbers)
        return self.success()

    def success(self):
        """Greedy success on held-out states."""
        act = lambda o: self.agent.policy.act(o, greedy=True)  # noqa: E731
        return evaluate(act, self.judge, evaluation_seeds(200, sheet=SHEET)).success


# --- imitation of two modes ----------------------------------------------------------------------------------------


def two_modes(count, seed):
    """Chunks [count, 4] of two steps: go left or right at will (+-0.6), and up by what is seen."""
    rng = np.random.default_rng(seed)
    state = rng.uniform(-1, 1, (count, 2)).astype(np.float32)
    side = rng.choice([-0.6, 0.6], count)
    action = np.tile(np.stack([side, 0.4 * state[:, 0]], 1), 2) + 0.02 * rng.standard_normal((count, 4))
    return state, action.astype(np.float32)


def imitate(spec, *, updates=600):
    """Shares of samples near the left and near the right mode, after cloning."""
    pool = ChunkPool(PointReach(1), horizon=2)
    pool.observation_space = type(pool.observation_space)(-1, 1, (2,), np.float32)
    rng = torch.Generator().manual_seed(0)
    agent = build_agent(spec, pool.observation_space, pool.action_space, rng)
    state, action = two_modes(4000, seed=0)
    buffer = Buffer(Schema(observation={"observation": Field((2,))}, action=Field((4,)), trace={}, units=1), 5000)
    observation = {"observation": np.concatenate([state, state[-1:]])}
    buffer.add_trajectory(
        Trajectory(observation=observation, action=action, reward=np.zeros(4000, np.float32), end="truncated")
    )
    objective = build_objective({"id": "bc"})
    objective.setup(agent)
    Learner(agent, objective, FAST).learn(buffer, np.random.default_rng(0), num_updates=updates)
    unseen, _ = two_modes(1000, seed=1)
    taken = agent.policy.act({"observation": unseen}, rng=rng).action

    def near(side):
        target = np.tile(np.stack([np.full(1000, side), 0.4 * unseen[:, 0]], 1), 2)
        return float((np.abs(taken - target).max(1) < 0.2).mean())

    return near(-0.6), near(0.6)


@pytest.mark.parametrize(
    "spec", [{**DIFFUSION, "denoising_steps": 20}, {**FLOW, "num_steps": 10}, CONSISTENCY], ids=lambda s: s["id"]
)
def test_chunk_policies_imitate_both_modes(spec):
    left, right = imitate({**spec, "min_std": 0.02})
    assert left + right > 0.7 and min(left, right) > 0.25


def test_a_gaussian_with_squared_error_imitates_neither_mode():
    left, right = imitate({**GAUSSIAN, "horizon": 2, "deterministic": True, "exploration_noise": 0.02})
    assert left + right < 0.1


# --- PPO through the chain -------------------------------------------------------------------------------------------

LEARNED = {**FLOW, "noise": "learned", "max_std": 0.3}  # as in ReinFlow
each_chain = pytest.mark.parametrize(
    ("spec", "last"),
    [(DIFFUSION, None), (DIFFUSION, 2), (FLOW, None), (LEARNED, None)],
    ids=["diffusion", "last steps", "flow", "learned noise"],
)


def tune(spec, last, *, shuffle, seed=0):
    """PPO on a slow clone, through its whole chain or the last steps of it; success before and after."""
    lab = Lab(spec, seed=seed)
    cloned = lab.clone(updates=600, skill=0.3)
    if last is not None:
        lab.agent.policy = wrap_policy("last_steps", lab.agent, lab.rng, num_steps=last)
    return cloned, lab.ppo(rounds=8, shuffle=shuffle)


@each_chain
def test_ppo_improves_a_cloned_chunk_policy(spec, last):
    cloned, tuned = tune(spec, last, shuffle=False)
    assert cloned < 0.92 and tuned > max(cloned + 0.05, 0.95)


@each_chain
def test_ppo_with_shuffled_advantages_does_not(spec, last):
    cloned, tuned = tune(spec, last, shuffle=True)
    assert tuned < max(cloned + 0.05, 0.9)


# --- steering ------------------------------------------------------------------------------------------------------

DDIM = {**DIFFUSION, "denoising_steps": 10, "ddim_steps": 4}


def steer(objective, base, *, scale=1.5, without=None, seed=0):
    """A base that walks to its goal or away from it, at random; steering learns which noise leads to the goal."""
    lab = Lab(base, seed=seed)
    cloned = lab.clone(updates=600, wrong=0.5)
    lab.agent.policy = wrap_policy("steering", lab.agent, lab.rng, hidden=[64, 64], scale=scale)
    sac = {"id": objective, "critic_hidden": [64, 64], "batch_size": 128, "gamma": 0.9, "tau": 0.02}
    made = lab.learn({**sac, "initial_temperature": 0.03, "backup_entropy": False}, LearnerConfig(learning_rate=1e-3))
    made.losses.pop(without, None)
    for _ in range(10):
        lab.collect(200)
        lab.learner.learn(lab.buffer, lab.numbers, num_updates=100)
    return cloned, lab.success()


@pytest.mark.parametrize(
    ("objective", "base"), [("sac", DDIM), ("dsrl_sac", FLOW), ("dsrl_na", FLOW), ("dsrl_na", DDIM)]
)
def test_steering_finds_the_noise_that_reaches_the_goal(objective, base):
    cloned, steered = steer(objective, base)
    assert cloned < 0.5 and steered > 0.8


@pytest.mark.parametrize("objective", ["sac", "dsrl_sac"])
def test_steering_without_noise_to_choose_does_not(objective):
    cloned, steered = steer(objective, FLOW, scale=1e-6)
    assert cloned < 0.5 and steered < cloned + 0.1


def test_steering_by_a_noise_critic_that_is_not_distilled_does_not():
    cloned, steered = steer("dsrl_na", FLOW, without="noise_critic")
    assert cloned < 0.5 and steered < 0.6


# --- residual on a queued base ---------------------------------------------------------------------------------------


def residual_ppo(*, shuffle):
    """ResiP: a slow cloned chunk policy plans, the residual corrects every single step."""
    lab = Lab(DIFFUSION)
    lab.clone(updates=600, skill=0.2)
    base = lab.agent.policy
    spec = {"id": "residual", "base": {"id": "queued", "base": DIFFUSION}, "scale": 0.6, "hidden": [64, 64]}
    after = Lab(spec)
    after.agent.policy.base.load_base(base)
    start = after.success()
    return start, after.ppo(rounds=10, shuffle=shuffle)


def test_residual_ppo_improves_a_queued_diffusion_base():
    start, end = residual_ppo(shuffle=False)
    assert start < 0.8 and end > max(start + 0.15, 0.9)


def test_residual_ppo_with_shuffled_advantages_does_not():
    start, end = residual_ppo(shuffle=True)
    assert end < start + 0.1
