"""Any batch, served: both forms tell one story, autoreset is Gymnasium's, states are exact; text needs no simulator."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import embodied_rft.envs  # noqa: F401
from embodied_rft.envs.serving import BatchEnv, BatchVectorEnv, EnvBatch, Outcome, make_batch, serve
from embodied_rft.pools.promises import same
from tests.lab.worlds import PAGES


class Count(EnvBatch):
    """Counts to a number that is drawn at the start; a wrong guess costs."""

    observation_space = gymnasium.spaces.Box(0, 9, (2,), np.int64)
    action_space = gymnasium.spaces.Discrete(3)
    arrays = ("numbers",)
    reset_options = ("last",)

    def __init__(self, *, num_envs, least=2):
        super().__init__(num_envs=num_envs)
        self.least, self.numbers, self.rows = least, np.zeros((num_envs, 2), np.int64), []

    def start(self, rows, seeds, options):
        for row in rows:
            self.numbers[row] = 0, options.get("last", self.generators[row].integers(self.least, 9))

    def step(self, rows, actions):
        self.rows.append((rows.tolist(), list(actions)))
        self.numbers[rows, 0] += 1
        over = self.numbers[rows, 0] == self.numbers[rows, 1]
        return Outcome(1.0 - actions, over)

    def observe(self, rows):
        return self.numbers.copy()


serve("serving/Count-v0", Count, max_episode_steps=5, least=3)
BATCHES = [id for id, spec in gymnasium.registry.items() if spec.vector_entry_point is not None]
IDS = ("serving/Count-v0", *sorted(id for id in BATCHES if id.startswith("embodied_rft/")))
INCOMPLETE = ("Jsonl-v0", "/Told-v0", "/RecordedSteps-v0")  # they need a file, or what is lifted
COMPLETE = [id for id in IDS if not id.endswith(INCOMPLETE) and id not in PAGES]


@pytest.mark.parametrize("id", COMPLETE)
def test_next_step_autoreset_equals_gymnasiums_vector_of_single_environments(id):
    batch = make_batch(**gymnasium.spec(id).kwargs, num_envs=1)
    options = {"num_envs": 2} | ({} if batch.one_decision else {"max_episode_steps": 3})
    ours = gymnasium.make_vec(id, **options)
    theirs = gymnasium.make_vec(id, vectorization_mode="sync", **options)
    assert isinstance(ours, BatchVectorEnv) and isinstance(theirs.envs[0].unwrapped, BatchEnv)
    assert same(ours.reset(seed=0)[0], theirs.reset(seed=0)[0])
    ours.action_space.seed(0)
    for _ in range(9):
        actions = ours.action_space.sample()
        a, b = ours.step(actions), theirs.step(actions)
        assert same(list(a[:4]), list(b[:4]))
        assert a[4].keys() == b[4].keys()
        for key in a[4]:
            np.testing.assert_array_equal(a[4][key], b[4][key])  # what is unknown is NaN
    ours.close(), theirs.close()


def test_a_time_limit_of_episodes_of_one_decision_is_refused():
    with pytest.raises(ValueError, match="max_episode_steps 3 has no effect where an episode is one decision"):
        gymnasium.make_vec("embodied_rft/TextSum-v0", num_envs=2, max_episode_steps=3)


def test_a_batch_is_asked_for_what_runs_only():
    env = BatchVectorEnv(Count, num_envs=3, least=8)
    env.reset(seed=0, options={"last": 1})
    env.step([0, 1, 2])  # all end at once
    assert env.step([0, 1, 2])[1].tolist() == [0, 0, 0] and len(env.rows) == 1
    env.set_state({**env.get_state(), "ended": np.array([False, True, False])})
    _, reward, *_, info = env.step([0, 1, 2])
    assert env.rows[1:] == [([0, 2], [0, 2])] and reward.tolist() == [1, 0, -1] and info == {}


def test_masks_options_and_ends_say_what_to_do():
    env = BatchVectorEnv(Count, num_envs=2, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step([0, 0])
    env.reset(options={"last": 1, "reset_mask": np.array([True, True])})
    env.step([0, 0])
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"environments \[1\] have ended"):
        env.step([0, 0])
    with pytest.raises(ValueError, match="did you mean 'last'"):
        env.reset(options={"lst": 1})
    single = gymnasium.make("serving/Count-v0").unwrapped
    single.reset(options={"last": 1})
    assert single.step(0)[1:] == (1.0, True, False, {})
    with pytest.raises(gymnasium.error.ResetNeeded, match="have ended"):
        single.step(0)
    with pytest.raises(AttributeError, match="nothing"):
        _ = single.nothing
    assert single.least == 3


def test_a_restored_batch_goes_on_as_it_would_have():
    env = gymnasium.make_vec("serving/Count-v0", num_envs=4)
    env.reset(seed=3)
    env.step([0] * 4)
    state = {name: value.copy() for name, value in env.get_state().items()}
    after = [[env.step([0] * 4)[:4] for _ in range(20)]]
    other = gymnasium.make_vec("serving/Count-v0", num_envs=4)
    other.set_state(state)
    after.append([other.step([0] * 4)[:4] for _ in range(20)])
    assert same(*after)
    other.set_state({**state, "rng": state["rng"] + np.uint64(2)})  # the twin that forgets what is drawn next
    assert not same(after[0], [other.step([0] * 4)[:4] for _ in range(20)])
    with pytest.raises(ValueError, match=r"state\['numbers'\] has shape nothing"):
        other.set_state({name: value for name, value in state.items() if name != "numbers"})


def test_text_needs_no_simulator():
    make = "import gymnasium, sys, embodied_rft.envs.text; gymnasium.make('embodied_rft/{}-v0').reset(seed=0)"
    for name, found in (("TextSum", "False"), ("FetchReach", "True")):
        script = f"{make.format(name)}; print('mujoco' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [found]
