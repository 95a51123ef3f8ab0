"""`steering`: chooses the noise from which a frozen diffusion or flow policy starts (Wagenmaker et al. 2025, DSRL).

The base turns (observation, noise) into a chunk without further noise, so the noise is the action of a small policy,
and any off-policy objective can train it. The critic judges the executed chunk and its gradient reaches the noise
through the frozen base: DSRL's noise-aliased variant without the distilled second critic. Boundary: the noise policy.

Legend: N environments, B rows, D numbers of a chunk and of its noise.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from embodied_rft import networks
from embodied_rft.agent import build_policy, observe, require_rng
from embodied_rft.agents.chunks import STRICT, freeze
from embodied_rft.data import Decisions, Field, Tree
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class SteeringConfig:
    """Options of a `steering` agent."""

    base: dict[str, Any]  # spec of the frozen base
    scale: float = 1.5  # largest noise in each dimension, in standard deviations of the base's own noise (DSRL: 1 to 3)
    hidden: tuple[int, ...] = (256, 256)
    keys: tuple[str, ...] | None = None  # observation keys that the noise policy reads
    normalize: bool = False
    num_image_features: int = 64
    deterministic: bool = False  # a TD3 actor
    exploration_noise: float = 0.2  # standard deviation as a share of `scale`, deterministic only
    initial_log_std: float = 0.0  # of the noise before tanh
    layer_norm: bool = False


@register("agent", "steering")
class SteeringPolicy(nn.Module):
    """One unit a decision: the noise, scale * tanh(u). The trace keeps `u` and `noise`.

    `load_base` takes over the weights of a base that was trained in an earlier stage.
    """

    Config = SteeringConfig
    num_units = 1
    spec: dict[str, Any]
    base: Any  # a policy with from_noise

    def __init__(
        self, config: SteeringConfig, *, observation_space: gym.Space, action_space: gym.Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        if not config.scale > 0:
            raise ValueError(f"scale {config.scale} of the noise: a positive number is expected")
        self.config = config
        self.base = build_policy(config.base, observation_space, action_space, rng)
        if not hasattr(self.base, "from_noise"):
            raise ValueError(
                f"agent {config.base.get('id')!r} has no noise to steer; diffusion, flow and consistency do"
            )
        freeze(self.base)
        self.horizon, self.execute, self.action_dim = self.base.horizon, self.base.execute, self.base.action_dim
        self.encoder = networks.Encoder(
            observation_space,
            keys=config.keys,
            num_image_features=config.num_image_features,
            normalize=config.normalize,
            rng=rng,
        )
        self.head = networks.ActorHead(
            self.encoder.size,
            self.base.size,
            hidden=config.hidden,
            noise=config.exploration_noise if config.deterministic else None,
            initial_log_std=config.initial_log_std,
            last_gain=0.01,
            layer_norm=config.layer_norm,
            rng=rng,
        )
        self.stochastic = not config.deterministic
        self.trace_fields = {"u": Field((self.base.size,)), "noise": Field((self.base.size,))}

    def load_base(self, policy: nn.Module) -> None:
        """Take the weights of a trained policy of the same spec as the frozen base."""
        self.base.load_state_dict(policy.state_dict())
        freeze(self.base)

    def train(self, mode: bool = True) -> SteeringPolicy:
        """As nn.Module.train, but the base stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]; actions are the base's chunks [N, D]."""
        tensors = observe(observation, self)
        features = self.encoder(tensors)
        if greedy:
            u, _ = self.head(features)
            share, (log_prob, _) = self.head.squash(u), self.head.log_prob(features, u)
        else:
            share, log_prob, u = self.head.rsample(features, require_rng(rng))
        noise = self.config.scale * share
        action = self.base.from_noise(tensors, noise).cpu().numpy()
        return Decisions(action, log_prob[:, None].cpu().numpy(), {"u": u.cpu().numpy(), "noise": noise.cpu().numpy()})

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability of the noise (in units of `scale`) and its entropy, [B, 1] each.

        Raises:
            ValueError: the trace has no `u`; the noise of an action cannot be told from the action.
        """
        if "u" not in trace:
            raise ValueError("the noise of an action is known only to who took it: the trace needs the key 'u'")
        log_prob, entropy = self.head.log_prob(self.encoder(observation), trace["u"])
        return log_prob[:, None], entropy[:, None]

    def rsample(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Reparametrised chunk [B, D], differentiable through the base, and the log-probability [B] of its noise."""
        share, log_prob, _ = self.head.rsample(self.encoder(observation), require_rng(rng))
        return self.base.from_noise(observation, self.config.scale * share), log_prob

    def mode(self, observation: Tree) -> Tensor:
        """The chunk [B, D] of the most likely noise, differentiable."""
        return self.base.from_noise(observation, self.config.scale * self.head.mode(self.encoder(observation)))
