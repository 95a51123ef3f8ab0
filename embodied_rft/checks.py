"""The contracts as programs: `check_env` and `check_policy`, for our own parts and for those of third parties.

A check raises ValueError with what was given, what was expected and what to do; it returns nothing when all is well.
It runs the thing that it checks, a few dozen steps, and changes no global state.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env

from embodied_rft import registry
from embodied_rft.agent import build_agent
from embodied_rft.answers import Unfit, as_end, as_reward, leaves_of, success_of
from embodied_rft.data import Decisions, Ragged
from embodied_rft.incidents import describe_error
from embodied_rft.making import find_spec, make_single
from embodied_rft.pool import make_pool
from embodied_rft.stepping import LARGEST, Pool, field_of, fields_of, flatten_space, is_text
from embodied_rft.wrapping import single_state

NUM_STEPS = 50


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------


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
    if all(_same(first, _record(env, name, seed=seed)) for seed in (8, 9, 10)):
        warnings.warn(
            f"{name}: seeds 7 to 10 give the same episode: nothing can be held out for evaluation", stacklevel=3
        )
    _check_finite(first, name)
    _check_success(first, name)
    if _same(first, second):  # else nothing could be compared
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
            build_agent({"id": id}, env.observation_space, env.action_space, _generator(0))
            return
        except ValueError as error:
            refused[id] = str(error)
    said = "; ".join(f"{id}: {refused[id]}" for id in ("gaussian", "categorical") if id in refused)
    raise ValueError(f"{name}: no agent can act here ({said})")


def _check_with_sb3(env: gymnasium.Env) -> None:
    """SB3 knows no text and no nested observation."""
    leaves = flatten_space(env.observation_space)
    if any(isinstance(leaf, spaces.Text) for leaf in leaves.values()) or any("/" in key for key in leaves):
        return
    if isinstance(env.action_space, spaces.Text):
        return
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    sb3_check_env(env, skip_render_check=True)


def _actions(space: spaces.Space, count: int) -> list[Any]:
    """The same random actions whenever asked; the seed of `space` itself is left alone."""
    twin = copy.deepcopy(space)
    twin.seed(0)
    return [twin.sample() for _ in range(count)]


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
        for action in _actions(env.action_space, num_steps):
            observation, reward, terminated, truncated, info = env.step(action)
            ends = as_end(terminated, "terminated"), as_end(truncated, "truncated")
            said.append((show(observation), as_reward(reward), *ends, success_of(info)))
            if any(ends):
                break
    except (Exception, SystemExit) as error:
        told = str(error) if isinstance(error, Unfit) else describe_error(error)
        raise ValueError(f"{name}: after {len(said)} of the steps of an episode: {told}") from error
    return said


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b, equal_nan=False)) if not isinstance(a, str | type(None)) else a == b


def _require_equal(first: list[Any], second: list[Any], what: str, advice: str) -> None:
    for step, (a, b) in enumerate(zip(first, second, strict=False)):
        if not _same(a, b):
            raise ValueError(f"{what} differ at step {step}; expected bit-equal results: {advice}")
    if len(first) != len(second):
        raise ValueError(f"{what} last {len(first) - 1} and {len(second) - 1} steps; expected the same: {advice}")


def _check_finite(said: list[Any], name: str) -> None:
    for step, entry in enumerate(said):
        leaves = {"reward": entry[1]} if len(entry) > 1 else {}
        leaves |= entry[0] if isinstance(entry[0], Mapping) else {"observation": entry[0]}
        for key, value in leaves.items():
            if isinstance(value, np.ndarray | float | np.floating) and not (np.abs(value) <= LARGEST).all():
                raise ValueError(f"{name}: {key!r} is NaN or infinite at step {step}; expected finite numbers")


def _check_success(said: list[Any], name: str) -> None:
    ended = len(said) > 1 and (said[-1][2] or said[-1][3])
    reported = [entry[4] for entry in said[1:]]
    if not ended or all(value is None for value in reported):
        return  # no success to report, or it may still come at the end
    if reported[-1] is None:
        raise ValueError(
            f"{name}: info has a success key during the episode but not on its last step; expected 'is_success' (or "
            "'success') there, because the last step decides"
        )


def _check_state(env: gymnasium.Env, name: str) -> None:
    """Continue from get_state twice; skipped when the environment does not offer it."""
    env.reset(seed=7)
    if single_state(env) is None:
        return
    base: Any = env.unwrapped
    actions = _actions(env.action_space, 8)
    for action in actions[:3]:
        if any(env.step(action)[2:4]):
            return
    state = {key: np.array(value) for key, value in base.get_state().items()}
    first = [base.step(action)[:4] for action in actions[3:]]
    base.set_state({key: value.copy() for key, value in state.items()})
    second = [base.step(action)[:4] for action in actions[3:]]
    advice = "get_state must return copies of all that the future depends on, set_state must restore all of it"
    _require_equal(first, second, f"{name}: 5 steps before and after set_state(get_state())", advice)


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
    streams = [_actions(reference.action_space, NUM_STEPS * 3)[env::3] for env in range(3)]
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
        raise ValueError(f"{place} have the keys {sorted(ours)} and {sorted(theirs)}; expected the same")
    for key, value in ours.items():
        other = theirs[key]
        if isinstance(value, list):
            equal = value == other
        elif value.dtype != other.dtype or value.shape != other.shape:
            raise ValueError(
                f"{place}: {key!r} is {value.dtype} {value.shape} and {other.dtype} {other.shape}; expected the same"
            )
        elif np.issubdtype(value.dtype, np.floating):
            equal = bool((np.abs(value - other) <= tolerance * (1 + np.abs(other))).all())
        else:
            equal = bool((value == other).all())
        if not equal:
            raise ValueError(f"{place}: {key!r} differs; expected equal numbers (floats within {tolerance:g})")


# ---------------------------------------------------------------------------------------------------------------------
# Policies
# ---------------------------------------------------------------------------------------------------------------------


def check_policy(policy: Any, observation_space: spaces.Space, action_space: spaces.Space, *, count: int = 6) -> None:
    """Check a policy: shapes, act and log_prob agree, randomness from `rng` alone, independent rows, full state_dict.

    Args:
        policy: an nn.Module with `act`, `log_prob`, `trace_fields`, `num_units` (docs/architecture.md).
        observation_space: of a single environment.
        action_space: of a single environment.
        count: N of the batches that are tried, at least 2.

    Raises:
        ValueError: names the first rule that is broken.
    """
    name = type(policy).__name__
    for attribute in ("act", "log_prob", "trace_fields", "num_units", "state_dict"):
        if not hasattr(policy, attribute):
            raise ValueError(f"{name} has no {attribute!r}; see the policy contract in docs/architecture.md")
    observation = _readable(policy, observation_space, _observations(observation_space, count))
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    decisions = policy.act(observation, rng=_generator(0))
    _check_decisions(name, policy, decisions, action_space, count)
    _check_agreement(name, policy, observation, decisions)
    _check_determinism(name, policy, observation, decisions)
    _check_rows(name, policy, observation, count)
    _check_mode(name, policy, observation, action_space)
    _check_weights(name, policy, observation)
    after = torch.random.get_rng_state(), np.random.get_state()[1]  # type: ignore[index]
    if not (torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1])):
        raise ValueError(f"{name} drew from the global generator of torch or NumPy; draw from the `rng` passed to it")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _observations(space: spaces.Space, count: int) -> dict[str, Any]:
    """`count` random observations as a pool gives them; unbounded numbers come from a standard normal."""
    leaves = {}
    for key, leaf in flatten_space(space).items():
        rows = _actions(leaf, count)
        leaves[key] = rows if isinstance(leaf, spaces.Text) else np.stack([np.asarray(row) for row in rows])
    return leaves


def _readable(policy: Any, space: spaces.Space, observation: dict[str, Any]) -> dict[str, Any]:
    """The observations with texts so short that the policy has room for a reply."""
    check: Any = getattr(policy, "unreadable", lambda _: {})
    leaves = flatten_space(space)
    for row, reason in check(observation).items():
        for _ in range(32):
            for key, leaf in leaves.items():
                if isinstance(leaf, spaces.Text):
                    observation[key][row] = (
                        observation[key][row][: len(observation[key][row]) // 2] or leaf.characters[0]
                    )
            if row not in check(observation):
                break
        else:
            raise ValueError(f"{type(policy).__name__} can answer no text of this space, however short: {reason}")
    return observation


def _rows(value: Any, rows: slice) -> Any:
    return value.take(np.arange(len(value))[rows]) if isinstance(value, Ragged) else value[rows]


def _tensors(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in tree.items()}


def _check_decisions(name: str, policy: Any, decisions: Decisions, action_space: spaces.Space, count: int) -> None:
    if not isinstance(decisions, Decisions):
        raise ValueError(f"{name}.act returned {type(decisions).__name__}; expected embodied_rft.data.Decisions")
    if isinstance(action_space, spaces.Text):
        ok = len(decisions.action) == count and all(isinstance(a, str) for a in decisions.action)
        expected = f"a list of {count} strings"
    else:
        action, shape = np.asarray(decisions.action), (count, *(action_space.shape or ()))
        kind = np.integer if np.issubdtype(action_space.dtype, np.integer) else np.floating
        ok = action.shape == shape and np.issubdtype(action.dtype, kind) and bool(np.isfinite(action).all())
        ok = ok and all(action_space.contains(a.astype(action_space.dtype)) for a in action)
        expected = f"finite {kind.__name__} values {shape} inside {action_space}"
    if not ok:
        raise ValueError(f"{name}.act gave the action {decisions.action!r:.200}; expected {expected}")
    if policy.num_units is not None:
        units = None if isinstance(decisions.log_prob, Ragged) else decisions.log_prob.shape
        if units != (count, policy.num_units):
            raise ValueError(f"{name}.act gave log_prob {units}; expected (N, num_units) = {(count, policy.num_units)}")
    if set(decisions.trace) != set(policy.trace_fields):
        raise ValueError(
            f"{name}.act gave the trace {sorted(decisions.trace)}; trace_fields promises {sorted(policy.trace_fields)}"
        )
    for key, each in policy.trace_fields.items():
        value = decisions.trace[key]
        if each.kind == "dense" and (np.shape(value) != (count, *each.shape) or value.dtype != np.dtype(each.dtype)):
            raise ValueError(
                f"{name}: trace {key!r} is {value.dtype} {np.shape(value)}; trace_fields promises {each.dtype} "
                f"{(count, *each.shape)}"
            )


def _check_agreement(name: str, policy: Any, observation: dict[str, Any], decisions: Decisions) -> None:
    """What act said about its decisions and what log_prob says about them later: 1e-5, so the first ratio is 1."""
    if isinstance(decisions.log_prob, Ragged):
        return  # ragged units are batched by the track that makes them, and tested there
    action = decisions.action if isinstance(decisions.action, list) else torch.as_tensor(decisions.action)
    with torch.no_grad():
        log_prob, entropy = policy.log_prob(_tensors(observation), action, _tensors(decisions.trace))
    if tuple(log_prob.shape) != decisions.log_prob.shape or tuple(entropy.shape) != decisions.log_prob.shape:
        raise ValueError(
            f"{name}.log_prob gave {tuple(log_prob.shape)} and entropy {tuple(entropy.shape)}; expected "
            f"{decisions.log_prob.shape} as act did"
        )
    gap = float(np.abs(log_prob.cpu().numpy() - decisions.log_prob).max(initial=0.0))
    if not gap <= 1e-5:
        raise ValueError(
            f"{name}: act and log_prob disagree by {gap:.3g} on the same decisions; expected at most 1e-5. Put into "
            "the trace what act computed the log-probability from (e.g. the value before squashing)."
        )


def _check_determinism(name: str, policy: Any, observation: dict[str, Any], decisions: Decisions) -> None:
    again = policy.act(observation, rng=_generator(0))
    if not _same(_plain(decisions), _plain(again)):
        raise ValueError(f"{name}.act gave two answers from equal rng; expected bit-equal decisions")
    greedy = [_plain(policy.act(observation, greedy=True)) for _ in range(2)]
    if not _same(greedy[0], greedy[1]):
        raise ValueError(f"{name}.act(greedy=True) gave two answers to one observation; expected no randomness")


def _plain(decisions: Decisions) -> list[Any]:
    flat = [decisions.action, decisions.log_prob, *(decisions.trace[key] for key in sorted(decisions.trace))]
    return [(v.values, v.offsets) if isinstance(v, Ragged) else v for v in flat]


def _check_rows(name: str, policy: Any, observation: dict[str, Any], count: int) -> None:
    """A row's greedy answer may not depend on its neighbours (1e-5: matrix products round by batch size)."""
    whole = policy.act(observation, greedy=True).action
    for rows in (slice(0, 1), slice(1, count)):
        part = policy.act({k: _rows(v, rows) for k, v in observation.items()}, greedy=True).action
        if isinstance(whole, list):
            equal = part == whole[rows]
        else:
            equal = part.shape == whole[rows].shape and np.allclose(part, whole[rows], rtol=1e-5, atol=1e-5)
        if not equal:
            raise ValueError(
                f"{name}: greedy actions of rows {rows.start} to {rows.stop} change when the other rows are left out; "
                "expected rows to be independent (is batch normalisation in training mode?)"
            )


def _check_mode(name: str, policy: Any, observation: dict[str, Any], action_space: spaces.Space) -> None:
    if not hasattr(policy, "mode") or isinstance(action_space, spaces.Text):
        return
    mode = policy.mode(_tensors(observation)).detach().cpu().numpy()
    greedy = np.asarray(policy.act(observation, greedy=True).action)
    if mode.shape != greedy.shape or not np.allclose(mode, greedy, atol=1e-5):
        raise ValueError(f"{name}.mode and act(greedy=True) differ; expected the same action {greedy.shape}")


def _check_weights(name: str, policy: Any, observation: dict[str, Any]) -> None:
    """Disturb all weights, load the state_dict back: the answers must come back exactly."""
    expected = _plain(policy.act(observation, greedy=True))
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in policy.state_dict().items()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5)
    policy.load_state_dict(saved)
    if not _same(expected, _plain(policy.act(observation, greedy=True))):
        raise ValueError(
            f"{name}: load_state_dict(state_dict()) does not bring its greedy answers back; register every weight and "
            "every statistic as a parameter or a persistent buffer"
        )
