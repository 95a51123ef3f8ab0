"""`ppo`: one clipped surrogate on fresh decisions, with options. What is published under other names is in `presets`.

Before learning, `annotate` walks the data once: values, reference and current log-probabilities, behaviour correction,
reward terms per unit, credit; everything is written as notes and comes back with each batch. A decision whose note
"live" is not 1 is not read: a rejected or (on request) a cut decision, or one of a group without spread.

Values come from the part "value", a network of its own with a loss of its own; or, when the policy has
`value(observation, trace) -> [B]` (a head on a shared trunk), from there: then both losses are one, weighted by
`value_weight`, and change the policy's weights. `unit_values(observation, action, trace) -> [B, U]` gives one for each
unit. Legend: B decisions, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft import distributed
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Fresh, Share
from embodied_rft.data import CUT, Batch
from embodied_rft.learning import losses, returns
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Objective, fit_normalizers
from embodied_rft.names import UserError
from embodied_rft.networks.critics import Value
from embodied_rft.networks.fused import Bound
from embodied_rft.networks.tensors import polyak
from embodied_rft.objectives.common import (
    UnitWeights,
    readable,
    refuse_unmarked,
    score_in_chunks,
    unit_weights,
    units_of,
    whole_groups,
)
from embodied_rft.objectives.correction import Correction, correct
from embodied_rft.objectives.credit import OPTIONS, make_credit
from embodied_rft.objectives.difficulty import Difficulty, weights
from embodied_rft.objectives.shaping import make_shaping, scale_rewards
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.policy import Policy, UnitValues, Values, able, require
from embodied_rft.registry import register

SHARED = {"decision": "decisions", "mean": "decisions", "episode": "episodes", "episode_mean": "episodes"}
OF_OWN_VALUE = ("value_hidden", "value_activation")  # options of a value that is a network of its own
OF_VALUE = (*OF_OWN_VALUE, "value_clip", "value_weight")
CLIP_GROWTH = 3.0  # rate at which the clip range grows from the first unit to the last (DPPO)


@dataclass(config=STRICT, kw_only=True)
class PPOConfig:
    """Options of `ppo`, and of everything that is a preset of it."""

    # Reading
    num_epochs: PositiveInt = 10  # passes over an iteration
    batch_size: PositiveInt = 256  # decisions
    max_lag: int = 0  # oldest experience, in policy versions
    whole_groups: bool = False  # siblings are never in different batches
    min_groups: int = 0  # do not learn before so many groups have spread: collecting goes on (DAPO's dynamic sampling)
    drop_even_groups: bool = False  # groups without spread are not read at all, their KL and entropy terms included
    target_kl: PositiveFloat | None = None  # stop learning from this experience once the KL is 1.5 times this (k3)
    critic_warm_up: NonNegativeInt = 0  # iterations at the start in which only the value learns
    # Credit
    # "gae", "bi_level_gae", "return", "grpo", "dr_grpo", "rloo", "gigpo" or a third party's; {id: gigpo, weight: 0.5}
    credit: str | dict[str, Any] = "gae"
    gamma: Share = 0.99  # from one decision to the next
    trace_decay: Share = 0.95  # lambda of "gae"
    unit_gamma: Share = 1.0  # from one unit to the next, of "bi_level_gae"
    unit_trace_decay: Share = 1.0  # lambda inside a decision, of "bi_level_gae"
    # standardised over everything read at once, or over each minibatch, as stable-baselines3 and CleanRL do: there no
    # advantage exceeds the root of batch_size
    normalize_advantage: Literal["iteration", "minibatch", False] = "iteration"
    reward_weights: dict[str, float] | None = None  # mixture of reward streams; None: the environment's reward
    shaping: tuple[dict[str, Any], ...] = ()  # what is made of an episode's rewards, one after the other; see `shaping`
    difficulty: Difficulty | None = None  # episodes that are harder count more (GUI-G1)
    scale_reward: bool = False  # divide rewards by the running standard deviation of the discounted return
    overlong: tuple[int, int] | None = None  # (limit, margin) in units: longer decisions lose up to 1 (DAPO, eq. 13)
    cut: Literal["keep", "drop"] = "keep"  # what ran into a length limit; dropped, it still counts in its group
    # Surrogate
    ratio: losses.RatioLevel = "unit"  # what shares one importance ratio
    unit_weights: UnitWeights | None = None  # of thought and action units in a decision's log-probability (RL4VLM)
    # ratio and entropy of a unit are means over its action numbers, as in DPPO's and ReinFlow's code
    per_dimension: bool = False
    clip_low: float | None = 0.2  # how far the ratio may fall below 1; None: no bound
    clip_high: float | None = 0.2  # how far it may rise above 1; None: no bound
    clip_first: PositiveFloat | None = None  # clip range of a decision's first unit; it grows to that of the last
    dual_clip: float | None = None  # largest loss per |advantage| where the advantage is negative; None: no bound
    unit_discount: Share = 1.0  # a unit's advantage counts this to the power of the units after it (DPPO's denoising)
    normalizer: losses.Normalizer = "units"  # what counts the same: every unit, decision or episode; or a constant
    normalizer_units: float = 1.0  # units of a typical episode, for normalizer "constant"
    correction: Correction | None = None  # of stale or mismatched experience
    # KL to a reference policy
    kl_weight: float = 0.0  # of the divergence from the reference
    kl_in: Literal["loss", "reward"] = "loss"  # where it enters
    kl_estimator: losses.KLEstimator = "k3"  # Schulman 2020
    kl_turns: tuple[NonNegativeInt, ...] | None = None  # decisions of an episode, from 0, that it counts for; null: all
    reference: Literal["start", "moving"] = "start"  # the policy when the stage starts, or an average that follows it
    reference_decay: Share = 0.99  # of "moving", per learn call
    # Entropy and value
    entropy_weight: float = 0.0  # bonus for entropy
    value_hidden: tuple[int, ...] | None = None  # a new value has (256, 256)
    value_activation: Literal["relu", "tanh"] | None = None  # a new value has "relu"
    value_clip: float | None = None  # how far a value may move from its old one before its error stops falling
    value_weight: float = 0.5  # of a value head that shares the policy's trunk

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise UserError(f"kl_weight {self.kl_weight}: at least 0 is expected; it pulls towards the reference")
        shared = SHARED.get(self.ratio)
        if shared is not None and self.normalizer != shared:
            raise UserError(
                f"ratio {self.ratio!r} is one number for all units it covers, with normalizer {self.normalizer!r} the "
                f"longer ones would count more: set normalizer to {shared!r}"
            )
        if self.normalizer in ("episodes", "constant") and not self.whole_groups:
            raise UserError(f"normalizer {self.normalizer!r} needs whole episodes in a batch: set whole_groups to true")
        if self.min_groups and not self.drop_even_groups:
            raise UserError("min_groups counts groups with spread: set drop_even_groups to true, too")
        if self.clip_first is not None and None in (self.clip_low, self.clip_high):
            raise UserError(
                "clip_first is where the clip range begins; clip_low and clip_high, where it ends, are null"
            )
        if self.normalizer_units != 1.0 and self.normalizer != "constant":
            raise UserError(f'normalizer_units has no effect with normalizer {self.normalizer!r}: use "constant"')
        if self.ratio == "none" and (self.clip_low is not None or self.clip_high is not None):
            raise UserError('ratio "none" is always 1, clipping has no effect: set clip_low and clip_high to null')
        if self.ratio in SHARED or self.ratio == "none":
            refuse_idle(self, ["clip_first"], f"with ratio {self.ratio!r}: there is no first unit")
        if self.ratio == "none":
            refuse_idle(self, ["target_kl", "dual_clip"], "with ratio 'none', which is always 1")
        if self.ratio in SHARED:
            refuse_idle(self, ["unit_discount"], f"with ratio {self.ratio!r}, which is one number for all units")
        if not self.kl_weight:
            refuse_idle(self, ["kl_in", "kl_estimator", "kl_turns", "reference"], "without kl_weight")
        if not self.kl_weight or self.reference != "moving":
            refuse_idle(self, ["reference_decay"], "without a reference that is moving, and kl_weight")
        if self.overlong is not None and not 0 <= self.overlong[1] <= self.overlong[0]:
            raise UserError(f"overlong {self.overlong}: (limit, margin) with 0 <= margin <= limit is expected")


@register("objective", "ppo")
class PPO(Objective):
    """Proximal policy optimisation (Schulman et al. 2017)."""

    Config: type = PPOConfig
    config: PPOConfig
    independent = True  # neither loss reads what the other one's step changes

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.credit = make_credit(config.credit)
        self.shaping = [make_shaping(spec, config.reward_weights) for spec in config.shaping]
        self.uses_value, self.per_unit = self.credit.uses_value, self.credit.per_unit
        self.needs_groups = self.credit.needs_groups
        self.prefix = "unit_" if self.per_unit else ""  # of the notes that credit writes
        self._check_credit()
        if config.normalize_advantage == "minibatch" and config.batch_size == 1 and not self.per_unit:
            raise UserError(
                'normalize_advantage "minibatch" leaves nothing of the advantage of a single decision: set batch_size '
                "to at least 2"
            )
        self.joint = False  # whether the value is a head of the policy; known once there is one
        self.losses: Losses = {"value": self.value_loss} if self.uses_value else {}
        self.losses["policy"] = self.policy_loss
        self.reading: Fresh = Fresh(
            num_epochs=config.num_epochs,
            batch_size=config.batch_size,
            max_lag=config.max_lag,
            whole_groups=config.whole_groups,
            whole_episodes=config.ratio in ("episode", "episode_mean"),
            min_groups=config.min_groups,
            only="live",
            next_observation=False,
            reward_weights=config.reward_weights,
        )

    def _check_credit(self) -> None:
        """Refuse options that this credit does not read."""
        c, id = self.config, self.config.credit
        why = f"with credit {id if isinstance(id, str) else id['id']!r}"
        idle = [name for name in OPTIONS if name not in self.credit.reads and (name != "gamma" or not c.scale_reward)]
        refuse_idle(c, idle, why)
        if not self.uses_value:
            self._refuse_warm_up(f"{why}, which has no value")
            refuse_idle(c, OF_VALUE, f"{why}, which has no value")
        if not self.needs_groups:
            refuse_idle(c, ["drop_even_groups"], f"{why}, which compares no siblings")

    def _refuse_warm_up(self, why: str) -> None:
        if self.config.critic_warm_up:  # also where a preset has it as its default
            raise UserError(f"critic_warm_up {self.config.critic_warm_up} has no effect {why}: set it to 0")

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """The value, where the credit needs one; the reference, where there is a KL term."""
        c = self.config
        if c.kl_weight:
            agent.ensure_copy("reference")
        if c.scale_reward:
            agent.ensure("return_scale", "return_scale")
        self._check(agent.policy)
        if not self.uses_value:
            return
        self.joint = able(agent.policy, Values) is not None
        if self.joint:
            self._refuse_warm_up("on this policy, whose value shares its trunk: they learn as one")
            refuse_idle(c, OF_OWN_VALUE, "on this policy, whose value shares its trunk")
            self.losses = {"policy": self.policy_loss}
        else:
            refuse_idle(c, ["value_weight"], "on this policy, whose value is a network with a loss of its own")
            agent.ensure("value", "value", hidden=c.value_hidden, activation=c.value_activation)

    def _check(self, policy: Policy) -> None:
        """Refuse options that this policy cannot serve."""
        if self.config.per_dimension and policy.unit_size is None:
            raise UserError(
                f"per_dimension needs to know how many action numbers a unit has, {type(policy).__name__} does not say "
                "(unit_size): leave it out"
            )
        if CUT not in policy.trace_fields:
            refuse_idle(self.config, ["cut"], "on this policy, whose decisions run into no length limit")
        refuse_unmarked(policy, self.config)
        if self.config.clip_first is not None and policy.num_units is None:
            raise UserError("clip_first needs a fixed number of units in a decision (a chain's steps): leave it out")

    def due(self, iteration: int) -> list[str] | None:
        """Names of the losses that learn in an iteration (from 0) of a stage; None: all."""
        return ["value"] if iteration < self.config.critic_warm_up else None

    def enough(self, metrics: Mapping[str, Tensor]) -> bool:
        """Whether the policy has moved so far from the one that acted that this step is not taken, nor any other.

        As in stable-baselines3 and Spinning Up: the estimate of this batch exceeds 1.5 target_kl.
        """
        limit, kl = self.config.target_kl, metrics.get("policy/kl")
        return limit is not None and kl is not None and float(kl) > 1.5 * limit

    def before_step(self, name: str, agent: Agent, pieces: list[Batch], rng: torch.Generator) -> None:
        """Standardise the advantages of a minibatch over all its micro-batches, of all processes."""
        if name != "policy" or self.config.normalize_advantage != "minibatch":
            return
        note = f"{self.prefix}advantage"
        masks = [b.mask if self.per_unit else torch.ones_like(b.notes[note], dtype=torch.bool) for b in pieces]
        own = [kept for b, mask in zip(pieces, masks, strict=True) if len(kept := b.notes[note][mask])]
        given = [returns.Moments(*m) for one in distributed.gather([returns.moments(x) for x in own]) for m in one]
        if not given:
            return
        whole = returns.moments_together(given)
        for piece, mask in zip(pieces, masks, strict=True):
            piece.notes[note] = returns.standardize(piece.notes[note], mask, whole, correction=1)

    # --- losses, in update order ---------------------------------------------------------------------------------

    def value_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared error to the noted target, a mean over decisions (or units, where they have values)."""
        notes, name = batch.notes, self.prefix
        value = _unit_values(agent, batch) if self.per_unit else _values(agent, batch)
        old = None if self.config.value_clip is None else notes[f"{name}old_value"]
        error = losses.value_error(value, notes[f"{name}value_target"], old, clip=self.config.value_clip)
        if self.per_unit:
            loss = losses.masked_sum(error, batch.mask) / batch.num_units
        else:
            loss = error.sum() / batch.num_decisions
        return loss, {"value/loss": loss.detach()}

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate, KL and entropy terms (PPO, eq. 7 and 9), and the value's loss where they share a trunk."""
        c, notes = self.config, batch.notes
        log_prob, entropy = agent.policy.log_prob(batch.observation, batch.action, batch.trace)
        old = batch.log_prob if c.correction is None else notes["old_log_prob"]
        mask = batch.mask if agent.policy.num_units is None else None  # a fixed number of units is never padded
        part = unit_weights(batch.mask, batch.trace, c.unit_weights)
        now, then = (log_prob, old) if part is None else (log_prob * part, old * part)
        ratio = losses.log_ratio(now, then, mask, level=c.ratio, episode=self._episode(batch, log_prob.device))
        if c.per_dimension:
            size = agent.policy.unit_size
            assert size is not None  # see `_check`
            ratio, entropy = ratio / size, entropy / size
        low, high = self._bounds(ratio)
        each = losses.clipped_surrogate(ratio, 0.0, self._advantage(batch), low=low, high=high, dual=c.dual_clip)
        if c.correction is not None:
            each = each * notes["weight"]
        if c.kl_weight and c.kl_in == "loss":
            kl = losses.kl(log_prob, notes["reference_log_prob"], estimator=c.kl_estimator)
            each = each + c.kl_weight * (kl if c.kl_turns is None else kl * self._pulled(batch))
        if c.entropy_weight:
            each = each - c.entropy_weight * entropy
        loss = losses.per_batch(
            each,
            mask,
            normalizer=c.normalizer,
            num_units=batch.num_units,
            num_decisions=batch.num_decisions,
            num_episodes=batch.num_episodes,
            episode_units=notes.get("episode_units"),
            constant=c.normalizer_units,
        )
        metrics = {"policy/loss": loss.detach()} | self._watch(ratio.detach(), batch, low, high)
        if self.joint:
            value, more = self.value_loss(agent, batch, rng)
            loss, metrics = loss + c.value_weight * value, metrics | more
        return loss, metrics

    def _episode(self, batch: Batch, device: torch.device) -> Tensor | None:
        """[B] number of the episode of each decision, from 0, where episodes share a ratio."""
        if not self.reading.whole_episodes:
            return None
        return torch.from_numpy(np.unique(batch.columns["episode"], return_inverse=True)[1]).to(device)

    def _pulled(self, batch: Batch) -> Tensor:
        """[B, 1] bool: decisions whose divergence from the reference counts."""
        turns = self.config.kl_turns
        chosen = np.ones(len(batch), bool) if turns is None else np.isin(batch.columns["step"], turns)
        return torch.from_numpy(chosen)[:, None].to(batch.mask.device)

    def _advantage(self, batch: Batch) -> Tensor:
        """[B] or [B, U], discounted by the units that follow (Ren et al. 2024, DPPO, section 4.3)."""
        advantage, decay = batch.notes[f"{self.prefix}advantage"], self.config.unit_discount
        if decay == 1:
            return advantage
        mask = batch.mask
        after = (mask.sum(1, keepdim=True) - 1 - torch.arange(mask.shape[1], device=mask.device)).clamp_min(0)
        return (advantage[:, None] if advantage.dim() == 1 else advantage) * decay**after

    def _bounds(self, ratio: Tensor) -> tuple[Bound, Bound]:
        """Clip ranges below and above 1: numbers, or [U] where they grow from the first unit to the last.

        At unit u of U, with x = u / (U - 1): first + (last - first) (exp(3 x) - 1) / (exp(3) - 1) (DPPO, appendix).
        """
        c, count = self.config, ratio.shape[1]
        first, low, high = c.clip_first, c.clip_low, c.clip_high
        if first is None or low is None or high is None or count == 1:
            return low, high
        share = torch.expm1(CLIP_GROWTH * torch.linspace(0, 1, count, device=ratio.device)) / math.expm1(CLIP_GROWTH)
        return first + (low - first) * share, first + (high - first) * share

    def _watch(self, ratio: Tensor, batch: Batch, low: Bound, high: Bound) -> dict[str, Tensor]:
        """How far the policy has moved from the one that acted (KL, k3) and how often the ratio is out of bounds."""
        count = len(batch) / batch.num_decisions * batch.num_units  # units, about
        change = torch.expm1(ratio.clamp(-20, 20))
        watched = {"policy/kl": (change - ratio).sum() / count}
        if low is not None and high is not None:
            watched["policy/clipped"] = torch.count_nonzero((change < -low) | (change > high)) / count
        return watched

    # --- around the losses ---------------------------------------------------------------------------------------

    def annotate(self, agent: Agent, buffer: Buffer, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Write "advantage", "live" and whatever else the losses read, for those of `rows` that something follows."""
        rows = readable(buffer, rows)
        segments, torn = buffer.segments(rows), {}
        if self.needs_groups:
            whole = whole_groups(buffer, segments)
            torn = {"credit/torn_episodes": float(len(segments) - len(whole))}
            segments = whole
        if not segments:
            return torn
        order, c = np.concatenate(segments), self.config
        batch = buffer.batch(order, gamma=c.gamma, reward_weights=c.reward_weights, next_observation=False)
        metrics = {"data/reward": float(batch.reward.mean())} | torn
        for shape in self.shaping:
            batch.reward = shape(batch, [len(s) for s in segments], lambda name: buffer.stream(name, order))
        if c.scale_reward:
            metrics["data/return_scale"] = scale_rewards(agent, buffer, batch, segments, gamma=c.gamma)
        self._score(agent, buffer, batch, [len(s) for s in segments])
        live = torch.ones(len(batch), dtype=torch.bool)
        if c.correction is not None:
            now = batch.notes["old_log_prob"]
            weight, rejected, more = correct(now, batch.log_prob, batch.mask, c.correction)
            batch.notes["weight"], live, metrics = weight, live & ~rejected, metrics | more
        metrics |= self._shape(batch)
        if c.cut == "drop":
            live &= ~batch.trace[CUT].bool()
        credited = self.credit(agent, batch, [len(s) for s in segments], c)
        dead = credited.pop("dead", torch.zeros_like(live))
        if c.difficulty is not None:
            lengths = [len(s) for s in segments]
            told = [float(buffer.stream(c.difficulty.stream, each).sum()) for each in segments]
            weight = weights(np.array(told), c.difficulty).repeat_interleave(torch.tensor(lengths))
            advantage = credited["advantage"]
            credited["advantage"] = advantage * (weight if advantage.dim() == 1 else weight[:, None])
        metrics |= _count_groups(batch.columns["group"], dead.numpy())
        self._write(buffer, order, batch, credited, live & ~dead if c.drop_even_groups else live)
        if c.kl_weight and c.reference == "moving":
            polyak(agent.part("reference", Policy), agent.policy, 1 - c.reference_decay)
        return metrics

    @torch.no_grad()
    def _score(self, agent: Agent, buffer: Buffer, batch: Batch, lengths: list[int]) -> None:
        """What networks say about the data, as notes of `batch`: values and log-probabilities, a chunk at a time."""
        c = self.config
        scorers: dict[str, Callable[[Batch], Tensor]] = {}
        if c.kl_weight:
            scorers["reference_log_prob"] = lambda b: _log_prob(agent.part("reference", Policy), b)
        if c.correction is not None:
            scorers["old_log_prob"] = lambda b: _log_prob(agent.policy, b)
        if self.uses_value:
            scorers["value"] = lambda b: _values(agent, b)
        if self.uses_value and self.per_unit and able(agent.policy, UnitValues) is not None:
            scorers["unit_value"] = lambda b: _unit_values(agent, b)
        for name, scorer in scorers.items():
            batch.notes[name] = score_in_chunks(scorer, batch, agent.device)
        if self.uses_value:  # the next value is the next decision's; only segments' ends are computed
            last = np.cumsum(lengths) - 1
            assert batch.rows is not None
            after = buffer.batch(batch.rows[last])
            ends = replace(after, observation=after.next_observation, trace=after.next_trace)
            following = torch.roll(batch.notes["value"], -1)
            following[torch.from_numpy(last)] = score_in_chunks(scorers["value"], ends, agent.device)
            batch.notes["next_value"] = following

    def _shape(self, batch: Batch) -> dict[str, float]:
        """Reward terms that are no stream of the environment: length and KL. Changes `batch`."""
        c, metrics = self.config, {}
        if c.overlong is not None:
            penalty = returns.overlong_penalty(batch.mask.sum(1), limit=c.overlong[0], margin=c.overlong[1])
            batch.reward = batch.reward + penalty
            metrics["credit/overlong"] = float(penalty.mean())
        if c.kl_weight:
            each = losses.kl(batch.log_prob, batch.notes["reference_log_prob"], estimator=c.kl_estimator)
            each = torch.where(batch.mask & self._pulled(batch), each, 0.0)
            count = (batch.mask & self._pulled(batch)).sum().clamp_min(1)
            metrics["policy/kl_to_reference"] = float(each.sum() / count)
            if c.kl_in == "reward" and self.per_unit:
                batch.notes["unit_reward"] = -c.kl_weight * each
            elif c.kl_in == "reward":
                batch.reward = batch.reward - c.kl_weight * each.sum(1)
        return metrics

    def _write(
        self, buffer: Buffer, order: np.ndarray, batch: Batch, credited: dict[str, Tensor], live: Tensor
    ) -> None:
        """Put into the buffer what the losses read."""
        c = self.config
        if c.normalize_advantage == "iteration":
            counted = batch.mask & live[:, None] if self.per_unit else live
            credited["advantage"] = returns.standardize(credited["advantage"], counted)
        if c.value_clip is not None and self.uses_value:
            credited["old_value"] = batch.notes["unit_value" if self.per_unit else "value"]
        notes = {f"{self.prefix}{name}": value for name, value in credited.items()} | {"live": live.float()}
        if c.normalizer == "episodes":
            _, index = np.unique(batch.columns["episode"], return_inverse=True)
            episode, units = torch.from_numpy(index), torch.where(live, batch.mask.sum(1), 0).float()
            notes["episode_units"] = torch.zeros(len(units)).index_add(0, episode, units)[episode]
        if c.kl_weight and c.kl_in == "loss":
            notes["reference_log_prob"] = batch.notes["reference_log_prob"]
        if c.correction is not None:
            notes |= {name: batch.notes[name] for name in ("old_log_prob", "weight")}
        for name, value in notes.items():
            ragged = value.dim() == 2 and buffer.schema.units is None
            buffer.annotate(name, order, units_of(value, batch.mask) if ragged else value.numpy())

    def after_reading(self, agent: Agent, buffer: Buffer, rows: np.ndarray) -> None:
        """Take the statistics of the observations now: while they were learned from, ratios had to begin at 1."""
        fit_normalizers(agent, buffer, readable(buffer, rows))


# --- helpers ---------------------------------------------------------------------------------------------------------


def _log_prob(policy: Policy, batch: Batch) -> Tensor:
    """[B, U]."""
    return policy.log_prob(batch.observation, batch.action, batch.trace)[0]


def _values(agent: Agent, batch: Batch) -> Tensor:
    """[B], from the policy's own head or the part "value"."""
    own = able(agent.policy, Values)
    if own is not None:
        return own.value(batch.observation, batch.trace)
    return agent.part("value", Value)(batch.observation)


def _unit_values(agent: Agent, batch: Batch) -> Tensor:
    """[B, U]."""
    return require(agent.policy, UnitValues).unit_values(batch.observation, batch.action, batch.trace)


def _count_groups(group: np.ndarray, dead: np.ndarray) -> dict[str, float]:
    """How many groups there were, and how many of them taught nothing."""
    number = np.unique(group).size
    return {"credit/groups": float(number), "credit/dead_groups": float(np.unique(group[dead]).size)}
