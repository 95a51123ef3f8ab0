"""`last_steps`: fine-tunes only the last steps of a frozen chunk policy's chain (Ren et al. 2024, DPPO, section 4.3).

The base takes the first S - k steps, a copy of it the last k; only those are units of a decision and only the copy is
trained. Cheaper and steadier than tuning the whole chain. Boundary: how the two chains join; the rest is in `chunks`.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from embodied_rft.agents.parts.chain import ChainPolicy, chain_decisions, require_chain
from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.names import UserError
from embodied_rft.networks.encoder import Encoder
from embodied_rft.options import STRICT
from embodied_rft.policy import Adapter, build_policy, observe, require_rng
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class LastStepsConfig:
    """Options of a `last_steps` agent."""

    base: dict[str, Any]  # spec of a diffusion, flow or consistency policy
    num_steps: int = 10  # k


@register("agent", "last_steps")
class LastStepsPolicy(Adapter):
    """One unit for each of the k tuned steps; the trace holds their part of the chain [k + 1, D].

    Made by `adapt: {with: last_steps}` around a trained policy: base and copy start from its weights.
    """

    Config = LastStepsConfig
    base: ChainPolicy
    stochastic = False
    spec: dict[str, Any]

    def __init__(
        self, config: LastStepsConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        base, tuned = (build_policy(config.base, observation_space, action_space, rng) for _ in range(2))
        if not isinstance(base, ChainPolicy) or not isinstance(tuned, ChainPolicy):
            raise UserError(f"last_steps needs a diffusion, flow or consistency base, given {config.base.get('id')!r}")
        if not 1 <= config.num_steps <= base.num_units:
            raise UserError(f"num_steps {config.num_steps}: the base's chain has {base.num_units} steps")
        super().__init__(base)
        self.tuned = tuned
        self.num_units, self.random_start, self.unit_size = config.num_steps, base.random_start, base.unit_size
        self.first = base.num_units - config.num_steps  # the first tuned step
        self.trace_fields = {"chain": Field((config.num_steps + 1, base.size))}
        self.load_base(tuned)

    def load_base(self, policy: nn.Module) -> None:
        """Take the weights of a trained policy of the base's spec, for the frozen and for the tuned steps."""
        super().load_base(policy)
        self.tuned.load_state_dict(policy.state_dict())

    def make_encoder(self, *, rng: torch.Generator) -> Encoder:
        """What further parts of the agent read as the policy does."""
        return self.tuned.encoder.like(rng)

    def _chain(self, observation: Tree, rng: torch.Generator | None, *, greedy: bool = False) -> tuple[Tensor, Tensor]:
        """(chain [B, k + 1, D], log_prob [B, k]) of the tuned steps."""
        with torch.no_grad():
            condition = self.base.condition(observation)
            x = self.base.noise(len(condition), rng=rng, greedy=greedy)
            if self.first:
                before, _ = self.base.walk(x, condition, steps=range(self.first), rng=rng, greedy=greedy)
                x = before[:, -1]
        steps = range(self.first, self.base.num_units)
        return self.tuned.walk(x, self.tuned.condition(observation), steps=steps, rng=rng, greedy=greedy)

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]; actions are [N, D]."""
        generator = rng if greedy else require_rng(rng)
        chain, log_prob = self._chain(observe(observation, self), generator, greedy=greedy)
        return chain_decisions(self.tuned.codec.decode(chain[:, -1]), chain, log_prob)

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every tuned step, [B, k] each."""
        return self.tuned.score(require_chain(trace), self.tuned.condition(observation), first=self.first)

    def mode(self, observation: Tree) -> Tensor:
        """The greedy chunk [B, D] from the start that is not drawn, differentiable in the tuned steps."""
        return self.tuned.codec.decode(self._chain(observation, None)[0][:, -1])

    def imitation_loss(
        self,
        observation: Tree,
        action: Tensor,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: the tuned copy's imitation loss, which keeps it near data beside reinforcement learning."""
        return self.tuned.imitation_loss(observation, action, rng=rng, mask=mask)
