"""Writes the parts of README.md and docs/ that follow from the code: `make docs`; `--check` only says what is stale.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; `<!-- generated: contract
module.Class -->` is that class as those who use or derive from it meet it.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "embodied_rft": "the engine; it never imports the three folders below, it finds them by id",
    "envs": "Gymnasium environments, imported as `embodied_rft.envs`",
    "agents": "policies, one a file, imported as `embodied_rft.agents`",
    "configs": "recipes, found by name",
}


def rooms_of(folder: str) -> list[str]:
    """What the tree shows of a top-level folder: its packages, and of the engine the files that lie in none."""
    packages = sorted(f"{path.parent.name}/" for path in (ROOT / folder).glob("*/__init__.py"))
    files = sorted(path.name for path in (ROOT / "embodied_rft").glob("*.py") if path.name != "__init__.py")
    return packages + (files if folder == "embodied_rft" else [])


def first_sentence(path: Path) -> str:
    """What a package or a file says about itself: the first sentence of its docstring."""
    text = (path / "__init__.py" if path.is_dir() else path).read_text(encoding="utf-8")
    text = " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)`])(?<!et al)\.(?:\s|$)", text, maxsplit=1)[0].rstrip(".")


def tree() -> str:
    """The tree of the README: one line a room."""
    rooms = {folder: rooms_of(folder) for folder in FOLDERS}
    width = max(len(name) for names in rooms.values() for name in names)
    lines = []
    for folder, purpose in FOLDERS.items():
        lines.append(f"{folder}/".ljust(width + 4) + purpose)
        lines += [f"  {name:<{width}}  {first_sentence(ROOT / folder / name)}" for name in rooms[folder]]
    return "```text\n" + "\n".join(lines) + "\n```"


def plugin_table(kind: str) -> str:
    """| id | what it does | for everything of a kind."""
    from embodied_rft import registry

    rows = ["| id | what it does |", "| --- | --- |"]
    for id in registry.shipped(kind):
        rows.append(f"| `{id}` | {_first_line(registry.find(kind, id))} |")
    return "\n".join(rows)


def stage_table() -> str:
    """| word | what it does | options with their defaults |."""
    from embodied_rft import registry

    rows = ["| word | what it does | options |", "| --- | --- | --- |"]
    for word in registry.shipped("stage"):
        stage = registry.find("stage", word)
        config = getattr(stage, "Config", None)
        names = [f"`{f.name.rstrip('_')}`" for f in dataclasses.fields(config)] if config else []
        rows.append(f"| `{word}` | {_first_line(stage)} | {', '.join(names) or 'none'} |")
    return "\n".join(rows)


def env_table() -> str:
    """| id | what it is | of our environments."""
    from embodied_rft.runs.listing import known_of

    return "\n".join(
        [
            "| id | what it is |",
            "| --- | --- |",
            *(f"| `{k}` | {v} |" for k, v in sorted(known_of("envs").items()) if not _of_family(k)),
        ]
    )


def options_tables() -> str:
    """Every option of everything that a recipe may name; of presets, what differs from what they are based on."""
    import gymnasium

    from embodied_rft import registry
    from embodied_rft.runs.catalogue import KINDS, TOPICS, of_dataclass, options_of

    registry.load_plugins()
    parts = ["## Parts of a recipe"]
    for topic, cls in TOPICS.items():
        parts += [f"### `{topic}`", _first_line(cls), _table(of_dataclass(cls))]
    for kind in KINDS:
        ids = registry.shipped(kind) if kind != "env" else sorted(i for i in gymnasium.registry if _is_ours(i))
        with_options = {id: rows for id in ids if not _of_family(id) and (rows := options_of(kind, id))}
        parts += [f"## `erft list {kind}s`"] if with_options else []
        shown: dict[str, str] = {}
        for id, rows in with_options.items():
            base = None if kind == "env" else base_of(kind, id)
            own = rows if base is None else [row for row in rows if row not in options_of(kind, base)]
            as_base = "" if base is None else f"All options of `{base}`{', but' if own else ''}:"
            table = "\n\n".join(part for part in (as_base, _table(own) if own else "") if part)
            twin = shown.setdefault(table, id)
            parts += [f"### `{id}`", table if twin == id or base is not None else f"As `{twin}`."]
    return "\n\n".join(parts)


def base_of(kind: str, id: str) -> str | None:
    """The id whose options this one has, too, with other defaults: of "td3", "sac"."""
    from embodied_rft import registry

    ids = {registry.config_of(kind, known): known for known in reversed(registry.known(kind))}
    config = registry.config_of(kind, id)
    bases = () if config is None else config.__mro__[1:]
    return next((ids[base] for base in bases if base in ids and ids[base] != id), None)


def contract(name: str) -> str:
    """What "package.module.Class" offers, or how "package.module.function" is called, with what each says of itself."""
    module, _, owner = name.rpartition(".")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = next(n for n in ast.parse(source).body if isinstance(n, kinds) and n.name == owner)
    if isinstance(found, ast.FunctionDef):
        return "```python\n" + "\n".join(_signature(found)) + "\n```"
    bases = ", ".join(map(ast.unparse, found.bases))
    lines = [f"class {owner}({bases}):" if bases else f"class {owner}:"]
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            line = source.splitlines()[node.lineno - 1].strip()
            lines.append("    " + re.sub(r"# noqa: \S+ +", "# ", line))
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            lines += [f"    {line}" for line in _signature(node)]
    return "```python\n" + "\n".join(lines) + "\n```"


def _signature(node: ast.FunctionDef) -> list[str]:
    """How a function is called, or what a property is, and below it the first paragraph of its docstring."""
    assert node.returns is not None, f"{node.name} does not say what it returns"
    arguments = re.sub(r"(?<=[\w\]])=", " = ", ast.unparse(node.args))
    head = f"def {node.name}({arguments}) -> {ast.unparse(node.returns)}"
    if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
        head = f"{node.name}: {ast.unparse(node.returns)}  # property"
    said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    lines = textwrap.wrap(head, 112, subsequent_indent="    ")
    return lines + textwrap.wrap(said, 112, initial_indent="    # ", subsequent_indent="    # ")


def _is_ours(id: str) -> bool:
    return id.startswith("embodied_rft/")


def _of_family(id: str) -> bool:
    """Whether it is one of many that fix an option of another; a page of its own lists them."""
    return re.fullmatch(r"embodied_rft/MiniWoB-(?!v\d).*", id) is not None


def miniwob_table() -> str:
    """Every task of MiniWoB++: what it pays, what counts as solved; and what `benchmarks.miniwob_parity` measured."""
    from embodied_rft.envs.gui.miniwob.tasks import TASKS

    measured = json.loads((ROOT / "docs/miniwob.json").read_text(encoding="utf-8"))
    rows = [
        "| task | raw reward | counts as solved | where the two part | demonstrator | as the package | status |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, task in TASKS.items():
        found = measured.get(name, {})
        shown = f"{found['solved']} of {found['episodes']}" if "solved" in found else "none" if not task.expert else "-"
        same = f"{found['same']} of {found['played']}" if "same" in found else "-"
        note = f": {found['differs']}" if found.get("differs") else ""
        rows.append(
            f"| `{name}` | {task.reward} | {task.success.says} | {task.flaw} | {shown} | {same}{note} | {task.status} |"
        )
    return "\n".join(rows)


def _table(rows: Sequence[Any]) -> str:
    lines = ["| option | default | values | meaning |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = (f"`{row.name}`", row.default and f"`{row.default}`", row.values, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _first_line(target: object) -> str:
    return (getattr(target, "__doc__", None) or "").strip().partition("\n")[0].replace("|", "\\|")


PARTS: dict[str, Callable[..., str]] = {
    "tree": tree,
    "stages": stage_table,
    "objectives": lambda: plugin_table("objective"),
    "agents": lambda: plugin_table("agent"),
    "envs": env_table,
    "options": options_tables,
    "contract": contract,
    "miniwob": miniwob_table,
}
BLOCK = re.compile(r"(<!-- generated: (\w+)(?: (\S+))? -->\n).*?(\n<!-- end -->)", re.S)


def pages() -> list[Path]:
    """The pages that may have generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def generated(text: str) -> str:
    """The page with its generated parts as they should be."""
    return BLOCK.sub(lambda found: found[1] + PARTS[found[2]](*([found[3]] if found[3] else [])) + found[4], text)


def main() -> int:
    """Write, or with --check only compare."""
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        fresh = generated(text)
        if fresh != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                page.write_text(fresh, encoding="utf-8")
    if stale:
        print(("out of date, run `make docs`: " if "--check" in sys.argv else "written: ") + ", ".join(stale))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
