"""Who may import whom: an ordered list of rooms, and every import counted, wherever in a file it hides."""

import ast
import importlib.util
import shutil
from typing import NamedTuple

import pytest

from tests.lab import ROOT

FOLDERS = ("embodied_rft", "envs", "agents")
PLUGINS = ("envs", "agents", "configs")  # found by id, never imported by the engine
# A room imports only from rooms before it.
LAYERS = """
    data names variables registry options files seeding device distributed
    pools turns networks tokens buffer policy experience learning objectives
    evaluation runs stages report testing doctor train cli
""".split()
ORDER = [*LAYERS, "embodied_rft"]  # the package itself is the front door: it re-exports what plug-in authors need
HIGHEST_USE = {"envs": "buffer", "agents": "learning"}  # plug-ins of ours: the last room that they may import from
MOST_FILES = 14  # directly in embodied_rft/
# These name packages by string, which is how plug-ins get in.
DOORS = {"embodied_rft.registry"}


class Import(NamedTuple):
    """Import("embodied_rft.buffer.ring", 12): what is imported, in which line."""

    module: str
    line: int


def modules_of(root):
    """{dotted name: file}; embodied_rft/envs/x.py and envs/x.py are both embodied_rft.envs.x."""
    found = {}
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        parts = parts if parts[0] == "embodied_rft" else ["embodied_rft", *parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(tree, name, modules):
    """Modules of ours that a module names: imported on top, in functions, for typing, or by a string."""
    found = set()
    is_package = modules[name].name == "__init__.py"
    package = name if is_package else name.rpartition(".")[0]

    def add(module, line):
        if module in modules and module != name:
            found.add(Import(module, line))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            parent = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                add(full if (full := f"{base}.{alias.name}") in modules else base, node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if "." in node.value:  # import_module("embodied_rft.x"), an entry point "embodied_rft.x:Name"
                add(node.value.partition(":")[0], node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node).startswith("importlib.import_module('."):
            add(importlib.util.resolve_name(node.args[0].value, package), node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node) == "import_files(__name__, __path__)":
            for module in modules:  # a package that imports all its files
                if module.rpartition(".")[0] == name:
                    add(module, node.lineno)
    return found


def graph_of(root):
    """{module: its imports} of a whole checkout."""
    modules = modules_of(root)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    return {name: imports_of(tree, name, modules) for name, tree in trees.items() if name not in DOORS}


def room_of(module):
    """The room of a module: "buffer" of embodied_rft.buffer.ring."""
    return module.split(".")[1] if "." in module else module


def upward_imports(graph):
    """What the order of the rooms forbids, one sentence each."""
    rank = {room: place for place, room in enumerate(ORDER)}
    highest = {room: rank[HIGHEST_USE.get(room, room)] for room in (*ORDER, *HIGHEST_USE)}
    found = []
    for module, imports in graph.items():
        room = room_of(module)
        assert room in highest, f"the room {room} has no place in LAYERS"
        for imported, line in sorted(imports):
            other = room_of(imported)
            if other == room:
                continue
            if other in PLUGINS:
                found.append(f"{module}:{line} imports {imported}, which is found by id")
            elif rank[other] > highest[room]:
                found.append(f"{module}:{line} imports {imported}, which is above it")
    return found


def circles(graph):
    """Modules that can reach themselves."""

    def reachable(start):
        seen, waiting = set(), [imported.module for imported in graph.get(start, ())]
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += [imported.module for imported in graph.get(module, ())]
        return seen

    return sorted(module for module in graph if module in reachable(module))


@pytest.fixture(scope="module")
def graph():
    return graph_of(ROOT)


def test_every_room_imports_only_from_rooms_before_it(graph):
    assert sum(map(len, graph.values())) > 2 * len(graph)  # the measurement sees imports at all
    assert upward_imports(graph) == []


def test_no_file_can_reach_itself(graph):
    assert circles(graph) == []


def test_data_imports_nothing_of_ours(graph):
    assert graph["embodied_rft.data"] == set()


def test_few_files_lie_directly_in_the_engine():
    assert len(list((ROOT / "embodied_rft").glob("*.py"))) <= MOST_FILES


# --- the measurements see what they measure ---

UPWARD = """
from embodied_rft.runs.session import Session
def later(): from embodied_rft.runs import session
def later(): import embodied_rft.runs.session as session
def later(): from ..runs.session import Session
if TYPE_CHECKING: from embodied_rft.runs.session import Session
def later(): return importlib.import_module("embodied_rft.runs.session")
def later(): return importlib.import_module("..runs.session", __package__)
def later(): return __import__("embodied_rft.runs.session")
"""


def test_planted_imports_are_found_wherever_they_hide(tmp_path):
    """In a copy: upward ones of every form, an environment in the engine, a run in an environment, a circle."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in {
        "embodied_rft/buffer/ring.py": UPWARD,
        "embodied_rft/doctor.py": "MINE = 'embodied_rft.envs.manipulation.fetch:FetchEnv'\n",
        "envs/text/tasks.py": "def later():\n    from embodied_rft.runs import inputs\n",
        "embodied_rft/pools/incidents.py": "def later():\n    from embodied_rft.pools.pool import make_pool\n",
    }.items():
        with open(tmp_path / file, "a", encoding="utf-8") as planted:
            planted.write(text)
    graph = graph_of(tmp_path)
    found = upward_imports(graph)
    lines = {
        sentence.partition(" ")[0] for sentence in found if "embodied_rft.runs.session, which is above" in sentence
    }
    assert len(lines) == UPWARD.count("runs.session") + 1  # one of them says `from embodied_rft.runs import session`
    assert len(found) == len(lines) + 2
    assert any("embodied_rft.envs.manipulation.fetch, which is found by id" in sentence for sentence in found)
    assert any("embodied_rft.runs.inputs, which is above it" in sentence for sentence in found)
    assert {"embodied_rft.pools.incidents", "embodied_rft.pools.pool"} <= set(circles(graph))


def test_a_package_that_imports_all_its_files_is_seen(graph):
    assert "embodied_rft.objectives.dqn" in {imported.module for imported in graph["embodied_rft.objectives"]}
