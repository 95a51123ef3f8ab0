"""Behaviour correction: weights against loops, and what they are for: gradients of another policy's experience."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.learning import losses
from embodied_rft.objectives.correction import Correction, correct
from tests.lab.spelling import Lab, whole


def random_pair(seed, *, rows=6, units=4):
    rng = np.random.default_rng(seed)
    now, behaviour = (torch.from_numpy(rng.normal(-1, 0.7, (rows, units))) for _ in range(2))
    return now, behaviour, torch.arange(units)[None] < torch.from_numpy(rng.integers(1, units + 1, rows))[:, None]


@pytest.mark.parametrize("how", ["truncate", "mask", "reject"])
@pytest.mark.parametrize("level", ["unit", "decision", "mean"])
def test_weights_equal_a_loop(how, level):
    now, behaviour, mask = random_pair(0)
    weight, rejected, metrics = correct(now, behaviour, mask, Correction(how=how, level=level, limit=1.4))
    for b in range(len(mask)):
        each = [float(now[b, u] - behaviour[b, u]) for u in range(4) if mask[b, u]]
        shared = {"unit": None, "decision": sum(each), "mean": sum(each) / len(each)}[level]
        ratios = [math.exp(e if shared is None else shared) for e in each]
        inside = [1 / 1.4 <= r <= 1.4 for r in ratios]
        expected = [min(r, 1.4) if how == "truncate" else r * i for r, i in zip(ratios, inside, strict=True)]
        assert weight[b][mask[b]].tolist() == pytest.approx(expected)
        assert bool(rejected[b]) == (how == "reject" and not all(inside))
    assert (weight[~mask] == 0).all() and metrics["correction/rejected"] == float(rejected.sum())


@given(st.integers(0, 999), st.sampled_from(["unit", "decision", "mean"]))
@settings(max_examples=30, deadline=None)
def test_the_same_policy_needs_no_correction(seed, level):
    now, _, mask = random_pair(seed)
    for how in ("truncate", "mask", "reject"):
        weight, rejected, metrics = correct(now, now, mask, Correction(how=how, level=level))
        assert (weight[mask] == 1).all() and not rejected.any() and metrics["correction/touched"] == 0


@given(st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_what_lies_under_the_mask_changes_nothing(seed):
    now, behaviour, mask = random_pair(seed)
    for level in ("unit", "decision", "mean"):
        clean = correct(now, behaviour, mask, Correction(level=level))[0]
        broken = correct(torch.where(mask, now, torch.nan), behaviour, mask, Correction(level=level))[0]
        torch.testing.assert_close(clean, broken)


def expected_gradient(logits, behaviour, limit):
    """Of the surrogate over all actions of a bandit that `behaviour` plays, exactly."""
    advantage = torch.tensor([1.0, -0.5, 0.2, -2.0], dtype=torch.float64)
    log_prob = logits.log_softmax(-1)[:, None]
    now, acted = log_prob.detach(), behaviour.log()[:, None]
    mask = torch.ones(4, 1, dtype=torch.bool)
    weight = 1.0 if limit is None else correct(now, acted, mask, Correction(limit=limit))[0]
    each = losses.clipped_surrogate(log_prob - now, 0.0, advantage) * weight
    (gradient,) = torch.autograd.grad((behaviour[:, None] * each).sum(), logits)
    return gradient


def test_a_corrected_gradient_is_the_policys_own_in_expectation():
    logits = torch.tensor([0.3, -0.2, 0.1, 0.8], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    own = expected_gradient(logits, logits.detach().softmax(-1), None)
    torch.testing.assert_close(expected_gradient(logits, other, 100.0), own)
    assert (expected_gradient(logits, other, None) - own).norm() > 0.1  # without a correction it is another one
    half = (expected_gradient(logits, other, 1.5) - own).norm()
    assert 0 < half < (expected_gradient(logits, other, None) - own).norm()


def noted(**correction):
    """A lab whose experience was recorded with log-probabilities that are off, as by another way of computing them."""
    lab = Lab()
    objective = lab.objective({"id": "grpo", "correction": correction})
    lab.collect(64)
    column = lab.buffer._ragged["log_prob/"]
    column.values[: column.used] -= np.where(np.arange(column.used) % 5 == 0, 1.0, 0.0).astype(np.float32)
    rows = lab.buffer.rows()
    return lab, objective, rows, objective.annotate(lab.agent, lab.buffer, rows, lab.rng)


def test_notes_are_written_on_the_way_to_the_loss():
    lab, _, rows, metrics = noted(how="truncate", limit=2.0)
    batch = lab.buffer.batch(rows)
    expected = (batch.notes["old_log_prob"] - batch.log_prob).exp().clamp_max(2.0)
    torch.testing.assert_close(batch.notes["weight"][batch.mask], expected[batch.mask])
    assert 0.1 < metrics["correction/touched"] < 0.3 and metrics["correction/weight"] > 1.1
    own, _ = lab.agent.policy.log_prob(batch.observation, batch.action, {})
    torch.testing.assert_close(batch.notes["old_log_prob"][batch.mask], own.detach()[batch.mask])


def test_the_surrogate_multiplies_the_weight():
    lab, objective, rows, _ = noted(how="truncate", limit=2.0)
    batch = whole(lab.buffer, rows)
    loss, metrics = objective.policy_loss(lab.agent, batch, lab.rng)
    each = -(batch.notes["weight"] * batch.notes["advantage"][:, None])  # the ratio to old_log_prob is 1
    expected = (torch.where(batch.mask, each, 0.0).sum(1) / batch.mask.sum(1)).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    assert float(metrics["policy/kl"]) < 1e-10


def test_rejected_decisions_are_not_read():
    lab, objective, rows, metrics = noted(how="reject", limit=2.0)
    read = np.concatenate([b.rows for b in objective.reading.batches(lab.buffer, lab.numbers, lab.learner.version)])
    batch = lab.buffer.batch(rows)
    far = ((batch.notes["old_log_prob"] - batch.log_prob > math.log(2)) & batch.mask).any(1).numpy()
    assert metrics["correction/rejected"] == far.sum() > 0
    assert not set(rows[far]) & set(read) and len(set(read)) > 0


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Correction(limit=0.5)
