"""Published policy-gradient methods as presets of `ppo`: each is what its paper changes, and nothing else.

All of them take every option of `ppo`. Those with group credit need siblings: `group_size` where experience is
collected.
"""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from embodied_rft import losses
from embodied_rft.objectives.common import STRICT
from embodied_rft.objectives.policy_gradient import PPO, PPOConfig
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class GRPOConfig(PPOConfig):
    """Options of `grpo`: those of `ppo` with group credit. Episodes are not discounted."""

    credit: str = "grpo"
    gamma: float = 1.0
    whole_groups: bool = True
    normalize_advantage: bool = False
    normalizer: losses.Normalizer = "decisions"


@register("objective", "grpo")
class GRPO(PPO):
    """Group-relative policy optimisation (Shao et al. 2024): no value; its KL is kl_weight: 0.04."""

    Config = GRPOConfig


@dataclass(config=STRICT, kw_only=True)
class DrGRPOConfig(PPOConfig):
    """Options of `dr_grpo`."""

    credit: str = "dr_grpo"
    gamma: float = 1.0
    whole_groups: bool = True
    normalize_advantage: bool = False
    normalizer: losses.Normalizer = "constant"


@register("objective", "dr_grpo")
class DrGRPO(PPO):
    """GRPO done right (Liu et al. 2025): neither the group's spread nor a reply's length changes a unit's weight.

    Set normalizer_units to the longest decision, as the authors do, or keep 1 and lower the learning rate.
    """

    Config = DrGRPOConfig


@dataclass(config=STRICT, kw_only=True)
class RLOOConfig(PPOConfig):
    """Options of `rloo`."""

    credit: str = "rloo"
    gamma: float = 1.0
    num_epochs: int = 1
    whole_groups: bool = True
    normalize_advantage: bool = False
    ratio: losses.RatioLevel = "decision"


@register("objective", "rloo")
class RLOO(PPO):
    """REINFORCE leave-one-out (Ahmadian et al. 2024): the siblings are the baseline, a whole decision is one action.

    The authors' KL is kl_weight: 0.05, kl_in: reward, kl_estimator: k1.
    """

    Config = RLOOConfig


@dataclass(config=STRICT, kw_only=True)
class ReinforcePPConfig(PPOConfig):
    """Options of `reinforce_pp`."""

    credit: str = "return"
    gamma: float = 1.0
    kl_in: Literal["loss", "reward"] = "reward"
    kl_estimator: losses.KLEstimator = "k1"


@register("objective", "reinforce_pp")
class ReinforcePP(PPO):
    """REINFORCE++ (Hu 2025): returns from each unit on, normalised over the whole batch, in PPO's surrogate.

    The KL penalty of the paper is kl_weight: 0.01, a reward of single units.
    """

    Config = ReinforcePPConfig


@dataclass(config=STRICT, kw_only=True)
class GPGConfig(PPOConfig):
    """Options of `gpg`."""

    credit: str = "dr_grpo"
    gamma: float = 1.0
    num_epochs: int = 1
    whole_groups: bool = True
    normalize_advantage: bool = False
    ratio: losses.RatioLevel = "none"
    clip_low: float | None = None
    clip_high: float | None = None


@register("objective", "gpg")
class GPG(PPO):
    """Group policy gradient (Chu et al. 2025): the plain policy gradient with the group's mean as baseline.

    Its correction for groups without spread, B / (B - M), is what leaving them out of the mean amounts to.
    """

    Config = GPGConfig


@dataclass(config=STRICT, kw_only=True)
class GSPOConfig(PPOConfig):
    """Options of `gspo`."""

    credit: str = "grpo"
    gamma: float = 1.0
    whole_groups: bool = True
    normalize_advantage: bool = False
    ratio: losses.RatioLevel = "mean"
    normalizer: losses.Normalizer = "decisions"
    clip_low: float | None = 3e-4  # section 5.1: ratios of means over hundreds of tokens barely move
    clip_high: float | None = 4e-4


@register("objective", "gspo")
class GSPO(PPO):
    """Group sequence policy optimisation (Zheng et al. 2025): one ratio a decision, the geometric mean of units."""

    Config = GSPOConfig


@dataclass(config=STRICT, kw_only=True)
class DAPOConfig(PPOConfig):
    """Options of `dapo`."""

    credit: str = "grpo"
    gamma: float = 1.0
    whole_groups: bool = True
    normalize_advantage: bool = False
    clip_high: float | None = 0.28


@register("objective", "dapo")
class DAPO(PPO):
    """Decoupled clip and dynamic sampling (Yu et al. 2025): clip higher, every token counts the same.

    Dynamic sampling is min_groups: no update before so many groups have spread. The soft punishment of long replies is
    overlong: (limit, margin), in tokens.
    """

    Config = DAPOConfig
