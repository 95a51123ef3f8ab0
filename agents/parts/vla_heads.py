"""Three ways from the hidden states of a vision-language model to action chunks, with exact log-probabilities.

`TokenHead` says a chunk as binned tokens, `ParallelHead` regresses all its steps in one pass with a Gaussian around
them, `FlowHead` integrates a flow that looks at the hidden states. All work in normalised units, [-1, 1] for an
action. Boundary: hidden states to chunks and their probabilities; knows no observation and no environment.

Legend: N or B rows, P tokens of the prompt, H hidden size, A action dimensions, T steps of a chunk, E of them executed,
D = T * A, S flow steps, U units, W width of the flow's expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from embodied_rft.agents.models.vlm import VLM, Context
from embodied_rft.agents.parts.chain import Step, entropy_of, flow_step, flow_target, gaussian_log_prob, require_chain
from embodied_rft.data import Field
from embodied_rft.learning.losses import mean_where
from embodied_rft.names import UserError
from embodied_rft.networks.mlp import MLP, linear
from embodied_rft.options import STRICT
from embodied_rft.policy import require_rng


@dataclass(config=STRICT, kw_only=True)
class TokenOptions:
    """Options of the head "tokens" (RT-2, OpenVLA: Kim et al. 2024, section 3.2)."""

    bins: int = 256  # of equal width over [-1, 1], per action dimension
    temperature: float = 1.0  # of sampling and of every log-probability


@dataclass(config=STRICT, kw_only=True)
class ParallelOptions:
    """Options of the head "parallel" (OpenVLA-OFT: Kim et al. 2025, section IV)."""

    attention: Literal["bidirectional", "causal"] = "bidirectional"  # among the steps of a chunk
    hidden: tuple[int, ...] = (256,)  # of the regression head
    initial_std: float = 0.1  # of the Gaussian around the regressed action, in normalised units
    min_std: float = 0.01  # least width


@dataclass(config=STRICT, kw_only=True)
class FlowOptions:
    """Options of the head "flow" (pi-0: Black et al. 2024; noisy steps: Flow-GRPO, Liu et al. 2025, section 4.2)."""

    num_steps: int = 4  # S
    noise_level: float = 1.0  # of the sampling steps
    min_std: float = 0.1  # least width
    width: int = 128  # W
    num_blocks: int = 2  # depth of the head
    num_heads: int = 4  # of attention
    greedy_start: Literal["random", "zero"] = "random"  # where greedy chains start: drawn noise, or zero


class Acted(NamedTuple):
    """N decisions in normalised units."""

    chunk: Tensor  # [N, D]
    log_prob: Tensor  # [N, U]
    trace: dict[str, Tensor]


class Size(NamedTuple):
    """Of a chunk."""

    action_dim: int  # A
    horizon: int  # T
    execute: int  # E


class TokenHead(nn.Module):
    """One token per action dimension and step, each after all before it: U = E * A.

    Steps that are never executed are not generated when acting; imitation trains all of them. Input vectors and output
    layer of the bins start as those of the last `bins` tokens of the vocabulary, in OpenVLA's order (bin b is token
    V - 1 - b), where there are that many.
    """

    random_start = False

    def __init__(self, vlm: VLM, options: TokenOptions, size: Size, *, rng: torch.Generator) -> None:
        super().__init__()
        if options.bins < 2 or options.temperature <= 0:
            raise UserError(f"bins >= 2 and temperature > 0 are expected, given {options}")
        self.size, self.temperature, self.bins = size, options.temperature, options.bins
        self.embedding = nn.Parameter(0.02 * torch.randn(options.bins, vlm.hidden_size, generator=rng))
        self.output = linear(vlm.hidden_size, options.bins, rng=rng)
        self._start_from_vocabulary(vlm)
        self.num_units, self.unit_size = size.execute * size.action_dim, 1
        self.trace_fields = {"tokens": Field((self.num_units,), "int64")}
        self.identity: dict[str, Any] = {"bins": options.bins}  # what a checkpoint's weights mean

    @torch.no_grad()
    def _start_from_vocabulary(self, vlm: VLM) -> None:
        count, layer = vlm.tokenizer.vocab_size, vlm.model.get_output_embeddings()
        if layer is None or count < self.bins:
            return
        ids = torch.arange(count - 1, count - 1 - self.bins, -1)
        self.embedding.copy_(vlm.model.get_input_embeddings()(ids))
        self.output.weight.copy_(layer.weight[ids])

    def act(self, vlm: VLM, context: Context, rng: torch.Generator | None, *, greedy: bool = False) -> Acted:
        """Draw the tokens one after the other with a cache of keys and values; greedily the likeliest."""
        hidden, decoding = vlm.start(context)
        last, tokens, log_probs = hidden[:, -1], [], []
        for unit in range(self.num_units):
            log_p = self._log_p(last)
            token = (
                log_p.argmax(-1) if greedy or rng is None else torch.multinomial(log_p.exp(), 1, generator=rng)[:, 0]
            )
            tokens.append(token)
            log_probs.append(log_p.gather(1, token[:, None])[:, 0])
            if unit + 1 < self.num_units:
                last = decoding.step(self.embedding[token])
        chosen = torch.stack(tokens, 1)
        return Acted(self._fill(self.centres(chosen)), torch.stack(log_probs, 1), {"tokens": chosen})

    def score(self, vlm: VLM, context: Context, trace: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [B, U] of the traced tokens, in one pass."""
        log_p = self._teach(vlm, context, trace["tokens"])
        return log_p.gather(2, trace["tokens"][..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    def loss(
        self, vlm: VLM, context: Context, chunk: Tensor, rng: torch.Generator | None, mask: Tensor | None = None
    ) -> Tensor:
        """[B]: mean cross-entropy of the tokens of all T steps."""
        tokens = self.quantise(chunk)
        return mean_where(-self._teach(vlm, context, tokens).gather(2, tokens[..., None])[..., 0], mask)

    def retrace(self, chunk: Tensor) -> dict[str, Tensor]:
        """The trace of chunks [B, D] whose tokens are unknown."""
        return {"tokens": self.quantise(chunk)[:, : self.num_units]}

    def quantise(self, value: Tensor) -> Tensor:
        """[-1, 1] -> bins, int64."""
        return ((value + 1) / 2 * self.bins).long().clamp(0, self.bins - 1)

    def centres(self, tokens: Tensor) -> Tensor:
        """Bins -> the middle of each, in [-1, 1]."""
        return (tokens.float() + 0.5) / self.bins * 2 - 1

    def _teach(self, vlm: VLM, context: Context, tokens: Tensor) -> Tensor:
        """Log p [B, U, bins] before each of tokens [B, U]."""
        further = self.embedding[tokens[:, :-1]] if tokens.shape[1] > 1 else None
        hidden = vlm.states(context, further)[:, context.mask.shape[1] - 1 :]
        return self._log_p(hidden)

    def _log_p(self, hidden: Tensor) -> Tensor:
        return (self.output(hidden.to(self.output.weight.dtype)).float() / self.temperature).log_softmax(-1)

    def _fill(self, chunk: Tensor) -> Tensor:
        """[N, E * A] -> [N, D]: what is not executed repeats the last step."""
        steps = chunk.unflatten(1, (self.size.execute, self.size.action_dim))
        rest = steps[:, -1:].expand(-1, self.size.horizon - self.size.execute, -1)
        return torch.cat([steps, rest], 1).flatten(1)


class ParallelHead(nn.Module):
    """One learned query per step of the chunk, all in one pass; an MLP regresses the action of each.

    Imitation is an L1 regression; for reinforcement learning there is a Gaussian around it: a unit is the action vector
    of an executed step, U = E.
    """

    random_start = False

    def __init__(self, vlm: VLM, options: ParallelOptions, size: Size, *, rng: torch.Generator) -> None:
        super().__init__()
        if not 0 < options.min_std <= options.initial_std:
            raise UserError(f"0 < min_std <= initial_std is expected, given {options}")
        self.size, self.bidirectional = size, options.attention == "bidirectional"
        self.lowest = math.log(options.min_std)
        self.queries = nn.Parameter(0.02 * torch.randn(size.horizon, vlm.hidden_size, generator=rng))
        self.norm = nn.LayerNorm(vlm.hidden_size)
        self.regress = MLP(vlm.hidden_size, options.hidden, size.action_dim, rng=rng, last_gain=0.1)
        self.log_std = nn.Parameter(torch.full((size.action_dim,), math.log(options.initial_std)))
        self.num_units, self.unit_size = size.execute, size.action_dim
        self.trace_fields = {"raw": Field((size.execute * size.action_dim,))}
        self.identity: dict[str, Any] = {"hidden": list(options.hidden)}

    def act(self, vlm: VLM, context: Context, rng: torch.Generator | None, *, greedy: bool = False) -> Acted:
        """The regressed chunk, with noise on its executed steps unless greedy."""
        mean = self._mean(vlm, context)
        raw = executed = mean[:, : self.size.execute]
        if rng is not None and not greedy:
            raw = executed + self._std() * torch.randn(executed.shape, generator=rng, device=mean.device)
        log_prob = gaussian_log_prob(raw, executed, self._std())
        chunk = torch.cat([raw, mean[:, self.size.execute :]], 1).flatten(1)
        return Acted(chunk, log_prob, {"raw": raw.flatten(1)})

    def score(self, vlm: VLM, context: Context, trace: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [B, E] of the executed steps before clipping."""
        mean, std = self._mean(vlm, context)[:, : self.size.execute], self._std()
        log_prob = gaussian_log_prob(trace["raw"].view(mean.shape), mean, std)
        entropy = std.log().sum() + 0.5 * self.size.action_dim * math.log(2 * math.pi * math.e)
        return log_prob, entropy.expand(log_prob.shape)

    def loss(
        self, vlm: VLM, context: Context, chunk: Tensor, rng: torch.Generator | None, mask: Tensor | None = None
    ) -> Tensor:
        """[B]: mean absolute error over all T steps."""
        return mean_where((self._mean(vlm, context).flatten(1) - chunk).abs(), mask)

    def retrace(self, chunk: Tensor) -> dict[str, Tensor]:
        """The trace of chunks [B, D] whose raw values are unknown."""
        return {"raw": chunk[:, : self.size.execute * self.size.action_dim]}

    def _mean(self, vlm: VLM, context: Context) -> Tensor:
        queries = self.queries.expand(len(context.mask), -1, -1)
        hidden = vlm.states(context, queries, bidirectional=self.bidirectional)[:, -self.size.horizon :]
        return self.regress(self.norm(hidden.to(self.queries.dtype))).float()

    def _std(self) -> Tensor:
        return self.log_std.clamp_min(self.lowest).exp()


class FlowHead(nn.Module):
    """Flow matching from noise to chunk by an expert that attends to the hidden states of the prompt: U = S.

    The noisy step keeps the distribution of the flow, as in the agent `flow`. The trace holds the chain [S + 1, D].
    """

    def __init__(self, vlm: VLM, options: FlowOptions, size: Size, *, rng: torch.Generator) -> None:
        super().__init__()
        if options.num_steps < 1 or options.min_std <= 0 or options.width % options.num_heads:
            raise UserError(f"num_steps >= 1, min_std > 0, width a multiple of num_heads: given {options}")
        self.options, self.size = options, size
        self.random_start = options.greedy_start == "random"
        self.unit_size = size.execute * size.action_dim  # numbers that are scored: what is executed
        self.expert = Expert(vlm.hidden_size, options, size, rng=rng)
        self.num_units = options.num_steps
        self.trace_fields = {"chain": Field((options.num_steps + 1, size.horizon * size.action_dim))}
        self.identity: dict[str, Any] = {k: getattr(options, k) for k in ("width", "num_blocks", "num_heads")}

    def act(self, vlm: VLM, context: Context, rng: torch.Generator | None, *, greedy: bool = False) -> Acted:
        """Integrate from noise; greedily without further noise, and from zero where there is no rng to draw it with."""
        shape, device = (len(context.mask), self.size.horizon * self.size.action_dim), context.embeddings.device
        if rng is None or (greedy and not self.random_start):
            start = torch.zeros(shape, device=device)
        else:
            start = torch.randn(shape, generator=rng, device=device)
        return self.walk(vlm, context, start, None if greedy else rng)

    def walk(self, vlm: VLM, context: Context, x: Tensor, rng: torch.Generator | None) -> Acted:
        """Integrate from x [N, D], differentiable in it; without rng without further noise."""
        memory, mask = self.expert.read(vlm.states(context)), context.mask
        chain, log_probs = [x], []
        for index in range(self.num_units):
            step = self._step(x[:, None], memory, mask, torch.tensor([index], device=x.device))
            mean, std, quiet = (part[:, 0] for part in step[:3])
            x = quiet if rng is None else mean + std * torch.randn(mean.shape, generator=rng, device=x.device)
            chain.append(x)
            log_probs.append(gaussian_log_prob(x, mean, std, first=self.unit_size))
        return Acted(x, torch.stack(log_probs, 1), {"chain": torch.stack(chain, 1)})

    def score(self, vlm: VLM, context: Context, trace: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [B, S] of the steps of the traced chain, in one pass."""
        chain = require_chain(trace)
        index = torch.arange(self.num_units, device=chain.device)
        mean, std, *_ = self._step(chain[:, :-1], self.expert.read(vlm.states(context)), context.mask, index)
        return gaussian_log_prob(chain[:, 1:], mean, std, first=self.unit_size), entropy_of(mean, std, self.unit_size)

    def loss(
        self, vlm: VLM, context: Context, chunk: Tensor, rng: torch.Generator | None, mask: Tensor | None = None
    ) -> Tensor:
        """[B]: squared error of the velocity between noise and chunk (Lipman et al. 2022, eq. 23 at sigma 0)."""
        x, time, target = flow_target(chunk, require_rng(rng))
        memory = self.expert.read(vlm.states(context))
        error = (self.expert(x[:, None], time[:, None], memory, context.mask)[:, 0] - target).square()
        return mean_where(error, mask)

    def _step(self, x: Tensor, memory: Memory, mask: Tensor, index: Tensor) -> Step:
        """Steps number `index` [n] from x [B, n, D]: one Euler step, with and without noise."""
        o = self.options
        time = (index / o.num_steps)[None].expand(len(x), -1)
        velocity = self.expert(x, time, memory, mask)
        return flow_step(x, velocity, time, num_steps=o.num_steps, level=o.noise_level, min_std=o.min_std)


Memory = list[tuple[Tensor, Tensor]]  # keys and values [B, heads, P, W / heads] of each block


class Expert(nn.Module):
    """The velocity of noisy chunks: a small transformer whose steps attend to each other and to the prompt.

    Several points of one chain [B, n, D] share what is read from the prompt.
    """

    frequencies: Tensor

    def __init__(self, hidden_size: int, options: FlowOptions, size: Size, *, rng: torch.Generator) -> None:
        super().__init__()
        width, self.size, self.num_heads = options.width, size, options.num_heads
        self.register_buffer("frequencies", torch.logspace(0, 3, 16) * math.pi / 2, persistent=False)
        self.norm = nn.LayerNorm(hidden_size)
        self.action = linear(size.action_dim, width, rng=rng)
        self.time = MLP(2 * len(self.frequencies), (width,), width, rng=rng)
        self.place = nn.Parameter(0.02 * torch.randn(size.horizon, width, generator=rng))
        self.blocks = nn.ModuleList(ExpertBlock(width, hidden_size, rng=rng) for _ in range(options.num_blocks))
        self.last = linear(width, size.action_dim, rng=rng)

    def read(self, hidden: Tensor) -> Memory:
        """What the blocks look at, from the prompt's hidden states [B, P, H]."""
        hidden = self.norm(hidden.to(self.place.dtype))
        return [block.read(hidden, self.num_heads) for block in self.blocks]  # type: ignore[operator]

    def forward(self, x: Tensor, time: Tensor, memory: Memory, mask: Tensor) -> Tensor:
        """Velocities [B, n, D] at x [B, n, D] and time [B, n] in [0, 1]; mask [B, P]."""
        count = x.shape[1]
        angle = time[..., None] * self.frequencies
        when = self.time(torch.cat([angle.sin(), angle.cos()], -1))  # [B, n, W]
        steps = x.unflatten(-1, (self.size.horizon, self.size.action_dim))
        hidden = self.action(steps) + when[:, :, None] + self.place
        hidden = hidden.flatten(1, 2)  # [B, n * T, W]
        for block, kept in zip(self.blocks, memory, strict=True):
            hidden = block(hidden, kept, mask[:, None, None], count=count, num_heads=self.num_heads)
        return self.last(F.silu(hidden)).float().view(x.shape)


class ExpertBlock(nn.Module):
    """Attention to the prompt, attention among the steps of each chunk, MLP; each after a LayerNorm."""

    def __init__(self, width: int, hidden_size: int, *, rng: torch.Generator) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.query, self.memory = linear(width, width, rng=rng), linear(hidden_size, 2 * width, rng=rng)
        self.own = linear(width, 3 * width, rng=rng)
        self.out = nn.ModuleList(linear(width, width, rng=rng, gain=0.5) for _ in range(2))
        self.mlp = MLP(width, (2 * width,), width, rng=rng, last_gain=0.5)

    def read(self, hidden: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt's hidden states [B, P, H]."""
        keys, values = self.memory(hidden).chunk(2, -1)
        return _heads(keys, num_heads), _heads(values, num_heads)

    def forward(
        self, hidden: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor, *, count: int, num_heads: int
    ) -> Tensor:
        """[B, n * T, W] -> the same; mask [B, 1, 1, P]."""
        query = _heads(self.query(self.norms[0](hidden)), num_heads)
        seen = F.scaled_dot_product_attention(query, *memory, attn_mask=mask)
        hidden = hidden + self.out[0](seen.transpose(1, 2).flatten(2))
        steps = hidden.unflatten(1, (count, -1)).flatten(0, 1)  # [B * n, T, W]: chunks do not see each other
        q, k, v = (_heads(part, num_heads) for part in self.own(self.norms[1](steps)).chunk(3, -1))
        steps = steps + self.out[1](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden = steps.view(hidden.shape)
        return hidden + self.mlp(self.norms[2](hidden))


def _heads(x: Tensor, count: int) -> Tensor:
    """[B, L, W] -> [B, heads, L, W / heads]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


HEADS: dict[str, Any] = {
    "tokens": (TokenHead, TokenOptions),
    "parallel": (ParallelHead, ParallelOptions),
    "flow": (FlowHead, FlowOptions),
}
