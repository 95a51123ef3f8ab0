"""What is made of an episode's rewards before credit: gates, weights of turns, progress. Found by id.

    ppo: {reward_weights: {success: 1.0, env: 0.3}, shaping: [{id: gated, gates: {success: 1.0}}]}

Legend: B decisions, S segments (runs of consecutive decisions of one episode), one after the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field as Option
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.data import Batch
from embodied_rft.learning import returns
from embodied_rft.learning.agent import Agent
from embodied_rft.names import UserError
from embodied_rft.networks.critics import ReturnScale
from embodied_rft.options import STRICT, validate_plugin_config
from embodied_rft.registry import find, kept, register

Stream = Callable[[str], np.ndarray]


class Shaping(ABC):
    """Rewards of decisions to other rewards. Made as `cls(config)`, where `Config` is a dataclass of its options."""

    weights: Mapping[str, float] = {}  # of the reward streams that are mixed; empty: the environment's reward alone

    def use(self, weights: Mapping[str, float] | None) -> None:
        """Take these weights, or refuse a mixture that it cannot work on."""
        self.weights = weights or {}

    @abstractmethod
    def __call__(self, batch: Batch, lengths: list[int], stream: Stream) -> Tensor:
        """Rewards [B].

        Args:
            batch: decisions, segment after segment, with `reward` and `columns`.
            lengths: of each segment.
            stream: one stream of reward by name, [B]; NaN where it is unknown.
        """


def make_shaping(spec: Mapping[str, Any], weights: Mapping[str, float] | None) -> Shaping:
    """The shaping that {"id": "progress", "weight": 2.0} describes, of rewards that are mixed so."""
    options = dict(spec)
    id = str(options.pop("id", ""))
    made = kept(Shaping, find("shaping", id)(validate_plugin_config("shaping", id, options)), f"shaping {id!r}")
    made.use(weights)
    return made


@dataclass(config=STRICT, kw_only=True)
class GatedConfig:
    """Options of shaping `gated`."""

    gates: dict[str, float] = Option(default_factory=lambda: {"success": 1.0})  # {stream: least sum}, highest first


@register("shaping", "gated")
class Gated(Shaping):
    """Gated reward accumulation (Sun et al. 2025, G-RA): streams count only where those above them reach enough.

    The streams of `gates` rank in their order, those of `reward_weights` that are no gate come last. Stream k counts in
    an episode if the sum of every gate above it is at least its threshold there, else it is dropped: what can be farmed
    pays nothing where the long-term reward is missing. Of an episode that goes on, the sum so far decides.
    """

    Config = GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        self.config = config

    def use(self, weights: Mapping[str, float] | None) -> None:
        """Gates must be streams that count, and something must be behind them."""
        super().use(weights)
        for name in self.config.gates:
            if name not in self.weights:
                raise UserError(
                    f"gate {name!r} is no stream of reward_weights ({', '.join(self.weights) or 'none'}): give "
                    "all streams that count with their weights, reward_weights: {success: 1.0, env: 0.3}"
                )
        if not self.config.gates or len(self.weights) < 2:
            raise UserError("gated needs a gate, and a stream of reward_weights that ranks below it")

    def __call__(self, batch: Batch, lengths: list[int], stream: Stream) -> Tensor:
        """See the class."""
        gates = self.config.gates
        ranked = [*gates, *(name for name in self.weights if name not in gates)]
        segment = np.repeat(np.arange(len(lengths)), lengths)
        reward, passed = np.zeros(len(segment)), np.ones(len(lengths), bool)
        for name in ranked:
            paid = stream(name).astype(np.float64)
            reward += np.where(passed[segment], self.weights[name] * paid, 0.0)
            if name in gates:
                passed &= np.bincount(segment, paid, len(lengths)) >= gates[name] - returns.SAME
        return torch.from_numpy(reward.astype(np.float32))


@dataclass(config=STRICT, kw_only=True)
class ProgressConfig:
    """Options of shaping `progress`."""

    weight: float = 1.0  # alpha


@register("shaping", "progress")
class Progress(Shaping):
    """r_t + alpha (r_t - r_{t-1}) from the second turn on (Kumar et al. 2024, SCoRe, section 5.2): correct yourself."""

    Config = ProgressConfig

    def __init__(self, config: ProgressConfig) -> None:
        self.config = config

    def __call__(self, batch: Batch, lengths: list[int], stream: Stream) -> Tensor:
        """See the class."""
        change = batch.reward - batch.reward.roll(1)
        change[torch.from_numpy(np.cumsum(lengths) - lengths)] = 0.0
        return batch.reward + self.config.weight * change


@dataclass(config=STRICT, kw_only=True)
class TurnsConfig:
    """Options of shaping `turns`."""

    weights: tuple[float, ...] = (0.0, 1.0)  # of the rewards of turns 0, 1, ...; later ones have the last weight


@register("shaping", "turns")
class Turns(Shaping):
    """Rewards weighted by their place in the episode: [0, 1] is SCoRe's first phase, only the second try is paid."""

    Config = TurnsConfig

    def __init__(self, config: TurnsConfig) -> None:
        self.config = config
        if not config.weights:
            raise UserError("weights: at least one number is expected, such as [0, 1]")

    def __call__(self, batch: Batch, lengths: list[int], stream: Stream) -> Tensor:
        """See the class."""
        weights = torch.tensor(self.config.weights)
        return batch.reward * weights[torch.from_numpy(batch.columns["step"]).clamp_max(len(weights) - 1)]


def scale_rewards(agent: Agent, buffer: Buffer, batch: Batch, segments: list[np.ndarray], *, gamma: float) -> float:
    """Divide rewards by the running standard deviation of R_t = r_t + gamma R_{t-1} (Engstrom et al. 2020, item 2).

    R goes on where an episode does: it is a note of the decision before. Changes `batch`; what was divided by.
    """
    book = buffer.columns(known := buffer.rows())
    so_far = buffer.note("running_return", known)
    before = {
        (int(episode), int(step) + 1): float(value)
        for episode, step, value in zip(book["episode"], book["step"], so_far, strict=True)
        if not math.isnan(value)
    }
    starts = buffer.columns(np.array([s[0] for s in segments]))
    carried = [before.get((int(e), int(t)), 0.0) for e, t in zip(starts["episode"], starts["step"], strict=True)]
    running = returns.running_returns(batch.reward, [len(s) for s in segments], carried, gamma=gamma)
    buffer.annotate("running_return", np.concatenate(segments), running.numpy())
    scale = agent.part("return_scale", ReturnScale).update(running)
    batch.reward = batch.reward / scale
    return scale
