"""`flow`: an action-chunk policy by flow matching (Lipman et al. 2022; Liu et al. 2022), with noisy steps for RL.

An ordinary differential equation has no log-probability, so noise is added at each of the S steps, in one of two ways:
"sde" keeps the distribution of the flow (Liu et al. 2025, Flow-GRPO, section 4.2), "learned" adds noise whose width a
network of its own learns (Zhang et al. 2025, ReinFlow). Greedy decisions integrate without noise. Boundary: the step
and the imitation loss; the rest is in `chunks`.

Legend: B rows, D numbers of a chunk, S sampling steps; time runs from 0 (noise) to 1 (data).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agents.parts.chain import ChainPolicy, ChunkConfig, Step, flow_step, flow_target
from embodied_rft.data import Space, Tree
from embodied_rft.learning.losses import mean_where
from embodied_rft.names import UserError
from embodied_rft.networks.mlp import MLP
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.policy import require_rng
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class FlowConfig(ChunkConfig):
    """Options of a `flow` agent."""

    num_steps: int = 10  # S
    noise: Literal["sde", "learned"] = "sde"  # of the steps
    noise_level: float = 1.0  # "sde": width of the noise is noise_level * (1 - t) / sqrt(S), at least min_std
    max_std: float = 0.3  # "learned": widths lie in [min_std, max_std]
    noise_hidden: tuple[int, ...] = (64, 64)  # "learned": hidden layers of the network of widths

    def __post_init__(self) -> None:
        idle = ["max_std", "noise_hidden"] if self.noise == "sde" else ["noise_level"]
        refuse_idle(self, idle, f"with noise {self.noise!r}")


@register("agent", "flow")
class FlowPolicy(ChainPolicy):
    """One unit for each of the S integration steps. Example: {"id": "flow", "horizon": 8, "num_steps": 4}."""

    Config = FlowConfig
    config: FlowConfig

    def __init__(
        self, config: FlowConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        if config.noise == "learned" and config.max_std < config.min_std:
            raise UserError(f"max_std {config.max_std} is below min_std {config.min_std}")
        super().__init__(
            config,
            observation_space=observation_space,
            action_space=action_space,
            rng=rng,
            num_steps=config.num_steps,
        )
        if config.noise == "learned":
            features = config.width + 2 * len(self.net.frequencies)
            self.width = MLP(features, config.noise_hidden, self.size, rng=rng, activation="tanh")

    def step(self, x: Tensor, condition: Tensor, index: Tensor) -> Step:
        """One Euler step of length 1 / S, of the flow (`quiet`) and of its noisy form."""
        c = self.config
        time = index / c.num_steps
        velocity = self.net(x, condition, time)
        if c.noise == "learned":
            quiet = x + velocity / c.num_steps
            return Step(quiet, self._width(condition, time), quiet)
        return flow_step(x, velocity, time, num_steps=c.num_steps, level=c.noise_level, min_std=c.min_std)

    def _width(self, condition: Tensor, time: Tensor) -> Tensor:
        """Width of the noise [..., D] given observation and time, from min_std to max_std on a logarithmic scale."""
        when = self.net.features(time)
        shape = torch.broadcast_shapes(condition.shape[:-1], when.shape[:-1])
        share = torch.sigmoid(self.width(torch.cat([condition.expand(*shape, -1), when.expand(*shape, -1)], -1)))
        low, high = math.log(self.config.min_std), math.log(self.config.max_std)
        return (low + share * (high - low)).exp()

    def imitation_loss(
        self,
        observation: Tree,
        action: Tensor,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: squared error of the velocity on the straight line from noise to data (Liu et al. 2022, eq. 1)."""
        x, time, target = flow_target(self.codec.encode(action), require_rng(rng))
        return mean_where((self.net(x, self.condition(observation), time) - target).square(), mask)
