"""Whether something can do something is asked by type: what the engine asks by name, `hasattr`, is counted."""

import ast
from collections import Counter
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from pydantic.dataclasses import dataclass

from embodied_rft import registry
from embodied_rft.learning.agent import build_agent
from embodied_rft.names import UserError
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.curricula import make_curriculum
from embodied_rft.options import STRICT, parse_stages, walk
from embodied_rft.policy import build_policy
from embodied_rft.runs.sinks import make_plugin_sink
from tests.lab import ROOT

BOX = gymnasium.spaces.Box(-1, 1, (2,), np.float32)


def questions(source):
    """How often a program asks by name whether an object has an attribute."""
    found = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
    return found


# File: how often, and of whom; docs/architecture.md says why.
ALLOWED = {
    "files.py": (2, "numbers of NumPy and torch"),
    "learning/optimizer.py": (1, "what a version of torch has"),
    "networks/trainable.py": (1, "layers that peft has wrapped"),
    "options.py": (1, "dataclasses of anybody"),
    "pools/making.py": (1, "modules of anybody"),
    "pools/hosts.py": (1, "Gymnasium environments"),
    "pools/promises.py": (2, "Gymnasium environments"),
    "pools/worker_process.py": (1, "Python's fork server"),
    "pools/workers.py": (1, "the operating system"),
    "pools/wrappers.py": (1, "Gymnasium wrappers"),
    "runs/catalogue.py": (2, "constraints of pydantic, docstrings of anybody"),
    "registry.py": (1, "options of plug-ins, which may be plain functions"),
    "runs/console.py": (1, "the terminal"),
    "runs/inputs.py": (2, "modules of anybody"),
    "tokens/decoder.py": (2, "configurations of Hugging Face"),
}


def test_what_is_asked_by_name_is_listed():
    asked = Counter()
    for path in sorted((ROOT / "embodied_rft").rglob("*.py")):
        if count := questions(path.read_text(encoding="utf-8")):
            asked[path.relative_to(ROOT / "embodied_rft").as_posix()] = count
    assert asked == {file: count for file, (count, _) in ALLOWED.items()}


def test_a_question_is_seen():
    assert questions('hasattr(policy, "value") or getattr(policy, "value", None) or getattr(policy, "value")') == 2


class Foreign:
    """What a third party might register without deriving from the contract."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """None."""

    def __init__(self, *args, **options):
        self.losses = {}


@pytest.mark.parametrize(
    ("kind", "make", "name"),
    [
        ("agent", lambda: build_policy({"id": "foreign"}, BOX, BOX, torch.Generator()), "Policy"),
        ("objective", lambda: build_objective("foreign"), "Objective"),
        ("credit", lambda: build_objective({"id": "ppo", "credit": "foreign"}), "Credit"),
        ("curriculum", lambda: make_curriculum({"id": "foreign"}), "Curriculum"),
        ("logger", lambda: make_plugin_sink("foreign", {}, Path(), step=0, recipe=None), "Sink"),
        ("stage", lambda: parse_stages(["foreign"]), "Stage"),
    ],
)
def test_a_plug_in_that_derives_from_nothing_is_told_what_to_derive_from(monkeypatch, kind, make, name):
    monkeypatch.setitem(registry._tables[kind], "foreign", Foreign)
    with pytest.raises(UserError, match=rf"foreign.*derive.*{name}"):
        make()


def test_an_option_for_what_a_policy_cannot_have_is_refused():
    agent = build_agent({"id": "gaussian"}, BOX, BOX, torch.Generator())
    with pytest.raises(UserError, match="cut drop has no effect"):
        build_objective({"id": "ppo", "cut": "drop"}).setup(agent)


def test_a_stage_that_holds_stages_runs_them_each_under_its_path():
    stages = parse_stages([{"warm_up": {"decisions": 1}}, {"repeat": {"times": 2, "stages": [{"warm_up": {}}] * 2}}])
    assert [path for path, _ in walk(stages)] == [(0,), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
