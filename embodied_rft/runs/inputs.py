"""The files that a recipe names, kept in its run folder: data, models, sources of plug-ins.

A copy is named after its content (`inputs/demos-3f2a91c07b44.npz`), and the run's recipe names the copy. So the folder
can be read anywhere, and a file that was changed between stop and resume makes another recipe, which is refused. What
is too large to be copied stays where it is, and the recipe holds its hash.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embodied_rft.files import PACKAGE, given_stem, write_atomically
from embodied_rft.options import ConfigError, to_plain
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.recipe import Recipe
from embodied_rft.runs.resume import Which, only_weights, read_state
from embodied_rft.runs.tree_file import save
from embodied_rft.runs.yaml_tree import HOLD_FILES, map_files

LARGEST = 2**29  # bytes of a file or folder that is copied
MOST_FILES = 10_000  # of a folder whose content is looked at


def keep(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    """Copy what the recipe names into `folder`; the recipe as plain data that names the copies, relative to it."""
    tree: dict[str, Any] = to_plain(recipe)
    hashes = dict(tree["inputs"])

    def kept(path: Path) -> str:
        if folder.path.is_relative_to(path) or _count(path) > MOST_FILES:
            return str(path)  # a folder to work in, not one that was made to be read
        if RunFolder(path).checkpoints.is_dir():
            return _keep_run(RunFolder(path), folder)
        digest = hash_of(path)
        if _size(path) > LARGEST:
            hashes[str(path)] = digest
            return str(path)
        stem = given_stem(path.stem if path.is_file() else path.name)
        name = f"{stem}-{digest[:12]}{path.suffix if path.is_file() else ''}"
        target = folder.inputs / name
        if path.parent == target.parent and path != target:
            raise ConfigError(f"{path} is damaged: its content is not the one that it is named after")
        if path != target and not (target.exists() and hash_of(target) == digest):
            _copy(path, target)
        return target.relative_to(folder.path).as_posix()

    for part in HOLD_FILES:
        tree[part] = map_files(tree[part], Path.cwd(), kept)
    tree["inputs"] = hashes
    return tree


def _keep_run(run: RunFolder, folder: RunFolder) -> str:
    """The policies of another run, without its experience: the name of what was kept of it."""
    folder.inputs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.inputs, prefix=".run-") as scratch:
        kept = RunFolder(Path(scratch) / "run")
        places: dict[Which, Path] = {"newest": Checkpoints(kept.checkpoints).path(1), "best": kept.best}
        for which, place in places.items():
            if which == "newest" or run.best.is_dir():
                save(place, only_weights(read_state(run, which)))
        if run.inputs.is_dir():
            shutil.copytree(run.inputs, kept.inputs)
        target = folder.inputs / f"{given_stem(run.path.name)}-{hash_of(kept.path)[:12]}"
        if not target.exists():
            os.replace(kept, target)
    return target.relative_to(folder.path).as_posix()


def keep_plugins(recipe: Recipe, folder: RunFolder) -> list[str]:
    """Copy the sources of plug-ins that are not installed; names of those that differ from what was kept before."""
    changed = []
    for path, name in _plugin_sources(recipe):
        target = folder.plugins / name
        content = path.read_bytes()
        if target.exists() and target.read_bytes() == content:
            continue
        changed += [name] if target.exists() else []
        write_atomically(target, content)
    return changed


def _plugin_sources(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """(file, name below the folder of its plug-in) of every module that was imported from beside a plug-in."""
    names = [*recipe.plugins, *([recipe.env.id.rpartition(":")[0]] if ":" in recipe.env.id else [])]
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")]
    installed.append(PACKAGE)
    roots = []
    for name in names:
        file = getattr(importlib.import_module(name.partition(".")[0]), "__file__", None)
        if file is None:
            continue
        path = Path(file).resolve()
        root = path.parent.parent if path.name == "__init__.py" else path.parent
        if not any(path.is_relative_to(each) for each in installed):
            roots.append(root)
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        path = Path(file) if isinstance(file, str) else Path()
        if not path.is_absolute() or path.suffix != ".py" or not path.is_file() or module.__name__ == "__main__":
            continue
        path = path.resolve()
        beside = next((each for each in roots if path.is_relative_to(each)), None)
        if beside is not None and not any(path.is_relative_to(each) for each in installed):
            yield path, path.relative_to(beside).as_posix()


def hash_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and contents."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for each in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{each.relative_to(path).as_posix()} {hash_of(each)}\n".encode())
    return digest.hexdigest()


def _count(path: Path) -> int:
    """Files in a folder, counted no further than it matters; 1 for a file."""
    count = 0
    for _, _, files in os.walk(path):
        count += len(files)
        if count > MOST_FILES:
            break
    return count


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.unlink(missing_ok=True)
    if source.is_dir():
        shutil.copytree(source, temporary)
        shutil.rmtree(target, ignore_errors=True)
    else:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
