"""Network blocks: image and observation encoders, squashed actor head, critics, values. They know no algorithm.

Shapes: B rows, A action dimensions, E ensemble members, F features. Every initial weight is drawn from the generator
that is passed in; the global one is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embodied_rft.data import Tree
from embodied_rft.mlp import MLP, Activation, EnsembleMLP, GaussianLogProb, GaussianSample, Init, fill, linear
from embodied_rft.registry import nearest
from embodied_rft.spaces import DISCRETE, ActionScale, Choices


class ImageEncoder(nn.Module):
    """Four strided 3x3 convolutions, one linear layer and LayerNorm: [B, H, W, C] uint8 -> [B, F] float."""

    def __init__(self, shape: tuple[int, ...], num_features: int, *, rng: torch.Generator) -> None:
        super().__init__()
        height, width, channels = shape
        if min(height, width) < 16:
            raise ValueError(f"an image of {height}x{width} is too small for the encoder: at least 16x16 is expected")
        layers: list[nn.Module] = []
        for out in (32, 32, 32, 32):
            conv = nn.utils.skip_init(nn.Conv2d, channels, out, 3, stride=2, padding=1)
            fill(conv.weight, fan_in=9 * channels, gain=1.0, init="orthogonal", rng=rng)
            nn.init.zeros_(conv.bias)
            layers += [conv, nn.ReLU(inplace=True)]
            channels, height, width = out, (height + 1) // 2, (width + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.project = linear(channels * height * width, num_features, rng=rng)
        self.norm = nn.LayerNorm(num_features)

    def forward(self, image: Tensor) -> Tensor:
        """[B, H, W, C] uint8 in 0..255 -> [B, F]."""
        x = image.permute(0, 3, 1, 2).float() / 255 - 0.5
        return torch.tanh(self.norm(self.project(self.convolutions(x).flatten(1))))


class Encoder(nn.Module):
    """An observation tree as one feature vector: state keys side by side, images through a small CNN each.

    With `normalize`, the state part is shifted and scaled by statistics that `fit` takes once from data and that
    travel in the state_dict; until then it passes through.

    Args:
        space: a Box (key "observation") or a Dict of Boxes: [k] float vectors and [H, W, C] uint8 images.
        keys: which keys to read; default all state and image keys, sorted.
        num_image_features: features of each image.
        normalize: standardise the state part, clipped to [-10, 10].
        rng: draws the weights.
    """

    mean: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(
        self,
        space: gym.Space,
        *,
        rng: torch.Generator,
        keys: Sequence[str] | None = None,
        num_image_features: int = 64,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        boxes = _boxes(space)
        if keys is not None:
            for key in keys:
                if key not in boxes:
                    raise ValueError(f"observation key {key!r} does not exist or is no array; {nearest(key, boxes)}")
            boxes = {key: boxes[key] for key in keys}
        self.options: dict[str, Any] = {"keys": keys, "num_image_features": num_image_features, "normalize": normalize}
        self.space = space
        self.image_keys = [k for k, box in boxes.items() if len(box.shape) == 3]
        self.state_keys = [k for k in boxes if k not in self.image_keys]
        if not boxes:
            raise ValueError(f"nothing to read in the observation space {space}: state vectors or images are expected")
        self.images = nn.ModuleList(ImageEncoder(boxes[k].shape, num_image_features, rng=rng) for k in self.image_keys)
        state_size = sum(int(np.prod(boxes[k].shape)) for k in self.state_keys)
        self.size = state_size + num_image_features * len(self.image_keys)
        self.frozen = False  # a frozen base keeps the statistics that it was trained with
        if normalize:
            self.register_buffer("mean", torch.zeros(state_size))
            self.register_buffer("scale", torch.ones(state_size))
            self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @property
    def normalize(self) -> bool:
        """Whether the state part is standardised."""
        return self.options["normalize"]

    def like(self, rng: torch.Generator) -> Encoder:
        """A fresh encoder with the same options and statistics, for another part of the agent."""
        fresh = Encoder(self.space, rng=rng, **self.options).to(next(self.buffers(), torch.empty(0)).device)
        if self.normalize:
            for name in ("mean", "scale", "fitted"):
                getattr(fresh, name).copy_(getattr(self, name))
        return fresh

    def fit(self, observation: Tree) -> None:
        """Take mean and standard deviation of the state part from [B, ...] observations, unless already taken."""
        if self.normalize and not self.frozen and not bool(self.fitted):
            state = self._state(observation)
            self.mean.copy_(state.mean(0))
            self.scale.copy_(1 / state.std(0, correction=0).clamp_min(1e-2))
            self.fitted.fill_(True)

    def _state(self, observation: Tree) -> Tensor:
        parts = [observation[k] for k in self.state_keys]
        parts = [p if p.dim() == 2 else p.reshape(p.shape[0], -1) for p in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def forward(self, observation: Tree) -> Tensor:
        """A tree of tensors [B, ...] -> [B, size]."""
        features: list[Tensor] = []
        if self.state_keys:
            state = self._state(observation)
            features.append(((state - self.mean) * self.scale).clamp(-10, 10) if self.normalize else state)
        features += [net(observation[k]) for net, k in zip(self.images, self.image_keys, strict=True)]
        return features[0] if len(features) == 1 else torch.cat(features, -1)


def _boxes(space: gym.Space) -> dict[str, gym.spaces.Box]:
    """The keys of a space that an encoder can read, sorted."""
    spaces = space.spaces if isinstance(space, gym.spaces.Dict) else {"observation": space}
    return {
        key: box
        for key, box in sorted(spaces.items())
        if isinstance(box, gym.spaces.Box)
        and (np.issubdtype(box.dtype, np.floating) or (box.dtype == np.uint8 and len(box.shape) == 3))
    }


def as_tensors(observation: Tree, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A tree of arrays as tensors: floats become float32, uint8 stays; whatever is no array is left out."""
    tensors = {}
    for key, value in observation.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, Tensor):
            tensors[key] = value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    return tensors


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Move target by tau (online - target) (Lillicrap et al. 2015, DDPG, algorithm 1); buffers are copied."""
    torch._foreach_lerp_([p.data for p in target.parameters()], [p.data for p in online.parameters()], tau)
    for old, new in zip(target.buffers(), online.buffers(), strict=True):
        old.copy_(new)


class ActorHead(nn.Module):
    """Features to an action in [-1, 1]^A: tanh of a Gaussian, or a deterministic tanh with exploration noise.

    The raw value `u` of a decision is what its log-probability is computed from: before tanh for a Gaussian, before
    clipping for a deterministic actor (a Gaussian of fixed width around its action).

    Args:
        in_features: F.
        action_dim: A.
        hidden: sizes of the hidden layers.
        noise: None for a Gaussian head, else the standard deviation of exploration of a deterministic one.
        std: "state" (a second output) or "free" (one parameter per dimension).
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
        self.noise, self.std, self.log_std_range = noise, std, log_std_range
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
        return mean, F.hardtanh(log_std, *self.log_std_range)  # clamp, with a backward pass of one kernel

    def squash(self, u: Tensor) -> Tensor:
        """Raw value to action in [-1, 1]."""
        return torch.tanh(u) if self.noise is None else u.clamp(-1, 1)

    def mode(self, features: Tensor) -> Tensor:
        """The most likely action [B, A], differentiable."""
        out = self.net(features)[..., : self.action_dim].float()
        return torch.tanh(out)

    def rsample(self, features: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A reparametrised (action [B, A], log_prob [B], u [B, A])."""
        centre, log_std = self(features)
        noise = torch.randn(centre.shape, generator=rng, device=centre.device)
        u, log_prob = GaussianSample.apply(centre, log_std, noise, self.noise is None)
        return self.squash(u), log_prob, u

    def log_prob(self, features: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability [B] of raw values, and entropy [B] of the Gaussian before squashing (a usual stand-in)."""
        centre, log_std = self(features)
        return GaussianLogProb.apply(u, centre, log_std, self.noise is None)

    def unsquash(self, action: Tensor) -> Tensor:
        """The raw value of an action in [-1, 1] whose trace is unknown (a demonstration)."""
        return torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6)) if self.noise is None else action


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
    `scale` is a running mean of |Q|, kept by objectives that weigh the value against a penalty.
    """

    scale: Tensor

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
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, observation: Tree, action: Tensor, members: Tensor | None = None) -> Tensor:
        """Values [E, B], or [M, B] of the chosen members."""
        return self.of_features(self.encoder(observation), action, members)

    def of_features(self, features: Tensor, action: Tensor, members: Tensor | None = None) -> Tensor:
        """The same from encoded observations [B, F]."""
        return self.net(torch.cat([features, self.reads(action)], -1), members)


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
        """[B]: squared reconstruction error + beta KL(q(z | o, a) || N(0, 1)): small where the data has this action."""
        features, action = self.encoder(observation), self.action.from_env(action)
        mean, log_std = self.infer(torch.cat([features, action], -1)).float().chunk(2, -1)
        log_std = log_std.clamp(-4, 4)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        z = torch.addcmul(mean, log_std.exp(), noise)
        error = torch.tanh(self.decode(torch.cat([features, z], -1)).float()) - action
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        return error.square().sum(-1) + beta * kl.sum(-1)
