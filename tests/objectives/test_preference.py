"""Pairs, preference losses and selected episodes: against loops, TRL's formulas and the algebra that must hold."""

import itertools
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.data import Ragged, Trajectory
from embodied_rft.learning import losses
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.imitation import Selection, select
from embodied_rft.objectives.preference import PairPlan, pair_batch
from tests.lab.spelling import CLASSES, Lab, schema

KINDS = st.sampled_from(["sigmoid", "squared", "hinge"])


def filled(returned, groups, *, steps=1, seeds=None):
    """Episodes of `steps` decisions with these sums of rewards; the reply of row i is [i % 4]."""
    buffer = Buffer(schema(("env", "success")), 600)
    for i, (value, group) in enumerate(zip(returned, groups, strict=True)):
        reward = np.zeros(steps, np.float32)
        reward[-1] = value
        buffer.add_trajectory(
            Trajectory(
                {"observation": np.eye(CLASSES, dtype=np.float32)[np.full(steps + 1, i % CLASSES)]},
                Ragged.of([[i % 4]] * steps, np.int64),
                reward,
                "terminated",
                log_prob=Ragged.of([[-1.0]] * steps, np.float32),
                rewards={"success": (reward > 0.5).astype(np.float32)},
                group=group,
                seed=-1 if seeds is None else seeds[i],
            )
        )
    return buffer


def drawn(buffer, **plan):
    plan = PairPlan(**{"batch_size": 64, **plan})
    batch = next(plan.batches(buffer, np.random.default_rng(0), 0))
    return batch


def sums(batch):
    """The return of each side of each pair, [P, 2]."""
    table = np.zeros((batch.num_pairs, 2))
    side = np.where(batch.columns["chosen"], 0, 1)
    np.add.at(table, (batch.columns["pair"], side), batch.reward.numpy())
    return table


# --- pairs -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.integers(1, 3), st.sampled_from(["group", "seed", "all"]), st.sampled_from([0.0, 0.3]))
@settings(max_examples=30, deadline=None)
def test_pairs_share_what_they_must_and_the_better_one_is_first(seed, steps, within, gap):
    rng = np.random.default_rng(seed)
    groups, returned = rng.integers(0, 4, 20), rng.integers(0, 4, 20) / 4
    buffer = filled([*returned, 0, 1], [*groups, 9, 9], steps=steps, seeds=[*rng.integers(0, 3, 20), 5, 5])
    batch = drawn(buffer, within=within, min_gap=gap)
    table = sums(batch)
    assert batch.num_pairs == 64 and (table[:, 0] > table[:, 1] + gap).all()
    assert len(batch) == 128 * steps and batch.columns["place"].max() == steps - 1
    if within != "all":
        column = batch.columns[within]
        for pair in range(64):
            assert len(set(column[batch.columns["pair"] == pair])) == 1


def test_random_pairs_reach_every_combination():
    buffer = filled([0.0, 0.5, 1.0, 0.5], [0, 0, 0, 1])
    batch = drawn(buffer, batch_size=300)
    rows = batch.rows.reshape(-1, 2)
    assert {tuple(r) for r in rows // 2} == {(1, 0), (2, 0), (2, 1)}
    extremes = drawn(buffer, batch_size=50, pairing="extremes")
    assert {tuple(r) for r in extremes.rows.reshape(-1, 2) // 2} == {(2, 0)}


def test_segments_are_pieces_of_episodes():
    buffer = filled([1.0, 0.0], [0, 0], steps=7)
    batch = drawn(buffer, segment=3, within="all", min_gap=-1.0)
    for pair in range(64):
        for side in (True, False):
            rows = batch.rows[(batch.columns["pair"] == pair) & (batch.columns["chosen"] == side)]
            assert len(rows) == 3 and (np.diff(rows) == 1).all() and (rows[0] % 8) % 3 == 0


def test_pairs_stay_together_in_micro_batches():
    buffer = filled([1.0, 0.0, 0.5, 0.2], [0, 0, 1, 1], steps=2)
    batch = drawn(buffer, batch_size=7)
    for size in (1, 4, 5, 9, 100):
        pieces = batch.split(size)
        assert np.array_equal(np.concatenate([p.rows for p in pieces]), batch.rows)
        assert all(p.num_pairs == 7 and len(p) % 4 == 0 and (len(p) <= size or len(p) == 4) for p in pieces)


@pytest.mark.parametrize(
    "returned, groups, message",
    [
        ([1.0, 0.0], [0, 1], "there is no pair"),
        ([1.0, 0.0], [-1, -1], "no pair"),
    ],
)
def test_without_pairs_it_says_what_to_do(returned, groups, message):
    with pytest.raises(ValueError, match=message):
        drawn(filled(returned, groups))


def test_equal_returns_teach_nothing_and_stop_nothing():
    plan = PairPlan(batch_size=4)
    assert not list(plan.batches(filled([1.0, 1.0], [0, 0]), np.random.default_rng(0), 1))
    endless = plan.batches(filled([1.0, 0.5], [0, 0]), np.random.default_rng(0), 1)
    assert len(list(itertools.islice(endless, 3))) == 3


# --- losses ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999), KINDS, st.floats(0.05, 2.0))
@settings(max_examples=30, deadline=None)
def test_swapping_a_pair_mirrors_the_loss(seed, kind, beta):
    margin = torch.from_numpy(np.random.default_rng(seed).standard_normal(8)).requires_grad_()
    value = losses.preference(margin, kind=kind, beta=beta)
    mirrored = losses.preference(-margin, kind=kind, beta=beta)
    if kind == "sigmoid":  # -log sigmoid(h) + log sigmoid(-h) = -h
        torch.testing.assert_close(value - mirrored, -beta * margin)
    half = losses.preference(margin, beta=beta, smoothing=0.499999)
    torch.testing.assert_close(half, losses.preference(-margin, beta=beta, smoothing=0.499999), atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(value.sum(), margin)
    below = margin.detach() < (0.5 / beta if kind == "squared" else 1 / beta)
    assert (gradient[below] < 0).all()  # what is preferred too little is preferred more


@pytest.mark.parametrize("kind, name", [("sigmoid", "sigmoid"), ("squared", "ipo"), ("hinge", "hinge")])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_equal_those_of_trl(kind, name, smoothing, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    chosen, rejected = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    fake = types.SimpleNamespace(
        alpha=0.0, beta=0.3, label_smoothing=smoothing, loss_type=name, accelerator=types.SimpleNamespace(device="cpu")
    )
    expected = CPOTrainer.cpo_loss(fake, chosen, rejected)[0]
    given_ = losses.preference(
        chosen - rejected, kind=kind, beta=0.3, smoothing=smoothing if kind == "sigmoid" else 0.0
    )
    torch.testing.assert_close(given_, expected)


def prepared(spec, *, episodes=96, turns=1):
    """(lab, objective, a batch of 12 pairs) of a policy that has moved away from the reference."""
    lab = Lab(turns=turns)
    objective = lab.objective({"batch_size": 12, **spec})
    lab.collect(episodes)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    with torch.no_grad():
        for p in lab.agent.policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    batch = next(objective.reading.batches(lab.buffer, lab.numbers, 1))
    return lab, objective, batch


SPECS = {
    "dpo": {"id": "dpo", "beta": 0.5, "smoothing": 0.1},
    "ipo": {"id": "ipo"},
    "simpo": {"id": "simpo", "beta": 2.0, "margin": 0.8},
    "slic": {"id": "slic", "chosen_weight": 0.2},
    "cpl": {"id": "cpl", "segment": 2, "beta": 0.4, "gamma": 0.9},
}


def papers(name, chosen, rejected, units, likely):
    """What each paper writes of one pair, from the scores of both sides."""
    logsigmoid = torch.nn.functional.logsigmoid
    if name == "dpo":  # Rafailov et al. 2023, eq. 7, with Mitchell's label smoothing
        h = 0.5 * (chosen - rejected)
        return -0.9 * logsigmoid(h) - 0.1 * logsigmoid(-h)
    if name == "ipo":  # Azar et al. 2023, eq. 17
        return (chosen - rejected - 1 / (2 * 0.1)) ** 2
    if name == "simpo":  # Meng et al. 2024, eq. 6: means over all tokens of a side
        return -logsigmoid(2.0 * chosen / units[0] - 2.0 * rejected / units[1] - 0.8)
    if name == "slic":  # Zhao et al. 2023, eq. 3
        return (1 - chosen + rejected).clamp_min(0) - 0.2 * likely
    both = torch.stack([0.4 * chosen, 0.5 * 0.4 * rejected])  # Hejna et al. 2023, eq. 8
    return -(both[0] - both.logsumexp(0))


@pytest.mark.parametrize("name", SPECS)
def test_one_update_equals_the_papers_equations(name):
    """Loss and gradient from a loop over the decisions of each pair; episodes have two turns."""
    lab, objective, batch = prepared(SPECS[name], turns=2)
    policy, decay = lab.agent.policy, 0.9 if name == "cpl" else 1.0
    loss, metrics = objective.policy_loss(lab.agent, batch, lab.rng)
    total = 0.0
    for pair in range(12):
        score, units, likely = [0.0, 0.0], [0, 0], 0.0
        for b in np.flatnonzero(batch.columns["pair"] == pair):
            one = batch.take(np.array([b]))
            own = policy.log_prob(one.observation, one.action, {})[0].sum()
            against = 0.0
            if name in ("dpo", "ipo"):
                reference = lab.agent.parts["reference"]
                against = reference.log_prob(one.observation, one.action, {})[0].sum().detach()
            side = int(not batch.columns["chosen"][b])
            score[side] = score[side] + decay ** int(batch.columns["place"][b]) * (own - against)
            units[side] += int(one.mask.sum())
            likely = likely + own * (side == 0)
        total = total + papers(name, *score, units, likely) / 12
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    parameters = list(policy.parameters())
    for one, other in zip(*(torch.autograd.grad(x, parameters) for x in (loss, total)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert 0 <= float(metrics["preference/accuracy"]) <= 1


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [1, 10])
def test_micro_batches_add_up_to_the_batch(name, size):
    weights = []
    for micro_batch in (None, size):
        lab, objective, batch = prepared(SPECS[name], turns=2)
        learner = Learner(lab.agent, objective, LearnerConfig(micro_batch=micro_batch))
        learner.update(batch, lab.rng)
        weights.append(learner.optimizers["policy"].first)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_margin_starts_at_zero_and_swapping_all_pairs_turns_it_round():
    lab = Lab()
    objective = lab.objective({"id": "dpo", "batch_size": 12})
    lab.collect(96)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    batch = next(objective.reading.batches(lab.buffer, lab.numbers, 1))
    loss, metrics = objective.policy_loss(lab.agent, batch, lab.rng)
    assert (
        float(loss.detach()) == pytest.approx(np.log(2), abs=1e-5) and abs(float(metrics["preference/margin"])) < 1e-5
    )
    rows = batch.rows.reshape(-1, 2)
    swapped = pair_batch(lab.buffer, [r[1:] for r in rows], [r[:1] for r in rows])
    parameters = list(lab.agent.policy.parameters())
    pairs = (torch.autograd.grad(objective.policy_loss(lab.agent, b, lab.rng)[0], parameters) for b in (batch, swapped))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, -other, atol=1e-6, rtol=1e-4)


def test_experience_that_came_later_is_scored_by_the_reference_too():
    lab, objective, batch = prepared({"id": "dpo"})
    noted, _ = objective.policy_loss(lab.agent, batch, lab.rng)
    batch.notes["reference_score"] = torch.full((len(batch),), torch.nan)
    torch.testing.assert_close(objective.policy_loss(lab.agent, batch, lab.rng)[0], noted)


def test_pairs_that_somebody_else_labelled():
    buffer = Buffer(schema(), 100)
    for group, (good, bad) in enumerate([([1, 1, 3], [3]), ([0, 3], [2, 2, 2])]):
        for reply, reward in ((good, 1.0), (bad, 0.0)):
            shown = {"observation": np.eye(CLASSES, dtype=np.float32)[[group, group]]}
            reward = np.full(1, reward, np.float32)
            buffer.add_trajectory(Trajectory(shown, Ragged.of([reply], np.int64), reward, "terminated", group=group))
    lab = Lab()
    lab.buffer = buffer
    lab.objective({"id": "dpo", "batch_size": 8}, learning_rate=1e-2)
    metrics = lab.learner.learn(buffer, lab.numbers, num_updates=60)
    assert metrics["preference/accuracy"] > 0.9 and metrics["preference/margin"] > 1


# --- selected episodes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selection, expected",
    [
        ({"best_of": 1}, [1, 4, 5]),
        ({"best_of": 2}, [0, 1, 3, 4, 5]),
        ({"min_return": 0.5}, [1, 3, 4]),
        ({"min_return": 0.5, "best_of": 1}, [1, 4]),
        ({"newest": 3}, [3, 4, 5]),
        ({"newest": 3, "best_of": 1}, [4, 5]),
        ({"successes": True}, [1, 4]),
    ],
)
def test_selection(selection, expected):
    buffer = filled([0.2, 0.9, 0.1, 0.5, 0.8, 0.0], [0, 0, 0, 1, 1, 2], steps=2)
    rows = select(buffer, Selection(**selection))
    assert rows.tolist() == [r for e in expected for r in (3 * e, 3 * e + 1)]


def test_a_selection_of_nothing_says_so():
    with pytest.raises(ValueError, match="nothing of 2 episodes"):
        select(filled([0.1, 0.2], [0, 0]), Selection(min_return=1.0))
    with pytest.raises(ValueError, match="no reward stream 'success'"):
        select(Lab_with_one_episode().buffer, Selection(successes=True))


def Lab_with_one_episode():
    lab = Lab()
    lab.objective("raft")
    lab.collect(8)
    return lab


def test_only_selected_decisions_are_read():
    buffer = filled([0.2, 0.9, 0.1, 0.5, 0.8, 0.0], [0, 0, 0, 1, 1, 2], steps=2)
    plan = build_objective({"id": "raft", "batch_size": 40}).reading
    batches = list(itertools.islice(plan.batches(buffer, np.random.default_rng(0), 1), 5))
    assert len(batches) == 5 and set(np.concatenate([b.rows for b in batches])) == {3, 4, 12, 13, 15, 16}


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"id": "dpo", "beta": 0.0}, "positive"),
        ({"id": "ipo", "smoothing": 0.1}, "only with loss"),
        ({"id": "dpo", "smoothing": 0.5}, "0.5"),
        ({"id": "dpo", "within": "groups"}, "group"),
        ({"id": "raft", "offline_share": 1.0}, "no effect"),
        ({"id": "bc", "selection": {"best_off": 1}}, "best_off"),
    ],
)
def test_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        build_objective(spec)
