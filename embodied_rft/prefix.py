"""Hidden states of replies with each distinct prompt computed once, gradients included.

The prompt runs once; its keys and values are handed to every reply that continues it, and the replies run as a batch.
This works with any Hugging Face decoder that takes `past_key_values`, needs no special kernel, and equals the dense
computation up to rounding. Boundary: turns token ids into hidden states; knows no loss and no sampling. Imported
lazily: it needs transformers.
Legend: D distinct prompts, M replies, P prompt tokens, C reply tokens, H hidden size, K key-value heads, E head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from embodied_rft.data import Ragged
from embodied_rft.packing import buckets, distinct_rows


class _Recorder(DynamicLayer):
    """Keeps the keys and values [D, K, P, E] of one layer of the prompt pass, with their gradients."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0  # the mask of the prompt pass starts at the first token, also when a layer is computed again


class _Prefix(DynamicLayer):
    """Puts the prompts' keys and values before those of the replies; holds no state of its own.

    Stateless, so that gradient checkpointing may run a layer twice.
    """

    def __init__(self, keys: Tensor, values: Tensor, member_of: Tensor | None, count: int) -> None:
        super().__init__()
        self.prompt, self.member_of, self.count = (keys, values), member_of, count
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (self._for_members(part) for part in self.prompt)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def _for_members(self, part: Tensor) -> Tensor:
        if self.member_of is not None:
            return part.index_select(0, self.member_of)
        each = self.count // len(part)  # equal groups, in order: a view whose gradient is a plain sum
        return part[:, None].expand(-1, each, -1, -1, -1).flatten(0, 1)

    def get_seq_length(self) -> int:
        return self.prompt[0].shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class Prompts:
    """D prompts after one pass of the decoder: last hidden states and the keys and values of every layer."""

    def __init__(self, decoder: nn.Module, prompts: Ragged, *, num_layers: int) -> None:
        self.decoder = decoder
        device = next(decoder.parameters()).device
        lengths = prompts.lengths
        if not lengths.all():
            raise ValueError("an empty prompt has no state to predict the first token from; begin it with a bos token")
        ids, mask = (torch.from_numpy(a).to(device) for a in prompts.pad(0, "left"))
        self.mask = None if bool((lengths == lengths[0]).all()) else mask  # [D, P]
        self.lengths = torch.from_numpy(lengths).to(device)  # [D]
        layers: list[Any] = [_Recorder() for _ in range(num_layers)]
        position = torch.arange(ids.shape[1], device=device) + (self.lengths - ids.shape[1])[:, None]
        self.hidden = run(decoder, ids, cache=Cache(layers=layers), mask=self.mask, position=position)
        self.keys_values = [(layer.keys, layer.values) for layer in layers]

    def continue_with(self, replies: Ragged, member_of: np.ndarray) -> Tensor:
        """[M, C, H] hidden states of reply tokens after their prompts; padded on the right.

        Args:
            replies: M rows of token ids.
            member_of: [M] which prompt each reply continues.
        """
        device = self.lengths.device
        member = torch.from_numpy(member_of).to(device)
        counts = np.bincount(member_of, minlength=len(self.lengths))
        regular = bool((np.diff(member_of) >= 0).all()) and bool((counts == counts[0]).all())
        members, width = int(counts[0]), int(replies.lengths.max())
        if regular and 1 < members * width <= self.keys_values[0][0].shape[-2] and self._takes_any_mask():
            return self._as_one_row(replies, members)
        layers: list[Any] = [
            _Prefix(keys, values, None if regular else member, len(member_of)) for keys, values in self.keys_values
        ]
        padded, _ = replies.pad(0)
        ids = torch.from_numpy(padded).to(device)
        mask = None
        if self.mask is not None:  # padding on the right needs no mask: nothing looks back at it
            mask = torch.cat([self.mask[member], torch.ones_like(ids, dtype=torch.bool)], dim=1)
        position = self.lengths[member][:, None] + torch.arange(ids.shape[1], device=device)
        return run(self.decoder, ids, cache=Cache(layers=layers), mask=mask, position=position)

    def _takes_any_mask(self) -> bool:
        config: Any = self.decoder.config
        plain = "sliding_attention" not in (getattr(config, "layer_types", None) or ())
        return plain and config._attn_implementation == "sdpa"  # takes masks of bool [rows, 1, tokens, past + tokens]

    def _as_one_row(self, replies: Ragged, members: int) -> Tensor:
        """The members of a group one after the other in one row, each seeing only itself and the prompt.

        The prompt's keys are then read as they are, not copied for each member. That pays while a group's replies
        together are not longer than its prompt: attention between members is computed and thrown away.
        """
        padded, _ = replies.pad(0)
        width, num_prompts = padded.shape[1], len(self.lengths)
        ids = torch.from_numpy(padded).to(self.lengths.device).view(num_prompts, members * width)
        place = torch.arange(members * width, device=ids.device)
        own = (place[:, None] >= place) & (place[:, None] // width == place // width)
        past = self.keys_values[0][0].shape[-2]
        before = own.new_ones((num_prompts, past)) if self.mask is None else self.mask
        mask = torch.cat(
            [before[:, None, None].expand(-1, 1, len(own), -1), own.expand(num_prompts, 1, -1, -1)], dim=-1
        )
        layers: list[Any] = [_Prefix(keys, values, None, num_prompts) for keys, values in self.keys_values]
        position = self.lengths[:, None] + place % width
        hidden = run(self.decoder, ids, cache=Cache(layers=layers), mask=mask, position=position)
        return hidden.view(len(replies), width, -1)


def run(
    decoder: nn.Module, ids: Tensor, *, cache: Cache | None, mask: Tensor | None, position: Tensor | None
) -> Tensor:
    """[rows, tokens, H]: the decoder's last hidden states.

    Args:
        decoder: a Hugging Face model without its output layer.
        ids: [rows, tokens] token ids.
        cache: keys and values that come before, and where new ones go.
        mask: [rows, past + tokens] bool, False at padding, or [rows, 1, tokens, past + tokens]; None: nothing is padded
            on the left.
        position: [rows, tokens] of the tokens in their text, negative at padding; None: 0, 1, ...
    """
    if position is not None:
        position = position.clamp_min(0)
    # use_cache only asks for a cache when none is given, and checkpointing of layers refuses it.
    output = decoder(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=False)
    return output.last_hidden_state


def reply_states(
    decoder: nn.Module, prompts: Ragged, replies: Ragged, *, num_layers: int, share: bool = True, overhead: float = 24.0
) -> Tensor:
    """[sum of reply lengths, H]: the state from which each reply token is predicted, in the order of `replies.values`.

    Rows whose prompt appears once run densely; rows that share a prompt run behind it. Either way only rows of similar
    length are padded to one another.

    Args:
        decoder: a Hugging Face decoder without its output layer.
        prompts: B rows of token ids, none empty.
        replies: B rows of token ids; empty ones have no state.
        num_layers: of the decoder.
        share: False computes every prompt as often as it appears (for comparison).
        overhead: cost of a further call of the decoder, in tokens.
    """
    device = next(decoder.parameters()).device
    first, kind, shared = _plan(prompts, replies, share, overhead)
    states: list[Tensor] = []
    places: list[np.ndarray] = []
    for rows in _split(np.flatnonzero((replies.lengths > 0) & ~shared), prompts.lengths + replies.lengths, overhead):
        states.append(_dense(decoder, prompts.take(rows), replies.take(rows)))
        places.append(_places(replies, rows))
    wanted = np.unique(kind[shared])
    for group in _split(wanted, prompts.lengths[first], overhead):
        prefix = Prompts(decoder, prompts.take(first[group]), num_layers=num_layers)
        member = np.flatnonzero(shared & np.isin(kind, group))
        member = member[np.argsort(kind[member], kind="stable")]
        number = np.searchsorted(group, kind[member])
        states.append(prefix.hidden[:, -1][torch.from_numpy(number).to(device)])
        places.append(replies.offsets[member])
        for part in _split(np.arange(len(member)), replies.lengths[member] - 1, overhead):
            part = part[np.argsort(number[part], kind="stable")]
            rows = member[part]
            lengths = replies.lengths[rows] - 1  # the last token predicts nothing that is scored
            if lengths.max() == 0:
                continue
            inputs = Ragged.of([replies.row(row)[:-1] for row in rows], dtype=np.int64)
            hidden = prefix.continue_with(inputs, number[part])
            states.append(hidden[torch.from_numpy(inputs.pad()[1]).to(device)])
            places.append(_places(replies, rows, skip=1))
    if not states:
        return torch.zeros((0, decoder.config.hidden_size), device=device)  # type: ignore[union-attr, arg-type]
    if len(states) == 1 and np.all(np.diff(places[0]) == 1):
        return states[0]
    inverse = np.argsort(np.concatenate(places), kind="stable")
    return torch.cat(states)[torch.from_numpy(inverse).to(device)]


def _plan(prompts: Ragged, replies: Ragged, share: bool, overhead: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a row of each distinct prompt [D], the prompt of every row [B], which rows share theirs [B] bool)."""
    first, kind = distinct_rows(prompts)
    answered = replies.lengths > 0
    counts = np.bincount(kind[answered], minlength=len(first))
    shared = answered & (counts[kind] > 1) & share
    saved = (np.maximum(counts - 1, 0) * prompts.lengths[first]).sum()
    if saved <= 2 * overhead:  # two more calls of the decoder cost more than they save
        shared[:] = False
    return first, kind, shared


def prompt_states(decoder: nn.Module, prompts: Ragged, *, overhead: float = 24.0) -> Tensor:
    """[B, H]: the last state of every prompt, each distinct one computed once."""
    device = next(decoder.parameters()).device
    first, kind = distinct_rows(prompts)
    parts = _split(np.arange(len(first)), prompts.lengths[first], overhead)
    nothing = Ragged.of([[0]] * len(first), dtype=np.int64)
    states = [_dense(decoder, prompts.take(first[rows]), nothing.take(rows)) for rows in parts]
    inverse = np.argsort(np.concatenate(parts), kind="stable")[kind]
    return torch.cat(states)[torch.from_numpy(inverse).to(device)]


def _dense(decoder: nn.Module, prompts: Ragged, replies: Ragged) -> Tensor:
    """States of the rows' reply tokens, prompt and reply computed together, padded on the right."""
    device = next(decoder.parameters()).device
    both = Ragged.of([np.concatenate([p, r[:-1]]) for p, r in zip(prompts, replies, strict=True)], dtype=np.int64)
    ids, mask = both.pad()
    position = np.arange(ids.shape[1])[None, :]
    scored = mask & (position >= prompts.lengths[:, None] - 1)
    hidden = run(decoder, torch.from_numpy(ids).to(device), cache=None, mask=None, position=None)
    return hidden[torch.from_numpy(scored).to(device)]


def _split(rows: np.ndarray, lengths: np.ndarray, overhead: float) -> list[np.ndarray]:
    return [np.sort(rows[part]) for part in buckets(lengths[rows], overhead=overhead)]


def _places(replies: Ragged, rows: np.ndarray, *, skip: int = 0) -> np.ndarray:
    """Where the tokens of these rows, without the first `skip`, lie in `replies.values`."""
    return np.concatenate([np.arange(replies.offsets[row] + skip, replies.offsets[row + 1]) for row in rows])


def computed_tokens(prompts: Ragged, replies: Ragged, *, share: bool = True, overhead: float = 24.0) -> int:
    """Tokens that `reply_states` sends through the decoder, padding included."""
    first, kind, shared = _plan(prompts, replies, share, overhead)
    dense = prompts.lengths + replies.lengths - 1
    rows = np.flatnonzero((replies.lengths > 0) & ~shared)
    total = sum(len(part) * int(dense[part].max()) for part in _split(rows, dense, overhead))
    for group in _split(np.unique(kind[shared]), prompts.lengths[first], overhead):
        total += len(group) * int(prompts.lengths[first[group]].max())
        member = np.flatnonzero(shared & np.isin(kind, group))
        for part in _split(member, replies.lengths - 1, overhead):
            total += len(part) * int((replies.lengths[part] - 1).max())
    return total
