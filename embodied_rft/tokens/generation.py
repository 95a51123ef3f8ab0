"""Batched sampling from a Hugging Face decoder: one prefill for each distinct prompt, finished rows leave.

Boundary: token ids in, token ids and log-probabilities out; knows no text (a `stop` function may) and no gradient.
Imported lazily: it needs transformers.
Legend: N rows, D distinct prompts, A rows still running, V vocabulary, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from embodied_rft.data import Ragged
from embodied_rft.tokens.decoder import Decoder
from embodied_rft.tokens.log_probs import Head
from embodied_rft.tokens.prefix import Prompts
from embodied_rft.tokens.prefix_tree import distinct_rows


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    The log-probability that is reported is that of the whole distribution at this temperature, also when top_k or
    top_p cut it: it is what a learner computes again, so that ratios start at 1 and stay finite when another token gets
    into the cut. What is learned then is the policy that samples under the cut, from its own samples; a behaviour
    correction sees no difference and changes nothing.
    """

    max_new_tokens: int = 64
    top_k: int | None = None  # only the k most likely tokens
    top_p: float | None = None  # only the most likely tokens that together have this probability
    eos: frozenset[int] = frozenset()  # tokens that end a reply; they belong to it


@dataclass(frozen=True, slots=True)
class Replies:
    """What was sampled for N prompts, e.g. Replies(ids=[[7, 1], [9, 9, 9]], log_prob=..., cut=[False, True])."""

    ids: Ragged  # N rows int64, the end token included
    log_prob: Ragged  # N rows float32
    cut: np.ndarray  # [N] bool, ended by max_new_tokens


class _Growing(DynamicLayer):
    """Keys and values of the running rows, with room for all tokens that may come: a new one copies nothing."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, room: int) -> None:
        super().__init__()
        _, heads, self.filled, size = keys.shape
        self.keys = keys.new_empty((len(rows), heads, self.filled + room, size))
        self.values = values.new_empty((len(rows), heads, self.filled + room, values.shape[-1]))
        self.keys[:, :, : self.filled] = keys[rows]
        self.values[:, :, : self.filled] = values[rows]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0


@torch.no_grad()
def generate(
    decoder: Decoder,
    head: Head,
    prompts: Ragged,
    *,
    sampling: Sampling,
    rng: torch.Generator | None,
    stop: Callable[[list[int]], bool] | None = None,
    allowed: Tensor | None = None,
) -> Replies:
    """Continue N prompts.

    Args:
        decoder: without output layer.
        head: its output layer, with the sampling temperature.
        prompts: N rows of token ids, none empty.
        sampling: how tokens are drawn.
        rng: None: always the most likely token. One generator serves all rows: the same batch gives the same replies,
            but what a row draws depends on the batch that it is in.
        stop: whether a reply, given as the ids so far, is complete; asked after every token.
        allowed: [V] bool, tokens that may be drawn (rows of the embedding that no token uses may not).
    """
    if not len(prompts):
        return Replies(Ragged.of([], dtype=np.int64), Ragged.of([], dtype=np.float32), np.zeros(0, dtype=bool))
    first, kind = distinct_rows(prompts)
    prefix = Prompts.read(decoder, prompts.take(first))
    rows = torch.from_numpy(kind).to(prefix.hidden.device)
    cache = Cache(layers=[_Growing(k, v, rows, sampling.max_new_tokens) for k, v in prefix.keys_values])
    hidden, position = prefix.hidden[:, -1][rows], prefix.following[rows]
    mask = None if prefix.mask is None else prefix.mask[rows]
    ids: list[list[int]] = [[] for _ in range(len(prompts))]
    log_probs: list[list[float]] = [[] for _ in range(len(prompts))]
    running = np.arange(len(prompts))  # rows of the batch that is computed
    open_ = np.ones(len(prompts), dtype=bool)  # of those, which are not finished
    for count in range(1, sampling.max_new_tokens + 1):
        token, log_prob = draw(head.logits(hidden), sampling, rng, allowed)
        for place, (row, one, number) in enumerate(zip(running, token.tolist(), log_prob.tolist(), strict=True)):
            if open_[place]:
                ids[row].append(one)
                log_probs[row].append(number)
                open_[place] = one not in sampling.eos and not (stop is not None and stop(ids[row]))
        if count == sampling.max_new_tokens or not open_.any():
            break
        if open_.mean() < 0.8:  # a copy of the cache costs about as much as a token: not for every row that ends
            kept = torch.from_numpy(np.flatnonzero(open_)).to(token.device)
            for layer in cache.layers:
                layer.keep(kept)  # type: ignore[union-attr]
            token, position = token[kept], position[kept]
            mask = None if mask is None else mask[kept]
            running, open_ = running[open_], open_[open_]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
        hidden = decoder(token[:, None], cache=cache, mask=mask, position=position[:, None])[:, -1]
        position = position + 1
    cut = np.zeros(len(prompts), dtype=bool)
    cut[running[open_]] = True
    return Replies(Ragged.of(ids, dtype=np.int64), Ragged.of(log_probs, dtype=np.float32), cut)


def draw(
    logits: Tensor, sampling: Sampling, rng: torch.Generator | None, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability under the whole distribution, [A] each; greedy without `rng`."""
    log_p = logits.log_softmax(-1)
    if bool(log_p[:, 0].isnan().any()):  # one such logit makes a whole row so
        raise FloatingPointError(
            "the policy's logits are NaN or infinite: its weights have left all bounds. Go on from the newest "
            "checkpoint with a lower learning rate, or with learner.clip_norm."
        )
    choice = log_p if allowed is None else log_p.masked_fill(~allowed, -torch.inf)
    if rng is None:
        token = choice.argmax(-1)
    else:
        if sampling.top_k is not None and sampling.top_k < choice.shape[-1]:
            smallest = choice.topk(sampling.top_k, dim=-1).values[:, -1:]
            choice = choice.masked_fill(choice < smallest, -torch.inf)
        if sampling.top_p is not None and sampling.top_p < 1.0:
            choice = _nucleus(choice, sampling.top_p)
        token = torch.multinomial(choice.softmax(-1), 1, generator=rng)[:, 0]
    return token, log_p.gather(1, token[:, None])[:, 0]


def _nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Only the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020, section 3.1)."""
    ordered, index = log_p.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    return log_p.masked_fill((before >= top_p).scatter(1, index, before >= top_p), -torch.inf)
