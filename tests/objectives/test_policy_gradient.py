"""Policy-gradient objectives: notes against loops, options against their equations, and TRL's loss as a reference."""

import collections
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.data import Ragged
from embodied_rft.learning import losses, returns
from embodied_rft.learning.learner import Learner, LearnerConfig, NonFiniteLossError
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.common import units_of
from tests.lab.spelling import CLASSES, Lab, whole

PRESETS = ("ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "gpg", "gspo", "dapo")


def prepared(spec, *, episodes=64, **task):
    """(lab, objective, annotated batch of everything, metrics of annotate)."""
    lab = Lab(**task)
    objective = lab.objective(spec)
    lab.collect(episodes)
    rows = lab.buffer.rows()
    metrics = objective.annotate(lab.agent, lab.buffer, rows, lab.rng)
    return lab, objective, whole(lab.buffer, rows), metrics


def moved(lab, scale=0.05):
    """Another policy than the one that acted."""
    with torch.no_grad():
        for p in lab.agent.policy.parameters():
            p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))


def gradients(lab, loss):
    parameters = list(lab.agent.policy.parameters())
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


# --- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 7, 24])
def test_micro_batches_add_up_to_the_batch(preset, size):
    lab, objective, batch, _ = prepared({"id": preset, "kl_weight": 0.1}, values=preset == "ppo")
    moved(lab)
    whole = gradients(lab, objective.policy_loss(lab.agent, batch, lab.rng)[0])
    pieces = [gradients(lab, objective.policy_loss(lab.agent, b, lab.rng)[0]) for b in batch.split(size)]
    for one, *parts in zip(whole, *pieces, strict=True):
        torch.testing.assert_close(one, sum(parts), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_epoch_starts_with_ratio_one(preset):
    lab, objective, batch, _ = prepared(preset)
    _, metrics = objective.policy_loss(lab.agent, batch, lab.rng)
    assert float(metrics["policy/kl"]) < 1e-10 and float(metrics.get("policy/clipped", 0.0)) == 0.0


@pytest.mark.parametrize("preset", PRESETS)
def test_what_lies_under_the_mask_changes_nothing(preset):
    lab, objective, batch, _ = prepared({"id": preset, "kl_weight": 0.1})
    moved(lab)
    clean = gradients(lab, objective.policy_loss(lab.agent, batch, lab.rng)[0])
    batch.log_prob = torch.where(batch.mask, batch.log_prob, 7.0)
    for name, note in batch.notes.items():
        if note.dim() == 2:
            batch.notes[name] = torch.where(batch.mask, note, 7.0)
    for one, other in zip(clean, gradients(lab, objective.policy_loss(lab.agent, batch, lab.rng)[0]), strict=True):
        assert torch.equal(one, other)


@given(st.integers(0, 999), st.sampled_from(["unit", "decision", "mean", "none"]))
@settings(max_examples=40, deadline=None)
def test_ratio_levels_equal_a_loop(seed, level):
    rng = np.random.default_rng(seed)
    new, old = (torch.from_numpy(rng.normal(-1, 0.5, (5, 4))) for _ in range(2))
    mask = torch.arange(4)[None] < torch.from_numpy(rng.integers(1, 5, 5))[:, None]
    given_ = losses.log_ratio(new, old, mask, level=level)
    for b in range(5):
        each = [float(new[b, u] - old[b, u]) for u in range(4) if mask[b, u]]
        expected = {"unit": each, "decision": [sum(each)] * len(each), "mean": [np.mean(each)] * len(each)}
        assert given_[b][mask[b]].tolist() == pytest.approx(expected.get(level, [0.0] * len(each)))
    full = torch.ones_like(mask)
    torch.testing.assert_close(
        losses.log_ratio(new, old, None, level=level), losses.log_ratio(new, old, full, level=level)
    )


def test_without_a_ratio_it_is_the_plain_policy_gradient():
    lab, objective, batch, _ = prepared("gpg")
    moved(lab)
    given_ = gradients(lab, objective.policy_loss(lab.agent, batch, lab.rng)[0])
    log_prob, _ = lab.agent.policy.log_prob(batch.observation, batch.action, {})
    plain = -(log_prob * batch.notes["advantage"][:, None])[batch.mask].sum() / batch.num_units
    for one, other in zip(given_, gradients(lab, plain), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dual", [None, 2.0])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.3), (None, 0.2), (0.2, None)])
def test_clipping_equals_its_definition_and_its_gradient(low, high, dual):
    rng = np.random.default_rng(0)
    new = torch.from_numpy(rng.normal(0, 0.7, (200, 1))).requires_grad_()
    advantage = torch.from_numpy(rng.standard_normal(200))
    ratio, a = new.exp(), advantage[:, None]
    clipped = ratio.clamp(None if low is None else 1 - low, None if high is None else 1 + high)
    gain = torch.minimum(ratio * a, clipped * a)
    if dual is not None:
        gain = torch.where(a < 0, torch.maximum(gain, dual * a), gain)
    given_ = losses.clipped_surrogate(new, 0.0, advantage, low=low, high=high, dual=dual)
    torch.testing.assert_close(given_, -gain, atol=1e-6, rtol=1e-6)
    pair = (torch.autograd.grad(x.sum(), new)[0] for x in (given_, -gain))
    torch.testing.assert_close(*pair, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_equal_policies_is_zero(estimator):
    log_prob = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert (losses.kl(log_prob, log_prob, estimator=estimator) == 0).all()
    other = log_prob + torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    assert estimator == "k1" or (losses.kl(log_prob, other, estimator=estimator) >= 0).all()


def test_value_clipping_point_by_point():
    value, old, target = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 0.5, 0.0]), torch.tensor([1.0, 2.0, 2.0])
    near = [0.0, 0.7, 0.2]
    expected = [max((v - t) ** 2, (n - t) ** 2) / 2 for v, n, t in zip(value, near, target, strict=True)]
    assert losses.value_error(value, target, old, clip=0.2).tolist() == pytest.approx([float(e) for e in expected])
    assert losses.value_error(value, target).tolist() == pytest.approx([0.5, 0.5, 0.5])


class Fake(types.SimpleNamespace):
    """A trainer of which only what the loss reads is there; every switch that is not named is off."""

    def __getattr__(self, name):
        return None


def trl_loss(loss_type, level, log_prob, old, reference, advantage, mask, *, low, high, beta):
    """What TRL's GRPOTrainer computes from the same numbers."""
    from trl import GRPOTrainer  # takes seconds: only when it is needed

    gather = Fake(gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1)
    fake = Fake(
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_prob, torch.zeros_like(log_prob), None),
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        model=types.SimpleNamespace(training=False),
        accelerator=gather,
        top_entropy_quantile=1.0,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        max_completion_length=mask.shape[1],
        current_gradient_accumulation_steps=1,
    )
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.to(log_prob.dtype),
        "advantages": advantage,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(fake, None, inputs)


@pytest.mark.parametrize(
    "preset, loss_type, level",
    [
        ("grpo", "grpo", "token"),
        ("dr_grpo", "dr_grpo", "token"),
        ("dapo", "dapo", "token"),
        ("gspo", "grpo", "sequence"),
    ],
)
def test_losses_equal_those_of_trl(preset, loss_type, level):
    options = {"normalizer_units": 5.0} if preset == "dr_grpo" else {}
    spec = {"id": preset, "kl_weight": 0.2, "clip_low": 0.05, "clip_high": 0.08, **options}
    lab, objective, batch, _ = prepared(spec)
    moved(lab)
    assert batch.mask.shape[1] == 5
    log_prob, _ = lab.agent.policy.log_prob(batch.observation, batch.action, {})
    numbers = (log_prob, batch.log_prob, batch.notes["reference_log_prob"], batch.notes["advantage"], batch.mask)
    expected = trl_loss(loss_type, level, *numbers, low=0.05, high=0.08, beta=0.2)
    loss, metrics = objective.policy_loss(lab.agent, batch, lab.rng)
    assert float(metrics["policy/clipped"]) > 0.01
    torch.testing.assert_close(loss, expected)
    for one, other in zip(gradients(lab, loss), gradients(lab, expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_rloo_equals_trl():
    from trl import RLOOTrainer

    lab, objective, batch, _ = prepared({"id": "rloo", "clip_low": 0.05, "clip_high": 0.08})
    moved(lab)
    log_prob, _ = lab.agent.policy.log_prob(batch.observation, batch.action, {})
    fake = Fake(
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_prob, torch.zeros_like(log_prob), None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        model=types.SimpleNamespace(training=False),
        accelerator=Fake(gather=lambda x: x, reduce=lambda x, **_: x),
        epsilon_low=0.05,
        epsilon_high=0.08,
    )
    ids = torch.zeros(batch.mask.shape, dtype=torch.int64)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids}
    inputs |= {"completion_mask": batch.mask.float(), "advantages": batch.notes["advantage"]}
    inputs["old_logps"] = torch.where(batch.mask, batch.log_prob, 0.0).sum(1)
    expected = RLOOTrainer._compute_loss(fake, None, inputs)
    loss, _ = objective.policy_loss(lab.agent, batch, lab.rng)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(gradients(lab, loss), gradients(lab, expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


# --- credit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["grpo", "dr_grpo", "rloo"])
def test_advantages_of_a_group_sum_to_zero(credit):
    lab, _, batch, _ = prepared({"id": "grpo", "credit": credit}, turns=2)
    first = batch.columns["step"] == 0
    for group in np.unique(batch.columns["group"]):
        members = torch.from_numpy((batch.columns["group"] == group) & first)
        assert abs(float(batch.notes["advantage"][members].sum())) < 1e-4
    second = batch.notes["advantage"][torch.from_numpy(~first)]
    assert sorted(second.tolist()) == sorted(batch.notes["advantage"][torch.from_numpy(first)].tolist())


def test_groups_without_spread_are_dropped_and_counted():
    lab, objective, batch, metrics = prepared("dapo")
    group, reward = batch.columns["group"], batch.reward.numpy()
    lab.buffer._dense.write("reward/env", batch.rows[group < 3], np.full((group < 3).sum(), 0.25, np.float32))
    metrics = objective.annotate(lab.agent, lab.buffer, batch.rows, lab.rng)
    expected = {g for g in np.unique(group) if g < 3 or np.ptp(reward[group == g]) == 0}
    assert metrics["credit/dead_groups"] == len(expected) and metrics["credit/groups"] == len(np.unique(group))
    read = np.concatenate([b.columns["group"] for b in objective.reading.batches(lab.buffer, lab.numbers, 1)])
    assert set(read) == set(group) - expected
    counts = collections.Counter(read.tolist())
    assert set(counts.values()) == {8 * objective.config.num_epochs}  # whole groups, each once an epoch


def test_dynamic_sampling_waits_until_enough_groups_have_spread():
    lab = Lab()
    lab.objective({"id": "dapo", "min_groups": 12, "batch_size": 512})
    version = lab.learner.version
    lab.collect(64)
    assert lab.learner.learn(lab.buffer, lab.numbers)["credit/groups"] == 8
    assert lab.learner.version == version  # 8 groups are not enough; the policy stays, so they keep counting
    lab.collect(64)
    lab.learner.learn(lab.buffer, lab.numbers)
    assert lab.learner.version > version


def test_group_credit_without_siblings_says_what_to_do():
    lab = Lab()
    objective = lab.objective("grpo")
    lab.collect(8, group_size=1)
    with pytest.raises(ValueError, match="set group_size"):
        objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)


@given(st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_bi_level_gae_with_one_unit_a_turn_is_gae(seed, decay, unit_decay):
    rng = np.random.default_rng(seed)
    outer, value = (torch.from_numpy(rng.standard_normal(6)) for _ in range(2))
    mask = torch.ones(6, 1, dtype=torch.bool)
    given_ = returns.unit_advantages(outer + value, value[:, None], mask, gamma=1.0, trace_decay=unit_decay)
    torch.testing.assert_close(given_[:, 0], outer)


def test_unit_advantages_equal_a_loop():
    rng = np.random.default_rng(0)
    value, reward = (torch.from_numpy(rng.standard_normal((4, 5))) for _ in range(2))
    after, lengths = torch.from_numpy(rng.standard_normal(4)), [1, 3, 5, 2]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    broken = torch.where(mask, value, torch.nan)
    given_ = returns.unit_advantages(after, broken, mask, reward, gamma=0.9, trace_decay=0.8)
    for b, length in enumerate(lengths):
        running = 0.0
        for u in reversed(range(length)):
            following = float(after[b]) if u == length - 1 else 0.9 * float(value[b, u + 1])
            running = float(reward[b, u]) + following - float(value[b, u]) + 0.9 * 0.8 * running
            assert float(given_[b, u]) == pytest.approx(running)
    assert (given_[~mask] == 0).all()
    monte_carlo = returns.unit_advantages(after, value, mask, gamma=1.0, trace_decay=1.0)
    torch.testing.assert_close(monte_carlo[mask], (after[:, None] - value)[mask])


def test_bi_level_notes_are_per_unit_and_end_in_the_turns_return():
    lab, _, batch, _ = prepared(
        {"id": "ppo", "credit": "bi_level_gae", "normalize_advantage": False}, values=True, turns=2
    )
    advantage, target = batch.notes["unit_advantage"], batch.notes["unit_value_target"]
    value = lab.agent.policy.value(batch.observation).detach()
    unit_value = lab.agent.policy.unit_values(batch.observation, batch.action, {}).detach()
    torch.testing.assert_close(unit_value[:, 0], value)
    torch.testing.assert_close((advantage + unit_value)[batch.mask], target[batch.mask])
    _, plain, other, _ = prepared({"id": "ppo", "normalize_advantage": False}, values=True, turns=2)
    for b in range(len(batch)):  # with gamma = lambda = 1 inside, the first unit's advantage is the turn's
        assert float(advantage[b, 0]) == pytest.approx(float(other.notes["advantage"][b]), abs=1e-5)


def test_values_per_unit_are_asked_for_by_name():
    with pytest.raises(ValueError, match="unit_values"):
        prepared({"id": "ppo", "credit": "bi_level_gae"})


def test_returns_from_each_unit_on():
    after, reward = torch.tensor([10.0, 20.0]), torch.tensor([[1.0, 2.0, 3.0], [4.0, torch.nan, torch.nan]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert returns.unit_returns(after, reward, mask).tolist() == [[16.0, 15.0, 13.0], [24.0, 0.0, 0.0]]


def test_the_soft_punishment_of_length():
    length = torch.tensor([1, 5, 6, 7, 8, 9])
    assert returns.overlong_penalty(length, limit=8, margin=4).tolist() == [0.0, -0.25, -0.5, -0.75, -1.0, -1.0]
    assert returns.overlong_penalty(length, limit=7, margin=0).tolist() == [0.0, 0.0, 0.0, 0.0, -1.0, -1.0]
    _, _, batch, metrics = prepared({"id": "dapo", "overlong": (4, 2)})
    expected = returns.overlong_penalty(batch.mask.sum(1), limit=4, margin=2).mean()
    assert metrics["credit/overlong"] == pytest.approx(float(expected)) and expected < -0.1


# --- references and values ---------------------------------------------------------------------------------------


def test_the_reference_is_the_policy_at_the_start_and_never_moves():
    lab = Lab()
    lab.objective({"id": "grpo", "kl_weight": 0.1, "batch_size": 64}, learning_rate=1e-2)
    start = {k: v.clone() for k, v in lab.agent.policy.state_dict().items()}
    metrics = lab.finetune(2)
    for name, weight in lab.agent.parts["reference"].state_dict().items():
        assert torch.equal(weight, start[name])
        assert name.endswith("bias") or not torch.equal(weight, lab.agent.policy.state_dict()[name])
    assert metrics["policy/kl_to_reference"] > 0


def test_frozen_weights_of_the_reference_are_shared():
    lab = Lab()
    policy = torch.nn.Sequential(torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.Linear(3, 3))
    lab.agent.policy = policy
    reference = lab.agent.ensure_copy("reference")
    assert reference[0].weight is policy[0].weight and reference[1].weight is not policy[1].weight
    assert not any(p.requires_grad for p in reference.parameters()) and policy[1].weight.requires_grad


def test_kl_as_reward_is_paid_by_the_decision():
    options = {"kl_weight": 0.5, "kl_in": "reward", "kl_estimator": "k1", "normalize_advantage": False}
    lab = Lab()
    objective = lab.objective({"id": "rloo", **options})
    moved(lab, 0.3)
    lab.collect(64)
    rows = lab.buffer.rows()
    objective.annotate(lab.agent, lab.buffer, rows, lab.rng)
    batch = lab.buffer.batch(rows)
    reference, _ = lab.agent.parts["reference"].log_prob(batch.observation, batch.action, {})
    penalty = torch.where(batch.mask, 0.5 * (batch.log_prob - reference), 0.0).detach()
    shaped = batch.reward - penalty.sum(1)
    expected = returns.group_advantages(shaped, batch.columns["group"], baseline="rloo")
    torch.testing.assert_close(batch.notes["advantage"], expected, atol=1e-5, rtol=1e-4)


def test_another_kind_of_credit_on_the_same_rows():
    lab, _, batch, _ = prepared("grpo")
    lab.objective("reinforce_pp").annotate(lab.agent, lab.buffer, batch.rows, lab.rng)
    again = lab.buffer.batch(batch.rows)
    shown = again.notes["unit_advantage"][again.mask]
    assert abs(float(shown.mean())) < 1e-5 and float(shown.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_unit_rewards_count_for_the_units_before_them():
    lab = Lab()
    options = {"kl_weight": 0.5, "normalize_advantage": False}
    objective = lab.objective({"id": "reinforce_pp", **options})
    moved(lab, 0.3)
    lab.collect(64)
    rows = lab.buffer.rows()
    objective.annotate(lab.agent, lab.buffer, rows, lab.rng)
    batch = lab.buffer.batch(rows)
    reference, _ = lab.agent.parts["reference"].log_prob(batch.observation, batch.action, {})
    for b in range(len(batch)):
        cost = [0.5 * float(batch.log_prob[b, u] - reference[b, u]) for u in range(5) if batch.mask[b, u]]
        expected = [float(batch.reward[b]) - sum(cost[u:]) for u in range(len(cost))]
        assert batch.notes["unit_advantage"][b][batch.mask[b]].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_value_on_the_trunk_joins_the_policys_loss():
    lab, objective, batch, _ = prepared({"id": "ppo", "value_weight": 0.7}, values=True)
    assert list(objective.losses) == ["policy"] and "value" not in lab.agent.parts
    both, metrics = objective.policy_loss(lab.agent, batch, lab.rng)
    assert float(both.detach()) == pytest.approx(float(metrics["policy/loss"] + 0.7 * metrics["value/loss"]), abs=1e-6)
    error = 0.5 * (lab.agent.policy.value(batch.observation) - batch.notes["value_target"]).square().mean()
    assert float(metrics["value/loss"]) == pytest.approx(float(error.detach()), abs=1e-6)


def test_a_running_episodes_newest_decision_is_left_out():
    lab, objective, batch, _ = prepared({"id": "ppo", "value_hidden": [8]}, turns=3)
    shown = {"observation": np.eye(CLASSES, dtype=np.float32)[[0]]}
    taken = lab.agent.policy.act(shown, rng=lab.rng)
    rows = [
        lab.buffer.add(np.array([900]), shown, taken, np.ones(1, np.float32), np.zeros(1, bool), np.zeros(1, bool))
        for _ in range(2)
    ]
    objective.annotate(lab.agent, lab.buffer, np.concatenate(rows), lab.rng)
    assert lab.buffer.note("live", np.concatenate(rows)).tolist()[0] == 1.0
    assert math.isnan(lab.buffer.note("live", rows[1])[0])


# --- what must not happen ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_term_and_changes_nothing():
    lab, objective, batch, _ = prepared({"id": "ppo", "value_hidden": [8]})
    learner = Learner(lab.agent, objective, LearnerConfig())
    before = {k: v.clone() for k, v in lab.agent.policy.state_dict().items()}
    batch.notes["advantage"][3] = math.nan
    with pytest.raises(NonFiniteLossError, match="'policy'"):
        learner.update(batch, lab.rng)
    assert all(torch.equal(v, before[k]) for k, v in lab.agent.policy.state_dict().items())


def test_learning_repeats_to_the_bit():
    def weights():
        lab = Lab()
        lab.objective({"id": "dapo", "kl_weight": 0.1, "correction": {}, "batch_size": 32}, learning_rate=1e-2)
        lab.finetune(2)
        return torch.cat([p.detach().flatten() for p in lab.agent.policy.parameters()])

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"id": "grpo", "kl_weight": -1.0}, "at least 0"),
        ({"id": "grpo", "normalizer_units": 5.0}, "no effect"),
        ({"id": "ppo", "ratio": "none"}, "clipping has no effect"),
        ({"id": "ppo", "normalize_advantage": "minibatch", "batch_size": 1}, "batch_size to at least 2"),
        ({"id": "ppo", "normalize_advantage": True}, "minibatch"),
        ({"id": "dapo", "overlong": (4, 6)}, "margin <= limit"),
        ({"id": "ppo", "correction": {"how": "truncat"}}, "truncate"),
        ({"id": "grp"}, "did you mean 'grpo'"),
    ],
)
def test_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        build_objective(spec)


def test_units_of_is_the_inverse_of_padding():
    ragged = Ragged.of([[1.0, 2.0], [], [3.0]], np.float32)
    padded, mask = (torch.from_numpy(a) for a in ragged.pad())
    again = units_of(padded, mask)
    assert again.offsets.tolist() == ragged.offsets.tolist() and again.values.tolist() == ragged.values.tolist()
