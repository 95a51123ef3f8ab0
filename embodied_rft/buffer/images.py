"""Images stored once: uint8 arrays keyed by a hash of their content, counted by reference, freed with the last one.

Knows arrays, not rows: whoever `put` an image `release`s it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodied_rft.data import Ragged


@dataclass(slots=True)
class _Blob:
    digest: bytes
    image: np.ndarray  # over bytes, which nobody can change
    references: int = 0


class BlobStore:
    """Content-addressed images.

    Two rows that show the same 210x160x3 screen share one blob:

        store = BlobStore()
        a, b = store.put(screen), store.put(screen.copy())     # a == b, one copy in memory
        store.release([a, b])                                  # freed
    """

    def __init__(self) -> None:
        self._blobs: dict[int, _Blob] = {}
        self._ids: dict[bytes, int] = {}
        self._next_id = 0  # never used twice: a stale reference fails instead of showing another image

    def __len__(self) -> int:
        return len(self._blobs)

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return sum(blob.image.nbytes for blob in self._blobs.values())

    def put(self, image: np.ndarray) -> int:
        """Store an image of any shape and take one reference; the same content gives the same id.

        Raises:
            ValueError: not uint8.
        """
        if image.dtype != np.uint8:
            raise ValueError(f"an image of {image.dtype} was given, expected uint8 in 0..255")
        content = image.tobytes()
        # The shape belongs to the content: 2x3 and 3x2 zeros are different images.
        digest = hashlib.blake2b(repr(image.shape).encode() + content, digest_size=16).digest()
        id = self._ids.setdefault(digest, self._next_id)
        if id == self._next_id:
            self._blobs[id] = _Blob(digest, np.frombuffer(content, np.uint8).reshape(image.shape))
            self._next_id += 1
        self._blobs[id].references += 1
        return id

    def get(self, ids: Iterable[int]) -> list[np.ndarray]:
        """The images, read-only, in the order given."""
        return [self._blob(int(id)).image for id in ids]

    def release(self, ids: Iterable[int]) -> None:
        """Give back one reference for each id; an image nobody refers to is freed."""
        for id in map(int, ids):
            blob = self._blob(id)
            blob.references -= 1
            if not blob.references:
                del self._blobs[id], self._ids[blob.digest]

    def _blob(self, id: int) -> _Blob:
        if id not in self._blobs:
            raise ValueError(f"image {id} is not stored: it was released as often as it was put")
        return self._blobs[id]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as arrays: images, ids and references."""
        blobs = self._blobs
        return {
            "next_id": self._next_id,
            "ids": np.fromiter(blobs, np.int64, len(blobs)),
            "references": np.array([b.references for b in blobs.values()], np.int64),
            "shapes": Ragged.of([b.image.shape for b in blobs.values()], dtype=np.int64),
            "bytes": Ragged.of([b.image.reshape(-1) for b in blobs.values()], dtype=np.uint8),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` gave."""
        self._blobs.clear()
        self._ids.clear()
        columns = (state["ids"], state["references"], state["shapes"], state["bytes"])
        for id, references, shape, content in zip(*columns, strict=True):
            self._next_id = int(id)
            self._blobs[self.put(content.reshape(shape))].references = int(references)
        self._next_id = int(state["next_id"])
