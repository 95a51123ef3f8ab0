"""Hidden states of replies with every shared beginning computed once, gradients included.

A beginning (`prefix_tree`) runs once; its keys and values are handed to all texts that continue it, which run as a
batch, and so on down the tree. This works with any Hugging Face decoder that takes `past_key_values`, needs no special
kernel, and equals the dense computation up to rounding. Boundary: turns token ids into hidden states; knows no loss and
no sampling. Imported lazily: it needs transformers.
Legend: D beginnings, M continuations, P and C tokens of them, H hidden size, K key-value heads, E head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from embodied_rft.data import Ragged
from embodied_rft.names import UserError
from embodied_rft.tokens.decoder import Decoder, at
from embodied_rft.tokens.prefix_tree import (
    OVERHEAD,
    Pass,
    Tree,
    Usage,
    buckets,
    computed,
    distinct_rows,
    padded_tokens,
    passes,
    prefix_tree,
    prompt_tree,
    spans_of,
)


class Recorder(DynamicLayer):
    """Keeps the keys and values [D, K, P, E] of one layer of the prompt pass, with their gradients."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """See transformers' `CacheLayerMixin`."""
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_seq_length(self) -> int:
        """See transformers' `CacheLayerMixin`."""
        return 0  # the mask of the prompt pass starts at the first token, also when a layer is computed again


class Beginning(DynamicLayer):
    """Puts the prompts' keys and values before those of the replies; a call leaves nothing that a later one reads.

    So gradient checkpointing may run a layer twice.
    """

    whole: tuple[Tensor, Tensor]  # what a layer saw, [M, K, P + C, E] each, if it is to be kept

    def __init__(
        self, keys: Tensor, values: Tensor, member_of: Tensor | None, count: int, *, keep: bool = False
    ) -> None:
        super().__init__()
        self.keep = keep
        self.prompt, self.member_of, self.count = (keys, values), member_of, count
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """See transformers' `CacheLayerMixin`."""
        keys, values = (self._for_members(part) for part in self.prompt)
        whole = torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
        if self.keep:
            self.whole = whole
        return whole

    def _for_members(self, part: Tensor) -> Tensor:
        if self.member_of is not None:
            return part.index_select(0, self.member_of)
        each = self.count // len(part)  # equal groups, in order: a view whose gradient is a plain sum
        return part[:, None].expand(-1, each, -1, -1, -1).flatten(0, 1)

    def get_seq_length(self) -> int:
        """See transformers' `CacheLayerMixin`."""
        return self.prompt[0].shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See transformers' `CacheLayerMixin`."""
        return self.get_seq_length() + query_length, 0


class Prompts:
    """D texts that a decoder has read: the keys and values of every layer, for whatever continues them."""

    hidden: Tensor  # [D, P, H] last states of the tokens read last

    def __init__(self, decoder: Decoder, lengths: np.ndarray, following: Tensor) -> None:
        self.decoder = decoder
        self.lengths = lengths  # [D]
        self.following = following  # [D] the position of what follows
        self.mask: Tensor | None = None  # [D, P] bool, False at padding, which is on the left; None: there is none
        self.keys_values: list[tuple[Tensor, Tensor]] = []  # of every layer, [D, K, P, E] each

    @classmethod
    def read(cls, decoder: Decoder, prompts: Ragged) -> Prompts:
        """D rows of token ids, none empty; `hidden` is padded on the left."""
        lengths = prompts.lengths
        if not lengths.all():
            raise UserError("an empty prompt has no state to predict the first token from; begin it with a bos token")
        ids, mask = (torch.from_numpy(a).to(decoder.device) for a in prompts.pad(0, "left"))
        relative, whole = decoder.places(prompts, "left")
        start = torch.full((len(prompts),), decoder.first_position, device=decoder.device)
        new = cls(decoder, lengths, start + torch.from_numpy(whole).to(start))
        new.mask = None if bool((lengths == lengths[0]).all()) else mask
        layers: list[Any] = [Recorder() for _ in range(decoder.num_layers)]
        new.hidden = decoder(ids, cache=Cache(layers=layers), mask=new.mask, position=at(start, relative))
        new.keys_values = [(layer.keys, layer.values) for layer in layers]
        return new

    def continue_with(self, replies: Ragged, member_of: np.ndarray) -> Tensor:
        """[M, C, H] hidden states of reply tokens after their prompts; padded on the right.

        Args:
            replies: M rows of token ids.
            member_of: [M] which prompt each reply continues.
        """
        counts = np.bincount(member_of, minlength=len(self.lengths))
        regular = bool((np.diff(member_of) >= 0).all()) and bool((counts == counts[0]).all())
        members, width = int(counts[0]), int(replies.lengths.max())
        if regular and 1 < members * width <= self.keys_values[0][0].shape[-2] and self.decoder.takes_any_mask:
            return self._as_one_row(replies, members)
        member = torch.from_numpy(member_of).to(self.following.device)
        layers = [Beginning(*part, None if regular else member, len(member_of)) for part in self.keys_values]
        return self._run(replies, member, layers)

    def extend(self, texts: Ragged, member_of: np.ndarray) -> Prompts:
        """The same, with the M longer texts as what further texts may continue; its `hidden` is padded on the right."""
        member = torch.from_numpy(member_of).to(self.following.device)
        layers = [Beginning(*part, member, len(member_of), keep=True) for part in self.keys_values]
        whole = torch.from_numpy(self.decoder.places(texts)[1]).to(member)
        new = Prompts(self.decoder, self.lengths[member_of] + texts.lengths, self.following[member] + whole)
        new.hidden = self._run(texts, member, layers)
        own = torch.from_numpy(texts.pad()[1]).to(member.device)
        before = own.new_ones((len(own), layers[0].get_seq_length())) if self.mask is None else self.mask[member]
        real = torch.cat([before, own], dim=1)  # [M, P + C]
        width = int(new.lengths.max())
        order = real.to(torch.int8).argsort(dim=1, stable=True)[:, -width:]  # real tokens last, in their order
        new.mask = None if bool(real.all()) else real.gather(1, order)
        index = order[:, None, :, None]
        new.keys_values = [
            (k.gather(2, index.expand(-1, k.shape[1], -1, k.shape[3])),
             v.gather(2, index.expand(-1, v.shape[1], -1, v.shape[3])))
            for k, v in (layer.whole for layer in layers)
        ]  # fmt: skip
        return new

    def _run(self, replies: Ragged, member: Tensor, layers: list[Any]) -> Tensor:
        ids = torch.from_numpy(replies.pad(0)[0]).to(member.device)
        mask = None
        if self.mask is not None:  # padding on the right needs no mask: nothing looks back at it
            mask = torch.cat([self.mask[member], torch.ones_like(ids, dtype=torch.bool)], dim=1)
        position = at(self.following[member], self.decoder.places(replies)[0])
        return self.decoder(ids, cache=Cache(layers=layers), mask=mask, position=position)

    def _as_one_row(self, replies: Ragged, members: int) -> Tensor:
        """The members of a group one after the other in one row, each seeing only itself and the prompt.

        The prompt's keys are then read as they are, not copied for each member. That pays while a group's replies
        together are not longer than its prompt: attention between members is computed and thrown away.
        """
        padded, _ = replies.pad(0)
        width, num_prompts = padded.shape[1], len(self.lengths)
        ids = torch.from_numpy(padded).to(self.following.device).view(num_prompts, members * width)
        place = torch.arange(members * width, device=ids.device)
        own = (place[:, None] >= place) & (place[:, None] // width == place // width)
        past = self.keys_values[0][0].shape[-2]
        before = own.new_ones((num_prompts, past)) if self.mask is None else self.mask
        mask = torch.cat(
            [before[:, None, None].expand(-1, 1, len(own), -1), own.expand(num_prompts, 1, -1, -1)], dim=-1
        )
        layers: list[Any] = [Beginning(keys, values, None, num_prompts) for keys, values in self.keys_values]
        relative = self.decoder.places(replies)[0]
        position = at(self.following, relative.reshape(*relative.shape[:-2], *ids.shape))
        hidden = self.decoder(ids, cache=Cache(layers=layers), mask=mask, position=position)
        return hidden.view(len(replies), width, -1)


def reply_states(
    decoder: Decoder,
    prompts: Ragged,
    replies: Ragged,
    *,
    share: bool = True,
    overhead: float = OVERHEAD,
    usage: Usage | None = None,
) -> Tensor:
    """[sum of reply lengths, H]: the state from which each reply token is predicted, in the order of `replies.values`.

    What rows share at their beginning is computed once, and only rows of similar length are padded to one another.

    Args:
        decoder: computes them.
        prompts: B rows of token ids, none empty.
        replies: B rows of token ids; empty ones have no state.
        share: False computes every row by itself (for comparison).
        overhead: cost of a further call of the decoder, in tokens.
        usage: counts the tokens.
    """
    if not prompts.lengths.all():
        raise UserError("an empty prompt has no state to predict the first token from; begin it with a bos token")
    answered = np.flatnonzero(replies.lengths > 0)
    if not len(answered):
        return torch.zeros((0, decoder.hidden_size), device=decoder.device)
    asked = prompts.take(answered)
    sequences = computed(asked, replies.take(answered))
    if decoder.looks_ahead:
        tree = prompt_tree(asked, sequences, share=share)
    else:
        tree = prefix_tree(sequences, share=share, overhead=overhead)
    plan = passes(tree, overhead=overhead)
    if usage is not None:
        usage.useful += tree.distinct
        usage.computed += padded_tokens(tree, plan)
    spans = spans_of(tree, prompts.lengths[answered] - 1, replies.lengths[answered], replies.offsets[answered])
    read: list[Prompts | None] = []  # by pass
    states, places = [], []
    for one in plan:
        tokens = tree.tokens(sequences, one.nodes)
        hidden, known, shift = _compute(decoder, tokens, one, tree, plan, read)
        read.append(known)
        index, place = spans.inside(one.nodes, hidden.shape[1], shift)
        if len(place):
            states.append(hidden.flatten(0, 1)[torch.from_numpy(index).to(hidden.device)])
            places.append(place)
    inverse = np.argsort(np.concatenate(places), kind="stable")
    if len(states) == 1 and bool((np.diff(inverse) == 1).all()):
        return states[0]
    return torch.cat(states)[torch.from_numpy(inverse).to(decoder.device)]


def _compute(
    decoder: Decoder, tokens: Ragged, one: Pass, tree: Tree, plan: list[Pass], read: list[Any]
) -> tuple[Tensor, Prompts | None, np.ndarray]:
    """A pass: (hidden [M, C, H], what others may continue, in which column each row begins [M])."""
    begin = np.zeros(len(tokens), dtype=np.int64)
    if one.after is None and not one.branches:
        return _dense(decoder, tokens), None, begin
    if one.after is None:
        known = Prompts.read(decoder, tokens)
        return known.hidden, known, tokens.lengths.max() - tokens.lengths
    place = np.argsort(plan[one.after].nodes)
    member = place[np.searchsorted(plan[one.after].nodes, tree.parent[one.nodes], sorter=place)]
    if not one.branches:
        return read[one.after].continue_with(tokens, member), None, begin
    known = read[one.after].extend(tokens, member)
    return known.hidden, known, begin


def prompt_states(decoder: Decoder, prompts: Ragged, *, overhead: float = OVERHEAD) -> Tensor:
    """[B, H]: the last state of every prompt, each distinct one computed once."""
    first, kind = distinct_rows(prompts)
    parts = [np.sort(rows) for rows in buckets(prompts.lengths[first], overhead=overhead)]
    states = []
    for rows in parts:
        hidden = _dense(decoder, prompts.take(first[rows]))
        last = torch.from_numpy(prompts.lengths[first[rows]] - 1).to(hidden.device)
        states.append(hidden[torch.arange(len(last), device=last.device), last])
    inverse = np.argsort(np.concatenate(parts), kind="stable")[kind]
    return torch.cat(states)[torch.from_numpy(inverse).to(states[0].device)]


def _dense(decoder: Decoder, texts: Ragged) -> Tensor:
    """[M, P, H], padded on the right, which needs no mask: nothing looks back at it."""
    ids = torch.from_numpy(texts.pad(0)[0]).to(decoder.device)
    if decoder.counts:
        return decoder(ids, position=None)
    start = torch.full((len(texts),), decoder.first_position, device=decoder.device)
    return decoder(ids, position=at(start, decoder.places(texts)[0]))
