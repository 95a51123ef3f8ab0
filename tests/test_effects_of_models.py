"""No option without effect, of agents around models of others: VLAs, SB3's and LeRobot's."""

import functools
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from pydantic.dataclasses import dataclass
from stable_baselines3.sac.policies import MultiInputPolicy

from embodied_rft import registry
from embodied_rft.agents.gaussian import GaussianConfig, GaussianPolicy
from embodied_rft.options import STRICT
from tests.lab.effects import Walk, tally
from tests.lab.scene import Scene, make_agent
from tests.test_effects_of_agents import AGENT_CONTEXTS, AGENT_VALUES, AGENTS, of_agent, run_agent

TINY = {"tiny": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "vision_size": 16}}
VLM = {"model": TINY, "prompt": "{images}{instruction}"}
SEES = {"sees": ("state", "image", "side", "instruction")}
GOALS = {"sees": ("goal",)}


# --- models of others -------------------------------------------------------------------------------------------------


class Wrapped:
    """What LeRobot calls a policy: two steps at a time, towards where the state points."""

    sign = 1.0

    def __init__(self, scale):
        self.scale = scale

    @classmethod
    def from_pretrained(cls, path):
        return cls(json.loads((Path(path) / "config.json").read_text())["scale"])

    def predict_action_chunk(self, batch):
        seen = batch["observation.state"][:, :2] + 0.01 * len(batch.get("task", [""])[0])
        if "observation.images.front" in batch:
            seen = seen + batch["observation.images.front"].mean((1, 2, 3))[:, None]
        return torch.tanh(self.sign * self.scale * seen)[:, None].repeat(1, 4, 1)


class Turned(Wrapped):
    """The other way."""

    sign = -1.0


class Own(MultiInputPolicy):
    """A policy of somebody's own, which no zip can tell of without being unpickled."""


class Shown(gym.Env):
    """The spaces of the scene with goals."""

    def __init__(self):
        scene = Scene(1, **GOALS)
        self.observation_space, self.action_space = scene.observation_space, scene.action_space


def zipped(folder, name, policy="MultiInputPolicy", seed=0):
    """A zip of SB3's."""
    torch.manual_seed(seed)
    options = {"buffer_size": 10, "device": "cpu", "policy_kwargs": {"net_arch": [4]}}
    sb3.SAC(policy, Shown(), **options).save(folder / name)
    return str(folder / name)


def of_lerobot(folder):
    """The walk over the options of `lerobot`."""
    for name, scale in (("one", 0.5), ("other", 0.25)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"scale": scale}))
    base = {"path": str(folder / "one"), "policy": f"{__name__}:Wrapped", "keys": {"state": "observation.state"}}
    values = {"path": str(folder / "other"), "policy": f"{__name__}:Turned", "task": "go", "horizon": 2, "execute": 2}
    values |= {"keys": base["keys"] | {"image": "observation.images.front"}}
    made = functools.partial(run_agent, "lerobot", {"sees": ("state", "image")})
    config = registry.find("agent", "lerobot").Config
    return Walk("agent lerobot", config, made, base, values, {"execute": {"horizon": 3}})


def of_sb3(folder):
    """The walk over the options of `sb3`."""
    own = zipped(folder, "own.zip", Own)

    def run(options, situation):
        return run_agent("sb3", GOALS, options | ({"path": own} if situation == "own" else {}), "")

    numbers = {
        f"{part}/{key}": np.full(2, 0.5) for part in ("mean", "var") for key in ("achieved_goal", "desired_goal")
    }
    np.savez(folder / "statistics.npz", epsilon=1e-8, clip=10.0, **numbers)
    values = {"path": zipped(folder, "other.zip", seed=1), "algorithm": "SAC", "policy": "CnnPolicy", "trust": True}
    values |= {"policy_kwargs": {"net_arch": [4], "activation_fn": "Tanh"}, "keys": ["desired_goal", "achieved_goal"]}
    values |= {"normalize": str(folder / "statistics.npz")}
    return Walk(
        "agent sb3",
        registry.find("agent", "sb3").Config,
        run,
        {"path": zipped(folder, "one.zip")},
        values,
        situations={"algorithm": "own", "trust": "own"},
        limits={"policy": "do not fit"},
    )


def of_vla(special, base, scene, folder, among=("",)):
    """The walk over the options of `vla`."""
    values = AGENT_VALUES | {
        "model": {"tiny": {**TINY["tiny"], "num_layers": 2}},
        "state": [],
        "instruction": "go",
        "prompt": "{instruction}{images}",
        "tokens": {"bins": 8},
        "parallel": {"initial_std": 0.5},
        "flow": {"noise_level": 0.3},
        "flow.num_heads": 4,
        "parallel.min_std": 0.1,
        "flow.min_std": 3.0,
        "flow.width": 32,
    }
    contexts = {name: context for name, context in AGENT_CONTEXTS.items() if name.startswith(("lora", "execute"))}
    contexts |= {"model.tiny.image_size": {"model.tiny.kind": "smolvlm"}}
    if not special:
        contexts |= {"fresh_head": {"model": finished(base, scene, folder)}}
    situations = {"gradient_checkpointing": "work", "cache_bytes": "frozen"}
    made, config = functools.partial(run_agent, "vla", scene), registry.find("agent", "vla").Config
    return Walk(f"agent vla {special}".strip(), config, made, base, values, contexts, situations, among=among)


def finished(base, scene, folder):
    """The folder of a model with a head."""
    agent, _ = make_agent({"id": "vla", **base}, Scene(4, **scene), seed=3)
    agent.policy.save_pretrained(folder / "finished")
    return str(folder / "finished")


FLOW = {"width": 16, "num_blocks": 1, "num_heads": 2, "num_steps": 2}
HEADS = {  # the options of a head are walked where it is the one
    "": (VLM, ("",)),
    "parallel": ({**VLM, "head": "parallel", "parallel": {"hidden": [8]}, "horizon": 2}, ("parallel",)),
    "flow": ({**VLM, "head": "flow", "flow": FLOW}, ("flow",)),
}


def walks(folder):
    """All of this file, by agent."""
    heads = [of_vla(special, base, SEES, folder, among) for special, (base, among) in HEADS.items()]
    return {"vla": heads, "sb3": [of_sb3(folder)], "lerobot": [of_lerobot(folder)]}


@pytest.mark.parametrize("id", ["vla", "sb3", "lerobot"])
def test_options_of_models(id, tmp_path):
    found = tally(walks(tmp_path)[id])
    print(found)
    assert not found["dead"], found["dead"]


def test_every_agent_is_walked(tmp_path):
    assert {id for id, _ in AGENTS} | set(walks(tmp_path)) == set(registry.shipped("agent"))


def test_a_planted_option_without_effect_is_found(monkeypatch):
    monkeypatch.setitem(registry._tables, "agent", dict(registry._tables["agent"]))
    monkeypatch.setitem(AGENTS, ("planted", ""), AGENTS["gaussian", ""])

    @dataclass(config=STRICT, kw_only=True)
    class PlantedConfig(GaussianConfig):
        idle: float = 0.5  # read by nobody

    @registry.register("agent", "planted")
    class Planted(GaussianPolicy):
        Config = PlantedConfig

    walk = of_agent("planted", "")
    walk.among = ("idle", "horizon")  # what gaussian itself has is walked as gaussian
    assert tally([walk])["dead"] == ["agent planted.idle"]
