"""Hindsight: goals that were reached later, against a loop over episodes and SB3's buffer; what is refused."""

from collections import Counter

import gymnasium as gym
import numpy as np
import pytest

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.hindsight import Goals, later
from embodied_rft.data import Field, Source, Trajectory
from embodied_rft.names import UserError
from embodied_rft.options import ConfigError, parse
from embodied_rft.runs.recipe import Recipe
from embodied_rft.train import train
from tests.lab.helpers_envs import Goal


class Unpaid(Goal):
    """Says nothing of other goals."""

    @property
    def compute_reward(self):
        raise AttributeError


gym.register("Unpaid-v0", Unpaid, max_episode_steps=12)
GOALS = ("achieved_goal", "desired_goal", "observation")


def filled(lengths, *, seed=0, capacity=200, **options):
    """A buffer of episodes, the last of them still running."""
    rng, env = np.random.default_rng(seed), Goal()
    buffer = Buffer(Schema({k: Field((2,)) for k in GOALS}, Field((2,)), **options), capacity)
    buffer.goals = Goals(Goal)
    for count in lengths:
        at = rng.uniform(-1, 1, (count + 1, 2)).astype(np.float32)
        goal = np.repeat(rng.uniform(-1, 1, (1, 2)), count + 1, 0).astype(np.float32)
        reward = env.compute_reward(at[1:], goal[1:], {})
        see = {"achieved_goal": at, "desired_goal": goal, "observation": at}
        one = Trajectory(see, np.zeros((count, 2), np.float32), reward, "truncated", source=Source.OFFLINE)
        buffer.add_trajectory(one)
    return buffer


@pytest.mark.parametrize("num_steps", [1, 3])
def test_relabelled_windows_equal_a_loop_over_the_episodes(num_steps):
    buffer, gamma = filled([5, 1, 7, 4]), 0.9
    episodes = [(rows, one) for rows, one in zip(buffer.segments(buffer.rows()), buffer.trajectories(), strict=True)]
    where = {int(row): (one, t) for rows, one in episodes for t, row in enumerate(rows)}
    batch = buffer.sample(np.random.default_rng(1), 400, hindsight=4, num_steps=num_steps, gamma=gamma)
    plain = buffer.batch(batch.rows, num_steps=num_steps, gamma=gamma)
    compute, changed, offsets = Goal().compute_reward, 0, Counter()
    for i, row in enumerate(batch.rows):
        one, t = where[int(row)]
        goal = batch.observation["desired_goal"][i].numpy()
        np.testing.assert_array_equal(goal, batch.next_observation["desired_goal"][i])
        reached = np.flatnonzero((one.observation["achieved_goal"][t + 1 :] == goal).all(1))
        changed += len(reached) > 0
        if not len(reached):
            np.testing.assert_array_equal(goal, one.observation["desired_goal"][t])
        elif len(one) == 7 and t == 0:
            offsets[int(reached[0])] += 1
        following = one.observation["achieved_goal"][t + 1 : t + 1 + num_steps]
        rewards = [compute(achieved, goal, {}) for achieved in following]
        expected = sum(gamma**k * reward for k, reward in enumerate(rewards))
        assert float(batch.reward[i]) == pytest.approx(float(expected), abs=1e-5)
    assert abs(changed / 400 - 0.8) < 0.06
    assert sorted(offsets) == list(range(7))  # every later observation may be the goal
    for name in ("achieved_goal", "observation"):
        assert (batch.observation[name] == plain.observation[name]).all()
    assert (batch.discount == plain.discount).all() and (buffer.batch(batch.rows).reward >= -1).all()
    again = buffer.sample(np.random.default_rng(1), 400, hindsight=4, num_steps=num_steps, gamma=gamma)
    assert (again.reward == batch.reward).all()


def test_later_rows_are_drawn_uniformly_from_the_rest_of_the_episode():
    buffer = filled([6])
    rows = buffer.rows()
    drawn = later(buffer._ring, np.full(6000, rows[2]), np.random.default_rng(0))
    counts = Counter((drawn - rows[0]).tolist())
    assert sorted(counts) == [2, 3, 4, 5] and all(abs(count / 6000 - 0.25) < 0.03 for count in counts.values())


def test_it_tells_what_the_buffer_of_sb3_tells():
    """The same episodes: the same goals may be seen at each step, with the same rewards."""
    from stable_baselines3 import HerReplayBuffer
    from stable_baselines3.common.vec_env import DummyVecEnv

    env = DummyVecEnv([lambda: gym.make("Goal-v0")])
    theirs = HerReplayBuffer(200, env.observation_space, env.action_space, env, device="cpu", n_sampled_goal=4)
    buffer = filled([4, 3])
    for one in buffer.trajectories():
        for t in range(len(one)):
            now, after = ({k: v[s][None] for k, v in one.observation.items()} for s in (t, t + 1))
            done = np.array([t == len(one) - 1])
            theirs.add(now, after, one.action[t][None], one.reward[t][None], done, [{"TimeLimit.truncated": True}])
    np.random.seed(0)
    sample = theirs.sample(3000)
    ours = buffer.sample(np.random.default_rng(0), 3000, hindsight=4)

    def seen(observation, reward):
        numbers = [observation["achieved_goal"], observation["desired_goal"], reward.reshape(-1, 1)]
        return Counter(map(tuple, np.round(np.concatenate([np.asarray(n) for n in numbers], 1), 5).tolist()))

    told, expected = seen(ours.observation, ours.reward.numpy()), seen(sample.observations, sample.rewards.numpy())
    assert set(told) == set(expected)
    assert all(abs(told[key] - expected[key]) < 120 for key in expected)


def test_notes_of_the_old_goal_do_not_count():
    buffer = filled([5])
    buffer.annotate("mc_return", buffer.rows(), np.ones(5))
    batch = buffer.sample(np.random.default_rng(0), 100, hindsight=4)
    note = batch.notes["mc_return"].numpy()
    assert 60 < np.isnan(note).sum() < 95 and set(note[~np.isnan(note)]) == {1.0}


def recipe(objective, *, env=None, agent=None, decisions=24):
    stage = {"objective": {"batch_size": 8, **objective}, "decisions": decisions}
    tree = {"env": {"id": "Goal-v0", "num_envs": 2} | (env or {}), "agent": {"id": "gaussian", "hidden": [8]}}
    stages = [{"warm_up": {"decisions": 4}}, {"finetune": stage}]
    return parse(Recipe, tree | {"agent": tree["agent"] | (agent or {}), "stages": stages})


SAC = {"id": "sac", "critic_hidden": [8], "hindsight": 4}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"env": {"id": "Pendulum-v1"}}, "needs the observation keys achieved_goal and desired_goal"),
        ({"env": {"id": "Unpaid-v0"}}, "environment Unpaid-v0 has no compute_reward"),
    ],
)
def test_environments_without_goals_are_refused_before_anything_runs(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(recipe(SAC, **options), tmp_path, quiet=True, report=False)
    assert not (tmp_path / "stages.json").exists()  # not even the warm-up


@pytest.mark.parametrize(
    "objective, options, message",
    [
        (SAC, {"env": {"options": {"penalty": 0.1}}}, "repeats 0% of the stored rewards"),
        (SAC, {"agent": {"horizon": 3}}, "stored rewards. It cannot where a wrapper changes rewards, a decision holds"),
        (SAC | {"reward_weights": {"env": 2.0}}, {}, "leave reward_weights out"),
        (SAC | {"hindsight": -1}, {}, "hindsight -1: at least 0"),
        ({"id": "ppo", "hindsight": 4}, {}, "hindsight"),
    ],
)
def test_what_cannot_be_told_again_is_refused(tmp_path, objective, options, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        train(recipe(objective, **options), tmp_path, quiet=True, report=False)


def reached(tmp_path, hindsight):
    """Share of held-out goals that are reached, after 1,500 decisions."""
    env = {"id": "Goal-v0", "num_envs": 4}
    objective = {"id": "sac", "critic_hidden": [64, 64], "gamma": 0.9, "tau": 0.02, "hindsight": hindsight}
    objective |= {"initial_temperature": 0.1, "batch_size": 64}
    stage = {"objective": objective, "decisions": 1_500, "learner": {"learning_rate": 1e-3}}
    stages = [{"warm_up": {"decisions": 100}}, {"finetune": stage}, {"evaluate": {"episodes": 100}}]
    tree = {"env": env, "agent": {"id": "gaussian", "hidden": [64, 64]}, "stages": stages, "threads": 1}
    session = train(parse(Recipe, tree), tmp_path, quiet=True, report=False)
    return session.records[-1]["metrics"]["success"]


@pytest.mark.learning
def test_sparse_goals_are_learned_in_hindsight(tmp_path):
    assert reached(tmp_path, 4) >= 0.8


@pytest.mark.learning
def test_and_not_without_it(tmp_path):
    assert reached(tmp_path, 0) < 0.5
