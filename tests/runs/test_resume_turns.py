"""kill -9 in the middle of conversations: what was said before is read again, to the bit."""

import signal

import pytest
import yaml

from embodied_rft.runs.checkpoint import Checkpoints
from tests.lab.mortal import DIES_AT
from tests.runs.test_resume import assert_same_run, finish, start

TURNS, ENVS, ITERATION = 5, 4, 12  # an iteration is three turns of each environment: it ends inside a conversation
LAKES = {"of": "embodied_rft/FrozenLake-v0", "instead": "right"}
LINES = {"of": "embodied_rft/NumberLine-v0", "instead": "right", "observe": "image"}
SIZES = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
PPO = {"id": "ppo", "batch_size": 6, "num_epochs": 2}
CASES = {
    "texts": (LAKES, {"tiny": SIZES}, PPO, {}),
    "texts, replayed": (
        LAKES,
        {"tiny": SIZES},
        {"id": "archer", "batch_size": 6, "critic_hidden": [8]},
        {"updates_per_decision": 0.2},
    ),
    "pictures": (LINES, {"tiny_vlm": {**SIZES, "vision_size": 16}}, PPO, {}),
}


def recipe_of(told, model, objective, more):
    return {
        "name": "resume-turns",
        "seed": 3,
        "env": {
            "id": "tests.lab.mortal:toy/Mortal-v0",
            "num_envs": ENVS,
            "options": {**told, "style": "short", "parser": "words", "turns": TURNS},
        },
        "agent": {"id": "language", "model": model, "prompt": "plain", "key": "message", "max_new_tokens": 4},
        "buffer": {"capacity": 60},  # smaller than the run: the ring wraps
        "checkpoint_seconds": 0.0,
        "threads": 1,
        "stages": [
            {
                "finetune": {
                    "objective": objective,
                    "decisions": 8 * ITERATION,
                    "decisions_per_iteration": ITERATION,
                    "evaluate_every": 4 * ITERATION,
                    "evaluate_episodes": ENVS,
                    **more,
                }
            },
        ],
    }


@pytest.fixture(scope="module", params=CASES)
def reference(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    recipe = folder / "recipe-in.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(*CASES[request.param])))
    finish(folder / "run", recipe)
    return recipe, folder / "run"


def kill_at(turn, folder, recipe, monkeypatch):
    """kill -9 of itself in a turn of its environments."""
    with monkeypatch.context() as patch:
        patch.setenv(DIES_AT, str(turn))
        process = start(folder, recipe)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, output


def test_killed_in_the_middle_of_conversations_is_bit_equal_to_never_killed(tmp_path, reference, monkeypatch):
    """Inside an iteration, whose first turns are lost, and then inside the evaluation of the learning curve."""
    recipe, uninterrupted = reference
    for turn in (8, 9):
        kill_at(turn, tmp_path / "run", recipe, monkeypatch)
        said = Checkpoints(tmp_path / "run" / "checkpoints").newest()[1]["collector"]["past"]
        assert any(0 < len(before) < TURNS for before in said), "the checkpoint must lie inside a conversation"
    output = finish(tmp_path / "run", recipe)
    assert "continuing" in output
    assert_same_run(tmp_path / "run", uninterrupted)
