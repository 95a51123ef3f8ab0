"""`import embodied_rft` is cheap, and gives by name what authors of plug-ins need."""

import ast
import importlib
import subprocess
import sys

import pytest

import embodied_rft
from tests.lab import ROOT


def test_the_package_imports_nothing_heavy():
    """Neither when it is imported nor when it is looked into."""
    script = "import sys, embodied_rft; dir(embodied_rft); print([m for m in sys.modules if m.startswith('embodied')])"
    script += "; print({'torch', 'numpy', 'mujoco', 'gymnasium', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "['embodied_rft']\nset()\n"


@pytest.mark.parametrize("name", embodied_rft.__all__)
def test_a_name_is_the_thing_itself(name):
    module = importlib.import_module(f"embodied_rft.{embodied_rft._WHERE[name]}")
    assert getattr(embodied_rft, name) is getattr(module, name) and name in dir(embodied_rft)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "embodied_rft" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"embodied_rft.{module}" for name, module in embodied_rft._WHERE.items()}


def test_no_name_hides_a_module():
    """`from embodied_rft import train` must mean one thing, whatever was imported before."""
    modules = {path.stem for path in (ROOT / "embodied_rft").iterdir()}
    assert modules & set(embodied_rft.__all__) == set()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Decision'"):
        embodied_rft.Decision  # noqa: B018
    with pytest.raises(ImportError, match="Decision"):
        from embodied_rft import Decision  # noqa: F401
