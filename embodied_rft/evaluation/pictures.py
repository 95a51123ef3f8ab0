"""Pictures that agents saw while they were judged: each kept once by its content, small enough for a page.

Boundary: arrays to PNG files and back; knows no episode. What is not kept is not shown, and nothing else is lost.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from embodied_rft.files import write_atomically

LARGEST_SIDE = 512  # pixels; larger ones are made smaller
MOST_FILES = 4_000  # of one run
MOST_BYTES = 64_000_000  # likewise
_DIGEST = re.compile(r"[0-9a-f]{32}")
_PNG = b"\x89PNG\r\n\x1a\n"


def reduced(picture: np.ndarray) -> np.ndarray:
    """A copy of a picture [H, W, 3] (or [H, W, 1]) uint8, no larger than `LARGEST_SIDE`."""
    from PIL import Image

    plain = picture[..., 0] if picture.shape[-1] == 1 else picture
    if max(plain.shape[:2]) <= LARGEST_SIDE:
        return plain.copy()
    image = Image.fromarray(plain)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return np.asarray(image)


def digest_of(picture: np.ndarray) -> str:
    """What a picture is called; the shape belongs to the content."""
    content = repr(picture.shape).encode() + picture.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def encode(picture: np.ndarray) -> bytes:
    """A picture of `reduced` as PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path, pictures: Mapping[str, bytes], *, room: float = 1.0) -> None:
    """Files by digest; those that are there stay, and what finds no room is left out.

    Args:
        folder: of the pictures of a run.
        pictures: PNG by digest.
        room: share of `MOST_FILES` and `MOST_BYTES` that may be used.
    """
    there = {path.stem: path.stat().st_size for path in folder.glob("[!.]*.png")}
    size = sum(there.values())
    for digest, content in pictures.items():
        fits = len(there) < room * MOST_FILES and size + len(content) <= room * MOST_BYTES
        if digest not in there and fits:
            write_atomically(folder / f"{digest}.png", content)
            there[digest] = len(content)
            size += len(content)


def data_url(folder: Path, digest: object) -> str | None:
    """A kept picture as a `data:` URL; None: it is not there, or no picture. No name leads out of the folder."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        return None
    path = folder / f"{digest}.png"
    try:
        content = path.read_bytes() if not path.is_symlink() else b""
    except OSError:
        return None
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(_PNG) else None
