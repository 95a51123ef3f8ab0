"""The off-policy core, `sac`, and what differs from it by a few options: `td3`, `rlpd`, `e2o`.

A policy that exposes no entropy (a deterministic actor) is trained as in TD3 by the same losses: alpha is 0 and there
is no temperature. Conservative and support-constrained variants live in their own files.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft import losses
from embodied_rft.agent import Agent
from embodied_rft.data import Batch, Decisions, Ragged, Source, Tree
from embodied_rft.encoder import as_tensors
from embodied_rft.networks import polyak
from embodied_rft.objectives.common import STRICT, Losses, fit_normalizers, imitation, preset
from embodied_rft.plans import Replay, Share
from embodied_rft.registry import register
from embodied_rft.spaces import ActionScale


@dataclass(config=STRICT, kw_only=True)
class SACConfig(Replay):
    """Options of `sac`: how the buffer is read, and these; None keeps what an existing critic has, else the default."""

    # Targets
    target: Literal["min", "mean", "mean_of_pair_minima", "random_subset"] = "min"
    subset_size: int = 2  # of "random_subset" (REDQ)
    target_clip: tuple[float, float] | None = None  # known range of returns
    backup_entropy: bool = True  # count the entropy of the next action in the target
    target_noise: float = 0.0  # smoothing of the next action, deterministic actors, [-1, 1] units, clipped at 0.5
    tau: Share = 0.005  # speed of the target critic
    # Critic
    num_critics: int | None = None  # a new critic has 2
    critic_hidden: tuple[int, ...] | None = None  # a new critic has (256, 256)
    critic_layer_norm: bool | None = None  # a new critic has none
    warm_start: bool = True  # keep a critic that an earlier stage trained
    # Policy
    policy_value: losses.Reduction = "min"  # what of the ensemble the policy climbs
    policy_delay: int = 1  # critic updates per policy update
    bc_weight: float = 0.0  # in the policy loss: imitation of demonstrations, interventions and offline actions
    # Temperature
    initial_temperature: float = 1.0
    train_temperature: bool = True
    target_entropy: float | None = None  # None: -A


@register("objective", "sac")
class SAC:
    """Soft actor-critic (Haarnoja et al. 2018b) over an ensemble of critics.

    Example: {"id": "sac", "num_critics": 10, "critic_layer_norm": True, "offline_share": 0.5, "gamma": 0.98}.
    """

    Config: type = SACConfig
    judges = "action"  # what the critic judges: see `Agent.decision_space`
    updates_per_decision: float = 1.0  # gradient steps for each decision of experience, as published

    def __init__(self, config: Any) -> None:
        self.config = config
        self.losses: Losses = {}  # filled by setup: whether there is a temperature depends on the policy
        self.every = {"policy": config.policy_delay, "temperature": config.policy_delay}
        self.reading: Replay = config

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Critic, target critic and temperature; those that exist are kept unless `warm_start` is off."""
        c = self.config
        fresh = not c.warm_start
        if c.bc_weight and not hasattr(agent.policy, "imitation_loss"):
            raise ValueError(f"bc_weight {c.bc_weight}: {type(agent.policy).__name__} cannot imitate; set it to 0")
        self.scale = ActionScale(agent.decision_space(self.judges)).to(agent.device)
        hidden = None if c.critic_hidden is None else list(c.critic_hidden)
        agent.ensure(
            "critic",
            "critic",
            fresh=fresh,
            judges=self.judges,
            hidden=hidden,
            num_members=c.num_critics,
            layer_norm=c.critic_layer_norm,
        )
        agent.ensure_target("critic", fresh=fresh)
        self.losses = {"critic": self.critic_loss, "policy": self.policy_loss}
        if is_stochastic(agent.policy):
            kept = "temperature" in agent.parts and not fresh
            agent.ensure("temperature", "temperature", fresh=fresh, initial=None if kept else c.initial_temperature)
            if c.train_temperature:
                self.losses["temperature"] = self.temperature_loss

    # --- losses, in update order ---------------------------------------------------------------------------------

    def critic_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared error to the bootstrapped target, summed over members (SAC, eq. 5)."""
        target = self.td_target(agent, batch, rng)
        q = agent.parts["critic"](batch.observation, self.taken(batch))
        loss = 0.5 * losses.squared_error(q, target).sum() / batch.num_decisions
        metrics = {"critic/loss": loss.detach(), "critic/q_mean": q.detach().mean()}
        penalty = self.critic_penalty(agent, batch, q, rng)
        if penalty is not None:
            loss = loss + penalty
            metrics["critic/penalty"] = penalty.detach()
        return loss, metrics

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of alpha log pi - Q at the policy's own action (SAC, eq. 7); of -Q for a deterministic actor (TD3)."""
        values, action, log_prob = self.own_values(agent, batch.observation, rng)
        loss = -losses.reduce_ensemble(values, self.config.policy_value).sum() / batch.num_decisions
        metrics = {"policy/q_mean": -loss.detach()}
        if log_prob is not None:
            batch.notes["policy_log_prob"] = log_prob.detach()  # the temperature loss of this update reads it
            loss = loss + temperature_of(agent) * log_prob.sum() / batch.num_decisions
        penalty = self.policy_penalty(agent, batch, action, rng)
        if penalty is not None:
            loss = loss + penalty
            metrics["policy/penalty"] = penalty.detach()
        return loss, metrics | {"policy/loss": loss.detach()}

    def temperature_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Raise alpha while the entropy is below its target (SAC, eq. 18)."""
        log_prob = batch.notes.get("policy_log_prob")
        if log_prob is None:
            with torch.no_grad():
                _, log_prob = agent.policy.rsample(batch.observation, rng=rng)
        entropy = -float(agent.action_dim) if self.config.target_entropy is None else self.config.target_entropy
        log_alpha = agent.parts["temperature"].log_alpha
        loss = losses.temperature(log_alpha, log_prob, target_entropy=entropy).sum() / batch.num_decisions
        return loss, {"temperature/alpha": log_alpha.detach().exp(), "policy/entropy": -log_prob.mean()}

    # --- their ingredients ---------------------------------------------------------------------------------------

    def taken(self, batch: Batch) -> Tensor:
        """What the critic judges of decisions in the buffer [B, A]."""
        return batch.action

    def decide(self, agent: Agent, observation: Tree, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """What the critic judges of a new decision [B, A], and its log-probability [B]."""
        return sample(agent.policy, observation, rng)

    def own_values(self, agent: Agent, observation: Tree, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [E, B] of the policy's own decisions [B, A], differentiable in its weights; log-probability [B]."""
        action, log_prob = self.decide(agent, observation, rng)
        return agent.parts["critic"](observation, action), action, log_prob

    @torch.no_grad()
    def td_target(self, agent: Agent, batch: Batch, rng: torch.Generator) -> Tensor:
        """[B] target, from the target critic at the policy's next action."""
        c = self.config
        action, log_prob = self.decide(agent, batch.next_observation, rng)
        if c.target_noise and log_prob is None:
            noise = c.target_noise * torch.randn(action.shape, generator=rng, device=action.device)
            action = self.scale.clip(action + self.scale.half_range * noise.clamp(-0.5, 0.5))
        target_critic = agent.parts["target_critic"]
        if c.target == "random_subset":  # Chen et al. 2021 (REDQ), algorithm 1
            members = torch.randperm(target_critic.num_members, generator=rng, device=action.device)[: c.subset_size]
            value = target_critic(batch.next_observation, action, members).amin(0)
        else:
            value = losses.reduce_ensemble(target_critic(batch.next_observation, action), c.target)
        if log_prob is not None and c.backup_entropy:
            value = value - temperature_of(agent) * log_prob
        return losses.td_target(batch.reward, batch.discount, value, clip=c.target_clip)

    def critic_penalty(self, agent: Agent, batch: Batch, q: Tensor, rng: torch.Generator) -> Tensor | None:
        """A further term of the critic loss, for variants."""
        return None

    def policy_penalty(self, agent: Agent, batch: Batch, action: Tensor, rng: torch.Generator) -> Tensor | None:
        """Imitation of what others did, weighed by `bc_weight` (Fujimoto and Gu 2021, TD3+BC, eq. 3)."""
        if not self.config.bc_weight:
            return None
        rows = torch.from_numpy(batch.columns["source"] != Source.ONLINE).to(batch.reward)
        each = imitation(agent, batch, rng)
        return self.config.bc_weight * (each * rows).sum() / batch.num_decisions

    # --- around the losses ---------------------------------------------------------------------------------------

    def annotate(self, agent: Agent, buffer: Any, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Take the statistics of the observations, once."""
        fit_normalizers(agent, buffer, rows)
        return {}

    def after_update(self, agent: Agent, update: int) -> None:
        """Move the target critic."""
        polyak(agent.parts["target_critic"], agent.parts["critic"], self.config.tau)


@preset("td3", policy_delay=2, target_noise=0.2)
class TD3(SAC):
    """The deterministic special case: no entropy, delayed policy, smoothed target action (Fujimoto et al. 2018)."""

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """As SAC, for deterministic policies only."""
        require_deterministic(agent, "td3")
        super().setup(agent, rng)


@preset(
    "rlpd",
    offline_share=0.5,
    num_critics=10,
    critic_layer_norm=True,
    target="random_subset",
    policy_value="mean",
    backup_entropy=False,
)
class RLPD(SAC):
    """SAC + half demonstrations + an ensemble of critics with LayerNorm (Ball et al. 2023). Nothing else differs."""


@dataclass(config=STRICT, kw_only=True)
class E2OConfig(SACConfig):
    """Options of `e2o`, the online half of a hand-over from a pessimistic offline ensemble."""

    explore_candidates: int = 10  # actions that the policy proposes for each decision
    explore_bonus: float = 1.0  # standard deviations of the ensemble added to its mean


@preset("e2o", num_critics=10, target="mean_of_pair_minima", policy_value="mean")
class E2O(SAC):
    """Less pessimism and optimistic exploration for a critic ensemble trained offline (Zhao et al. 2023, E2O)."""

    Config: type = E2OConfig

    @torch.no_grad()
    def explore(self, agent: Agent, observation: Tree, rng: torch.Generator) -> Decisions:
        """Of several proposed actions take the one with the largest ensemble mean + bonus * std (SUNRISE, eq. 6)."""
        count = self.config.explore_candidates
        repeated = {k: np.repeat(v, count, axis=0) for k, v in observation.items() if isinstance(v, np.ndarray)}
        proposed = agent.policy.act(repeated, rng=rng)
        action = torch.as_tensor(proposed.action, dtype=torch.float32, device=agent.device)
        q = agent.parts["critic"](as_tensors(repeated, agent.device), action)
        bonus = q.std(0, correction=0) if len(q) > 1 else 0.0
        score = (q.mean(0) + self.config.explore_bonus * bonus).reshape(-1, count)
        chosen = score.argmax(1).cpu().numpy() + count * np.arange(len(score))
        assert not isinstance(proposed.log_prob, Ragged)
        return Decisions(
            proposed.action[chosen], proposed.log_prob[chosen], {k: v[chosen] for k, v in proposed.trace.items()}
        )


def is_stochastic(policy: Any) -> bool:
    """Whether the policy exposes an entropy; one that does not is trained as in TD3."""
    return bool(getattr(policy, "stochastic", hasattr(policy, "rsample")))


def require_deterministic(agent: Agent, objective: str) -> None:
    """Raise ValueError unless the policy is deterministic."""
    if is_stochastic(agent.policy):
        raise ValueError(
            f"objective {objective!r} trains deterministic policies, this one is stochastic: set deterministic: true "
            "in the agent, or use sac"
        )


def sample(policy: Any, observation: Tree, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """The policy's action [B, A] and its log-probability [B]; None for a policy without entropy.

    A policy without entropy may still be random (a chain that starts from noise): it has `draw`, else its mode counts.
    """
    if is_stochastic(policy):
        return policy.rsample(observation, rng=rng)
    if hasattr(policy, "draw"):
        return policy.draw(observation, rng=rng), None
    return policy.mode(observation), None


def temperature_of(agent: Agent) -> Tensor:
    """The entropy weight, a scalar without gradient."""
    return agent.parts["temperature"].alpha
