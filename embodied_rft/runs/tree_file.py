"""A nested state as a folder of three files: exact, atomic, without pickle.

`tensors.safetensors` holds all tensors, arrays and bytes, `meta.json` the tree with references into it,
`manifest.json` size and SHA-256 of the other two. It is written beside its place and renamed into it, so a folder with
the right name is whole, or its manifest says that it is not.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from embodied_rft.data import Ragged
from embodied_rft.names import UserError

FORMAT = 1
TENSORS, META, MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is damaged, or could not be written; the message says which and what to do."""


def save(folder: str | Path, tree: object) -> None:
    """Write a tree as one checkpoint folder: all of it or nothing.

    Args:
        folder: where; an older checkpoint of that name is replaced.
        tree: dicts, lists, tuples, tensors, arrays, `Ragged`, numbers of any size, strings, bytes, None, nested.

    Raises:
        ValueError: a leaf of another type; the message has its path.
        CheckpointError: the disk is full or refuses; what was there before is untouched.
    """
    folder = Path(folder)
    writer = _Encoder()
    meta = {"format": FORMAT, "tree": writer.encode(tree, "")}
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        writer.write(temporary / TENSORS)
        (temporary / META).write_text(json.dumps(meta, allow_nan=False), encoding="utf-8")
        files = {name: _seen(temporary / name) for name in (TENSORS, META)}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}), encoding="utf-8")
        for name in (TENSORS, META, MANIFEST):
            _sync(temporary / name)
        _sync(temporary)
        replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        _sync(folder.parent)
        remove(replaced)
    except OSError as error:
        remove(temporary)
        raise cannot_write(folder, sum(leaf.nbytes for leaf in writer.leaves), error) from error
    except BaseException:
        remove(temporary)
        raise


def load(folder: str | Path) -> Any:
    """The tree that `save` wrote, bit for bit, after checking every byte against the manifest.

    Tensors come back on the CPU, arrays writable. Raises CheckpointError if anything is missing or differs.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {manifest['format']}, this version reads {FORMAT}")
        for name in (TENSORS, META):
            seen, told = _seen(folder / name), manifest["files"][name]
            if seen["bytes"] != told["bytes"]:
                raise CheckpointError(f"{folder / name} is damaged: {seen['bytes']} bytes instead of {told['bytes']}")
            if seen != told:
                raise CheckpointError(f"{folder / name} is damaged: its SHA-256 differs from the manifest's")
        meta = json.loads((folder / META).read_bytes())
        with safe_open(folder / TENSORS, framework="pt") as file:
            return _decode(meta["tree"], file)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a forged file makes of the reader: sizes beyond memory, depth, wrong shapes
        raise CheckpointError(f"{folder} is not a whole checkpoint ({type(error).__name__}: {error})") from error


class _Encoder:
    """Turns a tree into JSON plus flat tensors (views, not copies, where memory is contiguous)."""

    def __init__(self) -> None:
        self.leaves: list[torch.Tensor] = []
        self.specs: dict[str, TensorSpec] = {}

    def encode(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, Mapping):
            return self._encode_mapping(value, path)
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, f"{path}.{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._add(value, path)}
        if isinstance(value, (np.ndarray, np.generic)):
            return self._encode_array(np.asarray(value), path, "$scalar" if isinstance(value, np.generic) else "$array")
        if isinstance(value, bytes):
            return {"$bytes": self._add_array(np.frombuffer(value, np.uint8), path)}
        if isinstance(value, Ragged):
            return {"$ragged": [self.encode(part, path) for part in (value.values, value.offsets)]}
        raise UserError(
            f"cannot save {path.lstrip('.') or 'the state'}: a {type(value).__name__} is neither tensor, array, "
            "number, text, bytes, list nor dict. Return plain data from state_dict()."
        )

    def _encode_mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        plain = all(type(key) is str and not key.startswith("$") for key in value)
        items = [(key, self.encode(item, f"{path}.{key}")) for key, item in value.items()]
        return dict(items) if plain else {"$dict": [[self.encode(key, path), item] for key, item in items]}

    def _encode_array(self, array: np.ndarray, path: str, tag: str) -> Any:
        if array.dtype.kind == "U":
            return {"$text": array.reshape(-1).tolist(), "shape": list(array.shape), "dtype": array.dtype.str}
        return {tag: self._add_array(array, path)}

    def _add_array(self, array: np.ndarray, path: str) -> str:
        try:
            # Memory that may not be written to is copied: a tensor over it could be.
            tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        except (TypeError, ValueError):  # torch knows no such numbers
            raise _no_form(path, f"arrays of dtype {array.dtype}") from None
        return self._add(tensor, path)

    def _add(self, tensor: torch.Tensor, path: str) -> str:
        key, what = f"{len(self.leaves):06d}", f"{tensor.layout} tensors of dtype {tensor.dtype}"
        if tensor.layout is not torch.strided:
            raise _no_form(path, what)
        leaf = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        name, shape = str(leaf.dtype).removeprefix("torch."), list(leaf.shape)
        try:
            self.specs[key] = TensorSpec(dtype=name, shape=shape, data_ptr=leaf.data_ptr(), data_len=leaf.nbytes)
        except (SafetensorError, ValueError):
            raise _no_form(path, what) from None
        self.leaves.append(leaf)  # its memory is read when all is written
        return key

    def write(self, path: Path) -> None:
        """All leaves as one safetensors file; not by `safetensors.torch.save_file`, which refuses tied weights."""
        try:
            serialize_file(self.specs, path)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        path.chmod(0o644)


def _decode(value: Any, file: Any) -> Any:
    """The inverse of `_Encoder.encode`; leaves are copied from an open safetensors file as the tree asks for them."""
    if isinstance(value, list):
        return [_decode(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decode(item, file) for key, item in value.items()}
    content = value[tag]
    match tag:
        case "$tensor":
            return file.get_tensor(content).clone()
        case "$array":
            return file.get_tensor(content).clone().numpy()
        case "$scalar":
            return file.get_tensor(content).numpy()[()]
        case "$bytes":
            return file.get_tensor(content).numpy().tobytes()
        case "$ragged":
            return Ragged(*(_decode(part, file) for part in content))
        case "$text":
            return np.array(content, dtype=value["dtype"]).reshape(value["shape"])
        case "$tuple":
            return tuple(_decode(item, file) for item in content)
        case "$dict":
            return {_decode(key, file): _decode(item, file) for key, item in content}
        case "$float":
            return float(content)
    raise CheckpointError(f"unknown mark {tag!r} in the checkpoint: it was written by a newer version")


def _no_form(path: str, what: str) -> UserError:
    return UserError(f"cannot save {path.lstrip('.')}: no exact form on disk for {what}")


def _seen(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: {"bytes": 12, "sha256": "ab..."}."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """A file's content, or a folder's names, to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """A folder and all in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def cannot_write(folder: Path, needed: int, error: OSError) -> CheckpointError:
    """What to say when the disk refuses."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    try:
        free = f", {shutil.disk_usage(folder.parent).free / 1e6:,.1f} MB are free"
    except OSError:
        free = ""
    hint = f"It needs {needed / 1e6:,.1f} MB{free}. Make room and run the same command again. " if full else ""
    return CheckpointError(f"could not write checkpoint {folder}: {error.strerror}. {hint}Earlier ones are untouched.")
