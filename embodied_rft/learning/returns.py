"""Returns and advantages as pure functions: credit of decisions from rewards, values and groups.

Shapes: S segments (consecutive decisions of one episode) padded to T decisions with a mask, B decisions, U units.
`discount` is the factor on the bootstrap value of the next observation: gamma, and 0 after termination.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor


def gae(
    reward: Tensor, discount: Tensor, value: Tensor, next_value: Tensor, mask: Tensor, *, trace_decay: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), per decision.

    A_t = delta_t + discount_t * lambda * A_{t+1}, delta_t = r_t + discount_t * V(o_{t+1}) - V(o_t). A segment that was
    cut or truncated bootstraps from its last `next_value`; one that terminated has discount 0 there.

    Args:
        reward: [S, T].
        discount: [S, T].
        value: [S, T] of the observation before each decision.
        next_value: [S, T] of the observation after it.
        mask: [S, T] bool, False is padding and gives 0.
        trace_decay: lambda; 0 is the one-step advantage, 1 the return minus value.

    Returns:
        [S, T].
    """
    delta = torch.where(mask, reward + discount * next_value - value, 0.0)
    decay = torch.where(mask, trace_decay * discount, 0.0)
    advantage = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        following = delta[:, t] + decay[:, t] * following
        advantage[:, t] = following
    return advantage


def monte_carlo(reward: Tensor, discount: Tensor, mask: Tensor, tail: Tensor | None = None) -> Tensor:
    """Discounted sum of the rewards that follow (Sutton and Barto 2018, eq. 3.8) [S, T].

    Args:
        reward: [S, T].
        discount: [S, T], 0 where the episode terminated.
        mask: [S, T] bool.
        tail: [S] what is assumed to follow the last decision of a segment that did not terminate; default 0.
    """
    following = torch.zeros_like(reward[:, 0]) if tail is None else tail
    returns = torch.zeros_like(reward)
    for t in reversed(range(reward.shape[1])):
        total = reward[:, t] + discount[:, t] * following
        following = torch.where(mask[:, t], total, following)
        returns[:, t] = torch.where(mask[:, t], total, 0.0)
    return returns


def doubly_robust(
    reward: Tensor, value: Tensor, next_value: Tensor, outcome: Tensor, ahead: Tensor, *, decay: float
) -> Tensor:
    """What became of an episode and what a value says of one decision, mixed [B] (Zhou, Bai et al. 2024, DigiRL, 4.3).

    A = lambda^n R + (1 - lambda^n) (r + V(o') - V(o)): near the end the outcome R, which is unbiased, far from it the
    value, which does not vary. Of the last decision it is R.

    Args:
        reward: [B] r, of the decision.
        value: [B] V(o), before it.
        next_value: [B] V(o'), after it.
        outcome: [B] R, what the episode came to.
        ahead: [B] n, decisions of the episode that follow.
        decay: lambda.
    """
    share = decay**ahead
    return share * outcome + (1 - share) * (reward + next_value - value)


def running_returns(reward: Tensor, lengths: list[int], before: list[float], *, gamma: float) -> Tensor:
    """R_t = r_t + gamma R_{t-1} [B], the discounted sum of rewards so far, of segments that lie one after the other.

    Args:
        reward: [B].
        lengths: T of each segment.
        before: R of the decision before each segment; 0 where an episode begins.
        gamma: discount.
    """
    index, mask = (torch.from_numpy(a) for a in pad_segments(lengths))
    padded, table = reward[index].double(), torch.zeros(mask.shape, dtype=torch.float64)
    running = torch.tensor(before, dtype=torch.float64)
    for t in range(mask.shape[1]):
        table[:, t] = running = padded[:, t] + gamma * running
    return table[mask].float()


def group_advantages(
    returns: Tensor,
    group: np.ndarray,
    *,
    baseline: Literal["grpo", "dr_grpo", "rloo"] = "grpo",
    size: Tensor | None = None,
) -> Tensor:
    """Advantage of each episode over its siblings [B]; those of a group sum to zero.

    "grpo": (R - mean) / (std + 1e-6) (Shao et al. 2024, section 4.1.2); "dr_grpo": R - mean (Liu et al. 2025);
    "rloo": R - mean of the others (Ahmadian et al. 2024, eq. 7). A group of one, or of equal returns, gets exactly 0.

    Args:
        returns: [B] of whole episodes.
        group: [B] integer group of each.
        baseline: what is subtracted.
        size: as in `without_spread`.
    """
    _, index = np.unique(group, return_inverse=True)
    group_of, exact = torch.from_numpy(index), returns.double()
    count = torch.bincount(group_of).double()
    mean = torch.zeros_like(count).index_add_(0, group_of, exact) / count
    even = torch.from_numpy(without_spread(returns, group, size))
    advantage = torch.where(even, 0.0, exact - mean[group_of])  # rounding of a mean is no credit
    if baseline == "rloo":
        advantage = advantage * (count / (count - 1).clamp_min(1))[group_of]
    elif baseline == "grpo":
        variance = torch.zeros_like(count).index_add_(0, group_of, advantage.square()) / (count - 1).clamp_min(1)
        advantage = advantage / (variance.sqrt()[group_of] + 1e-6)
    return advantage.to(returns)


def unit_advantages(
    after: Tensor, value: Tensor, mask: Tensor, reward: Tensor | None = None, *, gamma: float, trace_decay: float
) -> Tensor:
    """Generalised advantage estimation inside decisions: the lower level of bi-level GAE (Wang et al. 2025, VAGEN).

    The upper level gives `after`, what a decision is worth once its last unit is taken; within the decision
    A_u = delta_u + gamma * lambda * A_{u+1}, delta_u = r_u + gamma * V_{u+1} - V_u, with `after` behind the last unit.
    With gamma = lambda = 1 and no rewards A_u = after - V_u; with one unit it is the upper level's advantage.

    Args:
        after: [B] return of the decision estimated by the upper level (its advantage plus its value).
        value: [B, U] of what is known before each unit; value[:, 0] is the value of the observation.
        mask: [B, U] bool, True for the first units of each row.
        reward: [B, U] of single units, such as a KL penalty; None: none.
        gamma: discount from one unit to the next.
        trace_decay: lambda.

    Returns:
        [B, U], 0 under the mask.
    """
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    delta = torch.where(last, after[:, None], gamma * following) - value
    delta = torch.where(mask, delta if reward is None else delta + reward, 0.0)
    advantage = torch.zeros_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for u in reversed(range(delta.shape[1])):
        running = delta[:, u] + gamma * trace_decay * running
        advantage[:, u] = running
    return torch.where(mask, advantage, 0.0)


def unit_returns(after: Tensor, reward: Tensor, mask: Tensor) -> Tensor:
    """Sum of the rewards from a unit on, plus `after` [B] behind the last one: [B, U], 0 under the mask."""
    kept = torch.where(mask, reward, 0.0)
    return torch.where(mask, kept.flip(1).cumsum(1).flip(1) + after[:, None], 0.0)


SAME = 1e-6  # what differs by less than this share of its size differs by the rounding of float32


def without_spread(returns: Tensor, group: np.ndarray, size: Tensor | None = None) -> np.ndarray:
    """[B] bool: all siblings returned the same, so that comparing them teaches nothing (an only child included).

    Args:
        returns: [B] of whole episodes.
        group: [B] integer group of each.
        size: [B] sum of the absolute rewards of each, by which rounding is judged; None: the absolute returns.
    """
    _, index = np.unique(group, return_inverse=True)
    values, sizes = (x.double().numpy() for x in (returns, returns.abs() if size is None else size))
    count = index.max(initial=-1) + 1
    low, high, largest = np.full(count, np.inf), np.full(count, -np.inf), np.zeros(count)
    np.minimum.at(low, index, values)
    np.maximum.at(high, index, values)
    np.maximum.at(largest, index, sizes)
    return (high - low <= SAME * largest)[index]


class Moments(NamedTuple):
    """What standardising must know of numbers; of parts, `moments_together` makes those of the whole."""

    size: int
    mean: float
    squares: float  # sum of squared distances from the mean
    low: float
    high: float


def moments(values: Tensor) -> Moments:
    """Those of all `values`, at least one, in double precision."""
    values = values.double()
    mean = values.mean()
    numbers = torch.stack([mean, (values - mean).square().sum(), values.min(), values.max()])
    return Moments(values.numel(), *numbers.tolist())


def moments_together(parts: Sequence[Moments]) -> Moments:
    """Those of the numbers of all parts, at least one (Chan et al. 1979, eq. 2.1, for any number of parts)."""
    sizes, means, squares, lows, highs = zip(*parts, strict=True)
    mean = math.fsum(n * m for n, m in zip(sizes, means, strict=True)) / sum(sizes)
    apart = (n * (m - mean) ** 2 for n, m in zip(sizes, means, strict=True))
    return Moments(sum(sizes), mean, math.fsum((*squares, *apart)), min(lows), max(highs))


def standardize(values: Tensor, mask: Tensor, whole: Moments | None = None, *, correction: int = 0) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over what is under a True mask of the same shape.

    Numbers that differ by rounding only become exactly 0: no credit is made of it.

    Args:
        values: of any shape.
        mask: what counts; the rest becomes 0.
        whole: of the numbers that these are a part of; None: of themselves.
        correction: 1: the deviation is a sample's, its squares are divided by the count less 1 (Bessel).
    """
    if whole is None and not mask.any():
        return torch.zeros_like(values)
    m = moments(values[mask]) if whole is None else whole
    if m.high - m.low <= SAME * max(abs(m.low), abs(m.high)):
        return torch.zeros_like(values)
    deviation = math.sqrt(m.squares / (m.size - correction))
    return torch.where(mask, (values - m.mean) / (deviation + 1e-8), 0.0)


def overlong_penalty(length: Tensor, *, limit: int, margin: int) -> Tensor:
    """0 up to limit - margin units, then linearly to -1 at `limit`, -1 beyond (Yu et al. 2025, DAPO, eq. 13).

    Args:
        length: [B] units of each decision.
        limit: longest decision that is wanted.
        margin: where the penalty begins, in units below the limit; 0: all or nothing.
    """
    over = length.to(torch.float32) - (limit - margin)
    return -(over / margin).clamp(0, 1) if margin else -(over > 0).to(torch.float32)


def pad_segments(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the decisions of segments that lie one after the other go in a padded table.

    pad_segments([2, 1]) is (index [[0, 1], [2, 0]], mask [[True, True], [True, False]]).

    Returns:
        (index [S, T] int64 into the flat decisions, mask [S, T] bool).
    """
    count = np.asarray(lengths, dtype=np.int64)
    start = np.cumsum(count) - count
    position = np.arange(count.max(initial=0))[None, :]
    mask = position < count[:, None]
    return np.where(mask, start[:, None] + position, 0), mask
