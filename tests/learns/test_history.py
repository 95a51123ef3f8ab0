"""What was told or shown in an earlier turn is used: PPO learns that in seconds, and cannot where it is not read."""

import pytest

import tests.lab.recall  # noqa: F401
from embodied_rft.options import parse
from embodied_rft.runs.recipe import Recipe
from embodied_rft.train import train
from tests.lab.harness import fails

pytestmark = pytest.mark.learning

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
READS, SEES = {"tiny": SIZES}, {"tiny_vlm": {**SIZES, "vision_size": 16}}


def recalls(folder, model, **history):
    """At least nine in ten, where chance has five."""
    recipe = {
        "name": "recall",
        "env": {"id": "toy/Recall-v0", "num_envs": 64, "options": {"drawn": "tiny_vlm" in model}},
        "agent": {
            "id": "language",
            "model": model,
            "prompt": "plain",
            "key": "message",
            "max_new_tokens": 1,
            "history": history,
        },
        "buffer": {"capacity": 2_000},
        "threads": 1,
        "stages": [
            {
                "finetune": {
                    "objective": {"id": "ppo", "batch_size": 96, "num_epochs": 4, "gamma": 1.0, "value_hidden": [32]},
                    "episodes_per_iteration": 128,
                    "decisions": 12 * 384,
                    "learner": {"learning_rate": 3e-3, "clip_norm": 1.0},
                }
            },
            {"evaluate": {"episodes": 100}},
        ],
    }
    session = train(parse(Recipe, recipe), folder, quiet=True, report=False)
    assert session.records[-1]["metrics"]["success"] >= 0.9


@pytest.mark.parametrize("history", [{}, {"turns": 0}], ids=["full", "the first turn"])
def test_a_letter(history, tmp_path):
    recalls(tmp_path, READS, **history)


def test_a_letter_that_is_not_read_again_fails(tmp_path):
    fails(recalls, tmp_path, READS, turns=0, first=False)


def test_a_picture(tmp_path):
    recalls(tmp_path, SEES)


def test_a_picture_that_is_not_seen_again_fails(tmp_path):
    """Nor what was said of it: with the picture alone left out, an agent learns to tell itself."""
    fails(recalls, tmp_path, SEES, turns=0, first=False)
