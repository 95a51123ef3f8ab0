"""Plain data from YAML: safe, with dotted overrides, merging, and the files that its texts name.

Knows nothing of what a recipe means.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from embodied_rft.options import ConfigError

FILE_KEYS = ("file", "path", "run")  # options whose texts are files, also without a dot or a slash
HOLD_FILES = ("env", "agent", "stages")  # parts of a recipe that may name files


MOST_NODES = 100_000  # of a recipe with every anchor written out


class Loader(yaml.SafeLoader):
    """Safe YAML that refuses the same key twice, which plain YAML would silently drop, and what grows by anchors."""

    def get_single_node(self) -> yaml.Node | None:
        """The tree of nodes, which may share branches, once it is known how large it is without sharing."""
        try:
            node: yaml.Node | None = super().get_single_node()
            size = 0 if node is None else _expanded(node, {})
        except RecursionError:
            raise ConfigError("it is nested too deeply to be a recipe, or an anchor contains itself") from None
        if size > MOST_NODES:
            raise ConfigError(
                f"with its anchors (&name, *name) written out it has {size:,} values; {MOST_NODES:,} at most"
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`, whose keys give way to those written beside it
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; what is shared is counted each time, but looked at once."""
    if id(node) not in known:
        if isinstance(node, yaml.MappingNode):
            parts: list[yaml.Node] = [part for pair in node.value for part in pair]
        else:
            parts = node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


class Dumper(yaml.SafeDumper):
    """Quotes text that `Loader` would read as a number."""


# YAML 1.1 reads 1e-3 as text because it has no dot; people mean a number.
for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(text: str) -> Any:
    """What safe YAML holds."""
    return yaml.load(text, Loader)


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; everything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """["cameras=[front]", "image_size=64"] -> {"cameras": ["front"], "image_size": 64}; dots nest."""
    tree: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override)
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key; the way there is made where it is missing, list positions must exist."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, as in env.num_envs=8")
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of override {override!r} is not YAML: {error}") from error
    *way, last = key.split(".")
    node: Any = tree
    for done, part in enumerate(way):
        index = _step(node, part, ".".join(way[: done + 1]), override)
        if isinstance(node, dict):
            node.setdefault(part, {})
        if isinstance(node[index], str) and isinstance(node, list):
            node[index] = {node[index]: {}}  # a bare stage word
        # A copy, so that other places that the recipe fills from the same anchor (*name) stay as they are.
        node[index] = {} if node[index] is None else copy.copy(node[index])
        node = node[index]
    node[_step(node, last, key, override)] = value


def _step(node: Any, part: str, path: str, override: str) -> Any:
    """The key or index that `part` means in `node`."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"override {override!r}: {path.rpartition('.')[0]} is {node!r}, it has no {part!r}")
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"override {override!r}: {path} is not a position in a list of {len(node)} (0 to {len(node) - 1})"
        )
    return int(part)


def map_files(value: Any, folder: Path, change: Callable[[Path], str]) -> Any:
    """Plain data in which every text that names a file or folder is what `change` makes of its whole path.

    Args:
        value: plain data, as of a recipe. Ids and single words without a dot are no files.
        folder: what relative paths are relative to.
        change: of an absolute path.
    """
    if isinstance(value, Mapping):
        how = dict.fromkeys(FILE_KEYS, _whole) | dict.fromkeys(("id", "name", "with"), lambda item, *_: item)
        return {key: how.get(key, map_files)(item, folder, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_files(item, folder, change) for item in value]
    if isinstance(value, str) and re.search(r"[\w-][./]|[./][\w-]", value):
        return _whole(value, folder, change)
    return value


def _whole(value: Any, folder: Path, change: Callable[[Path], str]) -> Any:
    """The text that names a file, whatever it looks like; anything else as it is."""
    if isinstance(value, str) and 0 < len(value) < 4096 and "\0" not in value:
        path = Path(os.path.normpath(folder / Path(value).expanduser()))
        with contextlib.suppress(OSError):
            if path.is_file() or path.is_dir():
                return change(path)
    return value


def dump_plain(tree: object) -> str:
    """Plain data as the YAML of `dump_recipe`."""
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100))
