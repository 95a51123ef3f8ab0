"""What an environment can say of itself: the states that its episodes begin with, where there is a finite list of them.

All are optional, of the environment or its vector form, and any environment may have them (`Pool.ask`):

    num_held_out_states     attribute: how many distinct states evaluation can show; the one of a seed is number
                            `seeding.held_out_index(seed, num_held_out_states)`. Each is then judged once.
    initial_observations()  {name: observation} of all of them, held out or not; with it goes an option `exclude`, names
                            that are never shown. A policy that has `unreadable` is then asked before the run starts.
    batch_options           attribute: names of options that have an effect only where environments step as a batch.
    official_id             attribute: the id of the environment that this one reproduces (`erft eval --official`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from embodied_rft.data import Tree
from embodied_rft.names import UserError
from embodied_rft.pools.protocol import Pool
from embodied_rft.seeding import held_out_index

SHOWN = 5  # names in a message


@runtime_checkable
class Saves(Protocol):
    """An environment, a vector form or a wrapper that can be continued bit for bit."""

    def get_state(self) -> Mapping[str, np.ndarray]:
        """All that its future depends on."""

    def set_state(self, state: Mapping[str, np.ndarray]) -> Any:
        """Continue from what `get_state` gave, after a reset."""


@runtime_checkable
class Branches(Protocol):
    """Many environments, any of which can be gone on with in the place of another: trees of what might have been."""

    def save(self, row: int) -> object:
        """All that the future of one depends on; only `restore` reads it."""

    def restore(self, row: int, saved: object) -> None:
        """The environment `row` goes on from what `save` gave, of any row of equal environments."""


@runtime_checkable
class MaySave(Protocol):
    """Has the methods of `Saves`, and says whether they can be used."""

    can_save: bool


def can_save(env: object) -> bool:
    """Whether an environment can tell its state."""
    return isinstance(env, Saves) and (not isinstance(env, MaySave) or env.can_save)


def num_held_out_states(pool: Pool) -> int | None:
    """How many distinct states evaluation can show; None: more than anybody counts, or unknown."""
    count = pool.ask("num_held_out_states")
    if count is not None and (isinstance(count, bool) or int(count) != count or count < 0):
        raise UserError(
            f"the environment says num_held_out_states = {count!r}; expected how many states evaluation can show"
        )
    return None if count is None else int(count)


def distinct_seeds(seeds: Sequence[int], num_states: int) -> list[int]:
    """Of evaluation seeds, the first that shows each of a finite list of states."""
    return list({held_out_index(int(seed), num_states): int(seed) for seed in reversed(seeds)}.values())[::-1]


def unreadable(pool: Pool, check: Callable[[Tree], Mapping[int, str]], *, leave_out: bool) -> list[str]:
    """Names of initial states that are to be left out because a policy cannot read them.

    Args:
        pool: of the environments.
        check: the rows that the policy cannot read, and why.
        leave_out: whether they may be left out.

    Raises:
        ValueError: there are some, and they may not be left out; or none is left.
    """
    if not (states := pool.ask("initial_observations")):
        return []
    names, rows = list(states), [one if isinstance(one, Mapping) else {"observation": one} for one in states.values()]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    reasons = check({k: v if isinstance(v[0], str) else np.stack(v) for k, v in columns.items()})
    if not reasons:
        return []
    found = "; ".join(f"{names[row]}: {reasons[row]}" for row in sorted(reasons)[:SHOWN])
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    if len(reasons) == len(names) or not leave_out:
        raise UserError(
            f"{len(reasons)} of {len(names)} prompts cannot be answered by this policy: {found}{more}. Mend them, give "
            "the model more room, or leave them out with agent.long_prompts: skip"
        )
    return [names[row] for row in sorted(reasons)]
