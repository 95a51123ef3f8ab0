"""`diffusion`: an action-chunk policy that denoises (Ho et al. 2020, DDPM; Chi et al. 2023), fine-tuned as in DPPO.

DDPM and DDIM are one formula: `eta: 1` on all steps is DDPM's posterior, `ddim_steps` skips steps, `eta: 0` has no
noise but `min_std`. Boundary: the schedule, the step and the imitation loss; the rest is in `chunks`.

Legend: B rows, D numbers of a chunk, K denoising steps in training, S sampling steps.
"""

from __future__ import annotations

import math
from typing import Literal

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


@dataclass(config=STRICT, kw_only=True)
class DiffusionConfig(ChunkConfig):
    """Options of a `diffusion` agent."""

    denoising_steps: int = 20  # K
    ddim_steps: int | None = None  # S; None: all K
    eta: float = 1.0  # noise of a sampling step relative to DDPM's posterior, in [0, 1]
    prediction: Literal["epsilon", "x0"] = "epsilon"  # what the network predicts: the noise, or the chunk


@register("agent", "diffusion")
class DiffusionPolicy(ChainPolicy):
    """One unit for each of the S sampling steps.

    Example: {"id": "diffusion", "horizon": 8, "execute": 4, "denoising_steps": 20, "ddim_steps": 10}.
    """

    Config = DiffusionConfig
    config: DiffusionConfig
    kept: Tensor  # [K] share of the signal's variance that is left after each noising step
    times: Tensor  # [S] int64, descending

    def __init__(
        self, config: DiffusionConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        count = config.denoising_steps if config.ddim_steps is None else config.ddim_steps
        if not (1 <= count <= config.denoising_steps and 0 <= config.eta <= 1):
            raise UserError(f"1 <= ddim_steps <= denoising_steps and eta in [0, 1] are expected, given {config}")
        if count == 1 and config.prediction == "epsilon":
            raise UserError(
                "a chain of one step starts from pure noise, of which predicted noise leaves nothing: the chunk is "
                "always clipped, and nothing can be learned. Take two steps or more, or prediction: x0"
            )
        super().__init__(
            config, observation_space=observation_space, action_space=action_space, rng=rng, num_steps=count
        )
        self.register_buffer("kept", cosine_schedule(config.denoising_steps), persistent=False)
        times = torch.linspace(config.denoising_steps - 1, 0, count).round().long()
        self.register_buffer("times", times, persistent=False)

    def step(self, x: Tensor, condition: Tensor, index: Tensor) -> Step:
        """x_t to the next kept time (Song et al. 2020, DDIM, eq. 12 and 16), with at least `min_std` noise (DPPO)."""
        time = self.times[index]
        kept = self.kept[time][..., None]
        following = torch.where(index + 1 < len(self.times), self.times.roll(-1)[index], -1)
        kept_next = torch.where(following >= 0, self.kept[following.clamp_min(0)], 1.0)[..., None]
        clean = self._clean(self._predict(x, condition, time), x, kept)
        # The noise that belongs to the clipped chunk, so that clipping does not push x off the chain.
        noise = (x - kept.sqrt() * clean) / (1 - kept).sqrt()
        sigma = self.config.eta * ((1 - kept_next) / (1 - kept) * (1 - kept / kept_next)).clamp_min(0).sqrt()
        mean = kept_next.sqrt() * clean + (1 - kept_next - sigma.square()).clamp_min(0).sqrt() * noise
        quiet = kept_next.sqrt() * clean + (1 - kept_next).sqrt() * noise
        return Step(mean, sigma.clamp_min(self.config.min_std), quiet)

    def _predict(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        return self.net(x, condition, (time + 1) / self.config.denoising_steps)

    def _clean(self, prediction: Tensor, x: Tensor, kept: Tensor) -> Tensor:
        """The chunk that the network sees in x, within the data's range."""
        if self.config.prediction == "epsilon":
            prediction = (x - (1 - kept).sqrt() * prediction) / kept.sqrt()
        return self.codec.clip(prediction)

    def imitation_loss(
        self,
        observation: Tree,
        action: Tensor,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: squared error of the predicted noise (or chunk) at a random time (DDPM, eq. 14)."""
        rng = require_rng(rng)
        clean = self.codec.encode(action)
        time = torch.randint(self.config.denoising_steps, (len(clean),), generator=rng, device=clean.device)
        noise = torch.randn(clean.shape, generator=rng, device=clean.device)
        kept = self.kept[time][:, None]
        x = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        target = noise if self.config.prediction == "epsilon" else clean
        error = (self._predict(x, self.condition(observation), time) - target).square()
        return mean_where(error, mask)


def cosine_schedule(num_steps: int) -> Tensor:
    """[K]: cumulated share of signal variance (Nichol and Dhariwal 2021, eq. 17; betas at most 0.999)."""

    def level(t: Tensor) -> Tensor:
        return torch.cos((t / num_steps + 0.008) / 1.008 * math.pi / 2).square()

    t = torch.arange(num_steps + 1, dtype=torch.float64)
    beta = (1 - level(t[1:]) / level(t[:-1])).clamp_max(0.999)
    return (1 - beta).cumprod(0).float()
