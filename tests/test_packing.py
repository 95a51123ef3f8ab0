"""The planner: every row once, budgets kept, groups together, little padding; packed = padded in loss and gradient."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft import packing, prefix
from embodied_rft.agents.tiny_lm import TinyConfig, tiny_causal_lm
from embodied_rft.data import Batch, Ragged
from embodied_rft.token_loss import Head, token_log_probs

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(lengths, st.floats(0, 50))
def test_buckets_hold_every_row_once(values, overhead):
    parts = packing.buckets(np.array(values), overhead=overhead)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(values)))
    assert packing.padded_tokens(np.array(values), parts) >= sum(values)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.floats(0, 20))
def test_buckets_are_optimal(values, overhead):
    """Against all ways to cut the sorted lengths."""
    ordered = sorted(values)
    best = min(
        sum(max(p) * len(p) + overhead for p in np.split(np.array(ordered), cuts))
        for k in range(len(values))
        for cuts in itertools.combinations(range(1, len(values)), k)
    )
    parts = packing.buckets(np.array(values), overhead=overhead)
    found = packing.padded_tokens(np.array(values), parts) + overhead * len(parts)
    assert found == pytest.approx(best)


def test_no_rows_no_buckets():
    assert packing.buckets(np.zeros(0, dtype=np.int64)) == []
    none = np.zeros(0, dtype=np.int64)
    assert packing.plan_micro_batches(none, none, none, budget=10) == []


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 6), st.integers(20, 400))
def test_micro_batches(seed, num_groups, group_size, budget):
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(num_groups), group_size))
    prompt = rng.integers(1, 60, size=num_groups)[group]
    reply = rng.integers(0, 60, size=len(group))
    cost = packing.Cost(quadratic=0.01)
    plan = packing.plan_micro_batches(prompt, reply, group, budget=budget, cost=cost)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(group)))

    def price(rows):
        _, first = np.unique(group[rows], return_index=True)
        return cost.prompt(prompt[rows][first]).sum() + cost.reply(prompt[rows], reply[rows]).sum()

    assert all(price(rows) <= budget * (1 + 1e-9) or len(rows) == 1 for rows in plan)
    for number in range(num_groups):
        members = np.flatnonzero(group == number)
        if price(members) <= budget:  # a group that fits is not torn
            assert sum(np.isin(members, rows).any() for rows in plan) == 1


def test_images_count():
    ones = np.ones(4, dtype=np.int64)
    few = packing.plan_micro_batches(ones, ones, np.arange(4), budget=100)
    many = packing.plan_micro_batches(ones, ones, np.arange(4), budget=100, patches=np.full(4, 90))
    assert len(few) == 1 and len(many) == 4
    with pytest.raises(ValueError, match="budget"):
        packing.plan_micro_batches(ones, ones, ones, budget=0)


def test_long_contexts_cost_more_than_their_tokens():
    cost = packing.Cost.of_width(256)
    assert cost.prompt(np.array(6 * 256)) == 1.5 * 6 * 256
    whole = cost.prompt(np.array(500))
    assert cost.prompt(np.array(300)) + cost.reply(np.array(300), np.array(200)) == pytest.approx(whole)


@given(st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=12))
def test_distinct_rows(values):
    first, kind = packing.distinct_rows(Ragged.of(values, dtype=np.int64))
    assert [values[first[k]] for k in kind] == values
    assert len(first) == len({tuple(v) for v in values})


def test_little_is_computed_for_nothing():
    """At least 0.95 of the computed tokens are useful on lengths like those of agents, groups kept together."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 250, size=int(n)) for n in rng.lognormal(6.0, 0.6, size=16)]
    replies = [rng.integers(5, 250, size=1 + int(n)) for n in rng.lognormal(4.5, 0.7, size=128)]
    kind = np.repeat(np.arange(16), 8)
    rows = Ragged.of([prompts[k] for k in kind]), Ragged.of(replies)
    useful = sum(map(len, prompts)) + sum(len(r) - 1 for r in replies)
    assert useful / prefix.computed_tokens(*rows) >= 0.95


def test_packed_equals_padded():
    """Loss and gradient of planned, bucketed, shared micro-batches against one padded batch."""
    config = TinyConfig(hidden_size=32)
    model, _ = tiny_causal_lm(config, rng=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    kind = rng.integers(5, size=24)
    texts = [rng.integers(5, 200, size=n) for n in (40, 3, 17, 60, 22)]
    prompt = Ragged.of([texts[k] for k in kind])
    reply = Ragged.of([rng.integers(5, 200, size=n) for n in rng.integers(0, 20, size=24)], dtype=np.int64)
    zeros = torch.zeros(24)
    batch = Batch(
        observation={},
        action=["x"] * 24,
        reward=zeros,
        discount=zeros,
        next_observation={},
        log_prob=torch.zeros(24, 19),
        mask=torch.from_numpy(reply.pad()[1]),
        trace={"prompt": prompt, "reply": reply},
        notes={"advantage": torch.randn(24, generator=torch.Generator().manual_seed(2))},
        num_decisions=24,
        num_units=len(reply.values),
    )

    def step(pieces, **options):
        model.zero_grad()
        total = 0.0
        for piece in pieces:
            replies = piece.trace["reply"]
            states = prefix.reply_states(model.model, piece.trace["prompt"], replies, num_layers=2, **options)
            log_prob, _ = token_log_probs(states, torch.from_numpy(replies.values), Head(model.lm_head.weight))
            credit = piece.notes["advantage"].repeat_interleave(torch.from_numpy(replies.lengths))
            loss = (log_prob * credit).sum() / piece.num_units
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters()])

    padded = step([batch], share=False, overhead=10**9)
    pieces = packing.split_by_cost(batch, budget=200)
    assert len(pieces) > 2 and sum(map(len, pieces)) == 24
    packed = step(pieces, overhead=4)
    assert packed[0] == pytest.approx(padded[0], abs=1e-5)
    assert (packed[1] - padded[1]).norm() < 1e-5 * padded[1].norm()
