"""Made-up robots, observations and tiny policies for the tests of vision-language-action policies."""

import gymnasium as gym
import numpy as np
import torch

from embodied_rft.policy import build_policy
from embodied_rft.pools.chunks import ChunkBox
from tests.lab.draws import generator as rng

KINDS = ("qwen2_5_vl", "smolvlm", "paligemma")
HEADS = ("tokens", "parallel", "flow")
IMAGES = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
STEP = gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 4]))
SPACE = gym.spaces.Dict(
    {
        "image/front": IMAGES,
        "image/wrist": gym.spaces.Box(0, 255, (16, 24, 3), np.uint8),
        "state": gym.spaces.Box(-1, 1, (3,), np.float32),
        "instruction": gym.spaces.Text(20),
    }
)


def policy(kind="qwen2_5_vl", head="tokens", *, horizon=1, model=None, space=SPACE, step=STEP, seed=0, **options):
    spec = {"id": "vla", "model": model or {"tiny": {"kind": kind}}, "head": head, "horizon": horizon, **options}
    spec.setdefault("prompt", "{images}{instruction}")
    return build_policy(spec, space, ChunkBox(step, horizon=horizon) if horizon > 1 else step, rng(seed))


def observation(count=3, seed=0):
    numbers = np.random.default_rng(seed)
    return {
        "image/front": numbers.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8),
        "image/wrist": numbers.integers(0, 256, (count, 16, 24, 3)).astype(np.uint8),
        "state": numbers.standard_normal((count, 3)).astype(np.float32),
        "instruction": [("open", "close the door", "push")[i % 3] for i in range(count)],
    }


def tensors(tree):
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in tree.items()}


def chunks(count=3, horizon=1, seed=1):
    numbers = np.random.default_rng(seed)
    steps = numbers.uniform(STEP.low, STEP.high, (count, horizon, 2)).astype(np.float32)
    return torch.from_numpy(steps.reshape(count, -1))


def same(a, b):
    return np.array_equal(a.action, b.action) and np.array_equal(a.log_prob, b.log_prob)
