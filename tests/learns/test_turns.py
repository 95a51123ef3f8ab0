"""What is made for many turns learns in seconds; with its idea switched off it does not."""

import pytest

from tests.lab.harness import fails, require
from tests.lab.spelling import Lab

pytestmark = pytest.mark.learning


def spells_many(spec, *, rounds=16, num_turns=16):
    """Sixteen classes in a row, from few episodes: the sum of all rewards says little about one turn."""
    lab = Lab(turns=num_turns, num_envs=32)
    lab.objective({"batch_size": 128, "num_epochs": 2, **spec}, learning_rate=1e-2)
    require(lab.grade() < 0.25, "it must not know how to spell yet")
    for _ in range(rounds):
        lab.collect(16, group_size=4)
        lab.learner.learn(lab.buffer, lab.numbers)
    assert lab.grade() >= 0.8


def test_gigpo():
    spells_many({"id": "gigpo", "gamma": 0.5})


def test_gigpo_without_anchors_fails():
    fails(spells_many, {"id": "gigpo", "gamma": 0.5, "credit": {"id": "gigpo", "weight": 0.0}})
