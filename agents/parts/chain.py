"""What the generative action-chunk policies share: options, network, and a policy that is a chain of Gaussian steps.

A chunk is drawn by S steps from noise to data, x_0 -> x_1 -> ... -> x_S; each step is Gaussian, so each has an exact
log-probability: a decision has U = S units (Black et al. 2023, DDPO; Ren et al. 2024, DPPO, section 4). `diffusion`,
`flow` and `consistency` differ in the step and in the imitation loss alone. Boundary: no environment, no objective.

Legend: N environments, B rows, H horizon (steps of a chunk), A action dimensions, D = H * A, S sampling steps,
F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from embodied_rft.agents.parts.normalisation import Statistics
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.names import UserError
from embodied_rft.networks import critics
from embodied_rft.networks.encoder import Encoder, Normalize
from embodied_rft.options import STRICT
from embodied_rft.policy import Policy, observe, require_rng
from embodied_rft.pools.chunks import Chunk
from embodied_rft.pools.spaces import ActionScale, what_suits

Scaling = Literal["bounds", "min_max", "quantile", "mean_std"]


@dataclass(config=STRICT, kw_only=True)
class ChunkConfig:
    """Options of every generative chunk policy."""

    horizon: int = 1  # H, environment steps that a chunk holds
    execute: int | None = None  # how many of them are executed before the next decision; None: all
    width: int = 256  # of the network
    num_blocks: int = 2  # residual blocks of the network
    keys: tuple[str, ...] | None = None  # observation keys to read; None: all state vectors and images, sorted
    normalize: Normalize = False  # standardise state vectors: true: with statistics of the first data; running: of all
    num_image_features: int = 64  # per camera
    statistics: Scaling = "bounds"  # what actions are scaled by
    min_std: float = 0.1  # smallest standard deviation of a sampling step, in normalised units (DPPO, section 4.3)
    greedy_start: Literal["random", "zero", "fixed"] = "random"  # start of greedy chains: drawn, zero, or one draw kept


class Step(NamedTuple):
    """One sampling step from x: a Gaussian around `mean`; greedy decisions take `quiet` instead."""

    mean: Tensor  # [..., D]
    std: Tensor  # [..., D], or broadcastable
    quiet: Tensor  # [..., D]
    renoise: Tensor | None = None  # [..., D] width of noise that belongs to the sampler: greedy decisions add it, too


class Codec(nn.Module):
    """Action chunks [..., D] in the environment's units to normalised ones and back.

    Every action of the data comes back as it was: `decode(encode(action))` equals it, however rare it is.

    Args:
        space: of one step, a Box of shape (A,).
        horizon: H.
        statistics: their kind, or "bounds": those of the space.
        layout: JSON that identifies the robot, for `Statistics`.
        unit: normalised numbers fill [-1, 1] and no more, for what cuts that into bins.
    """

    def __init__(
        self, space: Space, horizon: int, statistics: Scaling, *, layout: dict[str, Any], unit: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise UserError(f"action space {space}: a Box of shape (A,) is expected. {what_suits(space)}")
        self.action_dim, self.horizon = space.shape[0], horizon
        self.bounds = ActionScale(space) if space.is_bounded() else None
        self.statistics: Statistics | None = None
        self.unit = unit
        if statistics != "bounds":
            layout = layout | {"low": space.low.tolist(), "high": space.high.tolist()}
            self.statistics = Statistics({"action": self.action_dim}, kind=statistics, layout=layout)
        elif self.bounds is None:
            raise UserError(f"action space {space} is unbounded: set statistics to min_max, quantile or mean_std")

    def encode(self, action: Tensor) -> Tensor:
        """[B, D] in the environment's units -> normalised.

        Raises:
            ValueError: the chunk has another length.
        """
        size = self.horizon * self.action_dim
        if action.shape[-1] != size:
            raise UserError(
                f"action chunks have {action.shape[-1]} numbers; this policy predicts horizon {self.horizon} x "
                f"{self.action_dim} = {size}. Cut the data with chunk_trajectories(horizon={self.horizon})."
            )
        steps = action.unflatten(-1, (self.horizon, self.action_dim))
        if self.statistics is None:
            assert self.bounds is not None
            return self.bounds.from_env(steps).flatten(-2)
        steps = self.statistics.normalise("action", steps)
        if self.unit:
            middle, half = self._ends(self.statistics)
            steps = (steps - middle) / half
        return steps.flatten(-2)

    def clip(self, chunk: Tensor) -> Tensor:
        """Normalised [..., D] within what the data reaches; beyond it a chunk is none of the data's."""
        if self.statistics is None or self.unit:
            return chunk.clamp(-1, 1)
        return self.statistics.clip("action", chunk.unflatten(-1, (self.horizon, self.action_dim))).flatten(-2)

    def decode(self, chunk: Tensor) -> Tensor:
        """Normalised [B, D] -> the environment's units, within the bounds."""
        steps = self.clip(chunk).unflatten(-1, (self.horizon, self.action_dim))
        if self.statistics is None:
            assert self.bounds is not None
            return self.bounds.to_env(steps).flatten(-2)
        if self.unit:
            middle, half = self._ends(self.statistics)
            steps = self.statistics.clip("action", torch.addcmul(middle, steps, half))
        steps = self.statistics.denormalise("action", steps)
        return (steps if self.bounds is None else self.bounds.clip(steps)).flatten(-2)

    @staticmethod
    def _ends(statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Middle and half the width [A] of what the data reaches, after normalisation."""
        low, high = (statistics.get_buffer(f"{part}/action") for part in ("low", "high"))
        half = (high - low) / 2
        return (high + low) / 2, torch.where(half == 0, 1.0, half)

    def fit(self, buffer: Buffer, rows: np.ndarray, *, limit: int = 20_000) -> None:
        """Take the statistics of actions, once: the extremes of all rows, the rest of at most about `limit` of them."""
        if self.statistics is None or bool(self.statistics.fitted):
            return
        if len(rows) == 0:
            raise UserError("there is no data to take statistics of: fill the buffer with demonstrations first")
        ends, spread = [], []
        step = max(1, len(rows) // limit)
        for start in range(0, len(rows), step * 4096):
            action = np.asarray(buffer.column("action/", rows[start : start + step * 4096]))
            action = action.reshape(-1, self.horizon, self.action_dim)
            ends += [action.min((0, 1)), action.max((0, 1))]
            spread.append(action[::step])
        data = torch.from_numpy(np.concatenate(spread))
        self.statistics.fit({"action": data}, extremes={"action": torch.from_numpy(np.stack(ends))})


class Coded:
    """A policy whose chunks go through a `Codec`, which has the statistics of the data."""

    codec: Codec

    def fit_statistics(self, buffer: Buffer, rows: np.ndarray | None = None) -> None:
        """Take the statistics of actions; once."""
        self.codec.fit(buffer, buffer.rows() if rows is None else rows)


class ChunkNetwork(nn.Module):
    """(x [..., D], condition [..., width], time [...]) -> [..., outputs]: a residual MLP with sinusoidal time features.

    The observation enters once a decision (`condition`), not once a sampling step.
    """

    frequencies: Tensor

    def __init__(
        self, in_features: int, size: int, outputs: int, *, width: int, num_blocks: int, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 3, 16) * math.pi / 2, persistent=False)
        self.observe = critics.linear(in_features, width, rng=rng)
        self.chunk = critics.linear(size, width, rng=rng)
        self.time = critics.linear(2 * len(self.frequencies), width, rng=rng)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.SiLU(),
                critics.linear(width, width, rng=rng),
                nn.SiLU(),
                critics.linear(width, width, rng=rng, gain=0.5),
            )
            for _ in range(num_blocks)
        )
        self.last = critics.linear(width, outputs, rng=rng)

    def condition(self, features: Tensor) -> Tensor:
        """Observation features [B, F] -> [B, width]."""
        return self.observe(features)

    def features(self, time: Tensor) -> Tensor:
        """Sines and cosines [..., 32] of time [...]."""
        angle = time[..., None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], -1)

    def forward(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        """Time in [0, 1]; leading dimensions broadcast."""
        hidden = self.chunk(x) + condition + self.time(self.features(time))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(F.silu(hidden)).float()


class ChainPolicy(Coded, Policy):
    """A policy whose decision is a chain of S Gaussian steps; see docs/architecture.md for the methods.

    The trace holds the chain [S + 1, D] in normalised units, from noise to chunk; given it, the log-probability of
    every step is computed in one pass: that of the numbers that are executed, as in DPPO's code. The chunk that is
    executed is the last element, clipped. Actor-critic objectives are told that it has no entropy of its own
    (`stochastic` is False); `rsample` has gradients through the whole chain.

    Greedy decisions take quiet steps, from a start that is drawn (as DPPO and DSRL evaluate) unless `greedy_start` says
    otherwise or there is no rng to draw it with; `mode` is the one from the start that is not drawn.
    """

    stochastic = False
    config: ChunkConfig
    num_units: int
    unit_size: int
    spec: dict[str, Any]
    start: Tensor  # [D], the noise of greedy decisions that draw none

    def __init__(
        self,
        config: ChunkConfig,
        *,
        observation_space: Space,
        action_space: Space,
        rng: torch.Generator,
        num_steps: int,
    ) -> None:
        super().__init__()
        if min(num_steps, config.num_blocks) < 1 or config.min_std <= 0:
            raise UserError(f"steps, num_blocks >= 1 and min_std > 0 are expected, given {config}")
        self.config, self.chunk = config, Chunk.of(config.horizon, config.execute)
        self.encoder = Encoder(
            observation_space,
            keys=config.keys,
            num_image_features=config.num_image_features,
            normalize=config.normalize,
            rng=rng,
        )
        reads = {"state": self.encoder.state_keys, "images": self.encoder.image_keys, "size": self.encoder.size}
        self.codec = Codec(action_space, config.horizon, config.statistics, layout=reads)
        self.size = self.codec.action_dim * config.horizon
        self.net = ChunkNetwork(
            self.encoder.size,
            self.size,
            self.size,
            width=config.width,
            num_blocks=config.num_blocks,
            rng=rng,
        )
        fixed = torch.randn(self.size, generator=rng)
        self.register_buffer("start", fixed if config.greedy_start == "fixed" else torch.zeros(self.size))
        self.random_start = config.greedy_start == "random"
        self.unit_size = self.chunk.execute * self.codec.action_dim  # numbers that are scored: others earn nothing
        self.num_units = num_steps
        self.trace_fields = {"chain": Field((num_steps + 1, self.size))}

    # --- what the kinds of chain differ in -----------------------------------------------------------------------

    def step(self, x: Tensor, condition: Tensor, index: Tensor) -> Step:
        """Sampling step number `index` (int64, broadcast against the leading dimensions of x) from x [..., D]."""
        raise NotImplementedError

    def imitation_loss(
        self,
        observation: Tree,
        action: Tensor,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: the loss that fits the chain to chunks [B, D] of data, where `mask` [B, D] (None: everywhere)."""
        raise NotImplementedError

    # --- the chain -----------------------------------------------------------------------------------------------

    def condition(self, observation: Tree) -> Tensor:
        """A tree of tensors [B, ...] -> [B, width]."""
        return self.net.condition(self.encoder(observation))

    def walk(
        self,
        x: Tensor,
        condition: Tensor,
        *,
        steps: Sequence[int],
        rng: torch.Generator | None,
        greedy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Take the given steps from x [B, D]; quietly if greedy or without rng.

        Returns:
            (chain [B, len(steps) + 1, D], log_prob [B, len(steps)]).
        """
        chain, log_probs = [x], []
        for index in steps:
            mean, std, quiet, renoise = self.step(x, condition, torch.tensor(index, device=x.device))
            if rng is None or (greedy and renoise is None):
                x = quiet
            else:
                centre, width = (quiet, renoise) if greedy and renoise is not None else (mean, std)
                x = centre + width * torch.randn(mean.shape, generator=rng, device=mean.device)
            chain.append(x)
            log_probs.append(gaussian_log_prob(x, mean, std, first=self.unit_size))
        return torch.stack(chain, 1), torch.stack(log_probs, 1)

    def score(self, chain: Tensor, condition: Tensor, *, first: int) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [B, n] of the n steps of chain [B, n + 1, D], which begin at step `first`."""
        count = chain.shape[1] - 1
        index = torch.arange(first, first + count, device=chain.device)
        mean, std, *_ = self.step(chain[:, :-1], condition[:, None], index)
        return gaussian_log_prob(chain[:, 1:], mean, std, first=self.unit_size), entropy_of(mean, std, self.unit_size)

    def noise(self, count: int, *, rng: torch.Generator | None, greedy: bool = False) -> Tensor:
        """Where `count` chains start [count, D]: drawn, or the one of greedy decisions that draw none."""
        if rng is None or (greedy and not self.random_start):
            return self.start.expand(count, -1)
        return torch.randn((count, self.size), generator=rng, device=self.start.device)

    # --- the methods of a policy ---------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]; actions are [N, D]."""
        generator = rng if greedy else require_rng(rng)
        condition = self.condition(observe(observation, self))
        start = self.noise(len(condition), rng=generator, greedy=greedy)
        chain, log_prob = self.walk(start, condition, steps=range(self.num_units), rng=generator, greedy=greedy)
        return chain_decisions(self.codec.decode(chain[:, -1]), chain, log_prob)

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every step, [B, S] each.

        Raises:
            ValueError: there is no chain in the trace; an action alone does not tell how it came about.
        """
        return self.score(require_chain(trace), self.condition(observation), first=0)

    def from_noise(self, observation: Tree, noise: Tensor) -> Tensor:
        """The chunk [B, D] that noise [B, D] becomes without further noise; differentiable in the noise."""
        chain, _ = self.walk(noise, self.condition(observation), steps=range(self.num_units), rng=None)
        return self.codec.decode(chain[:, -1])

    def mode(self, observation: Tree) -> Tensor:
        """The greedy chunk [B, D] from the start that is not drawn, differentiable."""
        condition = self.condition(observation)
        chain, _ = self.walk(self.noise(len(condition), rng=None), condition, steps=range(self.num_units), rng=None)
        return self.codec.decode(chain[:, -1])

    def rsample(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """A reparametrised chunk [B, D] and the log-probability [B] of its chain."""
        condition = self.condition(observation)
        start = self.noise(len(condition), rng=require_rng(rng))
        chain, log_prob = self.walk(start, condition, steps=range(self.num_units), rng=rng)
        return self.codec.decode(chain[:, -1]), log_prob.sum(-1)

    def draw(self, observation: Tree, *, rng: torch.Generator | None = None) -> Tensor:
        """A reparametrised chunk [B, D] as `act` draws it: for objectives that need no log-probability."""
        return self.rsample(observation, rng=rng)[0]


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor, *, first: int | None = None) -> Tensor:
    """Log-density [...] of the first numbers (None: all) of x [..., D] under independent Gaussians; std broadcasts."""
    each = -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return each[..., :first].sum(-1)


def entropy_of(mean: Tensor, std: Tensor, first: int) -> Tensor:
    """Entropy [...] of the first numbers of independent Gaussians [..., D]; std broadcasts."""
    return std.log().expand_as(mean)[..., :first].sum(-1) + 0.5 * first * math.log(2 * math.pi * math.e)


def flow_step(x: Tensor, velocity: Tensor, time: Tensor, *, num_steps: int, level: float, min_std: float) -> Step:
    """An Euler step of length 1 / S along a flow, and its noisy form (Liu et al. 2025, Flow-GRPO, section 4.2).

    The score is -(x - t v) / (1 - t); with noise of width g(t) = level * (1 - t) the drift g^2 / 2 * score is finite.

    Args:
        x: [..., D].
        velocity: at x and time, [..., D].
        time: [...] in [0, 1), from noise to data.
        num_steps: S.
        level: of the noise; its width in a step is level * (1 - t) / sqrt(S), at least `min_std`.
        min_std: in normalised units.
    """
    time = time[..., None]
    quiet = x + velocity / num_steps
    mean = quiet - 0.5 * level**2 * (1 - time) * (x - time * velocity) / num_steps
    return Step(mean, (level * (1 - time) / math.sqrt(num_steps)).clamp_min(min_std), quiet)


def flow_target(data: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x [B, D], time [B], velocity [B, D]) on straight lines from noise to data (Liu et al. 2022, eq. 1)."""
    noise = torch.randn(data.shape, generator=rng, device=data.device)
    time = torch.rand(len(data), generator=rng, device=data.device)
    return torch.lerp(noise, data, time[:, None]), time, data - noise


def chain_decisions(action: Tensor, chain: Tensor, log_prob: Tensor) -> Decisions:
    """Decisions of arrays from action [N, D], chain [N, n + 1, D] and log_prob [N, n]."""
    return Decisions(action.cpu().numpy(), log_prob.cpu().numpy(), {"chain": chain.cpu().numpy()})


def require_chain(trace: Tree) -> Tensor:
    """The chain of a trace, or a ValueError that says what to do."""
    if "chain" not in trace:
        raise UserError(
            "the log-probability of a chunk policy needs its chain: take decisions with act(), and imitate other data "
            "with bc"
        )
    return trace["chain"]
