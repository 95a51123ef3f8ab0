"""PPO through the steps of chains against the code of DPPO and ReinFlow, and what both add to PPO's loop.

Transcribed from the authors' equations: per number of an action, per step, nothing shared with `losses`.
"""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Field, Trajectory
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.chunks import ChunkBox
from tests.lab.draws import generator

STATE, ACTION = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,))
HORIZON, EXECUTE, STEPS, ROWS = 3, 2, 5, 40
CHAIN = {"horizon": HORIZON, "execute": EXECUTE, "width": 16, "num_blocks": 1}
DIFFUSION = {"id": "diffusion", "denoising_steps": STEPS, "min_std": 0.2, **CHAIN}
FLOW = {"id": "flow", "num_steps": STEPS, "noise": "learned", "min_std": 0.1, "max_std": 0.4, **CHAIN}


def prepared(agent_spec, spec):
    """(agent, objective, batch of one annotated episode) after the policy has moved on from the one that acted."""
    agent = build_agent(agent_spec, STATE, ChunkBox(ACTION, horizon=HORIZON), generator())
    policy, rng = agent.policy, np.random.default_rng(0)
    objective = build_objective({"value_hidden": [8], **spec})
    objective.setup(agent)
    schema = Schema({"observation": Field((3,))}, Field((6,)), trace=policy.trace_fields, units=STEPS)
    buffer, shown = Buffer(schema, 200), rng.uniform(-1, 1, (ROWS + 1, 3)).astype(np.float32)
    taken = policy.act({"observation": shown[:-1]}, rng=generator(1))
    reward = rng.normal(size=ROWS).astype(np.float32)
    buffer.add_trajectory(
        Trajectory(
            {"observation": shown}, taken.action, reward, "terminated", log_prob=taken.log_prob, trace=taken.trace
        )
    )
    objective.annotate(agent, buffer, buffer.rows(), generator())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator(2)))
    return agent, objective, buffer.batch(buffer.rows()), buffer


def densities(policy, batch):
    """Log-density and entropy [B, K, D] of every number of every step."""
    chain, condition = batch.trace["chain"], policy.condition(batch.observation)
    parts = [policy.step(chain[:, k], condition, torch.tensor(k))[:2] for k in range(STEPS)]
    normals = [torch.distributions.Normal(mean, std.expand_as(mean)) for mean, std in parts]
    log_prob = torch.stack([n.log_prob(chain[:, k + 1]) for k, n in enumerate(normals)], 1)
    return log_prob, torch.stack([n.entropy() for n in normals], 1)


def same_gradients(policy, loss, expected):
    truth = torch.autograd.grad(expected, list(policy.parameters()), allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True, materialize_grads=True)
    assert max(float(g.abs().max()) for g in truth) > 1e-3
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_dppo_equals_the_authors_loss():
    """PPODiffusion.loss: means over numbers, denoising discount, clip range that grows exponentially over the steps."""
    agent, objective, batch, _ = prepared(DIFFUSION, {"id": "dppo", "unit_discount": 0.9, "scale_reward": False})
    c = objective.config
    assert (c.clip_first, c.clip_low, c.clip_high, c.target_kl, c.critic_warm_up) == (0.001, 0.01, 0.01, 1.0, 2)
    new = densities(agent.policy, batch)[0][..., : EXECUTE * 2].mean(-1)
    old, losses = batch.log_prob / (EXECUTE * 2), []
    advantage = batch.notes["advantage"]
    assert abs(float(advantage.mean())) < 1e-5 and float(advantage.std(correction=0)) == pytest.approx(1, abs=1e-4)
    for b in range(ROWS):
        for k in range(STEPS):
            a, t = float(advantage[b]) * 0.9 ** (STEPS - k - 1), k / (STEPS - 1)
            clip = 0.001 + (0.01 - 0.001) * (math.exp(3 * t) - 1) / (math.exp(3) - 1)
            ratio = (new[b, k] - old[b, k]).exp()
            losses.append(torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)))
    expected = torch.stack(losses).mean()
    loss, metrics = objective.policy_loss(agent, batch, generator())
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)
    assert 0.1 < float(metrics["policy/clipped"]) < 0.9
    same_gradients(agent.policy, loss, expected)
    value, _ = objective.value_loss(agent, batch, generator())
    error = agent.parts["value"](batch.observation) - batch.notes["value_target"]
    torch.testing.assert_close(value, 0.5 * error.square().mean())


def test_reinflow_equals_the_authors_loss():
    """PPOFlow.loss: one ratio of the chain, normalised by steps and numbers; the entropy rate is rewarded."""
    spec = {"id": "reinflow", "entropy_weight": 0.3, "scale_reward": False}
    agent, objective, batch, _ = prepared(FLOW, spec)
    each, entropy = (x[..., : EXECUTE * 2].sum(-1) for x in densities(agent.policy, batch))
    new, rate = each.sum(1) / STEPS / (EXECUTE * 2), entropy.sum(1) / STEPS / (EXECUTE * 2)
    ratio = (new - batch.log_prob.sum(1) / STEPS / (EXECUTE * 2)).exp()
    a = batch.notes["advantage"]
    surrogate = torch.maximum(-a * ratio, -a * ratio.clamp(0.99, 1.01)).mean()
    expected = surrogate - 0.3 * rate.mean()
    loss, _ = objective.policy_loss(agent, batch, generator())
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)
    same_gradients(agent.policy, loss, expected)


def test_learned_noise_has_a_network_of_its_own_and_is_what_is_drawn():
    policy = build_agent(FLOW, STATE, ChunkBox(ACTION, horizon=HORIZON), generator()).policy
    shown = np.random.default_rng(1).uniform(-1, 1, (4000, 3)).astype(np.float32)
    seen = {"observation": torch.from_numpy(shown)}
    with torch.no_grad():
        policy.width.last.weight.mul_(4)
        condition, x = policy.condition(seen), torch.randn(4000, 6, generator=generator(3))
        step = policy.step(x, condition, torch.tensor(2))
        feature = torch.cat([condition, policy.net.features(torch.full((4000,), 2 / STEPS))], -1)
        share = torch.sigmoid(policy.width(feature))
        torch.testing.assert_close(
            step.std, 0.1 * (0.4 / 0.1) ** share
        )  # from min_std to max_std, on a logarithmic scale
        assert float(step.std.std()) > 0.02
        drawn = (policy.walk(x, condition, steps=[2], rng=generator(4))[0][:, 1] - step.mean) / step.std
    assert abs(float(drawn.std()) - 1) < 0.02
    loss = policy.imitation_loss(seen, torch.zeros(4000, 6), rng=generator())
    touched = torch.autograd.grad(loss.sum(), list(policy.width.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in touched)  # imitation says nothing about noise


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_ppo_through_a_chain_changes_what_reads_the_image(eta, prediction):
    """A sampler without noise of its own (`eta: 0`) explores with `min_std`, and learns."""
    space = gym.spaces.Dict({"image/front": gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)})
    spec = {"id": "diffusion", "denoising_steps": 20, "ddim_steps": 4, "eta": eta, "prediction": prediction, **CHAIN}
    agent = build_agent(spec, space, ChunkBox(ACTION, horizon=HORIZON), generator())
    objective = build_objective({"id": "ppo", "value_hidden": [8], "num_epochs": 1})
    objective.setup(agent)
    seen = {"image/front": np.random.default_rng(0).integers(0, 256, (33, 16, 16, 3)).astype(np.uint8)}
    schema = Schema({"image/front": Field((16, 16, 3), "uint8")}, Field((6,)), trace=agent.policy.trace_fields, units=4)
    buffer = Buffer(schema, 100)
    taken = agent.policy.act({k: v[:-1] for k, v in seen.items()}, rng=generator(1))
    reward = np.random.default_rng(0).normal(size=32).astype(np.float32)
    buffer.add_trajectory(
        Trajectory(seen, taken.action, reward, "terminated", log_prob=taken.log_prob, trace=taken.trace, version=1)
    )
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    learner = Learner(agent, objective, LearnerConfig())
    learner.read(buffer, buffer.rows(), objective.reading, sampler=np.random.default_rng(0), rng=generator())
    changed = {name for name, p in agent.policy.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("encoder.images") for name in changed) and any(n.startswith("net.last") for n in changed)


# --- around the loss -------------------------------------------------------------------------------------------------


def small(spec):
    agent = build_agent({"id": "gaussian", "hidden": [8]}, STATE, ACTION, generator())
    objective = build_objective({"id": "ppo", "value_hidden": [8], "batch_size": 16, "num_epochs": 1, **spec})
    objective.setup(agent)
    schema = Schema({"observation": Field((3,))}, Field((2,)), trace=agent.policy.trace_fields, units=1)
    return agent, objective, Buffer(schema, 500), Learner(agent, objective, LearnerConfig())


def write(agent, buffer, count, reward, *, version, over=()):
    """`count` decisions in each of two streams, whose episodes go on from call to call unless they are over."""
    rng, rows = np.random.default_rng(count), []
    for t in range(count):
        seen = {"observation": rng.uniform(-1, 1, (2, 3)).astype(np.float32)}
        taken = agent.policy.act(seen, rng=generator(t))
        end = np.array([(t, s) in over for s in range(2)])
        no = np.zeros(2, bool)
        rows.append(buffer.add(np.arange(2), seen, taken, reward[t], end, no, version=version))
        if end.any():
            buffer.close(np.flatnonzero(end), {"observation": seen["observation"][end]})
    return np.concatenate(rows)


def test_rewards_are_scaled_by_the_running_deviation_of_the_discounted_return():
    """Engstrom et al. 2020, item 2; an episode that goes on in the next iteration takes its sum along."""
    agent, objective, buffer, _ = small({"scale_reward": True, "gamma": 0.9, "normalize_advantage": False})
    with torch.no_grad():
        for p in agent.parts["value"].parameters():
            p.zero_()
    reward = 1 + 5 * np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    first = write(agent, buffer, 20, reward[:20], version=0, over={(7, 0)})
    objective.annotate(agent, buffer, first, generator())
    unread = first[np.isnan(buffer.note("live", first))]  # nothing followed them yet
    second = np.concatenate([unread, write(agent, buffer, 20, reward[20:], version=0)])
    noted = objective.annotate(agent, buffer, second, generator())
    running, sums = np.zeros(2), []
    for t in range(39):  # nothing follows the newest decisions yet: they are not read
        running = reward[t] + 0.9 * np.where((t == 8) & (np.arange(2) == 0), 0.0, running)
        sums += running.tolist()
    assert noted["data/return_scale"] == pytest.approx(np.std(sums), rel=1e-5)
    read = np.intersect1d(second, buffer.rows())
    scaled = buffer.note("advantage", read)
    plain = build_objective({"id": "ppo", "value_hidden": [8], "gamma": 0.9, "normalize_advantage": False})
    plain.setup(agent)
    plain.annotate(agent, buffer, read, generator())
    np.testing.assert_allclose(scaled * np.std(sums), buffer.note("advantage", read), rtol=1e-4, atol=1e-4)


def test_only_the_value_learns_while_it_warms_up_and_a_resumed_learner_knows_how_long():
    agent, objective, buffer, learner = small({"critic_warm_up": 2})
    reward = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)

    def weights(part):
        return torch.cat([p.detach().flatten() for p in agent.module(part).parameters()])

    for iteration in range(4):
        before, version = {part: weights(part) for part in ("policy", "value")}, learner.version
        rows = write(agent, buffer, 20, reward, version=version)
        read = []
        update = learner.update
        learner.update = lambda batch, rng, update=update, read=read, **more: (
            read.append(batch.rows) or update(batch, rng, **more)
        )
        learner.read(buffer, rows, objective.reading, sampler=np.random.default_rng(0), rng=generator())
        learner.update = update
        assert torch.equal(weights("policy"), before["policy"]) is (iteration < 2)
        assert not torch.equal(weights("value"), before["value"])
        assert set(np.concatenate(read)) <= set(rows) and learner.version > version  # each experience is read once
        state, learner = learner.state_dict(), Learner(agent, objective, LearnerConfig())
        learner.load_state_dict(state)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"id": "grpo", "critic_warm_up": 1}, "has no value"),
        ({"id": "ppo", "ratio": "decision"}, "set normalizer to 'decisions'"),
        ({"id": "gspo", "normalizer": "units"}, "set normalizer to 'episodes'"),
        ({"id": "ppo", "normalizer": "episodes"}, "set whole_groups to true"),
        ({"id": "grpo", "min_groups": 3}, "drop_even_groups"),
        ({"id": "dppo", "clip_low": None}, "clip_first"),
        ({"id": "ppo", "target_kl": 0.0}, "greater than 0"),
    ],
)
def test_options_without_effect_or_sense_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build_objective(spec)


def test_equal_decisions_teach_exactly_nothing():
    agent, objective, buffer, _ = small({"gamma": 0.0})
    with torch.no_grad():
        for p in agent.parts["value"].parameters():
            p.zero_()
    write(agent, buffer, 20, np.full((20, 2), 0.1, np.float32), version=0)
    objective.annotate(agent, buffer, buffer.rows(), generator())
    assert (buffer.note("advantage", buffer.rows()) == 0).all()
