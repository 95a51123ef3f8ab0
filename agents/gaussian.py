"""`gaussian`: a small network that outputs a tanh-squashed Gaussian over action vectors, or a deterministic actor.

With `deterministic: true` the same network is a TD3 actor: its action plus exploration noise of fixed width.
It knows no loss but imitation; the critic lives elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from embodied_rft import networks
from embodied_rft.agent import ActionScale, observe, require_rng
from embodied_rft.data import Decisions, Field, Tree
from embodied_rft.registry import register


@dataclass(config=ConfigDict(extra="forbid"), kw_only=True)
class GaussianConfig:
    """Options of a `gaussian` agent."""

    hidden: tuple[int, ...] = (256, 256)  # sizes of the hidden layers
    keys: tuple[str, ...] | None = None  # observation keys to read; None: all state vectors and images, sorted
    normalize: bool = False  # standardise state vectors with statistics of the first data
    num_image_features: int = 64  # per camera
    deterministic: bool = False  # a TD3 actor
    exploration_noise: float = 0.1  # standard deviation in [-1, 1] units, deterministic actors only
    std: Literal["state", "free"] = "state"  # log std from the observation, or one parameter per dimension
    initial_log_std: float = 0.0  # in [-1, 1] units before tanh
    log_std_range: tuple[float, float] = (-5.0, 2.0)
    imitation: Literal["mse", "nll"] = "mse"  # squared error of the mode, or negative log-likelihood
    last_gain: float = 1.0  # gain of the last layer; 0.01 for on-policy learning from scratch
    layer_norm: bool = False
    init: Literal["uniform", "orthogonal"] = "uniform"
    activation: Literal["relu", "tanh"] = "relu"


@register("agent", "gaussian")
class GaussianPolicy(nn.Module):
    """One unit a decision; see docs/architecture.md for the methods.

    The trace holds `u`, the value before squashing: the log-probability is computed from it exactly, also where the
    action is saturated. It is measured in [-1, 1] units, whatever the units of the action space.
    """

    Config = GaussianConfig
    num_units = 1
    spec: dict[str, Any]

    def __init__(
        self, config: GaussianConfig, *, observation_space: gym.Space, action_space: gym.Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.config = config
        self.scale = ActionScale(action_space)
        self.encoder = networks.Encoder(
            observation_space,
            keys=config.keys,
            num_image_features=config.num_image_features,
            normalize=config.normalize,
            rng=rng,
        )
        self.head = networks.ActorHead(
            self.encoder.size,
            self.scale.action_dim,
            hidden=config.hidden,
            noise=config.exploration_noise if config.deterministic else None,
            std=config.std,
            initial_log_std=config.initial_log_std,
            log_std_range=config.log_std_range,
            last_gain=config.last_gain,
            layer_norm=config.layer_norm,
            init=config.init,
            activation=config.activation,
            rng=rng,
        )
        self.stochastic = not config.deterministic
        self.trace_fields = {"u": Field((self.scale.action_dim,))}

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]."""
        features = self.encoder(observe(observation, self))
        if greedy:
            centre, _ = self.head(features)
            action, u = self.head.squash(centre), centre
            log_prob, _ = self.head.log_prob(features, u)
        else:
            action, log_prob, u = self.head.rsample(features, require_rng(rng))
        action = self.scale.to_env(action)
        return Decisions(action.cpu().numpy(), log_prob[:, None].cpu().numpy(), {"u": u.cpu().numpy()})

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy, [B, 1] each; without "u" in the trace it is recovered from the action."""
        u = trace["u"] if "u" in trace else self.head.unsquash(self.scale.from_env(action))
        log_prob, entropy = self.head.log_prob(self.encoder(observation), u)
        return log_prob[:, None], entropy[:, None]

    @torch.no_grad()
    def retrace(self, observation: Tree, action: np.ndarray) -> dict[str, np.ndarray]:
        """The trace of decisions that something else took: arrays [T, ...] in and out."""
        scaled = self.scale.from_env(torch.as_tensor(action, dtype=torch.float32, device=self.scale.center.device))
        return {"u": self.head.unsquash(scaled).cpu().numpy()}

    def rsample(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Reparametrised action [B, A] and its log-probability [B]."""
        action, log_prob, _ = self.head.rsample(self.encoder(observation), require_rng(rng))
        return self.scale.to_env(action), log_prob

    def mode(self, observation: Tree) -> Tensor:
        """Deterministic action [B, A], differentiable."""
        return self.scale.to_env(self.head.mode(self.encoder(observation)))

    def imitation_loss(self, observation: Tree, action: Tensor, *, rng: torch.Generator | None = None) -> Tensor:
        """[B]: mean squared error of the mode in [-1, 1] units, or the negative log-likelihood of `action`."""
        target = self.scale.from_env(action)
        features = self.encoder(observation)
        if self.config.imitation == "mse":
            return (self.head.mode(features) - target).square().mean(-1)
        return -self.head.log_prob(features, self.head.unsquash(target))[0]
