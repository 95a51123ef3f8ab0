"""Well-known Gymnasium tasks: final return and learning time of our ten-line recipes beside stable-baselines3's own.

    python -m benchmarks.gym_tasks [--quick] [--task cartpole ...] [--seeds 3] [--only ours|sb3] [--out FILE.jsonl]

Both sides take as many environment steps with the same published settings (those of rl-baselines3-zoo where it has
some), on one thread, one after the other for each seed; a policy is judged greedily on the same 50 initial states. The
time is that of training alone, on the wall and of the processor (the same on a quiet machine). `ratio` is the least,
over tasks, of SB3's processor time over ours.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from benchmarks.common import Result, finish, table

EPISODES = 50
FIRST_STATE = 1_000_000  # seeds of the judged initial states; training draws others


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """(on the wall, of the processor)."""
        return time.perf_counter() - self._wall, time.process_time() - self._processor


@dataclass(frozen=True)
class Task:
    """An environment, our recipe for it, and what SB3 is given."""

    recipe: str
    env: str
    algorithm: str
    steps: int
    num_envs: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()


PPO = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0}
TASKS = {
    "cartpole": Task("tasks/cartpole", "CartPole-v1", "PPO", 100_000, 8, PPO | {"learning_rate": 1e-3}),
    "lunar_lander": Task(
        "tasks/lunar_lander",
        "LunarLander-v3",
        "PPO",
        300_000,
        16,
        {"n_steps": 256, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4, "ent_coef": 0.01},
    ),
    "pendulum": Task("tasks/pendulum", "Pendulum-v1", "SAC", 10_000, 1, {"learning_rate": 1e-3}),
    "half_cheetah": Task("tasks/half_cheetah", "HalfCheetah-v5", "SAC", 100_000, 1, {"learning_starts": 10_000}),
    "minigrid": Task(
        "tasks/minigrid_empty",
        "minigrid:MiniGrid-Empty-5x5-v0",
        "PPO",
        50_000,
        8,
        {"n_steps": 128, "batch_size": 64, "learning_rate": 2.5e-4, "n_epochs": 10, "ent_coef": 0.0},
        ("minigrid.wrappers:ImgObsWrapper", "gymnasium.wrappers:FlattenObservation"),
    ),
}


def load(path: str) -> Any:
    """The object that "module:name" names."""
    module, name = path.split(":")
    return getattr(__import__(module, fromlist=[name]), name)


def make(task: Task) -> gymnasium.Env:
    """One environment as SB3 gets it."""
    env = gymnasium.make(task.env)
    for wrapper in task.wrappers:
        env = load(wrapper)(env)
    return env


def judge(act: Callable[[Any], Any], task: Task, episodes: int) -> float:
    """Mean return of greedy actions over the judged initial states."""
    env, returns = make(task), []
    for seed in range(FIRST_STATE, FIRST_STATE + episodes):
        observation, total, over = env.reset(seed=seed)[0], 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return float(np.mean(returns))


def sb3(task: Task, seed: int, steps: int) -> tuple[tuple[float, float], Callable[[Any], Any]]:
    """(seconds of training as `Clock` reads them, greedy policy) of SB3's own."""
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env(lambda: make(task), n_envs=task.num_envs, seed=seed)
    model = getattr(stable_baselines3, task.algorithm)("MlpPolicy", env, seed=seed, device="cpu", **task.options)
    clock = Clock()
    model.learn(steps)
    return clock.read(), lambda observation: model.predict(observation, deterministic=True)[0]


def ours(task: Task, seed: int, steps: int) -> tuple[tuple[float, float], Callable[[Any], Any]]:
    """(seconds of training as `Clock` reads them, greedy policy) of our recipe: what a user would run and load."""
    from embodied_rft import load_policy
    from embodied_rft.runs.recipe import load_recipe
    from embodied_rft.train import train

    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(task.recipe, [f"seed={seed}"])
        stages = {stage.word: stage.config for stage in recipe.stages}
        before = stages["warm_up"].decisions if "warm_up" in stages else 0
        stages["finetune"].decisions, stages["finetune"].evaluate_every = steps - before, None
        clock = Clock()
        train(recipe, folder, quiet=True, report=False)
        seconds = clock.read()
        return seconds, load_policy(folder, trust=True)  # its wrappers are code of others


SIDES = {"ours": ours, "sb3": sb3}


def main() -> None:
    """Every task, every seed, both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="CartPole, few steps; ends within 50 s")
    parser.add_argument("--task", nargs="*", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=[*SIDES])
    parser.add_argument("--out", type=Path, help="append one JSON line a run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names, seeds = (["cartpole"], [0]) if options.quick else (options.task, range(options.seeds))
    found: dict[str, dict[str, list[tuple[float, float]]]] = {n: {s: [] for s in SIDES} for n in names}
    for name in names:
        task, steps = TASKS[name], 8_192 if options.quick else TASKS[name].steps
        for seed in [options.first_seed + s for s in seeds]:
            for side in [options.only] if options.only else [*SIDES]:
                (seconds, processor), act = SIDES[side](task, seed, steps)
                score = judge(act, task, 5 if options.quick else EPISODES)
                found[name][side].append((score, processor))
                line: dict[str, Any] = {"task": name, "side": side, "seed": seed}
                line |= {
                    "return": round(score, 2),
                    "seconds": round(seconds, 1),
                    "processor_seconds": round(processor, 1),
                }
                print(json.dumps(line), flush=True)
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    if options.only:
        return
    results = {
        f"{name} {side}": Result(f"{name} {side}", [score for score, _ in runs])
        for name, sides in found.items()
        for side, runs in sides.items()
    }
    table(results, unit="return", title="Final greedy return", digits=1)
    quicker = {
        name: float(np.median([b[1] / a[1] for a, b in zip(sides["ours"], sides["sb3"], strict=True)]))
        for name, sides in found.items()
    }
    finish(name="gym_tasks", results=results, ratio=min(quicker.values()), times_as_fast=quicker)


if __name__ == "__main__":
    main()
