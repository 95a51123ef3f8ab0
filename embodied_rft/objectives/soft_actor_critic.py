"""The off-policy core, `sac`, and what differs from it by a few options: `rlpd`, `wsrl`, `e2o`.

Deterministic policies (`td3`), conservative and support-constrained variants live in their own files. The critic loss
of an ensemble is a sum over members where some papers take the mean: Adam's steps are the same.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft import distributed
from embodied_rft.buffer.plans import Replay
from embodied_rft.data import Batch, Decisions, Source, Tree
from embodied_rft.learning import losses
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Objective
from embodied_rft.names import UserError
from embodied_rft.networks.critics import Critic, Temperature
from embodied_rft.networks.tensors import as_tensors, polyak
from embodied_rft.objectives.common import (
    CriticOptions,
    ensure_critic,
    ensure_temperature,
    imitation,
    preset,
    temperature_of,
)
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.policy import Draws, HasMode, Imitates, Policy, Reparametrised, able, require
from embodied_rft.pools.spaces import ActionScale
from embodied_rft.registry import register

OF_SMOOTHING = ("target_noise", "target_noise_clip")  # options that only TD3 reads
OF_ENTROPY = ("backup_entropy", "initial_temperature", "train_temperature", "target_entropy")


@dataclass(config=STRICT, kw_only=True)
class SACConfig(CriticOptions, Replay):
    """Options of `sac`: how the buffer is read, and these; None keeps what an existing critic has, else the default."""

    # Targets
    target: Literal["min", "mean", "mean_of_pair_minima", "random_subset"] = "min"  # what of the ensemble it takes
    subset_size: int = 2  # of "random_subset" (REDQ)
    target_clip: tuple[float, float] | None = None  # known range of returns
    backup_entropy: bool = True  # count the entropy of the next action in the target
    target_noise: NonNegativeFloat = 0.0  # `td3`: standard deviation of noise on the next action, in [-1, 1] units
    target_noise_clip: NonNegativeFloat = 0.5  # it is kept within this
    # Policy
    policy_value: losses.Reduction = "min"  # what of the ensemble the policy climbs
    policy_delay: int = 1  # critic updates per policy update
    bc_weight: float = 0.0  # adds imitation of demonstrations, interventions and offline actions, as in TD3+BC
    # Temperature
    initial_temperature: float = 1.0  # of entropy
    train_temperature: bool = True  # towards target_entropy
    target_entropy: float | None = None  # None: -A (`rlpd`, `wsrl`: -A / 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target != "random_subset":
            refuse_idle(self, ["subset_size"], f"with target {self.target!r}, which takes all critics")
        if not self.target_noise:
            refuse_idle(self, ["target_noise_clip"], "without target_noise")
        if not self.train_temperature:
            refuse_idle(self, ["target_entropy"], "with train_temperature: false")


@register("objective", "sac")
class SAC(Objective):
    """Soft actor-critic (Haarnoja et al. 2018b) over an ensemble of critics, for policies with an entropy.

    Example: {"id": "sac", "num_critics": 10, "critic_layer_norm": True, "offline_share": 0.5, "gamma": 0.98}.
    """

    Config: type = SACConfig
    config: SACConfig
    id = "sac"
    judges = "action"  # what the critic judges: see `Agent.decision_space`
    updates_per_decision: float = 1.0  # gradient steps for each decision of experience, as published
    needs_entropy = True
    unused: tuple[str, ...] = OF_SMOOTHING  # options without effect
    td_weight = 0.5  # of the squared error, each member's
    entropy_per_number = -1.0  # target entropy for each number of a decision, where the options give none

    def __init__(self, config: SACConfig) -> None:
        refuse_idle(config, self.unused, f"in {self.id!r}, see td3")
        self.config = config
        self.losses: Losses = {}  # filled by setup: whether there is a temperature depends on the policy
        self.every = {"policy": config.policy_delay, "temperature": config.policy_delay}
        self.reading: Replay = config
        self._size = 1.0  # mean |Q| of a batch that comes in pieces

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Critic, target critic and temperature; those that exist are kept unless `warm_start` is off."""
        c = self.config
        self.scale = ActionScale(agent.decision_space(self.judges)).to(agent.device)
        self._check(agent)
        ensure_critic(agent, c, judges=self.judges)
        self.losses = {"critic": self.critic_loss, "policy": self.policy_loss}
        if is_stochastic(agent.policy):
            ensure_temperature(agent, initial=c.initial_temperature, fresh=not c.warm_start)
            if c.train_temperature:
                self.losses["temperature"] = self.temperature_loss

    def _check(self, agent: Agent) -> None:
        """Refuse a policy that the options do not suit."""
        c = self.config
        if c.bc_weight:
            name = type(agent.policy).__name__
            require(agent.policy, Imitates, f"bc_weight {c.bc_weight}: {name} cannot imitate; set it to 0")
        without = not is_stochastic(agent.policy)
        if without and self.needs_entropy:
            raise UserError(
                f"objective {self.id!r} trains policies with an entropy, this one has none: use td3, or a policy "
                "without deterministic: true"
            )
        if without:
            refuse_idle(c, OF_ENTROPY, "on a policy without entropy")

    # --- losses, in update order ---------------------------------------------------------------------------------

    def critic_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared error to the bootstrapped target, summed over members (SAC, eq. 5)."""
        target = self.td_target(agent, batch, rng)
        q = agent.part("critic", Critic)(batch.observation, self.taken(batch))
        loss = self.td_weight * losses.squared_error(q, target).sum() / batch.num_decisions
        metrics = {"critic/loss": loss.detach(), "critic/q_mean": q.detach().mean()}
        penalty = self.critic_penalty(agent, batch, q, rng)
        if penalty is not None:
            loss = loss + penalty
            metrics["critic/penalty"] = penalty.detach()
        return loss, metrics

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of alpha log pi - Q at the policy's own action (SAC, eq. 7).

        With a penalty this is divided by the mean of |Q|, so that the penalty's weight means the same for rewards of
        any size (Fujimoto and Gu 2021, TD3+BC, eq. 5).
        """
        values, action, log_prob = self.own_values(agent, batch.observation, rng)
        value = losses.reduce_ensemble(values, self.config.policy_value)
        loss = -value.sum() / batch.num_decisions
        metrics = {"policy/q_mean": -loss.detach()}
        if log_prob is not None:
            batch.notes["policy_log_prob"] = log_prob.detach()  # the temperature loss of this update reads it
            loss = loss + temperature_of(agent) * log_prob.sum() / batch.num_decisions
        penalty = self.policy_penalty(agent, batch, action, rng)
        if penalty is not None:
            whole = len(batch) == batch.num_decisions
            size = value.detach().abs().mean() if whole else self._size
            loss = loss / size + penalty
            metrics["policy/penalty"] = penalty.detach()
        return loss, metrics | {"policy/loss": loss.detach()}

    def before_step(self, name: str, agent: Agent, pieces: list[Batch], rng: torch.Generator) -> None:
        """The mean of |Q| over a batch in pieces, which no piece can see."""
        whole = distributed.size() == 1 and len(pieces) == 1 and len(pieces[0]) == pieces[0].num_decisions
        if name != "policy" or whole or not self.penalises:
            return
        with torch.no_grad():
            own = (self.own_values(agent, piece.observation, rng)[0] for piece in pieces)
            sizes = (losses.reduce_ensemble(values, self.config.policy_value).abs().sum() for values in own)
            total = sum(float(size) / piece.num_decisions for size, piece in zip(sizes, pieces, strict=True))
        self._size = distributed.total({"size": total})["size"]

    def temperature_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Raise alpha while the entropy is below its target (SAC, eq. 18)."""
        log_prob = batch.notes.get("policy_log_prob")
        if log_prob is None:
            with torch.no_grad():
                _, log_prob = self.decide(agent, batch.observation, rng)
            assert log_prob is not None  # there is a temperature, so there is an entropy
        entropy = self.config.target_entropy
        entropy = self.entropy_per_number * self.scale.action_dim if entropy is None else entropy
        log_alpha = agent.part("temperature", Temperature).log_alpha
        loss = losses.temperature(log_alpha, log_prob, target_entropy=entropy).sum() / batch.num_decisions
        return loss, {"temperature/alpha": log_alpha.detach().exp(), "policy/entropy": -log_prob.mean()}

    # --- their ingredients ---------------------------------------------------------------------------------------

    def taken(self, batch: Batch) -> Tensor:
        """What the critic judges of decisions in the buffer [B, A]."""
        action: Tensor = batch.action
        return action

    def decide(self, agent: Agent, observation: Tree, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """What the critic judges of a new decision [B, A], and its log-probability [B]."""
        return sample(agent.policy, observation, rng)

    def own_values(self, agent: Agent, observation: Tree, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [E, B] of the policy's own decisions [B, A], differentiable in its weights; log-probability [B]."""
        action, log_prob = self.decide(agent, observation, rng)
        return agent.part("critic", Critic)(observation, action), action, log_prob

    def next_value(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The target critic's value [B] of a next decision, and that decision's log-probability [B]."""
        action, log_prob = self.decide(agent, batch.next_observation, rng)
        return self.target_value(agent, batch.next_observation, action, rng), log_prob

    def target_value(self, agent: Agent, observation: Tree, action: Tensor, rng: torch.Generator) -> Tensor:
        """What of the ensemble of target critics a target is made of, [B]."""
        target_critic = agent.part("target_critic", Critic)
        if self.config.target == "random_subset":  # Chen et al. 2021 (REDQ), algorithm 1
            chosen = torch.randperm(target_critic.num_members, generator=rng, device=action.device)
            return target_critic(observation, action, chosen[: self.config.subset_size]).amin(0)
        return losses.reduce_ensemble(target_critic(observation, action), self.config.target)

    @torch.no_grad()
    def td_target(self, agent: Agent, batch: Batch, rng: torch.Generator) -> Tensor:
        """[B] target, from the target critic at the policy's next action."""
        value, log_prob = self.next_value(agent, batch, rng)
        if log_prob is not None and self.config.backup_entropy:
            value = value - temperature_of(agent) * log_prob
        return losses.td_target(batch.reward, batch.discount, value, clip=self.config.target_clip)

    def critic_penalty(self, agent: Agent, batch: Batch, q: Tensor, rng: torch.Generator) -> Tensor | None:
        """A further term of the critic loss, for variants."""
        return None

    @property
    def penalises(self) -> bool:
        """Whether `policy_penalty` gives anything."""
        return self.config.bc_weight > 0

    def policy_penalty(self, agent: Agent, batch: Batch, action: Tensor, rng: torch.Generator) -> Tensor | None:
        """Imitation of what others did, weighed by `bc_weight` (1 / alpha of TD3+BC, Fujimoto and Gu 2021, eq. 5)."""
        if not self.config.bc_weight:
            return None
        rows = torch.from_numpy(batch.columns["source"] != Source.ONLINE).to(batch.reward)
        each = imitation(agent, batch, rng)
        return self.config.bc_weight * (each * rows).sum() / batch.num_decisions

    # --- around the losses ---------------------------------------------------------------------------------------

    def after_update(self, agent: Agent, update: int) -> None:
        """Move the target critic."""
        polyak(agent.parts["target_critic"], agent.parts["critic"], self.config.tau)


@preset(
    "rlpd",
    offline_share=0.5,
    num_critics=10,
    critic_layer_norm=True,
    target="random_subset",
    policy_value="mean",
    policy_delay=20,
    backup_entropy=False,
)
class RLPD(SAC):
    """SAC + half demonstrations + ten critics with LayerNorm + 20 updates a decision (Ball et al. 2023, algorithm 1).

    Targets are the minimum of two random critics, without entropy; the policy climbs the mean of all ten after every
    20th step of the critics; target entropy -A / 2. Nothing else differs from `sac`.
    """

    updates_per_decision = 20.0
    entropy_per_number = -0.5


@preset(
    "wsrl",
    offline_share=0.0,
    num_critics=10,
    critic_layer_norm=True,
    target="random_subset",
    policy_value="mean",
    policy_delay=4,
    backup_entropy=False,
)
class WSRL(SAC):
    """The online half of WSRL (Zhou et al. 2025): RLPD with 4 updates a decision that never reads offline data.

    Before it come `cal_ql` with the same critics (`num_critics: 10, critic_layer_norm: true`) and a `warm_up` of 5,000
    decisions. The authors' policy has LayerNorm, too: `layer_norm: true` of the agent.
    """

    updates_per_decision = 4.0
    entropy_per_number = -0.5


@dataclass(config=STRICT, kw_only=True)
class E2OConfig(SACConfig):
    """Options of `e2o`, the online half of a hand-over from a pessimistic offline ensemble."""

    explore_candidates: int = 10  # actions that the policy proposes for each decision
    explore_bonus: float = 1.0  # standard deviations of the ensemble added to its mean


@preset("e2o", num_critics=10, target="mean_of_pair_minima", policy_value="mean")
class E2O(SAC):
    """Less pessimism and optimistic exploration for a critic ensemble trained offline (Zhao et al. 2023, E2O)."""

    Config: type = E2OConfig
    config: E2OConfig

    @torch.no_grad()
    def explore(self, agent: Agent, observation: Tree, rng: torch.Generator) -> Decisions:
        """Of several proposed actions take the one with the largest ensemble mean + bonus * std (SUNRISE, eq. 6)."""
        count = self.config.explore_candidates
        repeated = {k: np.repeat(v, count, axis=0) for k, v in observation.items() if isinstance(v, np.ndarray)}
        proposed = agent.policy.act(repeated, rng=rng)
        action = torch.as_tensor(proposed.action, dtype=torch.float32, device=agent.device)
        q = agent.part("critic", Critic)(as_tensors(repeated, agent.device), action)
        bonus = q.std(0, correction=0) if len(q) > 1 else 0.0
        score = (q.mean(0) + self.config.explore_bonus * bonus).reshape(-1, count)
        chosen = score.argmax(1).cpu().numpy() + count * np.arange(len(score))
        return proposed.take(chosen)


def is_stochastic(policy: Policy) -> bool:
    """Whether the policy exposes an entropy; one that does not is trained as in TD3."""
    return policy.stochastic and able(policy, Reparametrised) is not None


def sample(policy: Policy, observation: Tree, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """The policy's action [B, A] and its log-probability [B]; None for a policy without entropy.

    A policy without entropy may still be random (a chain that starts from noise): it has `draw`, else its mode counts.
    """
    if is_stochastic(policy):
        return require(policy, Reparametrised).rsample(observation, rng=rng)
    if drawn := able(policy, Draws):
        return drawn.draw(observation, rng=rng), None
    return require(policy, HasMode).mode(observation), None
