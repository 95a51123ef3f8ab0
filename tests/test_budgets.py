"""What keeps the code readable, measured: sizes, base chains, what every file says of itself."""

import ast
import importlib.util

import pytest

from tests.lab import ROOT

FOLDERS = ("embodied_rft", "envs", "agents", "configs")
MAX_FILE, MAX_FUNCTION, MAX_CHAIN = 500, 60, 2
# What may be anything: plain data (JSON, YAML), options and classes of plug-ins found by id, actions that only their
# own policy knows, values of Gymnasium, models of other libraries, autograd's ctx. The number may fall.
MAX_ANY = 85
ABSTRACT = {"object", "Protocol", "Generic", "ABC", "NamedTuple", "TypedDict"}  # say nothing about behaviour
ABSTRACT |= {"Objective", "Policy", "Drawn"}  # contracts, whose defaults do next to nothing


LIBRARY = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
EVERYTHING = [*LIBRARY, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in EVERYTHING}


def long_files(sources, limit=MAX_FILE):
    return {name: lines for name, text in sources.items() if (lines := len(text.splitlines())) > limit}


def long_functions(trees, limit=MAX_FUNCTION):
    found = {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > limit:
                    found[f"{name}:{node.lineno} {node.name}"] = lines
    return found


def base_chains(trees):
    """{class: how many classes its longest chain of bases has}; outside ours only the first is seen and counted."""
    bases = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                plain = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
                bases[node.name] = [ast.unparse(base).split(".")[-1] for base in plain]

    def length(name, seen=()):
        above = () if name in seen else bases.get(name, ())
        return max(((base not in ABSTRACT) + length(base, (*seen, name)) for base in above), default=0)

    return {name: length(name) for name in bases}


def bare_any(trees):
    """Arguments and results of public functions that are annotated as plain `Any`."""

    def functions(body, within=""):
        for node in body:
            shown = not node.name.startswith("_") if hasattr(node, "name") else False
            if isinstance(node, ast.ClassDef) and shown:
                yield from functions(node.body, f"{within}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and (shown or node.name in ("__init__", "__call__")):
                yield within + node.name, node

    found = []
    for file, tree in trees.items():
        for name, node in functions(tree.body):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            hints = {each.arg: each.annotation for each in given} | {"return": node.returns}
            found += [f"{file}:{name} {key}" for key, hint in hints.items() if hint and ast.unparse(hint) == "Any"]
    return found


def names(paths):
    return {path.relative_to(ROOT).as_posix(): path for path in paths}


def test_no_file_is_longer_than_500_lines():
    assert long_files({name: path.read_text(encoding="utf-8") for name, path in names(EVERYTHING).items()}) == {}


def test_no_function_is_longer_than_60_lines():
    assert long_functions({name: TREES[path] for name, path in names(EVERYTHING).items()}) == {}


def test_base_chains_are_at_most_two():
    chains = base_chains({path: TREES[path] for path in LIBRARY})
    assert {name: length for name, length in chains.items() if length > MAX_CHAIN} == {}


def test_public_signatures_say_what_they_take_and_give():
    found = bare_any({name: TREES[path] for name, path in names(LIBRARY).items()})
    assert len(found) <= MAX_ANY, "\n".join(found)


def test_every_file_says_what_it_is():
    silent = [name for name, path in names(LIBRARY).items() if not (ast.get_docstring(TREES[path]) or "").strip()]
    assert silent == []
    assert [name for name, path in names(LIBRARY).items() if "TODO" in path.read_text(encoding="utf-8")] == []


# --- the measurements see what they measure ---


def test_the_measurements_find_violations():
    assert long_files({"a": "x\n" * 501, "b": "x\n" * 500}) == {"a": 501}
    assert list(long_functions({"f": ast.parse("def g():\n" + "    x = 1\n" * 60)}).values()) == [61]
    chains = base_chains(
        {
            "f": ast.parse(
                "class A(nn.Module): ...\nclass B(A): ...\nclass C(B, Generic[T]): ...\nclass P(Protocol): ..."
            )
        }
    )
    assert chains == {"A": 1, "B": 2, "C": 3, "P": 0}
    source = "def f(a: Any, b: dict[str, Any], **c: Any): ...\nclass A:\n  def __init__(self, d: Any) -> Any: ..."
    assert bare_any({"f": ast.parse(f"{source}\ndef _own(x: Any): ...")}) == [
        "f:f a", "f:f c", "f:A.__init__ d", "f:A.__init__ return"
    ]  # fmt: skip


# --- README and docs ---


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_one_line_for_every_room(generate):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        section = text[text.index(f"\n{folder}/") :]
        for name in generate.rooms_of(folder):
            assert f"\n  {name} " in section, f"{folder}/{name} is missing: run `make docs`"


def test_generated_parts_are_up_to_date(generate):
    stale = [
        page.name for page in generate.pages() if generate.generated(text := page.read_text(encoding="utf-8")) != text
    ]
    assert stale == [], "run `make docs`"
