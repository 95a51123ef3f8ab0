"""Files that are whole or not there: written beside their place, then renamed into it; the name that a kept one had."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent  # the engine's own folder; in a checkout it lies in the root


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file so that readers see either the old or the new content, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            what = f"{error.strerror}: {path} cannot be written; what was there before is untouched"
            raise OSError(error.errno, what) from error
        raise


def given_stem(stem: str) -> str:
    """The name that a file had before a run kept it: "demos" of "demos-3f2a91c07b44"."""
    return re.sub(r"-[0-9a-f]{12}$", "", stem)


def write_json(path: str | Path, content: object) -> None:
    """A JSON file for people and machines, whole or not at all; NaN and infinities as strings."""
    write_atomically(path, json.dumps(_plain_tree(content), indent=1, allow_nan=False) + "\n")


def plain_number(value: object) -> object:
    """A metric as JSON: 0-d tensors and arrays as numbers, NaN and infinities as "NaN", "Infinity", "-Infinity"."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value


def _plain_tree(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain_tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_tree(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain_tree(value.tolist())
    return str(value) if isinstance(value, os.PathLike) else plain_number(value)
