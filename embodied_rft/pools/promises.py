"""Whether a seed fixes an initial state: tested, not trusted; and other ways of seeding where it does not.

Boundary: knows single Gymnasium environments, one at a time. A held-out initial state is only held out if its seed
brings it back, so a pool tests this before the first episode, and the run says what was found.

Ways, tried in this order: "reset" (Gymnasium's `reset(seed=...)`), "method" (`env.unwrapped.seed(seed)` of older
interfaces, the flag `seeded_rand_vec` of Meta-World, and the generators of the spaces), "global" (the generators of
`random` and `numpy.random`, which get a state of their own in every environment), "remake" (the environment is made
again under seeded global generators).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np

from embodied_rft.data import Space
from embodied_rft.pools.incidents import is_infrastructure, kind_of
from embodied_rft.pools.protocol import Pool, Seeding, is_text
from embodied_rft.seeding import FIRST_EVALUATION_SEED

WAYS = ("reset", "method", "global", "remake")
# Behind every evaluation sheet, as large as a seed may be; neighbours, because a finite list of states repeats itself.
PROBES = tuple(2**32 - 1 - k for k in (0, 1, 1000, 3001))
NUM_STEPS = 3  # with the same actions: a goal that no observation shows, shows in the reward


def held_out(pool: Pool) -> dict[str, Any]:
    """What an evaluation in `pool` may claim of its initial states: {"held_out": True, "seeding": ""}."""
    found = pool.seeding or Seeding()
    return {"held_out": found.held_out, "seeding": found.note}


def narrow_seed(seed: int) -> int:
    """A seed in 31 bits, for simulators with C integers: even for training, odd for evaluation, so they never meet.

    One to one on evaluation sheets 0 to 10,000; two training seeds may become one.
    """
    evaluation = seed >= FIRST_EVALUATION_SEED
    return (2 * seed % FIRST_EVALUATION_SEED) | int(evaluation)


@contextmanager
def global_generators(state: Any | None, seed: int | None = None) -> Iterator[list[Any]]:
    """`random` and `numpy.random` in a state of their own for a while; the list holds it afterwards.

    Args:
        state: from an earlier use, or None to start from `seed`.
        seed: 32 bits.
    """
    before = random.getstate(), np.random.get_state()
    if state is None:
        random.seed(seed)
        np.random.seed(seed)
    else:
        random.setstate(state[0])
        np.random.set_state(state[1])
    kept: list[Any] = []
    try:
        yield kept
    finally:
        kept[:] = [random.getstate(), np.random.get_state()]
        random.setstate(before[0])
        np.random.set_state(before[1])


def call_seed_method(env: gymnasium.Env, seed: int) -> None:
    """The ways of older interfaces; and the generators of the spaces, for environments that sample from them."""
    base: Any = env.unwrapped
    base.observation_space.seed(seed)
    base.action_space.seed(seed)
    if hasattr(base, "seeded_rand_vec"):  # Meta-World: draw the initial state from the seeded generator
        base.seeded_rand_vec = True
    if callable(getattr(base, "seed", None)):
        base.seed(seed)


def find_seeding(tell: Callable[[int, Seeding], Any], *, ways: tuple[str, ...] = WAYS) -> Seeding:
    """The first way under which one seed gives one initial state; `Seeding(repeats=False)` if there is none.

    Args:
        tell: resets an environment from a seed under a seeding and gives what it showed; raises what the environment
            raises.
        ways: those that may be tried.
    """
    narrow = False
    try:
        tell(PROBES[0], Seeding())
    except Exception as error:
        narrow = not is_infrastructure(kind_of(error))  # a server that was not there says nothing of seeds
        tell(PROBES[0], Seeding(narrow=narrow))
    best: Seeding | None = None
    for way in ways:
        found = _test(tell, Seeding(way, narrow), varied=best is not None)
        if found is not None and found.varies:
            return found
        best = best or found
    return best or Seeding(narrow=narrow, repeats=False)


def _test(tell: Callable[[int, Seeding], Any], seeding: Seeding, *, varied: bool) -> Seeding | None:
    """What this way promises, None if nothing. `varied`: another way repeats already; only two states are news."""
    try:
        first, other = tell(PROBES[0], seeding), tell(PROBES[1], seeding)
        if (varied and same(first, other)) or not same(first, tell(PROBES[0], seeding)):
            return None
        varies = not same(first, other) or any(not same(first, tell(seed, seeding)) for seed in PROBES[2:])
    except Exception:  # this way does not exist here
        return None
    return replace(seeding, varies=varies)


def same(a: Any, b: Any) -> bool:
    """Whether two trees of arrays, numbers and texts are equal to the bit; NaN equals nothing."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b))


def random_actions(space: Space, count: int) -> list[Any]:
    """`count` of them, always the same."""
    twin = copy.deepcopy(space)
    twin.seed(0)
    return [twin.sample() for _ in range(count)]


def first_moves(env: gymnasium.Env) -> list[Any]:
    """A few actions, the same whenever asked; none for text, where a step may cost a judge's call."""
    return [] if is_text(env.action_space) else random_actions(env.action_space, NUM_STEPS)
