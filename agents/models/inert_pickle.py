"""Reads the data of a pickle without running anything of it: arrays, numbers, texts and containers come out as they are

Every class or function that a pickle names becomes an `Inert` stand-in, which keeps what it was given and does nothing,
except NumPy's constructors of arrays and the plain containers. Boundary: bytes in, data out; knows no file format.
"""

from __future__ import annotations

import collections
import io
import pickle
from typing import Any

import numpy as np

from embodied_rft.names import UserError

_ARRAYS = {"_reconstruct", "scalar", "_frombuffer", "ndarray", "dtype"}  # of numpy's modules, whatever they are called
_CONTAINERS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset, bytearray, bytes, complex)},
}


class Inert:
    """Stands for an object of a pickle. `name` is its class ("gymnasium.spaces.box.Box"), `state` its attributes."""

    name = ""
    arguments: tuple[Any, ...] = ()

    def __new__(cls, *arguments: Any, **_: Any) -> Inert:
        """Keeps the arguments."""
        made = super().__new__(cls)
        made.state, made.arguments = {}, arguments
        return made

    def __init__(self, *_: object, **__: object) -> None:
        self.state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        """Keeps the attributes; a pair is (dict, slots)."""
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.state.update(part)

    def __call__(self, *_: object, **__: object) -> Inert:
        """Nothing happens."""
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of a container class."""
        self.state[key] = value

    def append(self, _: object) -> None:
        """Items of a list class are not kept."""

    def extend(self, _: object) -> None:
        """Items of a list class are not kept."""

    def __hash__(self) -> int:
        return id(self)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a pickle means by a name: a stand-in, or one of the few constructors of plain data."""
        if module.partition(".")[0] == "numpy" and name in _ARRAYS:
            return _numpy(name)
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if (module, name) == ("copyreg", "_reconstructor"):
            return lambda cls, *_: cls()
        if (module, name) == ("_codecs", "encode"):  # how old protocols write bytes
            return lambda text, _: str(text).encode("latin1")
        return type(name, (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """Refused: it would point outside the file."""
        raise pickle.UnpicklingError(f"it points to something outside the file ({pid!r})")


def _numpy(name: str) -> Any:
    if name in ("ndarray", "dtype"):
        return getattr(np, name)
    from numpy._core import multiarray, numeric

    return getattr(numeric if name == "_frombuffer" else multiarray, name)


def read(data: bytes) -> Any:
    """The object that a pickle holds, with `Inert` in place of everything that is not plain data.

    Raises:
        ValueError: it is no pickle, damaged, or not readable in this way.
    """
    try:
        return _Reader(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"not a readable pickle ({type(error).__name__}: {error})") from None
