"""Network blocks: squashed actor head, critics, values, densities. They know no algorithm.

Shapes: B rows, A action dimensions, E ensemble members, F features. Every initial weight is drawn from the generator
that is passed in; the global one is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from embodied_rft.data import Space, Tree
from embodied_rft.names import UserError
from embodied_rft.networks.encoder import Features
from embodied_rft.networks.fused import Activation
from embodied_rft.networks.mlp import MLP, EnsembleMLP
from embodied_rft.networks.mlp import linear as linear
from embodied_rft.networks.texts import TextBag
from embodied_rft.pools.protocol import is_text
from embodied_rft.pools.spaces import DISCRETE, ActionScale, Choices, one_choice


class ActionReader(nn.Module):
    """What a network reads of an action in its space's units: [B, size]; vectors scaled to [-1, 1], texts as bags."""

    __call__: Callable[..., Tensor]

    def __init__(self, space: Space, *, rng: torch.Generator) -> None:
        super().__init__()
        self.bag = TextBag(rng=rng) if is_text(space) else None
        if self.bag is not None:
            self.size = self.bag.size
            return
        self.space = Choices(space) if isinstance(space, DISCRETE) else ActionScale(space)
        self.size = sum(self.space.sizes) if isinstance(self.space, Choices) else self.space.action_dim

    def forward(self, action: Tensor | Sequence[str]) -> Tensor:
        """[B, ...], or B texts -> [B, size]."""
        if self.bag is not None:
            return self.bag(action)
        assert isinstance(action, Tensor)
        return self.space.one_hot(action) if isinstance(self.space, Choices) else self.space.from_env(action)


class Critic(nn.Module):
    """An ensemble of action values Q_e(o, a): (observation, [B, A]) -> [E, B].

    Actions come in the units of their space; the networks read them in [-1, 1] (choices: as one-hot vectors).
    """

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        encoder: Features,
        space: Space,
        *,
        rng: torch.Generator,
        hidden: Sequence[int] = (256, 256),
        num_members: int = 2,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.num_members = encoder, num_members
        self.reads = ActionReader(space, rng=rng)
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

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        encoder: Features,
        space: Space,
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

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        encoder: Features,
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
            raise UserError(f"initial temperature {initial}: a positive number is expected")
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
        self, encoder: Features, space: Space, *, rng: torch.Generator, hidden: Sequence[int] = (256, 256)
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
