"""Handing a skill on: the environment changes, a student takes over and learns from the teacher's experience."""

import numpy as np
import pytest
import torch
import yaml

import embodied_rft.envs  # noqa: F401
from embodied_rft.experience.recut import chunk_trajectories
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.judge import evaluate_run
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.runs.session import Session
from embodied_rft.train import train
from tests.lab.toy_image import ID
from tests.runs.test_resume import same

TEACHER = {"id": "flow", "horizon": 2, "num_steps": 2, "width": 16, "num_blocks": 1, "keys": ["state"]}
RESIDUAL = {"with": "residual", "options": {"hidden": [16], "keys": ["state"]}}
STUDENT = {"id": "flow", "horizon": 3, "num_steps": 2, "width": 16, "keys": ["image", "robot_state"]}
STAGES = [
    {"adapt": {"with": "queued"}},
    {"adapt": RESIDUAL},
    {"environment": {"options": {"camera": True}}},
    {"collect": {"episodes": 12}},
    {"student": {"agent": STUDENT}},
    {"pretrain": {"objective": {"id": "bc", "batch_size": 8}, "updates": 40, "log_every": 10}},
    {"evaluate": {"episodes": 8}},
]


def write(path, stages, agent=TEACHER, **options):
    env = {"id": ID, "num_envs": 4, "pool": "sync"}
    tree = {"name": "hand on", "env": env, "agent": agent, "buffer": {"capacity": 400}, "stages": stages, **options}
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path)


def run(tmp_path, stages, **options):
    return train(write(tmp_path / "in.yaml", stages, **options), tmp_path / "run", quiet=True, report=False)


def test_the_student_gets_the_steps_of_the_teacher_as_its_own_chunks(tmp_path):
    (tmp_path / "before").mkdir()
    taught = run(tmp_path / "before", STAGES[:4])  # stops where the teacher has shown what it can
    steps = list(taught.buffer.trajectories())
    assert len(steps) == 12 and {"image", "state", "base_action"} < set(steps[0].observation)
    buffer = run(tmp_path, STAGES[:5]).buffer
    assert set(buffer.schema.observation) == {"image", "state", "robot_state"} and buffer.schema.action.shape == (6,)
    expected, given = chunk_trajectories(steps, horizon=3, execute=3), list(buffer.trajectories())
    assert len(expected) == len(given)
    for a, b in zip(expected, given, strict=True):
        assert np.array_equal(a.action, b.action) and np.array_equal(a.reward, b.reward) and a.end == b.end
        assert np.array_equal(a.observation["image"], b.observation["image"])


def test_a_student_of_single_steps_keeps_log_probabilities(tmp_path):
    student = {"id": "gaussian", "hidden": [16], "keys": ["robot_state"]}
    session = run(tmp_path, [*STAGES[:4], {"student": {"agent": student}}])
    assert "base_action" not in session.buffer.schema.observation
    batch = session.buffer.batch(session.buffer.rows(), next_observation=False)
    assert (batch.log_prob != 0).all()  # of the teacher, who acted
    scored, _ = session.agent.policy.log_prob(batch.observation, batch.action, batch.trace)
    assert torch.isfinite(scored).all() and not torch.allclose(scored, batch.log_prob)


def test_only_what_the_student_reads_reaches_it(tmp_path):
    policy = run(tmp_path, STAGES[:5]).agent.policy
    observation = {"image": np.zeros((2, 16, 16, 3), np.uint8), "robot_state": np.zeros((2, 2), np.float32)}
    first = policy.act(observation | {"state": np.zeros((2, 4), np.float32)}, greedy=True)
    assert np.array_equal(first.action, policy.act(observation, greedy=True).action)
    other = policy.act(observation | {"robot_state": np.ones((2, 2), np.float32)}, greedy=True)
    assert not np.array_equal(first.action, other.action)


def test_critics_of_the_teacher_are_gone(tmp_path):
    ppo = {"finetune": {"objective": {"id": "ppo", "batch_size": 8}, "decisions": 40, "decisions_per_iteration": 40}}
    session = run(tmp_path, [*STAGES[:2], ppo, *STAGES[2:5], ppo])
    assert session.agent.parts["value"].encoder.image_keys == ["image"]


def test_experience_that_shows_too_little_is_dropped(tmp_path):
    session = run(tmp_path, [{"demonstrate": {"episodes": 4}}, {"environment": {"options": {"camera": True}}}])
    assert len(session.buffer.rows()) == 0
    (tmp_path / "kept").mkdir()
    session = run(tmp_path / "kept", [{"demonstrate": {"episodes": 4}}, {"environment": {"options": {"blank": True}}}])
    assert len(session.buffer.rows()) > 0


def test_a_finished_run_is_judged_in_the_environment_of_its_end(tmp_path):
    run(tmp_path, STAGES)
    assert evaluate_run(tmp_path / "run", episodes=4).episodes == 4


class Killed(Exception):
    """In place of kill -9: nothing after a checkpoint is kept."""


@pytest.mark.parametrize("saves", [4, 5, 8])
def test_resumed_is_uninterrupted(tmp_path, monkeypatch, saves):
    """Stopped after `environment`, after `student`, and in the middle of the lesson."""
    recipe = write(tmp_path / "in.yaml", STAGES, checkpoint_seconds=0.0)
    train(recipe, tmp_path / "whole", quiet=True, report=False)
    save = Session.save

    def save_and_die(self, **options):
        save(self, **options)
        if self.counters["saves"] == saves:
            raise Killed

    monkeypatch.setattr(Session, "save", save_and_die)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "cut", quiet=True, report=False)
    monkeypatch.undo()
    train(recipe, tmp_path / "cut", quiet=True, report=False)
    newest = [Checkpoints(tmp_path / name / "checkpoints").newest()[1] for name in ("whole", "cut")]
    same(*newest)
