"""Fetch as one environment and as a batch, without the time limit of its registration."""

from gymnasium.vector import AutoresetMode

from embodied_rft.envs.manipulation.fetch import FetchSimulation, FetchTask
from embodied_rft.envs.serving import BatchEnv, BatchVectorEnv

FETCH = {"batch": FetchSimulation, "task": FetchTask}


def one(name, **options):
    return BatchEnv(**FETCH, name=name, **options)


def batch(name, num_envs=3, **options):
    options = {"autoreset_mode": AutoresetMode.DISABLED, "num_threads": 2, **options}
    return BatchVectorEnv(**FETCH, name=name, num_envs=num_envs, **options)
