"""The one learner: turns batches into weight changes. It knows parts and named losses, no algorithm.

One optimiser per part; losses in the objective's order, each stepping before the next is computed (or all from one
backward pass, where the objective says that they are `independent`); micro-batches that add up to one batch; a loss
that is not finite stops the run before a weight has changed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field as Option
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft import distributed
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Drawn, Fresh
from embodied_rft.data import LEAVES, TREES, Batch
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Metrics, Objective
from embodied_rft.learning.optimizer import AdamW, gradient_norms
from embodied_rft.names import UserError, nearest
from embodied_rft.networks.tensors import polyak
from embodied_rft.options import STRICT
from embodied_rft.policy import Batches, Policy, able
from embodied_rft.tokens.micro_batches import plan_units


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss or gradient was NaN or infinite; no weight has been changed by it."""


@dataclass(config=STRICT, kw_only=True)
class LearnerConfig:
    """How gradients are taken, the same for every objective."""

    learning_rate: float = 3e-4  # of all parts
    learning_rates: dict[str, float] = field(default_factory=dict)  # for single parts: {"critic": 1e-3}
    anneal: bool = False  # all learning rates fall linearly, to 0 at the end of the stage
    weight_decay: NonNegativeFloat = 0.0  # decoupled (AdamW)
    epsilon: PositiveFloat = 1e-8  # of Adam, beside the root of the second moment; PPO is usually run with 1e-5
    clip_norm: PositiveFloat | None = None  # largest gradient norm of a part
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: matrix products under autocast, weights stay fp32
    micro_batch: int | None = None  # decisions per backward pass; None: the whole batch
    micro_units: int | None = None  # instead: most units of a backward pass, padding (and a text's prompts) included
    compile: bool = False  # losses through torch.compile: small networks gain most; the first update waits for it
    ema: float | None = Option(
        default=None, ge=0, lt=1
    )  # decay of an average of the policy, which judges see and which stays, e.g. 0.999

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.micro_batch is not None and self.micro_units is not None:
            raise UserError(
                f"micro_batch {self.micro_batch} counts decisions, micro_units {self.micro_units} their units: give one"
            )
        if self.compile and not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise UserError("compile: true needs a C++ compiler (g++, or what CXX names): install one or leave it out")
        for name, rate in {"learning_rate": self.learning_rate, **self.learning_rates}.items():
            if not 0 <= rate < math.inf:
                raise UserError(f"learning rate {name} is {rate}: a number of at least 0 is expected, e.g. 1e-5")
        for name, number in (("micro_batch", self.micro_batch), ("micro_units", self.micro_units)):
            if number is not None and number < 1:
                raise UserError(f"{name} is {number}: at least 1 is expected, or leave it out")


class Learner:
    """Trains the parts of an agent with an objective's losses.

    Args:
        agent: whose parts are trained; the objective must have been set up on it.
        objective: what is learned.
        config: how to take gradients.
    """

    def __init__(self, agent: Agent, objective: Objective, config: LearnerConfig | None = None) -> None:
        self.agent, self.objective, self.config = agent, objective, config or LearnerConfig()
        for name in self.config.learning_rates:
            if name not in objective.losses:
                raise UserError(f"learning rate for {name!r}, which is not trained; {nearest(name, objective.losses)}")
        self.updates = self.iterations = 0
        self.parameters = {name: agent.trainable(name) for name in objective.losses}
        for name, parameters in self.parameters.items():
            if not parameters:
                raise UserError(f"part {name!r} has no trainable weights: it is frozen, or cannot be trained")
        self.optimizers = {name: self._optimizer(name) for name in objective.losses}
        self.averaged: Policy | None = None  # the EMA of the policy
        if self.config.ema is not None:
            shared = {id(p): p for p in agent.policy.parameters() if not p.requires_grad}
            self.averaged = copy.deepcopy(agent.policy, shared).requires_grad_(False)
        self._evaluate = torch.compile(self._sum) if self.config.compile else self._sum
        self._metrics: dict[str, list[Tensor]] = {}

    def _optimizer(self, name: str) -> AdamW:
        config = self.config
        return AdamW(
            self.parameters[name],
            learning_rate=self._rate(name),
            weight_decay=config.weight_decay,
            epsilon=config.epsilon,
        )

    def _rate(self, name: str) -> float:
        return self.config.learning_rates.get(name, self.config.learning_rate)

    def anneal(self, done: float) -> None:
        """Set the learning rates for a stage of which `done` (0 to 1) is over; nothing without the option."""
        if self.config.anneal:
            for name, optimizer in self.optimizers.items():
                optimizer.learning_rate = self._rate(name) * max(0.0, 1 - done)

    @property
    def version(self) -> int:
        """How many updates the agent's policy has seen, over all stages (starts at 1; 0 is older experience)."""
        return int(self.agent.version)

    def update(self, batch: Batch | None, rng: torch.Generator, *, only: Sequence[str] | None = None) -> bool:
        """One step of every loss that is due, in order. The numbers are kept for `metrics`.

        False where the objective has seen `enough` and no step was taken.

        Args:
            batch: B decisions; None: this process has none left, but others do (`distributed.in_step`).
            rng: for the losses' random numbers.
            only: names of the losses to step; None: all.

        Raises:
            NonFiniteLossError: names the loss; its part and the following ones are unchanged.
        """
        unknown = set(only or ()) - set(self.parameters)
        if unknown:
            name = min(unknown)
            raise UserError(f"there is no loss {name!r}; {nearest(name, self.parameters)}")
        pieces = self._pieces(batch)
        due = [name for name in self.objective.losses if (self.updates + 1) % self.objective.every.get(name, 1) == 0]
        due = [name for name in due if only is None or name in only]
        for names in [due] if self.objective.independent else [[name] for name in due]:
            if names and not self._step(names, pieces, rng):
                return False
        self.updates += 1
        self.objective.after_update(self.agent, self.updates)
        return True

    def _pieces(self, batch: Batch | None) -> list[Batch]:
        """The batch as micro-batches on the agent's device, with the normalisers of the whole, of all processes."""
        if batch is not None and not batch.num_decisions:
            batch = replace(batch, num_decisions=len(batch), num_units=int(batch.mask.sum()))
        if distributed.size() > 1:
            counts = distributed.total({} if batch is None else batch.normalizers)
            batch = batch and replace(batch, **counts)
        if batch is None:
            return []
        device = next(iter(self.parameters.values()))[0].device
        if device.type != "cpu":
            batch = to_device(batch, device)
        # A copy of the notes: losses of one update may leave each other intermediate results there.
        return [replace(b, notes=dict(b.notes)) for b in self._split(batch)]

    def _split(self, batch: Batch) -> list[Batch]:
        """By number of decisions, or by what they cost; the policy knows best what that is."""
        if (size := self.config.micro_batch) is not None:
            return batch.split(size)
        if (most := self.config.micro_units) is None:
            return [batch]
        own = able(self.agent.policy, Batches)
        units = batch.mask.sum(1).cpu().numpy()
        rows = plan_units(units, most=most, atoms=batch.atoms) if own is None else own.micro_batches(batch, most)
        return [batch.take(part) for part in rows]

    def _step(self, names: Sequence[str], pieces: list[Batch], rng: torch.Generator) -> bool:
        """One step of these losses, from one backward pass; False: the objective has seen enough, nothing changed."""
        for name in names:
            self.objective.before_step(name, self.agent, pieces, rng)
        parameters = [p for name in names for p in self.parameters[name]]
        optimizers = [self.optimizers[name] for name in names]
        seen: dict[str, list[Tensor]] = {}
        for piece in pieces:
            with self._autocast():
                total, values, metrics = self._evaluate(names, piece, rng)
            if not math.isfinite(total.item()):
                self._stop("loss", values)
            torch.autograd.backward(total, inputs=parameters)  # only these: other parts' weights cost nothing
            for key, number in metrics.items():
                seen.setdefault(key, []).append(number)
        now = {key: _together(key, parts) for key, parts in seen.items()}
        for key, number in now.items():
            self._metrics.setdefault(key, []).append(number)
        if distributed.any_of(self.objective.enough(now)):
            for name in names:
                self.optimizers[name].clear()
            return False
        distributed.sum_gradients(parameters)
        shrink: list[float | None] = [None] * len(names)
        if (most := self.config.clip_norm) is not None:
            norms = gradient_norms(optimizers)
            if not math.isfinite(sum(norms)):
                self._stop("the gradient of loss", dict(zip(names, norms, strict=True)))
            shrink = [norm / most if norm > most else None for norm in norms]
        for optimizer, by in zip(optimizers, shrink, strict=True):
            optimizer.step(by)
            optimizer.clear()
        if "policy" in names:
            self.agent.version.add_(1)
            if self.averaged is not None:
                self._average()
        return True

    def _sum(
        self, names: Sequence[str], piece: Batch, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The losses' sum, each of them, and what they say of themselves."""
        found = [self.objective.losses[name](self.agent, piece, rng) for name in names]
        values = {name: value for name, (value, _) in zip(names, found, strict=True)}
        metrics = {key: number for _, more in found for key, number in more.items()}
        return functools.reduce(torch.add, values.values()), values, metrics

    def _stop(self, what: str, numbers: Mapping[str, Tensor | float]) -> None:
        """Name the culprit; no weight has changed."""
        for name in numbers:
            self.optimizers[name].clear()
        values = {name: number.item() if isinstance(number, Tensor) else number for name, number in numbers.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        name = (bad or [*values])[0]  # the sum of finite numbers can be infinite
        raise NonFiniteLossError(
            f"{what} {name!r} of update {self.updates} is {values[name]}; no weight of {name!r} was changed. "
            "Look for extreme rewards or observations, or lower its learning rate."
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.agent.device.type, dtype=torch.bfloat16)

    @property
    def judged(self) -> Policy:
        """The policy that evaluations see: the averaged one, if there is one. Experience is collected by the other."""
        return self.agent.policy if self.averaged is None else self.averaged

    def finish(self) -> None:
        """The stage is over: from here on the averaged policy is the policy, for what follows and for good."""
        if self.averaged is not None:
            self.agent.policy.load_state_dict(self.averaged.state_dict())
            self.agent.version.add_(1)

    @torch.no_grad()
    def _average(self) -> None:
        assert self.averaged is not None and self.config.ema is not None
        polyak(self.averaged, self.agent.policy, 1 - self.config.ema)

    def learn(self, buffer: Buffer, rng: np.random.Generator, *, num_updates: int | None = None) -> Metrics:
        """Read the buffer after the objective's plan: annotate, update, report.

        Args:
            buffer: the experience.
            rng: draws the rows; a torch generator for the losses is seeded from it.
            num_updates: how many batches of replay, whose plans have no end; fresh data is read to its end.

        Returns:
            Mean of each metric, and what `annotate` found in the data.
        """
        generator = torch.Generator(self.agent.device).manual_seed(int(rng.integers(2**62)))
        reading = self.objective.reading
        if isinstance(reading, Drawn):
            if num_updates is None:
                raise UserError("replay has no end: say how much is learned, num_updates")
            rows = buffer.rows()
        else:
            if num_updates is not None:
                raise UserError("num_updates has no effect on an objective that reads fresh data: set its num_epochs")
            rows = buffer.rows(min_version=self.version - reading.max_lag)
        noted = self.read(buffer, rows, reading, sampler=rng, rng=generator, num_updates=num_updates)
        return noted | self.metrics()

    def read(
        self,
        buffer: Buffer,
        rows: np.ndarray,
        reading: Drawn | Fresh,
        *,
        sampler: np.random.Generator,
        rng: torch.Generator,
        num_updates: int | None = None,
    ) -> Metrics:
        """Annotate `rows`, then update from the batches of the plan `reading`; what `annotate` found in the data.

        An objective may end it early (`enough`), let some losses wait for so many iterations (`due`), and change what
        must stay as it was when the data was collected once all has been read (`after_reading`).
        """
        noted = self.objective.annotate(self.agent, buffer, rows, rng)
        distributed.equalize(self.agent.buffers())  # statistics of the data
        due = self.objective.due(self.iterations)
        batches = itertools.islice(reading.batches(buffer, sampler, self.version), num_updates)
        for batch in distributed.in_step(batches):
            if not self.update(batch, rng, only=due):
                noted = noted | {"learn/stopped_early": 1.0}
                break
        self.iterations += 1
        if due is not None and "policy" not in due:
            self.agent.version.add_(1)  # what comes next is other experience, though of the same weights
        self.objective.after_reading(self.agent, buffer, rows)
        distributed.equalize(self.agent.buffers())
        return noted

    def metrics(self) -> Metrics:
        """Means of all numbers since the last call, as floats; asking is what waits for the device, and the others."""
        means = {key: float(torch.stack(numbers).float().mean()) for key, numbers in self._metrics.items()}
        counts = {key: len(numbers) for key, numbers in self._metrics.items()}
        self._metrics = {}
        usage = self.agent.policy.usage
        if usage is not None and usage.computed:
            means["learn/useful_share"] = usage.useful / usage.computed
            usage.useful = usage.computed = 0
        if distributed.size() == 1:
            return means
        own = {key: [number * counts.get(key, 1), counts.get(key, 1)] for key, number in means.items()}
        given = distributed.gather(own)
        for key in sorted(set().union(*given)):  # a loss is a sum over processes, every other number a mean
            amounts, updates = zip(*(one[key] for one in given if key in one), strict=True)
            means[key] = sum(amounts) / (max(updates) if key.endswith("loss") else sum(updates))
        return means

    def state_dict(self) -> dict[str, Any]:
        """Everything but the agent's weights: optimisers, counters, averaged policy. Tensors and JSON scalars only."""
        return {
            "updates": self.updates,
            "iterations": self.iterations,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "averaged": None if self.averaged is None else dict(self.averaged.state_dict()),
            "metrics": {k: torch.stack(v).float() for k, v in self._metrics.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        if set(state["optimizers"]) != set(self.optimizers):
            raise UserError(
                f"this state trains {sorted(state['optimizers'])}, the objective trains {sorted(self.optimizers)}: "
                "continue with the objective that the state was saved from"
            )
        self.updates, self.iterations = int(state["updates"]), int(state["iterations"])
        for name, saved in state["optimizers"].items():
            self.optimizers[name].load_state_dict(saved)
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self._metrics = {k: list(v.unbind()) for k, v in state["metrics"].items()}


def _together(key: str, parts: list[Tensor]) -> Tensor:
    """A number of a whole batch from those of its micro-batches: losses add up, everything else is a mean."""
    if len(parts) == 1:
        return parts[0]
    stacked = torch.stack(parts).float()
    return stacked.sum() if key.endswith("loss") else stacked.mean()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""

    def move(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    trees: dict[str, Any] = {n: {k: move(v) for k, v in getattr(batch, n).items()} for n in TREES}
    return replace(batch, **trees, **{name: move(getattr(batch, name)) for name in LEAVES})
