"""Recipes: YAML to validated dataclasses, with `extends`, dotted overrides and errors that name the nearest known key.

Defaults live in the dataclasses, YAML holds only what differs, and a key that nothing reads is an error. Stage words,
objectives, agents and the like are found in the registry; each declares its options as a dataclass named `Config`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import importlib
import importlib.resources
import keyword
import os
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
from pydantic import Field as Limit
from pydantic.dataclasses import is_pydantic_dataclass, rebuild_dataclass

from embodied_rft import registry
from embodied_rft import trust as trusting
from embodied_rft.checkpoint import write_atomically as write_atomically  # for those who write recipes
from embodied_rft.device import DEVICE
from embodied_rft.log import LogConfig
from embodied_rft.making import check_wrappers
from embodied_rft.yaml_tree import HOLD_FILES, ConfigError, Dumper, Loader, apply_override, map_files, merge, read_yaml

T = TypeVar("T")

MOST_ENVS, MOST_LAYERS = 65_536, 1_000  # more would take the machine before anything is said
KEPT_PLUGINS = "inputs/plugins"  # in a run folder: sources of the plug-ins that the run was started with


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
    num_envs: Annotated[int, Limit(gt=0, le=MOST_ENVS)] = 64  # environments stepped together
    evaluation_envs: Annotated[int, Limit(gt=0, le=MOST_ENVS)] | None = None  # the same for evaluations; None: num_envs
    pool: Literal["auto", "native", "sync", "workers"] = "auto"  # see `pool.make_pool`
    num_workers: PositiveInt | None = None  # worker processes; None: one for each core
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the environment
    # innermost first: {id: TimeLimit, max_episode_steps: 200}
    wrappers: list[dict[str, Any]] = field(default_factory=list)
    time_limit: Literal["truncated", "terminal"] = "truncated"  # terminal: an episode cut off does not bootstrap
    deadline: PositiveFloat = 60.0  # seconds that a step or reset of one environment may take
    max_incidents: Annotated[float, Field(ge=0, le=1)] = 0.9  # share of the latest episodes that may break; 1: all

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
    device: Annotated[str, Field(pattern=f"^({DEVICE})$")] = "auto"  # auto: a GPU if there is one; cpu, cuda, cuda:1
    inputs: dict[str, str] = field(default_factory=dict)  # {file too large to be kept: its hash}, written by the run
    threads: PositiveInt | None = None  # torch's; None: one per core. 1 suits small networks and a shared machine

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must be in [0, 2**31); got {self.seed}")
        parts = Path(self.name).parts
        if not parts or ".." in parts or Path(self.name).is_absolute() or not self.name.isprintable():
            raise ConfigError(f"name must name a folder inside runs/, as in `name: my_recipe`; got {self.name!r}")


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
        apply_override(tree, override)
    beside = _find(path_or_name, ()).parent
    return _complete(tree, [beside / KEPT_PLUGINS, Path.cwd(), beside])


def recipe_of(text: str, folder: Path, *, trust: bool = False) -> Recipe:
    """The recipe that `dump_recipe` wrote, for a run in `folder`, which its files are relative to.

    Args:
        text: of the recipe.
        folder: of the run.
        trust: code that the recipe names may run: plug-ins in the folder, classes, pickles.

    Raises:
        ConfigError: as `load_recipe`; code that is not trusted.
    """
    tree = read_yaml(text)
    if not isinstance(tree, dict):
        raise ConfigError(f"the recipe in {folder} must be a mapping; it holds {type(tree).__name__}")
    if not trust:
        trusting.refuse(tree, folder)
    return _complete(_anchored(tree, folder), [folder / KEPT_PLUGINS] if trust else [])


def _complete(tree: dict[str, Any], folders: Sequence[Path]) -> Recipe:
    """Import the plug-ins of a raw recipe, which may lie in `folders`, then validate it."""
    plugins = tree.get("plugins") or []
    if not isinstance(plugins, list):
        raise ConfigError(f"plugins must be a list of modules, as in `plugins: [my_module]`; got {plugins!r}")
    # The command `erft` looks into none of them by itself. A folder is not looked into without need: any folder in it
    # would be a module, also one that happens to be named like a package that somebody tries to import.
    needed = not all(map(trusting.is_installed, trusting.modules_named(tree)))
    for folder in folders if needed else []:
        if folder.is_dir() and str(folder) not in sys.path:
            sys.path.append(str(folder))
    for module in plugins:
        _import_plugin(module, folders)
    return parse(Recipe, tree)


def _import_plugin(module: Any, folders: Sequence[Path]) -> None:
    """Import a module that a recipe names, so that what it registers is known."""
    try:
        importlib.import_module(str(module))
    except ModuleNotFoundError as error:
        if error.name != str(module).partition(".")[0]:
            raise  # the plug-in exists; something that it needs does not
        looked = " or ".join(dict.fromkeys(map(str, folders))) or "a trusted folder"
        raise ConfigError(f"plugins: no module {str(module)!r}, neither installed nor in {looked}") from error
    except SystemExit as error:
        raise ConfigError(
            f"plugins: the module {str(module)!r} calls sys.exit({error.code!r}) when it is imported"
        ) from error


def dump_recipe(recipe: Recipe | Mapping[str, Any]) -> str:
    """The fully resolved recipe as YAML, defaults included; `load_recipe` of it gives an equal recipe."""
    return dump_plain(to_plain(recipe))


def dump_plain(tree: Any) -> str:
    """Plain data as the YAML of `dump_recipe`."""
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100))


def recipe_difference(stored: str, given: str, *, stages: bool = True) -> list[str]:
    """What two recipes disagree on, of all that can change results: ["-seed: 3", "+seed: 4"].

    Args:
        stored: from `dump_recipe`, perhaps of an older version: options that are new since then have their defaults.
        given: from `dump_recipe`, now.
        stages: whether these count.
    """
    old, new = read_yaml(stored), read_yaml(given)
    with contextlib.suppress(ConfigError):
        old = read_yaml(dump_recipe(parse(Recipe, old)))
    for tree in (old, new):
        for harmless in (
            "description",
            "logging",
            "checkpoint_seconds",
            "threads",
            "device",
            *([] if stages else ["stages"]),
        ):
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
        described[name] = str((yaml.load(text, Loader=Loader) or {}).get("description") or comment)
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
        made: T = TypeAdapter(cls).validate_python(_to_fields(cls, mapping), context={"path": path})
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(cls, problem, path) for problem in error.errors())) from None
    _check_depth(made, path)
    return made


def _check_depth(config: Any, path: str) -> None:
    """Refuse networks of so many layers that building them alone would take the machine."""
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name, None)
        deep = value if isinstance(value, int) and field_.name.endswith(("_layers", "_blocks")) else 0
        if isinstance(value, (tuple, list)) and field_.name.endswith("hidden"):
            deep = len(value)
        if deep > MOST_LAYERS:
            raise ConfigError(f"{path}.{field_.name}".lstrip(".") + f": {deep:,} layers; {MOST_LAYERS:,} at most")


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
    if isinstance(value, Recipe):
        value = dataclasses.replace(value, stages=parse_stages(value.stages))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {to_key(f.name): to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, os.PathLike) else value


# --- files ------------------------------------------------------------------------------------------


def _shipped() -> dict[str, Path]:
    root = Path(str(importlib.resources.files("embodied_rft.configs")))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.yaml")}


def _read(path_or_name: str | Path, trail: tuple[Path, ...]) -> dict[str, Any]:
    """The raw tree of a recipe, merged into that of the recipe it extends."""
    path = _find(path_or_name, trail)
    if path in trail:
        raise ConfigError(f"{path} extends itself: {' -> '.join(p.name for p in (*trail, path))}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping with env, agent and stages; got {type(tree).__name__}")
    base = tree.pop("extends", None)
    tree.setdefault("name", path.stem)
    tree = _anchored(tree, path.parent)
    return tree if base is None else merge(_read(base, (*trail, path)), tree)


def _anchored(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same recipe with files that lie beside it (`file: demos.npz`) by their whole path."""
    return tree | {part: map_files(tree[part], folder, str) for part in HOLD_FILES if part in tree}


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
