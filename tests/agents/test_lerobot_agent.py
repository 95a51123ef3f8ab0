"""The LeRobot bridge, with small classes of its interface; LeRobot itself is not needed."""

import importlib.util
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from embodied_rft.networks.tensors import as_tensors
from embodied_rft.policy import build_policy
from embodied_rft.pools.chunks import ChunkBox, ChunkPool
from embodied_rft.testing.check_policy import check_policy
from tests.lab.point import PointReach

SPACE = gym.spaces.Dict(
    {"state": gym.spaces.Box(-1, 1, (4,)), "image/front": gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)}
)
STEP = gym.spaces.Box(-1, 1, (2,))
KEYS = {"state": "observation.state", "image/front": "observation.images.front"}
STEPS = 5


class Chunked(nn.Module):
    """Predicts 5 steps from state and mean brightness; its own queue must never be used."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config["state"] + config["images"], STEPS * 2)
        self.seen = []

    @classmethod
    def from_pretrained(cls, path):
        with open(f"{path}/config.json") as file:
            policy = cls(json.load(file))
        policy.load_state_dict(load_file(f"{path}/model.safetensors"))
        return policy

    def reset(self):
        raise AssertionError("a policy with chunks holds no state here")

    def predict_action_chunk(self, batch):
        self.seen.append(batch)
        parts = [batch["observation.state"]]
        if self.config["images"]:
            parts.append(batch["observation.images.front"].mean((1, 2, 3))[:, None])
        return torch.tanh(self.layer(torch.cat(parts, -1))).reshape(-1, STEPS, 2)

    def select_action(self, batch):
        raise AssertionError("a queue would be filled")


class Single:
    """The older half of the interface, with a queue: the second answer without reset would be zero."""

    def __init__(self):
        self.calls = 0

    @classmethod
    def from_pretrained(cls, path):
        return cls()

    def reset(self):
        self.calls = 0

    def select_action(self, batch):
        self.calls += 1
        return batch["observation.state"][:, :2] * (self.calls == 1)


class Headless:
    """Neither predict nor select."""

    @classmethod
    def from_pretrained(cls, path):
        return cls()


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, images=1)


def write(path, *, images):
    torch.manual_seed(0)
    config = {"type": "chunked", "state": 4, "images": images}
    save_file(Chunked(config).state_dict(), str(path / "model.safetensors"))
    (path / "config.json").write_text(json.dumps(config))
    return path


def build(path, *, policy="Chunked", space=SPACE, action_space=STEP, keys=KEYS, **options):
    spec = {"id": "lerobot", "path": str(path), "policy": f"{__name__}:{policy}", "keys": keys, **options}
    return build_policy(spec, space, action_space, torch.Generator().manual_seed(0))


def observations(count):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return {"state": rng.uniform(-1, 1, (count, 4)).astype(np.float32), "image/front": image}


def test_acts_as_the_pretrained_policy_says(folder):
    policy, observation = build(folder, horizon=3), observations(6)
    taken = policy.act(observation)
    image = torch.from_numpy(observation["image/front"]).permute(0, 3, 1, 2).float() / 255
    batch = {"observation.state": torch.from_numpy(observation["state"]), "observation.images.front": image}
    expected = Chunked.from_pretrained(folder).predict_action_chunk(batch)[:, :3]
    np.testing.assert_allclose(taken.action, expected.detach().flatten(1).numpy(), atol=1e-6)
    seen = policy.policy.seen[-1]
    assert set(seen) == set(KEYS.values()) and seen["observation.images.front"].shape == (6, 3, 16, 16)
    assert 0 <= seen["observation.images.front"].min() and seen["observation.images.front"].max() <= 1


def test_contract_and_frozen_weights(folder):
    policy = build(folder, horizon=3, action_space=ChunkBox(STEP, horizon=3))
    check_policy(policy, SPACE, ChunkBox(STEP, horizon=3))
    assert not any(p.requires_grad for p in policy.parameters()) and not policy.policy.training
    assert "policy.layer.weight" in policy.state_dict()


def test_an_instruction_goes_with_every_observation(folder):
    policy = build(folder, task="push the block", horizon=5)
    policy.act(observations(2))
    assert policy.policy.seen[-1]["task"] == ["push the block"] * 2


def test_queues_inside_a_policy_are_never_continued(tmp_path):
    policy, observation = build(tmp_path, policy="Single", keys={"state": "observation.state"}), observations(3)
    for _ in range(3):
        np.testing.assert_array_equal(policy.act(observation).action, observation["state"][:, :2])


def test_it_is_a_base_for_chunks_and_for_residuals(tmp_path):
    base = {
        "id": "lerobot",
        "path": str(write(tmp_path, images=0)),
        "policy": f"{__name__}:Chunked",
        "horizon": 5,
        "execute": 2,
    }
    pool = PointReach(3, num_steps=50)
    pool.reset(np.arange(3))
    spaces, rng = (pool.observation_space, pool.action_space), torch.Generator().manual_seed(0)
    chunked = ChunkPool(PointReach(3), horizon=5, execute=2)
    result = chunked.step(build_policy(base, *spaces, rng).act(chunked.reset(np.arange(3))).action)
    assert result.info["env_steps"].tolist() == [2] * 3
    spec = {"id": "residual", "base": {"id": "queued", "base": base}, "hidden": [16], "scale": 0.1}
    residual = build_policy(spec, *spaces, rng)
    queued = residual.fit_pool(pool)
    observation = queued.reset(np.arange(3))
    planned = residual.base.base.mode(as_tensors({"observation": observation["observation"]}))[:, :2]
    taken = residual.act(observation, rng=rng)
    np.testing.assert_allclose(taken.trace["base_action"], planned.detach().numpy(), atol=1e-6)
    assert np.abs(taken.action - planned.detach().numpy()).max() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "Nothing"}, "cannot be imported"),
        ({"policy": "Headless"}, "neither predict_action_chunk nor select_action"),
        ({"policy": "STEPS"}, "from_pretrained"),
        ({"policy": "Single", "horizon": 2}, "set horizon to 1"),
        ({"keys": {"stat": "observation.state"}}, "did you mean 'state'"),
        ({"horizon": 3, "execute": 4}, "execute"),
        ({"action_space": gym.spaces.Discrete(3)}, "Box"),
    ],
)
def test_bad_options_say_what_is_wrong(folder, options, message):
    with pytest.raises(ValueError, match=message):
        build(folder, **options)


def test_a_policy_of_another_robot_is_refused(folder):
    policy = build(folder, horizon=3, action_space=gym.spaces.Box(-1, 1, (7,)))
    with pytest.raises(ValueError, match="another robot"):
        policy.act(observations(2))


def test_without_a_class_lerobot_is_needed(folder):
    if importlib.util.find_spec("lerobot") is not None:
        message = "chunked"  # LeRobot knows no such type
    else:
        message = "LeRobot is not installed"
    with pytest.raises(ValueError, match=message):
        spec = {"id": "lerobot", "path": str(folder), "keys": KEYS}
        build_policy(spec, SPACE, STEP, torch.Generator().manual_seed(0))


def test_lerobots_factory_is_asked_for_the_type_in_config_json(folder, monkeypatch):
    import sys
    import types

    asked = []
    factory = types.ModuleType("lerobot.policies.factory")
    factory.get_policy_class = lambda kind: asked.append(kind) or Chunked
    for name in ("lerobot", "lerobot.policies"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lerobot.policies.factory", factory)
    spec = {"id": "lerobot", "path": str(folder), "keys": KEYS, "horizon": 5}
    policy = build_policy(spec, SPACE, STEP, torch.Generator().manual_seed(0))
    assert asked == ["chunked"] and isinstance(policy.policy, Chunked)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no 'type'"):
        build_policy(spec, SPACE, STEP, torch.Generator().manual_seed(0))
