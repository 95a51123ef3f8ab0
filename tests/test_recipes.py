"""Every shipped recipe runs all of its stages for a moment on the CPU."""

import pytest
import yaml

from embodied_rft.config import dump_recipe, load_recipe, recipe_names
from embodied_rft.session import train

SMALL = {
    "episodes": 4,
    "updates": 4,
    "decisions": 400,
    "decisions_per_iteration": 200,
    "evaluate_every": 200,
    "evaluate_episodes": 2,
    "num_envs": 4,
    "capacity": 2_000,
    "batch_size": 16,
    "timesteps": 300,
    "min_return": 0,  # what has learned so little reaches none
}


def shrink(tree):
    """The recipe with every amount cut down; what is learned, and how, stays."""
    if isinstance(tree, dict):
        small = {k: min(v, SMALL[k]) for k, v in tree.items() if k in SMALL and isinstance(v, int | float)}
        return {k: small[k] if k in small else shrink(v) for k, v in tree.items()}
    return [shrink(item) for item in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize("name", [n for n in recipe_names() if not n.endswith("base")])
def test_recipe_runs(name, tmp_path):
    tree = yaml.safe_load(dump_recipe(load_recipe(name)))
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(shrink(tree)))
    session = train(load_recipe(small), tmp_path / "run", quiet=True)
    assert len(session.records) >= 1
    assert (tmp_path / "run" / "report.html").stat().st_size > 5_000
