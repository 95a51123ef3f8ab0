"""Environments in parts with processes of their own: the same episodes as in one process, and clear refusals."""

import numpy as np
import pytest

from embodied_rft.data import Decisions
from embodied_rft.experience.collect import Collector
from embodied_rft.options import ConfigError
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.pool import open_pool
from embodied_rft.pools.promises import same
from embodied_rft.pools.splits import Splits
from tests.lab.helpers_envs import TROUBLE_SEED, TROUBLE_STEP

MOODY = {"id": "tests.lab.helpers_envs:Moody-v0", "num_envs": 5, "pool": "workers"}


def act(observation):
    seen = observation["state"]
    return Decisions(-np.tanh(seen).astype(np.float32), np.zeros((len(seen), 1), np.float32))


def episodes(recording):
    """What happened in each environment, in its order."""
    return recording.successes, recording.returns, recording.lengths, recording.invalid


def test_processes_share_the_environments_and_go_on_from_a_state():
    env = EnvConfig(**MOODY, splits=3, num_workers=4)
    pool = open_pool(env, purpose="training")
    assert isinstance(pool, Splits) and [each.num_envs for each in pool.pools] == [1, 2, 2]
    assert [each.host.num_workers for each in pool.pools] == [1, 1, 2] and pool.can_save
    again = open_pool(env, purpose="training")
    collectors = [Collector(each, run_seed=0) for each in (pool, again)]
    collectors[0].collect(act, decisions=40)
    collectors[1].load_state_dict(collectors[0].state_dict())
    recordings = [each.collect(act, decisions=60) for each in collectors]
    assert recordings[0].lengths and episodes(recordings[0]) == episodes(recordings[1])
    assert same(*(collector.state_dict() for collector in collectors))
    for each in (pool, again):
        each.close()


@pytest.mark.parametrize("trouble", ["raise", "nan", "crash"])
def test_messages_name_an_environment_by_its_number_among_all(trouble):
    pool = open_pool(EnvConfig(**MOODY, splits=2, options={"trouble": trouble}, max_incidents=1.0), purpose="training")
    pool.reset(np.array([1, 2, 3, TROUBLE_SEED, 4]))
    results = [pool.step(np.zeros((5, 2), np.float32)) for _ in range(TROUBLE_STEP)]
    assert not results[-1].valid[3] and results[-1].valid[:2].all() and results[0].valid.all()
    assert f"environment 3 (seed {TROUBLE_SEED}" in pool.incidents.latest[0]
    pool.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pool": "sync"}, "no effect with env.pool 'sync'.*set env.pool to workers"),
        ({"pool": "auto"}, "no effect with env.pool 'auto'"),
        ({"num_envs": 2}, "env.splits 3 with env.num_envs 2.*expected env.splits <= 2"),
        ({"num_workers": 1}, "env.splits 3 with env.num_workers 1"),
    ],
    ids=str,
)
def test_parts_that_would_wait_for_one_another_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        EnvConfig(**{**MOODY, "splits": 3, **options})


def test_fewer_environments_than_parts_are_one_each():
    pool = open_pool(EnvConfig(**MOODY, splits=3, evaluation_envs=2), purpose="evaluation")
    assert [each.num_envs for each in pool.pools] == [1, 1]
    pool.close()
