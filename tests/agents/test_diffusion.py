"""Diffusion, flow, consistency and last_steps: chains score as they were drawn; statistics belong to their robot."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.agents.diffusion import cosine_schedule
from embodied_rft.agents.parts.normalisation import Statistics
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Field, Trajectory
from embodied_rft.learning.agent import build_agent, wrap_policy
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.policy import build_policy
from embodied_rft.pools.chunks import ChunkBox
from embodied_rft.testing.check_policy import check_policy
from tests.lab.draws import generator

STATE = gym.spaces.Box(-1, 1, (3,))
UNIT = gym.spaces.Box(-1, 1, (2,))
WIDE = gym.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
FREE = gym.spaces.Box(-np.inf, np.inf, (2,))
SMALL = {"width": 32, "num_blocks": 1, "horizon": 4}
CHAINS = {
    "ddpm": {"id": "diffusion", "denoising_steps": 6, **SMALL},
    "ddim": {"id": "diffusion", "denoising_steps": 20, "ddim_steps": 4, "eta": 0.5, "prediction": "x0", **SMALL},
    "flow": {"id": "flow", "num_steps": 5, **SMALL},
    "learned flow": {"id": "flow", "num_steps": 5, "noise": "learned", **SMALL},
    "consistency": {"id": "consistency", "num_steps": 2, **SMALL},
}
SPECS = {**CHAINS, "last steps": {"id": "last_steps", "base": CHAINS["ddpm"], "num_steps": 2}}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_chain = pytest.mark.parametrize("spec", CHAINS.values(), ids=CHAINS)


def build(spec, *, action_space=UNIT, seed=0):
    return build_policy(spec, STATE, ChunkBox(action_space, horizon=4), generator(seed))


def observations(count, seed=0):
    return {"observation": np.random.default_rng(seed).uniform(-1, 1, (count, 3)).astype(np.float32)}


def tensors(decisions):
    return torch.from_numpy(decisions.action), {k: torch.from_numpy(v) for k, v in decisions.trace.items()}


def score(policy, observation, decisions):
    return policy.log_prob(as_tensors(observation), *tensors(decisions))


# --- chains ------------------------------------------------------------------------------------------------------


@each_spec
@pytest.mark.parametrize("action_space", [UNIT, WIDE], ids=["unit", "wide"])
def test_act_and_log_prob_agree(spec, action_space):
    policy = build(spec, action_space=action_space)
    observation = observations(40)
    for greedy in (False, True):
        taken = policy.act(observation, greedy=greedy, rng=generator(1))
        assert taken.action.shape == (40, 8) and taken.log_prob.shape == (40, policy.num_units)
        box = ChunkBox(action_space, horizon=4)
        assert (taken.action >= box.low - 1e-6).all() and (taken.action <= box.high + 1e-6).all()
        assert taken.trace["chain"].shape[1:] == policy.trace_fields["chain"].shape
        again, entropy = score(policy, observation, taken)
        assert again.shape == entropy.shape == (40, policy.num_units)
        np.testing.assert_allclose(again.detach().numpy(), taken.log_prob, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "consistency"])
def test_predicted_chunks_stay_in_the_range_of_the_data(name):
    policy = build(CHAINS[name])
    with torch.no_grad():
        policy.net.last.weight.mul_(100)
    chain = policy.act(observations(40), greedy=True, rng=generator(1)).trace["chain"]
    assert np.abs(chain[:, -1]).max() <= 1 + 1e-6 and (np.abs(chain[:, -1]) > 0.99).mean() > 0.5


@each_spec
def test_ratios_of_the_first_epoch_are_one(spec):
    policy, observation = build(spec), observations(40)
    taken = policy.act(observation, rng=generator(1))
    ratio = (score(policy, observation, taken)[0] - torch.from_numpy(taken.log_prob)).exp()
    np.testing.assert_allclose(ratio.detach().numpy(), 1, atol=2e-5)


@each_spec
def test_policy_contract(spec):
    check_policy(build(spec), STATE, ChunkBox(UNIT, horizon=4))


@each_chain
def test_policy_contract_with_images(spec):
    image = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
    space = gym.spaces.Dict({"state": STATE, "image/front": image})
    policy = build_policy({**spec, "num_image_features": 8}, space, ChunkBox(WIDE, horizon=4), generator())
    check_policy(policy, space, ChunkBox(WIDE, horizon=4))


@each_chain
def test_a_space_of_single_steps_gives_the_same_policy(spec):
    single, chunked = build_policy(spec, STATE, WIDE, generator()), build(spec, action_space=WIDE)
    assert np.array_equal(*(p.act(observations(5), greedy=True).action for p in (single, chunked)))


@each_chain
def test_steps_score_as_independent_normals(spec):
    policy, observation = build(spec), observations(10)
    taken = policy.act(observation, rng=generator(1))
    chain, condition = torch.from_numpy(taken.trace["chain"]), policy.condition(as_tensors(observation))
    given, entropy = score(policy, observation, taken)
    for index in range(policy.num_units):
        mean, std, *_ = policy.step(chain[:, index], condition, torch.tensor(index))
        normal = torch.distributions.Independent(torch.distributions.Normal(mean, std.expand_as(mean)), 1)
        torch.testing.assert_close(given[:, index], normal.log_prob(chain[:, index + 1]), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(entropy[:, index], normal.entropy(), atol=1e-4, rtol=1e-5)
        assert (std >= policy.config.min_std - 1e-7).all()


@each_spec
def test_equal_generators_give_equal_bits_and_greedy_needs_none(spec):
    policy, observation = build(spec), observations(10)
    one, two, other = (policy.act(observation, rng=generator(s)).action for s in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    greedy = [policy.act(observation, greedy=True).action for _ in range(2)]
    assert np.array_equal(*greedy)
    np.testing.assert_allclose(policy.mode(as_tensors(observation)).detach().numpy(), greedy[0], atol=1e-6)
    with pytest.raises(ValueError, match="rng"):
        policy.act(observation)


@each_chain
def test_the_whole_chain_is_differentiable(spec):
    policy, observation = build(spec), as_tensors(observations(10))
    noise = torch.randn(10, 8, generator=generator(), requires_grad=True)
    policy.from_noise(observation, noise).sum().backward()
    assert noise.grad.abs().sum() > 0
    action, log_prob = policy.rsample(observation, rng=generator())
    assert action.shape == (10, 8) and log_prob.shape == (10,)
    policy.zero_grad()
    action.sum().backward()
    assert policy.net.last.weight.grad.abs().sum() > 0


def test_fixed_start_is_one_draw_that_travels_with_the_weights():
    spec = {**CHAINS["flow"], "greedy_start": "fixed"}
    policy, other = build(spec, seed=0), build(spec, seed=1)
    assert not torch.equal(policy.start, other.start)
    other.load_state_dict(policy.state_dict())
    assert np.array_equal(*(p.act(observations(5), greedy=True).action for p in (policy, other)))


@each_spec
def test_greedy_decisions_start_from_drawn_noise_and_take_quiet_steps(spec):
    """As DPPO and DSRL evaluate; without an rng, or on request, from the start that `mode` has."""
    policy, observation = build(spec), observations(30)
    start = torch.randn(30, 8, generator=generator(1))
    drawn = policy.act(observation, greedy=True, rng=generator(1)).action
    if spec["id"] == "consistency":  # its sampler puts noise back between two steps
        rng, base = generator(1), policy
        x = policy.noise(30, rng=rng) * policy.widths[0]
        condition = policy.condition(as_tensors(observation))
        for index, sigma in enumerate(policy.widths[:-1]):
            if index:
                x = x + (sigma**2 - policy.config.sigma_min**2).sqrt() * torch.randn(x.shape, generator=rng)
            x = policy.clean(x, condition, sigma.expand(30)).clamp(-1, 1)
        expected = policy.codec.decode(x)
        torch.randn(30, 8, generator=rng)
    else:
        base = policy.base if spec["id"] == "last_steps" else policy
        expected = base.from_noise(as_tensors(observation), start)
    np.testing.assert_allclose(drawn, expected.detach().numpy(), atol=1e-5)
    mode = policy.mode(as_tensors(observation)).detach().numpy()
    assert np.abs(drawn - mode).max() > 0.05
    options = {"greedy_start": "zero"}
    still = {**spec, "base": {**spec["base"], **options}} if "base" in spec else {**spec, **options}
    if spec["id"] != "consistency":
        policy = build(still)
        action = policy.act(observation, greedy=True, rng=generator(1)).action
        np.testing.assert_allclose(action, policy.mode(as_tensors(observation)).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("spec", [*CHAINS.values(), SPECS["last steps"]], ids=SPECS)
def test_steps_of_a_chunk_that_are_never_executed_are_not_scored(spec):
    spec = {**spec, "base": {**spec["base"], "execute": 2}} if "base" in spec else {**spec, "execute": 2}
    policy, observation = build(spec), observations(20)
    taken = policy.act(observation, rng=generator(1))
    log_prob, entropy = score(policy, observation, taken)
    np.testing.assert_allclose(log_prob.detach().numpy(), taken.log_prob, atol=1e-5)
    chain = policy.tuned if spec["id"] == "last_steps" else policy
    condition, x = chain.condition(as_tensors(observation)), torch.from_numpy(taken.trace["chain"])
    for place, index in enumerate(range(chain.num_units)[-policy.num_units :]):
        mean, std, *_ = chain.step(x[:, place], condition, torch.tensor(index))
        normal = torch.distributions.Normal(mean[:, :4], std.expand_as(mean)[:, :4])
        torch.testing.assert_close(
            log_prob[:, place], normal.log_prob(x[:, place + 1, :4]).sum(1), atol=1e-4, rtol=1e-5
        )
        torch.testing.assert_close(entropy[:, place], normal.entropy().sum(1), atol=1e-4, rtol=1e-5)
    taken.trace["chain"][:, -1, 4:] += 1.0
    again, _ = score(policy, observation, taken)
    torch.testing.assert_close(again[:, -1], log_prob[:, -1])


# --- what the three kinds are made of ------------------------------------------------------------------------------


@given(st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_cosine_schedule_loses_signal_step_by_step(steps):
    kept = cosine_schedule(steps)
    assert ((kept > 0) & (kept < 1)).all() and (kept.diff() < 0).all()


def test_full_ddim_with_eta_one_is_the_ddpm_posterior():
    policy = build({**CHAINS["ddpm"], "min_std": 1e-6})
    x, condition = torch.randn(20, 8, generator=generator()), policy.condition(as_tensors(observations(20)))
    kept = policy.kept.double()
    for index in range(6):
        mean, std, *_ = policy.step(x, condition, torch.tensor(index))
        t = 5 - index
        before = kept[t - 1] if t else torch.tensor(1.0)
        alpha = kept[t] / before
        clean = policy._clean(policy._predict(x, condition, policy.times[index]), x, policy.kept[t])
        # DDPM (Ho et al. 2020), eq. 7, written out.
        a = before.sqrt() * (1 - alpha) / (1 - kept[t])
        b = alpha.sqrt() * (1 - before) / (1 - kept[t])
        torch.testing.assert_close(mean, (a * clean + b * x).float(), atol=2e-4, rtol=1e-4)
        variance = (1 - before) / (1 - kept[t]) * (1 - alpha)
        torch.testing.assert_close(std, variance.sqrt().clamp_min(1e-6).float()[None], atol=1e-6, rtol=1e-4)


def test_flow_sde_keeps_the_distribution_of_the_flow():
    """With the exact velocity of N(m, s^2) data, many noisy steps end in the same Gaussian as the noiseless flow."""
    policy = build({**CHAINS["flow"], "num_steps": 200, "min_std": 1e-4, "noise_level": 1.5})
    m, s = 0.4, 0.3

    def exact(x, condition, time):
        t = time[..., None]
        variance = (1 - t) ** 2 + (t * s) ** 2
        return m + (t * s**2 - (1 - t)) / variance * (x - t * m)

    policy.net.forward = exact
    x = torch.randn(4000, 8, generator=generator())
    condition = torch.zeros(4000, 32)
    for rng in (None, generator(1)):
        end = policy.walk(x, condition, steps=range(200), rng=rng)[0][:, -1]
        assert abs(end.mean() - m) < 0.01 and abs(end.std() - s) < 0.015


def test_consistency_is_the_identity_at_the_smallest_noise():
    policy = build(CHAINS["consistency"])
    x = torch.randn(10, 8, generator=generator())
    condition = policy.condition(as_tensors(observations(10)))
    low = torch.full((10,), policy.config.sigma_min)
    torch.testing.assert_close(policy.clean(x, condition, low), x)
    assert not torch.allclose(policy.clean(x, condition, low + 1), x)


# --- last steps --------------------------------------------------------------------------------------------------


def test_last_steps_starts_as_its_base_and_trains_only_the_copy():
    agent = build_agent(CHAINS["ddpm"], STATE, ChunkBox(UNIT, horizon=4), generator())
    tuned = wrap_policy("last_steps", agent, generator(1), num_steps=2)
    observation = observations(20)
    whole, last = agent.policy.act(observation, rng=generator(2)), tuned.act(observation, rng=generator(2))
    np.testing.assert_allclose(last.action, whole.action, atol=1e-6)
    np.testing.assert_allclose(last.trace["chain"], whole.trace["chain"][:, -3:], atol=1e-6)
    np.testing.assert_allclose(last.log_prob, whole.log_prob[:, -2:], atol=1e-5)

    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    (-score(tuned, observation, last)[0].sum()).backward()
    optimizer.step()
    changed = {k for k, v in tuned.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(name.startswith("tuned.") for name in changed)
    assert not tuned.train().base.training
    again = tuned.act(observation, rng=generator(2))
    np.testing.assert_array_equal(again.trace["chain"][:, 0], last.trace["chain"][:, 0])  # the early steps are frozen


# --- statistics --------------------------------------------------------------------------------------------------


def buffer_of(actions):
    """One episode whose actions [T, 8] are chunks of 4 steps."""
    buffer = Buffer(Schema(observation={"observation": Field((3,))}, action=Field((8,)), trace={}, units=1), 200)
    length = len(actions)
    observation = observations(length + 1)
    reward = np.zeros(length, np.float32)
    buffer.add_trajectory(Trajectory(observation=observation, action=actions, reward=reward, end="truncated"))
    return buffer


def chunks(count=60, seed=0):
    steps = np.random.default_rng(seed).uniform([-0.2, 0.5], [0.4, 0.9], (count, 4, 2))
    return steps.reshape(count, 8).astype(np.float32)


@pytest.mark.parametrize("kind", ["min_max", "quantile", "mean_std"])
def test_statistics_scale_the_data_and_travel_with_the_weights(kind):
    spec = {**CHAINS["flow"], "statistics": kind, "normalize": True}
    policy, data = build(spec, action_space=FREE), chunks()
    policy.fit_statistics(buffer_of(data))
    normal = policy.codec.encode(torch.from_numpy(data)).unflatten(-1, (4, 2)).flatten(0, 1)
    if kind == "min_max":
        assert torch.allclose(normal.amin(0), torch.tensor(-1.0)) and torch.allclose(normal.amax(0), torch.tensor(1.0))
    elif kind == "quantile":
        assert 0.95 < (normal.abs() <= 1).float().mean() < 1
    else:
        assert normal.mean(0).abs().max() < 1e-5 and (normal.std(0) - 1).abs().max() < 0.01
    fresh = build(spec, action_space=FREE, seed=5)
    fresh.load_state_dict(policy.state_dict())
    assert fresh.codec.statistics.hash == policy.codec.statistics.hash
    assert np.array_equal(*(p.act(observations(5), greedy=True).action for p in (policy, fresh)))


@given(st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=30), st.sampled_from(["min_max", "mean_std"]))
@settings(max_examples=30, deadline=None)
def test_denormalise_is_the_inverse(numbers, kind):
    values = torch.tensor(numbers[: len(numbers) // 2 * 2]).reshape(-1, 2)
    statistics = Statistics({"action": 2}, kind=kind)
    statistics.fit({"action": values})
    back = statistics.denormalise("action", statistics.normalise("action", values))
    torch.testing.assert_close(back, values, atol=1e-4, rtol=1e-5)


def test_statistics_that_are_missing_or_of_another_robot_are_refused():
    spec = {**CHAINS["flow"], "statistics": "min_max"}
    policy = build(spec)
    with pytest.raises(ValueError, match="fit_statistics"):
        policy.act(observations(3), greedy=True)
    policy.fit_statistics(buffer_of(chunks()))
    good = policy.state_dict()
    with pytest.raises(ValueError, match="has no statistics"):
        build(spec).load_state_dict({k: v for k, v in good.items() if "scale/" not in k})
    with pytest.raises(ValueError, match="another robot"):
        build(spec, action_space=WIDE).load_state_dict(good)
    longer = Statistics({"action": 3})
    with pytest.raises(ValueError, match=r"this robot has \(3,\)"):
        longer.load_state_dict(policy.codec.statistics.state_dict())
    edited = {k: v + 0.1 if "center/" in k else v for k, v in good.items()}
    with pytest.raises(ValueError, match="own hash"):
        build(spec).load_state_dict(edited)
    other = build(spec)
    other.fit_statistics(buffer_of(chunks(seed=1)))
    with pytest.raises(ValueError, match="other units"):
        other.load_state_dict(good)
    policy.load_state_dict(good)  # its own are fine


def test_statistics_refuse_bad_data():
    with pytest.raises(ValueError, match="NaN"):
        Statistics({"action": 1}).fit({"action": torch.tensor([[float("nan")]])})
    with pytest.raises(ValueError, match=r"expected at least one \[..., 2\]"):
        Statistics({"action": 2}).fit({"action": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="did you mean 'actions'"):
        Statistics({"action": 2}).fit({"actions": torch.zeros(4, 2)})
    fitted = Statistics({"action": 1})
    fitted.fit({"action": torch.zeros(4, 1)})
    with pytest.raises(ValueError, match="already"):
        fitted.fit({"action": torch.zeros(4, 1)})
    with pytest.raises(ValueError, match="no data"):
        build({**CHAINS["flow"], "statistics": "min_max"}).fit_statistics(buffer_of(chunks()), np.zeros(0, np.int64))


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"id": "diffusion", "ddim_steps": 50}, "ddim_steps"),
        ({"id": "diffusion", "horizon": 4, "execute": 5}, "execute"),
        ({"id": "diffusion", "horizon": 4, "ddim_steps": 1}, "prediction: x0"),
        ({"id": "diffusion", "horizons": 4}, "did you mean 'horizon'"),
        ({"id": "flow", "noise": "learned", "max_std": 0.01}, "max_std"),
        ({"id": "consistency", "sigma_min": 20.0}, "sigma_min"),
        ({"id": "last_steps", "base": CHAINS["ddpm"], "num_steps": 9}, "6 steps"),
        ({"id": "last_steps", "base": {"id": "gaussian", "horizon": 4}}, "diffusion, flow or consistency"),
        ({"id": "diffusion", "horizon": 3}, "chunks of 4 steps"),
    ],
)
def test_bad_options_say_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_bad_data_says_what_is_wrong():
    policy = build(CHAINS["flow"])
    with pytest.raises(ValueError, match="horizon 4 x 2 = 8"):
        policy.imitation_loss(as_tensors(observations(3)), torch.zeros(3, 2), rng=generator())
    with pytest.raises(ValueError, match="needs its chain"):
        policy.log_prob(as_tensors(observations(3)), torch.zeros(3, 8), {})
    with pytest.raises(ValueError, match="unbounded"):
        build(CHAINS["flow"], action_space=FREE)
