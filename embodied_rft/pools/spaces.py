"""What spaces mean to whoever learns: which actions can be learned, and the scale between their units and [-1, 1].

Actions are in the environment's units wherever they pass from one part to another: decisions, batches, policies,
critics and densities take and give nothing else. Whoever has a network that reads or makes an action knows the space
and scales inside. Boundary: Gymnasium's spaces and tensors; no network, no environment. Legend: B rows, A dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from embodied_rft.data import Space
from embodied_rft.names import UserError

LARGEST_BOUND = 1e9  # beyond it, finite bounds are a way to say that there are none (3.4e38 is float32's largest)
DISCRETE = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check_action_space(space: Space) -> None:
    """Refuse action vectors that no policy can be scaled to. Other spaces, and infinite bounds, pass.

    Raises:
        ValueError: a Box of integers, a dimension that cannot move, or bounds that are none.
    """
    if not isinstance(space, spaces.Box):
        return
    if not np.issubdtype(space.dtype, np.floating):
        raise UserError(
            f"action space {space}: a Box of {space.dtype} is no space of action vectors, floats are expected. If the "
            "integers are choices, let the environment offer a MultiDiscrete; else put "
            "gymnasium.wrappers.TransformAction with a float Box around it"
        )
    low, high = space.low.astype(np.float64).reshape(-1), space.high.astype(np.float64).reshape(-1)
    bounded = np.isfinite(low) & np.isfinite(high)
    size = np.maximum(np.abs(low), np.abs(high))
    for index in np.flatnonzero(bounded):
        where = f"action space {space}: dimension {index} goes from {low[index]:g} to {high[index]:g}"
        if size[index] > LARGEST_BOUND:
            raise UserError(
                f"{where}: bounds this large stand for none, and nothing can be scaled to them. State the range that "
                "makes sense: gymnasium.wrappers.TransformAction(env, lambda action: action, Box(low, high))"
            )
        if not high[index] - low[index] > 1e-5 * size[index]:
            raise UserError(
                f"{where}: it cannot move. Leave it out: gymnasium.wrappers.TransformAction(env, lambda action: "
                f"np.insert(action, {index}, {low[index]:g}), a Box without it)"
            )


class ActionBox(spaces.Box):
    """The space of an observation that is an action, such as a base policy's: encoders read it in [-1, 1], too."""


class ActionScale(nn.Module):
    """Between an action space's units and [-1, 1]^A.

    Raises:
        ValueError: the space is no bounded Box of one dimension.
    """

    center: Tensor
    half_range: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, space: Space) -> None:
        super().__init__()
        if not isinstance(space, spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
            raise UserError(f"action space {space}: a bounded Box of shape (A,) is expected. {what_suits(space)}")
        check_action_space(space)
        low, high = torch.from_numpy(space.low).double(), torch.from_numpy(space.high).double()
        for name, value in {
            "center": (high + low) / 2,
            "half_range": (high - low) / 2,
            "low": low,
            "high": high,
        }.items():
            self.register_buffer(name, value.float(), persistent=False)
        self.identity = bool((low == -1).all() and (high == 1).all())
        self.action_dim = space.shape[0]

    def to_env(self, action: Tensor) -> Tensor:
        """[-1, 1]^A to the environment's units, never beyond its bounds by rounding."""
        return action if self.identity else self.clip(torch.addcmul(self.center, action, self.half_range))

    def clip(self, action: Tensor) -> Tensor:
        """Into the bounds of the space."""
        return torch.clamp(action, self.low, self.high)

    def from_env(self, action: Tensor) -> Tensor:
        """The environment's units to [-1, 1]^A."""
        return action if self.identity else (action - self.center) / self.half_range


def what_suits(space: Space) -> str:
    """Which agent and which objectives take actions of this space."""
    if isinstance(space, DISCRETE):
        return "Choices take the agent categorical, with ppo and its presets, bc, dqn or discrete_sac"
    if isinstance(space, spaces.Text):
        return "Texts take the agent language and an objective of its log-probabilities, such as grpo"
    if isinstance(space, spaces.Box) and len(space.shape) != 1:
        return "Put gymnasium.wrappers.TransformAction around the environment, which reshapes a flat action"
    if isinstance(space, spaces.Box) and space.is_bounded():
        return "Action vectors take the agent gaussian, with sac, ppo, td3 and the rest, or diffusion, flow and a vla"
    if isinstance(space, spaces.Box):
        return (
            "State the range that makes sense: gymnasium.wrappers.TransformAction(env, lambda action: action, "
            "Box(low, high))"
        )
    return "Put a wrapper around the environment that gives a Box, a Discrete, a MultiDiscrete or a Text"


class Choices(nn.Module):
    """K independent choices as numbers: a Discrete (K = 1), MultiDiscrete or MultiBinary action, flat.

    Discrete(3, start=1) has `sizes` (3,); the action 2 is index 1.

    Raises:
        ValueError: the space holds no choices.
    """

    start: Tensor  # [K] int64

    def __init__(self, space: Space) -> None:
        super().__init__()
        if isinstance(space, spaces.Discrete):
            sizes, start = np.array([space.n]), np.array([space.start])
        elif isinstance(space, spaces.MultiDiscrete):
            sizes, start = space.nvec.reshape(-1), space.start.reshape(-1)
        elif isinstance(space, spaces.MultiBinary):
            sizes = np.full(int(np.prod(space.shape)), 2)
            start = np.zeros_like(sizes)
        else:
            raise UserError(f"space {space}: a Discrete, MultiDiscrete or MultiBinary is expected")
        self.shape: tuple[int, ...] = tuple(space.shape or ())
        self.dtype = np.dtype(space.dtype)
        self.sizes = tuple(int(size) for size in sizes)
        self.register_buffer("start", torch.from_numpy(start.astype(np.int64)), persistent=False)

    def index(self, action: Tensor) -> Tensor:
        """Actions [B, ...] in the environment's numbers -> indices [B, K] from 0."""
        return action.reshape(len(action), len(self.sizes)).long() - self.start

    def action(self, index: Tensor) -> Tensor:
        """The inverse: indices [B, K] -> actions [B, ...] in the environment's numbers."""
        return (index + self.start).reshape(len(index), *self.shape)

    def one_hot(self, action: Tensor) -> Tensor:
        """Actions [B, ...] -> [B, sum of sizes] floats."""
        index = self.index(action)
        return torch.cat([F.one_hot(index[:, k], size) for k, size in enumerate(self.sizes)], -1).float()


def one_choice(space: Space, who: str) -> Choices:
    """The choice of a Discrete action space.

    Raises:
        ValueError: there is none, or there are several, whose combinations `who` would have to tell apart.
    """
    if not isinstance(space, DISCRETE):
        raise UserError(f"action space {space}: {who} needs a Discrete one. {what_suits(space)}")
    choices = Choices(space)
    if len(choices.sizes) > 1:
        raise UserError(
            f"action space {space}: {who} needs one choice, here are {len(choices.sizes)} at a time. Use ppo, or wrap "
            "the environment so that a Discrete numbers the combinations"
        )
    return choices
