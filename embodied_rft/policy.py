"""What a policy is: the contract, what some can do beside it, and how one is made by id.

What not every policy can do is a capability, a protocol below; `able(policy, Reparametrised)` asks for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rft import registry
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.data import Batch, Decisions, Field, Space, Tree
from embodied_rft.device import device_of
from embodied_rft.names import UserError, nearest
from embodied_rft.networks.encoder import Encoder, Features
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.networks.trainable import WORDS, LoraOptions, Train, adapters_of, add_adapters, freeze, linear_layers
from embodied_rft.options import validate_plugin_config
from embodied_rft.pools.chunks import Chunk, ChunkPool, Planner, QueuedPool, step_space
from embodied_rft.pools.protocol import Pool
from embodied_rft.pools.spaces import check_action_space
from embodied_rft.pools.splits import Splits
from embodied_rft.tokens.prefix_tree import Usage

Spec = Mapping[str, Any]
C = TypeVar("C")


@registry.contract("agent")
class Policy(nn.Module):
    """Observations to decisions, and their log-probabilities. A class registered as an "agent" derives from it.

    It has a `Config` dataclass and is made as `cls(config, observation_space=..., action_space=..., rng=...)`, where
    the action space is that of one step, also of a policy that gives chunks of them. Actions have the environment's
    units wherever they pass from one part to another. Legend: N environments, B rows, U units.
    """

    Config: type
    spec: dict[str, Any]  # {"id": ..., **options}: `build_policy` makes it again from this
    trace_fields: Mapping[str, Field] = {}
    num_units: int | None = 1  # U; None where it differs from decision to decision
    chunk: Chunk = Chunk()  # what a decision is: how many steps it holds, how many of them are executed

    lacks: frozenset[type] = frozenset()  # capabilities that its class has, but its options take away
    stochastic: bool = True  # whether `rsample` tells the entropy of the action itself (that of a chain does not)
    random_start: bool = False  # greedy decisions draw where they start from, if they are given an rng
    noise_space: Space | None = None  # of what `choose` gives, where it steers a base
    unit_size: int | None = None  # action numbers of a unit; None: there is no such number
    reads_past: bool = False  # observations have a key `data.PAST` for it: the earlier decisions of their episodes
    leaves_out: bool = False  # initial states that it cannot read are left out, not refused
    lora: LoraOptions | None = None  # of its own options
    usage: Usage | None = None  # of a decoder while it scored: how much of what was computed had to be
    own_weights: list[nn.Parameter] | None = None  # those that could be trained when it was made, see `select`

    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...], without gradient, as arrays.

        A greedy answer is repeatable: it needs no rng, and where it takes one, equal generators give equal answers.
        """
        raise NotImplementedError

    def decide(
        self,
        observation: Tree,
        parts: nn.ModuleDict,
        *,
        greedy: bool = False,
        rng: torch.Generator | None = None,
    ) -> Decisions:
        """How the agent acts that has this policy: as `act` says, unless overridden to consult `parts` (a critic)."""
        return self.act(observation, greedy=greedy, rng=rng)

    def log_prob(self, observation: Tree, action: Any, trace: Tree) -> tuple[Tensor, Tensor]:
        """The log-probability of decisions taken earlier and their entropy, [B, U] each, with gradient."""
        raise NotImplementedError

    def make_encoder(self, *, rng: torch.Generator) -> Features | None:
        """What a new part of the agent reads the observation by; by default like the policy's own `encoder`, if any."""
        own = self._modules.get("encoder")
        return own.like(rng) if isinstance(own, Encoder) else None

    def select(self, train: Train, *, lora: LoraOptions, rng: torch.Generator) -> None:
        """Choose what is trained from now on; by default its own weights, or adapters on its own linear layers.

        Its own weights are those that could be trained when it was made (`own_weights`).
        """
        name = self.spec.get("id")
        if self.own_weights is None:
            self.own_weights = [p for p in self.parameters() if p.requires_grad]
        if train not in ("full", "lora", "frozen"):
            raise UserError(f"agent {name!r} has no head that {train!r} could train; possible: full, lora, frozen")
        if train == "lora" and not self.adapters():
            own = {id(p) for p in self.own_weights}
            add_adapters(self, lora, rng, layers={n for n, m in linear_layers(self).items() if id(m.weight) in own})
        self.requires_grad_(False)
        adapters = self.adapters()
        trained = {"full": [*self.own_weights, *adapters], "lora": adapters, "frozen": []}[train]
        for parameter in trained:
            parameter.requires_grad_(True)

    def adapters(self) -> list[nn.Parameter]:
        """The weights of its low-rank adapters."""
        return adapters_of(self)

    @property
    def planner(self) -> Planner | None:
        """Who plans the steps that it sees as the observation "base_action"; None: nobody."""
        return None

    def fit_pool(self, pool: Pool) -> Pool:
        """A pool of single steps as one of its decisions: steps, chunks, or steps along a plan."""
        if isinstance(pool, Splits):
            return pool.fitted(self.fit_pool)
        if self.planner is not None:
            return QueuedPool(pool, self.planner)
        return pool if self.chunk.horizon == 1 else ChunkPool(pool, **vars(self.chunk))


class Adapter(Policy):
    """A policy around a frozen one; its `Config` has a field `base`, the other one's spec.

    Args:
        base: the frozen policy, whose chunks and plans are its own.
    """

    base: Policy

    def __init__(self, base: Policy) -> None:
        super().__init__()
        self.base, self.chunk = freeze(base), base.chunk

    def load_base(self, policy: nn.Module) -> None:
        """Take the weights of a trained policy of the same spec as the frozen base."""
        self.base.load_state_dict(policy.state_dict())
        freeze(self.base)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train, but the base stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def adapters(self) -> list[nn.Parameter]:
        """Without those of the base."""
        frozen = {id(weight) for weight in self.base.parameters()}
        return [weight for weight in adapters_of(self) if id(weight) not in frozen]

    @property
    def planner(self) -> Planner | None:
        """That of the base."""
        return self.base.planner


# --- what some policies can do -------------------------------------------------------------------------------------


@runtime_checkable
class Values(Protocol):
    """A value on the policy's trunk: its loss joins the policy's."""

    def value(self, observation: Tree, trace: Tree) -> Tensor:
        """[B]."""


@runtime_checkable
class UnitValues(Protocol):
    """Likewise, one before each unit."""

    def unit_values(self, observation: Tree, action: Any, trace: Tree) -> Tensor:
        """[B, U]."""


@runtime_checkable
class Reparametrised(Protocol):
    """A random action that gradients pass through."""

    def rsample(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Action [B, A] and its log-probability [B]."""


@runtime_checkable
class Draws(Protocol):
    """Likewise of a policy without entropy."""

    def draw(self, observation: Tree, *, rng: torch.Generator | None = None) -> Tensor:
        """Action [B, A]."""


@runtime_checkable
class HasMode(Protocol):
    """A deterministic action."""

    def mode(self, observation: Tree) -> Tensor:
        """Action [B, A], differentiable."""


@runtime_checkable
class Imitates(Protocol):
    """It can be fitted to given actions."""

    def imitation_loss(
        self,
        observation: Tree,
        action: Any,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]; `trace` is what was sampled, `mask` [B, A] what of a chunk was carried out (None: all of it)."""


@runtime_checkable
class Measures(Protocol):
    """It has statistics of the data beside those of its encoders, of actions for instance."""

    def fit_statistics(self, buffer: Buffer, rows: np.ndarray) -> None:
        """Take them of rows [B]; once."""


@runtime_checkable
class Retraces(Protocol):
    """It knows which trace it would have left on somebody else's decisions."""

    def retrace(self, observation: Tree, action: Any) -> dict[str, Any]:
        """Trace arrays [T, ...] of actions [T], given T + 1 observations."""


@runtime_checkable
class Chooses(Protocol):
    """It has a number for each option of a choice."""

    def logits(self, observation: Tree) -> Tensor:
        """[B, n], or action values."""

    def log_probs(self, observation: Tree) -> list[Tensor]:
        """Of all options of each choice, K times [B, n]."""

    def decisions(self, index: Tensor, log_prob: Tensor) -> Decisions:
        """Of indices and their log-probabilities, [N, K] each."""


@runtime_checkable
class FromNoise(Protocol):
    """Noise decides its action: `steering` can be put around it."""

    def from_noise(self, observation: Tree, noise: Tensor) -> Tensor:
        """Action [B, A] that noise [B, A] becomes, differentiable in the noise."""


@runtime_checkable
class Steered(FromNoise, Protocol):
    """It chooses the noise of a frozen base."""

    def choose(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Noise [B, A] and its log-probability [B], None without entropy."""

    def draw_noise(self, count: int, *, rng: torch.Generator) -> Tensor:
        """The base's own noise [count, A]."""


@runtime_checkable
class Batches(Protocol):
    """It knows what its rows cost together."""

    def micro_batches(self, batch: Batch, most: int) -> list[np.ndarray]:
        """Rows of micro-batches of at most `most` computed units each."""


@runtime_checkable
class Refuses(Protocol):
    """It cannot read every observation."""

    def unreadable(self, observation: Tree) -> dict[int, str]:
        """Rows that it cannot answer, and why."""


def able(policy: Policy, what: type[C]) -> C | None:
    """The policy as something that can do `what`, one of the protocols above; None if it cannot."""
    return policy if what not in policy.lacks and isinstance(policy, what) else None


def require(policy: Policy, what: type[C], otherwise: str = "") -> C:
    """Likewise, or a ValueError that says what to do `otherwise`."""
    if (found := able(policy, what)) is None:
        raise UserError(otherwise or f"policy {type(policy).__name__} is no {what.__name__} (see embodied_rft.policy)")
    return found


def build_policy(spec: Spec, observation_space: Space, action_space: Space, rng: torch.Generator) -> Policy:
    """The policy that {"id": ..., **options} describes, with weights drawn from `rng`."""
    if "id" not in spec:
        raise UserError(f"agent {dict(spec)!r} has no id; known: {', '.join(registry.known('agent'))}")
    options = {k: v for k, v in spec.items() if k not in ("id", "tuned")}
    check_action_space(action_space)
    config = validate_plugin_config("agent", spec["id"], options)
    made = registry.find("agent", spec["id"])
    policy: Policy = made(config, observation_space=observation_space, action_space=step_space(action_space), rng=rng)
    policy.chunk.space(action_space)  # refuses other chunks
    policy.spec = {k: v for k, v in spec.items() if k != "tuned"}
    if "tuned" in spec:
        retune(policy, spec["tuned"], rng=rng)
    return policy


def tune(policy: Policy, train: Train, *, rng: torch.Generator, lora: LoraOptions | None = None) -> None:
    """Train these weights of a policy from now on. A learner has to be made after it.

    May be called again: adapters stay where they are and are frozen or trained with the rest. What was chosen is
    written into the policy's spec, {"tuned": {"train": "lora", "lora": {"rank": 16, ...}}}, which rebuilds it.

    Args:
        policy: built by `build_policy`.
        train: "full" (what is not frozen by construction, as the base of a residual is), "lora" (adapters alone),
            "lora+head", "head", or "frozen".
        rng: draws the weights of new adapters.
        lora: of new adapters; None: those of the policy's own options, else the defaults.

    Raises:
        ValueError: the policy cannot be trained so, or its adapters have other options.
    """
    if train not in WORDS:
        raise UserError(f"a policy cannot be trained {train!r}; {nearest(train, WORDS)}")
    made = policy.spec.get("tuned", {}).get("lora")
    own = policy.lora
    known = LoraOptions(**made) if made else own if policy.adapters() else None
    if lora is not None and known is not None and lora != known:
        raise UserError(f"the policy has adapters with {known} already: leave the options out, or give the same")
    lora = known or lora or own or LoraOptions()
    policy.select(train, lora=lora, rng=rng)
    kept = dataclasses.asdict(lora) if policy.adapters() else None
    policy.spec = {**policy.spec, "tuned": {"train": train, "lora": kept}}


def retune(policy: Policy, tuned: Mapping[str, Any], *, rng: torch.Generator) -> None:
    """What `tune` wrote into a spec, done again to a policy that was built from it."""
    if tuned["lora"] is not None:
        tune(policy, "lora", lora=LoraOptions(**tuned["lora"]), rng=rng)
    tune(policy, tuned["train"], rng=rng)


def require_rng(rng: torch.Generator | None) -> torch.Generator:
    """The generator, or a ValueError: randomness never comes from the global one."""
    if rng is None:
        raise UserError("a random decision needs rng=torch.Generator(...); pass one, or greedy=True")
    return rng


def observe(tree: Tree, policy: nn.Module) -> dict[str, Any]:
    """Observation arrays [N, ...] as tensors on the policy's device; texts stay what they are."""
    return {**tree, **as_tensors(tree, device_of(policy))}
