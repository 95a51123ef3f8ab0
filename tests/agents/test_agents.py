"""Gaussian and residual policies: act and log_prob agree, bounds hold, the base is never touched, errors help."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.learning.agent import build_agent, wrap_policy
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.networks.fused import GaussianLogProb
from embodied_rft.networks.mlp import EnsembleMLP
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.objectives import build_objective
from embodied_rft.policy import build_policy
from embodied_rft.pools.chunks import ChunkBox
from tests.lab.draws import generator
from tests.lab.point import random_batch

STATE = gym.spaces.Box(-np.inf, np.inf, (6,))
ACTION = gym.spaces.Box(-1, 1, (3,))
WIDE = gym.spaces.Box(np.array([-2.0, 0.0, -0.5], np.float32), np.array([2.0, 1.0, 3.0], np.float32))
PIXELS = gym.spaces.Dict(
    {
        "state": gym.spaces.Box(-1, 1, (5,)),
        "goal": gym.spaces.Box(-1, 1, (2,), np.float64),
        "image/front": gym.spaces.Box(0, 255, (20, 16, 3), np.uint8),
        "instruction": gym.spaces.Text(10),
    }
)
SMALL = {"hidden": [32, 32]}
SPECS = {
    "gaussian": {"id": "gaussian", **SMALL},
    "free std": {"id": "gaussian", "std": "free", "init": "orthogonal", "activation": "tanh", **SMALL},
    "deterministic": {"id": "gaussian", "deterministic": True, **SMALL},
    "residual": {"id": "residual", "base": {"id": "gaussian", **SMALL}, **SMALL},
    "deterministic residual": {
        "id": "residual",
        "base": {"id": "gaussian", "deterministic": True, **SMALL},
        "deterministic": True,
        **SMALL,
    },
}
READS = {"keys": ["state", "goal", "image/front"]}  # of PIXELS: all but the text
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def observations(space, count, seed=0):
    tree = random_batch(space, ACTION, size=count, seed=seed).observation
    return {key: value.numpy() for key, value in tree.items()}


def trace_tensors(decisions):
    return {key: torch.from_numpy(value) for key, value in decisions.trace.items()}


@each_spec
@pytest.mark.parametrize("observation_space", [STATE, PIXELS], ids=["state", "pixels"])
@pytest.mark.parametrize("action_space", [ACTION, WIDE], ids=["unit", "wide"])
def test_act_and_log_prob_agree(spec, observation_space, action_space):
    if observation_space is PIXELS:
        spec = {**spec, **READS} | ({"base": {**spec["base"], **READS}} if "base" in spec else {})
    policy = build_policy(spec, observation_space, action_space, generator())
    observation = observations(observation_space, 50)
    for greedy in (False, True):
        taken = policy.act(observation, greedy=greedy, rng=generator(1))
        assert taken.action.shape == (50, 3) and taken.action.dtype == np.float32
        assert (taken.action >= action_space.low).all() and (taken.action <= action_space.high).all()
        assert {k: v.shape[1:] for k, v in taken.trace.items()} == {k: f.shape for k, f in policy.trace_fields.items()}
        again, entropy = policy.log_prob(as_tensors(observation), torch.from_numpy(taken.action), trace_tensors(taken))
        assert again.shape == entropy.shape == (50, 1)
        np.testing.assert_allclose(again.detach().numpy(), taken.log_prob, atol=1e-5)


@each_spec
def test_decisions_do_not_depend_on_the_batch_they_are_in(spec):
    policy = build_policy(spec, STATE, ACTION, generator())
    observation = observations(STATE, 8)
    whole = policy.act(observation, greedy=True).action
    single = np.concatenate(
        [policy.act({k: v[i : i + 1] for k, v in observation.items()}, greedy=True).action for i in range(8)]
    )
    np.testing.assert_allclose(whole, single, atol=1e-6)


@each_spec
def test_the_same_generator_gives_the_same_bits_and_the_global_one_is_not_used(spec):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    taken = []
    for _ in range(2):
        policy = build_policy(spec, STATE, ACTION, generator())
        taken.append(policy.act(observations(STATE, 5), rng=generator(3)).action)
    np.testing.assert_array_equal(*taken)
    assert torch.equal(before, torch.get_rng_state())


@each_spec
def test_the_greedy_action_is_the_mode(spec):
    policy = build_policy(spec, STATE, WIDE, generator())
    observation = observations(STATE, 5)
    mode = policy.mode(as_tensors(observation))
    np.testing.assert_allclose(policy.act(observation, greedy=True).action, mode.detach().numpy(), atol=1e-6)


def test_log_prob_is_the_density_of_the_action():
    """Integrated over the action interval, the density is 1: the Jacobian of tanh is right."""
    space = gym.spaces.Box(-1, 1, (1,))
    policy = build_policy({"id": "gaussian", "hidden": [8], "initial_log_std": -0.5}, STATE, space, generator())
    action = torch.linspace(-0.99999, 0.99999, 200_001)[:, None]
    observation = {"observation": torch.zeros(len(action), 6)}
    log_prob, _ = policy.log_prob(observation, action, {})
    assert float(torch.trapezoid(log_prob[:, 0].detach().double().exp(), action[:, 0].double())) == pytest.approx(
        1, abs=2e-3
    )


@given(st.floats(-30, 30))
@settings(deadline=None)
def test_log_jacobian_is_finite_everywhere(u):
    given = torch.full((1, 1), u, dtype=torch.float64), torch.zeros(1, 1).double(), torch.zeros(1).double()
    plain, squashed = (GaussianLogProb.apply(*given, squash)[0] for squash in (False, True))
    value = float(plain - squashed)
    assert np.isfinite(value)
    if abs(u) < 8:
        assert value == pytest.approx(np.log1p(-(np.tanh(u) ** 2)), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_residual_starts_at_its_base_and_stays_within_its_bound(deterministic):
    spec = {"id": "residual", "base": SPECS["gaussian"], "scale": 0.25, "deterministic": deterministic, **SMALL}
    policy = build_policy(spec, STATE, ACTION, generator())
    observation = observations(STATE, 200)
    base = policy.base.mode(as_tensors(observation)).detach().numpy()
    start = policy.act(observation, greedy=True)
    np.testing.assert_allclose(start.action, base, atol=0.02)
    np.testing.assert_allclose(start.trace["base_action"], base, atol=1e-6)
    with torch.no_grad():
        policy.head.net.last.weight.mul_(1e4)  # as large a correction as the network can ask for
    moved = policy.act(observation, rng=generator()).action
    assert 0.2 < np.abs(moved - base).max() <= 0.25 + 1e-6


def test_training_a_residual_leaves_its_base_as_it_was():
    agent = build_agent(SPECS["gaussian"], STATE, ACTION, generator())
    agent.policy = wrap_policy("residual", agent, generator(1), hidden=[32, 32])
    base = {k: v.clone() for k, v in agent.policy.base.state_dict().items()}
    head = agent.policy.head.net.last.weight.clone()
    objective = build_objective({"id": "sac", "critic_hidden": [32, 32]})
    objective.setup(agent)
    learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-2))
    for i in range(5):
        learner.update(random_batch(STATE, ACTION, seed=i), generator(i))
    agent.train()
    assert not agent.policy.base.training and not any(p.requires_grad for p in agent.policy.base.parameters())
    assert all(torch.equal(v, base[k]) for k, v in agent.policy.base.state_dict().items())
    assert not torch.equal(head, agent.policy.head.net.last.weight)


@pytest.mark.parametrize("spec", [SPECS["gaussian"], SPECS["residual"] | {"scale": 0.3}], ids=["gaussian", "residual"])
@pytest.mark.parametrize("known", [{}, {"u": torch.full((60, 3), torch.nan)}], ids=["no trace", "unknown"])
def test_what_led_to_somebody_elses_action_is_read_off_it(spec, known):
    policy = build_policy(spec, STATE, WIDE, generator())
    observation = observations(STATE, 60)
    taken = policy.act(observation, rng=generator(1))
    again, _ = policy.log_prob(as_tensors(observation), torch.from_numpy(taken.action), known)
    near = np.abs(taken.trace["u"]).max(1) < 2  # further out tanh forgets
    assert near.sum() > 20
    np.testing.assert_allclose(again.detach().numpy()[near], taken.log_prob[near], atol=2e-3)


def test_a_corrected_action_stays_inside_where_the_base_is_at_its_bounds():
    base = {**SPECS["deterministic"], "last_gain": 30.0}
    policy = build_policy({"id": "residual", "base": base, **SMALL}, STATE, ACTION, generator())
    taken = policy.act(observations(STATE, 60), rng=generator(1))
    assert (np.abs(taken.trace["base_action"]) > 0.9).any() and np.abs(taken.action).max() == 1


@pytest.mark.parametrize(
    "spec", [SPECS["deterministic"], *(SPECS["deterministic residual"] | {"scale": s} for s in (0.4, 1.5))], ids=str
)
def test_exploration_noise_is_in_units_of_the_action(spec):
    policy = build_policy(spec | {"exploration_noise": 0.06}, STATE, WIDE, generator())
    observation = {"observation": np.zeros((4000, 6), np.float32)}
    apart = policy.act(observation, rng=generator(1)).action - policy.act(observation, greedy=True).action
    np.testing.assert_allclose((apart / (WIDE.high - WIDE.low) * 2).std(0), 0.06, rtol=0.1)


def test_wrap_policy_keeps_what_the_base_has_learnt():
    agent = build_agent({"id": "gaussian", "normalize": True, **SMALL}, STATE, ACTION, generator())
    agent.policy.encoder.fit({"observation": 5 + 3 * torch.randn(100, 6, generator=generator())})
    observation = observations(STATE, 4)
    expected = agent.policy.act(observation, greedy=True).action
    wrapped = wrap_policy("residual", agent, generator(1), hidden=[16])
    np.testing.assert_array_equal(wrapped.act(observation, greedy=True).trace["base_action"], expected)
    with pytest.raises(ValueError, match=r"takes no base \(residual does\)"):
        wrap_policy("gaussian", agent, generator())


def test_normalisation_is_taken_once_saved_and_handed_to_new_parts():
    agent = build_agent({"id": "gaussian", "normalize": True, **SMALL}, STATE, ACTION, generator())
    build_objective("iql").setup(agent)
    data = {"observation": 5 + 3 * torch.randn(1000, 6, generator=generator())}
    assert len(agent.normalizers()) == 4  # policy, critic, target critic, value
    for encoder in agent.normalizers():
        encoder.fit(data)
    features = agent.policy.encoder(data)
    torch.testing.assert_close(features.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(6), atol=1e-2, rtol=0)
    agent.policy.encoder.fit({"observation": torch.zeros(10, 6)})
    assert torch.equal(agent.policy.encoder(data), features)
    assert torch.equal(agent.encoder()(data), features) and not agent.normalizers()
    other = build_agent({"id": "gaussian", "normalize": True, **SMALL}, STATE, ACTION, generator(5))
    other.policy.load_state_dict(agent.policy.state_dict())
    assert torch.equal(other.policy.encoder(data), features)


def test_agent_is_rebuilt_as_it_was_made():
    agent = build_agent(SPECS["gaussian"], STATE, ACTION, generator())
    twin = build_agent(agent.policy.spec, STATE, ACTION, generator(7))
    for each in (agent, twin):
        for name in ("cql", "iql", "density"):
            build_objective(name).setup(each)
    twin.load_state_dict(agent.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(agent.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_stacked_ensemble_equals_its_members_one_by_one(layer_norm):
    net = EnsembleMLP(5, (16, 8), num_members=4, rng=generator(), layer_norm=layer_norm)
    x = torch.randn(7, 5, generator=generator(1))
    together = net(x)
    for e in range(4):
        h = x
        for i in range(2):
            h = h @ net.weights[i][e] + net.biases[i][e]
            if layer_norm:
                h = torch.nn.functional.layer_norm(h, h.shape[-1:]) * net.norms[i][0, e] + net.norms[i][1, e]
            h = h.relu()
        torch.testing.assert_close(together[e], h @ net.last[e, 0] + net.last_bias[e])
    chosen = torch.tensor([3, 1])
    torch.testing.assert_close(net(x, chosen), together[chosen])
    assert not torch.equal(net.weights[0][0], net.weights[0][1])


@pytest.mark.parametrize(
    "spec, action_space, message",
    [
        ({"id": "gausian"}, ACTION, "did you mean 'gaussian'"),
        ({"id": "gaussian", "hiden": [3]}, ACTION, "did you mean 'hidden'"),
        ({"id": "gaussian", "hidden": "big"}, ACTION, "hidden"),
        ({"hidden": [3]}, ACTION, "has no id"),
        ({"id": "gaussian", "keys": ["observations"]}, ACTION, "did you mean 'observation'"),
        ({"id": "gaussian", "deterministic": True, "exploration_noise": 0.0}, ACTION, "positive"),
        ({"id": "gaussian"}, gym.spaces.Discrete(3), "bounded Box"),
        ({"id": "gaussian"}, gym.spaces.Box(-np.inf, np.inf, (3,)), "bounded Box"),
        ({"id": "residual", "base": {"id": "gaussian"}, "scale": 0.0}, ACTION, "scale 0.0"),
        ({"id": "residual", "base": {"id": "gaussian", "hiden": [3]}}, ACTION, "did you mean 'hidden'"),
    ],
)
def test_errors_say_what_is_wrong_and_what_is_near(spec, action_space, message):
    with pytest.raises(ValueError, match=message):
        build_agent(spec, STATE, action_space, generator())


EMPTY = gym.spaces.Dict({"state": gym.spaces.Box(-1, 1, (5,)), "prompt": gym.spaces.Text(9)})
SEEN = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), "prompt": gym.spaces.Text(9)})
NOBODY = {
    "gaussian": (SPECS["gaussian"], STATE, ACTION),
    "residual": (SPECS["residual"], STATE, ACTION),
    "flow": ({"id": "flow", "horizon": 2}, STATE, ChunkBox(ACTION, horizon=2)),
    "language": (
        {"id": "language", "model": {"tiny": {}}, "prompt": "plain", "key": "prompt"},
        EMPTY,
        gym.spaces.Text(9),
    ),
    "language sees": (
        {"id": "language", "model": {"tiny_vlm": {}}, "prompt": "plain"},
        SEEN,
        gym.spaces.Text(9),
    ),
    "vla tokens": ({"id": "vla", "model": {"tiny": {}}, "instruction": "push"}, SEEN, ACTION),
    "vla flow": ({"id": "vla", "model": {"tiny": {}}, "instruction": "push", "head": "flow"}, SEEN, ACTION),
}


@pytest.mark.parametrize("spec, seen, action", NOBODY.values(), ids=NOBODY)
def test_nobody_asks_and_nothing_is_decided(spec, seen, action):
    policy = build_policy(spec, seen, action, generator())
    leaves = seen.spaces if isinstance(seen, gym.spaces.Dict) else {"observation": seen}
    nothing = {
        k: [] if isinstance(box, gym.spaces.Text) else np.zeros((0, *box.shape), box.dtype) for k, box in leaves.items()
    }
    taken = policy.act(nothing, rng=generator())
    assert len(taken.action) == len(taken.log_prob) == 0
    assert {name: len(value) for name, value in taken.trace.items()} == dict.fromkeys(policy.trace_fields, 0)
    for name, field in policy.trace_fields.items():
        assert field.kind == "ragged" or taken.trace[name].shape[1:] == field.shape


def test_random_decisions_without_a_generator_are_refused():
    policy = build_policy(SPECS["gaussian"], STATE, ACTION, generator())
    with pytest.raises(ValueError, match="pass one, or greedy=True"):
        policy.act(observations(STATE, 2))


def test_a_gaussian_takes_chunks_and_plans_them():
    chunks = ChunkBox(WIDE, horizon=4)
    spec = {"id": "gaussian", "horizon": 4, "execute": 2, **SMALL}
    policy = build_policy(spec, STATE, chunks, generator())
    taken = policy.act(observations(STATE, 5), rng=generator(1))
    assert taken.action.shape == (5, 12) and chunks.contains(taken.action[0])
    queued = build_policy({"id": "queued", "base": spec}, STATE, WIDE, generator())
    queued.load_base(policy)
    plan = queued.plan(observations(STATE, 5), rng=generator())
    assert plan.shape == (5, 2, 3)
    assert np.array_equal(plan.reshape(5, -1), policy.act(observations(STATE, 5), greedy=True).action[:, :6])
    with pytest.raises(ValueError, match="chunks of 3 steps; the policy gives 4"):
        build_policy(spec, STATE, ChunkBox(WIDE, horizon=3), generator())
    with pytest.raises(ValueError, match="1 <= execute <= horizon"):
        build_policy(spec | {"execute": 5}, STATE, chunks, generator())
