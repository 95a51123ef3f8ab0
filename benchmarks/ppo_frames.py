"""PPO end to end on Reacher's physics, frames a second: ours against stable-baselines3 with equal hyper-parameters.

    python -m benchmarks.ppo_frames [--quick]

Both collect 16,384 frames an iteration, learn from them for 10 epochs with 64x64 tanh networks, learning rate 3e-4,
clip 0.2, gradient norm 0.5, and are judged on the same 200 starts after the same number of frames. Ours has 128
environments. SB3 has 8 x 2048, which the bars were set against, and, as "SB3 wide", 128 x 128, which suits it best.
Ours goes the ordinary way: Collector, Buffer, the objective `ppo`, Learner. The batched Reacher below has the official
one's start, observation, reward and horizon; `parity` checks that first. It reads the fingertip from the state after a
step, the official one within the integrator's last stage: 0.001 apart.

`ratio` and `ratio_1024` are those of compiled losses (`learner: {compile: true}`; the 20-60 s before the first update
fall in the warm-up iteration and are not counted) to SB3 8 x 2048, `..._wide` to SB3 wide; `..._eager` are those of the
default, nothing compiled.

Bars: ratio (minibatch 64) >= 2.0, ratio_1024 >= 3.0, and ours returns at least what SB3 returns, less 2.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from mujoco import rollout

from benchmarks.common import arguments, finish, measure, ratio, table
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Field
from embodied_rft.experience.collect import Collector
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.protocol import StepResult

FRAMES, ENVS, HORIZON, TOLERANCE = 16_384, 128, 50, 2e-3
PHYSICS = mujoco.mjtState.mjSTATE_FULLPHYSICS.value


class Reacher:
    """N Reacher-v5 as one pool on `mujoco.rollout`; the observation is a function of states alone."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.official: Any = gym.make("Reacher-v5").unwrapped
        self.model = self.official.model
        threads = [mujoco.MjData(self.model) for _ in range(2)]
        self.data, self.rollout = threads, rollout.Rollout(nthread=2)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (10,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.fields = {"observation": Field((10,))}
        self.state = np.zeros((num_envs, mujoco.mj_stateSize(self.model, PHYSICS)))
        self.elapsed = np.zeros(num_envs, np.int64)

    def reset(self, seeds: np.ndarray, mask: np.ndarray | None = None, options: Any = None) -> dict[str, np.ndarray]:
        """New starts, drawn as the official environment draws them."""
        for i in range(self.num_envs) if mask is None else np.flatnonzero(mask):
            rng = np.random.Generator(np.random.PCG64(int(seeds[i])))
            qpos = rng.uniform(-0.1, 0.1, 4) + self.official.init_qpos
            goal = rng.uniform(-0.2, 0.2, 2)
            while np.linalg.norm(goal) >= 0.2:
                goal = rng.uniform(-0.2, 0.2, 2)
            qpos[2:] = goal
            qvel = self.official.init_qvel + rng.uniform(-0.005, 0.005, 4)
            qvel[2:] = 0
            self.state[i] = np.concatenate([[0.0], qpos, qvel])
            self.elapsed[i] = 0
        return self.observe()

    def observe(self) -> dict[str, np.ndarray]:
        """[N, 10] float32."""
        theta, rest, speed = self.state[:, 1:3], self.state[:, 3:5], self.state[:, 5:7]
        parts = [np.cos(theta), np.sin(theta), rest, speed, fingertip_offset(self.state)]
        return {"observation": np.concatenate(parts, 1).astype(np.float32)}

    def step(self, action: Any) -> StepResult:
        """Two substeps, reward minus distance minus squared action."""
        controls = np.repeat(np.asarray(action, np.float64)[:, None], 2, axis=1)
        states, _ = self.rollout.rollout(self.model, self.data, self.state, controls)
        self.state = states[:, -1].copy()
        self.elapsed += 1
        reward = -np.linalg.norm(fingertip_offset(self.state), axis=1) - np.square(controls[:, 0]).sum(1)
        no = np.zeros(self.num_envs, bool)
        return StepResult(self.observe(), reward.astype(np.float32), no, self.elapsed >= HORIZON, {}, ~no)

    def get_state(self) -> None:
        """Not saved."""

    def close(self) -> None:
        """Stop the threads."""
        self.rollout.close()


def fingertip_offset(state: np.ndarray) -> np.ndarray:
    """Fingertip minus target [N, 2] of states [N, S]: forward kinematics of two links of 0.1 and 0.11."""
    first, second = state[:, 1], state[:, 1] + state[:, 2]
    x, y = (0.1 * f(first) + 0.11 * f(second) for f in (np.cos, np.sin))
    return np.stack([x, y], 1) - state[:, 3:5]


def parity(episodes: int = 4) -> float:
    """Largest difference of observations and rewards to the official environment, same starts and actions."""
    ours, official, worst = Reacher(episodes), gym.make("Reacher-v5"), 0.0
    actions = np.random.default_rng(0).uniform(-1, 1, (HORIZON, episodes, 2)).astype(np.float32)
    starts = ours.reset(np.arange(episodes))["observation"]
    steps = [ours.step(a) for a in actions]
    for i in range(episodes):
        observation, _ = official.reset(seed=i)
        worst = max(worst, float(np.abs(observation - starts[i]).max()))
        for result, action in zip(steps, actions, strict=True):
            observation, reward, _, truncated, _ = official.step(action[i])
            worst = max(worst, float(np.abs(observation - result.observation["observation"][i]).max()))
            worst = max(worst, abs(float(reward) - float(result.reward[i])))
            assert truncated == result.truncated[i]
    ours.close()
    return worst


def ours(minibatch: int, *, compiled: bool = False) -> tuple[Callable[[], float], Callable[[np.ndarray], np.ndarray]]:
    """(one iteration, giving frames a second; the policy as it explores)."""
    pool, rng, numbers = Reacher(ENVS), torch.Generator().manual_seed(0), np.random.default_rng(0)
    spec = {
        "id": "gaussian",
        "hidden": [64, 64],
        "activation": "tanh",
        "init": "orthogonal",
        "std": "free",
        "last_gain": 0.01,
    }
    agent = build_agent(spec, pool.observation_space, pool.action_space, rng)
    value = {"value_hidden": [64, 64], "value_activation": "tanh"}
    objective = build_objective({"id": "ppo", "num_epochs": 10, "batch_size": minibatch, **value})
    objective.setup(agent, rng)
    learner = Learner(agent, objective, LearnerConfig(learning_rate=3e-4, clip_norm=0.5, compile=compiled))
    trace = dict(agent.policy.trace_fields)
    buffer = Buffer(Schema(dict(pool.fields), Field((2,)), trace=trace, units=1), 2 * FRAMES)
    collector = Collector(pool, run_seed=0)

    def iteration() -> float:
        start = time.perf_counter()
        act = lambda observation: agent.policy.act(observation, rng=rng)  # noqa: E731
        collector.collect(act, decisions=FRAMES, version=learner.version).write(buffer)
        learner.learn(buffer, numbers)
        return FRAMES / (time.perf_counter() - start)

    judged = torch.Generator().manual_seed(1)
    return iteration, lambda observation: agent.policy.act({"observation": observation}, rng=judged).action


def peer(minibatch: int, *, envs: int = 8) -> tuple[Callable[[], float], Callable[[np.ndarray], np.ndarray]]:
    """The same with stable-baselines3."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    env = DummyVecEnv([lambda: gym.make("Reacher-v5", disable_env_checker=True)] * envs)
    model = PPO("MlpPolicy", env, n_steps=FRAMES // envs, batch_size=minibatch, n_epochs=10, device="cpu", seed=0)

    def iteration() -> float:
        start = time.perf_counter()
        model.learn(FRAMES, reset_num_timesteps=False)
        return FRAMES / (time.perf_counter() - start)

    return iteration, lambda observation: model.predict(observation)[0]


def judge(policy: Callable[[np.ndarray], np.ndarray], episodes: int = 200) -> float:
    """Mean return over starts that nobody trained on."""
    pool = Reacher(episodes)
    observation, total = pool.reset(2**31 + np.arange(episodes)), 0.0
    for _ in range(HORIZON):
        result = pool.step(np.clip(policy(observation["observation"]), -1, 1))
        observation, total = result.observation, total + float(result.reward.mean())
    pool.close()
    return total


def main() -> None:
    """Check the physics, measure, judge, print."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    difference = parity()
    assert difference < TOLERANCE, f"the batched Reacher differs from Reacher-v5 by {difference}"
    sides = {
        "SB3": peer,
        "SB3 wide": functools.partial(peer, envs=ENVS),
        "ours": ours,
        "ours compiled": functools.partial(ours, compiled=True),
    }
    made = {f"{who}, minibatch {size}": make(size) for size in (64, 1024) for who, make in sides.items()}
    before = {name: judge(policy) for name, (_, policy) in made.items()}
    results = measure({name: run for name, (run, _) in made.items()}, rounds=2 if options.quick else 12)
    after = {name: judge(policy) for name, (_, policy) in made.items()}
    table(results, unit="frames/s", title="PPO on Reacher, end to end", baseline="SB3, minibatch 64")
    for name in made:
        print(f"{name}: return {before[name]:.1f} before, {after[name]:.1f} after training")
    returns = {who: np.array([after[f"{who}, minibatch {size}"] for size in (64, 1024)]) for who in sides}
    us, them = [who for who in sides if who.startswith("ours")], [who for who in sides if who.startswith("SB3")]
    lead = min((returns[who] - returns[other]).min() for who in us for other in them)
    of = lambda size, who, other: ratio(results, f"{who}, minibatch {size}", f"{other}, minibatch {size}")  # noqa: E731
    finish(
        name="ppo_frames",
        results=results,
        ratio=of(64, "ours compiled", "SB3"),
        ratio_eager=of(64, "ours", "SB3"),
        ratio_wide=of(64, "ours compiled", "SB3 wide"),
        ratio_1024=of(1024, "ours compiled", "SB3"),
        ratio_1024_eager=of(1024, "ours", "SB3"),
        ratio_1024_wide=of(1024, "ours compiled", "SB3 wide"),
        returns={name: round(value, 2) for name, value in after.items()},
        returns_before={name: round(value, 2) for name, value in before.items()},
        return_lead=float(lead),
        parity=difference,
    )


if __name__ == "__main__":
    main()
