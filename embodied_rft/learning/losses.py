"""Losses as pure functions on tensors. They own no state, draw no random numbers and do not know who calls them.

Shapes: B rows, U units, E ensemble members, K sampled actions. Unless said otherwise a loss returns one value a row (or
unit), not yet averaged: the caller divides by the size of the whole batch, so that micro-batches add up exactly.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from embodied_rft.networks import fused
from embodied_rft.networks.fused import Bound

Reduction = Literal["min", "mean", "mean_of_pair_minima", "first"]
RatioLevel = Literal["unit", "decision", "mean", "episode", "episode_mean", "none"]
KLEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["truncate", "mask"]
Preference = Literal["sigmoid", "squared", "hinge"]
Normalizer = Literal["units", "decisions", "episodes", "constant"]


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
    each: Tensor = torch.ops.aten.mse_loss(prediction, target, 0)  # F.mse_loss, which would expand the target first
    return each


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
    min(Q_i, Q_j), less pessimistic than the minimum of a large ensemble (E2O, Zhao et al. 2023); "first": member 0,
    what TD3's policy climbs.
    """
    if how == "first":
        return values[0]
    if how == "mean":
        return values.mean(0)
    if how == "min" or len(values) < 3:
        return torch.minimum(values[0], values[1]) if len(values) == 2 else values.amin(0)
    # After sorting, member k (0-based, ascending) is the smaller one in E - 1 - k pairs.
    count = len(values)
    weights = torch.arange(count - 1, -1, -1, device=values.device, dtype=values.dtype) / (count * (count - 1) / 2)
    return torch.einsum("e,eb->b", weights, values.sort(0).values)


def conservative(sampled: Tensor, log_density: Tensor, data: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Conservative gap T log E_K[exp((Q - log density) / T)] - Q(data), per member and row.

    Kumar et al. 2020 (CQL), eq. 4 and appendix F. The authors' code leaves out -T log K, which has no gradient.

    Args:
        sampled: [E, K, B] values of K sampled actions.
        log_density: [K, B] log-density with which each was sampled.
        data: [E, B] values of the data's actions.
        temperature: T.
    """
    gap = torch.logsumexp((sampled - log_density) / temperature, dim=1) - math.log(sampled.shape[1])
    return temperature * gap - data


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
    log_prob: Tensor,
    old_log_prob: Tensor | float,
    advantage: Tensor,
    *,
    low: Bound = 0.2,
    high: Bound = 0.2,
    dual: float | None = None,
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) per unit (Schulman et al. 2017, PPO, eq. 7).

    Args:
        log_prob: [B, U] of the policy being trained; or the log of a ratio, with 0 as `old_log_prob`.
        old_log_prob: [B, U] of the policy that acted.
        advantage: [B] or [B, U]; a decision's credit is broadcast over its units.
        low: clip range below 1; None: no bound there.
        high: clip range above 1 (Yu et al. 2025, DAPO, eq. 10: higher than `low`); None: no bound there.
        dual: where A < 0 the loss is at most dual * |A| (Ye et al. 2020, dual-clip PPO, eq. 5); None: no bound.
    """
    advantage = advantage[:, None] if advantage.dim() < log_prob.dim() else advantage
    log_ratio = log_prob - old_log_prob if isinstance(old_log_prob, Tensor) else log_prob
    if (low, high) == (None, None):
        loss = log_ratio.exp() * -advantage
    else:
        loss = fused.pessimistic(log_ratio, advantage, low, high)
    return loss if dual is None else torch.where(advantage < 0, torch.minimum(loss, -dual * advantage), loss)


def log_ratio(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor | None,
    *,
    level: RatioLevel,
    episode: Tensor | None = None,
) -> Tensor:
    """Log of the importance ratio that each unit is weighted with, [B, U], 0 under the mask.

    "unit": log pi(u) - log old(u) (PPO); "decision" and "episode": their sum over the units of a decision, or of all
    decisions of an episode here: the ratio of the whole (Ahmadian et al. 2024, RLOO); "mean" and "episode_mean": their
    mean, the ratio's geometric mean (Zheng et al. 2025, GSPO, eq. 7); "none": 0 with the gradient of log pi(u), so that
    the surrogate is the plain policy gradient (Williams 1992; Chu et al. 2025, GPG, eq. 6).

    Args:
        log_prob: [B, U] of the policy being trained.
        old_log_prob: [B, U] of the policy that acted.
        mask: [B, U] bool; None: every unit counts.
        level: what shares one ratio.
        episode: [B] int64 in [0, number of episodes), which of them a decision belongs to; "episode" levels only.
    """
    each = log_prob - (log_prob.detach() if level == "none" else old_log_prob)
    if mask is not None:
        each = torch.where(mask, each, 0.0)
    if level in ("unit", "none"):
        return each
    total = each.sum(1)
    count = total.new_full(total.shape, each.shape[1]) if mask is None else mask.sum(1).to(total)
    if level in ("episode", "episode_mean"):
        if episode is None:
            raise ValueError(f"ratio {level!r} needs to know which episode each decision belongs to: give `episode`")
        total, count = (torch.zeros_like(x).index_add(0, episode, x)[episode] for x in (total, count))
    if level in ("mean", "episode_mean"):
        total = total / count.clamp_min(1)
    shared = total[:, None].expand_as(each)
    return shared if mask is None else torch.where(mask, shared, 0.0)


def kl(log_prob: Tensor, reference: Tensor, *, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate of KL(pi || reference) per unit from samples of pi (Schulman 2020, "Approximating KL divergence").

    With r = reference - log_prob: k1 = -r, k2 = r^2 / 2, k3 = exp(r) - 1 - r (unbiased and never negative). As a loss,
    the gradient of k2 is the one of the KL divergence in expectation, that of k3 approximates it, that of k1 is zero
    (Tang and Munos 2025); as a reward, k1 is the unbiased one.
    """
    r = reference - log_prob
    if estimator == "k1":
        return -r
    return 0.5 * r.square() if estimator == "k2" else r.exp() - 1 - r


def value_error(value: Tensor, target: Tensor, old: Tensor | None = None, *, clip: float | None = None) -> Tensor:
    """0.5 (V - target)^2; with `clip`, the larger of that and the one of V kept within `clip` of `old`.

    The clipped form is that of the original implementation of PPO (Engstrom et al. 2020, section 3, item 1).
    """
    error = 0.5 * squared_error(value, target)
    if clip is None or old is None:
        return error
    near = old + (value - old).clamp(-clip, clip)
    return torch.maximum(error, 0.5 * squared_error(near, target))


def importance_weight(log_ratio: Tensor, *, how: Correction, limit: float) -> Tensor:
    """Weight of experience whose behaviour policy is another one, from log(pi / behaviour), without gradient.

    "truncate": min(ratio, limit) (Espeholt et al. 2018, IMPALA, section 4.1); "mask": the ratio where it lies in
    [1 / limit, limit], else 0.
    """
    ratio = log_ratio.detach().clamp(-20, 20).exp()
    if how == "truncate":
        return ratio.clamp_max(limit)
    return torch.where((ratio <= limit) & (ratio >= 1 / limit), ratio, 0.0)


# --- preferences -------------------------------------------------------------------------------------------------


def preference(margin: Tensor, *, kind: Preference = "sigmoid", beta: float = 0.1, smoothing: float = 0.0) -> Tensor:
    """Loss of preferring one thing over another [P], from the margin h = score(chosen) - score(rejected) [P].

    "sigmoid": -log sigmoid(beta h) (Rafailov et al. 2023, DPO, eq. 7), with label smoothing e
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (Mitchell 2023, conservative DPO); "squared":
    (h - 1 / (2 beta))^2 (Azar et al. 2023, IPO, eq. 17); "hinge": max(0, 1 - beta h) (Zhao et al. 2023, SLiC, eq. 3).

    Args:
        margin: [P] pairs; a score is a log-probability, over a reference where the method has one.
        kind: of the loss.
        beta: scale of the margin.
        smoothing: how often labels are wrong, in [0, 0.5).
    """
    if kind == "squared":
        return (margin - 0.5 / beta).square()
    if kind == "hinge":
        return (1 - beta * margin).clamp_min(0)
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - smoothing) * right - smoothing * wrong


# --- sums over units ---------------------------------------------------------------------------------------------


def per_batch(
    values: Tensor,
    mask: Tensor | None,
    *,
    normalizer: Normalizer,
    num_units: int,
    num_decisions: int,
    num_episodes: int = 0,
    episode_units: Tensor | None = None,
    constant: float = 1.0,
) -> Tensor:
    """[B, U] -> a scalar; those of k micro-batches add up to that of the whole batch.

    "units": every unit of the batch counts the same (DAPO, eq. 8); "decisions": the mean over a decision's units,
    every decision counts the same; "episodes": the mean over all units of an episode, every episode counts the same
    (Shao et al. 2024, GRPO, eq. 3, whose output is an episode of one or many turns); "constant": the sum over units /
    (episodes * constant), so that a unit's weight depends on no length (Liu et al. 2025, Dr. GRPO, section 3.2).

    Args:
        values: [B, U].
        mask: [B, U] bool; what lies under it does not count. None: everything does.
        normalizer: what the sum is divided by.
        num_units: of the whole batch.
        num_decisions: of the whole batch.
        num_episodes: of the whole batch, each of them whole; "episodes" and "constant" only.
        episode_units: [B] units of the episode that a decision belongs to; "episodes" only.
        constant: units of a typical episode.
    """
    if normalizer == "units":
        return (values.sum() if mask is None else masked_sum(values, mask)) / num_units
    each = (values if mask is None else torch.where(mask, values, 0.0)).sum(1)
    assert normalizer == "decisions" or num_episodes > 0, "episodes of the batch were not counted"
    if normalizer == "decisions":
        count: int | Tensor = values.shape[1] if mask is None else mask.sum(1).clamp_min(1)
        return (each / count).sum() / num_decisions
    if normalizer == "constant":
        return each.sum() / (num_episodes * constant)
    assert episode_units is not None
    return (each / episode_units).sum() / num_episodes


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over [B, U] where mask is True; what lies under the mask (even NaN) changes neither value nor gradient."""
    return torch.where(mask, values, 0.0).sum()


def mean_where(each: Tensor, mask: Tensor | None) -> Tensor:
    """[B]: means of each [B, D] over what is under the mask [B, D]; None: over everything."""
    if mask is None:
        return each.mean(-1)
    return torch.where(mask, each, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)
