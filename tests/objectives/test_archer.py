"""ArCHer's losses are its paper's, and its critic reads texts."""

import numpy as np
import pytest
import torch

from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.networks.critics import Critic
from embodied_rft.networks.encoder import Encoder
from embodied_rft.networks.texts import TextBag, hashed
from embodied_rft.objectives import build_objective
from tests.lab.draws import generator
from tests.lab.references import STATE, check
from tests.lab.scene import TEXT, copies
from tests.test_effects import stand


def transcription(ref, batch, rng, config, i):
    """Zhou et al. 2024, eq. 1 to 3."""
    o, o2 = batch.observation, batch.next_observation
    with torch.no_grad():
        y = batch.reward + batch.discount * ref.target_value(o2)
    ref.step("critic", sum((member - y).square().mean() for member in ref.critic(o, batch.action)))
    made = ref.policy.act({k: v.numpy() for k, v in o.items()}, rng=rng)
    action = torch.from_numpy(made.action)
    with torch.no_grad():
        q = ref.target_critic(o, action).min(0).values
    ref.step("value", (ref.value(o) - q).square().mean())
    with torch.no_grad():
        advantage = ref.critic(o, action).min(0).values - ref.value(o)
    trace = {k: torch.from_numpy(v) for k, v in made.trace.items()}
    log_prob = ref.policy.log_prob(o, action, trace)[0].sum(1)
    ref.step("policy", -(advantage * log_prob).mean())
    ref.move("target_critic", "critic", config.tau)
    ref.move("target_value", "value", config.tau)


def test_archer_equals_its_paper():
    check(transcription, {"id": "archer", "critic_hidden": [24, 24], "tau": 0.1})


def test_a_critic_tells_texts_apart():
    critic = Critic(Encoder(STATE, rng=generator(0)), TEXT, rng=generator(1), hidden=(32,))
    said, worth = ["12", "21", "", "a long answer", "a long answer."], torch.tensor([1.0, 0.0, 2.0, -1.0, 3.0])
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    shown = {"observation": torch.zeros(5, 5)}
    for _ in range(200):
        optimizer.zero_grad()
        (critic(shown, said) - worth).square().mean().backward()
        optimizer.step()
    assert critic(shown, said)[0].tolist() == pytest.approx(worth.tolist(), abs=0.1)
    assert len(hashed(b"abc")) == 6 and len(hashed(b"")) == 1
    twice = [TextBag(rng=generator(3))(["x", "yz"]) for _ in range(2)]
    assert torch.equal(*twice) and twice[0].shape == (2, 64)


def test_a_language_model_learns_from_it():
    """Every part moves, on replies that are drawn anew."""
    agent, buffer = copies(*stand("text"))
    objective = build_objective({"id": "archer", "batch_size": 8, "critic_hidden": [8]})
    objective.setup(agent, generator(0))
    before = {name: [p.clone() for p in agent.trainable(name)] for name in objective.losses}
    learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-3))
    found = learner.learn(buffer, np.random.default_rng(0), num_updates=2)
    assert all(np.isfinite(value) for value in found.values())
    for name, weights in before.items():
        changed = [not torch.equal(a, b) for a, b in zip(weights, agent.trainable(name), strict=True)]
        assert any(changed), name
