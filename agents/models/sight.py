"""A decoder that sees: every place of a picture is an id of its own behind the vocabulary.

So a conversation with pictures is a row of ids like any other: beginnings are shared, texts continued and tokens drawn
by the same code that reads texts, and rows share a picture only if it is the same one. Boundary: pictures and ids in,
states out; knows no template and no policy.
Legend: S places of all pictures, M rows, C tokens of each, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from embodied_rft.agents.models.feature_cache import content_key
from embodied_rft.agents.models.vlm import VLM, Shape, look_both_ways
from embodied_rft.data import Ragged
from embodied_rft.names import UserError
from embodied_rft.tokens.decoder import Decoder

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class Sight(Decoder):
    """A model that has been shown some pictures, each once; their features are computed when they are first read.

    Args:
        vlm: the model.
    """

    counts = False

    def __init__(self, vlm: VLM) -> None:
        super().__init__(vlm.decoder)
        self.vlm, self.vocabulary = vlm, int(vlm.model.get_input_embeddings().weight.shape[0])
        self.first_position, self.looks_ahead = vlm.layout.first_position, vlm.layout.blocks is not None
        self._known: dict[bytes, np.ndarray] = {}  # ids of the places of each picture, by its content
        self._pictures: list[Tensor] = []
        self._shapes: list[Shape] = []
        self._table: tuple[Tensor, ...] | None = None

    def show(self, picture: np.ndarray | Tensor) -> np.ndarray:
        """The ids of a picture's places; [H, W, 3] uint8."""
        pixels = picture if isinstance(picture, Tensor) else torch.from_numpy(np.array(picture))
        if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[-1] != 3:
            given = f"a picture of shape {tuple(pixels.shape)} and {pixels.dtype}"
            raise UserError(f"{given} was given; [H, W, 3] and uint8 is expected")
        if (ids := self._known.get(key := content_key(pixels))) is None:
            shape, self._table = self.vlm.shape_of(tuple(pixels.shape)), None
            start = self.vocabulary + sum(one.places.shape[-1] for one in self._shapes)
            ids = self._known[key] = start + np.arange(shape.places.shape[-1])
            self._pictures.append(pixels)
            self._shapes.append(shape)
        return ids

    @property
    def table(self) -> tuple[Tensor, ...]:
        """Features of all places [S, H], and what further layers add there."""
        if self._table is None:
            seen: list[Any] = [None] * len(self._pictures)
            for size in dict.fromkeys(picture.shape for picture in self._pictures):
                chosen = [i for i, picture in enumerate(self._pictures) if picture.shape == size]
                images = torch.stack([self._pictures[i] for i in chosen]).to(self.device)
                for i, features in zip(chosen, self.vlm.features(images), strict=True):
                    seen[i] = features
            width = self.vlm.model.get_input_embeddings().weight.shape[1]
            self._table = torch.cat(seen).split(width, -1)
        return self._table

    def places(self, rows: Ragged, side: Literal["left", "right"] = "right") -> tuple[np.ndarray, np.ndarray]:
        """See `Decoder`; a picture advances the text by less than its places where positions have three dimensions."""
        if not self._shapes or self._shapes[0].places.ndim == 1:
            relative, lengths = super().places(rows, side)
            return (np.broadcast_to(relative, (3, *relative.shape)), lengths) if self.vlm.three else (relative, lengths)
        inside = np.concatenate([shape.places for shape in self._shapes], 1)  # [3, S]
        step = np.zeros(inside.shape[1], np.int64)
        step[np.cumsum([shape.places.shape[1] for shape in self._shapes]) - 1] = [s.advance for s in self._shapes]
        seen = rows.values >= self.vocabulary
        at = rows.values[seen] - self.vocabulary
        steps, own = np.ones(len(seen), np.int64), np.zeros((3, len(seen)), np.int64)
        steps[seen], own[:, seen] = step[at], inside[:, at]
        total = np.append(0, np.cumsum(steps))
        begins = total[:-1] - np.repeat(total[rows.offsets[:-1]], rows.lengths)
        padded = [Ragged(part, rows.offsets).pad(0, side)[0] for part in begins + own]
        return np.stack(padded), total[rows.offsets[1:]] - total[rows.offsets[:-1]]

    def __call__(
        self, ids: Tensor, *, cache: Cache | None = None, mask: Tensor | None = None, position: Tensor | None
    ) -> Tensor:
        """See `Decoder`."""
        if self.vlm.three and position is not None and position.dim() == 2:
            position = position.expand(3, *position.shape)
        if self.looks_ahead and (cache is None or cache.get_seq_length() == 0):  # whole prompts
            blocks = self._blocks(ids)
            mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            width = self.module.get_input_embeddings().weight[0]
            mask = look_both_ways(self.module, width.expand(*ids.shape, -1), mask, blocks)
        return super().__call__(ids, cache=cache, mask=mask, position=position)

    def inputs(self, ids: Tensor) -> dict[str, object]:
        """Embeddings of tokens, features of pictures."""
        seen = ids >= self.vocabulary
        embeddings = self.vlm.model.get_input_embeddings()(ids.masked_fill(seen, 0))
        if not bool(seen.any()):
            return {"inputs_embeds": embeddings}
        at, (first, *deep) = ids[seen] - self.vocabulary, self.table
        given: dict[str, object] = {
            "inputs_embeds": embeddings.masked_scatter(seen[..., None], first[at].to(embeddings.dtype))
        }
        if not deep:
            return given
        return given | {"visual_pos_masks": seen, "deepstack_visual_embeds": [part[at] for part in deep]}

    def _blocks(self, ids: Tensor) -> Tensor:
        """[M, C]: equal numbers see each other both ways: a whole prompt, or the places of a picture."""
        if self.vlm.layout.blocks == "prompt":
            return torch.zeros_like(ids)
        seen = ids >= self.vocabulary
        firsts = torch.tensor([int(own[0]) for own in self._known.values()], device=ids.device)
        begins = torch.isin(ids, firsts) if len(firsts) else torch.zeros_like(seen)
        return torch.where(seen, begins.cumsum(1) - 1, -1)
