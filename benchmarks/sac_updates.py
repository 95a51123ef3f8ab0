"""SAC updates a second, replay sampling included: ours (fp32 and bf16) against stable-baselines3, and the bound.

The same mathematics on both sides: two critics and a policy of 256x256, batch 256, 28 observations, 4 actions, entropy
tuning, policy updated every time. The bound is the time that the matrix products alone take at the measured GEMM rate.

    python -m benchmarks.sac_updates [--quick]
"""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from benchmarks.common import arguments, finish, measure, rate, ratio, table
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Field
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective

OBSERVATION = gym.spaces.Box(-np.inf, np.inf, (28,), np.float32)
ACTION = gym.spaces.Box(-1, 1, (4,), np.float32)
BATCH, HIDDEN, ROWS = 256, 256, 20_000
CHUNK = 20  # updates between looks at the clock


class Spaces(gym.Env):
    """What stable-baselines3 needs an environment for: its spaces."""

    observation_space, action_space = OBSERVATION, ACTION

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Never stepped."""
        return np.zeros(28, np.float32), {}

    def step(self, action: Any) -> Any:
        """Never stepped."""
        raise NotImplementedError


def ours(precision: Any) -> Any:
    """A function that makes CHUNK updates."""
    rng, numbers = torch.Generator().manual_seed(0), np.random.default_rng(0)
    agent = build_agent({"id": "gaussian"}, OBSERVATION, ACTION, rng)
    objective = build_objective({"id": "sac", "batch_size": BATCH})
    objective.setup(agent, rng)
    learner = Learner(agent, objective, LearnerConfig(precision=precision))
    schema = Schema(observation={"observation": Field((28,))}, action=Field((4,)), trace={"u": Field((4,))}, units=1)
    buffer = Buffer(schema, ROWS + 100)
    streams = np.arange(100)
    for _ in range(ROWS // len(streams)):
        action = numbers.uniform(-1, 1, (100, 4)).astype(np.float32)
        buffer.add(
            streams,
            {"observation": numbers.standard_normal((100, 28)).astype(np.float32)},
            Decisions(action, np.zeros((100, 1), np.float32), {"u": action}),
            numbers.standard_normal(100).astype(np.float32),
            np.zeros(100, bool),
            np.zeros(100, bool),
        )

    def work() -> float:
        for batch in itertools.islice(objective.reading.batches(buffer, numbers, learner.version), CHUNK):
            learner.update(batch, rng)
        learner.metrics()
        return CHUNK

    return work


def peer() -> Any:
    """The same with stable-baselines3."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    model = SAC("MlpPolicy", Spaces(), buffer_size=ROWS, batch_size=BATCH, seed=0, device="cpu")
    model.set_logger(Logger(None, []))
    numbers = np.random.default_rng(0)
    assert model.replay_buffer is not None
    for _ in range(ROWS):
        observation = numbers.standard_normal((2, 1, 28)).astype(np.float32)
        action = numbers.uniform(-1, 1, (1, 4)).astype(np.float32)
        reward = numbers.standard_normal(1).astype(np.float32)
        model.replay_buffer.add(observation[0], observation[1], action, reward, np.zeros(1), [{}])

    def work() -> float:
        model.train(gradient_steps=CHUNK, batch_size=BATCH)
        return CHUNK

    return work


def products(dtype: torch.dtype) -> Any:
    """A function that multiplies 256x256 matrices and returns how many updates' worth of products it did."""
    a, b = torch.randn(2, 256, 256).to(dtype), torch.randn(2, 256, 256).to(dtype)

    def work() -> float:
        for _ in range(50):
            torch.bmm(a, b)
        return 50 * 2 * 2 * 256**3 / flops()

    return work


def flops() -> float:
    """Floating-point operations of the matrix products of one update."""
    first_critic, first_policy, square = 32 * HIDDEN, 28 * HIDDEN, HIDDEN * HIDDEN
    critic, policy = first_critic + square + HIDDEN, first_policy + square + HIDDEN * 8
    targets = policy + 2 * critic
    critic_step = 2 * (critic + critic + critic - first_critic)  # forward, weight gradients, input gradients
    policy_step = 2 * (critic + critic) + policy + policy + policy - first_policy  # no weight gradients of the critic
    return 2.0 * BATCH * (targets + critic_step + policy_step)


def main() -> None:
    """Measure, print, end with one JSON line."""
    options = arguments(__doc__)
    seconds, rounds = (1.0, 5) if options.quick else (2.0, 15)
    works = {
        "ours, fp32": ours("fp32"),
        "ours, bf16": ours("bf16"),
        "stable-baselines3": peer(),
        "bound: matrix products, fp32": products(torch.float32),
        "bound: matrix products, bf16": products(torch.bfloat16),
    }
    runs = {name: (lambda work=work: rate(work, seconds=seconds)) for name, work in works.items()}
    results = measure(runs, rounds=rounds)
    table(results, unit="updates/s", title="SAC updates, 256x256, batch 256", baseline="stable-baselines3")
    finish(
        name="sac_updates",
        results=results,
        ratio=ratio(results, "ours, fp32", "stable-baselines3"),
        ratio_bf16=ratio(results, "ours, bf16", "stable-baselines3"),
        of_bound=ratio(results, "ours, fp32", "bound: matrix products, fp32"),
        of_bound_bf16=ratio(results, "ours, bf16", "bound: matrix products, bf16"),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
