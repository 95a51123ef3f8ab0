"""Returns against slow reference loops, and the algebra that must hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.learning.returns import (
    gae,
    group_advantages,
    moments,
    moments_together,
    monte_carlo,
    pad_segments,
    standardize,
    without_spread,
)


def segments(seed, *, count=5, longest=7, gamma=0.9):
    """Random padded segments; about half terminate."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count).tolist()
    _, mask = pad_segments(lengths)
    shape = mask.shape
    reward, value, next_value = (torch.from_numpy(rng.standard_normal(shape)) for _ in range(3))
    discount = torch.full(shape, gamma, dtype=torch.float64)
    for s, length in enumerate(lengths):
        if rng.random() < 0.5:
            discount[s, length - 1] = 0.0
    # Inside a segment the next value is the value of the next decision.
    for s, length in enumerate(lengths):
        next_value[s, : length - 1] = value[s, 1:length]
    return lengths, torch.from_numpy(mask), reward, discount, value, next_value


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_gae_is_the_weighted_sum_of_td_errors(seed, decay):
    lengths, mask, reward, discount, value, next_value = segments(seed)
    given_ = gae(reward, discount, value, next_value, mask, trace_decay=decay)
    for s, length in enumerate(lengths):
        for t in range(length):
            expected, factor = 0.0, 1.0
            for i in range(t, length):
                delta = reward[s, i] + discount[s, i] * next_value[s, i] - value[s, i]
                expected += factor * delta
                factor *= decay * discount[s, i]
            assert given_[s, t] == pytest.approx(float(expected), abs=1e-12)
    assert (given_[~mask] == 0).all()


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_gae_one_is_the_monte_carlo_return_minus_value(seed):
    lengths, mask, reward, discount, value, next_value = segments(seed)
    last = torch.tensor(lengths) - 1
    tail = next_value.gather(1, last[:, None])[:, 0]
    full = monte_carlo(reward, discount, mask, tail)
    advantage = gae(reward, discount, value, next_value, mask, trace_decay=1.0)
    torch.testing.assert_close(advantage[mask], (full - value)[mask], atol=1e-12, rtol=0)


def test_a_truncated_end_bootstraps_and_a_terminated_one_does_not():
    mask = torch.ones(2, 3, dtype=torch.bool)
    zero = torch.zeros(2, 3)
    discount = torch.full((2, 3), 0.5)
    discount[1, 2] = 0.0  # the second segment terminated
    next_value = zero.clone()
    next_value[:, 2] = 8.0
    advantage = gae(zero, discount, zero, next_value, mask, trace_decay=1.0)
    assert advantage.tolist() == [[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]
    assert monte_carlo(zero, discount, mask, next_value[:, 2]).tolist() == advantage.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_what_lies_under_the_mask_changes_nothing(seed):
    _, mask, reward, discount, value, next_value = segments(seed)
    broken = [torch.where(mask, x, torch.nan) for x in (reward, discount, value, next_value)]
    torch.testing.assert_close(
        gae(*broken, mask, trace_decay=0.9), gae(reward, discount, value, next_value, mask, trace_decay=0.9)
    )
    torch.testing.assert_close(monte_carlo(*broken[:2], mask), monte_carlo(reward, discount, mask))


BASELINES = st.sampled_from(["grpo", "dr_grpo", "rloo"])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), BASELINES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_group_advantages_sum_to_zero_in_every_group(groups, baseline, seed):
    returns = torch.from_numpy(np.random.default_rng(seed).standard_normal(len(groups)))
    advantage = group_advantages(returns, np.array(groups), baseline=baseline)
    assert torch.isfinite(advantage).all()
    for group in set(groups):
        members = torch.from_numpy(np.array(groups) == group)
        assert abs(float(advantage[members].sum())) < 1e-9
        if members.sum() == 1:
            assert float(advantage[members]) == 0.0


def test_group_advantages_equal_a_slow_loop():
    returns, group = torch.tensor([1.0, 3.0, 5.0, 7.0, 7.0], dtype=torch.float64), np.array([9, 2, 9, 2, 9])
    expected = {"dr_grpo": [], "rloo": [], "grpo": []}
    for i in range(5):
        members = [float(returns[j]) for j in range(5) if group[j] == group[i]]
        others = [float(returns[j]) for j in range(5) if group[j] == group[i] and j != i]
        value = float(returns[i])
        expected["dr_grpo"].append(value - np.mean(members))
        expected["rloo"].append(value - np.mean(others))
        expected["grpo"].append((value - np.mean(members)) / (np.std(members, ddof=1) + 1e-6))
    for baseline, values in expected.items():
        np.testing.assert_allclose(group_advantages(returns, group, baseline=baseline).numpy(), values, atol=1e-12)


def test_equal_returns_in_a_group_give_no_credit():
    assert group_advantages(torch.full((4,), 0.7), np.zeros(4)).tolist() == [0.0] * 4


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 400), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_equal_returns_are_exactly_no_credit(reward, count, steps, seed):
    """Whatever the sums and the means round to: returns that are equal on paper differ by rounding at most."""
    order = np.random.default_rng(seed).permutation(np.append(np.full(steps, reward, np.float32), np.float32(-reward)))
    sums = [float(np.cumsum(np.roll(order, shift), dtype=np.float32)[-1]) for shift in range(count)]
    values, size = torch.tensor(sums), torch.full((count,), abs(reward) * (steps + 1))
    for baseline in ("grpo", "dr_grpo", "rloo"):
        assert (group_advantages(values, np.zeros(count), baseline=baseline, size=size) == 0).all()
    near = torch.full((count,), reward) * (1 + 1e-7 * torch.arange(count).remainder(2))
    assert (standardize(near, torch.ones(count, dtype=torch.bool)) == 0).all()


def test_small_rewards_are_no_rounding():
    """What counts as equal depends on the size of the rewards, not on 1."""
    values = torch.tensor([1e-8, 3e-8])
    assert not without_spread(values, np.zeros(2)).any()
    assert (group_advantages(values, np.zeros(2), baseline="dr_grpo") != 0).all()
    shown = standardize(torch.tensor([1.0, 2.0, 50.0, 4.0]), torch.tensor([True, True, False, True]))
    kept = np.array([1.0, 2.0, 4.0])
    expected = (kept - kept.mean()) / (kept.std() + 1e-8)
    np.testing.assert_allclose(shown[[0, 1, 3]].numpy(), expected, rtol=1e-6)
    assert float(shown[2]) == 0.0


@given(st.integers(0, 999), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.floats(-3, 3), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_parts_are_standardised_as_the_whole(seed, sizes, shift, correction):
    """However it is cut; what does not count becomes 0; `correction` is that of NumPy's std."""
    rng = np.random.default_rng(seed)
    whole, counts = rng.normal(shift, 10.0**shift, sum(sizes)), rng.random(sum(sizes)) < 0.8
    parts = [torch.from_numpy(x) for x in np.split(whole, np.cumsum(sizes)[:-1])]
    masks = [torch.from_numpy(x) for x in np.split(counts, np.cumsum(sizes)[:-1])]
    known = [moments(part[mask]) for part, mask in zip(parts, masks, strict=True) if mask.any()]
    if not known:
        return
    known = moments_together(known)
    shown = [standardize(part, mask, known, correction=correction) for part, mask in zip(parts, masks, strict=True)]
    kept, expected = whole[counts], np.zeros(len(whole))
    if len(kept) > 1:
        expected[counts] = (kept - kept.mean()) / (kept.std(ddof=correction) + 1e-8)
    np.testing.assert_allclose(torch.cat(shown).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_pad_segments():
    index, mask = pad_segments([2, 1])
    assert index.tolist() == [[0, 1], [2, 0]] and mask.tolist() == [[True, True], [True, False]]
    flat = np.arange(3)
    np.testing.assert_array_equal(flat[index][mask], flat)
