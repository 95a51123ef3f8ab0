"""Vision-language models that answer in text: agreement for three families, and group-relative learning of colours."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.objectives import build_objective
from embodied_rft.policy import build_policy
from embodied_rft.pools.protocol import fields_of
from embodied_rft.testing.check_policy import check_policy
from tests.lab.helpers_vla import KINDS, rng

SPACE = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), "prompt": gym.spaces.Text(20)})
REPLY = gym.spaces.Text(20)
COLOURS = "rgb"


def policy(kind="qwen2_5_vl", **options):
    spec = {"id": "language", "model": {"tiny_vlm": {"kind": kind}}, "prompt": "plain", **options}
    return build_policy(spec, SPACE, REPLY, rng())


def pictures(colours, *, blank=False):
    """One plain picture and one question for each colour."""
    image = np.zeros((len(colours), 32, 32, 3), np.uint8)
    for row, colour in enumerate(colours):
        image[row, ..., colour] = 0 if blank else 255
    return {"image": image, "prompt": ["colour?"] * len(colours)}


@pytest.mark.parametrize("kind", KINDS)
def test_contract_and_agreement(kind):
    p, seen = policy(kind, max_new_tokens=4), pictures([0, 1, 2, 0])
    check_policy(p, SPACE, REPLY)
    seen["prompt"] = ["a", "which colour?", "b", "c d"]  # padded
    taken = p.act(seen, rng=rng(1))
    assert set(taken.trace["reply"].lengths) <= {1, 2, 3, 4}
    log_prob, entropy = p.log_prob({**seen, **as_tensors(seen)}, taken.action, taken.trace)
    padded, mask = taken.log_prob.pad(0)
    assert np.allclose(log_prob.detach().numpy(), padded, atol=1e-5) and (entropy.detach().numpy()[mask] > 0).all()
    other = p.log_prob({**seen, **as_tensors(pictures([1, 2, 0, 1]) | {"prompt": seen["prompt"]})}, None, taken.trace)[
        0
    ]
    assert (other - log_prob).abs().max() > 1e-4  # the picture matters


@pytest.mark.parametrize("train", ["lora", "head", "lora+head"])
def test_only_what_is_chosen_can_change(train):
    trained = {n for n, q in policy(train=train).named_parameters() if q.requires_grad}
    assert trained and all(("lora_" in n and "lora" in train) or ("lm_head" in n and "head" in train) for n in trained)


def test_bad_spaces_are_refused():
    spec = {"id": "language", "model": {"tiny_vlm": {}}, "prompt": "plain"}
    with pytest.raises(ValueError, match="no image to see"):
        build_policy(spec, gym.spaces.Dict({"prompt": gym.spaces.Text(9)}), REPLY, rng())
    with pytest.raises(ValueError, match="did you mean 'image'"):
        policy(images=["imag"])
    with pytest.raises(ValueError, match="answers in text"):
        build_policy(spec, SPACE, gym.spaces.Box(-1, 1, (2,)), rng())


def share_right(seed, *, blank):
    """Greedy share of right colours after imitation of half-right answers and a few rounds of GRPO."""
    spec = policy(max_new_tokens=1).spec
    agent, numbers = build_agent(spec, SPACE, REPLY, rng(seed)), np.random.default_rng(seed)
    p, draws = agent.policy, rng(seed)
    optimizer = torch.optim.Adam(p.parameters(), 1e-3)
    for _ in range(10):  # know that an answer is a colour; which one is chance
        seen, said = (
            pictures(numbers.integers(3, size=16), blank=blank),
            [COLOURS[i] for i in numbers.integers(3, size=16)],
        )
        p.imitation_loss({**seen, **as_tensors(seen)}, said).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    objective = build_objective({"id": "grpo", "num_epochs": 2, "batch_size": 64})
    objective.setup(agent)
    learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-3, clip_norm=1.0))
    action = fields_of(REPLY)["observation"]
    buffer, group = (
        Buffer(Schema(fields_of(SPACE), action, dict(p.trace_fields), None), 4_000),
        np.repeat(np.arange(16), 8),
    )
    for step in range(12):
        colour = numbers.integers(3, size=16)[group]
        seen = pictures(colour, blank=blank)
        taken = p.act(seen, rng=draws)
        reward = np.array([said == COLOURS[c] for said, c in zip(taken.action, colour, strict=True)], np.float32)
        book = {"group": group + 16 * step, "seed": 0, "step": 0, "version": learner.version, "source": 2}
        ends = np.ones(128, bool)
        buffer.add(np.arange(128), seen, taken, reward, ends, ~ends, **book)
        buffer.close(np.arange(128), seen)
        learner.learn(buffer, numbers)
    asked = np.arange(30) % 3
    said = p.act(pictures(asked, blank=blank), greedy=True).action
    return np.mean([text == COLOURS[c] for text, c in zip(said, asked, strict=True)])


@pytest.mark.learning
def test_grpo_learns_to_name_colours_and_with_blank_pictures_does_not():
    assert share_right(0, blank=False) > 0.8
    assert share_right(0, blank=True) < 0.5
