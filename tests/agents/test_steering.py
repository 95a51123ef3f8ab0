"""Noise steering: the base decides what noise means and never changes; gradients reach the noise through it."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.learning.agent import build_agent, wrap_policy
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.objectives import build_objective
from embodied_rft.policy import build_policy
from embodied_rft.pools.chunks import ChunkBox
from embodied_rft.testing.check_policy import check_policy
from tests.lab.draws import generator
from tests.lab.point import random_batch

STATE = gym.spaces.Box(-1, 1, (3,))
ACTION = ChunkBox(gym.spaces.Box(-1, 1, (2,)), horizon=2)
BASES = {
    "diffusion": {"id": "diffusion", "horizon": 2, "denoising_steps": 8, "ddim_steps": 4, "width": 32},
    "flow": {"id": "flow", "horizon": 2, "num_steps": 4, "width": 32},
    "consistency": {"id": "consistency", "horizon": 2, "num_steps": 1, "width": 32},
}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
each_kind = pytest.mark.parametrize("deterministic", [False, True], ids=["gaussian", "deterministic"])


def build(base, **options):
    spec = {"id": "steering", "base": base, "hidden": [32, 32], **options}
    return build_policy(spec, STATE, ACTION, generator())


def observations(count, seed=0):
    return {"observation": np.random.default_rng(seed).uniform(-1, 1, (count, 3)).astype(np.float32)}


@each_base
@each_kind
def test_contract_agreement_and_bounds(base, deterministic):
    policy, observation = build(base, deterministic=deterministic, scale=1.2), observations(30)
    check_policy(policy, STATE, ACTION)
    taken = policy.act(observation, rng=generator(1))
    assert taken.action.shape == (30, 4) and (np.abs(taken.trace["noise"]) <= 1.2 + 1e-6).all()
    trace = {k: torch.from_numpy(v) for k, v in taken.trace.items()}
    again, _ = policy.log_prob(as_tensors(observation), torch.from_numpy(taken.action), trace)
    np.testing.assert_allclose(again.detach().numpy(), taken.log_prob, atol=1e-5)


@each_base
def test_the_action_is_what_the_base_makes_of_the_noise(base):
    policy, observation = build(base), observations(30)
    taken = policy.act(observation, rng=generator(1))
    made = policy.base.from_noise(as_tensors(observation), torch.from_numpy(taken.trace["noise"]))
    np.testing.assert_allclose(made.detach().numpy(), taken.action, atol=1e-6)
    other = policy.base.from_noise(as_tensors(observation), -torch.from_numpy(taken.trace["noise"]))
    assert (made - other).abs().max() > 0.1  # the noise matters


@each_kind
def test_what_is_chosen_is_what_acting_hands_to_the_base(deterministic):
    """In units of the base's noise, within `scale`: the same for `choose`, `act`, `mode` and `rsample`."""
    policy, observation = build(BASES["flow"], deterministic=deterministic, scale=2.5, last_gain=3.0), observations(30)
    seen = as_tensors(observation)
    noise, _ = policy.choose(seen, rng=generator(1))
    assert 0.5 < float(noise.detach().abs().max()) <= 2.5
    taken = policy.act(observation, greedy=deterministic, rng=generator(1))
    np.testing.assert_allclose(noise.detach().numpy(), taken.trace["noise"], atol=1e-6)
    made = policy.mode(seen) if deterministic else policy.rsample(seen, rng=generator(1))[0]
    torch.testing.assert_close(made, policy.base.from_noise(seen, noise), atol=1e-5, rtol=1e-5)


def test_a_new_steering_policy_acts_like_its_greedy_base():
    agent = build_agent(BASES["flow"], STATE, ACTION, generator(3))
    policy = wrap_policy("steering", agent, generator(), hidden=[32, 32])
    observation = observations(30)
    base, steered = (p.act(observation, greedy=True).action for p in (agent.policy, policy))
    np.testing.assert_allclose(steered, base, atol=0.05)


@each_base
@pytest.mark.parametrize("objective", ["sac", "td3", "dsrl_na"])
def test_learning_changes_the_noise_policy_and_nothing_of_the_base(base, objective):
    spec = {"id": "steering", "base": base, "hidden": [32, 32], "deterministic": objective == "td3"}
    agent = build_agent(spec, STATE, ACTION, generator())
    before = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    target = build_objective({"id": objective, "critic_hidden": [32, 32], "policy_delay": 1})
    target.setup(agent)
    learner = Learner(agent, target, LearnerConfig(weight_decay=0.1))
    for _ in range(3):
        learner.update(random_batch(STATE, ACTION, size=32), generator(1))
    changed = {k for k, v in agent.policy.state_dict().items() if not torch.equal(v, before[k])}
    assert any(name.startswith("head.") for name in changed)
    assert not any(name.startswith("base.") for name in changed)
    assert not agent.policy.train().base.training


def agent_with(objective, *, deterministic=False, base=None, **options):
    spec = {"id": "steering", "base": base or BASES["flow"], "hidden": [32, 32], "deterministic": deterministic}
    agent = build_agent(spec, STATE, ACTION, generator())
    objective = build_objective({"id": objective, "critic_hidden": [32, 32], **options})
    objective.setup(agent)
    return agent, objective


def batch_with_noise(agent, size=24):
    """A batch whose trace is of the policy's own decisions."""
    batch = random_batch(STATE, ACTION, size=size)
    noise, _ = agent.policy.choose(batch.observation, rng=generator(5))
    batch.trace["noise"] = noise.detach()
    return batch


def test_dsrl_sac_is_sac_of_an_environment_whose_actions_are_noise():
    agent, objective = agent_with("dsrl_sac", initial_temperature=0.3)
    batch = batch_with_noise(agent)
    with torch.no_grad():
        noise, log_prob = agent.policy.choose(batch.next_observation, rng=generator(1))
        value = agent.parts["target_critic"](batch.next_observation, noise).amin(0) - 0.3 * log_prob
        error = agent.parts["critic"](batch.observation, batch.trace["noise"])
        error = error - (batch.reward + batch.discount * value)
        expected = 0.5 * error.square().sum() / len(batch)
        torch.testing.assert_close(objective.critic_loss(agent, batch, generator(1))[0], expected)
        noise, log_prob = agent.policy.choose(batch.observation, rng=generator(2))
        expected = (0.3 * log_prob - agent.parts["critic"](batch.observation, noise).amin(0)).mean()
        torch.testing.assert_close(objective.policy_loss(agent, batch, generator(2))[0], expected)
    batch.action = torch.full_like(batch.action, 7.0)  # actions do not count, only noise
    with torch.no_grad():
        again, _ = objective.critic_loss(agent, batch, generator(1))
    torch.testing.assert_close(again, 0.5 * error.square().sum() / len(batch))


def test_dsrl_na_judges_actions_and_distils_them_into_a_critic_of_noise():
    agent, objective = agent_with("dsrl_na")
    assert list(objective.losses) == ["critic", "noise_critic", "policy", "temperature"]
    batch = random_batch(STATE, ACTION, size=24)  # decisions of others: their noise is not known
    learner = Learner(agent, objective, LearnerConfig(learning_rate=3e-3))
    for i in range(300):
        learner.update(batch, generator(i), only=["noise_critic"])
    noise = agent.policy.draw_noise(24, rng=generator(999))
    with torch.no_grad():
        action = agent.policy.from_noise(batch.observation, noise)
        told = agent.parts["noise_critic"](batch.observation, noise)
        true = agent.parts["critic"](batch.observation, action)
    assert (told - true).square().mean() < 0.1 * true.var()
    assert noise.abs().max() <= 1.5


def test_dsrl_na_climbs_the_critic_of_noise_alone():
    agent, objective = agent_with("dsrl_na")
    batch = batch_with_noise(agent)
    loss, _ = objective.policy_loss(agent, batch, generator(2))
    noise, log_prob = agent.policy.choose(batch.observation, rng=generator(2))
    value = agent.parts["noise_critic"](batch.observation, noise).amin(0)
    torch.testing.assert_close(loss, (agent.parts["temperature"].alpha * log_prob - value).mean())
    touched = torch.autograd.grad(loss, list(agent.parts["critic"].parameters()), allow_unused=True)
    assert all(gradient is None for gradient in touched)


def test_decisions_of_others_and_other_policies_are_refused():
    agent, objective = agent_with("dsrl_sac")
    batch = batch_with_noise(agent)
    batch.trace["noise"][3] = torch.nan
    with pytest.raises(ValueError, match="offline_share: 0"):
        objective.critic_loss(agent, batch, generator())
    plain = build_agent({"id": "gaussian", "horizon": 2, "hidden": [32]}, STATE, ACTION, generator())
    for name in ("dsrl_sac", "dsrl_na"):
        with pytest.raises(ValueError, match="with: steering"):
            build_objective({"id": name}).setup(plain)
    with pytest.raises(ValueError, match="cannot imitate"):
        agent_with("dsrl_na", bc_weight=1.0)


def test_load_base_takes_statistics_and_weights():
    base = {**BASES["flow"], "statistics": "min_max"}
    trained = build_policy(base, STATE, ACTION, generator(5))
    trained.codec.statistics.fit({"action": torch.rand(50, 2, generator=generator())})
    policy = build(base)
    with pytest.raises(ValueError, match="statistics"):
        policy.act(observations(3), greedy=True)
    policy.load_base(trained)
    noise = torch.randn(3, 4, generator=generator())
    observation = as_tensors(observations(3))
    assert torch.equal(policy.base.from_noise(observation, noise), trained.from_noise(observation, noise))
    assert not any(p.requires_grad for p in policy.base.parameters())


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ({"id": "gaussian", "horizon": 2}, {}, "no noise to steer"),
        (BASES["flow"], {"scale": 0.0}, "positive"),
        (BASES["flow"], {"noise_scale": 1.0}, "unknown key agent.noise_scale; did you mean 'scale'"),
    ],
)
def test_bad_options_say_what_is_wrong(base, options, message):
    with pytest.raises(ValueError, match=message):
        build(base, **options)


def test_the_noise_of_a_foreign_action_is_unknown():
    policy = build(BASES["flow"])
    with pytest.raises(ValueError, match="key 'u'"):
        policy.log_prob(as_tensors(observations(3)), torch.zeros(3, 4), {})
