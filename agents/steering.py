"""`steering`: chooses the noise from which a frozen diffusion or flow policy starts (Wagenmaker et al. 2025, DSRL).

The base turns (observation, noise) into a chunk without further noise, so the noise is the action of a small policy.
Three ways to train it differ in what the critic judges: the noise (objective `dsrl_sac`), the executed chunk, distilled
into a critic of the noise (`dsrl_na`), or the executed chunk with a gradient that reaches the noise through the frozen
base (any actor-critic objective, e.g. `sac`). Boundary: the noise policy.

Legend: N environments, B rows, D numbers of a chunk and of its noise.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agents.parts.actor import ActorConfig, decide, make_actor
from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.names import UserError
from embodied_rft.options import STRICT
from embodied_rft.policy import Adapter, FromNoise, build_policy, observe, require, require_rng
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class SteeringConfig(ActorConfig):
    """Options of a `steering` agent: those of the noise policy's network, whose output is in units of `scale`, too."""

    base: dict[str, Any]  # spec of the frozen base
    scale: float = 1.5  # largest noise in each dimension, in standard deviations of the base's own noise (DSRL: 1 to 3)
    exploration_noise: float = 0.2  # standard deviation as a share of `scale`, deterministic only
    last_gain: float = 0.01  # starts with the noise of greedy decisions


@register("agent", "steering")
class SteeringPolicy(Adapter):
    """One unit a decision: the noise, scale * tanh(u). The trace keeps `u` and `noise`."""

    Config = SteeringConfig
    num_units = 1
    spec: dict[str, Any]

    def __init__(
        self, config: SteeringConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        super().__init__(build_policy(config.base, observation_space, action_space, rng))
        if not config.scale > 0:
            raise UserError(f"scale {config.scale} of the noise: a positive number is expected")
        self.config = config
        why = f"agent {config.base.get('id')!r} has no noise to steer"
        require(self.base, FromNoise, f"{why}; diffusion, flow, consistency do, and a vla with a flow head")
        self.size = math.prod(self.chunk.space(action_space).shape or ())
        self.encoder, self.head = make_actor(config, observation_space, action_dim=self.size, rng=rng)
        self.stochastic = not config.deterministic
        self.noise_space = gym.spaces.Box(-config.scale, config.scale, (self.size,))  # what it can choose
        self.trace_fields = {"u": Field((self.size,)), "noise": Field((self.size,))}

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]; actions are the base's chunks [N, D]."""
        tensors = observe(observation, self)
        share, log_prob, u = decide(self.head, self.encoder(tensors), greedy=greedy, rng=rng)
        noise = self.config.scale * share
        action = self.from_noise(tensors, noise).cpu().numpy()
        return Decisions(action, log_prob[:, None].cpu().numpy(), {"u": u.cpu().numpy(), "noise": noise.cpu().numpy()})

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability of the noise (in units of `scale`) and its entropy, [B, 1] each.

        Raises:
            ValueError: the trace has no `u`; the noise of an action cannot be told from the action.
        """
        if "u" not in trace:
            raise UserError("the noise of an action is known only to who took it: the trace needs the key 'u'")
        log_prob, entropy = self.head.log_prob(self.encoder(observation), trace["u"])
        return log_prob[:, None], entropy[:, None]

    def choose(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Reparametrised noise [B, D] and its log-probability [B]; None for a deterministic noise policy."""
        features = self.encoder(observation)
        if not self.stochastic:
            return self.config.scale * self.head.mode(features), None
        share, log_prob, _ = self.head.rsample(features, require_rng(rng))
        return self.config.scale * share, log_prob

    def draw_noise(self, count: int, *, rng: torch.Generator) -> Tensor:
        """Noise [count, D] as the base itself would start from, within the bounds of what this policy can choose."""
        noise = torch.randn((count, self.size), generator=rng, device=rng.device)
        return noise.clamp(-self.config.scale, self.config.scale)

    def from_noise(self, observation: Tree, noise: Tensor) -> Tensor:
        """The base's chunk [B, D] for noise [B, D], differentiable in the noise."""
        return require(self.base, FromNoise).from_noise(observation, noise)

    def rsample(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Reparametrised chunk [B, D], differentiable through the base, and the log-probability [B] of its noise."""
        share, log_prob, _ = self.head.rsample(self.encoder(observation), require_rng(rng))
        return self.from_noise(observation, self.config.scale * share), log_prob

    def mode(self, observation: Tree) -> Tensor:
        """The chunk [B, D] of the most likely noise, differentiable."""
        return self.from_noise(observation, self.config.scale * self.head.mode(self.encoder(observation)))
