"""Does an option do anything? Every option of a declaration, another legal value for it, and a print of a whole run.

`Walk.examine` sets one option and runs: the run must print differently, or be refused. An option that is refused alone,
because it needs others, must print differently beside those.
"""

import dataclasses
import hashlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from pydantic.fields import FieldInfo
from torch.utils._python_dispatch import TorchDispatchMode

from embodied_rft.data import Ragged
from embodied_rft.names import UserError
from embodied_rft.options import to_key, to_plain
from embodied_rft.runs import catalogue

REQUIRED = dataclasses.MISSING
ELSEWHERE = {"LearnerConfig", "EnvConfig", "BufferConfig", "LogConfig"}  # walked on their own


@dataclasses.dataclass(frozen=True)
class Option:
    """Option("selection.best_of", int | None, None, SelectionClass): `declared` is the first class that has it."""

    name: str
    hint: Any
    default: Any
    declared: Any


def options_of(config: Any, prefix: str = "") -> list[Option]:
    """Every option of a dataclass, those of dataclasses inside it under dotted names."""
    hints, found = typing.get_type_hints(config, include_extras=True), []
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        hint, name, default = hints[field.name], prefix + to_key(field.name), field.default
        if isinstance(default, FieldInfo):
            default = default.get_default(call_default_factory=True)
        elif field.default_factory is not REQUIRED:
            default = field.default_factory()
        if repr(default) == "PydanticUndefined":
            default = REQUIRED
        if not dataclasses.is_dataclass(hint):
            declared = [c for c in config.__mro__ if field.name in vars(c).get("__annotations__", {})][-1]
            found.append(Option(name, hint, to_plain(default), declared))
        for key, inner in _inside(hint):
            if inner.__name__ not in ELSEWHERE:
                found += options_of(inner, f"{name}.{key}")
    return found


def listed(kind: str, id: str, declared: Any) -> list[Option]:
    """The options of what declares them as keyword arguments, as `erft list` shows them."""
    found = []
    for row in catalogue.options_of(kind, id):
        default = REQUIRED if row.default == "required" else yaml.safe_load(row.default)
        found.append(Option(row.name, type(default), default, declared))
    return found


def _inside(hint: Any) -> list[tuple[str, Any]]:
    """(key, dataclass) inside a hint: of `Until | None` ("", Until), of `dict[Literal["a"], Tiny]` ("a.", Tiny)."""
    found = []
    for part in (hint, *typing.get_args(hint)):
        if typing.get_origin(part) is dict and dataclasses.is_dataclass(typing.get_args(part)[1]):
            key, inner = typing.get_args(part)
            found.append((f"{typing.get_args(key)[0] if typing.get_origin(key) is Literal else 'tiny'}.", inner))
        elif isinstance(part, type) and dataclasses.is_dataclass(part):
            found.append(("", part))
    return found


def another(option: Option, default: Any) -> Any:
    """A legal value that is not `default`, from the type alone.

    Raises:
        LookupError: the type does not say enough.
    """
    return _another(option.hint, default, option.name)


def _another(hint: Any, default: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _another(arguments[0], default, name)
    if origin in (typing.Union, types.UnionType):
        return _another(next(a for a in arguments if a is not type(None)), default, name)
    if origin is Literal:
        return next(value for value in arguments if value != default)
    if hint is bool:
        return not default
    if dataclasses.is_dataclass(hint):
        return {}
    if hint is int:
        return 2 if default in (None, REQUIRED) else default + 1
    if hint is float:
        return 0.5 if default in (None, 0, REQUIRED) else default / 2
    if hint == tuple[int, ...]:
        return [5]
    raise LookupError(f"no other value of {name} ({hint}) is known: give the walk one")


def place(tree: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The tree with one dotted name set."""
    head, _, rest = name.partition(".")
    below = tree.get(head)
    if not rest:
        return {
            **tree,
            head: {**below, **value} if isinstance(value, Mapping) and isinstance(below, Mapping) else value,
        }
    return {**tree, head: place(below if isinstance(below, Mapping) else {}, rest, value)}


def placed(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for several names."""
    for name, value in values.items():
        tree = place(tree, name, value)
    return dict(tree)


def lookup(tree: Mapping[str, Any], name: str, default: Any) -> Any:
    """What the tree says at a dotted name."""
    for part in name.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return default
        tree = tree[part]
    return tree


@dataclasses.dataclass
class Walk:
    """All options of one plug-in, each set alone.

    Args:
        what: of a failure's message.
        config: the declaration, or the options themselves.
        run: (options, situation) -> a print of what was computed and written, or a UserError: refused.
        base: options of the plain run.
        values: {name: another value}, where the type does not say enough.
        contexts: {name: further options without which it has no effect}; alone it has to be refused.
        situations: {name: where it can matter, as `run` knows it}: a fact of environments or data, no option.
        exempt: {name: why}: it changes no result, and should not.
        limits: {name: what the refusal says}: all it does is to refuse what the plain run takes.
        among: names that begin so are walked; the others are where they matter.
    """

    what: str
    config: Any
    run: Any
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    contexts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    situations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    exempt: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    among: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        self._known: dict[str, str] = {}

    def options(self) -> list[Option]:
        """Those that are walked."""
        options = self.config if isinstance(self.config, list) else options_of(self.config)
        return [option for option in options if option.name.startswith(self.among)]

    def examine(self, option: Option) -> str:
        """What became of it: effect, refused (alone, not in its context), refused alone, exempt or dead."""
        name = option.name
        if name in self.exempt:
            return "exempt"
        situation = self.situations.get(name, "")
        base = self._open(self.base, option)
        changed = place(base, name, self._value(option, base))
        alone = self._print(changed, situation)
        if name in self.limits:
            plain = self._print(base, situation)
            assert self.limits[name] in alone and not plain.startswith("refused"), f"{self.what}.{name}: {alone}"
            return "effect"
        if not alone.startswith("refused"):
            return "effect" if alone != self._print(base, situation) else "dead"
        if name in self.contexts:
            base = self._open(placed(self.base, self.contexts[name]), option)
            before = self._print(base, situation)
            after = self._print(place(base, name, self._value(option, base)), situation)
            for said in (before, after):
                assert not said.startswith("refused"), f"{self.what}.{name} in its context: {said}"
            return "refused" if before != after else "dead"
        return "refused alone"

    def _open(self, base: Mapping[str, Any], option: Option) -> Mapping[str, Any]:
        """What an option is inside of is there, with its defaults."""
        inside = option.name.rpartition(".")[0]
        return place(base, inside, {}) if inside and lookup(base, inside, None) is None else base

    def _value(self, option: Option, base: Mapping[str, Any]) -> Any:
        if option.name in self.values:
            return self.values[option.name]
        return another(option, lookup(base, option.name, option.default))

    def _print(self, options: Mapping[str, Any], situation: str) -> str:
        key = f"{situation}{options!r}"
        if key not in self._known:
            try:
                self._known[key] = fingerprint(self.run(options, situation))
            except UserError as error:
                if isinstance(error, FloatingPointError):  # a run that went wrong is no refusal
                    raise
                self._known[key] = f"refused: {error}"
        return self._known[key]


class Work(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def fingerprint(*things: Any) -> str:
    """A hash of arrays, tensors, texts and numbers in trees of any shape."""
    digest = hashlib.sha1()
    for thing in things:
        _feed(digest, thing)
    return digest.hexdigest()


def _feed(digest: Any, thing: Any) -> None:
    if isinstance(thing, torch.Tensor):
        thing = thing.detach().cpu()
        thing = thing.float().numpy() if thing.dtype == torch.bfloat16 else thing.numpy()
    if isinstance(thing, np.ndarray) and thing.dtype != object:
        digest.update(f"{thing.dtype}{thing.shape}".encode() + np.ascontiguousarray(thing).tobytes())
    elif isinstance(thing, Ragged):
        _feed(digest, (thing.values, thing.offsets))
    elif isinstance(thing, Mapping):
        for key in thing:
            digest.update(str(key).encode())
            _feed(digest, thing[key])
    elif isinstance(thing, (list, tuple)):
        digest.update(f"[{len(thing)}]".encode())
        for one in thing:
            _feed(digest, one)
    else:
        digest.update(f"{type(thing).__name__} {thing!r}".encode())


def tally(walks: list[Walk]) -> dict[str, Any]:
    """{"walked", "effect", "refused", "exempt": names, "dead": names} over all options of several plug-ins."""
    counts: dict[str, Any] = {"walked": 0, "effect": 0, "refused": 0, "exempt": [], "dead": []}
    acting: set[tuple[Any, str]] = set()
    refused: dict[tuple[Any, str], str] = {}
    for walk in walks:
        for option in walk.options():
            found = walk.examine(option)
            counts["walked"] += 1
            key, name = (option.declared, option.name), f"{walk.what}.{option.name}"
            if found in ("effect", "refused"):
                acting.add(key)
            if found == "refused alone":
                refused[key] = name
            if found in ("exempt", "dead"):
                counts[found].append(name)
            else:
                counts["effect" if found == "effect" else "refused"] += 1
    # An option that is refused wherever it is declared can never have an effect.
    counts["dead"] += [name for key, name in refused.items() if key not in acting]
    return counts
