"""What an environment can say about the states that its episodes begin with, where there is a finite list of them.

Both are optional, of the environment or its vector form, and any environment may have them:

    num_held_out_states     attribute: how many distinct states evaluation can show; the one of a seed is number
                            `seeding.held_out_index(seed, num_held_out_states)`. Each is then judged once.
    initial_observations()  {name: observation} of all of them, held out or not; with it goes an option `exclude`, names
                            that are never shown. A policy that has `unreadable` is then asked before the run starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied_rft.names import UserError
from embodied_rft.seeding import held_out_index

SHOWN = 5  # names in a message


def ask(pool: Any, name: str) -> Any:
    """What the environments of a pool say under `name`, called if it is a method; None if they do not have it."""
    while hasattr(pool, "pool"):  # chunks and queues around a pool
        pool = pool.pool
    return pool.ask(name) if hasattr(pool, "ask") else None


def num_held_out_states(pool: Any) -> int | None:
    """How many distinct states evaluation can show; None: more than anybody counts, or unknown."""
    count = ask(pool, "num_held_out_states")
    if count is not None and (isinstance(count, bool) or int(count) != count or count < 0):
        raise UserError(
            f"the environment says num_held_out_states = {count!r}; expected how many states evaluation can show"
        )
    return None if count is None else int(count)


def distinct_seeds(seeds: Sequence[int], num_states: int) -> list[int]:
    """Of evaluation seeds, the first that shows each of a finite list of states."""
    return list({held_out_index(int(seed), num_states): int(seed) for seed in reversed(seeds)}.values())[::-1]


def unreadable(pool: Any, policy: Any) -> list[str]:
    """Names of initial states that `policy` is to leave out because it cannot read them.

    Raises:
        ValueError: there are some, and the policy does not say that they are to be left out; or none is left.
    """
    check = getattr(policy, "unreadable", None)
    states = None if check is None else ask(pool, "initial_observations")
    if check is None or not states:
        return []
    names, rows = list(states), [one if isinstance(one, Mapping) else {"observation": one} for one in states.values()]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    reasons = check({k: v if isinstance(v[0], str) else np.stack(v) for k, v in columns.items()})
    if not reasons:
        return []
    found = "; ".join(f"{names[row]}: {reasons[row]}" for row in sorted(reasons)[:SHOWN])
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    if len(reasons) == len(names) or not getattr(policy, "leaves_out", False):
        raise UserError(
            f"{len(reasons)} of {len(names)} prompts cannot be answered by this policy: {found}{more}. Mend them, give "
            "the model more room, or leave them out with agent.long_prompts: skip"
        )
    return [names[row] for row in sorted(reasons)]
