"""Off-policy objectives against slow transcriptions of their papers: updates from fixed weights and fixed batches.

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

from embodied_rft.agent import build_agent
from embodied_rft.data import Source
from embodied_rft.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.testing import random_batch

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


def generator(seed):
    return torch.Generator().manual_seed(seed)


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


def test_sac():
    check(soft_actor_critic(), {"id": "sac", "initial_temperature": 0.3, **SMALL})


def test_sac_with_options():
    options = {"target_entropy": 0.5, "backup_entropy": False, "policy_delay": 2, "num_critics": 3}
    transcription = soft_actor_critic(entropy=0.5, backup_entropy=False, delay=2)
    check(transcription, {"id": "sac", "initial_temperature": 0.3, **options, **SMALL})


@pytest.mark.parametrize("id, ratio, share", [("rlpd", 20, 0.5), ("wsrl", 4, 0.0)])
def test_rlpd_and_wsrl(id, ratio, share):
    objective = build_objective(id)
    c = objective.config
    assert (c.num_critics, c.critic_layer_norm, c.subset_size, c.offline_share) == (10, True, 2, share)
    assert objective.updates_per_decision == c.policy_delay == ratio  # the policy steps once a decision
    transcription = soft_actor_critic(target="subset", climbs="mean", backup_entropy=False, entropy=-1.0, delay=2)
    check(transcription, {"id": id, "policy_delay": 2, "num_critics": 4, **SMALL})


def test_e2o():
    check(soft_actor_critic(target="pairs", climbs="mean"), {"id": "e2o", "num_critics": 4, **SMALL})


# --- deterministic policies --------------------------------------------------------------------------------------


def twin_delayed(*, penalty=None):
    """Fujimoto et al. 2018, algorithm 1; with a penalty, Q is divided by its mean size (TD3+BC, SPOT)."""

    def update(ref, batch, rng, config, i):
        o, o2 = batch.observation, batch.next_observation
        with torch.no_grad():
            noise = (config.target_noise * torch.randn(len(batch), 2, generator=rng)).clamp(-0.5, 0.5)
            action = ref.target_policy.head.mode(ref.target_policy.encoder(o2))
            action = (action + noise).clamp(-1, 1)
            y = batch.reward + batch.discount * ref.target_critic(o2, CENTER + HALF * action).min(0).values
        q1, q2 = ref.critic(o, batch.action)
        ref.step("critic", (q1 - y).square().mean() + (q2 - y).square().mean())
        if i % 2 == 0:
            action = ref.policy.head.mode(ref.policy.encoder(o))
            q1 = ref.critic(o, CENTER + HALF * action)[0]
            loss = -q1.mean()
            if penalty is not None:
                loss = loss / q1.abs().mean().detach() + penalty(ref, batch, action, rng, config)
            ref.step("policy", loss)
            ref.move("target_critic", "critic", config.tau)
            ref.move("target_policy", "policy", config.tau)

    return update


@pytest.mark.parametrize("noise", [0.2, 2.0])  # the second is clipped nearly everywhere
def test_td3(noise):
    check(twin_delayed(), {"id": "td3", "target_noise": noise, **SMALL}, DETERMINISTIC, updates=4)


def test_td3_bc():
    def imitation(ref, batch, action, rng, config):
        taken = (batch.action - CENTER) / HALF
        return 0.4 * (action - taken).square().mean()

    def offline(batch):
        batch.columns["source"] = np.full(len(batch), Source.OFFLINE)

    check(twin_delayed(penalty=imitation), {"id": "td3_bc", **SMALL}, DETERMINISTIC, updates=4, change=offline)


def test_imitation_leaves_out_own_experience():
    def imitation(ref, batch, action, rng, config):
        taken = (batch.action - CENTER) / HALF
        each = (action - taken).square().mean(1)
        return 2.0 * sum(e for e, source in zip(each, batch.columns["source"]) if source != Source.ONLINE) / len(batch)

    options = {"id": "td3", "bc_weight": 2.0, **SMALL}
    check(twin_delayed(penalty=imitation), options, DETERMINISTIC, updates=4)


def elbo(density, observation, action, beta, rng):
    """Reconstruction + beta KL, [B], of an action in [-1, 1]."""
    features = density.encoder(observation)
    mean, log_std = density.infer(torch.cat([features, action], 1)).chunk(2, 1)
    std = log_std.clamp(-4, 15).exp()
    z = mean + std * torch.randn(mean.shape, generator=rng)
    decoded = torch.tanh(density.decode(torch.cat([features, z], 1)))
    kl = -0.5 * (1 + torch.log(std.square()) - mean.square() - std.square())
    return (decoded - action).square().mean(1) + beta * kl.mean(1)


def test_density():
    def update(ref, batch, rng, config, i):
        taken = (batch.action - CENTER) / HALF
        ref.step("density", elbo(ref.density, batch.observation, taken, 0.3, rng).mean())

    agent, _ = check(update, {"id": "density", "hidden": [24, 24], "beta": 0.3}, DETERMINISTIC)
    assert agent.parts["density"].latent == 4
    config = build_objective("density").config
    assert (config.hidden, config.beta) == ((750, 750), 0.5)


def test_spot():
    def unlikely(ref, batch, action, rng, config):
        return config.support_weight * elbo(ref.density, batch.observation, action, 0.3, rng).mean()

    def prepare(agent):
        build_objective({"id": "density", "hidden": [24]}).setup(agent)

    options = {"id": "spot", "support_weight": 0.7, "beta": 0.3, **SMALL}
    check(twin_delayed(penalty=unlikely), options, DETERMINISTIC, updates=4, prepare=prepare)


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


IQL = {"id": "iql", "largest_weight": 3.0, "expectile": 0.8, **SMALL}


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


# --- noise of a frozen policy ------------------------------------------------------------------------------------


def chosen(policy, observation, rng):
    share, log_prob = squashed(policy, observation, rng)
    return 1.5 * share, log_prob


DSRL = {"initial_temperature": 0.3, **SMALL}


def test_dsrl_sac():
    def update(ref, batch, rng, config, i):
        o, o2 = batch.observation, batch.next_observation
        alpha = ref.temperature.log_alpha.detach().exp()
        with torch.no_grad():
            noise, log_prob = chosen(ref.policy, o2, rng)
            value = ref.target_critic(o2, noise).min(0).values - alpha * log_prob
            y = batch.reward + batch.discount * value
        ref.step("critic", sum(0.5 * (m - y).square().mean() for m in ref.critic(o, batch.trace["noise"])))
        noise, log_prob = chosen(ref.policy, o, rng)
        ref.step("policy", (alpha * log_prob - ref.critic(o, noise).min(0).values).mean())
        ref.step("temperature", -(ref.temperature.log_alpha * (log_prob.detach() + 0.0)).mean())
        ref.move("target_critic", "critic", config.tau)

    def traced(batch):
        batch.trace["noise"] = 3 * torch.rand(len(batch), 2, generator=generator(7)) - 1.5

    check(update, {"id": "dsrl_sac", **DSRL}, STEERING, change=traced)
    assert build_objective("dsrl_sac").updates_per_decision == 5


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_dsrl_na(own):
    def update(ref, batch, rng, config, i):
        o, o2 = batch.observation, batch.next_observation
        alpha = ref.temperature.log_alpha.detach().exp()
        with torch.no_grad():
            noise, log_prob = chosen(ref.policy, o2, rng)
            value = ref.target_critic(o2, ref.policy.base.from_noise(o2, noise)).min(0).values - alpha * log_prob
            y = batch.reward + batch.discount * value
        ref.step("critic", sum(0.5 * (m - y).square().mean() for m in ref.critic(o, batch.action)))
        if i % 2 == 0:
            with torch.no_grad():
                noise = torch.randn(len(batch), 2, generator=rng).clamp(-1.5, 1.5)
                if own:
                    policy_noise, _ = chosen(ref.policy, o, rng)
                    noise = torch.where(torch.rand(len(batch), 1, generator=rng) < own, policy_noise, noise)
                taught = ref.critic(o, ref.policy.base.from_noise(o, noise))
            pairs = zip(ref.noise_critic(o, noise), taught, strict=True)
            ref.step("noise_critic", sum(0.5 * (member - teacher).square().mean() for member, teacher in pairs))
        noise, log_prob = chosen(ref.policy, o, rng)
        ref.step("policy", (alpha * log_prob - ref.noise_critic(o, noise).min(0).values).mean())
        ref.step("temperature", -(ref.temperature.log_alpha * (log_prob.detach() + 0.0)).mean())
        ref.move("target_critic", "critic", config.tau)

    check(update, {"id": "dsrl_na", "own_noise": own, **DSRL}, STEERING, updates=4)
    assert build_objective("dsrl_na").updates_per_decision == 5
