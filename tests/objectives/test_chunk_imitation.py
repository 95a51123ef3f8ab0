"""What chunk policies learn from data: imitation losses and their gradients against transcriptions of the papers."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.policy import build_policy
from embodied_rft.pools.chunks import ChunkBox
from tests.lab.draws import generator

STATE = gym.spaces.Box(-1, 1, (3,))
ACTION = gym.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
SMALL = {"width": 32, "num_blocks": 1, "horizon": 2}


def denoising(policy, data, condition, rng):
    """Ho et al. 2020, eq. 14, on the cosine schedule of Nichol and Dhariwal 2021, eq. 17: [B, D]."""
    count = policy.config.denoising_steps
    level = [math.cos((t / count + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(count + 1)]
    kept = [1.0]
    for t in range(count):
        kept.append(kept[-1] * (1 - min(0.999, 1 - level[t + 1] / level[t])))
    time = torch.randint(count, (len(data),), generator=rng)
    noise = torch.randn(data.shape, generator=rng)
    share = torch.tensor([kept[t + 1] for t in time.tolist()])[:, None]
    said = policy.net(share.sqrt() * data + (1 - share).sqrt() * noise, condition, (time + 1) / count)
    return (said - (noise if policy.config.prediction == "epsilon" else data)).square()


def matching(policy, data, condition, rng):
    """Liu et al. 2022, eq. 1: from noise at time 0 to data at time 1: [B, D]."""
    noise = torch.randn(data.shape, generator=rng)
    time = torch.rand(len(data), generator=rng)
    at = (1 - time[:, None]) * noise + time[:, None] * data
    return (policy.net(at, condition, time) - (data - noise)).square()


@pytest.mark.parametrize(
    "spec, transcription",
    [
        ({"id": "diffusion", "denoising_steps": 6}, denoising),
        ({"id": "diffusion", "denoising_steps": 6, "prediction": "x0"}, denoising),
        ({"id": "flow", "num_steps": 5}, matching),
        ({"id": "flow", "num_steps": 5, "noise": "learned"}, matching),
    ],
)
def test_errors_of_noise_chunk_and_velocity(spec, transcription):
    policy, observation, action = example(spec)
    data = (action - torch.tensor([0.0, 0.5]).repeat(2)) / torch.tensor([2.0, 0.5]).repeat(2)
    error = transcription(policy, data, policy.condition(observation), generator(5))
    compare(policy, policy.imitation_loss(observation, action, rng=generator(5)), error.mean(1))
    mask = torch.rand(error.shape, generator=generator(6)) < 0.6
    mask[0] = False  # nobody saw what came of it
    expected = torch.stack([e[m].mean() if m.any() else 0 * e.sum() for e, m in zip(error, mask, strict=True)])
    compare(policy, policy.imitation_loss(observation, action, rng=generator(5), mask=mask), expected)


@pytest.mark.parametrize("reconstruction", [0.0, 0.7])
def test_consistency_of_neighbouring_noise(reconstruction):
    """Song and Dhariwal 2023, section 3: the chunk at the smaller noise is the target, without gradient."""
    policy, observation, action = example({"id": "consistency", "num_levels": 8, "reconstruction": reconstruction})
    data = (action - torch.tensor([0.0, 0.5]).repeat(2)) / torch.tensor([2.0, 0.5]).repeat(2)
    condition, rng = policy.condition(observation), generator(5)
    noise = torch.randn(data.shape, generator=rng)
    low, high = 0.02 ** (1 / 7), 10 ** (1 / 7)
    widths = torch.tensor([(low + i / 7 * (high - low)) ** 7 for i in range(8)])
    normal = torch.distributions.Normal(-1.1, 2.0).cdf(widths.log())
    level = torch.multinomial((normal[1:] - normal[:-1]) * 2, len(data), replacement=True, generator=rng)

    def clean(sigma):
        x = data + sigma[:, None] * noise
        spread = (sigma.square() + 0.25).sqrt()[:, None]
        time = torch.log(sigma / 0.02) / math.log(10 / 0.02)
        said = policy.net(x / spread, condition, time)
        apart = sigma[:, None] - 0.02
        return 0.25 / (apart.square() + 0.25) * x + 0.5 * apart / spread * said

    ahead, target = clean(widths[level + 1]), clean(widths[level]).detach()
    soft = 0.00054 * 2.0  # sqrt of the four numbers of a chunk
    distance = ((ahead - target).square().sum(1) + soft**2).sqrt() - soft
    expected = distance / (widths[level + 1] - widths[level]) + reconstruction * (ahead - data).square().mean(1)
    compare(policy, policy.imitation_loss(observation, action, rng=generator(5)), expected)


def example(spec):
    policy = build_policy(spec | SMALL, STATE, ChunkBox(ACTION, horizon=2), generator())
    observation = {"observation": torch.rand(40, 3, generator=generator(1))}
    action = torch.rand(40, 4, generator=generator(2)) * torch.tensor([4.0, 1.0]).repeat(2) + torch.tensor(
        [-2.0, 0.0]
    ).repeat(2)
    return policy, observation, action


def compare(policy, loss, expected):
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    weights = [w for name, w in policy.named_parameters() if name.startswith("net.")]
    for ours, theirs in zip(
        *(torch.autograd.grad(x.mean(), weights, retain_graph=True) for x in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
