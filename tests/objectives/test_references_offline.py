"""Offline objectives against transcriptions of their papers: CQL, Cal-QL, IQL, cloning."""

import math

import gymnasium as gym
import pytest
import torch

from embodied_rft.learning.agent import build_agent
from embodied_rft.objectives import build_objective
from tests.lab.point import random_batch
from tests.lab.references import (
    ACTION,
    CENTER,
    DETERMINISTIC,
    GAUSSIAN,
    HALF,
    SMALL,
    STATE,
    acts,
    check,
    generator,
    soft_actor_critic,
)

# --- conservative values -----------------------------------------------------------------------------------------


def proposals(ref, batch, count, rng):
    """`count` uniform actions, as many of the policy here and at the next observation: (action, log-density) each."""
    uniform = 2 * torch.rand(count, len(batch), 2, generator=rng) - 1
    found = [(CENTER + HALF * action, torch.full((len(batch),), math.log(0.5**2))) for action in uniform]
    for observation in (batch.observation, batch.next_observation):
        repeated = {"observation": observation["observation"].repeat(count, 1)}
        with torch.no_grad():
            action, log_prob = acts(ref.policy, repeated, rng)
        found += list(zip(action.split(len(batch)), log_prob.split(len(batch)), strict=True))
    return found


def gap(ref, batch, q, rng, *, count=3, temperature=1.0, weighted=True, floor=None):
    """Mean conservative gap of each member [E]."""
    values = []
    for k, (action, log_density) in enumerate(proposals(ref, batch, count, rng)):
        value = ref.critic(batch.observation, action)
        if floor is not None and k >= count:
            value = torch.maximum(value, floor)
        values.append(value - log_density if weighted else value)
    total = sum((value / temperature).exp() for value in values) / len(values)
    return (temperature * total.log() - q).mean(1)


CQL = {"id": "cql", "num_sampled_actions": 3, "initial_temperature": 0.3, **SMALL}


@pytest.mark.parametrize("options", [{}, {"gap_temperature": 2.0}, {"importance_sampling": False}], ids=str)
def test_cql(options):
    weighted = options.get("importance_sampling", True)
    temperature = options.get("gap_temperature", 1.0)

    def penalty(ref, batch, q, rng):
        return 5.0 * gap(ref, batch, q, rng, temperature=temperature, weighted=weighted).sum()

    transcription = soft_actor_critic(backup_entropy=False, factor=1.0, penalty=penalty)
    check(transcription, CQL | options)
    c = build_objective("cql").config
    assert (c.num_sampled_actions, c.conservative_weight, c.bc_weight) == (10, 5.0, 0.0)


def test_cql_with_a_lagrange_multiplier():
    def update(ref, batch, rng, config, i):
        multiplier, excess = ref.conservatism.log_alpha.exp(), []

        def penalty(ref, batch, q, rng):
            excess.append(gap(ref, batch, q, rng) - 0.5)
            return 5.0 * multiplier.detach() * excess[0].sum()

        soft_actor_critic(backup_entropy=False, factor=1.0, penalty=penalty)(ref, batch, rng, config, i)
        ref.step("conservatism", -0.5 * (5.0 * multiplier * excess[0].detach()).sum())

    check(update, CQL | {"lagrange_gap": 0.5})


def best_of_three(ref, batch, rng, config, i):
    """Cal-QL of its authors: the floor, and targets of the best of the next actions."""
    o, o2 = batch.observation, batch.next_observation
    alpha = ref.temperature.log_alpha.detach().exp()
    with torch.no_grad():
        repeated = {"observation": o2["observation"].repeat(3, 1)}
        action, _ = acts(ref.policy, repeated, rng)
        value = ref.target_critic(repeated, action).min(0).values.reshape(3, -1).max(0).values
        y = batch.reward + batch.discount * value
    q = ref.critic(o, batch.action)
    loss = sum((member - y).square().mean() for member in q)
    floor = batch.notes["mc_return"].nan_to_num(-math.inf)
    ref.step("critic", loss + 5.0 * gap(ref, batch, q, rng, floor=floor).sum())
    action, log_prob = acts(ref.policy, o, rng)
    ref.step("policy", (alpha * log_prob - ref.critic(o, action).min(0).values).mean())
    ref.step("temperature", -(ref.temperature.log_alpha * (log_prob.detach() - 2)).mean())
    ref.move("target_critic", "critic", config.tau)


def test_cal_ql():
    def unknown(batch):
        batch.notes["mc_return"][::5] = math.nan

    check(best_of_three, CQL | {"id": "cal_ql"}, change=unknown)


def test_cql_backs_up_the_entropy_of_the_best_action():
    agent = build_agent(GAUSSIAN, STATE, ACTION, generator(0))
    objective = build_objective(CQL | {"max_target": True, "backup_entropy": True})
    objective.setup(agent)
    batch = random_batch(STATE, ACTION, size=40)
    target = objective.td_target(agent, batch, generator(1))
    repeated = {"observation": batch.next_observation["observation"].repeat(3, 1)}
    with torch.no_grad():
        action, log_prob = acts(agent.policy, repeated, generator(1))
        value = agent.parts["target_critic"](repeated, action).min(0).values.reshape(3, -1)
    rows = torch.arange(40)
    best = value.argmax(0)
    expected = batch.reward + batch.discount * (value[best, rows] - 0.3 * log_prob.reshape(3, -1)[best, rows])
    torch.testing.assert_close(target, expected)


# --- IQL ---------------------------------------------------------------------------------------------------------


def implicit(log_likelihood):
    """Kostrikov et al. 2021: V by eq. 5, Q by eq. 6, policy by eq. 7, in the order of the authors' code."""

    def update(ref, batch, rng, config, i):
        o, o2 = batch.observation, batch.next_observation
        with torch.no_grad():
            q = ref.target_critic(o, batch.action).min(0).values
        difference = q - ref.value(o)
        weight = torch.where(difference > 0, config.expectile, 1 - config.expectile)
        ref.step("value", (weight * difference.square()).mean())
        with torch.no_grad():
            y = batch.reward + batch.discount * ref.value(o2)
        ref.step("critic", sum((member - y).square().mean() for member in ref.critic(o, batch.action)))
        with torch.no_grad():
            weight = (config.inverse_temperature * (q - ref.value(o))).exp().clamp(max=config.largest_weight)
        ref.step("policy", -(weight * log_likelihood(ref.policy, batch)).mean())
        ref.move("target_critic", "critic", config.tau)

    return update


def of_squashed(policy, batch):
    action = (batch.action - CENTER) / HALF
    mean, log_std = policy.head(policy.encoder(batch.observation))
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(torch.atanh(action))
    return (density - torch.log(1 - action.square())).sum(1)


def of_clipped(policy, batch):
    """The authors' policy: a Gaussian around tanh of the network, its width free of the observation."""
    action = (batch.action - CENTER) / HALF
    mean = torch.tanh(policy.head.net(policy.encoder(batch.observation)))
    return torch.distributions.Normal(mean, policy.head.log_std.exp()).log_prob(action).sum(1)


IQL = {"id": "iql", "largest_weight": 1.05, "expectile": 0.8, **SMALL}


@pytest.mark.parametrize(
    "options, likelihood",
    [({}, of_squashed), ({"squash": "mean", "std": "free"}, of_clipped)],
    ids=["tanh of a Gaussian", "Gaussian around tanh"],
)
def test_iql(options, likelihood):
    check(implicit(likelihood), IQL, GAUSSIAN | options)
    assert (c := build_objective("iql").config).expectile == 0.7 and c.inverse_temperature == 3.0


def test_iql_by_imitation():
    def squared(policy, batch):
        return -(policy.head.mode(policy.encoder(batch.observation)) - (batch.action - CENTER) / HALF).square().mean(1)

    check(implicit(squared), IQL | {"extraction": "imitation"}, DETERMINISTIC)


def test_iql_needs_likelihoods_of_the_actions_of_others():
    agent = build_agent({"id": "flow", "width": 8, "num_blocks": 1}, STATE, ACTION, generator(0))
    with pytest.raises(ValueError, match="set extraction: imitation"):
        build_objective("iql").setup(agent)
    build_objective({"id": "iql", "extraction": "imitation"}).setup(agent)
    build_objective("iql").setup(build_agent({"id": "categorical"}, STATE, gym.spaces.Discrete(3), generator(0)))


# --- cloning -----------------------------------------------------------------------------------------------------


def test_bc_by_squared_error():
    def update(ref, batch, rng, config, i):
        taken = (batch.action - CENTER) / HALF
        ref.step("policy", (ref.policy.head.mode(ref.policy.encoder(batch.observation)) - taken).square().mean())

    check(update, "bc")


def test_bc_by_likelihood():
    def update(ref, batch, rng, config, i):
        ref.step("policy", -of_squashed(ref.policy, batch).mean())

    def inside(batch):
        batch.action = CENTER + 0.99 * (batch.action - CENTER)

    check(update, "bc", GAUSSIAN | {"imitation": "nll"}, change=inside)
