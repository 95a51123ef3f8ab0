"""Network blocks: squashed actor head, critics, values, densities. They know no algorithm.

Shapes: B rows, A action dimensions, E ensemble members, F features. Every initial weight is drawn from the generator
that is passed in; the global one is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import gymnasium as gym
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embodied_rft.data import Tree
from embodied_rft.encoder import Encoder
from embodied_rft.mlp import MLP, Activation, EnsembleMLP, GaussianLogProb, GaussianSample, Init
from embodied_rft.mlp import linear as linear
from embodied_rft.spaces import DISCRETE, ActionScale, Choices, one_choice


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Move target by tau (online - target) (Lillicrap et al. 2015, DDPG, algorithm 1); buffers are copied."""
    pairs = ((t.data, o.data) for t, o in zip(target.parameters(), online.parameters(), strict=True) if t is not o)
    moving, towards = zip(*pairs, strict=True)  # frozen weights are shared, they stay
    torch._foreach_lerp_(moving, towards, tau)
    for old, new in zip(target.buffers(), online.buffers(), strict=True):
        old.copy_(new)


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
            raise ValueError(f"exploration noise {noise} of a deterministic actor: a positive number is expected")
        if noise is not None and squash != "action":
            raise ValueError(f"squash: {squash} has no effect on a deterministic actor: leave it out")
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
        u, log_prob = GaussianSample.apply(centre, log_std, noise, self.squashed)
        return self.squash(u), log_prob, u

    def log_prob(self, features: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability [B] of raw values, and entropy [B] of the Gaussian before squashing (a usual stand-in)."""
        centre, log_std = self(features)
        return GaussianLogProb.apply(u, centre, log_std, self.squashed)

    def log_prob_where(self, features: Tensor, u: Tensor, mask: Tensor) -> Tensor:
        """Log-probability [B] of those numbers of raw values u [B, A] that are under the mask [B, A]."""
        centre, log_std = self(features)
        each = torch.distributions.Normal(centre, log_std.exp()).log_prob(u)
        if self.squashed:  # log(1 - tanh(u)^2)
            each = each - 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
        return torch.where(mask, each, 0.0).sum(-1)

    def unsquash(self, action: Tensor, *, margin: float = 1e-3) -> Tensor:
        """The raw value of an action in [-1, 1], at least `margin` from the bounds, where it would be infinite.

        Actions of others often lie at the bounds, where something clipped them; values that far out (7 at a margin of
        1e-6) would outweigh all other actions in a likelihood.
        """
        return torch.atanh(action.clamp(-1 + margin, 1 - margin)) if self.squashed else action


class ActionReader(nn.Module):
    """What a network reads of an action [B, ...] in its space's units: [B, size], vectors scaled to [-1, 1]."""

    def __init__(self, space: gym.Space) -> None:
        super().__init__()
        self.space = Choices(space) if isinstance(space, DISCRETE) else ActionScale(space)
        self.size = sum(self.space.sizes) if isinstance(self.space, Choices) else self.space.action_dim

    def forward(self, action: Tensor) -> Tensor:
        """[B, ...] -> [B, size]."""
        return self.space.one_hot(action) if isinstance(self.space, Choices) else self.space.from_env(action)


class Critic(nn.Module):
    """An ensemble of action values Q_e(o, a): (observation, [B, A]) -> [E, B].

    Actions come in the units of their space; the networks read them in [-1, 1] (choices: as one-hot vectors).
    """

    def __init__(
        self,
        encoder: Encoder,
        space: gym.Space,
        *,
        rng: torch.Generator,
        hidden: Sequence[int] = (256, 256),
        num_members: int = 2,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.num_members = encoder, num_members
        self.reads = ActionReader(space)
        self.net = EnsembleMLP(
            encoder.size + self.reads.size, hidden, num_members=num_members, rng=rng, layer_norm=layer_norm
        )

    def forward(self, observation: Tree, action: Tensor, members: Tensor | None = None) -> Tensor:
        """Values [E, B], or [M, B] of the chosen members."""
        return self.of_features(self.encoder(observation), action, members)

    def of_features(self, features: Tensor, action: Tensor, members: Tensor | None = None) -> Tensor:
        """The same from encoded observations [B, F]."""
        return self.net(torch.cat([features, self.reads(action)], -1), members)


class ActionValues(nn.Module):
    """An ensemble of the values of all options of one choice: observation -> [E, B, n]."""

    def __init__(
        self,
        encoder: Encoder,
        space: gym.Space,
        *,
        rng: torch.Generator,
        hidden: Sequence[int] = (256, 256),
        num_members: int = 2,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        size = one_choice(space, "a critic of all options").sizes[0]
        self.nets = nn.ModuleList(
            MLP(encoder.size, hidden, size, rng=rng, layer_norm=layer_norm) for _ in range(num_members)
        )

    def forward(self, observation: Tree) -> Tensor:
        """Values [E, B, n]."""
        features = self.encoder(observation)
        return torch.stack([net(features) for net in self.nets]).float()


class Value(nn.Module):
    """A state value V(o): observation -> [B]."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        rng: torch.Generator,
        hidden: Sequence[int] = (256, 256),
        layer_norm: bool = False,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.net = MLP(encoder.size, hidden, 1, rng=rng, layer_norm=layer_norm, activation=activation)

    def forward(self, observation: Tree) -> Tensor:
        """Values [B]."""
        return self.net(self.encoder(observation)).squeeze(-1).float()


class Temperature(nn.Module):
    """The entropy weight alpha of soft actor-critic, kept as its logarithm."""

    def __init__(self, *, initial: float = 1.0) -> None:
        super().__init__()
        if initial <= 0:
            raise ValueError(f"initial temperature {initial}: a positive number is expected")
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial)))

    @property
    def alpha(self) -> Tensor:
        """A positive scalar without gradient."""
        return self.log_alpha.detach().exp()


class ReturnScale(nn.Module):
    """Running standard deviation of returns, by which rewards are divided (Engstrom et al. 2020, section 3, item 2)."""

    count: Tensor
    mean: Tensor
    squares: Tensor  # sum of squared distances from the mean

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "mean", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def update(self, returns: Tensor) -> float:
        """Take in returns [B]; the standard deviation of all so far (Chan et al. 1979), 1 where they do not vary."""
        new = returns.to(self.mean)
        total, shift = self.count + len(new), new.mean() - self.mean
        self.squares += (new - new.mean()).square().sum() + shift.square() * self.count * len(new) / total
        self.mean += shift * len(new) / total
        self.count.copy_(total)
        scale = float((self.squares / total).sqrt())
        return scale if scale > 1e-8 else 1.0


class Density(nn.Module):
    """Conditional variational auto-encoder p(a | o) of the data's actions (Sohn et al. 2015).

    Actions come in the environment's units, the density is one of [-1, 1]^A. `weight` is the current weight of a
    support penalty (SPOT); it lives here so that a checkpoint has it.
    """

    weight: Tensor

    def __init__(
        self, encoder: Encoder, space: gym.Space, *, rng: torch.Generator, hidden: Sequence[int] = (256, 256)
    ) -> None:
        super().__init__()
        self.action = ActionScale(space)
        action_dim = self.action.action_dim
        self.encoder, self.latent = encoder, 2 * action_dim
        self.infer = MLP(encoder.size + action_dim, hidden, 2 * self.latent, rng=rng)
        self.decode = MLP(encoder.size + self.latent, hidden, action_dim, rng=rng)
        self.register_buffer("weight", torch.zeros(()))

    def negative_elbo(self, observation: Tree, action: Tensor, *, beta: float, rng: torch.Generator) -> Tensor:
        """[B]: mean squared reconstruction error + beta * mean KL(q(z | o, a) || N(0, 1)) over dimensions.

        Small where the data has this action. One sample of z; means, not sums, as in the code of SPOT's authors.
        """
        features, action = self.encoder(observation), self.action.from_env(action)
        mean, log_std = self.infer(torch.cat([features, action], -1)).float().chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        z = torch.addcmul(mean, log_std.exp(), noise)
        error = torch.tanh(self.decode(torch.cat([features, z], -1)).float()) - action
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        return error.square().mean(-1) + beta * kl.mean(-1)
