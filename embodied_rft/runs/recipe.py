"""Recipes: YAML to validated dataclasses, with `extends`, dotted overrides and errors that name the nearest known key.

Defaults live in the dataclasses, and YAML holds only what differs.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.resources
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, NonNegativeFloat, PositiveInt

from embodied_rft.device import DEVICE
from embodied_rft.names import UserError, nearest
from embodied_rft.options import ConfigError, Stages, parse, parse_stages, plugin_spec, to_plain
from embodied_rft.pools.config import EnvConfig
from embodied_rft.runs import trust as trusting
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.log import LogConfig
from embodied_rft.runs.yaml_tree import HOLD_FILES, Loader, apply_override, dump_plain, map_files, merge, read_yaml

# --- the recipe --------------------------------------------------------------------------------------


@dataclass
class BufferConfig:
    """The one buffer of the run."""

    capacity: int = 200_000  # rows: decisions plus one closing row an episode
    success: bool = False  # keep success beside the reward, so that `selection: {successes: true}` finds it
    # what the environment tells of an episode at its end, kept as streams of reward of its last decision: [reward/hit]
    streams: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len({"env", "success", *self.streams}) < 2 + len(self.streams):
            raise UserError(
                f"buffer.streams are {list(self.streams)}; expected names of what the environment tells at the end of "
                "an episode, each once: its reward (env) is always kept, success is buffer.success"
            )


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
        self.stages = parse_stages(self.stages)
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
    return _complete(tree, [RunFolder(beside).plugins, Path.cwd(), beside])


def recipe_of(text: str, folder: Path, *, trust: bool = False, environments: bool = True) -> Recipe:
    """The recipe that `dump_recipe` wrote, for a run in `folder`, which its files are relative to.

    Args:
        text: of the recipe.
        folder: of the run.
        trust: code that the recipe names may run: plug-ins in the folder, classes, pickles.
        environments: whether any are made; else nothing of `env` runs, and plug-ins that are not there are left out.

    Raises:
        ConfigError: as `load_recipe`; code that is not trusted.
    """
    tree = read_yaml(text)
    if not isinstance(tree, dict):
        raise ConfigError(f"the recipe in {folder} must be a mapping; it holds {type(tree).__name__}")
    if not trust:
        trusting.refuse(tree, folder, environments=environments)
    folders = [RunFolder(folder).plugins] if trust else []
    return _complete(_anchored(tree, folder), folders, missing_ok=not environments)


def _complete(tree: dict[str, Any], folders: Sequence[Path], *, missing_ok: bool = False) -> Recipe:
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
        _import_plugin(module, folders, missing_ok=missing_ok)
    return parse(Recipe, tree)


def _import_plugin(module: Any, folders: Sequence[Path], *, missing_ok: bool) -> None:
    """Import a module that a recipe names, so that what it registers is known."""
    try:
        importlib.import_module(str(module))
    except ModuleNotFoundError as error:
        if error.name != str(module).partition(".")[0]:
            raise  # the plug-in exists; something that it needs does not
        if missing_ok:
            return
        looked = " or ".join(dict.fromkeys(map(str, folders))) or "a trusted folder"
        raise ConfigError(f"plugins: no module {str(module)!r}, neither installed nor in {looked}") from error
    except SystemExit as error:
        raise ConfigError(
            f"plugins: the module {str(module)!r} calls sys.exit({error.code!r}) when it is imported"
        ) from error


def dump_recipe(recipe: Recipe | Mapping[str, Any]) -> str:
    """The fully resolved recipe as YAML, defaults included; `load_recipe` of it gives an equal recipe."""
    return dump_plain(to_plain(recipe))


def recipe_difference(stored: str, given: str, *, stages: bool = True) -> list[str]:
    """What two recipes disagree on, of all that can change results: ["-seed: 3", "+seed: 4"].

    Args:
        stored: from `dump_recipe`, perhaps of an older version: options that are new since then have their defaults.
        given: likewise.
        stages: whether these count.
    """
    old, new = _as_of_now(stored), _as_of_now(given)
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


def _as_of_now(text: str) -> Any:
    """A recipe as this version writes it; as it is, if this version cannot read it."""
    with contextlib.suppress(ConfigError):
        text = dump_recipe(parse(Recipe, read_yaml(text)))
    return read_yaml(text)


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted: "demo", "smoke/fetch_reach"; not of those that are there to be extended."""
    return sorted(name for name in _shipped() if not name.endswith("base"))


def describe_recipes() -> dict[str, str]:
    """{name: its `description`, else its first comment line} of the shipped recipes."""
    described = {}
    shipped = _shipped()
    for name in recipe_names():
        text = shipped[name].read_text(encoding="utf-8")
        comment = text.partition("\n")[0].lstrip("# ") if text.startswith("#") else ""
        described[name] = str((yaml.load(text, Loader=Loader) or {}).get("description") or comment)
    return described


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
    raise ConfigError(f"no recipe file and no shipped recipe {str(path_or_name)!r}; {nearest(name, shipped)}")
