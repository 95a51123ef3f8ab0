"""Images stored once: uint8 arrays keyed by a hash of their content, counted by reference, freed with the last one.

Knows arrays and bytes, not rows: whoever `put` an image `release`s it. In memory by default; compressed or in a scratch
file on request. Also caches what is computed from an image, by the same hash.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from embodied_rft.data import Ragged

_SLOT = 512  # bytes; space in the scratch file is given out in multiples, so that freed space fits again


@dataclass(slots=True)
class _Blob:
    """One stored image; `data` is its bytes, or where they lie in the scratch file."""

    digest: bytes
    shape: tuple[int, ...]
    data: bytes | int
    size: int  # stored bytes
    references: int


class BlobStore:
    """Content-addressed images.

    Two rows that show the same 210x160x3 screen share one blob:

        store = BlobStore(compress=True)
        a, b = store.put(screen), store.put(screen.copy())     # a == b, one copy in memory
        store.release([a, b])                                  # freed

    Args:
        compress: zlib level 1; about 10 times smaller for rendered screens, 2-3 ms a megapixel more.
        folder: keep the bytes in a scratch file there instead of in memory; it vanishes with the store.
        cache_bytes: most memory for processed tensors (`cached`).
    """

    def __init__(self, *, compress: bool = False, folder: str | Path | None = None, cache_bytes: int = 2**28) -> None:
        self.compress, self.cache_bytes = compress, cache_bytes
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder, prefix="blobs-")
        self._end = 0  # of the scratch file
        self._free: dict[int, list[int]] = {}  # slots of a size to their places in the scratch file
        self._blobs: dict[int, _Blob] = {}
        self._ids: dict[bytes, int] = {}
        self._next_id = 0  # never used twice: a stale reference fails instead of showing another image
        self._cache: OrderedDict[tuple[bytes, str], Tensor] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._blobs)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all images, in memory or on disk."""
        return sum(blob.size for blob in self._blobs.values())

    def put(self, image: np.ndarray) -> int:
        """Store an image of any shape and take one reference; the same content gives the same id.

        Raises:
            ValueError: not uint8.
        """
        if image.dtype != np.uint8:
            raise ValueError(f"an image of {image.dtype} was given, expected uint8 in 0..255")
        raw = np.ascontiguousarray(image)
        digest = _digest(raw)
        id = self._ids.get(digest)
        if id is None:
            data = zlib.compress(raw.data, 1) if self.compress else raw.tobytes()
            id = self._insert(digest, image.shape, data)
        self._blobs[id].references += 1
        return id

    def get(self, ids: Iterable[int]) -> list[np.ndarray]:
        """The images, read-only, in the order given."""
        return [self._load(self._blob(int(id))) for id in ids]

    def release(self, ids: Iterable[int]) -> None:
        """Give back one reference for each id; an image nobody refers to is freed."""
        for id in map(int, ids):
            blob = self._blob(id)
            blob.references -= 1
            if not blob.references:
                del self._blobs[id], self._ids[blob.digest]
                if isinstance(blob.data, int):
                    self._free.setdefault(-(-blob.size // _SLOT), []).append(blob.data)

    def references(self, id: int) -> int:
        """How often an image is referred to; 0 if it is not stored."""
        blob = self._blobs.get(int(id))
        return 0 if blob is None else blob.references

    def cached(self, id: int, function: Callable[[np.ndarray], Tensor], *, name: str = "") -> Tensor:
        """`function(image)`, computed once while it stays in the cache (least recently used goes first).

        Only for functions that do not change, such as a frozen vision tower; `name` tells several apart.
        """
        blob = self._blob(int(id))
        key = (blob.digest, name)
        value = self._cache.get(key)
        if value is None:
            value = self._cache[key] = function(self._load(blob))
            self._cached_bytes += value.nbytes
            while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        self._cache.move_to_end(key)
        return value

    def clear_cache(self) -> None:
        """Forget all processed tensors: the function has changed."""
        self._cache.clear()
        self._cached_bytes = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything, as arrays: images in the form they are stored in, ids and references."""
        blobs = self._blobs
        return {
            "compress": self.compress,
            "next_id": self._next_id,
            "ids": np.fromiter(blobs, np.int64, len(blobs)),
            "references": np.array([b.references for b in blobs.values()], np.int64),
            "shapes": Ragged.of([b.shape for b in blobs.values()], dtype=np.int64),
            "bytes": Ragged.of([np.frombuffer(self._stored(b), np.uint8) for b in blobs.values()], dtype=np.uint8),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` gave."""
        if bool(state["compress"]) != self.compress:
            raise ValueError(f"the saved images have compress={state['compress']}, this store has {self.compress}")
        self._blobs.clear()
        self._ids.clear()
        self._free.clear()
        self._end = 0
        self.clear_cache()
        columns = (state["ids"], state["references"], state["shapes"], state["bytes"])
        for id, references, shape, data in zip(*columns, strict=True):
            stored, shape = data.tobytes(), tuple(int(n) for n in shape)
            raw = np.frombuffer(zlib.decompress(stored) if self.compress else stored, np.uint8).reshape(shape)
            self._next_id = int(id)
            self._insert(_digest(raw), shape, stored)
            self._blobs[int(id)].references = int(references)
        self._next_id = int(state["next_id"])

    # --- storage --------------------------------------------------------------------------------------------------

    def _blob(self, id: int) -> _Blob:
        if id not in self._blobs:
            raise ValueError(f"image {id} is not stored: it was released as often as it was put")
        return self._blobs[id]

    def _insert(self, digest: bytes, shape: tuple[int, ...], data: bytes) -> int:
        id = self._next_id
        place = data if self._file is None else self._write(data)
        self._blobs[id] = _Blob(digest, shape, place, len(data), 0)
        self._ids[digest] = id
        self._next_id += 1
        return id

    def _write(self, data: bytes) -> int:
        assert self._file is not None
        slots = -(-len(data) // _SLOT)
        free = self._free.get(slots)
        place = free.pop() if free else self._end
        self._end = max(self._end, place + slots * _SLOT)
        os.pwrite(self._file.fileno(), data, place)
        return place

    def _stored(self, blob: _Blob) -> bytes:
        if isinstance(blob.data, bytes):
            return blob.data
        assert self._file is not None
        return os.pread(self._file.fileno(), blob.size, blob.data)

    def _load(self, blob: _Blob) -> np.ndarray:
        data = self._stored(blob)
        return np.frombuffer(zlib.decompress(data) if self.compress else data, np.uint8).reshape(blob.shape)


@dataclass(frozen=True, slots=True)
class Images:
    """The images of B rows, as references: what a batch holds of an "images" column.

    images.row(0) is the list of images of the first row; images.cached(tower)[0] the list of its features. References
    are valid until the rows are overwritten, so read a batch before the next rows are added.
    """

    ids: Ragged  # [B] lists of ids
    store: BlobStore

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: slice | np.ndarray) -> Images:
        """Some rows."""
        return Images(self.ids.take(np.arange(len(self))[index]), self.store)

    def row(self, index: int) -> list[np.ndarray]:
        """The images of one row, read-only uint8."""
        return self.store.get(self.ids.row(index))

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        return (self.row(i) for i in range(len(self)))

    def cached(self, function: Callable[[np.ndarray], Tensor], *, name: str = "") -> list[list[Tensor]]:
        """`function` of every image, computed once for each content (see `BlobStore.cached`)."""
        return [[self.store.cached(id, function, name=name) for id in row] for row in self.ids]


def _digest(image: np.ndarray) -> bytes:
    # The shape belongs to the content: 2x3 and 3x2 zeros are different images.
    content = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    content.update(image.data)
    return content.digest()
