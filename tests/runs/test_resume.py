"""kill -9 in the middle of a stage, the same command again: the same bits as a run that was never killed."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from embodied_rft.data import Ragged
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.log import read_records
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.runs.resume import read_state
from embodied_rft.runs.trained import load_policy
from embodied_rft.runs.tree_file import MANIFEST, CheckpointError, load
from embodied_rft.train import train

RECIPE = {
    "name": "resume",
    "seed": 3,
    "env": {"id": "embodied_rft/FetchReach-v0", "num_envs": 8, "options": {"num_threads": 1}},
    "agent": {"id": "gaussian", "hidden": [32, 32], "deterministic": True},
    "buffer": {"capacity": 3_000},  # smaller than the run: the ring wraps
    "checkpoint_seconds": 0.0,
    "stages": [
        {"demonstrate": {"episodes": 10, "noise": 0.3}},
        {"pretrain": {"objective": "bc", "updates": 250, "log_every": 10}},
        {"evaluate": {"episodes": 10, "name": "base"}},
        {"adapt": {"with": "residual", "options": {"scale": 0.3, "deterministic": True, "exploration_noise": 0.1}}},
        {"warm_up": {"decisions": 400}},
        {
            "finetune": {
                "objective": {"id": "td3", "num_steps": 3, "gamma": 0.98, "offline_share": 0.5},
                "decisions": 4_000,
                "decisions_per_iteration": 200,  # 25 steps: every checkpoint lies inside an episode
                "updates_per_decision": 0.05,
                "evaluate_every": 2_000,
                "evaluate_episodes": 8,
            }
        },
        {
            "finetune": {  # physics on one thread, learning on another: repeatable all the same
                "objective": {"id": "td3", "num_steps": 3, "gamma": 0.98},
                "decisions": 2_000,
                "decisions_per_iteration": 200,
                "updates_per_decision": 0.05,
                "overlap": True,
            }
        },
        {"evaluate": {"episodes": 10, "name": "final"}},
    ],
}


def start(folder, recipe):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(time.time_ns() % 1000)}
    command = [sys.executable, "-m", "embodied_rft.cli", "train", str(recipe), "--run", str(folder)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder, recipe):
    process = start(folder, recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def metrics_of(folder):
    """All lines of the log, without what depends on the clock."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [{k: v for k, v in line.items() if not k.startswith("wall/")} for line in lines]


def kill_when(folder, recipe, stage, lines):
    """kill -9 as soon as the log has `lines` lines of a stage."""
    process = start(folder, recipe)
    deadline = time.monotonic() + 200
    while sum(line["stage"] == stage for line in metrics_of(folder)) < lines:
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def same(a, b, path=""):
    """Bit-equal trees, wall clock apart."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "saves", "logger", "before") and not str(key).startswith("wall"):
                same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{i}")
    elif isinstance(a, Ragged):
        same({"values": a.values, "offsets": a.offsets}, {"values": b.values, "offsets": b.offsets}, path)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, torch.as_tensor(b)), path
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), path
    else:
        assert a == b or (a != a and b != b), path


def evaluations_of(folder):
    """Every evaluation, without the clock."""
    files = sorted((folder / "evaluations").glob("*.json"))
    skip = ("seconds", "wall_seconds")
    return {f.name: {k: v for k, v in json.loads(f.read_text()).items() if k not in skip} for f in files}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    recipe = folder / "recipe-in.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    finish(folder / "run", recipe)
    return recipe, folder / "run"


def assert_same_run(folder, reference):
    a, b = Checkpoints(folder / "checkpoints").newest()[1], Checkpoints(reference / "checkpoints").newest()[1]
    same(a, b)
    same(metrics_of(folder), metrics_of(reference))
    same(evaluations_of(folder), evaluations_of(reference))


@pytest.mark.parametrize(("stage", "lines"), [([1], 7), ([5], 4), ([5], 13), ([6], 6)])
def test_killed_and_continued_is_bit_equal_to_never_killed(tmp_path, reference, stage, lines):
    recipe, uninterrupted = reference
    kill_when(tmp_path / "run", recipe, stage, lines)
    output = finish(tmp_path / "run", recipe)
    assert "continuing" in output
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_checkpoint_cut_in_half_is_detected_and_the_previous_one_used(tmp_path, reference):
    recipe, uninterrupted = reference
    kill_when(tmp_path / "run", recipe, [5], 9)
    newest = sorted(p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir())[-1]
    victim = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    output = finish(tmp_path / "run", recipe)
    assert newest.name in output  # the user is told which one is broken
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_asked_to_stop_stops_cleanly_and_can_be_continued(tmp_path, reference, asked):
    recipe, uninterrupted = reference
    process = start(tmp_path / "run", recipe)
    while sum(line["stage"] == [5] for line in metrics_of(tmp_path / "run")) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(asked)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output
    finish(tmp_path / "run", recipe)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_environments_that_take_turns_are_killed_and_continued_to_the_bit(tmp_path):
    env = RECIPE["env"] | {"num_envs": 5, "pool": "workers", "num_workers": 2, "splits": 2}
    finetune = {"objective": "ppo", "decisions": 400, "decisions_per_iteration": 33}
    recipe = tmp_path / "recipe-in.yaml"
    agent = {"id": "gaussian", "hidden": [8]}
    recipe.write_text(yaml.safe_dump(RECIPE | {"env": env, "agent": agent, "stages": [{"finetune": finetune}]}))
    finish(tmp_path / "whole", recipe)
    kill_when(tmp_path / "run", recipe, [0], 4)
    assert "continuing" in finish(tmp_path / "run", recipe)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_two_runs_in_one_folder_and_another_recipe_are_refused(tmp_path, reference):
    recipe, uninterrupted = reference
    first = start(tmp_path / "run", recipe)
    while not metrics_of(tmp_path / "run"):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    second = start(tmp_path / "run", recipe)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and "Traceback" not in output and "run" in output
    first.kill()
    first.communicate()
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(RECIPE | {"seed": 4}))
    third = start(uninterrupted, other)
    output, _ = third.communicate(timeout=60)
    assert third.returncode == 2 and "another recipe" in output and "seed: 4" in output


def leaves(value, path=""):
    """(path, bytes) of everything in a state, in one order."""
    if isinstance(value, Ragged):
        value = [value.values, value.offsets]
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from leaves(value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    else:
        array = value.numpy() if isinstance(value, torch.Tensor) else value
        plain = not isinstance(array, (np.ndarray, np.generic))
        yield path, repr(value).encode() if plain else f"{array.dtype} {array.shape} ".encode() + array.tobytes()


def test_a_run_that_an_older_version_wrote_goes_on(tmp_path):
    """It was stopped inside its second stage, by the version that still wrote safetensors files byte by byte."""
    shutil.unpack_archive(Path(__file__).with_name("older_run.zip"), tmp_path)
    state = read_state(RunFolder(tmp_path))
    digest = hashlib.sha256(b"".join(path.encode() + content for path, content in leaves(state))).hexdigest()
    assert digest == "25eb9dbb66cfd566650c1bd2258106000846df9f3d672b8dcb566fa6f5f1f40a"
    session = train(load_recipe(tmp_path / "recipe.yaml"), tmp_path, quiet=True, report=False)
    assert [record["decisions"] for record in session.records] == [8, 48]
    assert session.counters["updates"] == 12
    assert [line["decisions"] for line in read_records(session.folder.metrics)] == [8, 24, 40, 40, 56]
    assert load_policy(tmp_path)(np.zeros(4, np.float32)) in (0, 1)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    shutil.unpack_archive(Path(__file__).with_name("older_run.zip"), tmp_path)
    folder = Checkpoints(tmp_path / "checkpoints").path(2)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(CheckpointError, match="has format 0, this version reads 1"):
        load(folder)
