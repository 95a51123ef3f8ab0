"""The planner: every row once, budgets kept, groups together, little padding; packed = padded in loss and gradient."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.agents.models.tiny_lm import TinyConfig, tiny_causal_lm
from embodied_rft.data import Batch, Ragged
from embodied_rft.tokens import micro_batches, prefix, prefix_tree
from embodied_rft.tokens.decoder import Decoder
from embodied_rft.tokens.log_probs import Head, token_log_probs

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(lengths, st.floats(0, 50))
def test_buckets_hold_every_row_once(values, overhead):
    parts = prefix_tree.buckets(np.array(values), overhead=overhead)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(values)))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.floats(0, 20))
def test_buckets_are_optimal(values, overhead):
    """Against all ways to cut the sorted lengths."""
    ordered = sorted(values)
    best = min(
        sum(max(p) * len(p) + overhead for p in np.split(np.array(ordered), cuts))
        for k in range(len(values))
        for cuts in itertools.combinations(range(1, len(values)), k)
    )
    parts = prefix_tree.buckets(np.array(values), overhead=overhead)
    found = sum(max(values[i] for i in part) * len(part) + overhead for part in parts)
    assert found == pytest.approx(best)


def test_no_rows_no_buckets():
    assert prefix_tree.buckets(np.zeros(0, dtype=np.int64)) == []
    none = Ragged.of([], dtype=np.int64)
    assert micro_batches.plan_micro_batches(none, none, budget=10) == []
    assert (
        micro_batches.plan_within(none, none, most=10) == [] and micro_batches.plan_units(none.lengths, most=10) == []
    )


# Texts over two tokens, so that they share much: groups, chains and whole trees of prefixes.
texts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=14)


def cut_in_two(rows, seed):
    """Texts as prompts (not empty) and replies."""
    rng = np.random.default_rng(seed)
    cuts = [int(rng.integers(1, len(row) + 1)) for row in rows]
    prompts = Ragged.of([row[:cut] for row, cut in zip(rows, cuts, strict=True)], dtype=np.int64)
    return prompts, Ragged.of([row[cut:] for row, cut in zip(rows, cuts, strict=True)], dtype=np.int64)


@settings(deadline=None)
@given(texts, st.integers(0, 2**16), st.integers(1, 60), st.booleans())
def test_a_tree_holds_every_token_once(rows, seed, overhead, prune):
    """Against a dictionary of all beginnings; pruning changes what is shared, never what is computed."""
    sequences = Ragged.of(rows, dtype=np.int64)
    tree = prefix_tree.prefix_tree(sequences, overhead=overhead if prune else 0)
    beginnings = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    assert tree.distinct == len(beginnings)
    if not prune:
        assert tree.lengths.sum() == len(beginnings)
    for number, row in enumerate(rows):  # the way up from a row's last node spells the row
        node, spelled, depth = tree.last[number], [], None
        while node >= 0:
            own = sequences.row(tree.row[node])[tree.start[node] : tree.end[node]].tolist()
            depth = tree.start[node]
            spelled, node = own + spelled, tree.parent[node]
        assert depth == 0 and spelled[: len(row)] == row
    plan = prefix_tree.passes(tree, overhead=overhead)
    assert sorted(np.concatenate([one.nodes for one in plan]).tolist()) == list(range(len(tree.row)))
    for number, one in enumerate(plan):
        above = set(tree.parent[one.nodes].tolist())
        assert above == {-1} if one.after is None else (one.after < number and above <= set(plan[one.after].nodes))


def cost_of(sequences, rows):
    return len({tuple(sequences[i][: j + 1]) for i in rows for j in range(len(sequences[i]))})


@settings(deadline=None)
@given(texts, st.integers(0, 2**16), st.integers(1, 60))
def test_micro_batches(rows, seed, budget):
    prompts, replies = cut_in_two(rows, seed)
    sequences = [np.concatenate([p, r[:-1]]).tolist() for p, r in zip(prompts, replies, strict=True)]
    plan = micro_batches.plan_micro_batches(prompts, replies, budget=budget)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(rows)))
    assert all(cost_of(sequences, part) <= budget or len(part) == 1 for part in plan)
    if cost_of(sequences, range(len(rows))) <= budget:
        assert len(plan) == 1
    order = np.random.default_rng(seed).permutation(len(rows))  # the order of the rows changes nothing but their names
    again = micro_batches.plan_micro_batches(prompts.take(order), replies.take(order), budget=budget)
    spelled = [sorted(sequences[i] for i in part) for part in plan]
    assert [sorted(sequences[order[i]] for i in part) for part in again] == spelled


@settings(deadline=None)
@given(texts, st.integers(0, 2**16), st.integers(1, 60), st.integers(1, 4), st.booleans())
def test_padding_counts_and_atoms_hold(rows, seed, most, size, share):
    prompts, replies = cut_in_two(rows, seed)
    atoms = np.arange(len(rows)) // size
    plan = micro_batches.plan_within(prompts, replies, most=most, share=share, atoms=atoms)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(rows)))
    assert all(len(set(atoms[one]) & set(atoms[other])) == 0 for one, other in itertools.combinations(plan, 2))
    for part in plan:
        usage = prefix_tree.count_tokens(prompts.take(part), replies.take(part), share=share)
        assert usage.useful <= usage.computed
        assert usage.computed <= most or len(set(atoms[part])) == 1


@given(lengths, st.integers(1, 100), st.integers(1, 3))
def test_units_without_a_text(values, most, size):
    values, atoms = np.array(values), np.arange(len(values)) // size
    plan = micro_batches.plan_units(values, most=most, atoms=atoms)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(values)))
    assert all(len(part) * values[part].max() <= most or len(set(atoms[part])) == 1 for part in plan)
    assert all(len(set(atoms[one]) & set(atoms[other])) == 0 for one, other in itertools.combinations(plan, 2))


def test_a_group_is_cut_only_where_it_must_be():
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(12), 4)
    prompts = [rng.integers(5, 250, size=100) for _ in range(12)]
    rows = Ragged.of([prompts[k] for k in kind]), Ragged.of(list(rng.integers(5, 250, size=(48, 21))))
    plan = micro_batches.plan_micro_batches(*rows, budget=400)  # two groups of 180
    assert len(plan) == 6 and all(len(set(kind[part])) == 2 for part in plan)


def test_a_budget_of_nothing_is_refused():
    rows = Ragged.of([[1], [2]], dtype=np.int64)
    with pytest.raises(ValueError, match="budget"):
        micro_batches.plan_micro_batches(rows, rows, budget=0)


@given(st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=12))
def test_distinct_rows(values):
    first, kind = prefix_tree.distinct_rows(Ragged.of(values, dtype=np.int64))
    assert [values[first[k]] for k in kind] == values
    assert len(first) == len({tuple(v) for v in values})


def test_little_is_computed_for_nothing():
    """At least 0.95 of the computed tokens are useful on lengths like those of agents, groups kept together."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 250, size=int(n)) for n in rng.lognormal(6.0, 0.6, size=16)]
    replies = [rng.integers(5, 250, size=1 + int(n)) for n in rng.lognormal(4.5, 0.7, size=128)]
    kind = np.repeat(np.arange(16), 8)
    rows = Ragged.of([prompts[k] for k in kind]), Ragged.of(replies)
    usage = prefix_tree.count_tokens(*rows)
    assert usage.useful <= sum(map(len, prompts)) + sum(len(r) - 1 for r in replies)
    assert usage.useful / usage.computed >= 0.95
    parts = micro_batches.plan_within(*rows, most=8192)
    computed = sum(prefix_tree.count_tokens(*(r.take(part) for r in rows)).computed for part in parts)
    assert len(parts) > 2 and usage.useful / computed >= 0.95


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
            states = prefix.reply_states(Decoder(model.model), piece.trace["prompt"], replies, **options)
            log_prob, _ = token_log_probs(states, torch.from_numpy(replies.values), Head(model.lm_head.weight))
            credit = piece.notes["advantage"].repeat_interleave(torch.from_numpy(replies.lengths))
            loss = (log_prob * credit).sum() / piece.num_units
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters()])

    padded = step([batch], share=False, overhead=10**9)
    pieces = [batch.take(rows) for rows in micro_batches.plan_within(prompt, reply, most=200)]
    assert len(pieces) > 2 and sum(map(len, pieces)) == 24
    packed = step(pieces, overhead=4)
    assert packed[0] == pytest.approx(padded[0], abs=1e-5)
    assert (packed[1] - padded[1]).norm() < 1e-5 * padded[1].norm()
