"""Losses as pure functions on tensors. They own no state, draw no random numbers and do not know who calls them.

Shapes: B rows, U units, E ensemble members, K sampled actions. Unless said otherwise a loss returns one value a row (or
unit), not yet averaged: the caller divides by the size of the whole batch, so that micro-batches add up exactly.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["min", "mean", "mean_of_pair_minima"]


# --- values ------------------------------------------------------------------------------------------------------


def td_target(
    reward: Tensor, discount: Tensor, next_value: Tensor, *, clip: tuple[float, float] | None = None
) -> Tensor:
    """Bootstrapped target r + discount * V(o') [B] (Sutton and Barto 2018, eq. 6.1; n-step: eq. 7.1).

    Args:
        reward: [B] discounted sum of the window's rewards.
        discount: [B] gamma**n, 0 after termination.
        next_value: [B].
        clip: known range of returns, e.g. (-50, 0) for 50 steps of reward -1 or 0.
    """
    target = torch.addcmul(reward, discount, next_value)
    return target if clip is None else target.clamp(*clip)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(prediction - target)^2, broadcast: [E, B] against [B]."""
    return (prediction - target).square()


def huber(error: Tensor, *, delta: float = 1.0) -> Tensor:
    """Huber (1964): 0.5 e^2 where |e| <= delta, else delta (|e| - 0.5 delta)."""
    size = error.abs()
    return torch.where(size <= delta, 0.5 * error.square(), delta * (size - 0.5 * delta))


def expectile(error: Tensor, *, tau: float) -> Tensor:
    """Asymmetric squared error |tau - 1(e < 0)| e^2 with e = target - value (Kostrikov et al. 2021, IQL, eq. 5)."""
    return torch.where(error < 0, 1 - tau, tau) * error.square()


def reduce_ensemble(values: Tensor, how: Reduction) -> Tensor:
    """[E, B] -> [B].

    "min": Fujimoto et al. 2018 (TD3, eq. 10); "mean"; "mean_of_pair_minima": mean over all pairs (i < j) of
    min(Q_i, Q_j), less pessimistic than the minimum of a large ensemble (E2O, Zhao et al. 2023).
    """
    if how == "mean":
        return values.mean(0)
    if how == "min" or len(values) < 3:
        return torch.minimum(values[0], values[1]) if len(values) == 2 else values.amin(0)
    # After sorting, member k (0-based, ascending) is the smaller one in E - 1 - k pairs.
    count = len(values)
    weights = torch.arange(count - 1, -1, -1, device=values.device, dtype=values.dtype) / (count * (count - 1) / 2)
    return torch.einsum("e,eb->b", weights, values.sort(0).values)


def conservative(sampled: Tensor, log_density: Tensor, data: Tensor) -> Tensor:
    """Conservative gap log E_K[exp(Q) / density] - Q(data), per member and row (Kumar et al. 2020, CQL, eq. 4 and F.1).

    Args:
        sampled: [E, K, B] values of K sampled actions.
        log_density: [K, B] log-density with which each was sampled.
        data: [E, B] values of the data's actions.
    """
    return torch.logsumexp(sampled - log_density, dim=1) - math.log(sampled.shape[1]) - data


def calibrated(sampled: Tensor, floor: Tensor) -> Tensor:
    """max(Q, return of the data) [E, K, B] (Nakamoto et al. 2023, Cal-QL, eq. 5): do not push values below `floor` [B].

    A floor of NaN (the return is not known) or -inf leaves the value as it is.
    """
    return torch.maximum(sampled, floor.nan_to_num(nan=-math.inf, neginf=-math.inf))


# --- policies ----------------------------------------------------------------------------------------------------


def temperature(log_alpha: Tensor, log_prob: Tensor, *, target_entropy: float) -> Tensor:
    """-log(alpha) (log pi + target entropy) [B] (Haarnoja et al. 2018b, SAC, eq. 18, in log alpha as is customary)."""
    return -log_alpha * (log_prob.detach() + target_entropy)


def advantage_weights(advantage: Tensor, *, inverse_temperature: float, largest: float = 100.0) -> Tensor:
    """min(exp(beta A), largest) [B], without gradient (Peng et al. 2019, AWR, eq. 6; clipped as in IQL)."""
    return (inverse_temperature * advantage.detach()).exp().clamp_max(largest)


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, low: float = 0.2, high: float = 0.2
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) per unit (Schulman et al. 2017, PPO, eq. 7).

    Args:
        log_prob: [B, U] of the policy being trained.
        old_log_prob: [B, U] of the policy that acted.
        advantage: [B] or [B, U]; a decision's credit is broadcast over its units.
        low: clip range below 1.
        high: clip range above 1.
    """
    advantage = advantage[:, None] if advantage.dim() < log_prob.dim() else advantage
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def kl(log_prob: Tensor, reference: Tensor, *, estimator: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Estimate of KL(pi || reference) per unit from samples of pi (Schulman 2020, "Approximating KL divergence").

    With r = reference - log_prob: k1 = -r, k2 = r^2 / 2, k3 = exp(r) - 1 - r (unbiased and never negative).
    """
    r = reference - log_prob
    if estimator == "k1":
        return -r
    return 0.5 * r.square() if estimator == "k2" else r.exp() - 1 - r


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over [B, U] where mask is True; what lies under the mask (even NaN) changes neither value nor gradient."""
    return torch.where(mask, values, 0.0).sum()
