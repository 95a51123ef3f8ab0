"""Objectives: what each adds to the shared losses, against references; what they keep, and what they refuse."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Source, Trajectory
from embodied_rft.experience.collect import Collector
from embodied_rft.learning import losses
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.common import preset
from embodied_rft.objectives.conservative import propose
from embodied_rft.objectives.soft_actor_critic import SAC, SACConfig
from tests.lab.draws import generator
from tests.lab.point import PointReach, random_batch

STATE = gym.spaces.Box(-np.inf, np.inf, (6,))
ACTION = gym.spaces.Box(-1, 1, (2,))
SMALL = {"critic_hidden": [32, 32]}
GAUSSIAN = {"id": "gaussian", "hidden": [32, 32]}
DETERMINISTIC = GAUSSIAN | {"deterministic": True}


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


@pytest.mark.parametrize("objective", ["td3", "spot"])
def test_deterministic_objectives_refuse_stochastic_policies(objective):
    with pytest.raises(ValueError, match="set deterministic: true"):
        make(objective)


@pytest.mark.parametrize("objective", ["sac", "rlpd", "wsrl", "e2o"])
def test_objectives_of_entropy_refuse_policies_without_one(objective):
    with pytest.raises(ValueError, match="use td3"):
        make(objective, DETERMINISTIC)


@pytest.mark.parametrize("option", [{"initial_temperature": 0.1}, {"backup_entropy": True}, {"target_entropy": 0.0}])
@pytest.mark.parametrize("objective", ["td3", "cql"])
def test_options_of_entropy_are_refused_where_there_is_none(objective, option):
    if objective == "td3" and "backup_entropy" in option:
        option = {"backup_entropy": False}
    with pytest.raises(ValueError, match="has no effect on a policy without entropy"):
        make({"id": objective, **SMALL, **option}, DETERMINISTIC)


def test_smoothing_is_refused_where_nothing_is_smoothed():
    with pytest.raises(ValueError, match="target_noise 0.2 has no effect in 'sac', see td3"):
        make({"id": "sac", "target_noise": 0.2, **SMALL})


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


def test_presets_change_defaults_and_keep_every_option_of_their_base():
    config = build_objective({"id": "rlpd", "num_critics": 3}).config
    assert (config.num_critics, config.offline_share, config.target) == (3, 0.5, "random_subset")
    assert isinstance(config, SACConfig) and config.tau == SACConfig().tau
    with pytest.raises(ValueError, match="did you mean 'num_critics'"):
        preset("wrong", num_critic=3)(type("Wrong", (SAC,), {}))
    with pytest.raises(ValueError, match="batch_size 0"):
        build_objective({"id": "rlpd", "batch_size": 0})


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
    for i in range(40):
        learner.update(batch, generator(i), only=["critic"])
    assert gap() < before - 1.0


@pytest.mark.parametrize("floor", [None, 0.1])
def test_the_conservative_penalty_equals_a_loop_over_sampled_actions(floor):
    """All sampled actions go through the critic in one pass; one by one they give the same loss and gradient."""
    agent, objective = make({"id": "cql" if floor is None else "cal_ql", "num_sampled_actions": 3, **SMALL})
    batch, critic = batch_of(), agent.parts["critic"]
    batch.notes["mc_return"] = torch.full((len(batch),), floor or 0.0)
    q = critic(batch.observation, batch.action)
    at_once = objective.critic_penalty(agent, batch, q, generator(4))
    action, density = propose(agent, batch, 3, generator(4))
    total = torch.zeros(())
    for member in range(2):
        for row in range(len(batch)):
            values = []
            for k in range(9):
                one = critic({"observation": batch.observation["observation"][row : row + 1]}, action[k, row : row + 1])
                value = one[member, 0]
                values.append((value if floor is None or k < 3 else value.clamp_min(floor)) - density[k, row])
            total = total + torch.stack(values).exp().mean().log() - q[member, row]
    expected = 5.0 * total / len(batch)
    torch.testing.assert_close(at_once, expected, rtol=1e-5, atol=1e-4)
    ours, theirs = (torch.autograd.grad(x, critic.net.weights[0], retain_graph=True)[0] for x in (at_once, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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


# --- through the real buffer -------------------------------------------------------------------------------------


def experience(agent, *, episodes=24, group_size=4, seed=0, reward="sparse"):
    """A buffer of whole episodes of the agent."""
    policy = agent.policy
    pool = PointReach(8, reward=reward)
    schema = Schema(observation=dict(pool.fields), action=pool.action_field, trace=dict(policy.trace_fields), units=1)
    buffer = Buffer(schema, 2000)
    rng = generator(seed)
    collector = Collector(pool, run_seed=seed, group_size=group_size)
    version = int(agent.version)
    collector.collect(lambda o: policy.act(o, rng=rng), episodes=episodes, version=version).write(buffer)
    return buffer


def point_agent(spec):
    pool = PointReach()
    return build_agent(spec, pool.observation_space, pool.action_space, generator())


RESIDUAL = {"id": "residual", "base": GAUSSIAN, "hidden": [32, 32]}


@pytest.mark.parametrize("spec", [GAUSSIAN, DETERMINISTIC, RESIDUAL], ids=["gaussian", "deterministic", "residual"])
def test_log_prob_of_what_the_buffer_gives_back_is_what_acted(spec):
    agent = point_agent(spec)
    buffer = experience(agent)
    batch = buffer.batch(buffer.rows())
    with torch.no_grad():
        again, _ = agent.policy.log_prob(batch.observation, batch.action, batch.trace)
    torch.testing.assert_close(again, batch.log_prob, atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_the_first_epoch_starts_with_ratio_one(objective):
    agent = point_agent(GAUSSIAN)
    buffer = experience(agent)
    objective = build_objective({"id": objective, "num_epochs": 1, "batch_size": 64})
    objective.setup(agent)
    objective.annotate(agent, buffer, buffer.rows(), generator())
    batch = next(objective.reading.batches(buffer, np.random.default_rng(0), 1))
    loss, metrics = objective.policy_loss(agent, batch, generator())
    assert abs(float(metrics["policy/kl"])) < 1e-6
    expected = -float(batch.notes["advantage"].sum()) / batch.num_units
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)


def test_gae_notes_equal_a_loop_over_trajectories():
    agent = point_agent(GAUSSIAN)
    buffer = experience(agent)
    objective = build_objective({"id": "ppo", "normalize_advantage": False, "gamma": 0.9, "trace_decay": 0.8})
    objective.setup(agent)
    objective.annotate(agent, buffer, buffer.rows(), generator())
    for rows, trajectory in zip(buffer.segments(buffer.rows()), buffer.trajectories(), strict=True):
        with torch.no_grad():
            value = agent.parts["value"]({k: torch.from_numpy(v) for k, v in trajectory.observation.items()}).tolist()
        advantage, following = [0.0] * len(trajectory), 0.0
        for t in reversed(range(len(trajectory))):
            over = t == len(trajectory) - 1 and trajectory.end == "terminated"
            discount = 0.0 if over else 0.9
            delta = float(trajectory.reward[t]) + discount * value[t + 1] - value[t]
            following = advantage[t] = delta + discount * 0.8 * following
        notes = buffer.batch(rows).notes
        np.testing.assert_allclose(notes["advantage"].numpy(), advantage, atol=1e-5)
        np.testing.assert_allclose(notes["value_target"].numpy(), np.add(advantage, value[:-1]), atol=1e-5)


def test_group_notes_sum_to_zero_over_the_episodes_of_a_group():
    agent = point_agent(GAUSSIAN)
    buffer = experience(agent, reward="dense")
    objective = build_objective({"id": "grpo", "credit": "dr_grpo"})
    objective.setup(agent)
    objective.annotate(agent, buffer, buffer.rows(), generator())
    first = np.array([rows[0] for rows in buffer.segments(buffer.rows())])
    batch = buffer.batch(first)
    for group in set(batch.columns["group"]):
        advantage = batch.notes["advantage"][torch.from_numpy(batch.columns["group"] == group)]
        assert len(advantage) == 4 and abs(float(advantage.sum())) < 1e-4 and float(advantage.abs().max()) > 0


FAILED, RECEIVED = "failed", "received"


@pytest.mark.parametrize(
    "reward, end, rule",
    [
        ([-1.0] * 6, "truncated", FAILED),
        ([-1.0] * 6, "terminated", RECEIVED),
        ([-1.0, -1.0, 0.0, 0.0], "truncated", RECEIVED),
        ([-1.0, -1.0, 0.0, -1.0], "truncated", RECEIVED),
        ([0.0] * 9 + [10.0], "truncated", RECEIVED),
        ([1.0] * 5, "truncated", RECEIVED),
        ([0.5, -0.5], "terminated", RECEIVED),
        ([-1.0] * 6, "cut", None),
        ([0.0, 1.0, 0.0], "cut", None),
    ],
)
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_noted_returns_follow_the_rule_of_cal_ql(reward, end, rule, gamma):
    """What was received; of failures that the clock stopped, for ever; nothing where more was to come."""
    agent = point_agent(GAUSSIAN)
    fields = dict(PointReach(1).fields)
    buffer = Buffer(Schema(fields, PointReach(1).action_field, dict(agent.policy.trace_fields), units=1), 100)
    count = len(reward)
    observation = {k: np.zeros((count + 1, *f.shape), f.dtype) for k, f in fields.items()}
    action = np.zeros((count, *PointReach(1).action_field.shape), np.float32)
    other = Trajectory(observation, action, np.full(count, 0.25, np.float32), "terminated", source=Source.OFFLINE)
    buffer.add_trajectory(other, retrace=agent.policy.retrace)
    one = Trajectory(observation, action, np.array(reward, np.float32), end, source=Source.OFFLINE)
    rows = buffer.add_trajectory(one, retrace=agent.policy.retrace)
    objective = build_objective({"id": "cal_ql", "gamma": gamma, **SMALL})
    objective.setup(agent)
    noted = objective.annotate(agent, buffer, buffer.rows(), generator())
    if rule == RECEIVED:
        expected = [sum(gamma**i * r for i, r in enumerate(reward[t:])) for t in range(count)]
    else:
        expected = [-1 / (1 - gamma) if rule == FAILED and gamma < 1 else np.nan] * count
    np.testing.assert_allclose(buffer.note("mc_return", rows), expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(noted["data/mc_return"])


@pytest.mark.parametrize("objective", ["sac", "cal_ql", "ppo"])
def test_learn_repeats_to_the_bit(objective):
    results = []
    for _ in range(2):
        agent = point_agent(GAUSSIAN)
        made = build_objective({"id": objective, "batch_size": 32})
        made.setup(agent)
        learner = Learner(agent, made)
        updates = None if objective == "ppo" else 5
        metrics = learner.learn(experience(agent), np.random.default_rng(1), num_updates=updates)
        results.append((metrics, agent.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(v, results[1][1][k]) for k, v in results[0][1].items())
