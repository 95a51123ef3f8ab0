"""Objectives: what each adds to the shared losses, against references; what they keep, and what they refuse."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft import losses
from embodied_rft.agent import build_agent
from embodied_rft.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.conservative import propose
from embodied_rft.testing import random_batch

STATE = gym.spaces.Box(-np.inf, np.inf, (6,))
ACTION = gym.spaces.Box(-1, 1, (2,))
SMALL = {"critic_hidden": [32, 32]}
GAUSSIAN = {"id": "gaussian", "hidden": [32, 32]}
DETERMINISTIC = GAUSSIAN | {"deterministic": True}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(seed=0, size=40):
    return random_batch(STATE, ACTION, size=size, seed=seed)


def make(objective, agent=GAUSSIAN):
    agent = agent if isinstance(agent, torch.nn.Module) else build_agent(agent, STATE, ACTION, generator())
    objective = build_objective(objective)
    objective.setup(agent)
    return agent, objective


def test_td_target_by_hand():
    agent, objective = make({"id": "sac", "initial_temperature": 0.3, **SMALL})
    batch = batch_of()
    target = objective.td_target(agent, batch, generator(3))
    with torch.no_grad():
        action, log_prob = agent.policy.rsample(batch.next_observation, rng=generator(3))
        q = agent.parts["target_critic"](batch.next_observation, action)
    for i in range(len(batch)):
        value = min(float(q[0, i]), float(q[1, i])) - 0.3 * float(log_prob[i])
        assert float(target[i]) == pytest.approx(float(batch.reward[i]) + float(batch.discount[i]) * value, abs=1e-5)
    terminated = batch.discount == 0
    assert terminated.any() and torch.equal(target[terminated], batch.reward[terminated])


def test_options_of_the_target():
    batch = batch_of()

    def target(**options):
        agent, objective = make({"id": "sac", "num_critics": 6, **SMALL, **options})
        return agent, objective.td_target(agent, batch, generator(3))

    agent, lowest = target(backup_entropy=False)
    with torch.no_grad():
        action, _ = agent.policy.rsample(batch.next_observation, rng=generator(3))
        q = agent.parts["target_critic"](batch.next_observation, action)
    torch.testing.assert_close(lowest, batch.reward + batch.discount * q.amin(0))
    for how in ("mean", "mean_of_pair_minima"):
        expected = batch.reward + batch.discount * losses.reduce_ensemble(q, how)
        torch.testing.assert_close(target(backup_entropy=False, target=how)[1], expected)
    subset = target(backup_entropy=False, target="random_subset")[1]
    pairs = torch.stack([torch.minimum(q[i], q[j]) for i in range(6) for j in range(i)])
    candidates = batch.reward + batch.discount * pairs
    assert (candidates - subset).abs().sum(1).min() < 1e-4  # the minimum of one pair, for the whole batch
    clipped = target(target_clip=(-0.1, 0.1))[1]
    assert clipped.min() >= -0.1 and clipped.max() <= 0.1


def test_a_policy_without_entropy_is_trained_as_td3():
    agent, objective = make({"id": "sac", **SMALL}, DETERMINISTIC)
    assert list(objective.losses) == ["critic", "policy"] and "temperature" not in agent.parts
    batch = batch_of()
    loss, _ = objective.policy_loss(agent, batch, generator())
    q = agent.parts["critic"](batch.observation, agent.policy.mode(batch.observation))
    assert float(loss.detach()) == pytest.approx(-float(q.amin(0).mean().detach()), abs=1e-6)
    _, td3 = make({"id": "td3", "target_noise": 0.5, **SMALL}, agent)
    smooth = td3.td_target(agent, batch, generator(1))
    assert not torch.equal(smooth, objective.td_target(agent, batch, generator(1)))


@pytest.mark.parametrize("objective", ["td3", "spot"])
def test_deterministic_objectives_refuse_stochastic_policies(objective):
    with pytest.raises(ValueError, match="set deterministic: true"):
        make(objective)


def test_spot_needs_a_density():
    with pytest.raises(ValueError, match="pretrain: {objective: density}"):
        make("spot", DETERMINISTIC)


def test_a_critic_survives_a_change_of_objective():
    agent, _ = make({"id": "cal_ql", "num_critics": 5, **SMALL})
    critic, temperature = agent.parts["critic"], agent.parts["temperature"]
    make({"id": "sac", "initial_temperature": 0.01}, agent)
    assert agent.parts["critic"] is critic and agent.parts["temperature"] is temperature
    make({"id": "sac", "warm_start": False, "initial_temperature": 0.01, **SMALL}, agent)
    assert agent.parts["critic"] is not critic and agent.parts["critic"].num_members == 2
    assert float(agent.parts["temperature"].alpha) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="made with num_members"):
        make({"id": "e2o", "num_critics": 3}, make({"id": "cql", "num_critics": 5, **SMALL})[0])


def test_target_critic_starts_equal_and_moves_by_tau():
    agent, objective = make({"id": "sac", "tau": 0.25, **SMALL})
    online, target = agent.parts["critic"].net.weights[0], agent.parts["target_critic"].net.weights[0]
    assert torch.equal(online, target) and not target.requires_grad
    before = target.clone()
    with torch.no_grad():
        online.add_(1.0)
    objective.after_update(agent, 1)
    torch.testing.assert_close(target, before + 0.25)


def test_imitation_weight_counts_offline_rows_only():
    agent, objective = make({"id": "sac", "bc_weight": 2.0, **SMALL})
    batch = batch_of()
    penalty = objective.policy_penalty(agent, batch, batch.action, generator())
    each = agent.policy.imitation_loss(batch.observation, batch.action)
    expected = 2.0 * sum(float(e.detach()) for e, s in zip(each, batch.columns["source"]) if s < 2) / len(batch)
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    assert make({"id": "sac", **SMALL})[1].policy_penalty(agent, batch, batch.action, generator()) is None


def test_proposed_actions_carry_their_densities():
    agent, _ = make({"id": "cql", **SMALL})
    batch = batch_of()
    action, density = propose(agent, batch, 3, generator())
    assert action.shape == (9, len(batch), 2) and density.shape == (9, len(batch))
    torch.testing.assert_close(density[:3], torch.full((3, len(batch)), -2 * float(np.log(2))))
    for rows, observation in ((slice(3, 6), batch.observation), (slice(6, 9), batch.next_observation)):
        for a, d in zip(action[rows], density[rows], strict=True):
            again, _ = agent.policy.log_prob(observation, a, {})
            torch.testing.assert_close(again[:, 0].detach(), d, atol=2e-3, rtol=1e-3)


def test_conservatism_pushes_proposed_actions_down_and_data_up():
    agent, objective = make({"id": "cql", "conservative_weight": 5.0, **SMALL})
    learner, batch = Learner(agent, objective, LearnerConfig(learning_rate=3e-3)), batch_of()
    batch.action = torch.full_like(batch.action, 0.5)

    def gap():
        with torch.no_grad():
            action, _ = propose(agent, batch, 4, generator(1))
            proposed = torch.stack([agent.parts["critic"](batch.observation, a) for a in action]).mean()
            return float(proposed - agent.parts["critic"](batch.observation, batch.action).mean())

    before = gap()
    for i in range(30):
        learner.update(batch, generator(i), only=["critic"])
    assert gap() < before - 1.0


def test_calibration_stops_the_push_at_the_return_of_the_data():
    """With returns far above all values the policy's actions are not pushed at all: only uniform ones are."""
    batch = batch_of()
    gradients = {}
    for floor in (1e3, -1e3, np.nan):
        agent, objective = make({"id": "cal_ql", **SMALL})
        batch.notes["mc_return"] = torch.full((len(batch),), floor)
        action, _ = propose(agent, batch, 4, generator())
        q = agent.parts["critic"](batch.observation, batch.action)
        penalty = objective.critic_penalty(agent, batch, q, generator())
        gradients[floor] = torch.autograd.grad(penalty, agent.parts["critic"].net.last)[0]
        assert torch.isfinite(penalty)
    agent, objective = make({"id": "cql", **SMALL})
    q = agent.parts["critic"](batch.observation, batch.action)
    plain = torch.autograd.grad(objective.critic_penalty(agent, batch, q, generator()), agent.parts["critic"].net.last)[
        0
    ]
    torch.testing.assert_close(gradients[-1e3], plain)
    assert not torch.allclose(gradients[1e3], plain)


def test_optimistic_exploration_takes_the_best_of_the_proposals():
    agent, objective = make({"id": "e2o", "num_critics": 4, "explore_candidates": 8, "explore_bonus": 2.0, **SMALL})
    observation = {"observation": np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)}
    taken = objective.explore(agent, observation, rng=generator(1))
    repeated = {"observation": np.repeat(observation["observation"], 8, axis=0)}
    proposed = agent.policy.act(repeated, rng=generator(1))
    with torch.no_grad():
        q = agent.parts["critic"](
            {"observation": torch.from_numpy(repeated["observation"])}, torch.from_numpy(proposed.action)
        )
    score = (q.mean(0) + 2.0 * q.std(0, correction=0)).reshape(5, 8)
    for i in range(5):
        np.testing.assert_array_equal(taken.action[i], proposed.action[8 * i + int(score[i].argmax())])
    assert taken.log_prob.shape == (5, 1) and taken.trace["u"].shape == (5, 2)


def test_spot_weight_cools_and_is_saved():
    agent, _ = make({"id": "density", "hidden": [32]}, DETERMINISTIC)
    options = {"support_weight": 1.0, "final_support_weight": 0.2, "cooling_updates": 4}
    agent, objective = make({"id": "spot", **options, **SMALL}, agent)
    learner = Learner(agent, objective)
    seen = []
    for i in range(6):
        learner.update(batch_of(i), generator(i))
        seen.append(round(float(agent.state_dict()["parts.density.weight"]), 3))
    assert seen == [0.8, 0.6, 0.4, 0.2, 0.2, 0.2]
    assert float(agent.parts["critic"].scale) > 0


def test_a_density_prefers_the_actions_of_the_data():
    agent, objective = make({"id": "density", "hidden": [64, 64], "beta": 0.05}, DETERMINISTIC)
    learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-3))
    for i in range(300):
        batch = batch_of(i, size=128)
        batch.action = torch.where(torch.rand(128, 1, generator=generator(i)) < 0.5, 0.6, -0.6).expand(128, 2)
        learner.update(batch, generator(i))
    batch, density = batch_of(999, size=128), agent.parts["density"]

    def cost(value):
        with torch.no_grad():
            return float(
                density.negative_elbo(batch.observation, torch.full((128, 2), value), beta=0.05, rng=generator()).mean()
            )

    assert max(cost(0.6), cost(-0.6)) < min(cost(0.0), cost(1.0)) - 0.02


def test_advantage_weighted_imitation_copies_good_actions_only():
    agent, objective = make({"id": "iql", "inverse_temperature": 5.0, **SMALL})
    batch = batch_of()
    batch.notes["advantage_over_value"] = torch.where(torch.arange(len(batch)) < 5, 1.0, -10.0)
    loss, metrics = objective.policy_loss(agent, batch, generator())
    each = agent.policy.imitation_loss(batch.observation, batch.action)
    expected = float((each[:5].sum() * min(np.exp(5.0), 100.0) / len(batch)).detach())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("sacc", "did you mean 'sac'"),
        ({"id": "sac", "gama": 0.9}, "did you mean 'gamma'"),
        ({"id": "sac", "gamma": "high"}, "gamma"),
        ({"id": "sac", "target": "median"}, "target"),
        ({"id": "ppo", "credit": "gea"}, "did you mean 'gae'"),
    ],
)
def test_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        build_objective(spec)
