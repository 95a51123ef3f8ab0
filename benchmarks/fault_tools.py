"""What `faults` works with: an environment that misbehaves, recipes of a few seconds, and processes of `erft`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import yaml
from gymnasium import spaces

from embodied_rft.data import Ragged
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.folder import RunFolder
from embodied_rft.seeding import FIRST_EVALUATION_SEED

ROOT = Path(__file__).parents[1]
TROUBLES: dict[str, Callable[[], Any]] = {
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "text": lambda: "1.0",
    "raise": lambda: 1 / 0,
    "exit": lambda: sys.exit(0),
    "crash": lambda: os._exit(5),
    "hang": lambda: time.sleep(600),
}


class Walk(gymnasium.Env):
    """State [4], action [2], 20 steps, reward 1; every number follows from seed, step and the actions.

    Args:
        trouble: what `share` of the steps do: a key of TROUBLES, or "any" for all but the hang.
        share: see `trouble`.
        held_out: only episodes of a tenth of the held-out seeds do it, in each step.
        micros: microseconds of processor time of a step.
    """

    def __init__(self, *, trouble: str = "nan", share: float = 0.0, held_out: bool = False, micros: float = 0) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.trouble, self.share, self.held_out, self.micros = trouble, share, held_out, micros

    @staticmethod
    def expected(seed: int, step: int, moved: Any = (0.0, 0.0)) -> np.ndarray:
        """What a healthy step shows [4]."""
        start = np.random.default_rng(seed).normal(size=2)
        return np.array([*start, *np.add(start + 0.01 * step, moved)], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        """A new episode."""
        super().reset(seed=seed)
        self.seed, self.t, self.moved = int(seed or 0), 0, np.zeros(2)
        self.start = self.expected(self.seed, 0)
        return self.start, {}

    def step(self, action: Any) -> Any:
        """One step, or trouble."""
        end = time.thread_time() + 1e-6 * self.micros
        self.t, self.moved = self.t + 1, self.moved + 0.1 * np.asarray(action, np.float64)
        reward: Any = 1.0
        chance = random.Random(31 * self.seed + self.t).random() if self.share else 1.0
        if self.held_out and self.seed >= FIRST_EVALUATION_SEED and self.seed % 10 == 3:
            chance = -1.0
        if chance < self.share:
            names = sorted(set(TROUBLES) - {"hang"})
            reward = TROUBLES[names[self.t % len(names)] if self.trouble == "any" else self.trouble]()
        while time.thread_time() < end:
            pass
        shown = self.start + np.array([0, 0, 0.01 * self.t, 0.01 * self.t]) + np.array([0, 0, *self.moved])
        return shown.astype(np.float32), reward, False, self.t >= 20, {"success": bool(np.abs(self.moved[0]) > 0.5)}

    def get_state(self) -> dict[str, np.ndarray]:
        """For checkpoints in the middle of an episode."""
        return {"walk": np.array([self.seed, self.t]), "moved": self.moved.copy(), "start": self.start.copy()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from there."""
        (self.seed, self.t), self.moved, self.start = map(int, state["walk"]), state["moved"], state["start"]


if "Walk-v0" not in gymnasium.registry:
    gymnasium.register("Walk-v0", "benchmarks.fault_tools:Walk")


def recipe(stages: list[Any] | None = None, env: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """A run of a few seconds that writes a checkpoint as often as it can."""
    learn = {"objective": "sac", "decisions": 1_600, "decisions_per_iteration": 80, "updates_per_decision": 0.1}
    tree: dict[str, Any] = {"name": "faults", "threads": 1, "checkpoint_seconds": 0.0, "buffer": {"capacity": 3_000}}
    tree["env"] = {"id": "benchmarks.fault_tools:Walk-v0", "num_envs": 8, **(env or {})}
    tree["agent"] = {"id": "gaussian", "hidden": [16]}
    return tree | {"stages": stages or [{"finetune": learn}, {"evaluate": {"episodes": 8}}]} | parts


TD3 = {
    "objective": {"id": "td3", "num_steps": 3, "offline_share": 0.5},
    "decisions": 1_200,
    "decisions_per_iteration": 100,
}
PPO = {"finetune": {"objective": "ppo", "decisions": 4_000, "decisions_per_iteration": 320}}
GRPO = {"objective": {"id": "grpo", "batch_size": 16}, "decisions": 320, "episodes_per_iteration": 32, "group_size": 8}
FAMILIES = {
    "replay": recipe(),
    "fresh": recipe([PPO, {"evaluate": {"episodes": 8}}]),
    "workers": recipe(env={"pool": "workers", "num_workers": 2}),
    "text": recipe(
        [{"demonstrate": {"episodes": 40}}, {"pretrain": {"objective": {"id": "bc", "batch_size": 16}, "updates": 40,
                                                          "log_every": 5}}, {"finetune": GRPO}],
        {"id": "embodied_rft/TextSum-v0"},
        agent={"id": "language", "model": {"tiny": {}}, "prompt": "plain", "max_new_tokens": 3},
    ),
    "adapt": recipe(
        [{"demonstrate": {"episodes": 6, "noise": 0.3}}, {"pretrain": {"objective": "bc", "updates": 80,
                                                                       "log_every": 10}},
         {"adapt": {"with": "residual", "options": {"scale": 0.3, "deterministic": True, "exploration_noise": 0.1}}},
         {"finetune": TD3 | {"updates_per_decision": 0.05}}],
        {"id": "embodied_rft/FetchReach-v0", "options": {"num_threads": 1}},
        agent={"id": "gaussian", "hidden": [16], "deterministic": True},
    ),
}  # fmt: skip


# --- tools -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """A folder for one row, and how much of everything it does."""

    folder: Path
    times: int

    def start(self, tree: dict[str, Any], *more: str, run: str = "run", before: str = "", **options: Any) -> Any:
        """`erft train` as a process; `before`: shell commands in its own name space of mounts."""
        (self.folder / f"{run}.yaml").write_text(yaml.safe_dump(tree))
        command = [*ERFT, "train", str(self.folder / f"{run}.yaml"), "--run", str(self.folder / run), *more]
        if before:
            command = ["unshare", "-m", "sh", "-c", before, "sh", *command]
        return _popen(command, self.folder, **options)

    def train(self, tree: dict[str, Any], *more: str, **options: Any) -> tuple[int, str]:
        """`erft train` to its end: exit code and what it said."""
        return _ended(self.start(tree, *more, **options))

    def stop(self, tree: dict[str, Any], lines: int, by: int = signal.SIGKILL, *, run: str = "run") -> bool:
        """Start `erft train` and send it a signal as soon as its log has that many lines; False if it ended before."""
        process = self.start(tree, run=run)
        alive = until(process, lambda: len(lines_of(self.folder / run)) >= lines)
        process.send_signal(by)
        process.communicate()
        return alive

    def erft(self, *arguments: str, **options: Any) -> tuple[int, str]:
        """Any other verb."""
        return _ended(_popen([*ERFT, *arguments], self.folder, **options))

    def read(self, name: str, run: str = "run") -> str:
        """A file of the run folder."""
        path = self.folder / run / name
        return path.read_text(errors="replace") if path.exists() else ""


Outcome = tuple[str, bool | None]  # the figure, and whether it holds; None: not tried here
ROWS: dict[str, tuple[str, bool, Callable[[Lab], Outcome]]] = {}


def row(title: str, *, quick: bool = False) -> Callable[[Callable[[Lab], Outcome]], Callable[[Lab], Outcome]]:
    """Make a function a row of the table; `quick`: also with --quick."""

    def add(function: Callable[[Lab], Outcome]) -> Callable[[Lab], Outcome]:
        ROWS[function.__name__] = (title, quick, function)
        return function

    return add


def of(held: int, tried: int) -> Outcome:
    """'held of tried'."""
    return f"{held} of {tried}", held == tried


ERFT = [sys.executable, "-m", "embodied_rft.cli"]


def _popen(command: list[str], cwd: Path, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes, **options)


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def said(outcome: tuple[int, str], *words: str) -> bool:
    """Whether a command was refused or stopped with a sentence that has these words."""
    code, output = outcome
    return code not in (0, -9) and "Traceback" not in output and all(word in " ".join(output.split()) for word in words)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, bytes]]:
    """Everything in a checkpoint that does not depend on the clock: path and bytes."""
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            if key not in ("seconds", "saves", "logger", "before") and not str(key).startswith("wall"):
                yield from leaves(tree[key], f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{path}/{i}")
    elif isinstance(tree, Ragged):
        yield from leaves([tree.values, tree.offsets], path)
    else:
        value = tree.numpy() if isinstance(tree, torch.Tensor) else tree
        yield path, value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()


def newest(folder: Path) -> dict[str, Any]:
    """The newest whole checkpoint of a run."""
    found = Checkpoints(RunFolder(folder).checkpoints).newest()
    assert found is not None
    return found[1]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of the log without the clock."""
    path = RunFolder(folder).metrics
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [{k: v for k, v in line.items() if not k.startswith("wall/")} for line in lines]


def digest(folder: Path) -> str:
    """Of weights, optimisers, buffer, random state, counters and every line of the log of a finished run."""
    whole = hashlib.sha256(json.dumps(lines_of(folder), sort_keys=True).encode())
    for path, value in leaves(newest(folder)):
        whole.update(path.encode() + value)
    return whole.hexdigest()


def poisoned(folder: Path) -> int:
    """NaN and infinities in the weights and the replay buffer of a run's newest checkpoint."""
    state = newest(folder)

    def count(tree: Any) -> int:
        if isinstance(tree, dict | list | tuple):
            return sum(count(v) for v in (tree.values() if isinstance(tree, dict) else tree))
        value = tree.numpy() if isinstance(tree, torch.Tensor) else tree
        floats = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        return int((~np.isfinite(value)).sum()) if floats else 0

    return count(state["agent"]) + count(state["buffer"])


def until(process: subprocess.Popen[str], ready: Callable[[], Any]) -> bool:
    """Wait for something while a process runs; False if it ended first."""
    while not ready():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def can_mount() -> bool:
    """Whether a row may mount a disk of its own."""
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return tried.returncode == 0
