"""Conversations with pictures through pool and buffer: what was read when a reply was drawn is what is scored."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import MARK, PAST, Field, Past, Ragged, is_picture
from embodied_rft.experience.collect import Collector, action_field
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.pools.pool import VectorPool
from embodied_rft.pools.singles import Singles
from embodied_rft.pools.text_spaces import AnyText
from tests.lab.draws import generator as rng
from tests.lab.helpers_vla import KINDS
from tests.lab.picture_talk import PictureTalk

SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "vision_size": 16}
HISTORIES = [{"turns": 0}, {"turns": 1, "first": False}, {"images": 1}, {"turns": 1, "images": 2}]
SPACE = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), "message": AnyText(99)})


def make(kind="qwen2_5_vl", seed=0, **options):
    spec = {"id": "language", "model": {"tiny_vlm": {**SMALL, "kind": kind}}, "max_new_tokens": 5, **options}
    return build_agent(spec, SPACE, AnyText(99), rng(seed))


def talk(agent, decisions=24, num_envs=3):
    """(a buffer of what was said to pictures in episodes of three turns, its rows)."""
    policy = agent.policy
    pool = VectorPool(Singles(PictureTalk, num_envs), purpose="training")
    shown = {k: Field((), "uint8", "images") if is_picture(f.shape, f.dtype) else f for k, f in pool.fields.items()}
    schema = Schema(shown, action_field(pool.action_space), dict(policy.trace_fields), units=None)
    buffer = Buffer(schema, 200, past=True)
    collector, draws = Collector(pool, run_seed=0, past=True, group_size=2), rng(1)
    rows = (
        collector.collect(lambda seen: policy.act(seen, rng=draws), decisions=decisions, version=1).write(buffer).rows
    )
    pool.close()
    return buffer, rows


def scored(policy, batch):
    return policy.log_prob(batch.observation, batch.action, batch.trace)[0]


def gradient(policy, batch, parts=None):
    """Of a weighted sum of all log-probabilities, the parts of a batch one after the other."""
    policy.zero_grad()
    weights = torch.linspace(-1, 1, len(batch))
    for rows in [np.arange(len(batch))] if parts is None else parts:
        part = batch.take(np.asarray(rows))
        (scored(policy, part).sum(1) * weights[torch.from_numpy(np.asarray(rows))]).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize(("kind", "history"), [*((k, {}) for k in KINDS), *((KINDS[0], h) for h in HISTORIES)], ids=str)
def test_what_comes_out_of_the_buffer_is_scored_as_it_was_drawn(kind, history):
    agent = make(kind, history=history)
    buffer, rows = talk(agent)
    batch = buffer.batch(rows)
    assert (batch.columns["step"] > 0).any()
    log_prob = scored(agent.policy, batch)
    assert torch.where(batch.mask, log_prob - batch.log_prob, 0.0).abs().max() < 1e-4
    alone = torch.cat([scored(agent.policy, batch.take(np.array([i])))[0].detach() for i in range(6)])
    together = torch.cat([log_prob[i][batch.mask[i]] for i in range(6)]).detach()
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)  # padded or packed with others


@pytest.mark.parametrize("kind", KINDS)
def test_shared_turns_and_micro_batches_have_the_gradient_of_the_dense_batch(kind):
    agent = make(kind)
    buffer, rows = talk(agent)
    batch = buffer.batch(rows)
    policy, dense = agent.policy, copy.deepcopy(agent).policy
    dense.config.share_prefix = False
    expected = gradient(dense, batch)
    policy.usage.computed = 0
    shared = gradient(policy, batch)
    assert (shared - expected).norm() < 1e-4 * expected.norm()
    pieces = policy.micro_batches(batch, 250)
    assert len(pieces) > 1 and sorted(np.concatenate(pieces)) == list(range(len(batch)))
    assert (gradient(policy, batch, pieces) - expected).norm() < 1e-4 * expected.norm()
    if kind != "paligemma":  # it reads a prompt in both directions: turns cannot share theirs
        assert policy.usage.computed / 2 < 0.8 * dense.usage.computed


def past_of(policy, turns):
    """A conversation of one row: [(picture, message, reply), ...], the last reply None."""
    *before, (picture, message, _) = turns
    replies = [policy.dialogue.reply(reply) for _, _, reply in before]
    observation = {"image": [[one] for one, _, _ in before], "message": [text for _, text, _ in before]}
    index = Ragged.of([np.arange(len(before))], np.int64)
    past = Past(index, observation, [r for _, _, r in before], {"reply": Ragged.of(replies, np.int64)})
    return {"image": picture[None], "message": [message], PAST: past}


def coloured(*levels):
    return [np.full((32, 32, 3), level, np.uint8) for level in levels]


def conversation(policy, pictures):
    said = [(picture, f"turn {i}", "rgbr"[i]) for i, picture in enumerate(pictures)]
    return past_of(policy, [*said[:-1], (*said[-1][:2], None)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_blanked_picture_of_any_turn_changes_what_is_said(kind):
    policy = make(kind).policy
    pictures = coloured(40, 90, 160, 230)
    trace = {"reply": Ragged.of([policy.dialogue.reply("r")], np.int64)}
    with torch.no_grad():
        plain = policy.log_prob(conversation(policy, pictures), ["r"], trace)[0]
        for turn in range(4):
            blanked = [np.zeros_like(p) if i == turn else p for i, p in enumerate(pictures)]
            other = policy.log_prob(conversation(policy, blanked), ["r"], trace)[0]
            assert (other - plain).abs().max() > 1e-5, turn


def seen(policy, pictures):
    """(pictures that are read, text of the conversation)."""
    ids = policy.prompt_ids(conversation(policy, pictures)).row(0)
    vocabulary = policy.vlm.model.get_input_embeddings().weight.shape[0]
    inside = ids >= vocabulary
    begins = inside & ~np.concatenate([[False], inside[:-1]])
    return int(begins.sum()), policy.tokenizer.decode(ids[~inside])


@pytest.mark.parametrize(
    ("history", "pictures", "turns"),
    [
        ({}, 4, (0, 1, 2, 3)),
        ({"turns": 1}, 3, (0, 2, 3)),
        ({"turns": 1, "first": False}, 2, (2, 3)),
        ({"turns": 0, "first": False}, 1, (3,)),
        ({"images": 2}, 2, (0, 1, 2, 3)),
        ({"turns": 1, "images": 1}, 1, (0, 2, 3)),
    ],
    ids=str,
)
def test_what_is_read_of_a_conversation(history, pictures, turns):
    count, text = seen(make(history=history).policy, coloured(40, 90, 160, 230))
    assert count == pictures
    assert [i for i in range(4) if f"turn {i}" in text] == list(turns)


def test_pictures_that_are_no_longer_seen_change_nothing():
    policy = make(history={"images": 2}).policy
    pictures = coloured(40, 90, 160, 230)
    trace = {"reply": Ragged.of([policy.dialogue.reply("r")], np.int64)}
    with torch.no_grad():
        plain = policy.log_prob(conversation(policy, pictures), ["r"], trace)[0]
        for turn, same in ((0, True), (1, True), (2, False)):
            other = [np.zeros_like(p) if i == turn else p for i, p in enumerate(pictures)]
            read = policy.log_prob(conversation(policy, other), ["r"], trace)[0]
            assert torch.equal(read, plain) == same


def test_a_first_message_of_which_nothing_is_read_begins_a_conversation():
    policy = make(history={"images": 1}, prompt="plain").policy
    said = past_of(policy, [(picture, "", reply) for picture, reply in zip(coloured(40, 90), ("r", None), strict=True)])
    ids, reply = policy.prompt_ids(said).row(0), policy.dialogue.reply("r")
    assert ids[: len(reply)].tolist() == reply.tolist() and len(ids) > len(reply)
    assert policy.act(said, rng=rng(1)).trace["reply"].lengths.all()


def test_values_of_turns_are_read_where_the_reply_begins():
    agent = make(value_head=True)
    torch.nn.init.normal_(agent.policy.head.weight, generator=rng(3))
    buffer, rows = talk(agent)
    batch = buffer.batch(rows)
    with torch.no_grad():
        value = agent.policy.value(batch.observation, batch.trace)
        units = agent.policy.unit_values(batch.observation, batch.action, batch.trace)
    assert units.shape == batch.mask.shape and (units[~batch.mask] == 0).all()
    torch.testing.assert_close(units[:, 0], value, atol=1e-4, rtol=1e-4)
    assert len(torch.unique(value.round(decimals=4))) > len(rows) // 2  # every turn has its own


def test_ppo_learns_from_conversations_in_micro_batches():
    """The same update, however the batch is cut."""
    weights = []
    for pieces in (None, 700):
        agent = make(value_head=True)
        buffer, _ = talk(agent)
        objective = build_objective({"id": "ppo", "num_epochs": 1, "batch_size": 40})
        objective.setup(agent, rng())
        config = LearnerConfig(learning_rate=1e-3, micro_units=pieces)
        metrics = Learner(agent, objective, config).learn(buffer, np.random.default_rng(0))
        weights.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]))
        assert metrics
    # Adam turns rounding of vanishing gradients into whole steps: compare where the gradient is not vanishing.
    assert ((weights[0] - weights[1]).abs() < 1e-4).float().mean() > 0.99


# --- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marks", "reply", "thought"),
    [
        ("tags", "<think>ice below</think><answer>left</answer>", "ice below"),
        ("tags", "<answer>left</answer>", ""),
        ("tags", "ice is belöw 🧊 so <answer>left</answer>", "ice is belöw 🧊 so"),
        ({"id": "json", "action": "do"}, '{"thought": "ice", "do": "left"}', "ice"),
        ("words", "ice below\nleft", "ice below"),
        ("words", "left", ""),
    ],
    ids=str,
)
def test_marks_are_those_of_the_parsers_spans(marks, reply, thought):
    policy = make(marks=marks).policy
    trace = policy.retrace({"message": ["now"]}, [reply, "up", reply])
    assert set(trace) == {"reply", "cut", MARK} == set(policy.trace_fields)
    for row in (0, 2):
        ids, mark = trace["reply"].row(row), trace[MARK].row(row)
        assert mark.dtype == np.int8 and len(mark) == len(ids) and mark[-1] == 1  # the end belongs to the answer
        assert policy.tokenizer.decode(ids[mark == 0]) == thought
        assert reply.startswith(policy.tokenizer.decode(ids[: int((mark == 0).argmax())])) or not thought
    assert trace[MARK].row(1).all()  # it says no answer in the form, or nothing but one


def test_marks_go_through_the_buffer_and_weigh_tokens():
    agent = make(marks="tags")
    buffer, rows = talk(agent)
    batch = buffer.batch(rows)
    assert (batch.trace[MARK].lengths == batch.trace["reply"].lengths).all()
    objective = build_objective({"id": "ppo", "unit_weights": {"thought": 0.5}, "batch_size": 24, "num_epochs": 1})
    objective.setup(agent, rng())
    Learner(agent, objective, LearnerConfig()).learn(buffer, np.random.default_rng(0))
    with pytest.raises(ValueError, match="unit_weights"):
        build_objective({"id": "ppo", "unit_weights": {"thought": 0.5}}).setup(make(), rng())
    with pytest.raises(ValueError, match="tags"):
        make(marks="tag")
