"""Chunk pools: a chunk is its steps one by one; queues resume exactly; data is cut as the pool would record it."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass

from embodied_rft import registry
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Field, Trajectory
from embodied_rft.experience.collect import Collector
from embodied_rft.experience.recut import action_windows, chunk_trajectories
from embodied_rft.learning.agent import build_agent, wrap_policy
from embodied_rft.learning.losses import mean_where
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.objectives.common import imitation
from embodied_rft.options import STRICT
from embodied_rft.policy import Policy, build_policy
from embodied_rft.pools.chunks import BASE_ACTION, Chunk, ChunkBox, ChunkPool, QueuedPool
from embodied_rft.pools.pool import make_pool
from embodied_rft.pools.protocol import StepResult
from embodied_rft.testing.check_policy import check_policy
from tests.lab import toys  # noqa: F401  registers Corridor-v0
from tests.lab.draws import generator
from tests.lab.point import PointReach

BASE = {"id": "diffusion", "horizon": 4, "execute": 3, "denoising_steps": 4, "width": 32}
SEEDS = np.array([3, 4, 5, 6])


def reach(num_envs=4, **options):
    return PointReach(num_envs, **{"reward": "dense", "num_steps": 7, **options})


def chunks(pool, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.uniform(-1, 1, (pool.num_envs, *pool.action_space.shape)).astype(np.float32) for _ in range(steps)]


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


# --- ChunkPool ---------------------------------------------------------------------------------------------------


def test_a_chunk_is_its_steps():
    pool, single = ChunkPool(reach(), horizon=4, execute=3), reach()
    same(pool.reset(SEEDS), single.reset(SEEDS))
    action = chunks(pool, 1)[0]
    result = pool.step(action)
    expected = np.zeros(4)
    for index in range(3):  # the fourth is predicted, not executed
        last = single.step(action.reshape(4, 4, 2)[:, index])
        expected += last.reward
    np.testing.assert_allclose(result.reward, expected, rtol=1e-6)
    same(result.observation, last.observation)
    same(pool.observation, last.observation)
    assert result.info["env_steps"].tolist() == [3] * 4 and result.valid.all()
    assert result.reward.dtype == np.float32


def test_a_chunk_stops_where_its_episode_ends():
    pool = ChunkPool(reach(), horizon=4)
    pool.reset(SEEDS)
    first, second = chunks(pool, 2)
    assert not pool.step(first).truncated.any()
    result = pool.step(second)  # steps 5, 6, 7: the time limit
    assert result.truncated.all() and not result.terminated.any()
    assert result.info["env_steps"].tolist() == [3] * 4


def test_ends_inside_a_chunk_keep_reward_success_and_observation():
    """One environment reaches its goal in the middle of a chunk; the others go on."""
    pool, single = ChunkPool(reach(reward="sparse", num_steps=20), horizon=6), reach(reward="sparse", num_steps=20)
    start = pool.reset(SEEDS)
    single.reset(SEEDS)
    to_goal = np.zeros((4, 6, 2), np.float32)
    to_goal[0] = np.clip(start["observation"][0, 2:] / 0.2 / 4, -1, 1)  # arrives before the sixth step
    result = pool.step(to_goal.reshape(4, -1))
    steps = [single.step(to_goal[:, i]) for i in range(6)]
    arrived = next(i for i, s in enumerate(steps) if s.terminated[0])
    assert arrived < 5
    assert result.terminated.tolist() == [True, False, False, False]
    assert result.info["success"].tolist() == [True, False, False, False]
    assert result.info["env_steps"].tolist() == [arrived + 1, 6, 6, 6]
    assert result.reward.tolist() == [1, 0, 0, 0]
    np.testing.assert_array_equal(result.observation["observation"][0], steps[arrived].observation["observation"][0])


class Faulty(PointReach):
    """Its second environment breaks at its second step."""

    def step(self, action):
        result = super().step(action)
        broken = np.array([False, True]) & (self.elapsed == 2)
        return StepResult(
            result.observation, result.reward, result.terminated & ~broken, broken, result.info, result.valid & ~broken
        )


def test_a_chunk_that_breaks_is_invalid():
    pool = ChunkPool(Faulty(2, reward="dense"), horizon=4)
    pool.reset(SEEDS[:2])
    result = pool.step(chunks(pool, 1)[0])
    assert result.valid.tolist() == [True, False] and result.truncated.tolist() == [False, True]
    assert result.info["env_steps"].tolist() == [4, 1]


def test_over_a_real_pool_idle_environments_stay_as_they_are():
    pool = ChunkPool(make_pool("tests.lab.helpers_envs:Moody-v0", 3, kind="sync"), horizon=5)
    pool.reset(np.array([1, 2, 3]))
    actions = chunks(pool, 3)
    first, second = pool.step(actions[0]), pool.step(actions[1])
    assert not first.truncated.any() and second.truncated.all()  # 8 steps
    assert second.info["env_steps"].tolist() == [3] * 3
    held = pool.reset(np.array([7, 0, 0]), np.array([True, False, False]))
    result = pool.step(actions[2])
    assert result.valid.tolist() == [True, False, False]
    np.testing.assert_array_equal(result.observation["state"][1:], held["state"][1:])
    assert result.info["env_steps"].tolist() == [5, 0, 0]
    pool.close()


@pytest.mark.parametrize("done", [0, 1, 2])
def test_chunk_pool_resumes_bit_for_bit(done):
    def fresh():
        return ChunkPool(make_pool("tests.lab.helpers_envs:Moody-v0", 4, kind="sync"), horizon=3, execute=2)

    whole, resumed = fresh(), fresh()
    whole.reset(SEEDS)
    actions = chunks(whole, 4)
    for action in actions[:done]:
        whole.step(action)
    assert whole.can_save
    resumed.reset(SEEDS + 10)
    resumed.set_state(whole.get_state())
    for action in actions[done:]:
        a, b = whole.step(action), resumed.step(action)
        same(a.observation, b.observation)
        np.testing.assert_array_equal(a.reward, b.reward)


def test_collector_and_buffer_take_chunks_as_decisions():
    pool = ChunkPool(reach(), horizon=4)
    policy = build_policy(BASE | {"execute": 4}, pool.observation_space, pool.action_space, generator())
    schema = Schema(
        observation=dict(pool.fields), action=pool.action_field, trace=policy.trace_fields, units=policy.num_units
    )
    buffer = Buffer(schema, 200)
    rng = generator()
    Collector(pool, run_seed=0).collect(lambda o: policy.act(o, rng=rng), episodes=6).write(buffer)
    trajectories = list(buffer.trajectories())
    assert [len(t) for t in trajectories] == [2] * 6  # 7 steps in chunks of 4
    batch = buffer.batch(buffer.rows())
    log_prob, _ = policy.log_prob(batch.observation, batch.action, batch.trace)
    np.testing.assert_allclose(log_prob.detach().numpy(), batch.log_prob.numpy(), atol=1e-5)


def test_chunk_box_and_errors():
    box = ChunkBox(gym.spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 2.0]), dtype=np.float64), horizon=3)
    assert box.shape == (6,) and box.high.tolist() == [1, 2, 1, 2, 1, 2] and box.step_space.shape == (2,)
    with pytest.raises(ValueError, match="1 <= execute <= horizon"):
        ChunkPool(reach(), horizon=4, execute=5)
    with pytest.raises(ValueError, match="Box"):
        ChunkBox(gym.spaces.Discrete(3), horizon=2)
    with pytest.raises(ValueError, match=r"expected \(4, 8\)"):
        ChunkPool(reach(), horizon=4).step(np.zeros((4, 2)))


@pytest.mark.parametrize(
    ("spec", "chunk", "kind"),
    [
        (BASE, Chunk(4, 3), ChunkPool),
        ({"id": "steering", "base": BASE}, Chunk(4, 3), ChunkPool),
        ({"id": "residual", "base": BASE}, Chunk(4, 3), ChunkPool),
        ({"id": "gaussian"}, Chunk(), PointReach),
        ({"id": "gaussian", "horizon": 2}, Chunk(2, 2), ChunkPool),
        ({"id": "queued", "base": BASE}, Chunk(), QueuedPool),
        ({"id": "residual", "base": {"id": "queued", "base": BASE}}, Chunk(), QueuedPool),
    ],
)
def test_a_policy_says_which_pool_it_needs(spec, chunk, kind):
    pool = reach()
    policy = build_policy(spec, pool.observation_space, pool.action_space, generator())
    assert policy.chunk == chunk
    assert type(policy.fit_pool(pool)) is kind


def test_an_option_called_horizon_alone_makes_no_chunks(monkeypatch):
    class Looks(Policy):
        @dataclass(config=STRICT, kw_only=True)
        class Config:
            horizon: int = 5  # how far back it looks

        def __init__(self, config, **spaces):
            super().__init__()

    monkeypatch.setitem(registry._tables["agent"], "looks", Looks)
    pool = reach()
    policy = build_policy({"id": "looks"}, pool.observation_space, pool.action_space, generator())
    assert policy.chunk == Chunk() and policy.fit_pool(pool) is pool


# --- QueuedPool and the residual on it -----------------------------------------------------------------------------


class Counting:
    """Plans of 3 steps: the planned action is (how often it was asked for this environment's x, step of the plan)."""

    execute = 3

    def __init__(self):
        self.asked = []

    def plan(self, observation, *, rng):
        self.asked.append(len(observation["observation"]))
        first = observation["observation"][:, :1]
        steps = np.arange(3, dtype=np.float32)[None, :, None].repeat(len(first), 0)
        return np.concatenate([first[:, None].repeat(3, 1), steps], 2)


def test_queue_shows_the_plan_step_by_step():
    planner = Counting()
    pool = QueuedPool(reach(num_steps=50), planner)
    seen = [pool.reset(SEEDS)]
    for _ in range(4):
        seen.append(pool.step(np.full((4, 2), 0.1, np.float32)).observation)
    assert [o[BASE_ACTION][0, 1] for o in seen] == [0, 1, 2, 0, 1]
    for index, origin in ((1, 0), (2, 0), (3, 3), (4, 3)):  # planned from the observation at the plan's start
        np.testing.assert_array_equal(seen[index][BASE_ACTION][:, 0], seen[origin]["observation"][:, 0])
    mask = np.array([False, True, False, False])
    after = pool.reset(SEEDS + 7, mask)
    assert after[BASE_ACTION][:, 1].tolist() == [1, 0, 1, 1]  # only the reset environment has a new plan
    assert planner.asked == [4, 4, 1]
    same(pool.observation, after)


def test_an_environment_whose_step_was_invalid_keeps_its_plan():
    class Places(Counting):
        def plan(self, observation, *, rng):
            return super().plan(observation, rng=rng)[..., 1:]

    pool = QueuedPool(make_pool("Corridor-v0", 2, kind="sync", options={"fails": (5,)}), Places())
    pool.reset(np.array([5, 6]))
    result = pool.step(np.zeros((2, 1), np.float32))
    assert result.valid.tolist() == [False, True]
    assert result.observation[BASE_ACTION].tolist() == [[0], [1]]


@pytest.mark.parametrize("greedy", [False, True])
def test_plans_are_what_the_base_decides(greedy):
    space, rows = gym.spaces.Box(-1, 1, (4,)), {"observation": np.zeros((3, 4), np.float32)}
    spec = {"id": "queued", "base": BASE, "greedy": greedy}
    policy = build_policy(spec, space, gym.spaces.Box(-1, 1, (2,)), generator())
    taken = policy.base.act(rows, greedy=greedy, rng=generator(1)).action
    planned = policy.plan(rows, rng=generator(1))
    assert np.array_equal(planned, taken.reshape(3, -1, 2)[:, : policy.execute])


def queued_pool(policy, num_envs=4):
    inner = make_pool("tests.lab.helpers_envs:Moody-v0", num_envs, kind="sync")
    return QueuedPool(inner, policy.planner)


MOODY = {"keys": ["state"]}
QUEUED = {"id": "queued", "base": {**BASE, **MOODY}, "greedy": False}
RESIDUAL = {"id": "residual", "base": QUEUED, "hidden": [32, 32], **MOODY}


def moody_policy(spec):
    pool = make_pool("tests.lab.helpers_envs:Moody-v0", 1, kind="sync")
    spaces = pool.observation_space, pool.action_space
    pool.close()
    return build_policy(spec, *spaces, generator())


@pytest.mark.parametrize("done", [0, 2, 5])
def test_queued_pool_resumes_bit_for_bit(done):
    policy = moody_policy(RESIDUAL)
    whole, resumed = queued_pool(policy), queued_pool(policy)
    resumed.rng.manual_seed(9)
    observation, rng = whole.reset(SEEDS), generator(1)
    for _ in range(done):
        observation = whole.step(policy.act(observation, rng=rng).action).observation
    resumed.reset(SEEDS + 10)
    resumed.set_state(whole.get_state())
    same(resumed.observation, observation)
    other = generator()
    other.set_state(rng.get_state())
    again = observation
    for _ in range(3):
        observation = whole.step(policy.act(observation, rng=rng).action).observation
        again = resumed.step(policy.act(again, rng=other).action).observation
        same(observation, again)


def test_residual_corrects_every_step_of_a_planned_chunk():
    agent = build_agent(BASE, *(reach().observation_space, reach().action_space), generator())
    agent.policy = wrap_policy("queued", agent, generator(1))
    residual = wrap_policy("residual", agent, generator(2), hidden=[32, 32], scale=0.2)
    assert residual.planner is residual.base
    pool = residual.fit_pool(reach(num_steps=50))
    observation = pool.reset(SEEDS)
    again = residual.fit_pool(reach(num_steps=50)).reset(SEEDS)
    np.testing.assert_array_equal(observation[BASE_ACTION], again[BASE_ACTION])  # equal seeds, equal plans
    plan = pool._queue
    for step in range(3):
        np.testing.assert_allclose(observation[BASE_ACTION], plan[:, step], atol=1e-6)
        taken = residual.act(observation, rng=generator(step))
        np.testing.assert_allclose(taken.trace["base_action"], plan[:, step], atol=1e-6)
        assert 0 < np.abs(taken.action - np.clip(plan[:, step], -1, 1)).max() <= 0.2 + 1e-6
        trace = {k: torch.from_numpy(v) for k, v in taken.trace.items()}
        again, _ = residual.log_prob(as_tensors(observation), torch.from_numpy(taken.action), trace)
        np.testing.assert_allclose(again.detach().numpy(), taken.log_prob, atol=1e-5)
        observation = pool.step(taken.action).observation
    trained = {name for name, p in residual.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith("base.") for name in trained)


def test_replayed_next_observations_know_the_next_planned_action():
    policy = moody_policy(RESIDUAL)
    pool = queued_pool(policy)
    schema = Schema(observation=dict(pool.fields), action=pool.action_field, trace=policy.trace_fields, units=1)
    buffer = Buffer(schema, 200)
    rng = generator(1)
    Collector(pool, run_seed=0).collect(lambda o: policy.act(o, rng=rng), episodes=4).write(buffer)
    batch = buffer.batch(buffer.rows())
    assert torch.isfinite(policy.mode(batch.next_observation)).all()
    each = next(iter(buffer.trajectories()))
    assert len(each.observation[BASE_ACTION]) == len(each) + 1
    planned = each.observation[BASE_ACTION]
    assert (np.abs(np.diff(planned, axis=0)).max(1) > 0).all()  # another action at every step, the last one included


def test_queued_alone_meets_the_contract_and_asks_for_its_pool():
    space = gym.spaces.Dict({"observation": gym.spaces.Box(-1, 1, (4,)), BASE_ACTION: gym.spaces.Box(-1, 1, (2,))})
    policy = build_policy({"id": "queued", "base": BASE}, space, gym.spaces.Box(-1, 1, (2,)), generator())
    check_policy(policy, space, gym.spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match="QueuedPool"):
        policy.act({"observation": np.zeros((2, 4), np.float32)}, greedy=True)
    with pytest.raises(ValueError, match="plans no chunks"):
        stepwise = {"id": "residual", "base": {"id": "gaussian"}}
        build_policy({"id": "queued", "base": stepwise}, space, gym.spaces.Box(-1, 1, (2,)), generator())
    with pytest.raises(ValueError, match="queued twice"):
        QueuedPool(QueuedPool(reach(), Counting()), Counting())


# --- data --------------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 15), horizon=st.integers(1, 6), data=st.data())
@settings(max_examples=40, deadline=None)
def test_cut_trajectories_hold_every_window_once_and_every_reward(length, horizon, data):
    execute = data.draw(st.integers(1, horizon))
    action = np.arange(length, dtype=np.float32)[:, None]
    reward = np.random.default_rng(0).normal(size=length).astype(np.float32)
    observation = {"observation": np.arange(length + 1, dtype=np.float32)[:, None]}
    episode = Trajectory(observation=observation, action=action, reward=reward, end="terminated")
    cut = chunk_trajectories([episode], horizon=horizon, execute=execute)
    starts = sorted(int(a[0]) for t in cut for a in t.action)
    assert starts == list(range(length))
    for first, each in enumerate(cut):
        assert len(each.observation["observation"]) == len(each) + 1
        assert each.observation["observation"][-1, 0] == length  # the end is the episode's end
        np.testing.assert_allclose(each.reward.sum(), reward[first:].sum(), atol=1e-5)
        for row, start in zip(each.action, each.observation["observation"][:-1, 0], strict=True):
            expected = [min(start + j, length - 1) for j in range(horizon)]
            assert row.tolist() == expected


def test_cut_trajectories_are_what_the_pool_records():
    single = reach(1, num_steps=8)
    observation, action, reward = [single.reset(SEEDS[:1])], [], []
    for each in chunks(single, 8):
        result = single.step(each)
        observation.append(result.observation)
        action.append(each[0])
        reward.append(result.reward[0])
    stacked = {"observation": np.concatenate([o["observation"] for o in observation])}
    episode = Trajectory(observation=stacked, action=np.stack(action), reward=np.stack(reward), end="truncated")
    cut = chunk_trajectories([episode], horizon=4, execute=2)[0]

    pool = ChunkPool(reach(1, num_steps=8), horizon=4, execute=2)
    pool.reset(SEEDS[:1])
    recorded = [pool.step(a[None]) for a in cut.action]
    np.testing.assert_allclose([r.reward[0] for r in recorded], cut.reward, rtol=1e-5)
    np.testing.assert_array_equal(
        [r.observation["observation"][0] for r in recorded], cut.observation["observation"][1:]
    )
    assert recorded[-1].truncated[0]


def test_windows_repeat_the_last_action():
    assert action_windows(np.array([[1.0], [2.0], [3.0]]), horizon=2).tolist() == [[1, 2], [2, 3], [3, 3]]


# --- what of a chunk was carried out -----------------------------------------------------------------------------


def one_episode(length, size=2):
    rng = np.random.default_rng(0)
    observation = rng.normal(size=(length + 1, 3)).astype(np.float32)
    action = rng.uniform(-0.9, 0.9, (length, size)).astype(np.float32)
    return Trajectory({"observation": observation}, action, np.zeros(length, np.float32), "terminated")


def test_chunks_of_data_know_where_their_episode_ended():
    spans = [t.span.tolist() for t in chunk_trajectories([one_episode(7)], horizon=4, execute=2)]
    assert spans == [[4, 4, 3, 1], [4, 4, 2]]


def test_chunks_that_were_acted_know_what_was_executed():
    pool = ChunkPool(make_pool("Corridor-v0", 3, options={"length": 3, "spread": 4}), horizon=4, execute=3)
    buffer = Buffer(Schema(observation=pool.fields, action=pool.action_field, units=1), 200)
    decisions = Decisions(np.zeros((3, 4), np.float32), np.zeros((3, 1), np.float32))
    Collector(pool, run_seed=0).collect(lambda observation: decisions, episodes=9).write(buffer)
    seen = set()
    for trajectory in buffer.trajectories():
        steps = int(trajectory.reward.sum())  # one each
        assert trajectory.span.tolist() == [min(3, steps - first) for first in range(0, steps, 3)]
        seen |= set(trajectory.span.tolist())
    assert seen == {1, 2, 3}


CHUNKED = [
    {"id": "gaussian", "horizon": 4, "hidden": [8]},
    {"id": "gaussian", "horizon": 4, "hidden": [8], "imitation": "nll"},
    {"id": "diffusion", "horizon": 4},
    {"id": "flow", "horizon": 4},
    {"id": "consistency", "horizon": 4},
]


def named(spec):
    return f"{spec['id']}{spec.get('imitation', '')}"


@pytest.mark.parametrize("spec", CHUNKED, ids=named)
def test_steps_behind_the_end_of_an_episode_are_not_imitated(spec):
    """What stands there changes nothing; a step that was carried out changes much."""
    observation, step = spaces.Box(-9, 9, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
    rng = torch.Generator().manual_seed(0)
    agent = build_agent(spec, observation, ChunkBox(step, horizon=4), rng)

    def loss(change=None):
        (chunks,) = chunk_trajectories([one_episode(6)], horizon=4, execute=1)
        if change is not None:
            row, number = change
            chunks.action[row, number] = -chunks.action[row, number]
        schema = Schema(
            {"observation": Field((3,))}, Field((8,)), dict(agent.policy.trace_fields), agent.policy.num_units
        )
        buffer = Buffer(schema, 20)
        batch = buffer.batch(buffer.add_trajectory(chunks))
        return imitation(agent, batch, torch.Generator().manual_seed(1)).detach()

    assert torch.isfinite(loss()).all()
    assert (loss((2, 7)) != loss())[2]  # row 2 has steps 2..5: all of them were carried out
    if spec["id"] == "gaussian":  # chains read their target, too, as noise or on the way
        assert torch.equal(loss((4, 5)), loss())  # row 4 has two steps left, 4 and 5: four numbers
        assert not torch.equal(loss((4, 3)), loss())


@pytest.mark.parametrize("spec", CHUNKED[:-1], ids=named)  # the distance of `consistency` is no sum
def test_the_parts_of_a_masked_loss_add_up(spec):
    observation, step = spaces.Box(-9, 9, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
    policy = build_agent(spec, observation, ChunkBox(step, horizon=4), torch.Generator().manual_seed(0)).policy
    rng = np.random.default_rng(0)
    seen = as_tensors({"observation": rng.normal(size=(5, 3)).astype(np.float32)})
    action, mask = torch.tensor(rng.uniform(-0.9, 0.9, (5, 8)).astype(np.float32)), torch.rand(5, 8) > 0.5
    mask[:, 0], mask[:, 1] = True, False

    def loss(mask=None):
        value = policy.imitation_loss(seen, action, rng=torch.Generator().manual_seed(1), mask=mask).detach()
        counted = 1 if mask is None or spec.get("imitation") == "nll" else mask.sum(-1) / 8
        return value * counted

    assert torch.allclose(loss(mask) + loss(~mask), loss(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(loss(torch.ones_like(mask)), loss(), rtol=1e-4, atol=1e-5)


def test_a_mean_under_a_mask_is_that_of_its_rows_one_by_one():
    each, mask = torch.randn(5, 6), torch.rand(5, 6) > 0.4
    expected = [sum(e for e, m in zip(row, on) if m) / max(1, sum(on)) for row, on in zip(each, mask.tolist())]
    assert torch.allclose(mean_where(each, mask), torch.stack([torch.as_tensor(x).float() for x in expected]))
    assert torch.equal(mean_where(each, None), each.mean(-1))
