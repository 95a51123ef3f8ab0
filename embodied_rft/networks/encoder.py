"""Observations as feature vectors: every key of every space is read here, for all policies and critics, or refused.

Nested Dicts come flat, as pools give them ("robot/qpos"). Nothing is left out without being told to: what no network of
numbers can read (text) is refused by name unless `keys` leaves it out. Boundary: no action, no algorithm.
Legend: B rows, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from embodied_rft.data import Space, Tree
from embodied_rft.names import UserError, nearest
from embodied_rft.networks.mlp import fill, linear, unfilled
from embodied_rft.pools.protocol import flatten_space, is_text
from embodied_rft.pools.spaces import DISCRETE, ActionBox, ActionScale, Choices

Normalize = bool | Literal["running"]
SMALL_IMAGE = 16  # below it strided convolutions leave nothing
MOST_CHOICES = 4096  # numbers of a one-hot vector
SMALLEST_STD = 1e-2  # what varies less is magnified no further
CONSTANT_STD = 1e-6  # what varies less stands still, but for rounding
SOFT_LIMIT = 10.0  # standardised features grow like a logarithm beyond it


# ---------------------------------------------------------------------------------------------------------------------
# Which keys, and how
# ---------------------------------------------------------------------------------------------------------------------


def select_leaves(space: Space, keys: Sequence[str] | None) -> dict[str, Space]:
    """The leaves of an observation space that are to be read, by flat key: those that `keys` names, else all, sorted.

    A key may name a whole Dict: "robot" stands for "robot/qpos" and "robot/qvel".

    Raises:
        ValueError: a key that does not exist.
    """
    leaves = flatten_space(space)
    if keys is None:
        return {key: leaves[key] for key in sorted(leaves)}
    chosen: dict[str, Space] = {}
    for key in keys:
        found = [leaf for leaf in leaves if leaf == key or leaf.startswith(f"{key}/")]
        if not found:
            raise UserError(f"observation key {key!r} does not exist; {nearest(key, leaves)}")
        chosen |= {leaf: leaves[leaf] for leaf in found}
    return chosen


def is_image(space: Space) -> bool:
    """Whether a leaf is looked at as a picture: [H, W], [H, W, C], [C, H, W], or frames of them in front.

    Bytes always are; other numbers where both sides have at least 16 pixels, and [H, W] only with finite bounds.
    """
    if not isinstance(space, spaces.Box) or len(space.shape) < 2 or 0 in space.shape:
        return False
    if space.dtype == np.uint8:
        return True
    height, width = _sides(space.shape)
    return min(height, width) >= SMALL_IMAGE and (len(space.shape) > 2 or bool(space.is_bounded()))


def cameras(space: Space) -> list[str]:
    """The keys that a vision-language model looks at, sorted: pictures [H, W, 3] of bytes."""
    boxes = {key: leaf for key, leaf in flatten_space(space).items() if isinstance(leaf, spaces.Box)}
    return sorted(key for key, box in boxes.items() if box.dtype == np.uint8 and box.shape[2:] == (3,))


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    first, second = shape[-2:] if len(shape) == 2 or _channels_first(shape) else shape[-3:-1]
    return first, second


def _channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) > 2 and shape[-3] < min(shape[-2:])


# ---------------------------------------------------------------------------------------------------------------------
# Single keys
# ---------------------------------------------------------------------------------------------------------------------


class Numbers(nn.Module):
    """What is no picture, [B, ...] -> [B, size]: floats as they are, integers in [-1, 1], choices as one-hot vectors.

    Integers without bounds are read as their inverse hyperbolic sine, which grows like a logarithm. Bounds that are
    those of the type (a vector of bytes from 0 to 255) say nothing about the values, and count as none.

    Raises:
        ValueError: nothing here can be read as numbers; the key is named.
    """

    def __init__(self, key: str, space: Space) -> None:
        super().__init__()
        self.key, self.measured = key, False  # whether statistics of the data say anything about it
        self.choices: Choices | None = None
        self.action: ActionScale | None = None
        self.compress = False
        self.range: tuple[float, float] | None = None
        if isinstance(space, DISCRETE) and not isinstance(space, spaces.MultiBinary):
            self.choices = Choices(space)
            self.size = sum(self.choices.sizes)
            if self.size > MOST_CHOICES:
                raise UserError(
                    f"observation key {key!r} has {self.size} values, a one-hot vector of at most {MOST_CHOICES} is "
                    f"expected. Wrap the environment so that it tells {key!r} as numbers, or leave it out with `keys`"
                )
        elif isinstance(space, ActionBox) and len(space.shape) == 1 and space.is_bounded():
            self.action, self.size = ActionScale(space), space.shape[0]
        elif isinstance(space, spaces.Box | spaces.MultiBinary):
            self.size = int(np.prod(space.shape))
            self._read_box(space)
        else:
            what = "text" if is_text(space) else f"a {type(space).__name__}"
            raise UserError(
                f"observation key {key!r} is {what}, which this network cannot read. Name the keys that it reads with "
                "the option `keys`" + ("; agents that read text are language and vla" if is_text(space) else "")
            )

    def _read_box(self, space: spaces.Box | spaces.MultiBinary) -> None:
        dtype = np.dtype(space.dtype)
        if np.issubdtype(dtype, np.floating):
            self.measured = True
        elif np.issubdtype(dtype, np.integer) and isinstance(space, spaces.Box) and self.size:
            low, high = float(space.low.min()), float(space.high.max())
            limits = np.iinfo(dtype.name)
            stated = low > limits.min or high < limits.max
            if stated and 0 < high - low <= 2**24:  # what float32 counts exactly
                self.range = ((high + low) / 2, (high - low) / 2)
            else:
                self.compress = self.measured = True

    def forward(self, value: Tensor) -> Tensor:
        """[B, ...] -> [B, size] floats."""
        if self.choices is not None:
            return self.choices.one_hot(value)
        value = value if value.is_floating_point() else value.float()
        value = value if value.dim() == 2 else value.reshape(value.shape[0], self.size)
        if self.action is not None:
            return self.action.from_env(value)
        if self.range is not None:
            return (value - self.range[0]) / self.range[1]
        return torch.asinh(value) if self.compress else value


class ImageEncoder(nn.Module):
    """A picture as features: [B, *shape] -> [B, F]; four strided 3x3 convolutions, one linear layer and LayerNorm.

    Values are scaled by the bounds of the space to [-0.5, 0.5] (bytes: v / 255 - 0.5). Bytes of fewer than 16 pixels a
    side are grids of symbols more often than photographs (MiniGrid), of which 1 and 2 are as far apart as 1 and 200:
    beside its value, each has its eight bits, and convolutions have no stride.
    """

    def __init__(self, space: spaces.Box, num_features: int, *, rng: torch.Generator) -> None:
        super().__init__()
        shape = space.shape
        self.is_flat, self.channels_first = len(shape) == 2, _channels_first(shape)
        height, width = _sides(shape)
        channels = int(np.prod(shape)) // (height * width)
        low, high = float(space.low.min()), float(space.high.max())
        bounded = np.isfinite(high - low) and high > low
        self.low, self.range = (low, high - low) if bounded else (0.0, 0.0)  # 0: as they are
        self.symbols = space.dtype == np.uint8 and min(height, width) < SMALL_IMAGE
        stride, widths = (1, (32, 32)) if self.symbols else (2, (32, 32, 32, 32))
        channels *= 9 if self.symbols else 1
        layers: list[nn.Module] = []
        for out in widths:
            conv = unfilled(nn.Conv2d, channels, out, 3, stride=stride, padding=1)
            fill(conv.weight, fan_in=9 * channels, gain=1.0, init="orthogonal", rng=rng)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            layers += [conv, nn.ReLU(inplace=True)]
            channels, height, width = out, (height - 1) // stride + 1, (width - 1) // stride + 1
        self.convolutions = nn.Sequential(*layers)
        self.project = linear(channels * height * width, num_features, rng=rng)
        self.norm = nn.LayerNorm(num_features)

    def forward(self, image: Tensor) -> Tensor:
        """[B, *shape] as the environment gives it -> [B, F]."""
        image = image[:, None] if self.is_flat else image if self.channels_first else image.movedim(-1, -3)
        image = image.flatten(1, -3)
        x = image.float()
        if self.range:
            x = (x - self.low) / self.range - 0.5 if self.low else x / self.range - 0.5
        if self.symbols:
            bits = [(image >> bit & 1).to(x) - 0.5 for bit in range(8)]
            x = torch.cat([x, *bits], 1)
        return torch.tanh(self.norm(self.project(self.convolutions(x).flatten(1))))


# ---------------------------------------------------------------------------------------------------------------------
# All keys
# ---------------------------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """What reads an observation for a network: a tree of tensors [B, ...] to features [B, size]."""

    size: int
    __call__: Callable[..., Tensor]


class Encoder(Features):
    """An observation tree as one feature vector: numbers side by side, images through a small CNN each.

    With `normalize`, numbers without a scale of their own (floats, integers without bounds) are shifted and scaled by
    statistics of the data, which travel in the state_dict; until there are some they pass through. `fit` takes them
    once, or, with "running", takes in all data that it is ever given.

    Args:
        space: of a single observation; Dicts may be nested.
        keys: which keys to read, in this order; default all, sorted.
        num_image_features: features of each image.
        normalize: False, True (once) or "running".
        rng: draws the weights.

    Raises:
        ValueError: a key that does not exist or that nothing can be read from; nothing to normalise.
    """

    mean: Tensor
    scale: Tensor
    fitted: Tensor
    measured: Tensor  # which features statistics are taken of
    count: Tensor  # running: rows seen
    center: Tensor  # running: their mean
    squares: Tensor  # running: sums of squared distances from it

    def __init__(
        self,
        space: Space,
        *,
        rng: torch.Generator,
        keys: Sequence[str] | None = None,
        num_image_features: int = 64,
        normalize: Normalize = False,
    ) -> None:
        super().__init__()
        leaves = select_leaves(space, keys)
        pictures: dict[str, Any] = {key: leaf for key, leaf in leaves.items() if is_image(leaf)}
        self.options: dict[str, Any] = {"keys": keys, "num_image_features": num_image_features, "normalize": normalize}
        self.space, self.normalize = space, normalize
        self.image_keys, self.state_keys = list(pictures), [key for key in leaves if key not in pictures]
        readers = [Numbers(key, leaves[key]) for key in self.state_keys]
        self.numbers: Any = nn.ModuleList(readers)
        self.images = nn.ModuleList(ImageEncoder(box, num_image_features, rng=rng) for box in pictures.values())
        state_size = sum(each.size for each in readers)
        self.size = state_size + num_image_features * len(self.image_keys)
        if not self.size:
            raise UserError(f"nothing to read in the observation space {space}: vectors or images are expected")
        self.frozen = False  # a frozen base keeps the statistics that it was trained with
        if normalize:
            self._make_statistics(state_size, running=normalize == "running")

    def _make_statistics(self, size: int, *, running: bool) -> None:
        measured = [torch.full((each.size,), each.measured, dtype=torch.bool) for each in self.numbers]
        self.register_buffer("measured", torch.cat([torch.zeros(0).bool(), *measured]), persistent=False)
        if not bool(self.measured.any()):
            raise UserError(
                f"normalize has no effect: of {', '.join([*self.state_keys, *self.image_keys])} none is a vector of "
                "floats (images, bounded integers and choices have scales of their own); leave the option out"
            )
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        if running:
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))
            self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))
            self.register_buffer("center", torch.zeros(size, dtype=torch.float64))

    @property
    def waits(self) -> bool:
        """Whether `fit` would change anything."""
        return bool(self.normalize) and not self.frozen and (self.normalize == "running" or not bool(self.fitted))

    def like(self, rng: torch.Generator) -> Encoder:
        """A fresh encoder with the same options and statistics, for another part of the agent."""
        fresh = Encoder(self.space, rng=rng, **self.options).to(next(self.buffers(), torch.empty(0)).device)
        own = dict(self.named_buffers(recurse=False))
        for name, buffer in fresh.named_buffers(recurse=False):
            buffer.copy_(own[name])
        return fresh

    @torch.no_grad()
    def fit(self, observation: Tree) -> None:
        """Take mean and deviation of numbers from [B, ...] observations: once, or on top of what came before."""
        if not self.waits:
            return
        state = self._state(observation)
        if self.normalize == "running":
            mean, std = self._take_in(state.double())
        else:
            mean, std = state.mean(0), state.std(0, correction=0)
        still = (std <= CONSTANT_STD * (1 + mean.abs())) & self.measured
        if bool(still.any()) and self.normalize is True:
            warnings.warn(
                f"{', '.join(self._names(still))}: no variation in the data, so they are shifted but not scaled. If "
                "they move later, normalize: running follows them",
                stacklevel=2,
            )
        scale = torch.where(still, 1.0, 1 / std.clamp_min(SMALLEST_STD))
        self.mean.copy_(torch.where(self.measured, mean, 0.0))
        self.scale.copy_(torch.where(self.measured, scale, 1.0))
        self.fitted.fill_(True)

    def _take_in(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Merge moments (Chan et al. 1979, eq. 2.1): mean and standard deviation of all rows so far."""
        shift, total = state.mean(0) - self.center, self.count + len(state)
        self.squares += (state - state.mean(0)).square().sum(0) + shift.square() * self.count * len(state) / total
        self.center += shift * len(state) / total
        self.count.copy_(total)
        return self.center, (self.squares / total).sqrt()

    def _names(self, mask: Tensor) -> list[str]:
        """What features are called, at most a few: "observation[3]"."""
        names = [f"{each.key}[{i}]" for each in self.numbers for i in range(each.size)]
        found = [names[i] for i in torch.nonzero(mask)[:, 0].tolist()]
        return found if len(found) <= 8 else [*found[:8], f"{len(found) - 8} more"]

    def _state(self, observation: Tree) -> Tensor:
        parts = [each(observation[key]) for each, key in zip(self.numbers, self.state_keys, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def forward(self, observation: Tree) -> Tensor:
        """A tree of tensors [B, ...] -> [B, size]."""
        features: list[Tensor] = []
        if self.state_keys:
            state = self._state(observation)
            features.append(self._standardise(state) if self.normalize else state)
        features += [net(observation[k]) for net, k in zip(self.images, self.image_keys, strict=True)]
        return features[0] if len(features) == 1 else torch.cat(features, -1)

    def _standardise(self, state: Tensor) -> Tensor:
        """Shift and scale; what lies far outside the data grows slowly, but never becomes a constant."""
        state = (state - self.mean) * self.scale
        inside = state.clamp(-SOFT_LIMIT, SOFT_LIMIT)
        return inside + torch.asinh(state - inside)
