"""`residual`: a bounded correction on top of a frozen base policy (Silver et al. 2018; Johannink et al. 2019).

action = clip(base action + scale * y); y in [-1, 1]^A comes from a small network that sees the observation and the
base's action, and starts near zero. The base is never trained: any policy with `mode` (tensors) or `act` (arrays).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agents.parts.actor import ActorConfig, decide, make_actor
from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.learning.losses import mean_where
from embodied_rft.names import UserError
from embodied_rft.options import STRICT
from embodied_rft.policy import Adapter, HasMode, able, build_policy, observe, require_rng
from embodied_rft.pools.spaces import ActionScale
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class ResidualConfig(ActorConfig):
    """Options of a `residual` agent: those of the correction's network (in units of `scale`) and these."""

    base: dict[str, Any]  # spec of the frozen base
    scale: float = 0.4  # largest correction, in [-1, 1] units of the action
    initial_log_std: float = -1.0  # of the correction before tanh, before `scale`
    last_gain: float = 0.01  # the correction starts near zero


@register("agent", "residual")
class ResidualPolicy(Adapter):
    """One unit a decision. The trace keeps the base's action, so an expensive base is asked once when it matters."""

    Config = ResidualConfig
    num_units = 1
    spec: dict[str, Any]

    def __init__(
        self, config: ResidualConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        super().__init__(build_policy(config.base, observation_space, action_space, rng))
        if not 0 < config.scale <= 2:
            raise UserError(f"scale {config.scale} of a residual: in (0, 2] is expected (2 reaches every action)")
        self.config = config
        self.scale = ActionScale(self.chunk.space(action_space))
        size = self.scale.action_dim
        self.encoder, self.head = make_actor(
            config, observation_space, action_dim=size, extra=size, unit=config.scale, rng=rng
        )
        self.stochastic, self.unit_size = not config.deterministic, size
        self.trace_fields = {"u": Field((size,)), "base_action": Field((size,))}

    @torch.no_grad()
    def base_action(self, observation: Tree, *, rng: torch.Generator | None = None) -> Tensor:
        """The base's greedy action [B, A] in [-1, 1] units; a base whose chain starts from noise draws it from rng."""
        draws = rng is not None and self.base.random_start
        if not draws and (base := able(self.base, HasMode)):
            action = base.mode(observation)
        else:
            arrays = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in observation.items()}
            taken = self.base.act(arrays, greedy=True, rng=rng).action
            action = torch.as_tensor(taken, device=self.scale.half_range.device)
        return self.scale.from_env(action.float())

    def _features(self, observation: Tree, base: Tensor) -> Tensor:
        return torch.cat([self.encoder(observation), base], -1)

    def _combine(self, base: Tensor, correction: Tensor) -> Tensor:
        return self.scale.to_env(torch.add(base, correction, alpha=self.config.scale).clamp(-1, 1))

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]."""
        tensors = observe(observation, self)
        base = self.base_action(tensors, rng=rng)
        features = self._features(tensors, base)
        correction, log_prob, u = decide(self.head, features, greedy=greedy, rng=rng)
        action = self._combine(base, correction).cpu().numpy()
        trace = {"u": u.cpu().numpy(), "base_action": base.cpu().numpy()}
        return Decisions(action, log_prob[:, None].cpu().numpy(), trace)

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability of the correction and its entropy, [B, 1] each; an unknown one is read off the action."""
        base = trace["base_action"] if "base_action" in trace else self.base_action(observation)
        u = self._raw_of(action, base)
        u = torch.where(trace["u"].isnan(), u, trace["u"]) if "u" in trace else u
        log_prob, entropy = self.head.log_prob(self._features(observation, base), u)
        return log_prob[:, None], entropy[:, None]

    def _raw_of(self, action: Tensor, base: Tensor) -> Tensor:
        correction = (self.scale.from_env(action) - base) / self.config.scale
        return self.head.unsquash(correction.clamp(-1, 1))

    @torch.no_grad()
    def retrace(self, observation: Tree, action: np.ndarray) -> dict[str, np.ndarray]:
        """The trace of decisions [T] that something else took; "base_action" for all T + 1 observations."""
        base = self.base_action(observe(observation, self))
        taken = torch.as_tensor(action, dtype=torch.float32, device=base.device)
        return {"u": self._raw_of(taken, base[: len(taken)]).cpu().numpy(), "base_action": base.cpu().numpy()}

    def rsample(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Reparametrised action [B, A] and the log-probability [B] of its correction."""
        base = self.base_action(observation, rng=rng)
        correction, log_prob, _ = self.head.rsample(self._features(observation, base), require_rng(rng))
        return self._combine(base, correction), log_prob

    def mode(self, observation: Tree) -> Tensor:
        """Deterministic action [B, A], differentiable in the correction's weights."""
        base = self.base_action(observation)
        return self._combine(base, self.head.mode(self._features(observation, base)))

    def imitation_loss(
        self,
        observation: Tree,
        action: Tensor,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: mean squared error of the corrected action in [-1, 1] units."""
        error = (self.scale.from_env(self.mode(observation)) - self.scale.from_env(action)).square()
        return mean_where(error, mask)
