"""Ids to plug-ins: how the engine finds environments, agents, objectives, demonstrators and stages it does not import.

A plug-in package registers its parts when it is imported, and is imported because it declares the entry point group
`embodied_rft.plugins` (our own environments and agents use the same door):

    @register("agent", "my_policy")
    class MyPolicy: ...

    # pyproject.toml of the plug-in
    [project.entry-points."embodied_rft.plugins"]
    mine = "my_package"
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, TypeVar

from embodied_rft.names import UserError, nearest

T = TypeVar("T")

# They are entry points as well: named here for a checkout that was not installed.
OUR_OWN = (
    "embodied_rft.objectives", "embodied_rft.stages", "embodied_rft.turns", "embodied_rft.agents",
    "embodied_rft.envs.games", "embodied_rft.envs.manipulation", "embodied_rft.envs.text", "embodied_rft.envs.turns",
    "embodied_rft.envs.worlds", "embodied_rft.envs.gui",
)  # fmt: skip
KINDS = ("agent", "objective", "demonstrator", "stage", "credit", "shaping", "curriculum", "reward", "parser",
         "logger", "check")  # fmt: skip
_tables: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
# What every class of a kind derives from, where there is such a thing; None: not imported yet.
_contracts: dict[str, type | None] = dict.fromkeys(("agent", "objective", "curriculum", "stage", "logger"))


def register(kind: str, *ids: str) -> Callable[[T], T]:
    """Decorator of classes and functions: make the target known under `ids`. A second target for an id raises."""
    if kind not in _tables:
        raise UserError(f"unknown kind of plug-in {kind!r}; {nearest(kind, KINDS)}")

    def add(target: T) -> T:
        for id in ids:
            known = _tables[kind].get(id)
            if known is not None and _name(known) != _name(target):
                raise UserError(f"{kind} {id!r} is registered twice: {known!r} and {target!r}. Choose another id.")
            _tables[kind][id] = target
        return target

    return add


def contract(kind: str) -> Callable[[T], T]:
    """Decorator of the class that every plug-in of a kind derives from."""

    def add(base: T) -> T:
        assert isinstance(base, type)
        _contracts[kind] = base
        return base

    return add


def _name(target: Any) -> tuple[str, str]:
    return target.__module__, target.__qualname__


def find(kind: str, id: str) -> Any:
    """The target registered under `id`.

    Raises:
        ValueError: there is none, with the nearest known id; or it does not derive from what its kind does.
    """
    if id not in _tables[kind] or _contracts.get(kind, object) is None:
        load_plugins()
    if id not in _tables[kind]:
        raise UserError(f"unknown {kind} {id!r}; {nearest(id, _tables[kind])}")
    found, base = _tables[kind][id], _contracts.get(kind, object)
    if base not in (None, object) and not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{kind} {id!r} is {found!r}: derive the class from {base.__module__}.{base.__qualname__}")
    return found


def config_of(kind: str, id: str) -> Any:
    """The dataclass `Config` of a plug-in's options; None: it has none."""
    return getattr(find(kind, id), "Config", None)


def kept(contract: type[T], made: object, what: str) -> T:
    """What a plug-in made, or a ValueError: its class does not derive from the contract of its kind."""
    if not isinstance(made, contract):
        name = f"{contract.__module__}.{contract.__qualname__}"
        raise UserError(f"{what} is a {type(made).__name__}: derive the class from {name}")
    return made


def known(kind: str) -> list[str]:
    """All ids of a kind, sorted."""
    load_plugins()
    return sorted(_tables[kind])


def shipped(kind: str) -> list[str]:
    """Ids of a kind that this package itself brings, sorted."""
    return [id for id in known(kind) if find(kind, id).__module__.partition(".")[0] == __package__]


@cache
def load_plugins() -> None:
    """Import every package that declares the entry point group, once."""
    modules = {e.value for e in entry_points(group="embodied_rft.plugins")}
    for module in [*OUR_OWN, *sorted(modules - {*OUR_OWN})]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"the plug-in {module} cannot be imported: {error}") from error


def import_files(package: str, path: Iterable[str]) -> None:
    """Import every file of a package, `import_files(__name__, __path__)`, so that each registers what it holds."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def version_of(package: str) -> str | None:
    """The installed version of a package, by the name that pip knows; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
