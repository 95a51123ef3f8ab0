"""How objectives are compared with slow transcriptions of their papers: updates from fixed weights and batches.

A `Reference` is a copy of the agent with plain Adam for each part. A transcription computes losses one by one, steps
the part each belongs to and moves the targets; after some updates all weights, gradients and losses are the same. So it
sees targets, what is detached, which part a loss trains, order, delays and speed of target networks. Networks are the
agent's own (their tests are elsewhere); sampling and densities are written out.
"""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from tests.lab.draws import generator
from tests.lab.point import random_batch

STATE = gym.spaces.Box(-np.inf, np.inf, (5,))
ACTION = gym.spaces.Box(np.array([-2, 0.5], np.float32), np.array([1, 4.5], np.float32))
CENTER, HALF = torch.tensor([-0.5, 2.5]), torch.tensor([1.5, 2.0])
SMALL = {"critic_hidden": [24, 24], "tau": 0.1}
GAUSSIAN = {"id": "gaussian", "hidden": [24, 24]}
DETERMINISTIC = GAUSSIAN | {"deterministic": True}
STEERING = {
    "id": "steering",
    "hidden": [24],
    "last_gain": 1.0,
    "base": {"id": "flow", "num_steps": 2, "width": 16, "num_blocks": 1, "horizon": 1},
}
RATE, EPSILON = 1e-2, 1e-3  # a large epsilon: steps depend smoothly on gradients, rounding is not magnified


class Reference:
    """A copy of an agent that is trained by plain means."""

    def __init__(self, agent, names):
        self.agent, self.names = copy.deepcopy(agent), names
        self.optimizers, self.gradients, self.losses, self.count = {}, {}, {}, 0

    def __getattr__(self, name):
        return self.agent.policy if name == "policy" else self.agent.parts[name]

    def step(self, name, loss):
        weights = [p for p in getattr(self, name).parameters() if p.requires_grad]
        if name not in self.optimizers:
            self.optimizers[name] = torch.optim.Adam(weights, lr=RATE, eps=EPSILON)
        self.gradients[name] = torch.autograd.grad(loss, weights, retain_graph=True)
        for weight, gradient in zip(weights, self.gradients[name], strict=True):
            weight.grad = gradient
        self.optimizers[name].step()
        self.losses[name] = float(loss.detach())

    def move(self, target, online, tau):
        with torch.no_grad():
            for old, new in zip(getattr(self, target).parameters(), getattr(self, online).parameters(), strict=True):
                old.copy_((1 - tau) * old + tau * new)


def check(
    transcription, objective, agent=GAUSSIAN, *, updates=3, prepare=lambda agent: None, change=lambda batch: None
):
    """`updates` of the objective through the learner, and of its transcription: the same agent at the end."""
    agent = build_agent(agent, STATE, ACTION, generator(0))
    prepare(agent)
    objective = build_objective(objective)
    objective.setup(agent)
    reference = Reference(agent, list(objective.losses))
    learner = Learner(agent, objective, LearnerConfig(learning_rate=RATE))
    for optimizer in learner.optimizers.values():
        optimizer.epsilon = EPSILON
    for i in range(1, updates + 1):
        batch = random_batch(STATE, ACTION, size=40, seed=i)
        change(batch)
        moments = {n: [m.clone() for m in o.first] for n, o in learner.optimizers.items()}
        learner.update(batch, generator(i))
        reference.gradients, reference.losses = {}, {}
        transcription(reference, batch, generator(i), objective.config, i)
        metrics = learner.metrics()
        for name, gradients in reference.gradients.items():
            for new, old, expected in zip(learner.optimizers[name].first, moments[name], gradients, strict=True):
                torch.testing.assert_close(10 * new - 9 * old, expected, rtol=1e-3, atol=1e-5)
        for name, loss in reference.losses.items():
            key = "density/negative_elbo" if name == "density" else f"{name}/loss"
            if key in metrics:
                told = metrics[key] + (metrics.get("critic/penalty", 0.0) if name == "critic" else 0.0)
                assert told == pytest.approx(loss, rel=1e-4, abs=1e-5)
        stepped = [name for name in objective.losses if any(key.startswith(f"{name}/") for key in metrics)]
        assert stepped == list(reference.gradients)
    ours, expected = agent.state_dict(), reference.agent.state_dict()
    for key in set(ours) - {"version"}:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)
    return agent, reference


# --- written out -------------------------------------------------------------------------------------------------


def squashed(policy, observation, rng):
    """A sample of tanh of the policy's Gaussian in [-1, 1], its log-density, each with gradients."""
    mean, log_std = policy.head(policy.encoder(observation))
    noise = torch.randn(mean.shape, generator=rng)
    u = mean + log_std.exp() * noise
    log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(1)
    log_prob = log_prob - (2 * (math.log(2) - u - F.softplus(-2 * u))).sum(1)  # log (1 - tanh(u)^2)
    return torch.tanh(u), log_prob


def acts(policy, observation, rng):
    action, log_prob = squashed(policy, observation, rng)
    return CENTER + HALF * action, log_prob


def soft_actor_critic(
    *, target="min", climbs="min", backup_entropy=True, entropy=-2.0, delay=1, penalty=None, factor=0.5
):
    """Haarnoja et al. 2018b with the parts that its descendants exchange."""

    def update(ref, batch, rng, config, i):
        o, o2 = batch.observation, batch.next_observation
        alpha = ref.temperature.log_alpha.detach().exp()
        with torch.no_grad():
            action, log_prob = acts(ref.policy, o2, rng)
            q = ref.target_critic(o2, action)
            if target == "subset":
                value = q[torch.randperm(len(q), generator=rng)[:2]].min(0).values
            elif target == "pairs":
                pairs = [torch.minimum(q[j], q[k]) for j in range(len(q)) for k in range(j)]
                value = torch.stack(pairs).mean(0)
            else:
                value = q.min(0).values
            y = batch.reward + batch.discount * (value - (alpha * log_prob if backup_entropy else 0))
        q = ref.critic(o, batch.action)
        loss = sum(factor * (member - y).square().mean() for member in q)
        if penalty is not None:
            loss = loss + penalty(ref, batch, q, rng)
        ref.step("critic", loss)
        if i % delay == 0:
            action, log_prob = acts(ref.policy, o, rng)
            q = ref.critic(o, action)
            value = q.min(0).values if climbs == "min" else q.mean(0)
            ref.step("policy", (alpha * log_prob - value).mean())
            log_alpha = ref.temperature.log_alpha
            ref.step("temperature", -(log_alpha * (log_prob.detach() + entropy)).mean())
        ref.move("target_critic", "critic", config.tau)

    return update
