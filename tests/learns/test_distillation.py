"""A teacher that reads the state teaches a student that sees pixels; a student that is shown nothing learns nothing."""

import json

import yaml

from embodied_rft.runs.recipe import load_recipe
from embodied_rft.train import train
from tests.lab.harness import fails
from tests.lab.toy_image import ID

GAUSSIAN = {"id": "gaussian", "hidden": [64, 64], "keys": ["image", "robot_state"], "deterministic": True}


def recipe(tmp_path, student, *, seed=0, updates=300, adapt=(), **options):
    """Clone a teacher from its demonstrator, let it show what it can, clone the student from that."""
    tree = {
        "name": "distill",
        "seed": seed,
        "env": {"id": ID, "num_envs": 32, "pool": "sync"},
        "agent": {"id": "gaussian", "hidden": [64, 64], "keys": ["state"], "deterministic": True},
        "buffer": {"capacity": 4_000},
        "checkpoint_seconds": 1000.0,
        "stages": [
            {"demonstrate": {"episodes": 100, "noise": 0.3}},
            {"pretrain": {"objective": "bc", "updates": 400, "learner": {"learning_rate": 1e-3}}},
            *adapt,
            {"evaluate": {"name": "teacher", "episodes": 100}},
            {"environment": {"options": {"camera": True, **options}}},
            {"collect": {"episodes": 500}},
            {"student": {"agent": student}},
            {
                "pretrain": {
                    "objective": {"id": "bc", "selection": {"min_return": 1.0}},
                    "updates": updates,
                    "log_every": 20,
                    "learner": {"learning_rate": 1e-3},
                }
            },
            {"evaluate": {"name": "student", "episodes": 100}},
        ],
    }
    path = tmp_path / "distill.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path)


def success(folder):
    files = [json.loads(f.read_text()) for f in sorted((folder / "evaluations").glob("*.json"))]
    return {one["name"]: one["success"] for one in files}


def student_reaches_teacher(tmp_path, student, **options):
    train(recipe(tmp_path, student, **options), tmp_path / "run", quiet=True, report=False)
    reached = success(tmp_path / "run")
    if reached["teacher"] < 0.95:
        raise RuntimeError(f"the teacher is no good: {reached}")
    assert reached["student"] > reached["teacher"] - 0.15, reached


def test_student_from_pixels_reaches_the_teacher(tmp_path):
    student_reaches_teacher(tmp_path, GAUSSIAN)


def test_student_that_is_shown_blank_images_fails(tmp_path):
    fails(student_reaches_teacher, tmp_path, GAUSSIAN, blank=True)
