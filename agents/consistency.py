"""`consistency`: an action-chunk policy that reaches the data in one or few steps (Song et al. 2023), as in ConRFT.

f(x, sigma) maps a chunk under noise of any width to the clean chunk. Few steps make gradients through the whole policy
cheap, which actor-critic objectives want (Chen et al. 2025, ConRFT): `mode` and `rsample` are differentiable.
Boundary: the step and the imitation loss; the rest is in `chunks`.

Legend: B rows, D numbers of a chunk, S sampling steps, L noise levels in training.
"""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agents.parts.chain import ChainPolicy, ChunkConfig, Step
from embodied_rft.data import Space, Tree
from embodied_rft.learning.losses import mean_where
from embodied_rft.names import UserError
from embodied_rft.options import STRICT
from embodied_rft.policy import require_rng
from embodied_rft.registry import register

DATA_STD = 0.5  # typical spread of normalised chunks (Karras et al. 2022)


@dataclass(config=STRICT, kw_only=True)
class ConsistencyConfig(ChunkConfig):
    """Options of a `consistency` agent."""

    num_steps: int = 2  # S: chunk from noise, then noise again and refine, ...
    num_levels: int = 20  # L noise widths between which consistency is trained
    sigma_min: float = 0.02  # smallest noise width, in normalised units
    sigma_max: float = 10.0  # largest, where chunks start
    reconstruction: float = 0.0  # weight of the squared error to the data itself (ConRFT's behaviour cloning: 1)


@register("agent", "consistency")
class ConsistencyPolicy(ChainPolicy):
    """One unit for each of the S steps; the last step's width is `min_std`.

    Example: {"id": "consistency", "horizon": 8, "num_steps": 1} acts with a single network call.
    """

    Config = ConsistencyConfig
    config: ConsistencyConfig
    levels: Tensor  # [L] ascending noise widths
    widths: Tensor  # [S + 1] descending noise widths at which sampling steps start, then 0

    def __init__(
        self, config: ConsistencyConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        if not (0 < config.sigma_min < config.sigma_max and config.num_levels > config.num_steps >= 1):
            raise UserError(f"0 < sigma_min < sigma_max and 1 <= num_steps < num_levels are expected, given {config}")
        super().__init__(
            config,
            observation_space=observation_space,
            action_space=action_space,
            rng=rng,
            num_steps=config.num_steps,
        )
        # Karras et al. 2022, eq. 5 with rho = 7.
        ends = torch.tensor([config.sigma_min, config.sigma_max], dtype=torch.float64) ** (1 / 7)
        share = torch.linspace(0, 1, config.num_levels, dtype=torch.float64)
        levels = (torch.lerp(ends[0], ends[1], share) ** 7).float()
        self.register_buffer("levels", levels, persistent=False)
        start = torch.linspace(config.num_levels - 1, 0, config.num_steps + 1)[:-1].round().long()
        self.register_buffer("widths", torch.cat([levels[start], torch.zeros(1)]), persistent=False)

    def clean(self, x: Tensor, condition: Tensor, sigma: Tensor) -> Tensor:
        """f(x, sigma) [..., D] for noise widths [...]: the identity at sigma_min (Song et al. 2023, eq. 5)."""
        low, width = self.config.sigma_min, sigma[..., None]
        total = (width.square() + DATA_STD**2).sqrt()
        skip = DATA_STD**2 / ((width - low).square() + DATA_STD**2)
        time = (sigma / low).log() / torch.log(self.levels[-1] / low)
        return skip * x + (width - low) * DATA_STD / total * self.net(x / total, condition, time)

    def step(self, x: Tensor, condition: Tensor, index: Tensor) -> Step:
        """To the clean chunk, then under the noise at which the next step starts (Song et al. 2023, algorithm 1)."""
        sigma, following = self.widths[index], self.widths[index + 1]
        x = torch.where((index == 0)[..., None], x * self.widths[0], x)  # a chain starts with unit noise
        clean = self.codec.clip(self.clean(x, condition, sigma))
        std = (following.square() - self.config.sigma_min**2).clamp_min(self.config.min_std**2).sqrt()
        renoise = (following.square() - self.config.sigma_min**2).clamp_min(0).sqrt()  # part of the sampler
        return Step(clean, std[..., None], clean, renoise[..., None])

    def imitation_loss(
        self,
        observation: Tree,
        action: Tensor,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: what f says at one noise level agrees with what it says at the one below.

        Pseudo-Huber distance weighed by 1 / (difference of widths), levels drawn log-normally, no averaged copy (Song
        and Dhariwal 2023, section 3).
        """
        rng = require_rng(rng)
        data, condition = self.codec.encode(action), self.condition(observation)
        noise = torch.randn(data.shape, generator=rng, device=data.device)
        weight = torch.erf((self.levels.log() + 1.1) / (2**0.5 * 2.0)).diff()  # log sigma: mean -1.1, deviation 2
        level = torch.multinomial(weight, len(data), replacement=True, generator=rng)
        low, high = self.levels[level], self.levels[level + 1]
        ahead = self.clean(data + high[:, None] * noise, condition, high)
        with torch.no_grad():
            target = self.clean(data + low[:, None] * noise, condition, low)
        soft = 0.00054 * self.size**0.5
        apart = (ahead - target).square()
        apart = apart if mask is None else apart * mask
        distance = (apart.sum(-1) + soft**2).sqrt() - soft
        loss = distance / (high - low)
        if self.config.reconstruction:
            loss = loss + self.config.reconstruction * mean_where((ahead - data).square(), mask)
        return loss
