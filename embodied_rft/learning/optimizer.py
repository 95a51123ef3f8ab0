"""AdamW for one part of an agent: all its weights in one fused kernel call, one step counter, a state of plain tensors.

`torch.optim` does the same mathematics; its bookkeeping costs several times the kernel on networks of this size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from embodied_rft.names import UserError
from embodied_rft.networks import fused

BETAS = (0.9, 0.999)  # decay of the two moments
KERNEL = getattr(torch, "_fused_adamw_", None) if fused.ENABLED else None  # no public name; else torch's plain form


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

    Args:
        parameters: the weights; those without a gradient are left alone by a step.
        learning_rate: of all of them.
        weight_decay: relative to the learning rate.
        epsilon: added to the root of the second moment.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        epsilon: float = 1e-8,
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate, self.weight_decay, self.epsilon = learning_rate, weight_decay, epsilon
        self.steps = torch.zeros((), device=self.parameters[0].device)
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, shrink: float | None = None) -> None:
        """Move every weight that has a gradient, after dividing the gradients by `shrink`."""
        self.steps += 1
        rows = [(p, p.grad, m, v) for p, m, v in zip(self.parameters, self.first, self.second, strict=True)]
        parameters, gradients, first, second = zip(*(row for row in rows if row[1] is not None), strict=True)
        options: dict[str, Any] = {
            "lr": self.learning_rate,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": self.epsilon,
        }
        options |= {"weight_decay": self.weight_decay, "amsgrad": False, "maximize": False}
        if KERNEL is not None:
            scale, steps = None if shrink is None else self.steps.new_full((), shrink), [self.steps] * len(parameters)
            KERNEL(parameters, gradients, first, second, [], steps, grad_scale=scale, **options)
            return
        scaled = [g if shrink is None else g / shrink for g in gradients]
        before = [self.steps - 1 for _ in parameters]
        adamw([*parameters], scaled, [*first], [*second], [], before, foreach=False, **options)

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """{"steps": scalar, "first.0": like the first weight, "second.0": ...}."""
        moments = {"first": self.first, "second": self.second}
        return {"steps": self.steps} | {f"{k}.{i}": t for k, tensors in moments.items() for i, t in enumerate(tensors)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state_dict` was taken."""
        own = self.state_dict()
        if set(own) != set(state):
            raise UserError(f"this optimiser has {len(self.parameters)} weights, the state has {len(state) // 2}")
        for key, tensor in own.items():
            tensor.copy_(torch.as_tensor(state[key]))


def gradient_norms(optimizers: Sequence[AdamW]) -> list[float]:
    """Euclidean norm of all gradients of each, with one wait for the device."""
    gradients = [[p.grad for p in optimizer.parameters if p.grad is not None] for optimizer in optimizers]
    each = iter(torch.stack(torch._foreach_norm(list(itertools.chain(*gradients)))).tolist())
    return [math.hypot(*itertools.islice(each, len(part))) for part in gradients]
