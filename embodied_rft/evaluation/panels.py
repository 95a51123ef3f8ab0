"""On which tasks an evaluation was: each named by what it shows first and by its seed, and held against earlier ones.

A seed names a task only as long as the environment stays what it was: a task added to a list, another version of a
simulator, and the same seeds show other tasks. Boundary: hashes of observations, and records that were written earlier.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from embodied_rft.data import PAST, Tree
from embodied_rft.pools.chunks import BASE_ACTION
from embodied_rft.pools.config import EnvConfig

OF_POLICIES = {PAST, BASE_ACTION}  # keys of an observation that the environment does not show


def content_of(observation: Tree, row: int) -> str:
    """A hash of what one row of an observation shows, the same on every machine: "9f3c0a51b2c4d6e8".

    Numbers count to the precision of float16: simulators differ in their last bits between processors.
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in sorted(observation.keys() - OF_POLICIES):
        value = observation[key][row]
        if isinstance(value, str):
            said = value.encode("utf-8", "surrogatepass")
        else:
            array = np.asarray(value)
            with np.errstate(over="ignore"):
                array = array.astype("<f2") + np.float16(0) if array.dtype.kind == "f" else array.astype("<i8")
            said = f"{array.shape}".encode() + array.tobytes()
        digest.update(f"{key}:{len(said)}:".encode() + said)
    return digest.hexdigest()


def task_id(observation: Tree, row: int, seed: int) -> str:
    """The name of the task that an episode begins with: "17-9f3c0a51b2c4d6e8". Siblings of a group share it."""
    return f"{seed}-{content_of(observation, row)}"


def panel_of(env: EnvConfig) -> str:
    """A hash of which environments an evaluation was in; only those of equal ones must be on equal tasks."""
    said = json.dumps([env.id, env.options, env.wrappers], sort_keys=True, default=str)
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def changed_tasks(tasks: Sequence[str], panel: str, earlier: Iterable[Mapping[str, Any]]) -> list[int]:
    """Seeds that show another task than in an earlier evaluation of the same panel.

    Args:
        tasks: of this evaluation, as `task_id` names them.
        panel: of this evaluation, see `panel_of`.
        earlier: the records of others, `evaluations/*.json`.
    """
    known = {name for record in earlier if record.get("panel") == panel for name in record.get("tasks", ())}
    others = {_seed(name) for name in known - set(tasks)}
    return [seed for seed in map(_seed, tasks) if seed in others]


def _seed(name: str) -> int:
    return int(name.partition("-")[0])
