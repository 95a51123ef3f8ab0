"""Whether something can do something is asked by type: what the engine asks by name, `hasattr`, is counted."""

import ast
from collections import Counter

from tests.lab import ROOT


def questions(source):
    """How often a program asks by name whether an object has an attribute."""
    found = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
    return found


# File: how many at most, and of whom.
ALLOWED = {
    "buffer/intake.py": (1, "arrays of anybody"),
    "files.py": (2, "numbers of NumPy and torch"),
    "learning/optimizer.py": (1, "what a version of torch has"),
    "networks/trainable.py": (1, "layers that peft has wrapped"),
    "options.py": (2, "dataclasses of anybody"),
    "pools/batches.py": (2, "Gymnasium environments"),
    "pools/making.py": (1, "modules of anybody"),
    "pools/pool.py": (1, "Gymnasium environments"),
    "pools/promises.py": (2, "Gymnasium environments"),
    "pools/worker_process.py": (1, "Python's fork server"),
    "pools/workers.py": (1, "the operating system"),
    "pools/wrappers.py": (5, "Gymnasium wrappers"),
    "runs/catalogue.py": (2, "constraints of pydantic, docstrings of anybody"),
    "registry.py": (1, "options of plug-ins, which may be plain functions"),
    "runs/console.py": (1, "the terminal"),
    "runs/inputs.py": (2, "modules of anybody"),
    "tokens/prefix.py": (2, "configurations of Hugging Face"),
}


def test_what_is_asked_by_name_is_listed():
    asked = Counter()
    for path in sorted((ROOT / "embodied_rft").rglob("*.py")):
        if count := questions(path.read_text(encoding="utf-8")):
            asked[path.relative_to(ROOT / "embodied_rft").as_posix()] = count
    assert sum(asked.values()) > 20  # the measurement sees any
    assert {file: count for file, count in asked.items() if count > ALLOWED.get(file, (0, ""))[0]} == {}


def test_a_question_is_seen():
    assert questions('hasattr(policy, "value") or getattr(policy, "value", None) or getattr(policy, "value")') == 2
