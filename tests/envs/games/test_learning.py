"""A small policy learns a game by PPO in seconds, from its symbols; with the wrong credit it does not."""

import pytest

from embodied_rft.buffer.trajectories import read_trajectories
from embodied_rft.experience.demonstrate import write_demos
from embodied_rft.learning.learner import LearnerConfig
from embodied_rft.pools.pool import make_pool
from tests.envs.games.levels import LEVELS
from tests.lab.harness import Lab, fails, require

pytestmark = [pytest.mark.learning, pytest.mark.usefixtures("one_thread")]

PPO = {"id": "ppo", "gamma": 0.9, "num_epochs": 4, "batch_size": 128, "value_hidden": [32]}
CATEGORICAL = {"id": "categorical", "hidden": [32], "last_gain": 0.01}


def number_line(num_envs, *, purpose):
    options = {"observation": "state", "max_position": 7}
    return make_pool("embodied_rft/NumberLine-v0", num_envs, options=options, purpose=purpose)


def learns(*, tamper=None):
    lab = Lab(CATEGORICAL, make=number_line, tamper=tamper)
    lab.objective(PPO, LearnerConfig(learning_rate=3e-3))
    require(lab.success() < 0.7, "it must not know the way yet")
    lab.finetune(rounds=10, decisions=512, updates=None)
    assert lab.success() >= 0.95


def with_the_credit_of_others(batch):
    batch.notes = {**batch.notes, "advantage": batch.notes["advantage"].roll(len(batch) // 2 + 1, 0)}
    return batch


def test_ppo_learns_number_line():
    learns()


def test_ppo_with_the_credit_of_others_does_not():
    fails(learns, tamper=with_the_credit_of_others)


@pytest.mark.parametrize("game", LEVELS)
def test_players_write_demonstrations(game, tmp_path):
    """Pictures, states and actions go through pool, collector and file: what a cold start reads."""
    options = {"observation": "both", **LEVELS[game][0][0]}
    told = write_demos(f"embodied_rft/{game}-v0", tmp_path / "demos.npz", episodes=4, options=options)
    assert told["episodes"] == 4 and told["decisions"] >= 4
    trajectories = list(read_trajectories(tmp_path / "demos.npz"))
    assert len(trajectories) == 4 and {"image", "state"} <= set(trajectories[0].observation)
