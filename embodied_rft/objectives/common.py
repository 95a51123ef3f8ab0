"""What several objectives share: presets, imitation, returns of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints

import numpy as np
import torch
from pydantic import Field as Option
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Share
from embodied_rft.data import MARK, Batch, Ragged, Tree
from embodied_rft.learning import losses
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.learner import to_device
from embodied_rft.learning.returns import monte_carlo, pad_segments
from embodied_rft.names import UserError, nearest
from embodied_rft.networks.critics import Critic, Temperature
from embodied_rft.options import STRICT, Dataclass, refuse_idle
from embodied_rft.policy import Imitates, Policy, require
from embodied_rft.pools.chunks import ChunkBox
from embodied_rft.registry import register

T = TypeVar("T", bound=type)


def preset(id: str, **defaults: Any) -> Callable[[T], T]:
    """Decorator: register an objective that differs from its base class by these defaults (and by what it overrides).

    `@preset("td3", policy_delay=2) class TD3(SAC)` takes every option of `sac`; one of them starts elsewhere.
    """

    def decorate(cls: T) -> T:
        base = cls.Config  # type: ignore[attr-defined]
        hints = get_type_hints(base, include_extras=True)
        for name in defaults:
            if name not in hints:
                raise UserError(f"{base.__name__} has no option {name!r}; {nearest(name, hints)}")
        fields = [(name, hints[name], value) for name, value in defaults.items()]
        made = make_dataclass(f"{cls.__name__}Config", fields, bases=(base,), kw_only=True)
        made.__doc__ = f"Options of `{id}`."
        cls.Config = dataclass(config=STRICT, kw_only=True)(made)  # type: ignore[attr-defined]
        cls.id = id  # type: ignore[attr-defined]
        return register("objective", id)(cls)

    return decorate


@dataclass(config=STRICT, kw_only=True, frozen=True)
class UnitWeights:
    """What units count in the log-probability of a decision, by their mark; 0 masks them."""

    thought: Annotated[float, Option(ge=0)] = 1.0  # mark 0
    action: Annotated[float, Option(ge=0)] = 1.0  # mark 1


def unit_weights(mask: Tensor, trace: Tree, weights: UnitWeights | None) -> Tensor | None:
    """[B, U]: the weight of each unit in the log-probability of its decision (Zhai et al. 2024, RL4VLM, eq. 4).

    log pi(reply) = thought * sum of log pi(thought tokens) + action * sum of log pi(action tokens). None: all are 1.
    """
    if weights is None:
        return None
    mark = torch.from_numpy(trace[MARK].pad()[0]).to(mask.device)
    return torch.where(mark == 1, weights.action, weights.thought)


class Weighs(Dataclass, Protocol):
    """Options with weights of units."""

    unit_weights: UnitWeights | None


def refuse_unmarked(policy: Policy, config: Weighs) -> None:
    """Refuse weights of units on a policy that does not mark them."""
    if MARK not in policy.trace_fields:
        refuse_idle(config, ["unit_weights"], "on this policy, whose units have no marks")


@dataclass(config=STRICT, kw_only=True)
class CriticOptions:
    """Of objectives that learn a critic; None keeps what an existing one has."""

    tau: Share = 0.005  # how far the target critic moves towards the critic
    num_critics: int | None = None  # a new critic has 2
    critic_hidden: tuple[int, ...] | None = None  # a new critic has (256, 256)
    critic_layer_norm: bool | None = None  # a new critic has none
    warm_start: bool = True  # keep a critic that an earlier stage trained


def critic_on_value(agent: Agent, batch: Batch, following: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss (Q(o, a) - r - gamma V(o'))^2, summed over its members, with `following` [B] for V(o')."""
    target = losses.td_target(batch.reward, batch.discount, following)
    q = agent.part("critic", Critic)(batch.observation, batch.action)
    loss = losses.squared_error(q, target).sum() / batch.num_decisions
    return loss, {"critic/loss": loss.detach(), "critic/q_mean": q.detach().mean()}


def ensure_critic(agent: Agent, config: CriticOptions, kind: str = "critic", **options: Any) -> None:
    """The part "critic" and its target; those that exist are kept unless `warm_start` is off."""
    size = {"hidden": config.critic_hidden, "num_members": config.num_critics, "layer_norm": config.critic_layer_norm}
    agent.ensure("critic", kind, fresh=not config.warm_start, **size, **options)
    agent.ensure_target("critic", fresh=not config.warm_start)


def ensure_temperature(agent: Agent, *, initial: float, fresh: bool) -> None:
    """The part "temperature"; one that exists keeps its value unless it is to be `fresh`."""
    kept = "temperature" in agent.parts and not fresh
    agent.ensure("temperature", "temperature", fresh=fresh, initial=None if kept else initial)


def imitation(agent: Agent, batch: Batch, rng: torch.Generator) -> Tensor:
    """[B]: the policy's `imitation_loss`.

    It gets the stored trace (what was sampled is trained), and what of a chunk was carried out.
    """
    space = agent.spaces.action
    mask = carried_out(batch, space.horizon) if isinstance(space, ChunkBox) else None
    mask = None if mask is None else mask.to(agent.device)
    policy = require(agent.policy, Imitates)
    return policy.imitation_loss(batch.observation, batch.action, rng=rng, trace=batch.trace, mask=mask)


def temperature_of(agent: Agent) -> Tensor:
    """The entropy weight, a scalar without gradient."""
    return agent.part("temperature", Temperature).alpha


def carried_out(batch: Batch, horizon: int) -> Tensor | None:
    """[B, D] bool: which numbers of chunks of H steps somebody carried out; None: all of them.

    The others, behind the end of an episode or behind the steps that are executed of a chunk, nobody has seen the
    consequence of: they are not imitated.
    """
    span = batch.columns.get("span")
    if horizon == 1 or span is None or ((span < 0) | (span >= horizon)).all():
        return None
    span = np.where(span < 0, horizon, span)
    steps = torch.from_numpy(np.arange(horizon)[None, :] < span[:, None])
    return steps.repeat_interleave(batch.action.shape[1] // horizon, 1)


def annotate_returns(
    buffer: Buffer, rows: np.ndarray, *, gamma: float, reward_weights: dict[str, float] | None = None
) -> dict[str, float]:
    """Write the note "mc_return": the discounted return of each decision, a floor for its value.

    The rule of Cal-QL's authors: of an episode that was stopped, not terminated, and has seen nothing but one negative
    reward (it failed all along), that reward goes on for ever, r / (1 - gamma); of every other one, the discounted sum
    of what was received. Not known, NaN, while an episode runs or where it was cut, and of such failures if gamma is 1.
    """
    segments = buffer.segments(rows)
    if not segments:
        return {}
    order = np.concatenate(segments)
    batch = buffer.batch(order, gamma=gamma, reward_weights=reward_weights, next_observation=False)
    index, mask = (torch.from_numpy(a) for a in pad_segments([len(s) for s in segments]))
    reward, ends = batch.reward[index], buffer.ends([s[-1] for s in segments])
    returns = monte_carlo(reward, batch.discount[index], mask, reward.new_zeros(len(segments)))
    first = reward[:, :1]
    failed = (
        ((reward == first) | ~mask).all(1, keepdim=True) & (first < 0) & torch.from_numpy(ends == "truncated")[:, None]
    )
    forever = first / (1 - gamma) if gamma < 1 else torch.full_like(first, torch.nan)
    returns = torch.where(failed, forever, returns)
    returns[torch.from_numpy(ends == "cut")] = torch.nan
    returns = returns[mask]
    buffer.annotate("mc_return", order, returns.numpy())
    known = returns[returns.isfinite()]
    return {"data/mc_return": float(known.mean())} if len(known) else {}


def readable(buffer: Buffer, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` that can be read: not what was invalidated, nor what nothing follows yet."""
    return np.intersect1d(rows, buffer.rows(), assume_unique=True)


def whole_groups(buffer: Buffer, segments: list[np.ndarray]) -> list[np.ndarray]:
    """Those of the segments that are whole episodes, from the first decision to the end, as all their siblings are."""
    if not segments:
        return []
    first, last = (buffer.columns(np.array([s[end] for s in segments])) for end in (0, -1))
    part = (first["step"] > 0) | (last["end"] == 0)
    torn = np.unique(first["group"][part])
    whole = ~part & ((first["group"] < 0) | ~np.isin(first["group"], torn))
    return [segment for segment, kept in zip(segments, whole, strict=True) if kept]


def units_of(values: Tensor, mask: Tensor) -> Ragged:
    """What lies under a True mask [B, U] that begins with True, row by row."""
    offsets = np.zeros(len(mask) + 1, np.int64)
    np.cumsum(mask.sum(1).numpy(), out=offsets[1:])
    return Ragged(values[mask].numpy(), offsets)


def score_in_chunks(
    scorer: Callable[[Batch], Tensor], batch: Batch, device: torch.device, *, num_units: int = 2048
) -> Tensor:
    """The scores of all decisions on the CPU, [B] or padded with 0 to [B, U]; about `num_units` at a time."""
    parts, width = [], batch.mask.shape[1]
    for piece in batch.split(max(1, num_units // max(1, width))):
        score = scorer(to_device(piece, device)).cpu()
        missing = 0 if score.dim() == 1 else width - score.shape[1]
        parts.append(torch.nn.functional.pad(score, (0, missing)) if missing > 0 else score)
    return torch.cat(parts)


def segment_returns(
    buffer: Buffer, segments: list[np.ndarray], *, reward_weights: dict[str, float] | None = None, size: int = 4096
) -> np.ndarray:
    """Undiscounted sum of the rewards of each segment [S]."""
    if not segments:
        return np.zeros(0)
    order = np.concatenate(segments)
    parts = (order[i : i + size] for i in range(0, len(order), size))
    reward = [buffer.batch(p, reward_weights=reward_weights, next_observation=False).reward.numpy() for p in parts]
    start = np.cumsum([0, *(len(s) for s in segments[:-1])])
    return np.add.reduceat(np.concatenate(reward).astype(np.float64), start)
