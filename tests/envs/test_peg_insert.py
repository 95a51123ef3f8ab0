"""PegInsert: the protocol, equal physics in every form, honest geometry, an able demonstrator, no fake success."""

from __future__ import annotations

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from embodied_rft import registry
from embodied_rft.envs.manipulation import peg_insert
from embodied_rft.envs.manipulation.peg_insert import (
    ENV_ID,
    HOLE_DEPTH,
    PegInsertDemonstrator,
    PegInsertTask,
)

PHYSICS = mujoco.mjtState.mjSTATE_FULLPHYSICS
BLURRED = {"action_noise": 0.2, "robot_state": True}
HOLE = np.array([0.3, 0.0, 0.2])
ABOVE = np.array([0.3, 0.0, 0.03, 0.2])  # right over HOLE, 5 mm over its mouth


def make_batch(num_envs, **options):
    return gymnasium.make_vec(ENV_ID, num_envs=num_envs, autoreset_mode="Disabled", **options)


def make_one(**options):
    return gymnasium.make(ENV_ID, **options).unwrapped


def succeed(noise, seeds, **options) -> np.ndarray:
    """Which seeds the demonstrator solves; episodes that are over start again, but only the first one counts."""
    env = make_batch(len(seeds), **options)
    demonstrator, rng = PegInsertDemonstrator(noise=noise), np.random.default_rng(7)
    observation, _ = env.reset(seed=seeds)
    solved, over = np.zeros(len(seeds), bool), np.zeros(len(seeds), bool)
    while not over.all():
        observation, _, terminated, truncated, info = env.step(demonstrator.act(observation, rng))
        solved |= (info["is_success"] > 0) & ~over
        done = terminated | truncated
        over |= done
        if done.any():
            observation, _ = env.reset(options={"reset_mask": done})
    env.close()
    return solved


class Probe:
    """One arm under constant commands, looked at after every physics step. Any clearance, negative ones too."""

    def __init__(self, clearance, start):
        self.task = PegInsertTask()
        self.task.clearance, self.task.model = clearance, peg_insert.build_model(clearance)
        self.data = mujoco.MjData(self.task.model)
        self.goal = HOLE[None]
        self.data.qpos[:] = peg_insert.joints_of(np.array([start], float))[0]
        self.penetration = 0.0

    def physics(self):
        row = np.empty((1, 9))
        mujoco.mj_getState(self.task.model, self.data, row[0], PHYSICS)
        return row

    def push(self, action, decisions):
        for _ in range(decisions):
            row = self.task.controls(self.physics(), np.zeros((1, 6)), self.goal, np.array([action], float))[0]
            mujoco.mj_setState(self.task.model, self.data, row, self.task.control_spec)
            for _ in range(self.task.num_substeps):
                mujoco.mj_step(self.task.model, self.data)
                self.penetration = max([self.penetration] + [-c.dist for c in self.data.contact[: self.data.ncon]])

    def pose(self):
        return peg_insert.pose_of(self.data.qpos[None])[0]

    def success(self):
        return bool(self.task.judge({}, self.physics(), np.zeros((1, 6)), self.goal)[1][0])


# ---- protocol


@pytest.mark.parametrize("options", [{}, {"reward_type": "dense", "clearance": 0.003}, {"instruction": True}, BLURRED])
def test_checkers_pass(options):
    env = gymnasium.make(ENV_ID, **options)
    check_env(env.unwrapped, skip_render_check=True)
    if not options.get("instruction"):
        check_env_sb3(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clearance": 0.02}, "clearance is 0.02; expected metres in"),
        ({"clearance": -0.001}, "clearance is -0.001"),
        ({"action_noise": -0.1}, "action_noise is -0.1; expected a standard deviation"),
        ({"reward_type": "spares"}, "did you mean 'sparse'"),
        ({"cameras": ("frnt",)}, "did you mean 'front'"),
    ],
)
def test_bad_options_say_what_to_do(options, words):
    with pytest.raises(ValueError, match=words):
        make_one(**options)


def test_time_limit_is_a_truncation_and_success_a_termination():
    env = gymnasium.make(ENV_ID)
    env.reset(seed=0)
    ends = [env.step(np.zeros(4, np.float32))[2:4] for _ in range(60)]
    assert ends == [(False, False)] * 59 + [(False, True)]
    observation, _ = env.reset(seed=0)
    demonstrator, rng, terminated, rewards = PegInsertDemonstrator(), np.random.default_rng(0), False, []
    while not terminated:
        batch = {key: value[None] for key, value in observation.items()}
        observation, reward, terminated, truncated, info = env.step(demonstrator.act(batch, rng)[0])
        assert not truncated and terminated == bool(info["is_success"])
        rewards.append(reward)
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    env.close()


def test_reset_options_place_the_hole_and_the_peg_and_keep_the_rest():
    env = make_one()
    free, _ = env.reset(seed=3)
    fixed, _ = env.reset(seed=3, options={"hole": HOLE, "start": ABOVE})
    np.testing.assert_allclose(env.batch.goal, HOLE[None])
    np.testing.assert_allclose(fixed["observation"][:4], [0, 0, -0.5, 0], atol=1e-9)
    assert np.abs(free["observation"] - fixed["observation"]).max() > 0.1
    moved, _ = env.reset(seed=3, options={"hole": HOLE})
    np.testing.assert_allclose(moved["observation"][:3], free["observation"][:3], atol=1e-9)  # the peg follows the hole
    env.close()


def test_what_is_drawn_is_what_is_simulated():
    env = make_one()
    env.reset(seed=3)
    data = mujoco.MjData(env.batch.task.model)
    env.batch.task.place(data, env.batch.physics[0], env.batch.goal[0])
    x, y, yaw = env.batch.goal[0]
    np.testing.assert_allclose(data.body("hole").xpos, [x, y, 0], atol=1e-12)
    np.testing.assert_allclose(data.body("hole").xmat[[0, 3]], [np.cos(yaw), np.sin(yaw)], atol=1e-12)
    bottom = peg_insert.pose_of(env.batch.physics[:, 1:5])[0, :3]
    np.testing.assert_allclose(data.geom("peg").xpos, bottom + [0, 0, 0.025], atol=1e-12)
    env.close()


# ---- one physics in every form


def actions_of(num_steps, num_envs):
    """Commands that seek contact: mostly downwards, with strong sideways noise."""
    rng = np.random.default_rng(5)
    action = rng.uniform(-1, 1, (num_steps, num_envs, 4))
    action[..., 2] -= 0.5
    return np.clip(action, -1, 1).astype(np.float32)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_exact_batch_equals_singles_bit_for_bit_and_rollout_within_bound(noise):
    seeds, actions = list(range(8)), actions_of(40, 8)
    options = {"hole": HOLE, "start": ABOVE + [0.001, 0, 0, 0]}
    common = {"reward_type": "dense", "action_noise": noise}
    singles = [make_one(**common) for _ in seeds]
    batches = {engine: make_batch(8, engine=engine, **common) for engine in ("exact", "rollout")}
    for seed, env in zip(seeds, singles):
        env.reset(seed=seed, options=options)
    for env in batches.values():
        env.reset(seed=seeds, options=options)
    touched, difference = 0, 0.0
    for action in actions:
        one_by_one = [env.step(a) for env, a in zip(singles, action)]
        expected = np.stack([step[0]["observation"] for step in one_by_one])
        exact, fast = (env.step(action) for env in batches.values())
        np.testing.assert_array_equal(exact[0]["observation"], expected)
        np.testing.assert_array_equal(exact[1], [step[1] for step in one_by_one])
        difference = max(difference, np.abs(fast[0]["observation"] - expected).max())
        touched += int((np.abs(expected[:, 12:15]).max(axis=1) > 1).sum())
        if exact[2].any():
            break
    assert touched > 30, "the test must meet stiff contact to mean anything"
    assert difference <= 1e-6
    for env in [*singles, *batches.values()]:
        env.close()


def test_seeds_fix_everything_and_rows_do_not_depend_on_the_batch():
    def run(seeds, **options):
        env = make_batch(len(seeds), **options)
        trace = [env.reset(seed=seeds)[0]["observation"]]
        for action in actions_of(30, 6)[:, : len(seeds)]:
            trace.append(env.step(action)[0]["observation"])
        env.close()
        return np.stack(trace)

    seeds = [11, 5, 2**31 + 7, 0, 2**32 - 1, 3]
    for options in ({}, BLURRED):
        reference = run(seeds, num_threads=1, **options)
        np.testing.assert_array_equal(run(seeds, num_threads=2, **options), reference)
        np.testing.assert_array_equal(run(seeds[:1], **options), reference[:, :1])
    assert len({row.tobytes() for row in reference[0]}) == len(seeds)


@pytest.mark.parametrize("engine", ["exact", "rollout"])
def test_state_continues_bit_for_bit(engine):
    env = make_batch(5, engine=engine, **BLURRED)
    env.reset(seed=1)
    actions = actions_of(30, 5)
    for action in actions[:15]:
        env.step(action)
    state = env.get_state()
    first = [env.step(action)[0]["observation"] for action in actions[15:]]
    env.step(actions[0])
    env.set_state(state)
    second = [env.step(action)[0]["observation"] for action in actions[15:]]
    np.testing.assert_array_equal(first, second)
    env.close()


def test_action_noise_is_what_disturbs_the_command():
    """The same seed with and without: the peg is where its servos were told, give or take the noise."""
    ends = {}
    for noise in (0.0, 0.1, 0.2):
        env = make_batch(64, action_noise=noise)
        env.reset(seed=list(range(64)), options={"start": [0.3, 0.0, 0.09, 0.0]})
        for _ in range(5):
            observation = env.step(np.zeros((64, 4), np.float32))[0]["observation"]
        ends[noise] = observation[:, 12 - 4 : 12 - 2]  # x and y of the peg
        env.close()
    spread = {noise: end.std(axis=0).mean() for noise, end in ends.items()}
    assert spread[0.0] < 1e-6 and 0.5 * spread[0.2] < 1.5 * spread[0.1] < 1.5 * spread[0.2]
    assert abs(ends[0.2].mean()) < 4 * spread[0.2] / 8, "no drift"


def test_robot_state_is_the_observation_without_the_hole():
    env = make_batch(3, robot_state=True)
    observation, _ = env.reset(seed=4)
    np.testing.assert_array_equal(observation["robot_state"], observation["observation"][:, 4:])
    moved, _ = env.reset(seed=4, options={"hole": [0.31, 0.02, 0.3], "start": [0.3, 0.0, 0.06, 0.0]})
    other, _ = env.reset(seed=4, options={"hole": [0.29, -0.02, -0.3], "start": [0.3, 0.0, 0.06, 0.0]})
    np.testing.assert_array_equal(moved["robot_state"], other["robot_state"])
    env.close()


# ---- kinematics


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.floats(0.22, 0.39), st.floats(-0.12, 0.12), st.floats(0, 0.08), st.floats(-0.7, 0.7)),
    st.tuples(*[st.floats(-1, 1)] * 4),
)
def test_kinematics_agree_with_the_model(pose, qvel):
    joints = peg_insert.joints_of(np.array([pose]))
    np.testing.assert_allclose(peg_insert.pose_of(joints)[0], pose, atol=1e-12)
    model = peg_insert.build_model(0.0015)
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = joints[0], qvel
    mujoco.mj_forward(model, data)
    bottom = data.geom("peg").xpos - [0, 0, model.geom("peg").size[2]]
    np.testing.assert_allclose(bottom, pose[:3], atol=1e-12)
    yaw = np.arctan2(data.geom("peg").xmat[3], data.geom("peg").xmat[0])
    np.testing.assert_allclose(yaw, pose[3], atol=1e-12)
    jacobian = np.zeros((3, 4))
    mujoco.mj_jacGeom(model, data, jacobian, None, model.geom("peg").id)
    velocity = peg_insert.velocity_of(joints, np.array([qvel]))[0]
    np.testing.assert_allclose(velocity[:3], (jacobian * qvel).sum(axis=1), atol=1e-12)


# ---- honest geometry


def test_clearance_moves_the_walls_and_a_peg_that_is_too_large_stays_out():
    for clearance in (0.0005, 0.0015, 0.005):
        model = peg_insert.build_model(clearance)
        for axis, name in enumerate("xy"):
            faces = [
                sign * (model.geom(f"wall_{name}{mark}").pos[axis] - sign * model.geom(f"wall_{name}{mark}").size[axis])
                for sign, mark in ((1, "+"), (-1, "-"))
            ]
            np.testing.assert_allclose(faces, 0.01 + clearance / 2, atol=1e-12)
    fits, too_large = Probe(0.0005, ABOVE), Probe(-0.0003, ABOVE)
    for probe in (fits, too_large):
        probe.push([0, 0, -1, 0], 40)
    assert fits.success() and fits.pose()[2] < 0.001
    assert not too_large.success() and too_large.pose()[2] > HOLE_DEPTH - 0.0002


@pytest.mark.parametrize("clearance", [0.0005, 0.0015])
@pytest.mark.parametrize(
    ("start", "pushes"),
    [
        ([0.31, 0, 0.08, 0], [[0, 0, -1, 0]]),  # falls onto the block
        ([0.3, 0, 0.01, 0.2], [[1, 0, -0.3, 0], [-1, 0, -0.3, 0]]),  # hammers the walls from inside
        ([0.3, 0, 0.01, 0.2], [[1, 1, -1, 1], [-1, -1, -1, -1]]),
        ([0.3, 0, 0.01, 0.2], [[0, 0, 0, 1], [0, 0, 0, -1]]),  # twists in the hole
        ([0.2, 0, 0.01, 0], [[1, 0, 0, 0]]),  # drives into the block from outside
    ],
)
def test_no_tunnelling_however_hard_it_is_pushed(clearance, start, pushes):
    probe = Probe(clearance, start)
    for push in pushes * 3:
        probe.push(push, 6)
    assert 0 < probe.penetration < clearance / 4
    if start[2] == 0.01 and start[0] == 0.3:  # began inside and must still be there
        assert np.abs(probe.pose()[:2] - HOLE[:2]).max() < clearance and probe.pose()[2] < HOLE_DEPTH


def test_success_needs_the_peg_in_the_hole():
    task, rng = PegInsertTask(), np.random.default_rng(0)
    goal = np.tile(HOLE, (20_000, 1))

    def judge(pose):
        physics = np.zeros((len(pose), 9))
        physics[:, 1:5] = peg_insert.joints_of(pose)
        return task.judge({}, physics, np.zeros((len(pose), 6)), goal[: len(pose)])[1]

    pose = rng.uniform([0.22, -0.1, 0.0, -0.7], [0.38, 0.1, 0.09, 0.7], (20_000, 4))
    above, beside = pose.copy(), pose.copy()
    above[:, :2], above[:, 2] = HOLE[:2], rng.uniform(HOLE_DEPTH - 0.0199, 0.09, 20_000)
    above[:, 3] = HOLE[2]
    angle, radius = rng.uniform(0, 2 * np.pi, 20_000), rng.uniform(0.0018, 0.05, 20_000)  # more than the clearance off
    beside[:, 0], beside[:, 1] = HOLE[0] + radius * np.cos(angle), HOLE[1] + radius * np.sin(angle)
    beside[:, 2] = rng.uniform(0.0, 0.004, 20_000)
    assert not judge(above).any() and not judge(beside).any()
    twisted = np.array([[*HOLE[:2], 0.002, HOLE[2] + twist] for twist in (0.0, 0.12, 0.4, np.pi / 2)])
    assert judge(twisted).tolist() == [True, False, False, True]  # a square peg looks the same after a quarter turn


def test_dense_reward_rises_with_every_step_of_the_way():
    task = PegInsertTask(reward_type="dense")
    heights, turns = np.linspace(0.08, 0.0, 9), np.linspace(0.5, 0.0, 9)
    pose = np.stack([HOLE[0] + heights, np.zeros(9), heights, HOLE[2] + turns], axis=1)
    physics = np.zeros((9, 9))
    physics[:, 1:5] = peg_insert.joints_of(pose)
    reward, success, terminated = task.judge({}, physics, np.zeros((9, 6)), np.tile(HOLE, (9, 1)))
    assert (np.diff(reward) > 0).all() and reward[-1] == pytest.approx(0, abs=1e-9)
    np.testing.assert_array_equal(success, terminated)


# ---- the demonstrator and the difficulty


def test_demonstrator_is_found_and_solves_training_seeds():
    assert registry.find("demonstrator", ENV_ID) is registry.find("demonstrator", "peg_insert") is PegInsertDemonstrator
    assert succeed(0.0, list(range(60))).mean() >= 0.95


def test_noise_hurts_and_a_tighter_hole_is_not_easier():
    seeds = list(range(100, 220))
    loose, default, tight = (succeed(0.4, seeds, clearance=c).mean() for c in (0.005, 0.0015, 0.0005))
    assert loose > default + 0.1 and default > tight + 0.1
    assert 0.15 < default < 0.6 and succeed(0.8, seeds).mean() < default


def test_demonstrator_noise_is_drawn_from_the_generator_it_is_given():
    observation = {"observation": np.random.default_rng(0).normal(size=(5, 18))}
    noisy = PegInsertDemonstrator(noise=0.5)
    first, second = (noisy.act(observation, np.random.default_rng(seed)) for seed in (1, 1))
    np.testing.assert_array_equal(first, second)
    assert (noisy.act(observation, np.random.default_rng(2)) != first).any()
    assert first.shape == (5, 4) and first.dtype == np.float32 and np.abs(first).max() <= 1
    with pytest.raises(ValueError, match="noise is -1"):
        PegInsertDemonstrator(noise=-1)
