"""The head of an actor: the distribution of one action, given features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embodied_rft.names import UserError
from embodied_rft.networks.fused import Activation, gaussian_log_prob, gaussian_log_probs, gaussian_sample
from embodied_rft.networks.mlp import MLP, Init


class ActorHead(nn.Module):
    """Features to an action in [-1, 1]^A: tanh of a Gaussian, or a deterministic tanh with exploration noise.

    The raw value `u` of a decision is what its log-probability is computed from: before tanh for a Gaussian, before
    clipping for a deterministic actor (a Gaussian of fixed width around its action) and for a Gaussian around tanh.

    Args:
        in_features: F.
        action_dim: A.
        hidden: sizes of the hidden layers.
        noise: None for a Gaussian head, else the standard deviation of exploration of a deterministic one.
        std: "state" (a second output) or "free" (one parameter per dimension).
        squash: "action": tanh of the Gaussian's value; "mean": tanh of its mean, and its value is clipped.
        initial_log_std: where log std starts.
        log_std_range: log std is clamped to it.
        last_gain: gain of the last layer; 0.01 starts near the zero action.
        layer_norm: LayerNorm after each hidden layer.
        init: of the weights.
        activation: of the hidden layers.
        rng: draws the weights.
    """

    __call__: Callable[..., tuple[Tensor, Tensor]]

    def __init__(
        self,
        in_features: int,
        action_dim: int,
        *,
        hidden: Sequence[int],
        rng: torch.Generator,
        noise: float | None = None,
        std: Literal["state", "free"] = "state",
        squash: Literal["action", "mean"] = "action",
        initial_log_std: float = 0.0,
        log_std_range: tuple[float, float] = (-5.0, 2.0),
        last_gain: float = 1.0,
        layer_norm: bool = False,
        init: Init = "uniform",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if noise is not None and noise <= 0:
            raise UserError(f"exploration noise {noise} of a deterministic actor: a positive number is expected")
        if noise is not None and squash != "action":
            raise UserError(f"squash: {squash} has no effect on a deterministic actor: leave it out")
        self.noise, self.std, self.log_std_range = noise, std, log_std_range
        self.squashed = noise is None and squash == "action"  # whether a value goes through tanh, or is clipped
        two_outputs = noise is None and std == "state"
        outputs = 2 * action_dim if two_outputs else action_dim
        self.net = MLP(
            in_features,
            hidden,
            outputs,
            rng=rng,
            last_gain=last_gain,
            layer_norm=layer_norm,
            init=init,
            activation=activation,
        )
        self.action_dim = action_dim
        if two_outputs:
            with torch.no_grad():
                self.net.last.bias[action_dim:].fill_(initial_log_std)
        elif noise is None:
            self.log_std = nn.Parameter(torch.full((action_dim,), initial_log_std))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Centre [B, A] and log standard deviation ([B, A] or [A]) of `u`."""
        out = self.net(features).float()
        if self.noise is not None:
            return torch.tanh(out), out.new_full((self.action_dim,), math.log(self.noise))
        mean, log_std = out.split(self.action_dim, -1) if self.std == "state" else (out, self.log_std)
        mean = mean if self.squashed else torch.tanh(mean)
        return mean, F.hardtanh(log_std, *self.log_std_range)  # clamp, with a backward pass of one kernel

    def squash(self, u: Tensor) -> Tensor:
        """Raw value to action in [-1, 1]."""
        return torch.tanh(u) if self.squashed else u.clamp(-1, 1)

    def mode(self, features: Tensor) -> Tensor:
        """The most likely action [B, A], differentiable."""
        out = self.net(features)[..., : self.action_dim].float()
        return torch.tanh(out)

    def rsample(self, features: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A reparametrised (action [B, A], log_prob [B], u [B, A])."""
        centre, log_std = self(features)
        noise = torch.randn(centre.shape, generator=rng, device=centre.device)
        u, log_prob = gaussian_sample(centre, log_std, noise, self.squashed)
        return self.squash(u), log_prob, u

    def log_prob(self, features: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability [B] of raw values, and entropy [B] of the Gaussian before squashing (a usual stand-in)."""
        centre, log_std = self(features)
        return gaussian_log_prob(u, centre, log_std, self.squashed)

    def log_prob_where(self, features: Tensor, u: Tensor, mask: Tensor) -> Tensor:
        """Log-probability [B] of those numbers of raw values u [B, A] that are under the mask [B, A]."""
        centre, log_std = self(features)
        each = gaussian_log_probs(u, centre, log_std, self.squashed)
        return torch.where(mask, each, 0.0).sum(-1)

    def unsquash(self, action: Tensor, *, margin: float = 1e-3) -> Tensor:
        """The raw value of an action in [-1, 1], at least `margin` from the bounds, where it would be infinite.

        Actions of others often lie at the bounds, where something clipped them; values that far out (7 at a margin of
        1e-6) would outweigh all other actions in a likelihood.
        """
        return torch.atanh(action.clamp(-1 + margin, 1 - margin)) if self.squashed else action
