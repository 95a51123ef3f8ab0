"""Recipes that would take the machine are refused when they are read, with a sentence."""

import pytest
import yaml

from embodied_rft.options import ConfigError, parse
from embodied_rft.runs.recipe import Recipe, load_recipe
from embodied_rft.runs.yaml_tree import read_yaml

BASE = {
    "env": {"id": "Pendulum-v1", "num_envs": 1},
    "agent": {"id": "gaussian"},
    "stages": [{"evaluate": {"episodes": 1}}],
}


def bomb(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(12), "written out"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_texts_that_grow_are_refused(tmp_path, text, message):
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "bomb.yaml")


def test_anchors_within_measure_are_read():
    assert len(read_yaml(bomb(3))["a2"]) == 9
    merged = read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}")
    assert merged["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": {"id": "Pendulum-v1", "num_envs": 100_000_000}}, r"env\.num_envs: .*65536"),
        ({"env": {"id": "Pendulum-v1", "evaluation_envs": 100_000_000}}, r"env\.evaluation_envs.*65536"),
        ({"agent": {"id": "gaussian", "hidden": [1] * 5000}}, r"agent\.hidden: 5,000 layers"),
        ({"agent": {"id": "diffusion", "num_blocks": 10**7}}, r"agent\.num_blocks: 10,000,000 layers"),
        ({"stages": [{"pretrain": {"objective": {"id": "sac", "critic_hidden": [1] * 5000}}}]}, "critic_hidden: 5,000"),
    ],
)
def test_numbers_without_measure_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        parse(Recipe, yaml.safe_load(yaml.safe_dump({**BASE, **change})))
