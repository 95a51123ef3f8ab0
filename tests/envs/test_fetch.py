import warnings

import gymnasium
import gymnasium_robotics
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

import embodied_rft.envs  # registers
from embodied_rft import registry
from embodied_rft.envs.manipulation import demonstrators
from embodied_rft.envs.manipulation.fetch import VARIANTS, FetchSimulation, FetchTask
from embodied_rft.envs.manipulation.simulation import Simulation
from embodied_rft.envs.manipulation.task import Task
from embodied_rft.envs.serving import BatchEnv, BatchVectorEnv
from embodied_rft.pools.pool import make_pool
from tests.lab.fetch import batch, one

gymnasium.register_envs(gymnasium_robotics)
NAMES = list(VARIANTS)
DEMONSTRATORS = {
    "Reach": demonstrators.FetchReachDemonstrator,
    "Push": demonstrators.FetchPushDemonstrator,
    "Slide": demonstrators.FetchSlideDemonstrator,
    "PickAndPlace": demonstrators.FetchPickAndPlaceDemonstrator,
}


def error(tree, other):
    assert set(tree) == set(other)
    return max(float(np.abs(tree[key] - other[key]).max()) for key in tree)


def random_actions(num_steps, num_envs, seed=0):
    return np.random.default_rng(seed).uniform(-1.2, 1.2, (num_steps, num_envs, 4)).astype(np.float32)


# Parity with the official environment -------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["random", "demonstrator"])
@pytest.mark.parametrize("reward_type", ["sparse", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_official_environment_step_by_step(name, reward_type, behaviour):
    official = gymnasium.make(f"Fetch{name}{'Dense' if reward_type == 'dense' else ''}-v4", disable_env_checker=True)
    single = gymnasium.make(f"embodied_rft/Fetch{name}-v0", reward_type=reward_type, disable_env_checker=True)
    vector = batch(name, 2, reward_type=reward_type, max_episode_steps=50)
    rng = np.random.default_rng(5)
    demonstrator = DEMONSTRATORS[name](noise=0.2)
    for seed in (0, 123, 2**32 - 1):
        theirs, _ = official.reset(seed=seed)
        ours, _ = single.reset(seed=seed)
        rows, _ = vector.reset(seed=[7, seed])
        for _ in range(50):
            assert error(theirs, ours) <= 1e-12
            assert error(theirs, {key: value[1] for key, value in rows.items()}) <= 1e-12
            actions = rng.uniform(-1.2, 1.2, (2, 4)).astype(np.float32)
            if behaviour == "demonstrator":
                actions = demonstrator.act(rows, rng)
            theirs, reward, terminated, truncated, info = official.step(actions[1])
            ours, *single_outcome, single_info = single.step(actions[1])
            rows, *vector_outcome, vector_info = vector.step(actions)
            np.testing.assert_allclose(single_outcome, [reward, terminated, truncated], rtol=0, atol=1e-12)
            np.testing.assert_allclose(
                [x[1] for x in vector_outcome], [reward, terminated, truncated], rtol=0, atol=1e-12
            )
            assert single_info["is_success"] == vector_info["is_success"][1] == info["is_success"]
            assert vector_info["_is_success"].all()


@pytest.mark.parametrize("name", ["Reach", "Push", "PickAndPlace"])
def test_rollout_engine_stays_close_to_the_official_environment(name):
    official = gymnasium.make(f"Fetch{name}Dense-v4", disable_env_checker=True)
    vector = batch(name, 2, reward_type="dense", engine="rollout")
    demonstrator, rng = DEMONSTRATORS[name](noise=0.2), np.random.default_rng(1)
    for seed in (3, 4):
        theirs, _ = official.reset(seed=seed)
        rows, _ = vector.reset(seed=[seed, seed])
        for k in range(50):
            actions = demonstrator.act(rows, rng) if seed == 3 else random_actions(50, 2, seed)[k]
            actions[1] = actions[0]
            theirs, reward, *_ = official.step(actions[0])
            rows, rewards, *_ = vector.step(actions)
            assert error(theirs, {key: value[0] for key, value in rows.items()}) <= 1e-6
            assert abs(reward - rewards[0]) <= 1e-6


def test_one_rollout_step_of_slide_stays_close_to_the_exact_one():
    # A sliding puck is chaotic: over an episode a difference of 1e-13 may double in every step, so steps are compared
    # one by one.
    exact, rollout = batch("Slide", 4), batch("Slide", 4, engine="rollout")
    exact.reset(seed=0)
    rollout.reset(seed=0)
    worst = 0.0
    for action in random_actions(50, 4):
        rollout.set_state(exact.get_state())
        observation, *_ = exact.step(action)
        worst = max(worst, error(observation, rollout.step(action)[0]))
    assert 0 < worst <= 1e-6


def test_float64_actions_equal_the_official_environment():
    official, single = gymnasium.make("FetchPush-v4", disable_env_checker=True), one("Push")
    official.reset(seed=1)
    single.reset(seed=1)
    for action in np.random.default_rng(0).uniform(-1, 1, (10, 4)):
        assert error(official.step(action)[0], single.step(action)[0]) <= 1e-12


# Batches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_exact_batch_equals_single_environments_bit_by_bit(name):
    vector, singles = batch(name, 3), [one(name) for _ in range(3)]
    observation, _ = vector.reset(seed=[5, 6, 7])
    each = [env.reset(seed=5 + i)[0] for i, env in enumerate(singles)]
    for action in random_actions(25, 3):
        for i in range(3):
            assert error({k: v[i] for k, v in observation.items()}, each[i]) == 0.0
        observation, reward, *_ = vector.step(action)
        steps = [env.step(a) for env, a in zip(singles, action, strict=True)]
        each = [step[0] for step in steps]
        assert reward.tolist() == [step[1] for step in steps]


@pytest.mark.parametrize("engine", ["exact", "rollout"])
def test_a_row_depends_neither_on_the_batch_nor_on_threads(engine):
    large = batch("PickAndPlace", 7, engine=engine, num_threads=2)
    small = batch("PickAndPlace", 2, engine=engine, num_threads=1)
    wide, _ = large.reset(seed=10)
    narrow, _ = small.reset(seed=[13, 15])
    for action in random_actions(30, 7):
        assert error({k: v[[3, 5]] for k, v in wide.items()}, narrow) == 0.0
        wide, *_ = large.step(action)
        narrow, *_ = small.step(action[[3, 5]])


@pytest.mark.parametrize("engine", ["exact", "rollout"])
def test_restored_state_continues_bit_by_bit(engine):
    first = batch("PickAndPlace", 3, engine=engine, autoreset_mode=AutoresetMode.NEXT_STEP, max_episode_steps=9)
    first.reset(seed=0)
    actions = random_actions(40, 3)
    for action in actions[:13]:
        first.step(action)
    state = first.get_state()
    assert all(isinstance(value, np.ndarray) and len(value) == 3 for value in state.values())
    second = batch("PickAndPlace", 3, engine=engine, autoreset_mode=AutoresetMode.NEXT_STEP, max_episode_steps=9)
    second.set_state(state)
    for action in actions[13:]:
        ours, theirs = first.step(action), second.step(action)
        assert error(ours[0], theirs[0]) == 0.0
        for a, b in zip(ours[1:4], theirs[1:4], strict=True):
            assert np.array_equal(a, b)
    broken = {**state, "rng": state["rng"] + np.uint64(2)}  # the twin without its generators: the next reset differs
    second.set_state(broken)
    first.set_state(state)
    assert any(error(first.step(a)[0], second.step(a)[0]) > 0 for a in actions[13:])


def test_restored_single_environment_continues_bit_by_bit():
    first, second = one("Slide"), one("Slide")
    first.reset(seed=3)
    for action in random_actions(12, 1)[:, 0]:
        first.step(action)
    assert error(second.set_state(first.get_state()), first.set_state(first.get_state())) == 0.0
    for action in random_actions(12, 1, seed=1)[:, 0]:
        assert error(first.step(action)[0], second.step(action)[0]) == 0.0
    assert error(first.reset()[0], second.reset()[0]) == 0.0


def test_a_state_that_does_not_fit_is_refused():
    env = batch("Push", 2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="shape"):
        env.set_state(batch("Push", 3).get_state())
    with pytest.raises(ValueError, match="warmstart"):
        env.set_state(batch("Push", 2, engine="rollout").get_state())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 3), st.sampled_from(NAMES))
def test_a_seed_fixes_the_start(seed, name):
    env = batch(name, 2)
    first, _ = env.reset(seed=seed)
    env.reset(seed=1)
    again, _ = env.reset(seed=[seed, seed + 1])
    assert error(first, again) == 0.0
    assert not np.array_equal(first["desired_goal"][0], first["desired_goal"][1])


# Gymnasium's protocol -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_checkers_of_gymnasium_and_sb3(name):
    from stable_baselines3.common.env_checker import check_env as check_env_sb3

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(minimum|maximum) value is (-)?infinity.*")
        warnings.filterwarnings("ignore", message=".*precision.*")
        check_env(gymnasium.make(f"embodied_rft/Fetch{name}-v0").unwrapped, skip_render_check=True)
    check_env_sb3(gymnasium.make(f"embodied_rft/Fetch{name}-v0").unwrapped)


def test_make_and_make_vec_give_single_and_native():
    single = gymnasium.make("embodied_rft/FetchPush-v0")
    assert isinstance(single.unwrapped.batch, FetchSimulation) and single.spec.max_episode_steps == 50
    vector = gymnasium.make_vec("embodied_rft/FetchPush-v0", num_envs=4)
    assert isinstance(vector.batch, FetchSimulation) and vector.max_episode_steps == 50
    assert vector.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    observation, info = vector.reset(seed=0)
    assert vector.observation_space.contains(observation) and info == {}


def test_disabled_autoreset_resets_only_what_the_mask_says():
    env = batch("Push", 3, max_episode_steps=2)
    first, _ = env.reset(seed=0)
    actions = random_actions(2, 3)
    before = env.step(actions[0])[0]
    mask = np.array([False, True, False])
    after, _ = env.reset(seed=[0, 1, 2], options={"reset_mask": mask})
    assert error({k: v[mask] for k, v in after.items()}, {k: v[mask] for k, v in first.items()}) == 0.0
    assert error({k: v[~mask] for k, v in after.items()}, {k: v[~mask] for k, v in before.items()}) == 0.0
    *_, truncated, _ = env.step(actions[1])
    assert truncated.tolist() == [True, False, True]
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"\[0, 2\]"):
        env.step(actions[1])
    env.reset(options={"reset_mask": truncated})
    assert env.step(actions[1])[3].tolist() == [False, True, False]
    for bad in (np.array([1, 0, 0]), np.zeros(3, bool), np.ones(2, bool)):
        with pytest.raises(ValueError, match="mask is"):
            env.reset(options={"reset_mask": bad})


def test_bad_actions_are_refused_and_nothing_is_lost():
    env, single = batch("Reach", 3), one("Reach")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros((3, 4), np.float32))
    with pytest.raises(gymnasium.error.ResetNeeded):
        single.step(np.zeros(4, np.float32))
    before, _ = env.reset(seed=0)
    single.reset(seed=0)
    poisoned = np.zeros((3, 4), np.float32)
    poisoned[1, 2] = np.nan
    cases = {
        "environment 1 is not finite": poisoned,
        "shape": np.zeros((2, 4), np.float32),
        "float32": np.zeros((3, 4), np.complex64),
        "expected": np.full((3, 4), "up"),
    }
    for message, action in cases.items():
        with pytest.raises(ValueError, match=message):
            env.step(action)
    for action in (np.zeros((1, 4), np.float32), np.full(4, np.inf), [None] * 4):
        with pytest.raises(ValueError):
            single.step(action)
    observation, *_ = env.step(np.zeros((3, 4), np.float32))
    fresh = batch("Reach", 3)
    fresh.reset(seed=0)
    assert error(observation, fresh.step(np.zeros((3, 4), np.float32))[0]) == 0.0


def test_unknown_names_are_answered_with_the_nearest():
    for call, nearest in [
        (lambda: one("PickandPlace"), "PickAndPlace"),
        (lambda: one("Push", reward_type="sprase"), "sparse"),
        (lambda: batch("Push", engine="rolout"), "rollout"),
        (lambda: batch("Push", cameras=("frnt",)), "front"),
        (lambda: batch("Push").reset(options={"object_yx": [1.3, 0.7]}), "object_xy"),
    ]:
        with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
            call()
    for options in ({"num_envs": 0}, {"autoreset_mode": AutoresetMode.SAME_STEP}, {"render_mode": "human"}):
        with pytest.raises(ValueError, match="expected|NEXT_STEP"):
            batch("Push", **options)
    with pytest.raises(ValueError, match="2 seeds"):
        batch("Push").reset(seed=[1, 2])


# Task ---------------------------------------------------------------------------------------------------------------


def test_reset_options_fix_the_start_and_change_nothing_else():
    env = batch("PickAndPlace", 2)
    free, _ = env.reset(seed=4)
    placed, _ = env.reset(seed=4, options={"object_xy": [1.3, 0.6]})
    assert np.allclose(placed["achieved_goal"][:, :2], [1.3, 0.6]) and np.array_equal(
        placed["desired_goal"], free["desired_goal"]
    )
    goals = np.array([[1.3, 0.7, 0.5], [1.2, 0.8, 0.6]])
    aimed, _ = env.reset(seed=4, options={"goal": goals})
    assert np.array_equal(aimed["desired_goal"], goals) and np.array_equal(
        aimed["achieved_goal"], free["achieved_goal"]
    )
    with pytest.raises(ValueError, match="object_xy"):
        env.reset(options={"object_xy": [1.3, 0.6, 0.4]})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["sparse", "dense"]))
def test_compute_reward_is_vectorised_and_equals_the_official_one(seed, reward_type):
    rng = np.random.default_rng(seed)
    achieved, desired = rng.normal(size=(2, 5, 3)) * 0.05
    env = one("Push", reward_type=reward_type)
    together = env.compute_reward(achieved, desired, [{}] * 5)
    distance = np.sqrt(((achieved - desired) ** 2).sum(-1))
    expected = np.where(distance > 0.05, -1.0, 0.0) if reward_type == "sparse" else -distance
    np.testing.assert_allclose(together, expected, atol=1e-12)
    assert together.tolist() == [float(env.compute_reward(a, d, {})) for a, d in zip(achieved, desired, strict=True)]


def test_sb3_hindsight_replay_runs_on_it():
    from stable_baselines3 import SAC, HerReplayBuffer

    env = gymnasium.make("embodied_rft/FetchReach-v0")
    options = {"n_sampled_goal": 4, "goal_selection_strategy": "future"}
    model = SAC(
        "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=options,
        learning_starts=60, batch_size=32, policy_kwargs={"net_arch": [16]}, device="cpu", seed=0,
    )  # fmt: skip
    model.learn(110)
    rewards = model.replay_buffer.sample(256).rewards
    assert set(np.unique(rewards.numpy())) == {-1.0, 0.0}  # relabelled goals are reached


def test_instruction_is_an_observation_key():
    single, vector = one("PickAndPlace", instruction=True), batch("PickAndPlace", 2, instruction=True)
    observation, _ = single.reset(seed=0)
    assert observation["instruction"] == "pick up the block and move it to the target"
    assert single.observation_space.contains(observation)
    observation, _ = vector.reset(seed=0)
    assert vector.observation_space.contains(observation) and len(observation["instruction"]) == 2


# Demonstrators ------------------------------------------------------------------------------------------------------


def success(name, demonstrator, num_envs=60, seed=2**31):
    env = batch(name, num_envs)
    observation, _ = env.reset(seed=seed)
    rng = np.random.default_rng(0)
    for _ in range(50):
        observation, *_, info = env.step(demonstrator.act(observation, rng))
    return float(info["is_success"].mean())


@pytest.mark.parametrize(("name", "least"), [("Reach", 1.0), ("Push", 0.93), ("Slide", 0.2), ("PickAndPlace", 0.98)])
def test_demonstrators_solve_their_task(name, least):
    assert success(name, DEMONSTRATORS[name]()) >= least


def test_noise_makes_demonstrations_imperfect():
    assert 0.15 <= success("PickAndPlace", DEMONSTRATORS["PickAndPlace"](noise=0.4)) <= 0.55
    with pytest.raises(ValueError, match="noise"):
        DEMONSTRATORS["PickAndPlace"](noise=-0.1)


def test_demonstrators_are_memoryless_and_seeded():
    env = batch("PickAndPlace", 5)
    observation, _ = env.reset(seed=0)
    demonstrator = DEMONSTRATORS["PickAndPlace"](noise=0.3)
    first, again, other = (demonstrator.act(observation, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.dtype == np.float32 and np.abs(first).max() <= 1.0
    clean = DEMONSTRATORS["PickAndPlace"]()
    some = {key: value[[4, 2]] for key, value in observation.items()}
    assert np.array_equal(clean.act(observation, None)[[4, 2]], clean.act(some, None))


def test_a_demonstrator_is_found_by_the_id_of_its_environment():
    for name, cls in DEMONSTRATORS.items():
        assert registry.find("demonstrator", f"embodied_rft/Fetch{name}-v0") is cls


# The base, with a task of one joint ----------------------------------------

TURN = """
<mujoco><worldbody><body><joint name="j" axis="0 0 1" damping="0.5"/><geom size="0.1" mass="1"/></body></worldbody>
<actuator><position joint="j" kp="20"/></actuator><sensor><jointpos name="angle" joint="j"/></sensor></mujoco>
"""


class Turn(Task):
    """The example of the docstring of `Task`; ends when the angle is reached."""

    num_substeps = 5

    def __init__(self):
        self.model = mujoco.MjModel.from_xml_string(TURN)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        unbounded = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.observation_space = gymnasium.spaces.Dict(observation=unbounded)

    def start(self, rng, options):
        return self.rest(), rng.uniform(-1, 1, size=1)

    def controls(self, physics, sensors, goal, action):
        return action.astype(np.float64)

    def observation(self, physics, sensors, goal):
        return {"observation": np.concatenate([sensors, goal], axis=1)}

    def judge(self, observation, physics, sensors, goal):
        success = np.abs(sensors - goal)[:, 0] < 0.05
        return success - 1.0, success, success


@pytest.mark.parametrize("engine", ["exact", "rollout"])
def test_a_new_task_is_a_model_and_four_functions(engine):
    env = BatchVectorEnv(Simulation, task=Turn, num_envs=4, engine=engine, max_episode_steps=200)
    observation, _ = env.reset(seed=0)
    check_env(BatchEnv(Simulation, task=Turn, engine=engine), skip_render_check=True)
    ended = np.zeros(4, bool)
    for _ in range(200):
        goal = observation["observation"][:, 1:]
        observation, reward, terminated, truncated, info = env.step(goal.astype(np.float32))
        assert np.array_equal(terminated, info["is_success"] > 0) and not truncated.any()
        assert (reward[terminated] == 0).all() and (env.elapsed[~info["_is_success"]] == 0).all()
        ended |= terminated
    assert ended.all()


def test_tasks_share_one_compiled_model():
    assert FetchTask("Push").model is FetchTask("Push").model
    assert embodied_rft.envs.__name__ == "embodied_rft.envs"


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_an_environment_says_what_it_reproduces(kind):
    for id, said in (("FetchReach-v0", "gymnasium_robotics:FetchReach-v4"), ("PegInsert-v0", None)):
        pool = make_pool(f"embodied_rft/{id}", 1, kind=kind)
        assert pool.ask("official_id") == said
        pool.close()
