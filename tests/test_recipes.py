"""Every shipped recipe runs all of its stages for a moment on the CPU."""

import importlib.resources
from pathlib import Path

import pytest
import yaml

from benchmarks.fingerprints import shrink
from embodied_rft.envs.gui.chromium import INSTALL, find_browser
from embodied_rft.learning.agent import build_agent
from embodied_rft.options import ConfigError
from embodied_rft.pools.making import find_spec
from embodied_rft.runs.recipe import describe_recipes, dump_recipe, load_recipe, recipe_names
from embodied_rft.train import train
from tests.agents.test_agents import ACTION, STATE
from tests.lab.draws import generator

CONFIGS = Path(str(importlib.resources.files("embodied_rft.configs")))
BASES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*base.yaml"))
SMALL = {
    "episodes": 8,  # a whole group
    "episodes_per_iteration": 16,
    "group_size": 8,
    "times": 2,
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


def opens_pages(id):
    """Whether an environment needs a browser."""
    return str(find_spec(id).kwargs.get("batch", "")).endswith("gui.site:Pages")


@pytest.mark.parametrize("name", BASES)
def test_bases_are_extended_and_not_run(name, tmp_path):
    assert name not in recipe_names() and name not in describe_recipes()
    with pytest.raises(ValueError, match=r"env\.id is required|there to be extended"):
        train(load_recipe(name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_runs(name, tmp_path):
    recipe = load_recipe(name)
    if opens_pages(recipe.env.id) and find_browser() is None:
        pytest.skip(INSTALL)
    tree = yaml.safe_load(dump_recipe(recipe))
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(shrink(tree, SMALL)))
    session = train(load_recipe(small), tmp_path / "run", quiet=True)
    assert len(session.records) >= 1
    assert (tmp_path / "run" / "report.html").stat().st_size > 5_000


@pytest.mark.parametrize(
    "override, message",
    [
        ("threads=0", "threads: input should be greater than 0; got 0"),
        ("env.num_workers=0", "env.num_workers: input should be greater than 0"),
        ("checkpoint_seconds=-1", "checkpoint_seconds: input should be greater than or equal to 0"),
        ("plugins=mine", "plugins must be a list of modules"),
        ("stages.0={evaluate: {episodes: 0}}", "stages.0.evaluate.episodes: input should be greater than 0"),
        ("stages.0={evaluate: {video: maybe}}", "stages.0.evaluate.video: input should be 'failure' or 'success'"),
        ("stages.0={finetune: {objective: ppo, group_size: 0}}", "group_size: input should be greater than 0"),
        (
            "stages.0={finetune: {objective: sac, decisions: -5}}",
            "decisions: input should be greater than or equal to 0",
        ),
        ("stages.0={finetune: {objective: sac, until: {success: 0.5}}}", "there is none: set evaluate_every"),
        ("stages.0={finetune: {objective: sac, learner: {clip_norm: 0}}}", "clip_norm: input should be greater than 0"),
        ("stages.0={finetune: {objective: sac, learner: {ema: 1}}}", "ema: input should be less than 1"),
        ("stages.0={finetune: {objective: {id: ppo, gamma: 2}}}", "gamma: input should be less than or equal to 1"),
        ("stages.0={finetune: {objective: {id: gpg, batch_size: 0}}}", "batch_size: input should be greater than 0"),
        ("stages.0={pretrain: {objective: {id: rlpd, tau: 2}}}", "tau: input should be less than or equal to 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_runs(override, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe("demo", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize("spec", [{"id": "gaussian", "hidden": [0]}, {"id": "flow", "width": 0}])
def test_a_layer_without_width_is_refused(spec):
    with pytest.raises(ValueError, match="widths of at least 1 are expected"):
        build_agent(spec, STATE, ACTION, generator())
