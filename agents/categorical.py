"""`categorical`: a small network that chooses: Discrete, MultiDiscrete and MultiBinary actions, from state or pixels.

Its outputs are logits for `ppo` and its presets, `bc`, `iql` and `discrete_sac`, and action values for `dqn`, whose
greedy choice is the same. It knows no loss but imitation. Legend: N environments, B rows, K choices of a decision,
L numbers of all choices together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from embodied_rft.agents.parts.actor import NetworkConfig, make_encoder
from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.names import UserError
from embodied_rft.networks.mlp import MLP
from embodied_rft.options import STRICT
from embodied_rft.policy import Policy, observe, require_rng
from embodied_rft.pools.spaces import DISCRETE, Choices, what_suits
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class CategoricalConfig(NetworkConfig):
    """Options of a `categorical` agent; `last_gain: 0.01` suits on-policy learning from scratch."""

    dueling: bool = False  # outputs are a value plus advantages of mean 0, for dqn (Wang et al. 2016, eq. 9)


@register("agent", "categorical")
class CategoricalPolicy(Policy):
    """One unit for each choice of a decision: U is 1 for Discrete, K for MultiDiscrete and MultiBinary.

    Choices are independent given the observation. The importance ratio of PPO is then that of each choice;
    `ratio: decision` takes their product, as stable-baselines3 does. See docs/architecture.md for the methods.
    """

    Config = CategoricalConfig
    trace_fields: dict[str, Field] = {}  # noqa: RUF012  the action says it all
    spec: dict[str, Any]

    def __init__(
        self, config: CategoricalConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        if not isinstance(action_space, DISCRETE):
            raise UserError(f"action space {action_space} holds no choices. {what_suits(action_space)}")
        self.config = config
        self.choices = Choices(action_space)
        self.sizes = self.choices.sizes
        self.num_units = len(self.sizes)
        if config.dueling and self.num_units > 1:
            raise UserError(f"dueling splits the values of one choice, {action_space} has {self.num_units}")
        self.encoder = make_encoder(config, observation_space, rng=rng)
        self.net = MLP(
            self.encoder.size,
            config.hidden,
            sum(self.sizes) + config.dueling,
            rng=rng,
            last_gain=config.last_gain,
            layer_norm=config.layer_norm,
            init=config.init,
            activation=config.activation,
        )

    def logits(self, observation: Tree) -> Tensor:
        """What the network says [B, L]: logits of all choices side by side, or action values."""
        out = self.net(self.encoder(observation)).float()
        if not self.config.dueling:
            return out
        value, advantage = out[:, :1], out[:, 1:]
        return value + advantage - advantage.mean(-1, keepdim=True)

    def log_probs(self, observation: Tree) -> list[Tensor]:
        """Log-probabilities of all options of each choice, K times [B, size]."""
        return [F.log_softmax(part, -1) for part in self.logits(observation).split(self.sizes, -1)]

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]; actions are [N, ...] integers as the environment counts them."""
        parts = self.log_probs(observe(observation, self))
        if greedy or not parts[0].shape[0]:
            index = torch.stack([part.argmax(-1) for part in parts], -1)
        else:
            generator = require_rng(rng)
            index = torch.cat([torch.multinomial(part.exp(), 1, generator=generator) for part in parts], -1)
        return self.decisions(index, _chosen(parts, index))

    def decisions(self, index: Tensor, log_prob: Tensor) -> Decisions:
        """Decisions of arrays from indices and their log-probabilities, [N, K] each."""
        action = self.choices.action(index).cpu().numpy().astype(self.choices.dtype)
        return Decisions(action, log_prob.cpu().numpy())

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each choice, [B, K] each."""
        parts = self.log_probs(observation)
        entropy = torch.stack([-(part.exp() * part).sum(-1) for part in parts], -1)
        return _chosen(parts, self.choices.index(action)), entropy

    def mode(self, observation: Tree) -> Tensor:
        """The likeliest action [B, ...], integers."""
        parts = self.logits(observation).split(self.sizes, -1)
        return self.choices.action(torch.stack([part.argmax(-1) for part in parts], -1))

    def imitation_loss(
        self,
        observation: Tree,
        action: Tensor,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: negative log-likelihood of `action`."""
        return -_chosen(self.log_probs(observation), self.choices.index(action)).sum(-1)

    @torch.no_grad()
    def retrace(self, observation: Tree, action: np.ndarray) -> dict[str, np.ndarray]:
        """Nothing: there is no trace."""
        return {}


def _chosen(parts: list[Tensor], index: Tensor) -> Tensor:
    """Of K log-probabilities [B, size] those at index [B, K]: [B, K]."""
    return torch.cat([part.gather(-1, index[:, k : k + 1]) for k, part in enumerate(parts)], -1)
