"""Two processes are one: the same weights as from the whole batch, equal on both; a lost one stops the other."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embodied_rft import distributed
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.runs.session import Session
from embodied_rft.train import train
from tests.lab import distributed_worker as worker


def launch(*command, count=2, timeout=100, **environment):
    """Run a module in `count` processes that meet on this machine only."""
    own = {"OMP_NUM_THREADS": "1", "EMBODIED_RFT_TIMEOUT": "60", "GLOO_SOCKET_IFNAME": "lo", **environment}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    launcher += ["--local-addr", "127.0.0.1", "-m", "--", *map(str, command)]
    return subprocess.run(launcher, env=os.environ | own, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of what two processes have learned in all cases, one after the other."""
    folder = tmp_path_factory.mktemp("learned")
    result = launch("tests.lab.distributed_worker", "learns", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", worker.CASES)
def test_two_processes_learn_as_one(name, learned):
    first, second = (load_file(learned / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    learner, metrics = worker.learn(name, 0, 1)
    for index, moment in enumerate(learner.optimizers["policy"].first):
        torch.testing.assert_close(first[f"first/{index}"], moment, atol=1e-6, rtol=1e-4)
    spec, spaces = worker.CASES[name][0], worker.spaces_of(name)
    start = worker.build_agent(spec, *spaces, torch.Generator().manual_seed(7)).state_dict()
    moved, apart = [], []
    for key, weight in learner.agent.state_dict().items():
        if weight.dtype == torch.float32:
            moved.append((weight - start[key]).flatten().abs() if key in start else torch.zeros(0))
            apart.append((weight - first[f"weights/{key}"]).flatten().abs())
    moved, apart = torch.cat(moved), torch.cat(apart)
    assert moved.max() > 1e-3
    # Adam turns rounding of vanishing gradients into whole steps: nearly all weights, not each single one.
    assert (apart < 1e-5).float().mean() > 0.99
    for number, one in enumerate(metrics):
        key = next(key for key in one if key.endswith("loss"))
        assert one[key] == pytest.approx(float(first[f"metrics/{number}/{key}"]), abs=1e-5, rel=1e-4)
    if name == "lora":
        frozen = {k: v for k, v in start.items() if "lora_" not in k and k.startswith("policy.")}
        assert frozen and all(torch.equal(first[f"weights/{k}"], v) for k, v in frozen.items())


@pytest.mark.parametrize("name, seconds", [("dies", "60"), ("hangs", "2")])
def test_a_lost_process_stops_the_other(name, seconds, tmp_path):
    """Its death is noticed at once, its silence after the time limit; either way the launcher ends with an error."""
    result = launch("tests.lab.distributed_worker", name, tmp_path, timeout=50, EMBODIED_RFT_TIMEOUT=seconds)
    assert result.returncode != 0
    if name == "hangs":  # of a dead process the launcher itself may be the first to know
        assert "waits for one that has died or is too late" in (tmp_path / "message").read_text()


RECIPE = """
name: two
env: {id: embodied_rft/TextSum-v0, num_envs: 16}
agent: {id: language, model: {tiny: {hidden_size: 16}}, prompt: plain, max_new_tokens: 3}
buffer: {capacity: 2000}
logging: {console: false}
stages:
  - demonstrate: {episodes: 20}
  - pretrain: {objective: {id: bc, batch_size: 16}, updates: 10, log_every: 5}
  - finetune:
      objective: {id: grpo, num_epochs: 1, batch_size: 32, kl_weight: 0.1}
      decisions: 128
      episodes_per_iteration: 64
      group_size: 4
      learner: {learning_rate: 1.0e-3, clip_norm: 1.0, micro_units: 64}
  - evaluate: {episodes: 10}
"""


def numbers(path):
    """The metrics without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("wall/")} for line in lines]


def test_a_recipe_in_two_processes(tmp_path):
    """Equal weights, one log, shares of the experience; continued exactly from the newest checkpoint of both."""
    (tmp_path / "two.yaml").write_text(RECIPE)
    command = ["embodied_rft.cli", "train", tmp_path / "two.yaml", "--run", tmp_path / "run"]
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    folders = [tmp_path / "run", tmp_path / "run" / "ranks" / "1"]
    states = [Checkpoints(folder / "checkpoints").newest() for folder in folders]
    agents = [state["agent"] for _, state in states]
    assert all(torch.equal(agents[1][key], value) for key, value in agents[0].items())
    assert not alike(*(state["buffer"] for _, state in states))  # each has episodes of its own
    log = numbers(folders[0] / "metrics.jsonl")
    assert log[-1]["decisions"] == 20 + 128 and log[-2]["collect/episodes"] == 64.0
    assert "report: " in result.stdout and result.stdout.count("report: ") == 1
    step = states[1][0]
    shutil.rmtree(folders[1] / "checkpoints" / f"{step:012d}")
    again = launch(*command)
    assert again.returncode == 0, again.stderr
    assert numbers(folders[0] / "metrics.jsonl") == log
    assert [Checkpoints(folder / "checkpoints").newest()[0] for folder in folders] == [step, step]
    with pytest.raises(ValueError, match="holds a run of 2 processes, 1 were started now"):
        train(load_recipe(str(tmp_path / "two.yaml")), tmp_path / "run", quiet=True)


def test_a_share_that_is_not_whole_is_refused(tmp_path, monkeypatch):
    (tmp_path / "two.yaml").write_text(RECIPE)
    recipe = load_recipe(str(tmp_path / "two.yaml"))
    alone = Session(recipe, RunFolder(tmp_path / "alone"), quiet=True)
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(ValueError, match=r"env.num_envs is 16, which 3 processes cannot share evenly"):
        Session(recipe, RunFolder(tmp_path / "run"), quiet=True)
    with pytest.raises(ValueError, match=r"objective.batch_size is 16, which 3 processes"):
        alone.make_objective({"id": "bc", "batch_size": 16})


def alike(one, other):
    """Whether two nested states hold the same."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_alone_everything_is_handed_back():
    assert (distributed.size(), distributed.rank(), distributed.share(7, "x")) == (1, 0, 7)
    assert distributed.gather({"a": 1}) == [{"a": 1}] and distributed.mean({"a": 0.5}) == {"a": 0.5}
    assert list(distributed.in_step([1, 2])) == [1, 2] and not distributed.any_of(False)
    weight = torch.nn.Parameter(torch.ones(2))
    distributed.sum_gradients([weight])
    assert weight.grad is None
