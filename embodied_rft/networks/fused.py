"""Autograd nodes of what always comes together, each beside its plain form: perceptron, Gaussian, PPO's surrogate.

On networks of a few hundred units the bookkeeping of the autograd graph costs more than the arithmetic. With
EMBODIED_RFT_FUSED=0 in the environment the plain forms run: equal but for rounding, and with second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embodied_rft import variables
from embodied_rft.names import UserError

aten = torch.ops.aten
Activation = Literal["relu", "tanh"]
Bound = float | Tensor | None  # of a ratio: for all units, or for each [U]; None: there is none
ENABLED = variables.fused()


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UserError("a fused network has no second derivatives: set EMBODIED_RFT_FUSED=0 in the environment")


# --- perceptrons; the plain form is that of their layers, in `mlp` ---------------------------------------------------


class Dense(torch.autograd.Function):
    """A whole MLP as one node. The values are those of its layers one by one, but for the last bits of tanh."""

    apply: Callable[..., Tensor]  # of `forward`, here and below: torch leaves its type open

    @staticmethod
    def forward(ctx: Any, activation: Activation, x: Tensor, *weights: Tensor) -> Tensor:
        """`weights`: weight [out, in] and bias [out] of each layer."""
        *inputs, out = run_layers(activation, x, weights)
        ctx.activation = activation
        ctx.save_for_backward(*inputs, *weights[::2])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the weights, as far as they are wanted."""
        _refuse_second_derivatives()
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
        inputs, weights = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        found: list[Tensor | None] = []
        for i in reversed(range(len(inputs))):
            found.append(gradient.sum(0) if wanted[3 + 2 * i] else None)
            found.append(outer(gradient, inputs[i]) if wanted[2 + 2 * i] else None)
            if i or wanted[1]:
                gradient = gradient @ weights[i]
            if i and ctx.activation == "relu":
                gradient = aten.threshold_backward.grad_input(gradient, inputs[i], 0, grad_input=gradient)
            elif i:
                gradient = aten.tanh_backward.grad_input(gradient, inputs[i], grad_input=gradient)
        return None, gradient if wanted[1] else None, *reversed(found)


def run_layers(activation: Activation, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """What each layer reads, and what the last one gives; `weights` as those of `Dense`."""
    values = [x]
    for i in range(0, len(weights), 2):
        x = F.linear(x, weights[i], weights[i + 1])
        x = activate_(x, activation) if i < len(weights) - 2 else x
        values.append(x)
    return values


def outer(gradient: Tensor, x: Tensor) -> Tensor:
    """[B, out], [B, in] -> [out, in], with the wider one on the right: MKL is several times slower the other way."""
    return gradient.t() @ x if gradient.shape[1] <= x.shape[1] else (x.t() @ gradient).t()


def activate_(x: Tensor, activation: Activation) -> Tensor:
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


# --- Gaussians -------------------------------------------------------------------------------------------------------


def gaussian_log_prob(u: Tensor, mean: Tensor, log_std: Tensor, squashed: bool) -> tuple[Tensor, Tensor]:
    """Log-density [B] of `u` [B, A] under independent Gaussians, and their entropy [B].

    mean is [B, A], log std [B, A] or [A]. With `squashed` the density is that of tanh(u), the entropy still the
    Gaussian's.
    """
    if ENABLED:
        return GaussianLogProb.apply(u, mean, log_std, squashed)
    entropy = (log_std + 0.5 * (1 + math.log(2 * math.pi))).sum(-1)
    log_prob = gaussian_log_probs(u, mean, log_std, squashed).sum(-1)
    return log_prob, entropy.expand_as(log_prob)


def gaussian_log_probs(u: Tensor, mean: Tensor, log_std: Tensor, squashed: bool) -> Tensor:
    """The same of each number, [B, A]."""
    each: Tensor = torch.distributions.Normal(mean, log_std.exp()).log_prob(u)
    if squashed:  # log(1 - tanh(u)^2)
        each = each - 2 * (math.log(2) - u - F.softplus(-2 * u))
    return each


def gaussian_sample(mean: Tensor, log_std: Tensor, noise: Tensor, squashed: bool) -> tuple[Tensor, Tensor]:
    """The value u = mean + std * noise [B, A] and its log-density [B], differentiable; arguments as above."""
    if ENABLED:
        return GaussianSample.apply(mean, log_std, noise, squashed)
    u = mean + log_std.exp() * noise
    return u, gaussian_log_probs(u, mean, log_std, squashed).sum(-1)


class GaussianLogProb(torch.autograd.Function):
    """`gaussian_log_prob` as one node."""

    apply: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def forward(ctx: Any, u: Tensor, mean: Tensor, log_std: Tensor, squashed: bool) -> tuple[Tensor, Tensor]:
        """Of z = (u - mean) / std."""
        precision = (-log_std).exp_()
        z = (u - mean).mul_(precision)
        scale = log_std.sum(-1)
        log_prob = log_density(z, u, scale, squashed)
        entropy = scale.add_(0.5 * (1 + math.log(2 * math.pi)) * u.shape[-1])
        ctx.save_for_backward(u, z, precision)
        ctx.squashed = squashed
        ctx.set_materialize_grads(False)
        return log_prob, entropy.expand_as(log_prob)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """d/d mean = z / std = -d/du (but for the Jacobian of tanh); d/d log std = z^2 - 1, of the entropy 1."""
        _refuse_second_derivatives()
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
    """`gaussian_sample` as one node."""

    apply: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor, noise: Tensor, squashed: bool) -> tuple[Tensor, Tensor]:
        """Reparametrised: gradients go through u."""
        std = log_std.exp()
        u = torch.addcmul(mean, std, noise)
        ctx.save_for_backward(u, std, noise)
        ctx.squashed = squashed
        return u, log_density(noise, u, log_std.sum(-1), squashed)

    @staticmethod
    def backward(ctx: Any, by_u: Tensor, by_log_prob: Tensor) -> tuple[Tensor | None, ...]:
        """The Gaussian's density depends on log std alone; that of tanh(u) on u, too."""
        _refuse_second_derivatives()
        u, std, noise = ctx.saved_tensors
        by_log_prob, by_log_std = by_log_prob[:, None], None
        if ctx.squashed:
            by_u = torch.addcmul(by_u, torch.tanh(u), by_log_prob, value=2)
        if ctx.needs_input_grad[1]:
            by_log_std = torch.mul(by_u, noise).mul_(std).sub_(by_log_prob)
            by_log_std = by_log_std if std.dim() == 2 else by_log_std.sum(0)
        return by_u, by_log_std, None, None


def log_density(z: Tensor, u: Tensor, scale: Tensor, squashed: bool) -> Tensor:
    """Log-density [B] of u (of tanh(u)) from the standardised z [B, A] and the sum of log std [B] or []."""
    each, constant = z * z, 0.5 * math.log(2 * math.pi)
    if squashed:  # log(1 - tanh(u)^2) = log 4 - 2 log(e^u + e^-u), without overflow
        each.sub_(torch.logaddexp(u, -u), alpha=4)
        constant += math.log(4)
    return torch.add(scale + constant * z.shape[-1], each.sum(-1), alpha=0.5).neg_()


# --- PPO's surrogate -------------------------------------------------------------------------------------------------


def pessimistic(log_ratio: Tensor, advantage: Tensor, low: Bound, high: Bound) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A); constant where clipping binds, None: no bound there."""
    if ENABLED:
        return Pessimistic.apply(log_ratio, advantage, low, high)
    ratio = log_ratio.exp()
    bounded = _bounded(ratio, low, high)
    return -torch.minimum(ratio * advantage, bounded * advantage)


def _bounded(ratio: Tensor, low: Bound, high: Bound) -> Tensor:
    limits: Any = None if low is None else 1 - low, None if high is None else 1 + high  # also a number beside a tensor
    return torch.clamp(ratio, *limits)


class Pessimistic(torch.autograd.Function):
    """`pessimistic` as one node."""

    apply: Callable[..., Tensor]

    @staticmethod
    def forward(ctx: Any, log_ratio: Tensor, advantage: Tensor, low: Bound, high: Bound) -> Tensor:
        """The advantage is a constant."""
        ratio = log_ratio.exp()
        bounded = _bounded(ratio, low, high).mul_(advantage)
        free = ratio.mul_(advantage)
        ctx.save_for_backward(free * (free <= bounded))
        return torch.minimum(free, bounded).neg_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Ratio times advantage where the ratio is free."""
        _refuse_second_derivatives()
        return (gradient * ctx.saved_tensors[0]).neg_(), None, None, None
