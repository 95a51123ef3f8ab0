"""Pools in this process: trees, seeds, NaN at the door, idle environments, saved states."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from embodied_rft.data import Field
from embodied_rft.pools.pool import VectorPool, make_pool
from embodied_rft.pools.protocol import fields_of, flatten_space
from embodied_rft.seeding import evaluation_seed
from tests.lab.helpers_envs import TROUBLE_SEED, TROUBLE_STEP


def moody(num_envs=3, *, purpose="training", **options):
    return make_pool("Moody-v0", num_envs, kind="sync", options=options, purpose=purpose)


def actions(steps, num_envs=3, dim=2):
    return np.random.default_rng(0).uniform(-1, 1, size=(steps, num_envs, dim)).astype(np.float32)


def test_fields_and_flat_keys_of_nested_spaces():
    space = spaces.Dict(
        {
            "image": spaces.Dict({"front": spaces.Box(0, 255, (8, 8, 3), np.uint8)}),
            "state": spaces.Box(-1, 1, (4,), np.float64),
            "word": spaces.Text(9),
            "choice": spaces.Discrete(3),
        }
    )
    assert fields_of(space) == {
        "choice": Field((), "int64"),
        "image/front": Field((8, 8, 3), "uint8"),
        "state": Field((4,), "float32"),
        "word": Field((), "str", "ragged"),
    }
    assert list(flatten_space(spaces.Box(0, 1, (2,)))) == ["observation"]
    with pytest.raises(ValueError, match="Wrap the environment"):
        fields_of(spaces.Tuple([space]))


def test_pool_repeats_single_environments_exactly():
    pool, singles = moody(), [gymnasium.make("Moody-v0") for _ in range(3)]
    observation = pool.reset(np.array([4, 5, 6]))
    expected = [env.reset(seed=seed)[0] for env, seed in zip(singles, (4, 5, 6))]
    for action in actions(8):
        for key in ("state", "pixels"):
            assert np.array_equal(observation[key], np.stack([e[key] for e in expected]))
        result = pool.step(action)
        answers = [env.step(a) for env, a in zip(singles, action)]
        expected, observation = [a[0] for a in answers], result.observation
        assert np.array_equal(result.reward, np.array([a[1] for a in answers], dtype=np.float32))
        assert result.truncated.tolist() == [a[3] for a in answers]
        assert result.info["success"].tolist() == [a[4]["is_success"] for a in answers]
        assert result.valid.all() and result.reward.dtype == np.float32


def test_masked_reset_leaves_the_others_alone():
    pool, untouched = moody(), moody()
    pool.reset(np.array([1, 2, 3]))
    untouched.reset(np.array([1, 2, 3]))
    moves = actions(6)
    for t in range(3):
        pool.step(moves[t]), untouched.step(moves[t])
    observation = pool.reset(np.array([9, 9, 9]), np.array([False, True, False]))
    assert np.array_equal(observation["state"][1], gymnasium.make("Moody-v0").reset(seed=9)[0]["state"])
    for t in range(3, 6):
        ours, theirs = pool.step(moves[t]), untouched.step(moves[t])
        assert np.array_equal(ours.observation["state"][[0, 2]], theirs.observation["state"][[0, 2]])
        assert not np.array_equal(ours.observation["state"][1], theirs.observation["state"][1])


def test_reset_options_reach_the_environment():
    pool = moody()
    assert pool.reset(np.arange(3), options={"position": [7.0, 8.0]})["state"].tolist() == [[7.0, 8.0]] * 3


def test_ended_environments_idle_until_reset():
    pool = moody()
    with pytest.raises(RuntimeError, match="call reset"):
        pool.step(np.zeros((3, 2)))
    pool.reset(np.arange(3), np.array([True, True, False]))
    for _ in range(8):
        result = pool.step(np.zeros((3, 2)))
        assert result.valid.tolist() == [True, True, False]
    assert result.truncated.all() and not result.terminated.any()
    frozen = pool.reset(np.arange(3), np.array([True, False, False]))["state"][1]
    for _ in range(20 - 13):
        result = pool.step(np.zeros((3, 2)))
        assert result.valid.tolist() == [True, False, False]
        assert result.reward[1] == 0 and np.array_equal(result.observation["state"][1], frozen)


@pytest.mark.parametrize("trouble", ["nan", "inf_reward", "nan_reset"])
def test_not_finite_numbers_stop_at_the_door(trouble):
    pool = moody(trouble=trouble)
    observation = pool.reset(np.array([1, TROUBLE_SEED, 3]))
    first_bad = 1 if trouble == "nan_reset" else TROUBLE_STEP
    for step in range(1, first_bad + 1):
        assert np.isfinite(observation["state"]).all()
        result = pool.step(np.zeros((3, 2)))
        assert result.valid.tolist() == [True, step < first_bad, True]
        observation = result.observation
    assert np.isfinite(observation["state"]).all() and np.isfinite(result.reward).all()
    assert result.truncated[1] and not result.terminated[1] and not result.info["success"][1]
    assert pool.incidents.counts["non_finite"] == 1
    assert f"environment 1 (seed {TROUBLE_SEED})" in pool.incidents.latest[0]
    pool.reset(np.array([0, 2, 0]), np.array([False, True, False]))
    assert pool.step(np.zeros((3, 2))).valid.all()
    assert pool.incidents.counts["non_finite"] == 1


def test_training_and_evaluation_seeds_never_meet():
    train, judge = moody(), moody(purpose="evaluation")
    held_out = np.array([evaluation_seed(i) for i in range(3)])
    judge.reset(held_out)
    with pytest.raises(ValueError, match="reserved for evaluation"):
        train.reset(held_out)
    with pytest.raises(ValueError, match="training seed"):
        judge.reset(np.arange(3))
    train.reset(np.where([True, False, False], 5, held_out), np.array([True, False, False]))
    with pytest.raises(ValueError, match="negative"):
        train.reset(np.array([1, -1, 1]))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((2, 2)), r"expected \(3, 2\)"),
        (np.zeros(3), r"expected \(3, 2\)"),
        (np.array([[0, 0], [0, np.nan], [0, 0]]), "environment 1 is not finite"),
    ],
)
def test_bad_actions_are_refused(action, message):
    pool = moody()
    pool.reset(np.arange(3))
    with pytest.raises(ValueError, match=message):
        pool.step(action)


def test_bad_discrete_and_text_actions_are_refused():
    pool = make_pool("CartPole-v1", 2, kind="sync")
    pool.reset(np.arange(2))
    assert pool.action_field == Field((), "int64")
    for bad in (np.array([0.0, 1.0]), np.array([0, 2])):
        with pytest.raises(ValueError):
            pool.step(bad)
    chatter = make_pool("Chatter-v0", 2)
    chatter.reset(np.arange(2))
    for bad in ("xy", ["a"], ["a", 3]):
        with pytest.raises(ValueError, match="2 strings"):
            chatter.step(bad)


def test_text_environment():
    pool = make_pool("Chatter-v0", 2)
    assert all(text.startswith("hello") for text in pool.reset(np.arange(2))["observation"])
    result = pool.step(["bye", "hm"])
    assert result.observation == {"observation": ["you said bye", "you said hm"]}
    assert result.terminated.tolist() == [True, False] and result.info["success"].tolist() == [True, False]
    again = pool.step(["ignored", "well"])
    assert again.observation["observation"] == ["you said bye", "you said well"]


@pytest.mark.parametrize("fresh", [True, False])
def test_state_round_trip_continues_bit_for_bit(fresh):
    pool = moody()
    pool.reset(np.array([1, 2, 3]))
    moves = actions(12)
    for t in range(5):
        pool.step(moves[t])
    assert pool.can_save
    state = pool.get_state()

    def rest(p):
        results = [p.step(moves[t]) for t in range(5, 8)]
        p.reset(np.array([4, 4, 4]), np.array([True, True, False]))
        return results + [p.step(moves[t]) for t in range(8, 12)]

    expected = rest(pool)
    other = moody() if fresh else pool
    other.set_state(state)
    for ours, theirs in zip(rest(other), expected):
        assert np.array_equal(ours.reward, theirs.reward) and np.array_equal(ours.truncated, theirs.truncated)
        assert np.array_equal(ours.observation["state"], theirs.observation["state"])
        assert np.array_equal(ours.info["success"], theirs.info["success"])


def test_states_that_cannot_be_had_are_none():
    pool = make_pool("CartPole-v1", 2, kind="sync")
    pool.reset(np.arange(2))
    assert not pool.can_save and pool.get_state() is None
    stacked = SyncVectorEnv(
        [lambda: gymnasium.wrappers.NormalizeReward(gymnasium.make("Moody-v0"))], autoreset_mode="Disabled"
    )
    assert not VectorPool(stacked).can_save  # the wrapper holds statistics that nobody can ask for
    with pytest.raises(ValueError, match="same num_envs"):
        small, large = moody(2), moody(3)
        small.reset(np.arange(2))
        large.set_state(small.get_state())


def test_make_pool_explains_what_is_wrong():
    with pytest.raises(ValueError, match="did you mean 'Moody-v0'"):
        make_pool("Mody-v0", 2)
    with pytest.raises(ValueError, match="did you mean 'workers'"):
        make_pool("Moody-v0", 2, kind="worker")
    with pytest.raises(ValueError, match="refused its options"):
        make_pool("Moody-v0", 2, options={"gravity": 3})
    with pytest.raises(ValueError, match="no native vector form"):
        make_pool("Moody-v0", 2, kind="native")
    with pytest.raises(ValueError, match="has no effect"):
        make_pool("Moody-v0", 2, kind="sync", num_workers=2)
    with pytest.raises(ValueError, match="at least 1"):
        make_pool("Moody-v0", 0)
    with pytest.raises(ValueError, match="AutoresetMode.DISABLED"):
        VectorPool(SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")]))


def test_a_sync_pool_restored_after_an_ending_goes_on():
    pool = make_pool("CartPole-v1", num_envs=2, kind="sync")
    assert pool.get_state() is None  # CartPole offers no state; a Fetch environment does
    pool.close()
    pools = [make_pool("embodied_rft/FetchReach-v0", num_envs=2, kind="sync") for _ in range(2)]
    a, b = pools
    action = np.zeros((2, 4), np.float32)
    for pool in pools:
        pool.reset(np.array([1, 2]))
    a.step(action)
    for _ in range(50):
        last = b.step(action)
    assert last.truncated.all()
    b.set_state(a.get_state())  # from an ended episode back into a running one
    left, right = a.step(action), b.step(action)
    assert np.array_equal(left.observation["observation"], right.observation["observation"])
    for pool in pools:
        pool.close()
