"""Log-probability and entropy of tokens from hidden states; logits [tokens, vocabulary] never exist at full length.

Tokens are handled in chunks; the backward pass computes the logits of a chunk again. Boundary: tensors in, tensors
out; knows a model's output layer (`Head`) but no model.
Legend: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # logits that exist at the same time
KEEP_ELEMENTS = 2**22  # probabilities kept for the backward pass (16 MB) instead of being computed again


@dataclass(frozen=True, slots=True)
class Head:
    """An output layer: logits = cap(scale * (hidden @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap).

    A Qwen2 head at temperature 0.5 is Head(weight=[151936, 896], scale=2.0).
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0  # of the model itself, divided by the sampling temperature
    softcap: float | None = None  # Gemma 2 and later; applied before the temperature
    temperature: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] float32; for a few tokens only."""
        return _logits(hidden, self.weight, self.bias, self.scale, self.softcap) / self.temperature


def token_log_probs(
    hidden: Tensor, targets: Tensor, head: Head, *, chunk: int | None = None, keep_elements: int = KEEP_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and entropy of its distribution, [T] float32 each, differentiable.

    Args:
        hidden: [T, H], the state from which token t is predicted.
        targets: [T] int64, 0 <= target < V.
        head: the output layer; gradients flow into its weight and bias if they ask for them.
        chunk: tokens whose logits exist at the same time (2 * chunk * V * 4 bytes); None: as many as fit into 128 MB.
        keep_elements: when T * V is at most this, the probabilities are kept, which saves the second computation.

    Example:
        4096 tokens, a vocabulary of 150,000: plain logits take 2.5 GB, and their gradient as much; a chunk takes 64 MB.
    """
    weight, bias = head.weight, head.bias
    chunk = chunk or max(64, CHUNK_ELEMENTS // len(weight))
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    weight = weight.to(hidden.dtype)
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext():
        return _TokenLogProbs.apply(hidden, weight, bias, targets, head, chunk, keep_elements)


def plain_token_log_probs(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The same by `log_softmax` over all logits at once: the reference that tests and benchmarks compare with."""
    log_prob = head.logits(hidden).log_softmax(-1)
    entropy = -(log_prob.exp() * log_prob).sum(-1)
    return log_prob.gather(1, targets[:, None])[:, 0], entropy


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    if bias is not None:
        logits = logits + bias.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _TokenLogProbs(torch.autograd.Function):
    """p = softmax(z): d log p(y) / dz = onehot(y) - p, d entropy / dz = -p (log p + entropy)."""

    apply: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        chunk: int,
        keep_elements: int,
    ) -> tuple[Tensor, Tensor]:
        log_prob, entropy = hidden.new_empty((2, len(hidden)), dtype=torch.float32)
        keep = head.softcap is None and any(ctx.needs_input_grad[:3]) and len(hidden) * len(weight) <= keep_elements
        kept = []
        for part in _chunks(len(hidden), chunk):
            logits = _logits(hidden[part], weight, bias, head.scale, head.softcap)
            log_p, entropy[part] = _log_softmax(logits, head.temperature)
            log_prob[part] = log_p.gather(1, targets[part, None])[:, 0]
            if keep:
                kept.append(log_p)
        ctx.save_for_backward(hidden, weight, targets, entropy, *([] if bias is None else [bias]))
        ctx.head, ctx.chunk, ctx.kept, ctx.has_bias = head, chunk, kept, bias is not None
        ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, *rest = ctx.saved_tensors
        bias, head = (rest[0] if ctx.has_bias else None), ctx.head
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None  # type: ignore[arg-type]
        for number, part in enumerate(_chunks(len(hidden), ctx.chunk)):
            slope = None
            if ctx.kept:
                log_p = ctx.kept[number]
            else:
                logits = _logits(hidden[part], weight, bias, head.scale, head.softcap)
                if head.softcap is not None:
                    slope = 1 - (logits / head.softcap).square()
                log_p, _ = _log_softmax(logits, head.temperature)
            given = [g if g is None else g[part] for g in gradients]
            grad = _logit_gradient(log_p, targets[part], entropy[part], *given)
            if grad is None:
                return (None,) * 7
            grad *= head.scale / head.temperature
            if slope is not None:
                grad *= slope
            low = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(low, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(low.T, hidden[part])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _log_softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log p [T, V], entropy [T]); overwrites the logits, so that two matrices of this size exist, not four."""
    if temperature != 1.0:
        logits = logits.div_(temperature)
    logits = logits.sub_(logits.amax(-1, keepdim=True))
    p = logits.exp()
    total = p.sum(-1, keepdim=True)
    log_p = logits.sub_(total.log())
    return log_p, -torch.linalg.vecdot(p.div_(total), log_p)


def _logit_gradient(
    log_p: Tensor, targets: Tensor, entropy: Tensor, grad_log_prob: Tensor | None, grad_entropy: Tensor | None
) -> Tensor | None:
    """Gradient on the logits before scaling, [T, V]; None when nothing is asked."""
    if grad_log_prob is None and grad_entropy is None:
        return None
    p = log_p.exp()
    weight = p.new_zeros(len(p)) if grad_log_prob is None else -grad_log_prob
    if grad_entropy is None:
        grad = p.mul_(weight[:, None])
    else:
        inner = (log_p + entropy[:, None]).mul_(-grad_entropy[:, None]).add_(weight[:, None])
        grad = p.mul_(inner)
    if grad_log_prob is not None:
        grad[torch.arange(len(grad), device=grad.device), targets] += grad_log_prob
    return grad
