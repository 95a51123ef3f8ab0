"""What a recipe of somebody else would run: found before it runs, and refused unless the user says `--trust`.

A recipe that a user gives to `erft train` is his own program and is not asked. The recipe inside a run folder may be
anybody's: of it, what is installed here may be imported, everything else needs the user's word. Boundary: reads plain
data, imports nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embodied_rft.options import ConfigError

logger = logging.getLogger(__name__)

NAMES_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w./-]*")  # module:Name


def refuse(tree: Mapping[str, Any], folder: Path, *, environments: bool = True) -> None:
    """Refuse the recipe of a run folder if it names code that is not installed, or something to be unpickled.

    Raises:
        ConfigError: with what it names, and how to say that it may run.
    """
    if found := foreign_code(tree, environments=environments):
        raise ConfigError(
            f"the recipe in {folder} runs code that is not installed here: {', '.join(found[:6])}. If you made this "
            "run or have read that code, say so: --trust on the command line, trust=True in Python (docs/security.md)."
        )


def say(tree: Mapping[str, Any], folder: Path, *, environments: bool = True) -> None:
    """A warning in the log that a trusted run brings code along, and which."""
    if found := foreign_code(tree, environments=environments):
        logger.warning("trusted: code that comes with the run in %s runs (%s)", folder, ", ".join(found[:6]))


def foreign_code(tree: Mapping[str, Any], *, environments: bool = True) -> list[str]:
    """["plugins: corridor", "env.id: mine:Reach-v0", "agent.trust: True"]: what of a recipe would run as code.

    Modules that are installed as packages are none of it, where they are only imported; nor is anything of `env` where
    no environments are made.
    """
    plugins = tree.get("plugins") or []
    found = [f"plugins: {name}" for name in plugins if not is_installed(str(name))] if isinstance(plugins, list) else []
    passed_by = ("plugins",) if environments else ("plugins", "env")
    for path, value in _leaves({key: value for key, value in tree.items() if key not in passed_by}):
        last = path.rpartition(".")[2]
        if last == "trust" and value:
            found.append(f"{path}: {value}")
        elif isinstance(value, str) and NAMES_CODE.fullmatch(value):
            module = value.partition(":")[0]
            if path != "env.id" or not is_installed(
                module
            ):  # an environment's module is imported, nothing of it called
                found.append(f"{path}: {value}")
    return found


def modules_named(tree: Mapping[str, Any]) -> set[str]:
    """Modules that a recipe names: its plug-ins, and what stands before the colon of each module:Name."""
    plugins = tree.get("plugins") or []
    named = {str(name) for name in plugins} if isinstance(plugins, list) else set()
    values = (value for _, value in _leaves(tree) if isinstance(value, str) and NAMES_CODE.fullmatch(value))
    return named | {value.partition(":")[0] for value in values}


def is_installed(module: str) -> bool:
    """Whether a module is of a package that somebody installed; nothing is imported to find out."""
    top = module.partition(".")[0]
    if top == "embodied_rft":  # also in a checkout
        return True
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec is not None else []
    files = [Path(place).resolve() for place in places if place not in (None, "built-in", "frozen")]
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    return bool(files) and all(any(file.is_relative_to(root) for root in installed) for file in files)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """("stages.0.load.file", "demos.safetensors") of everything in a tree; keys that name code count as values."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value
