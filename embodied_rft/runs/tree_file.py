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
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from embodied_rft.data import Ragged
from embodied_rft.names import UserError

FORMAT = 1


TENSORS, META, MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"


# The type names of the safetensors format, little-endian throughout.
_ARRAY_TYPES = {
    "|b1": "BOOL", "|u1": "U8", "|i1": "I8", "<i2": "I16", "<u2": "U16", "<f2": "F16", "<i4": "I32", "<u4": "U32",
    "<f4": "F32", "<i8": "I64", "<u8": "U64", "<f8": "F64", "<c8": "C64",
}  # fmt: skip


_TENSOR_TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.int64: "I64", torch.uint64: "U64", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


_ARRAY_OF = {name: code for code, name in _ARRAY_TYPES.items()}


_TENSOR_OF = {name: dtype for dtype, name in _TENSOR_TYPES.items()}


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is damaged, or could not be written; the message says which and what to do."""


def save(folder: str | Path, tree: Any) -> None:
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
        files = {
            TENSORS: _write(temporary / TENSORS, [writer.header(), *writer.leaves]),
            META: _write(temporary / META, [_json_bytes(meta)]),
        }
        _write(temporary / MANIFEST, [_json_bytes({"format": FORMAT, "files": files})])
        _sync_folder(temporary)
        replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        _sync_folder(folder.parent)
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
            _verify(folder / name, manifest["files"][name])
        meta = json.loads((folder / META).read_bytes())
        with open(folder / TENSORS, "rb") as file:
            return _Decoder(file).decode(meta["tree"])
    except CheckpointError:
        raise
    except Exception as error:  # whatever a forged file makes of the reader: sizes beyond memory, depth, wrong shapes
        raise CheckpointError(f"{folder} is not a whole checkpoint ({type(error).__name__}: {error})") from error


class _Encoder:
    """Turns a tree into JSON plus a list of flat byte arrays (views, not copies, where memory is contiguous)."""

    def __init__(self) -> None:
        self.leaves: list[np.ndarray] = []
        self.entries: dict[str, dict[str, Any]] = {}
        self.offset = 0

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
            return {"$tensor": self._add_tensor(value, path)}
        if isinstance(value, (np.ndarray, np.generic)):
            return self._encode_array(np.asarray(value), path, "$scalar" if isinstance(value, np.generic) else "$array")
        if isinstance(value, bytes):
            return {"$bytes": self._add("U8", (len(value),), np.frombuffer(value, np.uint8))}
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
        name = _ARRAY_TYPES.get(array.dtype.str)
        if name is None:
            raise UserError(f"cannot save {path.lstrip('.')}: no exact form on disk for arrays of dtype {array.dtype}")
        return {tag: self._add(name, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))}

    def _add_tensor(self, tensor: torch.Tensor, path: str) -> str:
        name = _TENSOR_TYPES.get(tensor.dtype)
        if name is None or tensor.layout is not torch.strided:
            kind = f"{tensor.layout} tensors of dtype {tensor.dtype}"
            raise UserError(f"cannot save {path.lstrip('.')}: no exact form on disk for {kind}")
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        return self._add(name, tuple(tensor.shape), flat.view(torch.uint8).numpy())

    def _add(self, name: str, shape: tuple[int, ...], data: np.ndarray) -> str:
        key = f"{len(self.leaves):06d}"
        span = [self.offset, self.offset + data.nbytes]
        self.entries[key] = {"dtype": name, "shape": list(shape), "data_offsets": span}
        self.leaves.append(data)
        self.offset += data.nbytes
        return key

    def header(self) -> np.ndarray:
        """The safetensors header: its length in 8 bytes, then JSON padded to a multiple of 8."""
        text = json.dumps(self.entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


class _Decoder:
    """The inverse of `_Encoder`: reads leaves from an open safetensors file as the tree asks for them."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        length = int.from_bytes(file.read(8), "little")
        self.entries = json.loads(file.read(length))
        self.start = 8 + length

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return {key: self.decode(item) for key, item in value.items()}
        content = value[tag]
        match tag:
            case "$tensor":
                data, name, shape = self._leaf(content)
                if not data.size:  # torch cannot view zero bytes as another type
                    return torch.empty(shape, dtype=_TENSOR_OF[name])
                return torch.from_numpy(data).view(_TENSOR_OF[name]).reshape(shape)
            case "$array" | "$scalar":
                data, name, shape = self._leaf(content)
                array = data.view(_ARRAY_OF[name]).reshape(shape)
                return array if tag == "$array" else array[()]
            case "$bytes":
                return self._leaf(content)[0].tobytes()
            case "$ragged":
                return Ragged(*(self.decode(part) for part in content))
            case "$text":
                return np.array(content, dtype=value["dtype"]).reshape(value["shape"])
            case "$tuple":
                return tuple(self.decode(item) for item in content)
            case "$dict":
                return {self.decode(key): self.decode(item) for key, item in content}
            case "$float":
                return float(content)
        raise CheckpointError(f"unknown mark {tag!r} in the checkpoint: it was written by a newer version")

    def _leaf(self, key: str) -> tuple[np.ndarray, str, list[int]]:
        """Flat uint8 bytes, safetensors type name, shape."""
        entry = self.entries[key]
        first, last = entry["data_offsets"]
        self.file.seek(self.start + first)
        return np.fromfile(self.file, dtype=np.uint8, count=last - first), entry["dtype"], entry["shape"]


def _write(path: Path, parts: list[np.ndarray]) -> dict[str, Any]:
    """Write, flush to the device, and say what was written: {"bytes": 12, "sha256": "ab..."}."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for part in parts:
            view = part.data
            file.write(view)
            digest.update(view)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _verify(path: Path, expected: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{path} is damaged: {size} bytes instead of {expected['bytes']}")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the manifest's")


def _json_bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value, allow_nan=False).encode(), np.uint8)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
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
