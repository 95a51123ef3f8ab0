"""The contract of a policy as a program: acting, log-probabilities, determinism, rows, weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from embodied_rft.data import Decisions, Ragged, Space, pick_tree
from embodied_rft.device import seeded
from embodied_rft.names import UserError
from embodied_rft.policy import HasMode, Policy, Refuses, able
from embodied_rft.pools.promises import random_actions, same
from embodied_rft.pools.protocol import flatten_space
from embodied_rft.registry import kept


def check_policy(policy: Policy, observation_space: Space, action_space: Space, *, count: int = 6) -> None:
    """Check a policy: shapes, act and log_prob agree, randomness from `rng` alone, independent rows, full state_dict.

    Args:
        policy: to be checked.
        observation_space: of a single environment.
        action_space: of a single environment.
        count: N of the batches that are tried, at least 2.

    Raises:
        ValueError: names the first rule that is broken.
    """
    name = type(policy).__name__
    kept(Policy, policy, "the policy")
    observation = _readable(policy, observation_space, _observations(observation_space, count))
    before = torch.random.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    decisions = policy.act(observation, rng=seeded(0))
    _check_decisions(name, policy, decisions, action_space, count)
    _check_agreement(name, policy, observation, decisions)
    _check_determinism(name, policy, observation, decisions)
    _check_rows(name, policy, observation, count)
    _check_mode(name, policy, observation, action_space)
    _check_weights(name, policy, observation)
    after = torch.random.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    if not (torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1])):
        raise UserError(f"{name} drew from the global generator of torch or NumPy; draw from the `rng` passed to it")


def _observations(space: Space, count: int) -> dict[str, Any]:
    """`count` random observations as a pool gives them; unbounded numbers come from a standard normal."""
    leaves = {}
    for key, leaf in flatten_space(space).items():
        rows = random_actions(leaf, count)
        leaves[key] = rows if isinstance(leaf, spaces.Text) else np.stack([np.asarray(row) for row in rows])
    return leaves


def _readable(policy: Any, space: Space, observation: dict[str, Any]) -> dict[str, Any]:
    """The observations with texts so short that the policy has room for a reply."""
    reader = able(policy, Refuses)
    check: Any = (lambda _: {}) if reader is None else reader.unreadable
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
            raise UserError(f"{type(policy).__name__} can answer no text of this space, however short: {reason}")
    return observation


def _tensors(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in tree.items()}


def _check_decisions(name: str, policy: Any, decisions: Decisions, action_space: Space, count: int) -> None:
    if not isinstance(decisions, Decisions):
        raise UserError(f"{name}.act returned {type(decisions).__name__}; expected embodied_rft.data.Decisions")
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
        raise UserError(f"{name}.act gave the action {decisions.action!r:.200}; expected {expected}")
    if policy.num_units is not None:
        units = decisions.log_prob.shape if isinstance(decisions.log_prob, np.ndarray) else None
        if units != (count, policy.num_units):
            raise UserError(f"{name}.act gave log_prob {units}; expected (N, num_units) = {(count, policy.num_units)}")
    if set(decisions.trace) != set(policy.trace_fields):
        raise UserError(
            f"{name}.act gave the trace {sorted(decisions.trace)}; trace_fields promises {sorted(policy.trace_fields)}"
        )
    for key, each in policy.trace_fields.items():
        value = decisions.trace[key]
        if each.kind == "dense" and (np.shape(value) != (count, *each.shape) or value.dtype != np.dtype(each.dtype)):
            raise UserError(
                f"{name}: trace {key!r} is {value.dtype} {np.shape(value)}; trace_fields promises {each.dtype} "
                f"{(count, *each.shape)}"
            )


def _check_agreement(name: str, policy: Any, observation: dict[str, Any], decisions: Decisions) -> None:
    """What act said about its decisions and what log_prob says about them later: 1e-5, so the first ratio is 1."""
    if not isinstance(decisions.log_prob, np.ndarray):
        return  # ragged units are batched by the track that makes them, and tested there
    action = decisions.action if isinstance(decisions.action, list) else torch.as_tensor(decisions.action)
    with torch.no_grad():
        log_prob, entropy = policy.log_prob(_tensors(observation), action, _tensors(decisions.trace))
    if tuple(log_prob.shape) != decisions.log_prob.shape or tuple(entropy.shape) != decisions.log_prob.shape:
        raise UserError(
            f"{name}.log_prob gave {tuple(log_prob.shape)} and entropy {tuple(entropy.shape)}; expected "
            f"{decisions.log_prob.shape} as act did"
        )
    gap = float(np.abs(log_prob.cpu().numpy() - decisions.log_prob).max(initial=0.0))
    if not gap <= 1e-5:
        raise UserError(
            f"{name}: act and log_prob disagree by {gap:.3g} on the same decisions; expected at most 1e-5. Put into "
            "the trace what act computed the log-probability from (e.g. the value before squashing)."
        )


def _check_determinism(name: str, policy: Any, observation: dict[str, Any], decisions: Decisions) -> None:
    again = policy.act(observation, rng=seeded(0))
    if not same(_plain(decisions), _plain(again)):
        raise UserError(f"{name}.act gave two answers from equal rng; expected bit-equal decisions")
    greedy = [_plain(policy.act(observation, greedy=True)) for _ in range(2)]
    if not same(greedy[0], greedy[1]):
        raise UserError(f"{name}.act(greedy=True) gave two answers to one observation; expected no randomness")


def _plain(decisions: Decisions) -> list[Any]:
    flat = [decisions.action, decisions.log_prob, *(decisions.trace[key] for key in sorted(decisions.trace))]
    return [(v.values, v.offsets) if isinstance(v, Ragged) else v for v in flat]


def _check_rows(name: str, policy: Any, observation: dict[str, Any], count: int) -> None:
    """A row's greedy answer may not depend on its neighbours (1e-5: matrix products round by batch size)."""
    whole = policy.act(observation, greedy=True).action
    for rows in (slice(0, 1), slice(1, count)):
        part = policy.act(pick_tree(observation, rows), greedy=True).action
        if isinstance(whole, list):
            equal = part == whole[rows]
        else:
            equal = part.shape == whole[rows].shape and np.allclose(part, whole[rows], rtol=1e-5, atol=1e-5)
        if not equal:
            raise UserError(
                f"{name}: greedy actions of rows {rows.start} to {rows.stop} change when the other rows are left out; "
                "expected rows to be independent (is batch normalisation in training mode?)"
            )


def _check_mode(name: str, policy: Any, observation: dict[str, Any], action_space: Space) -> None:
    if able(policy, HasMode) is None or isinstance(action_space, spaces.Text):
        return
    mode = policy.mode(_tensors(observation)).detach().cpu().numpy()
    greedy = np.asarray(policy.act(observation, greedy=True).action)
    if mode.shape != greedy.shape or not np.allclose(mode, greedy, atol=1e-5):
        raise UserError(f"{name}.mode and act(greedy=True) differ; expected the same action {greedy.shape}")


def _check_weights(name: str, policy: Any, observation: dict[str, Any]) -> None:
    """Disturb all weights, load the state_dict back: the answers must come back exactly."""
    expected = _plain(policy.act(observation, greedy=True))
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in policy.state_dict().items()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5)
    policy.load_state_dict(saved)
    if not same(expected, _plain(policy.act(observation, greedy=True))):
        raise UserError(
            f"{name}: load_state_dict(state_dict()) does not bring its greedy answers back; register every weight and "
            "every statistic as a parameter or a persistent buffer"
        )
