"""The same task in other units of its action is the same run: every off-policy objective, every agent with vectors."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft import registry
from embodied_rft.buffer.plans import Replay
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.soft_actor_critic import is_stochastic
from embodied_rft.pools.chunks import ChunkBox
from embodied_rft.pools.spaces import ActionBox, ActionScale, check_action_space
from tests.agents.test_agents import trace_tensors
from tests.lab.draws import generator
from tests.lab.point import random_batch

STATE = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
UNITS = {  # low and high of the two dimensions
    "unit": ([-1, -1], [1, 1]),
    "large": ([-100, -1500], [100, 1500]),
    "small": ([-0.01, -1e-4], [0.01, 1e-4]),
    "shifted": ([2, -30], [3, -10]),
}
SMALL = {"hidden": [16]}
CHAIN = {"width": 16, "num_blocks": 1, "horizon": 2}
AGENTS = {
    "gaussian": {"id": "gaussian", **SMALL},
    "deterministic": {"id": "gaussian", "deterministic": True, **SMALL},
    "chunks": {"id": "gaussian", "horizon": 2, **SMALL},
    "residual": {"id": "residual", "base": {"id": "gaussian", **SMALL}, **SMALL},
    "deterministic residual": {"id": "residual", "base": {"id": "gaussian"}, "deterministic": True, **SMALL},
    "diffusion": {"id": "diffusion", "ddim_steps": 3, **CHAIN},
    "flow": {"id": "flow", "num_steps": 3, **CHAIN},
    "consistency": {"id": "consistency", **CHAIN},
    "last steps": {"id": "last_steps", "num_steps": 2, "base": {"id": "diffusion", "ddim_steps": 3, **CHAIN}},
    "steering": {"id": "steering", "base": {"id": "flow", "num_steps": 3, **CHAIN}, **SMALL},
}
DISCRETE = {"dqn", "discrete_sac"}
OFF_POLICY = [
    id
    for id in registry.known("objective")
    if id not in DISCRETE and issubclass(registry.find("objective", id).Config, Replay)
]
NEEDS = {
    "td3": "deterministic",
    "td3_bc": "deterministic",
    "spot": "deterministic",
    "dsrl_sac": "steering",
    "dsrl_na": "steering",
}


def space_of(units, spec):
    low, high = (np.array(bound, np.float32) for bound in UNITS[units])
    horizon = spec.get("horizon", spec.get("base", {}).get("horizon", 1))
    step = gym.spaces.Box(low, high)
    return ChunkBox(step, horizon=horizon) if horizon > 1 else step


def learned(units, spec, *objectives):
    """Greedy and random actions and the critic's values after some updates, in [-1, 1] units."""
    space = space_of(units, spec)
    agent = build_agent(spec, STATE, space, generator())
    scale, unit = ActionScale(space), gym.spaces.Box(-1, 1, space.shape)
    for id in objectives:
        objective = build_objective(id)
        objective.setup(agent)
        learner = Learner(agent, objective)
        for seed in range(3):
            batch = random_batch(STATE, unit, size=32, seed=seed)
            batch = replace(batch, action=scale.to_env(batch.action))
            if "noise" in agent.policy.trace_fields:
                taken = agent.policy.act({k: v.numpy() for k, v in batch.observation.items()}, rng=generator(seed))
                batch = replace(batch, action=torch.from_numpy(taken.action), trace=trace_tensors(taken))
            learner.update(batch, generator(seed))
    seen = {"observation": random_batch(STATE, unit, size=20, seed=9).observation["observation"].numpy()}
    values = []
    for greedy in (True, False):
        taken = agent.policy.act(seen, greedy=greedy, rng=generator(5))
        assert all(space.contains(action) for action in taken.action)
        values.append(scale.from_env(torch.from_numpy(taken.action)))
        values.append(torch.from_numpy(taken.log_prob))
    if "critic" in agent.parts and agent.part_specs["critic"]["judges"] == "action":
        values.append(agent.parts["critic"](as_tensors(seen), torch.from_numpy(taken.action)).T)
    if "density" in agent.parts:
        action = torch.from_numpy(taken.action)
        density = agent.parts["density"].negative_elbo(as_tensors(seen), action, beta=0.1, rng=generator())
        values.append(density[:, None])
    return torch.cat([v.detach().reshape(20, -1) for v in values], 1)


@pytest.mark.parametrize("units", ["large", "small", "shifted"])
def test_a_planned_action_is_an_observation_in_unit_range(units):
    """A residual on a queued plan, and its critic, see the same numbers in all units."""
    found = []
    for each in ("unit", units):
        space = space_of(each, {})
        shown = ActionBox(space.low, space.high, dtype=np.float32)
        spec = {"id": "residual", "base": {"id": "queued", "base": {"id": "gaussian", "horizon": 2, **SMALL}}, **SMALL}
        agent = build_agent(spec, gym.spaces.Dict({"base_action": shown, "state": STATE}), space, generator())
        build_objective("sac").setup(agent)
        plan = ActionScale(space).to_env(torch.rand(20, 2, generator=generator()) * 2 - 1)
        seen = {"base_action": plan.numpy(), "state": np.ones((20, 4), np.float32)}
        action = torch.from_numpy(agent.policy.act(seen, rng=generator(1)).action)
        value = agent.parts["critic"](as_tensors(seen), action).T
        found.append(torch.cat([ActionScale(space).from_env(action), value], 1).detach())
    assert_the_same(*found)


def assert_the_same(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("id", OFF_POLICY)
def test_an_off_policy_objective_learns_the_same_in_all_units(id):
    spec = AGENTS[NEEDS.get(id, "gaussian")]
    before = ("density",) if id == "spot" else ()
    expected = learned("unit", spec, *before, id)
    for units in ("large", "small", "shifted"):
        assert_the_same(learned(units, spec, *before, id), expected)


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_acts_and_learns_the_same_in_all_units(name):
    spec = AGENTS[name]
    imitates = name != "steering"
    entropy = is_stochastic(build_agent(spec, STATE, space_of("unit", spec), generator()).policy)
    objectives = ["bc", "sac" if entropy else "td3"] if imitates else ["dsrl_na"]
    expected = learned("unit", spec, *objectives)
    for units in ("large", "small", "shifted"):
        assert_the_same(learned(units, spec, *objectives), expected)


def test_the_critic_has_another_opinion_of_another_action_whatever_the_units():
    """What the equalities above would not see: an action that is scaled to nothing."""
    for units in UNITS:
        space = space_of(units, {})
        agent = build_agent(AGENTS["gaussian"], STATE, space, generator())
        build_objective("sac").setup(agent)
        ends = torch.from_numpy(np.stack([space.low, space.high]))
        q = agent.parts["critic"]({"observation": torch.zeros(2, 4)}, ends)
        assert float((q[:, 0] - q[:, 1]).detach().abs().min()) > 1e-3


BAD = {
    "cannot move": (gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, 0], np.float32)), "dimension 1 .*move"),
    "hardly moves": (gym.spaces.Box(1e6, 1e6 + 1, (2,), np.float64), "cannot move"),
    "huge": (gym.spaces.Box(-3.4e38, 3.4e38, (2,), np.float32), "stand for none"),
    "huge float64": (gym.spaces.Box(-1e300, 1e300, (2,), np.float64), "stand for none"),
    "one huge": (gym.spaces.Box(np.array([-1, -1e12]), np.array([1, 1e12]), dtype=np.float64), "dimension 1"),
    "integers": (gym.spaces.Box(0, 5, (2,), np.int64), "MultiDiscrete"),
    "pixels": (gym.spaces.Box(0, 255, (2,), np.uint8), "MultiDiscrete"),
}


@pytest.mark.parametrize("space, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("agent", ["gaussian", "residual", "diffusion", "steering"])
def test_action_vectors_that_cannot_be_scaled_are_refused_by_every_agent(agent, space, message):
    with pytest.raises(ValueError, match=message):
        build_agent(AGENTS[agent], STATE, space, generator())


def test_infinite_bounds_need_statistics_of_the_data():
    space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    check_action_space(space)
    build_agent({"id": "flow", "statistics": "min_max", "width": 8}, STATE, space, generator())
    for id in ("gaussian", "flow"):
        with pytest.raises(ValueError, match="bounded"):
            build_agent({"id": id}, STATE, space, generator())


def test_actions_stay_inside_bounds_that_float32_cannot_halve():
    space = gym.spaces.Box(np.array([-0.1, 0.3], np.float32), np.array([0.7, 0.30007], np.float32))
    scale = ActionScale(space)
    for share in (-1.0, 1.0):
        assert space.contains(scale.to_env(torch.full((2,), share)).numpy())
