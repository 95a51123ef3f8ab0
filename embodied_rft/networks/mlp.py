"""Multilayer perceptrons, single and stacked, and the Gaussian on top of them, made for many small steps.

On networks of a few hundred units the bookkeeping of the autograd graph costs more than the arithmetic: what always
comes together is one node of it here. Shapes: B rows, A action dimensions, E ensemble members.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embodied_rft.names import UserError
from embodied_rft.networks import fused
from embodied_rft.networks.fused import Activation, Dense, run_layers

Init = Literal["uniform", "orthogonal"]
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # of an nn.Module
L = TypeVar("L", bound=nn.Module)


def fill(weight: Tensor, *, fan_in: int, gain: float, init: Init, rng: torch.Generator) -> None:
    """Fill one weight matrix in place: uniform within gain / sqrt(fan_in), or orthogonal times gain * sqrt(2)."""
    with torch.no_grad():
        if init == "orthogonal":
            nn.init.orthogonal_(weight, gain * math.sqrt(2), generator=rng)
        else:
            bound = gain / math.sqrt(fan_in)
            weight.uniform_(-bound, bound, generator=rng)


def unfilled(kind: Callable[..., L], *sizes: int, **options: Any) -> L:
    """A layer whose weights are memory to be filled.

    Its own initialisation would draw from the global generator; `nn.utils.skip_init` does this, but loads a compiler.
    """
    layer = kind(*sizes, **options, device="meta")
    for name, parameter in layer.named_parameters():
        setattr(layer, name, nn.Parameter(torch.empty(parameter.shape)))
    return layer


def linear(
    in_features: int, out_features: int, *, rng: torch.Generator, gain: float = 1.0, init: Init = "uniform"
) -> nn.Linear:
    """A linear layer with generator-drawn weights and a zero bias."""
    if in_features < 1 or out_features < 1:
        raise UserError(f"a layer from {in_features} to {out_features} numbers: widths of at least 1 are expected")
    layer = unfilled(nn.Linear, in_features, out_features)
    fill(layer.weight, fan_in=in_features, gain=gain, init=init, rng=rng)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Linear, optional LayerNorm, ReLU (or Tanh) for each hidden size, then one linear layer: [B, in] -> [B, out]."""

    __call__: Callable[..., Tensor]  # of `forward`, here and elsewhere: nn.Module leaves its type open

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        rng: torch.Generator,
        layer_norm: bool = False,
        last_gain: float = 1.0,
        init: Init = "uniform",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in hidden:
            layers.append(linear(in_features, size, rng=rng, init=init))
            if layer_norm:
                layers.append(nn.LayerNorm(size))
            layers.append(nn.ReLU(inplace=True) if activation == "relu" else nn.Tanh())
            in_features = size
        self.hidden = nn.Sequential(*layers)
        self.last = linear(in_features, out_features, rng=rng, gain=last_gain, init=init)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, in] -> [B, out]."""
        weights = self._weights() if fused.ENABLED else None
        if weights is None or x.dim() != 2 or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            out: Tensor = self.last(self.hidden(x))
            return out
        if torch.is_grad_enabled():
            return Dense.apply(self.activation, x, *weights)
        return run_layers(self.activation, x, weights)[-1]

    def _weights(self) -> list[Tensor] | None:
        """Weight and bias of each layer; None: there are others (LayerNorm, LoRA), or hooks, which must be heard."""
        found: list[Any] = []
        for layer in (*self.hidden._modules.values(), self.last):
            if any(layer.__dict__[hooks] for hooks in HOOKS):
                return None
            if type(layer) is nn.Linear:
                found += layer._parameters.values()
            elif not isinstance(layer, nn.ReLU | nn.Tanh):
                return None
        return found


class EnsembleMLP(nn.Module):
    """E independent MLPs with one output each, as one stack of batched matrix products: [B, in] -> [E, B].

    The last layer is a dot product, not a product with a one-column matrix, whose backward pass is many times slower.
    """

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        *,
        num_members: int,
        rng: torch.Generator,
        layer_norm: bool = False,
        init: Init = "uniform",
    ) -> None:
        super().__init__()

        def stack(fan_in: int, fan_out: int) -> nn.Parameter:
            weight = torch.empty(num_members, fan_in, fan_out)
            for member in weight:
                fill(member, fan_in=fan_in, gain=1.0, init=init, rng=rng)
            return nn.Parameter(weight)

        self.weights = nn.ParameterList()  # of the hidden layers, [E, in, out]
        self.biases = nn.ParameterList()  # [E, 1, out]
        self.norms = nn.ParameterList()  # [2, E, 1, out]: gain and shift
        for fan_in, fan_out in itertools.pairwise((in_features, *hidden)):
            self.weights.append(stack(fan_in, fan_out))
            self.biases.append(nn.Parameter(torch.zeros(num_members, 1, fan_out)))
            if layer_norm:
                shape = (num_members, 1, fan_out)
                self.norms.append(nn.Parameter(torch.stack([torch.ones(shape), torch.zeros(shape)])))
        self.last = nn.Parameter(
            stack((in_features, *hidden)[-1], 1).detach().transpose(1, 2).contiguous()
        )  # [E, 1, in]
        self.last_bias = nn.Parameter(torch.zeros(num_members, 1))

    def forward(self, x: Tensor, members: Tensor | None = None) -> Tensor:
        """[B, in] -> [E, B]; only the given members ([M] int64) -> [M, B]."""

        def pick(parameter: Tensor) -> Tensor:
            return parameter if members is None else parameter[members]

        last = pick(self.last)
        x = x.expand(len(last), *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(pick(bias), x, pick(weight))
            if len(self.norms):
                gain, shift = self.norms[i] if members is None else self.norms[i][:, members]
                x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), gain)
            x = torch.relu_(x)
        out: Tensor = torch.linalg.vecdot(x.to(last.dtype), last)
        return out + pick(self.last_bias)
