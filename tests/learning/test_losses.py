"""Every loss against a slow reference written from its equation."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.learning import losses


def rand(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_td_target():
    reward, value = torch.tensor([1.0, 1.0, -3.0]), torch.tensor([10.0, 10.0, 10.0])
    discount = torch.tensor([0.9, 0.0, 0.9])  # truncated or running, terminated, running
    assert losses.td_target(reward, discount, value).tolist() == pytest.approx([10.0, 1.0, 6.0])
    assert losses.td_target(reward, discount, value, clip=(-50.0, 5.0)).tolist() == pytest.approx([5.0, 1.0, 5.0])


def test_huber_and_expectile_point_by_point():
    error = rand(50) * 2
    for e, h, x in zip(error, losses.huber(error, delta=0.7), losses.expectile(error, tau=0.8), strict=True):
        e = float(e)
        assert float(h) == pytest.approx(0.5 * e * e if abs(e) <= 0.7 else 0.7 * (abs(e) - 0.35))
        assert float(x) == pytest.approx((0.8 if e > 0 else 0.2) * e * e)
    torch.testing.assert_close(losses.expectile(error, tau=0.5), 0.5 * error**2)


def test_an_expectile_regression_finds_the_expectile():
    """tau -> 1 approaches the maximum of the data, tau = 0.5 its mean."""
    data = torch.tensor([0.0, 0.0, 0.0, 10.0], dtype=torch.float64)
    for tau, low, high in ((0.5, 2.49, 2.51), (0.99, 9.5, 10.0)):
        value = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([value], max_iter=100)

        def closure(value=value, optimizer=optimizer, tau=tau):
            optimizer.zero_grad()
            loss = losses.expectile(data - value, tau=tau).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert low < float(value.detach()) < high


@given(st.integers(1, 10), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_reductions_of_an_ensemble(members, seed):
    q = rand(members, 6, seed=seed)
    torch.testing.assert_close(losses.reduce_ensemble(q, "min"), q.min(0).values)
    torch.testing.assert_close(losses.reduce_ensemble(q, "mean"), q.mean(0))
    if members > 1:
        pairs = [torch.minimum(q[i], q[j]) for i, j in itertools.combinations(range(members), 2)]
        torch.testing.assert_close(losses.reduce_ensemble(q, "mean_of_pair_minima"), torch.stack(pairs).mean(0))


def test_mean_of_pair_minima_lies_between_min_and_mean():
    q = rand(8, 20)
    pairs = losses.reduce_ensemble(q, "mean_of_pair_minima")
    assert (pairs >= q.min(0).values).all() and (pairs <= q.mean(0)).all()


def test_conservative_gap_is_the_importance_weighted_log_mean():
    sampled, density, data = rand(2, 5, 3), rand(5, 3, seed=1), rand(2, 3, seed=2)
    gap = losses.conservative(sampled, density, data)
    for e, b in itertools.product(range(2), range(3)):
        mean = sum(math.exp(float(sampled[e, k, b])) / math.exp(float(density[k, b])) for k in range(5)) / 5
        assert float(gap[e, b]) == pytest.approx(math.log(mean) - float(data[e, b]))


def test_calibration_is_a_floor_with_gradient_only_above_it():
    sampled = torch.tensor([[[1.0, 5.0, 1.0, 1.0]]], requires_grad=True)
    floor = torch.tensor([3.0, 3.0, math.nan, -math.inf])
    value = losses.calibrated(sampled, floor)
    assert value.tolist() == [[[3.0, 5.0, 1.0, 1.0]]]
    (gradient,) = torch.autograd.grad(value.sum(), sampled)
    assert gradient.tolist() == [[[0.0, 1.0, 1.0, 1.0]]]


def test_temperature_rises_when_entropy_is_below_its_target():
    for entropy, sign in ((-3.0, 1), (-1.0, -1)):
        log_alpha = torch.zeros((), requires_grad=True)
        losses.temperature(log_alpha, torch.full((4,), -entropy), target_entropy=-2.0).mean().backward()
        assert math.copysign(1, -float(log_alpha.grad)) == sign  # a gradient step goes against the gradient


def test_advantage_weights():
    advantage = torch.tensor([-1.0, 0.0, 1.0, 50.0], requires_grad=True)
    weights = losses.advantage_weights(advantage, inverse_temperature=3.0)
    assert weights.tolist() == pytest.approx([math.exp(-3), 1.0, math.exp(3), 100.0])
    assert not weights.requires_grad
    assert losses.advantage_weights(advantage, inverse_temperature=0.0).tolist() == [1.0] * 4


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.3)])
def test_clipped_surrogate_per_unit(low, high):
    new, old, advantage = rand(6, 3), rand(6, 3, seed=1), rand(6, seed=2)
    given_ = losses.clipped_surrogate(new, old, advantage, low=low, high=high)
    for b, u in itertools.product(range(6), range(3)):
        ratio, a = math.exp(float(new[b, u] - old[b, u])), float(advantage[b])
        expected = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        assert float(given_[b, u]) == pytest.approx(expected)


def test_at_the_first_epoch_the_surrogate_is_the_policy_gradient():
    log_prob, advantage = rand(5, 2).requires_grad_(), rand(5, seed=3)
    losses.clipped_surrogate(log_prob, log_prob.detach(), advantage).sum().backward()
    torch.testing.assert_close(log_prob.grad, -advantage[:, None].expand(5, 2))


def test_kl_estimators_agree_on_their_mean_and_k3_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator, dtype=torch.float64)
    log_p, log_q = -0.5 * x**2, -0.5 * (x - 0.2) ** 2  # KL(N(0,1) || N(0.2,1)) = 0.02
    for name in ("k1", "k2", "k3"):
        assert float(losses.kl(log_p, log_q, estimator=name).mean()) == pytest.approx(0.02, abs=1.5e-3)
    assert (losses.kl(log_p, log_q) >= 0).all()
    assert (losses.kl(log_p, log_p) == 0).all()


def test_nothing_under_the_mask_changes_value_or_gradient():
    values = rand(4, 3).requires_grad_()
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    losses.masked_sum(values, mask).backward()
    clean = values.grad.clone()
    broken = torch.where(mask, values.detach(), torch.nan).requires_grad_()
    total = losses.masked_sum(broken, mask)
    total.backward()
    assert float(total.detach()) == pytest.approx(float(values.detach()[mask].sum()))
    torch.testing.assert_close(broken.grad, clean)


@pytest.mark.parametrize("normalizer", ["units", "decisions", "episodes", "constant"])
def test_sums_over_a_batch_equal_a_loop_over_its_units(normalizer):
    values, lengths, episode = rand(5, 4), [1, 4, 2, 3, 1], [0, 0, 1, 2, 2]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    units = [sum(n for n, e in zip(lengths, episode, strict=True) if e == own) for own in episode]
    each = [sum(float(values[b, u]) for u in range(lengths[b])) for b in range(5)]
    by = {
        "units": [11] * 5,
        "decisions": [5 * n for n in lengths],
        "episodes": [3 * n for n in units],
        "constant": [3 * 2.5] * 5,
    }
    sizes = {"num_units": 11, "num_decisions": 5, "num_episodes": 3, "constant": 2.5}
    given_ = losses.per_batch(
        torch.where(mask, values, torch.nan), mask, normalizer=normalizer, episode_units=torch.tensor(units), **sizes
    )
    assert float(given_) == pytest.approx(sum(x / n for x, n in zip(each, by[normalizer], strict=True)))
