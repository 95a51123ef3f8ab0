"""From an id to environments: seeds that are tested, wrappers, packages, native forms; all of it in every pool."""

import importlib.util
import json
import random

import gymnasium
import numpy as np
import pytest

from embodied_rft.options import ConfigError, parse
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.making import PACKAGES, find_spec, find_wrapper, make_single
from embodied_rft.pools.pool import VectorPool, make_pool, open_pool
from embodied_rft.pools.promises import PROBES, narrow_seed
from embodied_rft.pools.singles import Singles
from embodied_rft.runs.judge import evaluate_run
from embodied_rft.runs.recipe import Recipe
from embodied_rft.seeding import evaluation_seed
from embodied_rft.train import train

SEEDED = "tests.lab.helpers_seeds:Seeded-v0"
ZOO = "tests.lab.helpers_zoo:Zoo-v0"


def story(pool, seeds, steps=3):
    """The initial states and what follows."""
    said, still = [pool.reset(seeds)["observation"]], np.zeros((len(seeds), 1), np.float32)
    return np.stack(said + [pool.step(still).observation["observation"] for _ in range(steps)])


@pytest.mark.parametrize(
    ("by", "way"),
    [
        ("np_random", "reset"), ("method", "method"), ("flag", "method"), ("space", "method"), ("numpy", "global"),
        ("random", "global"), ("remake", "remake"),
    ],
)  # fmt: skip
def test_a_seed_brings_back_an_episode_however_the_environment_is_seeded(by, way):
    pool = make_pool(SEEDED, 3, kind="sync", options={"by": by})
    first = story(pool, np.array([1, 2, 3]))
    assert pool.seeding.way == way and pool.seeding.held_out and pool.seeding.note == ""
    assert np.array_equal(first, story(pool, np.array([1, 2, 3])))
    assert not np.array_equal(first[0], story(pool, np.array([4, 5, 6]))[0])
    assert len(np.unique(first[0])) == 3
    again = make_pool(SEEDED, 3, kind="sync", options={"by": by})
    before = np.random.get_state()[1].copy(), random.getstate()
    assert np.array_equal(first, story(again, np.array([1, 2, 3])))
    assert np.array_equal(before[0], np.random.get_state()[1]) and random.getstate() == before[1]


@pytest.mark.parametrize(("by", "note"), [("nothing", "ignores its seed"), ("constant", "the same state whatever")])
def test_what_cannot_be_held_out_is_said_once(by, note, tmp_path):
    tree = {
        "env": {"id": SEEDED, "num_envs": 2, "options": {"by": by}},
        "agent": {"id": "gaussian", "hidden": [8]},
        "stages": [{"collect": {"episodes": 2}}, {"evaluate": {"episodes": 2}}, {"evaluate": {"episodes": 2}}],
        "buffer": {"capacity": 500},
    }
    train(parse(Recipe, tree), tmp_path, quiet=True, report=False)
    assert (tmp_path / "run.log").read_text().count(note) == 1
    for path in (tmp_path / "evaluations").glob("*.json"):
        content = json.loads(path.read_text())
        assert content["held_out"] is False and note in content["seeding"]


@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_no_seed_is_larger_than_the_simulator_takes(purpose):
    seeds = np.array([7, 2**31 - 1]) if purpose == "training" else np.array([evaluation_seed(0), 2**32 - 1])
    for bits in (31, 32):
        pool = make_pool(SEEDED, 2, kind="sync", options={"bits": bits}, purpose=purpose)
        pool.reset(seeds)
        assert pool.step(np.zeros((2, 1))).valid.all() and pool.seeding.narrow == (bits == 31)
    assert max(PROBES) < 2**32


def test_narrow_seeds_of_training_and_evaluation_never_meet():
    rng = np.random.default_rng(0)
    training = {narrow_seed(int(s)) for s in rng.integers(0, 2**31, size=20_000)}
    held_out = [narrow_seed(evaluation_seed(i, sheet=sheet)) for sheet in (0, 1, 9_999) for i in range(0, 100_000, 7)]
    assert len(set(held_out)) == len(held_out) and not training & set(held_out)
    assert all(0 <= s < 2**31 for s in [*training, *held_out])


# --- ids -------------------------------------------------------------------------------------------------------------


def test_packages_are_named_before_they_are_missed():
    missing = [(p, m, d) for p, m, d in PACKAGES if importlib.util.find_spec(m) is None]
    ids = {"gym_pusht": "gym_pusht/PushT-v0", "metaworld": "Meta-World/MT1", "myosuite": "myoHandPoseFixed-v0"}
    tried = [(ids[module], package) for _, module, package in missing if module in ids]
    for id, package in tried:
        with pytest.raises(ValueError, match=f"pip install '{package}'"):
            find_spec(id)
    with pytest.raises(ValueError, match="no module 'nowhere' is installed"):
        find_spec("nowhere:Thing-v0")
    with pytest.raises(ValueError, match=r"unknown environment 'Zzzzzzzzz-v7'\. .*'module:Id'"):
        find_spec("Zzzzzzzzz-v7")


def test_lambdas_and_local_classes_travel_to_workers():
    seeded = find_spec(SEEDED).entry_point
    module, _, name = seeded.partition(":")

    class Local(getattr(importlib.import_module(module), name)):
        pass

    gymnasium.registry.pop("Local-v0", None)
    gymnasium.register("Local-v0", lambda **options: Local(**options))
    pool = make_pool("Local-v0", 2, kind="workers", num_workers=1)
    try:
        assert pool.reset(np.arange(2))["observation"].shape == (2, 1)
    finally:
        pool.close()
    with pytest.raises(ValueError, match="cannot be sent to worker processes"):
        make_pool(SEEDED, 1, kind="workers", options={"by": (number for number in range(3))})


class Selfish(gymnasium.vector.VectorEnv):
    """A vector form that takes the argument, and refuses to leave resets to others."""

    def __init__(self, *, num_envs, autoreset_mode="NextStep"):
        if gymnasium.vector.AutoresetMode(autoreset_mode) == gymnasium.vector.AutoresetMode.DISABLED:
            raise ValueError("Invalid autoreset_mode: Disabled")
        self.num_envs = num_envs


def test_a_vector_form_that_resets_itself_is_passed_by():
    gymnasium.registry.pop("Selfish-v0", None)
    gymnasium.register("Selfish-v0", "tests.lab.helpers_seeds:Seeded", vector_entry_point=Selfish)
    pool = make_pool("Selfish-v0", 2)
    assert isinstance(pool, VectorPool) and isinstance(pool.host, Singles)
    with pytest.raises(ValueError, match=r"cannot leave resets to others \(Invalid autoreset_mode"):
        make_pool("Selfish-v0", 2, kind="native")


# --- wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ({"id": "TimeLimits", "max_episode_steps": 3}, "did you mean 'TimeLimit'"),
        ({"id": "TimeLimit", "max_steps": 3}, "no option 'max_steps'; did you mean 'max_episode_steps'"),
        ({"id": "TimeLimit"}, "needs the option 'max_episode_steps'"),
        ({"id": "NormalizeObservation"}, "statistics of its own"),
        ({"id": "tests.lab.helpers_seeds:Double"}, "did you mean 'Doubled'"),
        ({"id": "tests.lab.helpers_seeds:Doubled", "faktor": 3}, "did you mean 'factor'"),
        ({"id": "nowhere:Thing"}, "no module 'nowhere'"),
        ({"max_episode_steps": 3}, "is written"),
    ],
)
def test_wrong_wrappers_are_refused_when_the_recipe_is_read(wrapper, message):
    tree = {"env": {"id": SEEDED, "wrappers": [wrapper]}, "agent": {"id": "gaussian"}, "stages": []}
    with pytest.raises(ConfigError, match=rf"env.wrappers.0: .*{message}"):
        parse(Recipe, tree)


def test_options_without_effect_are_refused_when_the_recipe_is_read():
    for env in ({"num_workers": 2}, {"pool": "native", "wrappers": [{"id": "ClipAction"}]}):
        with pytest.raises(ConfigError, match=r"env\.\w+ (has no effect|wrap single)"):
            parse(Recipe, {"env": {"id": SEEDED, **env}, "agent": {"id": "gaussian"}, "stages": []})


def test_a_wrapper_that_does_not_fit_says_to_what():
    with pytest.raises(ValueError, match="the wrapper GrayscaleObservation with {} does not fit the environment"):
        make_single(SEEDED, wrappers=[{"id": "GrayscaleObservation"}])
    assert find_wrapper("ClipAction") is gymnasium.wrappers.ClipAction


WRAPPERS = [{"id": "TimeLimit", "max_episode_steps": 3}, {"id": "tests.lab.helpers_seeds:Doubled", "factor": 5.0}]


@pytest.mark.parametrize("kind", ["sync", "workers"])
def test_wrappers_work_in_every_pool_and_a_time_limit_can_be_terminal(kind):
    for time_limit in ("truncated", "terminal"):
        pool = make_pool(ZOO, 2, kind=kind, wrappers=WRAPPERS, time_limit=time_limit)
        try:
            pool.reset(np.array([5, 6]))
            results = [pool.step(np.zeros((2, 1), np.float32)) for _ in range(3)]
            assert [r.reward.tolist() for r in results] == [[5.0, 5.0]] * 3
            assert not any((r.truncated | r.terminated).any() for r in results[:2])
            assert results[2].truncated.all() == (time_limit == "truncated")
            assert results[2].terminated.all() == (time_limit == "terminal")
        finally:
            pool.close()


def test_wrappers_reach_training_evaluation_and_a_later_evaluation(tmp_path):
    env = {"id": ZOO, "num_envs": 4, "evaluation_envs": 2, "pool": "sync", "wrappers": WRAPPERS}
    tree = {
        "env": env,
        "agent": {"id": "gaussian", "hidden": [8]},
        "buffer": {"capacity": 500},
        "stages": [{"collect": {"episodes": 4}}, {"evaluate": {"episodes": 3}}],
    }
    session = train(parse(Recipe, tree), tmp_path, quiet=True, report=False)
    assert (session.step_pool("training").num_envs, session.step_pool("evaluation").num_envs) == (4, 2)
    assert all(each.reward.tolist() == [5.0] * 3 for each in session.buffer.trajectories())
    (first,) = (tmp_path / "evaluations").glob("*.json")
    assert json.loads(first.read_text())["returns"] == [15.0] * 3
    assert evaluate_run(tmp_path, episodes=2, trust=True).returns == [15.0] * 2


@pytest.mark.parametrize(
    ("wrappers", "exact"),
    [
        ([{"id": "TimeLimit", "max_episode_steps": 20}, {"id": "FilterObservation", "filter_keys": ["state"]}], True),
        ([{"id": "FilterObservation", "filter_keys": ["state"]}, {"id": "FlattenObservation"},
          {"id": "FrameStackObservation", "stack_size": 3}, {"id": "TimeAwareObservation"}], True),
        ([{"id": "tests.lab.helpers_seeds:Doubled"}], False),
        ([{"id": "StickyAction", "repeat_action_probability": 0.5}], False),
    ],
)  # fmt: skip
def test_states_are_exact_through_known_wrappers_and_off_with_others(wrappers, exact):
    def fresh():
        return make_pool("tests.lab.helpers_envs:Moody-v0", 2, kind="sync", wrappers=wrappers)

    pool = fresh()
    pool.reset(np.array([1, 2]))
    moves = np.random.default_rng(0).uniform(-1, 1, size=(7, 2, 2)).astype(np.float32)
    for t in range(3):
        pool.step(moves[t])
    state = pool.get_state()
    assert pool.can_save == exact == (state is not None)
    if state is None:
        return
    other = fresh()
    other.set_state(state)
    for t in range(3, 7):
        ours, theirs = other.step(moves[t]), pool.step(moves[t])
        for key, value in theirs.observation.items():
            assert np.array_equal(ours.observation[key], value)


# --- packages of others ----------------------------------------------------------------------------------------------


def test_ale_is_found_by_its_id_and_stepped_one_by_one():
    pytest.importorskip("ale_py")
    pool = make_pool("ALE/Pong-v5", 2, purpose="evaluation")
    try:
        pool.reset(np.array([evaluation_seed(0), evaluation_seed(1)]))
        assert pool.step(np.zeros(2, np.int64)).valid.all()
    finally:
        pool.close()


def test_minigrid_is_found_by_its_id_with_its_own_wrappers():
    pytest.importorskip("minigrid")
    pool = make_pool("MiniGrid-Empty-Random-6x6-v0", 2)
    assert pool.fields["mission"].kind == "ragged"
    pool.reset(np.arange(2))
    assert pool.step(np.zeros(2, np.int64)).valid.all() and pool.seeding.held_out
    wrappers = [{"id": "minigrid.wrappers:ImgObsWrapper"}]
    flat = make_pool("MiniGrid-Empty-5x5-v0", 2, kind="workers", num_workers=1, wrappers=wrappers)
    try:
        flat.reset(np.arange(2))
        assert list(flat.fields) == ["observation"] and flat.step(np.zeros(2, np.int64)).valid.all()
    finally:
        flat.close()


@pytest.mark.parametrize("env", [{"pool": "sync"}, {"wrappers": [{"id": "TimeLimit", "max_episode_steps": 9}]}])
def test_an_option_of_batches_has_no_effect_on_single_environments(env):
    env = parse(EnvConfig, {"id": "embodied_rft/FetchReach-v0", "num_envs": 2, "options": {"num_threads": 1}, **env})
    with pytest.raises(ValueError, match="num_threads has no effect where environments step one after the other"):
        open_pool(env, purpose="training")


def test_in_a_batch_it_has():
    env = parse(EnvConfig, {"id": "embodied_rft/FetchReach-v0", "num_envs": 2, "options": {"num_threads": 1}})
    open_pool(env, purpose="training").close()
