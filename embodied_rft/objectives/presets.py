"""Published policy-gradient methods as presets of `ppo`: each is what its paper changes, and nothing else.

All of them take every option of `ppo`. Those with group credit need siblings: `group_size` where experience is
collected.
"""

from __future__ import annotations

from typing import Any

from embodied_rft.objectives.common import preset
from embodied_rft.objectives.policy_gradient import PPO

# Credit from siblings: no value, episodes are not discounted, advantages have a scale already.
GROUP: dict[str, Any] = {"gamma": 1.0, "whole_groups": True, "normalize_advantage": False}


@preset("grpo", credit="grpo", normalizer="episodes", **GROUP)
class GRPO(PPO):
    """Group-relative policy optimisation (Shao et al. 2024): no value; its KL is kl_weight: 0.04.

    The paper's output o is an episode here, of one turn or of many: its length is that of all its turns.
    """


@preset("dr_grpo", credit="dr_grpo", normalizer="constant", **GROUP)
class DrGRPO(PPO):
    """GRPO done right (Liu et al. 2025): neither the group's spread nor a reply's length changes a unit's weight.

    Set normalizer_units to the longest episode, as the authors do, or keep 1 and lower the learning rate.
    """


@preset("rloo", credit="rloo", num_epochs=1, ratio="episode", normalizer="episodes", **GROUP)
class RLOO(PPO):
    """REINFORCE leave-one-out (Ahmadian et al. 2024): the siblings are the baseline, a whole episode is one action.

    The gradient of an episode is A sum_u grad log pi(u), whatever its length. The ratio and its clipping (TRL's) are no
    part of the paper; they have an effect from an iteration's second batch on. The authors' KL is kl_weight: 0.05,
    kl_in: reward, kl_estimator: k1.
    """


@preset("reinforce_pp", credit="return", gamma=1.0, kl_in="reward", kl_estimator="k1")
class ReinforcePP(PPO):
    """REINFORCE++ (Hu 2025): returns from each unit on, normalised over the whole batch, in PPO's surrogate.

    The KL penalty of the paper is kl_weight: 0.01, a reward of single units.
    """


@preset(
    "gpg", credit="dr_grpo", num_epochs=1, ratio="none", clip_low=None, clip_high=None, drop_even_groups=True, **GROUP
)
class GPG(PPO):
    """Group policy gradient (Chu et al. 2025): the plain policy gradient with the group's mean as baseline.

    Its correction for groups without spread, B / (B - M), is what leaving them out of the mean amounts to.
    """


@preset(
    "dppo",
    clip_low=0.01,
    clip_high=0.01,
    clip_first=0.001,
    per_dimension=True,
    unit_discount=0.99,
    target_kl=1.0,
    critic_warm_up=2,
    scale_reward=True,
)
class DPPO(PPO):
    """PPO through the denoising steps of a diffusion policy (Ren et al. 2024, DPPO), with the options of its code.

    A step's ratio is the geometric mean over the numbers of the chunk that are executed, early steps are clipped more
    and count less. Not in it: log-probabilities clamped to [-5, 2], noise clipped at 3 deviations, a learned noise; its
    code standardises each minibatch, which is normalize_advantage: minibatch.
    """


@preset(
    "reinflow",
    ratio="mean",
    normalizer="decisions",
    clip_low=0.01,
    clip_high=0.01,
    per_dimension=True,
    entropy_weight=0.03,
    target_kl=0.01,
    scale_reward=True,
)
class ReinFlow(PPO):
    """PPO through the steps of a flow with learned noise (Zhang et al. 2025, ReinFlow), for `flow` with noise: learned.

    One ratio a decision: the chain's, a geometric mean over steps and numbers, as in its code; the entropy, likewise a
    mean, is rewarded. Not in it: the density of the first noise (it cancels in the ratio), the hold and decay of the
    largest width, the Wasserstein penalty; its code, too, standardises each minibatch.
    """


# Clip range: section 5.1, ratios of means over hundreds of tokens barely move.
@preset("gspo", credit="grpo", ratio="episode_mean", normalizer="episodes", clip_low=3e-4, clip_high=4e-4, **GROUP)
class GSPO(PPO):
    """Group sequence policy optimisation (Zheng et al. 2025): one ratio an episode, the geometric mean of its units."""


@preset("dapo", credit="grpo", clip_high=0.28, drop_even_groups=True, **GROUP)
class DAPO(PPO):
    """Decoupled clip and dynamic sampling (Yu et al. 2025): clip higher, every token counts the same.

    Dynamic sampling is min_groups: no update before so many groups have spread. The soft punishment of long replies is
    overlong: (limit, margin), in tokens.
    """
