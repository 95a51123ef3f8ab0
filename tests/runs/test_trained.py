"""A trained policy in one's own loop, played, and on other devices."""

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import embodied_rft.envs  # noqa: F401
from embodied_rft import load_policy
from embodied_rft.device import resolve_device
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.options import ConfigError, parse_stages
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.judge import evaluate_run
from embodied_rft.runs.play import play
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.runs.trained import opened
from embodied_rft.seeding import evaluation_seed
from embodied_rft.train import train
from tests.lab import ROOT
from tests.lab.point import random_batch
from tests.runs.test_run_folder import TREE, content, short


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(short(), folder, quiet=True, report=False)
    return folder


# --- the trained policy in one's own loop ---


def test_the_loop_of_the_readme_runs(run, tmp_path):

    text = (ROOT / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "load_policy" in block)
    assert len([line for line in code.splitlines() if line]) <= 6
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "demo")
    code = code.replace("FetchPickAndPlace", "FetchReach")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_loaded_policy_does_what_the_evaluation_does(run):
    """Single observations in an ordinary loop and batches in a pool: the returns of `erft eval`."""

    outcome, policy = evaluate_run(run, episodes=2), load_policy(run)
    env = gymnasium.make("embodied_rft/FetchReach-v0")
    for index in range(2):
        observation, _ = env.reset(seed=evaluation_seed(index))
        total, over = 0.0, False
        while not over:
            action = policy(observation)
            assert env.action_space.contains(action)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        assert total == pytest.approx(outcome.returns[index], rel=1e-3)
    several = {key: np.stack([value] * 3) for key, value in observation.items()}
    batch = policy(several)
    assert batch.shape == (3, 4)
    np.testing.assert_allclose(batch[1], policy(observation), rtol=1e-4, atol=1e-6)
    assert not np.array_equal(policy(observation, greedy=False), policy(observation, greedy=False))
    with pytest.raises(ValueError, match="has no 'achieved_goal'"):
        policy({"observation": observation["observation"], "desired_goal": observation["desired_goal"]})
    with pytest.raises(ValueError, match="shape"):
        policy(observation | {"observation": np.zeros(3, np.float32)})


def test_a_policy_of_chunks_executes_its_plan(tmp_path):

    agent = {"id": "gaussian", "hidden": [8], "horizon": 4, "execute": 2}
    stages = [
        {"demonstrate": {"episodes": 2}},
        {"pretrain": {"objective": {"id": "bc", "batch_size": 8}, "updates": 2}},
    ]
    train(short(agent=agent, stages=stages), tmp_path / "run", quiet=True, report=False)
    policy = load_policy(tmp_path / "run")
    observation = {key: space.sample() for key, space in policy.observation_space.spaces.items()}
    other = {key: value + 1 for key, value in observation.items()}
    first, second = policy(observation), policy(other)  # the second step of the plan, whatever is seen by then
    assert first.shape == second.shape == (4,)
    chunk = policy.policy.act({k: v[None].astype(np.float32) for k, v in observation.items()}, greedy=True, rng=None)
    np.testing.assert_allclose(np.stack([first, second]), np.asarray(chunk.action).reshape(4, 4)[:2], rtol=1e-5)
    new = policy(other)
    policy.reset()
    np.testing.assert_array_equal(policy(other), new)
    assert not np.allclose(new, first)


def test_play_plays(run, monkeypatch):

    said = []
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    before = content(run)
    returns = play(run, episodes=2, say=said.append)
    assert returns == pytest.approx(evaluate_run(run, episodes=2).returns, rel=1e-3)
    assert all("return" in line for line in said) and ("not drawn" in said[0] or list((run / "play").iterdir()))
    assert {p for p in content(run) if p not in before and "evaluations" not in p.parts} == set(
        (run / "play").glob("*")
    )


# --- where it computes ---


def test_devices_are_words():

    assert resolve_device("cpu").type == "cpu" and short(device="cuda:1").device == "cuda:1"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match=r"device.*gpu"):
        short(device="gpu")
    with pytest.raises(ValueError, match="needs GPU 99"):
        resolve_device("cuda:99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("objective", ["sac", "td3", "cal_ql", "iql", "spot", "ppo"])
def test_everything_computes_on_the_gpu_and_goes_on_elsewhere(tmp_path, objective):
    fresh = {"ppo"}
    online = {"finetune": {"objective": objective, "decisions": 400, "decisions_per_iteration": 200}}
    offline = [] if objective in fresh else [{"pretrain": {"objective": objective, "updates": 4}}]
    stages = [*TREE["stages"][:1], *offline, online, {"evaluate": {"episodes": 4}}]
    session = train(short(device="cuda", stages=stages), tmp_path / "run", quiet=True, report=False)
    assert {p.device.type for p in session.agent.parameters()} == {"cuda"}
    online["finetune"]["decisions"] = 600
    train(short(device="cpu", stages=stages), tmp_path / "run", quiet=True, report=False)
    assert evaluate_run(tmp_path / "run", episodes=2, device="cuda").episodes == 2


# --- where the environment is not ---

CORRIDOR = """
import gymnasium
import numpy as np

class Corridor(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict({
        "place": gymnasium.spaces.Box(-5, 5, (2,), np.float64), "door": gymnasium.spaces.Discrete(3, start=1)})
    action_space = gymnasium.spaces.Box(-2, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.place = 0, self.np_random.uniform(-1, 1, 2)
        return {"place": self.place, "door": 2}, {}

    def step(self, action):
        self.steps += 1
        return {"place": self.place, "door": 1}, float(action[0]), False, self.steps == 5, {}

gymnasium.register("LongCorridor-v0", Corridor)
"""


def test_a_policy_needs_no_environment(tmp_path, monkeypatch):
    (tmp_path / "long_corridor.py").write_text(CORRIDOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    stages = [
        {"finetune": {"objective": "sac", "decisions": 40, "decisions_per_iteration": 20}},
        {"adapt": {"with": "residual"}},
        {"finetune": {"objective": "sac", "decisions": 40, "decisions_per_iteration": 20}},
    ]
    env = {"id": "long_corridor:LongCorridor-v0", "num_envs": 2}
    train(short(env=env, stages=stages), tmp_path / "run", quiet=True, report=False)
    seen = {"place": np.ones(2), "door": 3}
    expected = load_policy(tmp_path / "run", trust=True)(seen)
    (tmp_path / "long_corridor.py").unlink()
    shutil.rmtree(tmp_path / "run" / "inputs")
    monkeypatch.delitem(sys.modules, "long_corridor")
    monkeypatch.delitem(gymnasium.registry, "LongCorridor-v0")
    with pytest.raises(ValueError, match="long_corridor"):
        evaluate_run(tmp_path / "run", episodes=1, trust=True)
    policy = load_policy(tmp_path / "run")  # no code of the run's own runs: nobody needs to trust it
    np.testing.assert_array_equal(policy(seen), expected)
    assert policy.action_space == gymnasium.spaces.Box(-2, 1, (2,), np.float32)


def test_a_checkpoint_that_tells_no_spaces_asks_the_environment(run, tmp_path):
    old = RunFolder(shutil.copytree(run, tmp_path / "old"))
    step, state = Checkpoints(old.checkpoints).newest()
    assert state.pop("spaces")
    shutil.rmtree(old.checkpoints)
    Checkpoints(old.checkpoints).write(step, state)
    seen = {key: np.zeros(space.shape) for key, space in load_policy(run).observation_space.spaces.items()}
    np.testing.assert_array_equal(load_policy(old)(seen), load_policy(run)(seen))


# --- in another run ---


def test_another_run_starts_from_a_trained_policy(run, tmp_path, monkeypatch):
    """The same returns without learning; the first run may go, the second goes on; parts come with their weights."""
    base = shutil.copytree(run, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    load = {"load_policy": {"run": "base", "parts": ["policy", "critic", "target_critic"]}}
    best = {"load_policy": {"run": "base", "checkpoint": "best"}}
    look = {"evaluate": {"episodes": 4, "sheet": 1}}
    stages = [best, look, load, look]
    session = train(short(stages=stages), tmp_path / "next", quiet=True, report=False)
    best, newest = (evaluate_run(base, episodes=4, sheet=1, checkpoint=which) for which in ("best", "newest"))
    for name, outcome in (("1-0", best), ("3-0", newest)):
        assert json.loads((tmp_path / "next/evaluations" / f"{name}.json").read_text())["returns"] == outcome.returns
    with opened(base) as other:
        for name, weight in other.agent.parts["critic"].state_dict().items():
            assert torch.equal(weight, session.agent.parts["critic"].state_dict()[name])
    shutil.rmtree(base)
    kept = tmp_path / "next" / "recipe.yaml"
    longer = load_recipe(kept, [])
    longer.stages.append(parse_stages([{"evaluate": {"episodes": 2}}])[0])
    train(longer, tmp_path / "next", quiet=True, report=False)
    assert evaluate_run(tmp_path / "next", episodes=4, sheet=1).returns == newest.returns


def test_a_policy_of_another_task_is_refused(run, tmp_path):
    load = {"load_policy": {"run": str(run)}}
    other = {"id": "embodied_rft/FetchPush-v0", "num_envs": 2, "options": {"num_threads": 1}}
    with pytest.raises(ValueError, match="load_policy: the run in .* sees"):
        train(short(env=other, stages=[load]), tmp_path / "next", quiet=True, report=False)
    wrong = {"load_policy": {"run": str(run), "parts": ["critik"]}}
    with pytest.raises(ValueError, match="did you mean 'critic'"):
        train(short(stages=[wrong]), tmp_path / "other", quiet=True, report=False)


def learning_parts(spec, objective):
    """(agent, batch, objective) on a made-up task."""
    state, action = gymnasium.spaces.Box(-np.inf, np.inf, (6,)), gymnasium.spaces.Box(-1, 1, (2,))
    agent = build_agent(spec, state, action, torch.Generator().manual_seed(0))
    made = build_objective({"id": objective})
    made.setup(agent)
    return agent, random_batch(state, action, size=16), made


class Elsewhere(torch.overrides.TorchFunctionMode):
    """Notes every tensor that is made without saying where: on a machine with a GPU it would lie on the wrong side.

    Made from numbers on the processor (from_numpy, tensor) and moved at once is fine; drawn or filled is not.
    """

    MAKERS = (torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.rand, torch.randn, torch.randint,
              torch.randperm, torch.linspace, torch.eye)  # fmt: skip

    def __init__(self, allowed):
        super().__init__()
        self.allowed, self.found = allowed, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.MAKERS and kwargs.get("device") is None:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].name}"
            if place not in self.allowed:
                self.found.add(place)
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("agent", "objective"),
    [
        ({"id": "gaussian", "hidden": [8]}, "sac"),
        ({"id": "gaussian", "hidden": [8], "deterministic": True}, "td3"),
        ({"id": "gaussian", "hidden": [8]}, "cal_ql"),
        ({"id": "gaussian", "hidden": [8]}, "iql"),
        ({"id": "gaussian", "hidden": [8]}, "density"),
        ({"id": "gaussian", "hidden": [8]}, "bc"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["id"],
)
def test_whatever_is_made_while_learning_says_where(agent, objective):
    """Acting, losses and steps; there is no GPU where this test runs."""
    agent, batch, objective = learning_parts(agent, objective)
    learner = Learner(agent, objective, LearnerConfig())
    generator = torch.Generator().manual_seed(0)
    learner.update(batch, generator)  # what is made once (optimisers, statistics) is made on first use
    with Elsewhere(allowed=()) as mode:
        learner.update(batch, generator)
        agent.policy.act({k: v.numpy() for k, v in batch.observation.items()}, greedy=False, rng=generator)
    assert mode.found == set()
    with Elsewhere(allowed=()) as mode:  # and it sees what it should
        torch.zeros(2)
    assert len(mode.found) == 1
