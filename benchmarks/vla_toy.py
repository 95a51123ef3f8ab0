"""Action tokens: wall seconds to 95 % greedy success by GRPO, beside TorchRL's recipe `vla_grpo` (its toy setting).

    python -m benchmarks.vla_toy [--quick] [--theirs FOLDER --python PYTHON] [--limit SECONDS]

The task as TorchRL documents it, written anew: a target action of two numbers in [-0.5, 0.5] is seen in the state,
beside the last action and a picture of noise. A decision is a chunk of four steps, each of two tokens of 64 bins over
[-1, 1]; two steps in a row within 0.35 of the target are a success, the only reward; six decisions at most. Siblings of
a group share their target. Networks have width 128. Theirs reads the picture, too; ours is
measured with the state alone, which holds all there is to know, and with the picture. It is `categorical` by `grpo`
through pool, collector, buffer and learner, 32 groups of 8 episodes an iteration; theirs is their script as it comes (8
groups of 4, processes for policy and environments), run by PYTHON, which needs torchrl and hydra-core; FOLDER is
`sota-implementations/vla_grpo` of their repository. Seconds of ours hold evaluations (200 held-out episodes after every
iteration), not imports; theirs begin when their processes are up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from benchmarks import common
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.envs.serving import EnvBatch, Outcome, serve
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.experience.collect import Collector
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.pool import make_pool

ID = "benchmarks/Tracking-v0"
STEPS, SIZE, BINS, DECISIONS, NEEDED, NEAR = 4, 2, 64, 6, 2, 0.35
ENOUGH, GROUPS, SIBLINGS = 0.95, 32, 8
PICTURE = "ours, with the picture"
DRIVER = """
import json, runpy, sys, time

def main():
    folder, log = sys.argv[1:3]
    sys.argv = ["vla-grpo.py", *sys.argv[3:]]
    sys.path.insert(0, folder)
    import utils
    began, wait, told = [], utils.wait_for_replay, utils.log_metrics

    def waiting(*given, **named):
        began.append(time.time())
        return wait(*given, **named)

    def log_metrics(logger, metrics, step):
        success = metrics.get("eval/success_rate")
        if success is not None:
            with open(log, "a") as file:
                file.write(json.dumps([time.time() - began[0], float(success)]) + chr(10))
        return told(logger, metrics, step)

    utils.wait_for_replay, utils.log_metrics = waiting, log_metrics
    runpy.run_path(folder + "/vla-grpo.py", run_name="__main__")

if __name__ == "__main__":
    main()
"""


class Tracking(EnvBatch):
    """Actions near a target that the state shows."""

    max_episode_steps = DECISIONS

    def __init__(self, *, num_envs: int) -> None:
        super().__init__(num_envs=num_envs)
        state = gymnasium.spaces.Box(-1, 1, (2 * SIZE,), np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            {"image": gymnasium.spaces.Box(0, 255, (16, 16, 3), np.uint8), "state": state}
        )
        self.action_space = gymnasium.spaces.MultiDiscrete([BINS] * (STEPS * SIZE))
        self.last, self.target = np.zeros((2, num_envs, SIZE))
        self.streak = np.zeros(num_envs, np.int64)
        self.image = np.zeros((num_envs, 16, 16, 3), np.uint8)
        self.arrays = ("last", "target", "streak", "image")

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """See `EnvBatch`."""
        self.target[rows] = [self.generators[row].random(SIZE) - 0.5 for row in rows]
        self.last[rows], self.streak[rows] = 0, 0
        self._look(rows)

    def step(self, rows: np.ndarray, actions: np.ndarray) -> Outcome:
        """See `EnvBatch`; after a success the rest of a chunk is not carried out."""
        for chosen in ((actions + 0.5) / BINS * 2 - 1).reshape(len(rows), STEPS, SIZE).swapaxes(0, 1):
            going = self.streak[rows] < NEEDED
            near = (np.abs(chosen - self.target[rows]) <= NEAR).all(1)
            self.last[rows[going]] = chosen[going]
            self.streak[rows[going]] = np.where(near, self.streak[rows] + 1, 0)[going]
        self._look(rows)
        won = self.streak[rows] >= NEEDED
        return Outcome(won.astype(np.float32), won, won, {})

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """See `EnvBatch`."""
        state = np.concatenate([self.last, self.target], 1).astype(np.float32)
        return {"image": self.image.copy(), "state": state}

    def _look(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            self.image[row] = self.generators[row].integers(256, size=(16, 16, 3), dtype=np.uint8)


if ID not in gymnasium.registry:  # this file is read twice: once as the program
    serve(ID, Tracking)


def ours(seed: int, limit: float, keys: Sequence[str]) -> tuple[float, float]:
    """(seconds to 95 % or `limit`, the last success) of a policy that reads `keys`."""
    start = time.perf_counter()
    pool, judge = make_pool(ID, 64), make_pool(ID, 200, purpose="evaluation")
    rng, numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    spec = {"id": "categorical", "hidden": [128, 128], "last_gain": 0.01, "keys": list(keys)}
    agent = build_agent(spec, pool.observation_space, pool.action_space, rng)
    policy = agent.policy
    assert policy.num_units is not None
    schema = Schema(dict(pool.fields), pool.action_field, dict(policy.trace_fields), units=policy.num_units)
    buffer = Buffer(schema, 4 * GROUPS * SIBLINGS * DECISIONS)
    objective = build_objective(
        {"id": "grpo", "num_epochs": 4, "batch_size": 128, "gamma": 1.0, "entropy_weight": 0.003}
    )
    objective.setup(agent, rng)
    learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-3, clip_norm=1.0))
    collector, success = Collector(pool, run_seed=seed, group_size=SIBLINGS), 0.0
    while success < ENOUGH and time.perf_counter() - start < limit:
        recording = collector.collect(
            lambda seen: policy.act(seen, rng=rng), episodes=GROUPS * SIBLINGS, version=learner.version
        )
        recording.write(buffer)
        learner.learn(buffer, numbers)
        success = evaluate(lambda seen: policy.act(seen, greedy=True), judge, evaluation_seeds(200)).success
    seconds = time.perf_counter() - start
    pool.close()
    judge.close()
    return seconds, success


def theirs(seed: int, limit: float, folder: Path, python: str) -> tuple[float, float]:
    """The same of their script."""
    with tempfile.TemporaryDirectory() as place:
        driver, log = Path(place, "driver.py"), Path(place, "log")
        driver.write_text(DRIVER)
        log.touch()
        settings = ["logger.backend=null", "checkpoint.save_iter=0", f"hydra.run.dir={place}", f"env.seed={seed}"]
        process = subprocess.Popen(
            [python, str(driver), str(folder), str(log), *settings],
            env={**os.environ, "PYTHONPATH": str(folder)},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        start, seconds, success = time.perf_counter(), 0.0, 0.0
        try:
            while success < ENOUGH and process.poll() is None and time.perf_counter() - start < limit:
                time.sleep(0.2)
                for line in log.read_text().splitlines():
                    seconds, success = json.loads(line)
            seconds = seconds if success >= ENOUGH else time.perf_counter() - start
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 15)
            process.wait()
        return seconds, success


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--theirs", type=Path, help="folder of their recipe; without it ours stands alone")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has torchrl and hydra-core")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a run is given up")
    options = common.arguments(__doc__, parser)
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {"ours": [], PICTURE: []}
    for seed in range(1 if options.quick else 3):
        found["ours"].append(ours(seed, 20.0 if options.quick else options.limit, ["state"]))
        found[PICTURE].append(ours(seed, 15.0 if options.quick else options.limit, ["state", "image"]))
        if options.theirs is not None:
            found.setdefault("TorchRL", []).append(theirs(seed, options.limit, options.theirs, options.python))
    results = {name: common.Result(name, [seconds for seconds, _ in runs]) for name, runs in found.items()}
    common.table(results, unit=f"s to {ENOUGH:.0%}", title="Action tokens, GRPO", digits=1)
    for name, runs in found.items():
        print(f"{name}: {', '.join(f'{success:.2f} after {seconds:.0f} s' for seconds, success in runs)}")
    both = options.theirs is not None
    common.finish(
        name="vla_toy",
        results=results,
        ratio=common.ratio(results, "TorchRL", "ours") if both else 0.0,
        success={name: [round(success, 3) for _, success in runs] for name, runs in found.items()},
        reached=all(success >= ENOUGH for _, success in found["ours"]),
    )


if __name__ == "__main__":
    main()
