"""What several policies are made of: options and networks of a small actor.

Boundary: no policy; `gaussian`, `residual` and `steering` differ in what the actor's value means. Legend: N
environments, F features, A numbers of an action.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.data import Space
from embodied_rft.networks.encoder import Encoder, Normalize
from embodied_rft.networks.heads import ActorHead
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.policy import require_rng


@dataclass(config=STRICT, kw_only=True)
class NetworkConfig:
    """Options of a small network that reads an observation."""

    hidden: tuple[int, ...] = (256, 256)  # sizes of the hidden layers
    keys: tuple[str, ...] | None = None  # observation keys to read; None: all, sorted
    normalize: Normalize = False  # standardise state vectors: true: with statistics of the first data; running: of all
    num_image_features: int = 64  # per camera
    last_gain: float = 1.0  # gain of the last layer; 0.01 starts near zero
    layer_norm: bool = False  # after every layer
    init: Literal["uniform", "orthogonal"] = "uniform"  # of the weights
    activation: Literal["relu", "tanh"] = "relu"  # between layers


@dataclass(config=STRICT, kw_only=True)
class ActorConfig(NetworkConfig):
    """Options of a small network that outputs a tanh-squashed Gaussian, or a deterministic action."""

    deterministic: bool = False  # a TD3 actor
    exploration_noise: float = 0.1  # standard deviation in [-1, 1] units, deterministic actors only
    std: Literal["state", "free"] = "state"  # log std from the observation, or one parameter per dimension
    squash: Literal["action", "mean"] = "action"  # tanh of what is drawn, or of its mean alone, then clipped (IQL)
    initial_log_std: float = 0.0  # in [-1, 1] units before tanh
    log_std_range: tuple[float, float] = (-5.0, 2.0)  # of the width, natural logarithm

    def __post_init__(self) -> None:
        if self.deterministic:
            refuse_idle(self, ["std", "squash", "initial_log_std", "log_std_range"], "on a deterministic actor")
        else:
            refuse_idle(self, ["exploration_noise"], "on an actor that draws its actions, see deterministic")


def make_encoder(config: NetworkConfig, observation_space: Space, *, rng: torch.Generator) -> Encoder:
    """What reads the observation of a small network."""
    return Encoder(
        observation_space,
        keys=config.keys,
        num_image_features=config.num_image_features,
        normalize=config.normalize,
        rng=rng,
    )


def make_actor(
    config: ActorConfig,
    observation_space: Space,
    *,
    action_dim: int,
    rng: torch.Generator,
    extra: int = 0,
    unit: float = 1.0,
) -> tuple[Encoder, ActorHead]:
    """Encoder and head of a small actor.

    Args:
        config: its options.
        observation_space: what the encoder reads.
        action_dim: A.
        rng: draws the weights.
        extra: numbers that the head reads beside the encoder's features.
        unit: what 1 of the head's output is worth in the units of `exploration_noise`.
    """
    encoder = make_encoder(config, observation_space, rng=rng)
    head = ActorHead(
        encoder.size + extra,
        action_dim,
        hidden=config.hidden,
        noise=config.exploration_noise / unit if config.deterministic else None,
        std=config.std,
        squash=config.squash,
        initial_log_std=config.initial_log_std,
        log_std_range=config.log_std_range,
        last_gain=config.last_gain,
        layer_norm=config.layer_norm,
        init=config.init,
        activation=config.activation,
        rng=rng,
    )
    return encoder, head


def decide(
    head: ActorHead, features: Tensor, *, greedy: bool, rng: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(action in [-1, 1] [N, A], log_prob [N], raw value u [N, A]) from features [N, F]: drawn, or the most likely."""
    if not greedy:
        return head.rsample(features, require_rng(rng))
    u, _ = head(features)
    return head.squash(u), head.log_prob(features, u)[0], u
