"""Vision-language-action policies learn from images: PPO and GRPO on action tokens, PPO on a flow head.

A short imitation of imperfect demonstrations comes first; fine-tuning must rise clearly above it on held-out states,
and a broken twin of it must not.
"""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.data import Decisions, Field, Source
from embodied_rft.experience.collect import Collector
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import LearnerConfig
from tests.lab.harness import Lab, fails, require
from tests.lab.point import PointReach

pytestmark = pytest.mark.learning

SIZE = 32
SHEET = 5  # of the states that judge; options were chosen on others (0, 3 and 4)


class SeenReach(PointReach):
    """`PointReach` through a camera: a red point and a green goal on black, and nothing else to read."""

    def __init__(self, num_envs=16, **task):
        super().__init__(num_envs, **task)
        self.observation_space = gym.spaces.Dict({"image/top": gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)})
        self.fields = {"image/top": Field((SIZE, SIZE, 3), "uint8")}

    def _observe(self):
        pixel = (np.arange(SIZE) + 0.5) / SIZE
        image = np.zeros((self.num_envs, SIZE, SIZE, 3), np.uint8)
        for channel, place in ((0, self.position), (1, self.goal)):
            x, y = (np.exp(-(((pixel - place[:, axis, None]) / 0.15) ** 2)) for axis in (0, 1))
            image[..., channel] = 255 * x[:, :, None] * y[:, None, :]
        return {"image/top": image}


AGENT = {"id": "vla", "model": {"tiny": {}}, "prompt": "{images}{instruction}", "instruction": "go", "value": "own"}
TOKENS = AGENT | {"head": "tokens", "tokens": {"bins": 9}}
FLOW = AGENT | {"head": "flow", "flow": {"width": 64, "num_blocks": 1, "noise_level": 0.7}}
ON_POLICY = {"num_epochs": 3, "batch_size": 128}


class SeenLab(Lab):
    """A laboratory whose task is seen."""

    def __init__(self, agent, *, seed=0, tamper=None, num_envs=32):
        task = {"reward": "sparse", "num_steps": 8, "radius": 0.12, "speed": 0.25}
        self.pool = SeenReach(num_envs, **task)
        self.judge = SeenReach(50, purpose="evaluation", **task)
        self.seed, self.capacity, self.tamper = seed, 20_000, tamper
        self.rng = torch.Generator().manual_seed(seed)
        self.numbers = np.random.default_rng(seed)
        self.agent = build_agent(agent, self.pool.observation_space, self.pool.action_space, self.rng)
        self.new_buffer()

    def imitate(self, *, updates=150, episodes=200, skill=0.4, noise=0.2):
        """Imitation of someone who sees the state and goes the right way, but often too slowly to be in time."""

        def act(observation):
            offset = (self.pool.goal - self.pool.position) / self.pool.speed
            action = skill * offset / np.maximum(1, np.abs(offset).max(1, keepdims=True))
            action = (action + noise * self.numbers.standard_normal(action.shape)).clip(-1, 1).astype(np.float32)
            return Decisions(action, np.full((len(action), self.agent.policy.num_units), np.nan, np.float32))

        collector = Collector(self.pool, run_seed=self.seed, source=Source.DEMONSTRATION)
        collector.collect(act, episodes=episodes).write(self.buffer)
        self.tamper, tamper = None, self.tamper
        config = LearnerConfig(learning_rate=1e-3, clip_norm=1.0)
        self.pretrain({"id": "bc", "batch_size": 64}, updates=updates, config=config)
        self.tamper = tamper
        self.new_buffer()


def improve(agent, objective, *, rate, rounds, imitation=150, group_size=1, seed=0, tamper=None):
    """Fine-tuning must add at least 0.15 to a success rate that imitation left below 0.8.

    On sheets 3 and 4: PPO on tokens adds 0.21 to 0.48, GRPO 0.18 to 0.41, PPO on a flow 0.29 and 0.48 (on
    two further seeds imitation alone was above 0.8); the broken twins lose.
    """
    lab = SeenLab(agent, seed=seed, tamper=tamper)
    lab.imitate(updates=imitation)
    before = lab.success(episodes=200, sheet=SHEET)
    require(before < 0.8, f"imitation alone reached {before}")
    rates = {"value": 1e-3} if objective["id"] == "ppo" else {}
    discount = {} if objective["id"] == "grpo" else {"gamma": 0.95}  # credit of groups knows no discount
    objective = ON_POLICY | discount | objective
    lab.objective(objective, LearnerConfig(learning_rate=rate, clip_norm=1.0, learning_rates=rates))
    for _ in range(rounds):
        if group_size > 1:
            lab.episodes(128, group_size=group_size)
        else:
            lab.collect(384)
        lab.learner.learn(lab.buffer, lab.numbers)
    after = lab.success(episodes=200, sheet=SHEET)
    assert after >= before + 0.15, f"{before} -> {after}"


def shuffled_credit(batch):
    """Praise for somebody else's decision."""
    order = torch.from_numpy(np.random.default_rng(len(batch)).permutation(len(batch)))
    return replace(batch, notes={**batch.notes, "advantage": batch.notes["advantage"][order]})


def others_trace(batch):
    """Scores the neighbour's decision instead of one's own."""
    return replace(batch, trace={name: value.roll(1, 0) for name, value in batch.trace.items()})


def tokens_by_ppo(**options):
    improve(TOKENS, {"id": "ppo"}, rate=3e-4, rounds=16, **options)


def test_ppo_on_action_tokens():
    tokens_by_ppo()


def test_ppo_with_shuffled_credit_fails():
    fails(tokens_by_ppo, tamper=shuffled_credit)


def tokens_by_grpo(**options):
    improve(TOKENS, {"id": "grpo"}, rate=5e-4, rounds=24, group_size=8, **options)


def test_grpo_on_action_tokens():
    tokens_by_grpo()


def test_grpo_with_shuffled_credit_fails():
    fails(tokens_by_grpo, tamper=shuffled_credit)


def flow_by_ppo(**options):
    improve(FLOW, {"id": "ppo"}, rate=5e-4, rounds=16, imitation=220, **options)


def test_ppo_on_a_flow_head():
    flow_by_ppo()


def test_ppo_that_scores_other_chains_fails():
    fails(flow_by_ppo, tamper=others_trace)
