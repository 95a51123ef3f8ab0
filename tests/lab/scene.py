"""One toy task in every form that a policy can see or act in, and a buffer full of what was done there."""

import copy
import functools
from dataclasses import replace

import gymnasium as gym
import numpy as np
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.hindsight import Goals
from embodied_rft.data import Decisions, Field, Source, is_picture
from embodied_rft.experience.collect import Collector, action_field
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.objective import fit_normalizers
from embodied_rft.pools.protocol import fields_of
from tests.lab.point import PointReach

MOVES = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
VECTOR = gym.spaces.Box(-2, 2, (4,), np.float32)
PIXELS = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
PAIR = gym.spaces.Box(-2, 2, (2,), np.float32)
TEXT = gym.spaces.Text(40)


class Scene(PointReach):
    """PointReach, paid by the distance; after every third start nothing is paid, so some groups are even.

    Args:
        num_envs: N.
        sees: of "state", "image", "side" (a second camera), "instruction", "prompt", "goal".
        acts: "box", "choice", or "text": a reply of odd length goes right, any other one left.
        **options: of PointReach.
    """

    def __init__(self, num_envs=8, *, sees=("state",), acts="box", **options):
        reward = "sparse" if "goal" in sees else "dense"  # a goal's reward can be told again
        super().__init__(num_envs, **{"num_steps": 5, "radius": 0.3, "reward": reward, **options})
        self.dull = np.zeros(num_envs, bool)
        self.sees, self.acts = tuple(sees), acts
        parts = {"state": {"state": VECTOR}, "image": {"image": PIXELS}, "instruction": {"instruction": TEXT}}
        parts |= {
            "side": {"side": PIXELS},
            "prompt": {"prompt": TEXT},
            "goal": dict.fromkeys(("achieved_goal", "desired_goal"), PAIR),
        }
        self.observation_space = gym.spaces.Dict({k: v for name in self.sees for k, v in parts[name].items()})
        self.action_space = {"box": self.action_space, "choice": gym.spaces.Discrete(4), "text": TEXT}[acts]
        self.fields, self.action_field = fields_of(self.observation_space), action_field(self.action_space)

    def _observe(self):
        state = super()._observe()["observation"]
        image = np.zeros((self.num_envs, 32, 32, 3), np.uint8)
        for row, (x, y) in enumerate((self.position * 24).astype(int)):
            image[row, x : x + 8, y : y + 8] = 255
        said = [f"{x:.1f},{y:.1f}?" for x, y in self.position]
        goals = {"achieved_goal": self.position.astype(np.float32), "desired_goal": self.goal.astype(np.float32)}
        told = [f"go to {text}" for text in said]
        seen = {"state": state, "image": image, "side": image[:, ::-1], "instruction": told, "prompt": said, **goals}
        return {key: seen[key] for key in self.fields}

    def step(self, action):
        if self.acts == "choice":
            action = MOVES[np.asarray(action)]
        elif self.acts == "text":
            action = np.array([[len(reply) % 2 * 2 - 1, 0] for reply in action], np.float32)
        result = super().step(action)
        if self.reward == "sparse":
            return result
        return replace(result, reward=np.where(self.dull, 0, result.reward), terminated=result.info["success"])

    def reset(self, seeds, mask=None, options=None):
        chosen = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        self.dull[chosen] = np.asarray(seeds)[chosen] % 3 == 0
        return super().reset(seeds, mask, options)


class PaidForGoals(gym.Env):
    """How `Scene` pays."""

    observation_space, action_space = PAIR, PAIR

    def compute_reward(self, achieved, desired, info):
        return (np.linalg.norm(achieved - desired, axis=-1) < 0.3).astype(np.float32)


def make_agent(spec, pool, seed=0):
    """The agent, and the pool as it acts there."""
    agent = build_agent(spec, pool.observation_space, pool.action_space, torch.Generator().manual_seed(seed))
    return agent, agent.policy.fit_pool(pool)


def experience(agent, pool, *, episodes=48, demonstrations=8, rewards=("env", "success"), group_size=4):
    """Demonstrations (good actions, where actions are vectors of one step), then episodes of two versions in groups."""
    policy = agent.policy
    acts = action_field(pool.action_space)
    past, shown = policy.reads_past, dict(pool.fields)
    if past:  # pictures are read by content, as `runs.rig` has it
        shown |= {key: Field((), "uint8", "images") for key, f in shown.items() if is_picture(f.shape, f.dtype)}
    buffer = Buffer(Schema(shown, acts, dict(policy.trace_fields), policy.num_units, rewards), 600, past=past)
    buffer.goals = Goals(PaidForGoals)
    rng = torch.Generator().manual_seed(1)
    numbers = np.random.default_rng(2)

    def demonstrate(observation):
        """Towards the goal; whoever chooses noise or words does as it likes."""
        if "noise" in policy.trace_fields or not isinstance(pool.action_space, gym.spaces.Box):
            return policy.act(observation, rng=rng)
        known = observation.get("state", np.zeros((pool.num_envs, 4)))
        action = np.tile(known[:, 2:] * 5, pool.action_space.shape[0] // 2)
        action = (action + 0.1 * numbers.standard_normal(action.shape)).clip(-0.9, 0.9).astype(np.float32)
        return Decisions(action, np.zeros((len(action), policy.num_units), np.float32))

    if demonstrations:
        collector = Collector(pool, run_seed=3, source=Source.DEMONSTRATION, past=past)
        collector.collect(demonstrate, episodes=demonstrations, version=-1).write(buffer)
        fit_normalizers(agent, buffer, buffer.rows())
    collector = Collector(pool, run_seed=4, group_size=group_size, past=past)
    for version in (0, 1):
        act = functools.partial(policy.act, rng=rng)
        collector.collect(act, episodes=episodes // 2, version=version).write(buffer)
    return buffer


def shaken(agent, by=0.02):
    """The agent after somebody else's update, so that what it did is a little unlikely now."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in agent.policy.parameters():
            if weight.requires_grad:
                weight.add_(by * torch.randn(weight.shape, generator=rng))
    return agent


def copies(*things):
    """Deep copies of agents and buffers that know each other."""
    return copy.deepcopy(things)
