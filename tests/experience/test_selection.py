"""Collecting whole episodes, reading ahead, shrinking gradients: what on-policy learning asked of its surroundings."""

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import embodied_rft.envs  # noqa: F401
from embodied_rft import cli
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.plans import Fresh, read_ahead
from embodied_rft.data import Decisions, Field
from embodied_rft.learning.optimizer import AdamW, gradient_norms
from embodied_rft.objectives.common import whole_groups
from embodied_rft.objectives.imitation import Selection, select
from embodied_rft.registry import find
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.train import train

RECIPE = """
name: small
env: {id: embodied_rft/TextSum-v0, num_envs: 8}
agent: {id: language, model: {tiny: {hidden_size: 16, num_layers: 1}}, prompt: plain, max_new_tokens: 2}
buffer: {capacity: 200}
stages: [%s]
"""


def run(tmp_path, stage):
    (tmp_path / "small.yaml").write_text(RECIPE % stage)
    return train(load_recipe(tmp_path / "small.yaml"), tmp_path / "run", quiet=True, report=False)


def test_collect_stores_whole_groups_of_the_current_policy(tmp_path):
    session = run(tmp_path, "collect: {episodes: 20, group_size: 4}")
    columns = session.buffer.columns(session.buffer.rows())
    assert np.bincount(columns["group"]).tolist() == [4] * 5 and (columns["version"] == 1).all()
    assert all(len(set(columns["seed"][columns["group"] == g])) == 1 for g in range(5))
    assert session.counters["decisions"] == 20 and session.learner is None


def test_finetune_by_whole_episodes(tmp_path):
    stage = "finetune: {objective: {id: rloo, batch_size: 8}, decisions: 32, episodes_per_iteration: 16, group_size: 4}"
    session = run(tmp_path, stage)
    columns = session.buffer.columns(session.buffer.rows())
    assert np.bincount(columns["group"]).tolist() == [4] * 8
    assert "credit/dead_groups" in (tmp_path / "run" / "metrics.jsonl").read_text()  # dropped and counted


def test_demonstrations_from_a_file(tmp_path):
    """`erft demos` writes what `load` reads, single steps and chunks, with the options of the environment."""
    env, file = "embodied_rft/FetchReach-v0", tmp_path / "demos.safetensors"
    with pytest.raises(SystemExit):
        cli.main(["demos", env, "--episodes", "3", "max_episode_steps=5", "--out", str(file)])
    steps = 3 * 5
    for agent, rows in (("{id: gaussian}", steps), ("{id: gaussian, horizon: 2}", steps)):  # every step starts a chunk
        recipe = f"name: x\nenv: {{id: {env}, num_envs: 2}}\nagent: {agent}\nbuffer: {{capacity: 60}}\n"
        path = tmp_path / f"{len(agent)}.yaml"
        path.write_text(recipe + f"stages: [load: {{file: {file}}}]\n")
        session = train(load_recipe(path), tmp_path / f"run{len(agent)}", quiet=True, report=False)
        columns = session.buffer.columns(session.buffer.rows())
        assert len(columns["source"]) == rows and (columns["source"] == 0).all()


def test_episodes_and_overlap_exclude_each_other(tmp_path):
    stage = "finetune: {objective: sac, episodes_per_iteration: 4, overlap: true}"
    with pytest.raises(ValueError, match="no effect with overlap"):
        run(tmp_path, stage)


@pytest.mark.parametrize("noise, right", [(0.0, 1.0), (1.0, 0.0)])
def test_the_oracle_of_sums(noise, right):
    oracle = find("demonstrator", "embodied_rft/TextSum-v0")(noise=noise)
    replies = oracle.act({"prompt": ["3+4=", "9+9="]}, np.random.default_rng(0))
    assert np.mean([r == a for r, a in zip(replies, ["7", "18"], strict=True)]) == right
    with pytest.raises(ValueError, match="share of wrong replies"):
        find("demonstrator", "text_sum")(noise=1.5)


def filled(count=60):
    buffer = Buffer(Schema({"state": Field((2,))}, Field((1,))), 200)
    streams, state = np.arange(count), {"state": np.arange(2.0 * count).reshape(count, 2)}
    decisions = Decisions(np.ones((count, 1)), np.zeros((count, 1)))
    reward, ended = np.arange(count, dtype=np.float32), np.ones(count, bool)
    buffer.add(streams, state, decisions, reward, ended, ~ended, group=streams // 4)
    buffer.close(streams, state)
    buffer.annotate("live", buffer.rows(), (np.arange(count) % 8 < 4).astype(np.float32))
    return buffer


@pytest.mark.parametrize("rows", [1, 7, 20, 1000])
def test_reading_ahead_changes_nothing(rows):
    buffer = filled()
    order = np.random.default_rng(0).permutation(buffer.rows())
    parts = np.split(order, [5, 12, 13, 40])
    for part, ahead in zip(parts, read_ahead(buffer, parts, rows=rows, next_observation=False), strict=True):
        alone = buffer.batch(part, next_observation=False)
        assert np.array_equal(ahead.rows, part)
        assert (ahead.num_decisions, ahead.num_units) == (alone.num_decisions, alone.num_units)
        for name in ("reward", "discount", "log_prob", "mask", "action"):
            assert torch.equal(getattr(ahead, name), getattr(alone, name))
        assert torch.equal(ahead.observation["state"], alone.observation["state"])
        assert torch.equal(ahead.notes["live"], alone.notes["live"])


def test_fresh_leaves_out_what_a_note_says():
    buffer = filled()
    plan = Fresh(batch_size=8, only="live", whole_groups=True)
    read = np.concatenate([b.columns["group"] for b in plan.batches(buffer, np.random.default_rng(0), 0)])
    assert set(read) == set(range(0, 15, 2)) and len(read) == 32
    assert not list(Fresh(min_groups=9, only="live").batches(buffer, np.random.default_rng(0), 0))
    assert list(Fresh(min_groups=8, only="live").batches(buffer, np.random.default_rng(0), 0))
    assert not list(Fresh(only="never written").batches(buffer, np.random.default_rng(0), 0))


def test_shrinking_a_gradient_is_clipping_it():
    def stepped(clip):
        net = nn.Linear(3, 2)
        with torch.no_grad():
            net.weight.fill_(0.1)
            net.bias.zero_()
        ours = AdamW(list(net.parameters()), learning_rate=0.1)
        for i in range(3):
            (net(torch.full((4, 3), 1.0 + i)).square().sum() * 50).backward()
            clip(ours, net)
            ours.clear()
        return torch.cat([net.weight.flatten(), net.bias]).detach()

    def ours(optimizer, net):
        (norm,) = gradient_norms([optimizer])
        optimizer.step(norm / 0.5)

    def theirs(optimizer, net):
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()

    torch.testing.assert_close(stepped(ours), stepped(theirs))


# --- successes, in a run ---------------------------------------------------------------------------------------------


def test_successes_are_found_beside_demonstrations(tmp_path):
    """iRe-VLA's data: both demonstrations and online episodes, those of them that ended in success."""
    stages = [
        {"demonstrate": {"episodes": 8, "noise": 0.9}},
        {"collect": {"episodes": 8}},
        {"pretrain": {"objective": {"id": "bc", "batch_size": 8, "selection": {"successes": True}}, "updates": 1}},
    ]
    for horizon in (1, 2):
        agent = {"id": "flow", "num_steps": 2, "width": 16, "horizon": horizon}
        env = {"id": "embodied_rft/FetchReach-v0", "num_envs": 8, "options": {"num_threads": 1}}
        recipe = {
            "name": "s",
            "env": env,
            "agent": agent,
            "stages": stages,
            "buffer": {"capacity": 2_000, "success": True},
        }
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(recipe))
        session = train(load_recipe(tmp_path / "s.yaml"), tmp_path / f"run{horizon}", quiet=True, report=False)
        shown = [r["metrics"] for r in session.records]
        # a demonstration is cut into chunks from each of its first `horizon` steps on
        counted = 8 * (horizon * shown[0]["success of the demonstrations"] + shown[1]["success"])
        episodes = list(session.buffer.trajectories())
        assert sum(e.success for e in episodes) == counted > 0
        rows = select(session.buffer, Selection(successes=True))
        assert len(rows) == sum(len(e) for e in episodes if e.success) < len(session.buffer.rows())
        for e in episodes:
            assert not e.rewards["success"][:-1].any()  # told by the last decision


def test_without_the_option_success_is_not_kept(tmp_path):
    recipe = {
        "name": "s",
        "env": {"id": "embodied_rft/FetchReach-v0", "num_envs": 4, "options": {"num_threads": 1}},
        "agent": "gaussian",
        "buffer": {"capacity": 2_000},
        "stages": [
            {"demonstrate": {"episodes": 4}},
            {"pretrain": {"objective": {"id": "bc", "selection": {"successes": True}}, "updates": 1}},
        ],
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=r"set buffer\.success"):
        train(load_recipe(tmp_path / "s.yaml"), tmp_path / "run", quiet=True, report=False)


@pytest.mark.parametrize(
    ("groups", "returns", "kept"),
    [
        ([-1, -1, -1, -1], [1.0, 4.0, 2.0, 3.0], [1.0, 4.0, 2.0, 3.0]),  # of a file: nobody's siblings
        ([0, 0, 1, 1], [1.0, 4.0, 2.0, 3.0], [4.0, 3.0]),
        ([0, -1, 0, -1], [1.0, 0.0, 2.0, 3.0], [0.0, 2.0, 3.0]),
    ],
)
def test_the_best_of_each_group_and_whoever_has_none(groups, returns, kept):
    buffer = Buffer(Schema({"state": Field((1,))}, Field((1,))), 20)
    for group, returned in zip(groups, returns, strict=True):
        one = {"state": np.zeros((1, 1))}
        buffer.add(
            np.array([0]), one, Decisions(np.zeros((1, 1)), np.zeros((1, 1))), [returned], True, False, group=group
        )
        buffer.close(np.array([0]), one)
    rows = select(buffer, Selection(best_of=1))
    assert buffer.batch(rows).reward.tolist() == kept


def test_group_credit_sees_whole_episodes_of_whole_groups_only():
    """Two siblings each: whole, one cut, one still running, one whose beginning is gone; and two without a group."""
    buffer = Buffer(Schema({"state": Field((1,))}, Field((1,))), 100)
    one = {"state": np.zeros((1, 1))}

    def episode(group, *, first=0, last="terminated"):
        stream = np.array([group])
        for step in range(first, 3):
            end = (step == 2 and last == "terminated", step == 2 and last == "truncated")
            decision = Decisions(np.zeros((1, 1)), np.zeros((1, 1)))
            buffer.add(stream, one, decision, [1.0], *end, group=-1 if group == 4 else group, step=step)
        (buffer.peek if last == "running" else buffer.close)(stream, one)

    for group, other in enumerate([{"last": "truncated"}, {"last": "cut"}, {"last": "running"}, {"first": 1}, {}]):
        episode(group)
        episode(group, **other)
    segments = buffer.segments(buffer.rows())
    whole = whole_groups(buffer, segments)
    assert len(segments) == 10
    assert [buffer.columns(run)["group"].tolist() for run in whole] == [[0] * 3] * 2 + [[-1] * 3] * 2
    assert whole_groups(buffer, []) == []
