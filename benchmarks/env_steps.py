"""Environment steps per second on Fetch PickAndPlace: our native batch against the official one and its vectorisers.

    python -m benchmarks.env_steps [--quick]

Every competitor takes random actions, computes observations and rewards and resets after 50 steps; only real
transitions are counted, not the calls that reset. The bound is the physics alone: `mj_step` x 20 with random controls
on the official model, one persistent thread a core, times cores.

Bars on two cores: of_official >= 4.0, ratio (over the best peer) >= 2.6, of_bound >= 0.92.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import gymnasium_robotics
import mujoco
import numpy as np

import embodied_rft.envs  # noqa: F401  (registers)
from benchmarks import common
from embodied_rft.envs.manipulation.physics import num_cores

EPISODE = 50
OURS, OFFICIAL, BOUND = "ours, batch of 64", "official, single", "bound: mj_step alone"


def make_official() -> gymnasium.Env:
    """The official environment, without Gymnasium's passive checker; importable by worker processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gymnasium.register_envs(gymnasium_robotics)
        return gymnasium.make("FetchPickAndPlace-v4", disable_env_checker=True)


def bound_rate(official: gymnasium.Env, steps: int) -> float:
    """Physics alone: `steps` environment steps on each core's own thread, random controls, reset every 50 steps."""
    start: Any = official.unwrapped
    model = start.model
    link = model.body("robot0:gripper_link").id
    ready = threading.Barrier(num_cores() + 1)

    def work(seed: int) -> None:
        data = mujoco.MjData(model)
        actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 4))
        turn = np.array([1.0, 0.0, 1.0, 0.0])
        ready.wait()
        for i in range(steps):
            if i % EPISODE == 0:
                mujoco.mj_resetData(model, data)
                data.qpos[:], data.qvel[:] = start.initial_qpos, start.initial_qvel
                mujoco.mj_forward(model, data)
            data.mocap_pos[0] = data.xpos[link] + 0.05 * actions[i, :3]
            data.mocap_quat[0] = data.xquat[link] + turn
            data.ctrl[:] = data.qpos[[14, 13]] + actions[i, 3]
            mujoco.mj_step(model, data, nstep=20)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_cores())]
    for thread in threads:
        thread.start()
    ready.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    return steps * len(threads) / (time.perf_counter() - begin)


def single_rate(env: gymnasium.Env, seconds: float) -> float:
    """Transitions a second of one environment."""
    actions = np.random.default_rng(0).uniform(-1, 1, (EPISODE, 4)).astype(np.float32)

    def episode() -> float:
        env.reset()
        for action in actions:
            env.step(action)
        return EPISODE

    return common.rate(episode, seconds=seconds)


def vector_rate(env: gymnasium.vector.VectorEnv, seconds: float) -> float:
    """Transitions a second of a Gymnasium vector environment: one of 51 calls resets (next-step autoreset)."""
    actions = np.random.default_rng(0).uniform(-1, 1, (EPISODE, env.num_envs, 4)).astype(np.float32)
    env.reset()

    def episode() -> float:
        for action in actions:
            env.step(action)
        env.step(actions[0])  # resets
        return EPISODE * env.num_envs

    return common.rate(episode, seconds=seconds)


def sb3_rate(env: Any, seconds: float) -> float:
    """Transitions a second of a stable-baselines3 vector environment (it resets within the last step)."""
    actions = np.random.default_rng(0).uniform(-1, 1, (EPISODE, env.num_envs, 4)).astype(np.float32)
    env.reset()

    def episode() -> float:
        for action in actions:
            env.step(action)
        return EPISODE * env.num_envs

    return common.rate(episode, seconds=seconds)


def competitors(seconds: float) -> tuple[dict[str, Callable[[], float]], list[Any]]:
    """Name to one measurement, and what must be closed afterwards."""
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    ours = gymnasium.make_vec("embodied_rft/FetchPickAndPlace-v0", num_envs=64)
    rollout = gymnasium.make_vec("embodied_rft/FetchPickAndPlace-v0", num_envs=64, engine="rollout")
    official = make_official()
    vectors = {
        "gymnasium SyncVectorEnv(8)": gymnasium.vector.SyncVectorEnv([make_official] * 8),
        "gymnasium AsyncVectorEnv(2)": gymnasium.vector.AsyncVectorEnv([make_official] * 2),
        "gymnasium AsyncVectorEnv(8)": gymnasium.vector.AsyncVectorEnv([make_official] * 8),
    }
    sb3 = {
        "SB3 DummyVecEnv(8)": DummyVecEnv([make_official] * 8),
        "SB3 SubprocVecEnv(2)": SubprocVecEnv([make_official] * 2, start_method="fork"),
        "SB3 SubprocVecEnv(8)": SubprocVecEnv([make_official] * 8, start_method="fork"),
    }
    runs: dict[str, Callable[[], float]] = {
        BOUND: lambda: bound_rate(official, EPISODE * max(1, round(seconds * 40))),
        OURS: lambda: vector_rate(ours, seconds),
        "ours, engine rollout": lambda: vector_rate(rollout, seconds),
        OFFICIAL: lambda: single_rate(official, seconds),
    }
    runs |= {name: (lambda env=env: vector_rate(env, seconds)) for name, env in vectors.items()}  # type: ignore[misc]
    runs |= {name: (lambda env=env: sb3_rate(env, seconds)) for name, env in sb3.items()}  # type: ignore[misc]
    return runs, [ours, rollout, official, *vectors.values(), *sb3.values()]


def main() -> None:
    """Measure, print, close."""
    options = common.arguments(__doc__)
    runs, closing = competitors(seconds=0.5 if options.quick else 2.0)
    try:
        results = common.measure(runs, rounds=3 if options.quick else 7, warm_up=not options.quick)
    finally:
        for env in closing:
            env.close()
    common.table(results, unit="env steps/s", title="Fetch PickAndPlace", baseline=OFFICIAL)
    peers = [name for name in runs if name.startswith(("gymnasium", "SB3"))]
    common.finish(
        name="env_steps",
        results=results,
        ratio=common.ratio(results, OURS, peers),
        of_official=common.ratio(results, OURS, OFFICIAL),
        of_bound=common.ratio(results, OURS, BOUND),
    )


if __name__ == "__main__":
    main()
