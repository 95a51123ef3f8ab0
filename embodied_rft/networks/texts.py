"""Texts as features that are learned: bags of hashed pieces, cheap enough for a critic of short answers.

Legend: B texts, F features.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

BUCKETS = 8192


class TextBag(nn.Module):
    """The mean vector of a text's pieces of one to three bytes, and one of the whole (Joulin et al. 2017): [B, F]."""

    __call__: Callable[..., Tensor]

    def __init__(self, size: int = 32, *, rng: torch.Generator) -> None:
        super().__init__()
        self.size = 2 * size
        self.pieces, self.wholes = (nn.EmbeddingBag(BUCKETS, size, mode="mean") for _ in range(2))
        with torch.no_grad():
            for bag in (self.pieces, self.wholes):
                bag.weight.copy_(torch.randn(bag.weight.shape, generator=rng))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """[B, F]."""
        device = self.pieces.weight.device
        found = [hashed(text.encode()) for text in texts]
        offsets = np.cumsum([0, *(len(one) for one in found[:-1])])
        pieces, starts = (torch.from_numpy(a).to(device) for a in (np.concatenate(found), offsets))
        wholes = torch.tensor([zlib.crc32(text.encode()) % BUCKETS for text in texts], device=device)
        return torch.cat([self.pieces(pieces, starts), self.wholes(wholes[:, None])], 1)


def hashed(content: bytes) -> np.ndarray:
    """Buckets of all pieces of one to three bytes; of an empty text, one."""
    one = np.frombuffer(content or b"\0", np.uint8).astype(np.uint64) + np.uint64(1)
    two = one[:-1] * np.uint64(257) + one[1:]
    three = two[:-1] * np.uint64(257) + one[2:]
    mixed = np.concatenate([one, two, three]) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(40)).astype(np.int64) % BUCKETS
