"""The contract of an environment as a program, for our own and for those of third parties."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env

from embodied_rft import registry
from embodied_rft.device import seeded
from embodied_rft.learning.agent import build_agent
from embodied_rft.names import UserError
from embodied_rft.pools.answers import Unfit, as_reward, as_truth, leaves_of, success_of
from embodied_rft.pools.incidents import describe_error
from embodied_rft.pools.making import find_spec, make_single
from embodied_rft.pools.pool import make_pool
from embodied_rft.pools.promises import random_actions, same
from embodied_rft.pools.protocol import LARGEST, Pool, field_of, fields_of, flatten_space, is_text
from embodied_rft.pools.wrappers import single_state

NUM_STEPS = 50


def check_env(env: str | EnvSpec | gymnasium.Env, *, options: Mapping[str, Any] | None = None) -> None:
    """Check an environment: whatever `erft train` would refuse, or throw away, raises; what it would warn of warns.

    Answers that fit the spaces, finite numbers, success at the end, states, an agent that can act, the vector form
    raise. Seeds that promise nothing, and what Gymnasium's and SB3's checkers complain of, are warnings.

    Args:
        env: a registered id or specification; or an instance, which is checked alone (no vector form).
        options: constructor arguments that go with an id.

    Raises:
        ValueError: names the first rule that is broken.
    """
    if isinstance(env, gymnasium.Env):
        _check_single(env)
        return
    spec = find_spec(env)
    single = make_single(spec, options=options)
    try:
        _check_single(single)
    finally:
        single.close()
    _check_vector_form(spec, dict(options or {}))


def _check_single(env: gymnasium.Env) -> None:
    name = env.spec.id if env.spec is not None else str(env.unwrapped)
    fields_of(env.observation_space)
    field_of("action", env.action_space)
    _check_agents(env, name)
    first, second = _record(env, name, seed=7), _record(env, name, seed=7)
    _advise(name, lambda: _require_equal(first, second, "two episodes from seed 7", "draw from self.np_random only"))
    if all(same(first, _record(env, name, seed=seed)) for seed in (8, 9, 10)):
        warnings.warn(
            f"{name}: seeds 7 to 10 give the same episode: nothing can be held out for evaluation", stacklevel=3
        )
    _check_finite(first, name)
    _check_success(first, name)
    if same(first, second):  # else nothing could be compared
        _check_state(env, name)
    _advise(f"{name}: Gymnasium's checker", lambda: gymnasium_check_env(env.unwrapped, skip_render_check=True))
    _advise(f"{name}: the checker of stable-baselines3", lambda: _check_with_sb3(env.unwrapped))


def _advise(who: str, check: Callable[[], None]) -> None:
    """A check whose complaints do not keep an environment from being trained in: they are warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else describe_error(error)
        warnings.warn(f"{who}: {said}", stacklevel=4)


def _check_agents(env: gymnasium.Env, name: str) -> None:
    """Whether any agent that needs no model from a file can act here; text is for language models, which do."""
    leaves = [*flatten_space(env.observation_space).values(), env.action_space]
    if any(is_text(leaf) for leaf in leaves):
        return
    refused = {}
    for id in registry.known("agent"):
        try:
            build_agent({"id": id}, env.observation_space, env.action_space, seeded(0))
            return
        except ValueError as error:
            refused[id] = str(error)
    said = "; ".join(f"{id}: {refused[id]}" for id in ("gaussian", "categorical") if id in refused)
    raise UserError(f"{name}: no agent can act here ({said})")


def _check_with_sb3(env: gymnasium.Env) -> None:
    """SB3 knows no text and no nested observation."""
    leaves = flatten_space(env.observation_space)
    if any(isinstance(leaf, spaces.Text) for leaf in leaves.values()) or any("/" in key for key in leaves):
        return
    if isinstance(env.action_space, spaces.Text):
        return
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    sb3_check_env(env, skip_render_check=True)


def _record(env: gymnasium.Env, name: str, *, seed: int, num_steps: int = NUM_STEPS) -> list[Any]:
    """[observation, (observation, reward, terminated, truncated, success or None), ...] of one episode.

    Raises:
        ValueError: what a run would throw away: an exception, or an answer that does not fit the spaces.
    """
    leaves, said = leaves_of(env.observation_space), list[Any]()

    def show(observation: Any) -> dict[str, Any]:
        return {leaf.key: copy.deepcopy(leaf.find(observation)) for leaf in leaves}

    try:
        observation, _ = env.reset(seed=seed)
        said.append((show(observation),))
        for action in random_actions(env.action_space, num_steps):
            observation, reward, terminated, truncated, info = env.step(action)
            ends = as_truth(terminated, "terminated"), as_truth(truncated, "truncated")
            said.append((show(observation), as_reward(reward), *ends, success_of(info)))
            if any(ends):
                break
    except (Exception, SystemExit) as error:
        told = str(error) if isinstance(error, Unfit) else describe_error(error)
        raise UserError(f"{name}: after {len(said)} of the steps of an episode: {told}") from error
    return said


def _require_equal(first: list[Any], second: list[Any], what: str, advice: str) -> None:
    for step, (a, b) in enumerate(zip(first, second, strict=False)):
        if not same(a, b):
            raise UserError(f"{what} differ at step {step}; expected bit-equal results: {advice}")
    if len(first) != len(second):
        raise UserError(f"{what} last {len(first) - 1} and {len(second) - 1} steps; expected the same: {advice}")


def _check_finite(said: list[Any], name: str) -> None:
    for step, entry in enumerate(said):
        leaves = {"reward": entry[1]} if len(entry) > 1 else {}
        leaves |= entry[0] if isinstance(entry[0], Mapping) else {"observation": entry[0]}
        for key, value in leaves.items():
            if isinstance(value, np.ndarray | float | np.floating) and not (np.abs(value) <= LARGEST).all():
                raise UserError(f"{name}: {key!r} is NaN or infinite at step {step}; expected finite numbers")


def _check_success(said: list[Any], name: str) -> None:
    ended = len(said) > 1 and (said[-1][2] or said[-1][3])
    reported = [entry[4] for entry in said[1:]]
    if not ended or all(value is None for value in reported):
        return  # no success to report, or it may still come at the end
    if reported[-1] is None:
        raise UserError(
            f"{name}: info has a success key during the episode but not on its last step; expected 'is_success' (or "
            "'success') there, because the last step decides"
        )


def _check_state(env: gymnasium.Env, name: str) -> None:
    """Continue from get_state twice; skipped when the environment does not offer it."""
    env.reset(seed=7)
    if single_state(env) is None:
        return
    base: Any = env.unwrapped
    actions = random_actions(env.action_space, 8)
    for action in actions[:3]:
        if any(env.step(action)[2:4]):
            return
    state = {key: np.array(value) for key, value in base.get_state().items()}
    first = _steps(base, actions[3:])
    base.set_state({key: value.copy() for key, value in state.items()})
    second = _steps(base, actions[3:])
    advice = "get_state must return copies of all that the future depends on, set_state must restore all of it"
    _require_equal(first, second, f"{name}: 5 steps before and after set_state(get_state())", advice)


def _steps(env: Any, actions: list[Any]) -> list[Any]:
    """What an environment answers, up to the end of the episode."""
    said: list[Any] = []
    for action in actions:
        said.append(env.step(action)[:4])
        if any(said[-1][2:]):
            break
    return said


def _check_vector_form(spec: EnvSpec, options: dict[str, Any], *, tolerance: float = 1e-6) -> None:
    """The default pool must tell the same story as single environments: within 1e-6, dtypes and ends exactly."""
    pool = make_pool(spec, 3, options=options)
    reference = make_pool(spec, 3, kind="sync", options=options)
    try:
        _compare_pools(pool, reference, spec.id, tolerance)
    finally:
        pool.close()
        reference.close()


def _compare_pools(pool: Pool, reference: Pool, name: str, tolerance: float) -> None:
    seeds = np.array([7, 8, 9])
    ours, theirs = pool.reset(seeds), reference.reset(seeds)
    _require_close(ours, theirs, f"{name}: vector and single form after reset", tolerance)
    streams = [random_actions(reference.action_space, NUM_STEPS * 3)[env::3] for env in range(3)]
    text = isinstance(reference.action_space, spaces.Text)
    for step, actions in enumerate(zip(*streams, strict=True)):
        action = list(actions) if text else np.stack([np.asarray(a) for a in actions])
        a, b = pool.step(action), reference.step(action)
        place = f"{name}: vector and single form at step {step}"
        signals = ("reward", "terminated", "truncated", "valid")
        _require_close(
            {**a.observation, **a.info, **{k: getattr(a, k) for k in signals}},
            {**b.observation, **b.info, **{k: getattr(b, k) for k in signals}},
            place,
            tolerance,
        )
        ended = a.terminated | a.truncated
        if ended.any():
            seeds = seeds + 3
            _require_close(pool.reset(seeds, ended), reference.reset(seeds, ended), place + ", reset", tolerance)


def _require_close(ours: Mapping[str, Any], theirs: Mapping[str, Any], place: str, tolerance: float) -> None:
    if ours.keys() != theirs.keys():
        raise UserError(f"{place} have the keys {sorted(ours)} and {sorted(theirs)}; expected the same")
    for key, value in ours.items():
        other = theirs[key]
        if isinstance(value, list):
            equal = value == other
        elif value.dtype != other.dtype or value.shape != other.shape:
            raise UserError(
                f"{place}: {key!r} is {value.dtype} {value.shape} and {other.dtype} {other.shape}; expected the same"
            )
        elif np.issubdtype(value.dtype, np.floating):
            untold = np.isnan(value) & np.isnan(other)  # statistics of episodes that go on
            equal = bool((untold | (np.abs(value - other) <= tolerance * (1 + np.abs(other)))).all())
        else:
            equal = bool((value == other).all())
        if not equal:
            raise UserError(f"{place}: {key!r} differs; expected equal numbers (floats within {tolerance:g})")
