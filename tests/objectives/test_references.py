"""Online off-policy objectives against transcriptions of their papers: SAC, RLPD, WSRL, E2O, TD3, SPOT, DSRL."""

import numpy as np
import pytest
import torch

from embodied_rft.data import Source
from embodied_rft.objectives import build_objective
from tests.lab.references import (
    CENTER,
    DETERMINISTIC,
    HALF,
    SMALL,
    STEERING,
    check,
    generator,
    soft_actor_critic,
    squashed,
)


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
    steep = DETERMINISTIC | {"last_gain": 4.0}  # actions near the bounds, which noise would leave
    check(twin_delayed(), {"id": "td3", "target_noise": noise, **SMALL}, steep, updates=4)


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
