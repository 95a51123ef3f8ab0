"""Multilayer perceptrons, single and stacked, and the Gaussian on top of them, made for many small steps.

On networks of a few hundred units the bookkeeping of the autograd graph costs more than the arithmetic: what always
comes together is one node of it here. Shapes: B rows, A action dimensions, E ensemble members.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
Init = Literal["uniform", "orthogonal"]
Activation = Literal["relu", "tanh"]
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
        raise ValueError(f"a layer from {in_features} to {out_features} numbers: widths of at least 1 are expected")
    layer = unfilled(nn.Linear, in_features, out_features)
    fill(layer.weight, fan_in=in_features, gain=gain, init=init, rng=rng)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Linear, optional LayerNorm, ReLU (or Tanh) for each hidden size, then one linear layer: [B, in] -> [B, out]."""

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
        weights = self._weights()
        if weights is None or x.dim() != 2 or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            return self.last(self.hidden(x))
        if torch.is_grad_enabled():
            return _Dense.apply(self.activation, x, *weights)
        return _run(self.activation, x, weights)[-1]

    def _weights(self) -> list[Tensor] | None:
        """Weight and bias of each layer; None if there are other layers as well (LayerNorm, LoRA)."""
        found: list[Any] = []
        for layer in (*self.hidden._modules.values(), self.last):
            if type(layer) is nn.Linear:
                found += layer._parameters.values()
            elif not isinstance(layer, nn.ReLU | nn.Tanh):
                return None
        return found


class _Dense(torch.autograd.Function):
    """A whole MLP as one node. The values are those of its layers one by one, but for the last bits of tanh."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, x: Tensor, *weights: Tensor) -> Tensor:
        """`weights`: weight [out, in] and bias [out] of each layer."""
        *inputs, out = _run(activation, x, weights)
        ctx.activation = activation
        ctx.save_for_backward(*inputs, *weights[::2])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the weights, as far as they are wanted."""
        assert torch.compiler.is_compiling() or not torch.is_grad_enabled(), "an MLP has no second derivatives"
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
        inputs, weights = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        found: list[Tensor | None] = []
        for i in reversed(range(len(inputs))):
            found.append(gradient.sum(0) if wanted[3 + 2 * i] else None)
            found.append(_outer(gradient, inputs[i]) if wanted[2 + 2 * i] else None)
            if i or wanted[1]:
                gradient = gradient @ weights[i]
            if i and ctx.activation == "relu":
                gradient = aten.threshold_backward.grad_input(gradient, inputs[i], 0, grad_input=gradient)
            elif i:
                gradient = aten.tanh_backward.grad_input(gradient, inputs[i], grad_input=gradient)
        return None, gradient if wanted[1] else None, *reversed(found)


def _run(activation: Activation, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """What each layer reads, and what the last one gives; `weights` as those of `_Dense`."""
    values = [x]
    for i in range(0, len(weights), 2):
        x = F.linear(x, weights[i], weights[i + 1])
        x = _activate_(x, activation) if i < len(weights) - 2 else x
        values.append(x)
    return values


def _outer(gradient: Tensor, x: Tensor) -> Tensor:
    """[B, out], [B, in] -> [out, in], with the wider one on the right: MKL is several times slower the other way."""
    return gradient.t() @ x if gradient.shape[1] <= x.shape[1] else (x.t() @ gradient).t()


def _activate_(x: Tensor, activation: Activation) -> Tensor:
    """In place, but when compiling. On a CPU, NumPy's tanh takes a tenth of the time of torch's."""
    if activation == "relu":
        return x.relu_()
    if x.device.type != "cpu":
        return x.tanh_()
    if torch.compiler.is_compiling():
        return 1 - 2 / (torch.exp(2 * x) + 1)  # within 2e-7, in half the time
    array = x.numpy()
    np.tanh(array, out=array)
    return x


class EnsembleMLP(nn.Module):
    """E independent MLPs with one output each, as one stack of batched matrix products: [B, in] -> [E, B].

    The last layer is a dot product, not a product with a one-column matrix, whose backward pass is many times slower.
    """

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
        return torch.linalg.vecdot(x.to(last.dtype), last) + pick(self.last_bias)


class GaussianLogProb(torch.autograd.Function):
    """Log-density [B] of `u` [B, A] under independent Gaussians, and their entropy [B], as one node.

    mean is [B, A], log std [B, A] or [A]. With `squashed` the density is that of tanh(u), the entropy still the
    Gaussian's.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, mean: Tensor, log_std: Tensor, squashed: bool) -> tuple[Tensor, Tensor]:
        """Of z = (u - mean) / std."""
        precision = (-log_std).exp_()
        z = (u - mean).mul_(precision)
        scale = log_std.sum(-1)
        log_prob = _log_density(z, u, scale, squashed)
        entropy = scale.add_(0.5 * (1 + math.log(2 * math.pi)) * u.shape[-1])
        ctx.save_for_backward(u, z, precision)
        ctx.squashed = squashed
        ctx.set_materialize_grads(False)
        return log_prob, entropy.expand_as(log_prob)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """d/d mean = z / std = -d/du (but for the Jacobian of tanh); d/d log std = z^2 - 1, of the entropy 1."""
        assert not torch.is_grad_enabled(), "a Gaussian has no second derivatives here"
        u, z, precision = ctx.saved_tensors
        gradient = (torch.zeros_like(u[:, 0]) if gradient is None else gradient)[:, None]
        weighted = z * gradient
        by_u, by_mean, by_log_std = None, weighted * precision, None
        if ctx.needs_input_grad[0]:
            by_u = torch.addcmul(-by_mean, torch.tanh(u), gradient, value=2) if ctx.squashed else -by_mean
        if ctx.needs_input_grad[2]:
            by_log_std = weighted.mul_(z).sub_(gradient)
            by_log_std = by_log_std if by_entropy is None else by_log_std.add_(by_entropy[:, None])
            by_log_std = by_log_std if precision.dim() == 2 else by_log_std.sum(0)
        return by_u, by_mean, by_log_std, None


class GaussianSample(torch.autograd.Function):
    """u = mean + std * noise [B, A] and its log-density [B], as one node; arguments as those of `GaussianLogProb`."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor, noise: Tensor, squashed: bool) -> tuple[Tensor, Tensor]:
        """Reparametrised: gradients go through u."""
        std = log_std.exp()
        u = torch.addcmul(mean, std, noise)
        ctx.save_for_backward(u, std, noise)
        ctx.squashed = squashed
        return u, _log_density(noise, u, log_std.sum(-1), squashed)

    @staticmethod
    def backward(ctx: Any, by_u: Tensor, by_log_prob: Tensor) -> tuple[Tensor | None, ...]:
        """The Gaussian's density depends on log std alone; that of tanh(u) on u, too."""
        assert not torch.is_grad_enabled(), "a Gaussian has no second derivatives here"
        u, std, noise = ctx.saved_tensors
        by_log_prob, by_log_std = by_log_prob[:, None], None
        if ctx.squashed:
            by_u = torch.addcmul(by_u, torch.tanh(u), by_log_prob, value=2)
        if ctx.needs_input_grad[1]:
            by_log_std = torch.mul(by_u, noise).mul_(std).sub_(by_log_prob)
            by_log_std = by_log_std if std.dim() == 2 else by_log_std.sum(0)
        return by_u, by_log_std, None, None


def _log_density(z: Tensor, u: Tensor, scale: Tensor, squashed: bool) -> Tensor:
    """Log-density [B] of u (of tanh(u)) from the standardised z [B, A] and the sum of log std [B] or []."""
    each, constant = z * z, 0.5 * math.log(2 * math.pi)
    if squashed:  # log(1 - tanh(u)^2) = log 4 - 2 log(e^u + e^-u), without overflow
        each.sub_(torch.logaddexp(u, -u), alpha=4)
        constant += math.log(4)
    return torch.add(scale + constant * z.shape[-1], each.sum(-1), alpha=0.5).neg_()
