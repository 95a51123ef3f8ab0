"""The run folder: one place knows its names, and it knows all of them."""

import ast
from pathlib import Path

import pytest

from embodied_rft.runs.folder import RunFolder
from tests.lab import ROOT

NAMES = {path.name for path in vars(RunFolder("run")).values()} - {"run"}
FILES = {name for name in NAMES if "." in name}
OURS = sorted(path for folder in ("embodied_rft", "agents", "envs") for path in (ROOT / folder).rglob("*.py"))


def spelled(text):
    """Names of a run folder's files that a module's code holds; of its folders those that it joins to a path."""
    tree = ast.parse(text)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found |= {name for name in FILES if name in node.value.split("/")}
        joined = node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else None
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Path", "joinpath", "glob", "join")):
            joined = node.args[-1] if node.args else None
        if isinstance(joined, ast.Constant) and isinstance(joined.value, str):
            found |= NAMES.intersection(joined.value.split("/"))
    return found


def test_nothing_else_knows_the_names():
    assert not {str(path): names for path in OURS if path.name != "folder.py" and (names := spelled(path.read_text()))}


@pytest.mark.parametrize(
    "code",
    [
        'x = folder / "checkpoints"',
        'open(f"{folder}/run.json")',
        'folder.glob("videos/*")',
        'METRICS = "metrics.jsonl"',
    ],
)
def test_a_name_that_is_spelled_elsewhere_is_seen(code):
    assert spelled(code) and not spelled('"""Reads run.json."""\nx = {"inputs": 1}')


def test_it_stands_for_its_path(tmp_path):
    folder = RunFolder(tmp_path)
    assert Path(folder) == tmp_path and f"{folder}" == str(tmp_path) and not folder.holds_run()
    assert folder.of_process(0) is folder and folder.of_process(2).metrics == tmp_path / "ranks" / "2" / "metrics.jsonl"
