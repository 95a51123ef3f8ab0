"""Behaviour correction as a step of the data path: how much each unit of stale or mismatched experience counts.

Runs before learning, between collecting and the surrogate, and writes notes; no loss branches on it. "old_log_prob" is
the policy's own log-probability when learning starts, which the surrogate's ratio is then taken against (Hilton et al.
2022, decoupled objective, eq. 8), and "weight" corrects from the policy that acted to that one: it differs from 1 where
experience is old, or where sampling and training compute in different ways. Boundary: knows notes, not losses.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.learning import losses
from embodied_rft.names import UserError
from embodied_rft.options import STRICT


@dataclass(config=STRICT, kw_only=True)
class Correction:
    """Options of a correction.

    Truncated importance sampling per token is Correction(); sequences that have drifted too far are left out by
    Correction(how="reject", level="mean", limit=1.05).
    """

    how: Literal["truncate", "mask", "reject"] = "truncate"  # min(w, limit); 0 outside; the decision is not read at all
    level: Literal["unit", "decision", "mean"] = "unit"  # of the ratio; "mean": its geometric mean over a decision
    limit: float = 2.0  # largest ratio; "mask" and "reject" also bound it below, by 1 / limit

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UserError(f"correction limit {self.limit}: a ratio of at least 1 is expected")


def correct(
    now: Tensor, behaviour: Tensor, mask: Tensor, config: Correction
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weights for decisions whose log-probability is `now`, but that were taken with `behaviour`.

    Args:
        now: [B, U] of the policy that learning starts from.
        behaviour: [B, U] of the policy that acted.
        mask: [B, U] bool.
        config: what to do.

    Returns:
        (weight [B, U], 0 under the mask; rejected [B] bool; metrics).
    """
    ratio = losses.log_ratio(now, behaviour, mask, level=config.level)
    how: losses.Correction = "truncate" if config.how == "truncate" else "mask"
    inside = losses.importance_weight(ratio, how=how, limit=config.limit)
    rejected = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    if config.how == "reject":
        rejected = ((inside == 0) & mask).any(1)
    weight = torch.where(mask, inside, 0.0)
    count = mask.sum().clamp_min(1)
    touched = (ratio.exp() - inside).abs() > 1e-6
    return (
        weight,
        rejected,
        {
            "correction/weight": float(weight.sum() / count),
            "correction/touched": float((touched & mask).sum() / count),
            "correction/rejected": float(rejected.sum()),
        },
    )
