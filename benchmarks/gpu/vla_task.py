"""The made-up robot of the VLA scripts: two cameras, a state vector, random rewards; and agents of any size for it.

Boundary: agents, decisions and filled buffers; measures nothing. Legend: N environments.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Source
from embodied_rft.learning.agent import Agent, build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.chunks import ChunkBox
from embodied_rft.pools.protocol import fields_of

HORIZON, ACTION = 4, 7
TINY = {"kind": "smolvlm", "num_layers": 1}
# About half a billion weights: 32 layers of width 960 and a tower of 12 layers of width 768, 64 tokens an image.
LARGE = {
    "kind": "smolvlm",
    "hidden_size": 960,
    "num_layers": 32,
    "num_heads": 15,
    "num_kv_heads": 5,
    "image_size": 224,
    "patch_size": 14,
    "vision_size": 768,
    "vision_layers": 12,
    "vocab_size": 49_152,
}


def spaces(size: int) -> tuple[gym.Space, gym.Space]:
    """(observation, action) of one environment with images of size x size."""
    image = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
    state = gym.spaces.Box(-1, 1, (8,), np.float32)
    observation = gym.spaces.Dict({"image/front": image, "image/wrist": image, "state": state})
    return observation, ChunkBox(gym.spaces.Box(-1, 1, (ACTION,), np.float32), horizon=HORIZON)


def spec(*, tiny: bool, **options: Any) -> dict[str, Any]:
    """A `vla` agent with random weights."""
    model = {"tiny": TINY if tiny else LARGE}
    return {"id": "vla", "model": model, "horizon": HORIZON, "instruction": "put the cup on the plate", **options}


def make(agent_spec: dict[str, Any], *, size: int, device: torch.device) -> Agent:
    """The agent on the device."""
    return build_agent(agent_spec, *spaces(size), torch.Generator().manual_seed(0)).to(device)


def observe(count: int, *, size: int, seed: int) -> dict[str, np.ndarray]:
    """N observations of noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, count, size, size, 3)).astype(np.uint8)
    state = rng.uniform(-1, 1, (count, 8)).astype(np.float32)
    return {"image/front": images[0], "image/wrist": images[1], "state": state}


def fill(agent: Agent, taken: list[tuple[dict[str, np.ndarray], Decisions]], *, version: int) -> Buffer:
    """A buffer with one episode per environment: these decisions, random rewards at the end."""
    observation, action = agent.spaces.observation, agent.spaces.action
    schema = Schema(
        fields_of(observation),
        fields_of(action)["observation"],
        dict(agent.policy.trace_fields),
        agent.policy.num_units,
    )
    count = len(taken[0][0]["state"])
    buffer, streams = Buffer(schema, (len(taken) + 1) * count), np.arange(count)
    for step, (seen, decisions) in enumerate(taken):
        last = np.full(count, step == len(taken) - 1)
        reward = np.random.default_rng(step).random(count).astype(np.float32) * last
        row = {"group": streams // 8, "seed": 0, "step": step, "version": version, "source": Source.ONLINE}
        buffer.add(streams, seen, decisions, reward, last, ~last & False, **row)
    buffer.close(streams, taken[-1][0])
    return buffer


def learner(agent: Agent, *, batch_size: int, micro_batch: int) -> Learner:
    """PPO, one epoch, in bfloat16."""
    objective = build_objective({"id": "ppo", "num_epochs": 1, "batch_size": batch_size})
    objective.setup(agent)
    return Learner(agent, objective, LearnerConfig(learning_rate=1e-5, precision="bf16", micro_batch=micro_batch))
