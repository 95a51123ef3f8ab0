"""Features of images, computed once for each content while their tower is frozen.

Boundary: knows how images are told apart and what is kept, not what computes the features.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


def content_key(image: Tensor) -> bytes:
    """What tells an image apart from others: a hash of size and pixels."""
    shape = repr(tuple(image.shape)).encode()
    return hashlib.blake2b(shape + image.cpu().numpy().tobytes(), digest_size=16).digest()


class FeatureCache:
    """Features of images by a hash of their content, least recently used first out.

    Args:
        limit: bytes; what one batch needs is kept while it is used, whatever the limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.computed = limit, 0, 0
        self._kept: OrderedDict[tuple[bytes, bool], Tensor] = OrderedDict()

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._kept.clear()
        self.used = 0

    @torch.no_grad()
    def __call__(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(images)` [N, ...], each distinct image once."""
        low = torch.is_autocast_enabled(images.device.type)  # features of another precision are others
        keys = [(key, low) for key in map(content_key, images)]
        have = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: index for index, key in enumerate(keys) if key not in have}
        if missing:
            new = compute(images[torch.tensor(list(missing.values()), device=images.device)])
            self.computed += len(missing)
            have |= {key: value.clone() for key, value in zip(missing, new, strict=True)}
        for key in have:
            self._keep(key, have[key])
        return torch.stack([have[key] for key in keys])

    def _keep(self, key: tuple[bytes, bool], value: Tensor) -> None:
        if key not in self._kept:
            self.used += value.nbytes
        self._kept[key] = value
        self._kept.move_to_end(key)
        while self.used > self.limit and self._kept:
            self.used -= self._kept.popitem(last=False)[1].nbytes
