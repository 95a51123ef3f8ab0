"""Recipes: YAML to validated dataclasses, with `extends`, dotted overrides and errors that name the nearest known key.

Defaults live in the dataclasses, YAML holds only what differs, and a key that nothing reads is an error. Stage words,
objectives, agents and the like are found in the registry; each declares its options as a dataclass named `Config`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import enum
import importlib
import importlib.resources
import keyword
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapValidator,
)
from pydantic.dataclasses import is_pydantic_dataclass, rebuild_dataclass

from embodied_rft import registry
from embodied_rft.checkpoint import write_atomically as write_atomically  # for those who write recipes
from embodied_rft.log import LogConfig
from embodied_rft.making import check_wrappers

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe or an option is wrong; the message says where, what was given and what is known."""


# --- stages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageSpec:
    """One stage of a recipe, validated: StageSpec("finetune", FinetuneConfig(...), "stages.3.finetune")."""

    word: str
    config: Any  # an instance of the stage class's `Config`
    path: str = ""  # where in the recipe, for messages


def parse_stages(items: Sequence[Any], path: str = "stages") -> list[StageSpec]:
    """Validate a list of stages, stages inside stages included.

    Args:
        items: each {word: options}, {word: None}, a bare word, or an already parsed StageSpec.
        path: where the list stands in the recipe, for messages.

    Raises:
        ConfigError: an unknown word or option, with its dotted path and the nearest known name.
    """
    if not isinstance(items, (list, tuple)):
        raise ConfigError(f"{path} must be a list of stages, each like `- evaluate: {{episodes: 200}}`; got {items!r}")
    return [_parse_stage(item, f"{path}.{index}") for index, item in enumerate(items)]


def _parse_stage(item: Any, path: str) -> StageSpec:
    if isinstance(item, StageSpec):
        return item
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, Mapping) or len(item) != 1:
        given = ", ".join(map(str, item)) if isinstance(item, Mapping) else repr(item)
        raise ConfigError(
            f"{path} must be one stage word with its options, as in `evaluate: {{episodes: 200}}`; got {given}"
        )
    ((word, options),) = item.items()
    config = validate_plugin_config("stage", str(word), options or {}, path=f"{path}.{word}")
    return StageSpec(str(word), config, f"{path}.{word}")


def _validate_stages(value: Any, _: Any, info: ValidationInfo) -> list[StageSpec]:
    prefix = (info.context or {}).get("path", "")
    return parse_stages(value, f"{prefix}.{info.field_name}".lstrip("."))


Stages = Annotated[list[StageSpec], WrapValidator(_validate_stages)]
"""Annotation of a field that holds stages: `stages: Stages = field(default_factory=list)` in a stage's `Config`."""


def plugin_spec(kind: str) -> WrapValidator:
    """Annotation of a field that names a plug-in with its options: it is checked, and completed with all defaults.

    `objective: Annotated[dict[str, Any], plugin_spec("objective")]` takes `sac` and `{id: sac, gamma: 0.98}` and holds
    {"id": "sac", "gamma": 0.98, ...}.
    """

    def validate(value: Any, _: Any, info: ValidationInfo) -> dict[str, Any]:
        path = f"{(info.context or {}).get('path', '')}.{info.field_name}".lstrip(".")
        spec = {"id": value} if isinstance(value, str) else value
        if not isinstance(spec, Mapping) or not isinstance(spec.get("id"), str):
            raise ConfigError(f"{path} needs an id, as in `{path.rpartition('.')[2]}: {{id: NAME}}`; got {value!r}")
        options = {key: option for key, option in spec.items() if key != "id"}
        config = validate_plugin_config(kind, spec["id"], options, path=path)
        return {"id": spec["id"], **(to_plain(config) or {})}

    return WrapValidator(validate)


# --- the recipe --------------------------------------------------------------------------------------


@dataclass
class EnvConfig:
    """Which environment, how many copies, and how they run."""

    id: str  # Gymnasium id, or "module:Id" of a module that registers it
    num_envs: PositiveInt = 64  # environments stepped together
    evaluation_envs: PositiveInt | None = None  # the same for evaluations; None: num_envs
    pool: Literal["auto", "native", "sync", "workers"] = "auto"  # see `pool.make_pool`
    num_workers: PositiveInt | None = None  # worker processes; None: one for each core
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the environment
    wrappers: list[dict[str, Any]] = field(
        default_factory=list
    )  # innermost first: {id: TimeLimit, max_episode_steps: 200}
    time_limit: Literal["truncated", "terminal"] = "truncated"  # terminal: an episode cut off does not bootstrap
    deadline: PositiveFloat = 60.0  # seconds that a step or reset of one environment may take
    max_incidents: Annotated[float, Field(ge=0, le=1)] = 0.9  # share of the latest 100 episodes that may break; 1: all

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.pool != "workers":
            raise ConfigError(f"env.num_workers has no effect with env.pool {self.pool!r}: set env.pool to workers")
        if self.wrappers and self.pool == "native":
            raise ConfigError("env.wrappers wrap single environments: they cannot be used with env.pool 'native'")
        try:
            check_wrappers(self.wrappers)
        except ValueError as error:
            raise ConfigError(f"env.{error}") from None


@dataclass
class BufferConfig:
    """The one buffer of the run."""

    capacity: int = 200_000  # rows: decisions plus one closing row an episode
    success: bool = False  # keep success beside the reward, so that `selection: {successes: true}` finds it


@dataclass
class Recipe:
    """A whole run: what is trained, on what, by which stages."""

    env: EnvConfig
    agent: Annotated[dict[str, Any], plugin_spec("agent")]  # {"id": "gaussian", **options of that agent}
    stages: Stages  # run in this order
    name: str = "recipe"  # of the run; null: of the file
    description: str = ""  # one line, shown by `erft list recipes`
    plugins: list[str] = field(default_factory=list)  # modules to import first; installed, or in the current folder
    seed: int = 0  # fixes everything: weights, training states, exploration, data order
    buffer: BufferConfig = field(default_factory=BufferConfig)
    logging: LogConfig = field(default_factory=LogConfig)
    checkpoint_seconds: NonNegativeFloat = 30.0  # least wall time between two checkpoints inside a stage
    threads: PositiveInt | None = None  # torch's; None: one per core. 1 suits small networks and a shared machine

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must be in [0, 2**31); got {self.seed}")


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, complete and validate a recipe.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe ("demo"; see `recipe_names`).
        overrides: dotted `key=value` with values in YAML: "stages.2.finetune.updates=100", "env.num_envs=8".

    Raises:
        ConfigError: unknown recipe, unknown key, value of the wrong type, or an override that points nowhere.
    """
    tree = _read(path_or_name, ())
    for override in overrides:
        _apply_override(tree, override)
    plugins = tree.get("plugins") or []
    if not isinstance(plugins, list):
        raise ConfigError(f"plugins must be a list of modules, as in `plugins: [my_module]`; got {plugins!r}")
    for module in plugins:
        _import_plugin(module)
    return parse(Recipe, tree)


def _import_plugin(module: Any) -> None:
    """Import a module that a recipe names, so that what it registers is known."""
    if "" not in sys.path:
        sys.path.append("")  # the command `erft` does not look into the current folder by itself
    try:
        importlib.import_module(str(module))
    except ModuleNotFoundError as error:
        if error.name != str(module).partition(".")[0]:
            raise  # the plug-in exists; something that it needs does not
        raise ConfigError(f"plugins: no module {str(module)!r}, neither installed nor in {Path.cwd()}") from error
    except SystemExit as error:
        raise ConfigError(
            f"plugins: the module {str(module)!r} calls sys.exit({error.code!r}) when it is imported"
        ) from error


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML, defaults included; `load_recipe` of it gives an equal recipe."""
    resolved = dataclasses.replace(recipe, stages=parse_stages(recipe.stages))
    return dump_plain(to_plain(resolved))


def dump_plain(tree: Any) -> str:
    """Plain data as the YAML of `dump_recipe`."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def recipe_difference(stored: str, recipe: Recipe) -> list[str]:
    """What two recipes disagree on, of all that can change results: ["-seed: 3", "+seed: 4"].

    Args:
        stored: from `dump_recipe`, perhaps of an older version: options that are new since then have their defaults.
        recipe: the one given now.
    """
    old, new = yaml.load(stored, _Loader), yaml.load(dump_recipe(recipe), _Loader)
    with contextlib.suppress(ConfigError):
        old = yaml.load(dump_recipe(parse(Recipe, old)), _Loader)
    for tree in (old, new):
        for harmless in ("description", "logging", "checkpoint_seconds"):
            tree.pop(harmless, None)
        for harmless in ("num_workers", "deadline", "max_incidents"):
            (tree.get("env") or {}).pop(harmless, None)
    before, after = (yaml.safe_dump(tree, sort_keys=False).splitlines() for tree in (old, new))
    lines = difflib.unified_diff(before, after, n=0, lineterm="")
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted: "demo", "smoke/fetch_reach"."""
    return sorted(_shipped())


def describe_recipes() -> dict[str, str]:
    """{name: its `description`, else its first comment line} of the shipped recipes."""
    described = {}
    for name, path in _shipped().items():
        text = path.read_text(encoding="utf-8")
        comment = text.partition("\n")[0].lstrip("# ") if text.startswith("#") else ""
        described[name] = str((yaml.load(text, Loader=_Loader) or {}).get("description") or comment)
    return described


# --- validation --------------------------------------------------------------------------------------


def validate_plugin_config(kind: str, id: str, options: Mapping[str, Any], *, path: str = "") -> Any:
    """An instance of the `Config` dataclass of a registered plug-in.

    Args:
        kind: of the registry, such as "objective".
        id: of the plug-in.
        options: what the user wrote, without the id.
        path: where it was written, for messages; default `kind`.

    Raises:
        ConfigError: unknown id, unknown option, wrong value.
    """
    path = path or kind
    try:
        target = registry.find(kind, id)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    config = getattr(target, "Config", None)
    if config is None:
        if options:
            raise ConfigError(f"{path}: {kind} {id!r} has no options; got {', '.join(map(str, options))}")
        return None
    return parse(config, options, path)


def parse(cls: type[T], mapping: Any, path: str = "") -> T:
    """Build a dataclass from plain data, checking every key and value.

    Args:
        cls: a dataclass; nested dataclasses are parsed too.
        mapping: plain data, as from YAML; an instance of `cls` passes through.
        path: prefix of the dotted path in messages.

    Raises:
        ConfigError: all problems at once, one line each, with dotted path and nearest known key.
    """
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{path or cls.__name__} must be a mapping of options; got {mapping!r}")
    _forbid_unknown_keys(cls)
    try:
        return TypeAdapter(cls).validate_python(_to_fields(cls, mapping), context={"path": path})
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(cls, problem, path) for problem in error.errors())) from None


def _forbid_unknown_keys(cls: Any) -> None:
    """Make a plug-in's dataclass strict, however it was declared."""
    if (getattr(cls, "__pydantic_config__", None) or {}).get("extra") == "forbid":
        return
    cls.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    if is_pydantic_dataclass(cls):
        rebuild_dataclass(cls, force=True)


def _to_fields(cls: Any, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that are Python keywords, such as `with`, belong to the field with an underscore, `with_`."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {
        f"{key}_" if keyword.iskeyword(key) and f"{key}_" in names else key: value for key, value in mapping.items()
    }


def to_key(name: str) -> str:
    """The key of a field: `with` of `with_`."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def _describe(cls: type, problem: Mapping[str, Any], path: str) -> str:
    """One readable line for one pydantic problem."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # from a nested parse: it has its own path already
        return str(cause)
    location = [part for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    where = ".".join([path, *map(str, location)] if path else map(str, location))
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key {where}; {registry.nearest(str(location[-1]), _keys_at(cls, location[:-1]))}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where} is required and was not given"
    given = "" if isinstance(problem["input"], Mapping) else f"; got {problem['input']!r}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{given}"


def _keys_at(cls: Any, location: Sequence[Any]) -> list[str]:
    """The keys that are known where `location` points to inside a dataclass."""
    for part in location:
        hints = [typing.get_type_hints(c).get(part) for c in _dataclasses_in(cls)] if isinstance(part, str) else [cls]
        cls = next((hint for hint in hints if hint is not None), None)
    return [to_key(f.name) for c in _dataclasses_in(cls) for f in dataclasses.fields(c) if f.init]


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    """The dataclasses that a type hint mentions: of `list[A | None]`, A."""
    if dataclasses.is_dataclass(hint):
        yield hint
    elif isinstance(hint, types.UnionType) or typing.get_origin(hint) is not None:
        for argument in typing.get_args(hint):
            yield from _dataclasses_in(argument)


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, tuples and paths as what YAML and JSON know; a StageSpec as {word: options}."""
    if isinstance(value, StageSpec):
        return {value.word: to_plain(value.config) or {}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {to_key(f.name): to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, os.PathLike) else value


# --- YAML --------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses the same key twice, which plain YAML would silently drop."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`, whose keys give way to those written beside it
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


# YAML 1.1 reads 1e-3 as text because it has no dot; people mean a number.
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _shipped() -> dict[str, Path]:
    root = Path(str(importlib.resources.files("embodied_rft.configs")))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.yaml")}


def _read(path_or_name: str | Path, trail: tuple[Path, ...]) -> dict[str, Any]:
    """The raw tree of a recipe, merged into that of the recipe it extends."""
    path = _find(path_or_name, trail)
    if path in trail:
        raise ConfigError(f"{path} extends itself: {' -> '.join(p.name for p in (*trail, path))}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping with env, agent and stages; got {type(tree).__name__}")
    base = tree.pop("extends", None)
    tree.setdefault("name", path.stem)
    return tree if base is None else _merge(_read(base, (*trail, path)), tree)


def _find(path_or_name: str | Path, trail: tuple[Path, ...]) -> Path:
    """A file as given, beside the file that extends it, or a shipped recipe."""
    given = Path(path_or_name)
    beside = [trail[-1].parent / given] if trail else []
    for candidate in (*beside, *(p.with_name(p.name + ".yaml") for p in beside), given):
        if candidate.is_file():
            return candidate.resolve()
    shipped = _shipped()
    name = str(path_or_name).removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    raise ConfigError(f"no recipe file and no shipped recipe {str(path_or_name)!r}; {registry.nearest(name, shipped)}")


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; everything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """["cameras=[front]", "image_size=64"] -> {"cameras": ["front"], "image_size": 64}; dots nest."""
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key; the way there is made where it is missing, list positions must exist."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, as in env.num_envs=8")
    try:
        value = yaml.load(text, Loader=_Loader)
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
