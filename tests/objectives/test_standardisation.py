"""How advantages are standardised: over what is read of an iteration, or over a minibatch, however that is cut."""

import numpy as np
import pytest
import torch

from embodied_rft.learning.learner import LearnerConfig
from tests.lab.spelling import Lab
from tests.objectives.test_policy_gradient import prepared


@pytest.mark.parametrize(
    "spec", [{"id": "ppo", "value_hidden": [8]}, {"id": "reinforce_pp"}], ids=lambda spec: spec["id"]
)
def test_advantages_are_standardised_over_what_is_read_alone(spec):
    """Hidden decisions (rejected ones here) neither shift nor scale the others, and are exactly 0."""
    lab = Lab()
    objective = lab.objective({**spec, "correction": {"how": "reject", "limit": 1.05}})
    lab.collect(64)
    column = lab.buffer._ragged["log_prob/"]
    column.values[: column.used] -= np.where(np.arange(column.used) % 9 == 0, 1.0, 0.0).astype(np.float32)
    rows = lab.buffer.rows()
    objective.annotate(lab.agent, lab.buffer, rows, lab.rng)
    batch = lab.buffer.batch(rows)
    live = batch.notes["live"] == 1
    advantage = batch.notes[f"{objective.prefix}advantage"]
    shown = advantage[live][batch.mask[live]] if objective.per_unit else advantage[live]
    assert 0 < int(live.sum()) < len(batch)
    assert abs(float(shown.mean())) < 1e-5 and float(shown.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert (torch.where(batch.mask, advantage, 0.0) if objective.per_unit else advantage)[~live].abs().sum() == 0


@pytest.mark.parametrize("preset", ["ppo", "reinforce_pp"])  # one advantage a decision, one a unit
def test_a_minibatch_is_standardised_over_all_its_micro_batches(preset):
    """Not over the iteration, nor over a micro-batch, nor over padding; deviations are those of a sample."""
    spec = {"id": preset, "normalize_advantage": "minibatch"}
    lab, objective, everything, _ = prepared(spec, values=preset == "ppo")
    name, batch = f"{objective.prefix}advantage", everything.take(np.arange(20))
    raw = batch.notes[name][batch.mask] if objective.per_unit else batch.notes[name]
    expected = (raw - raw.mean()) / raw.std()
    assert abs(float(raw.mean())) > 0.01
    for size in (1, 7, 20):
        lab.learner.config = LearnerConfig(micro_batch=size)
        pieces = lab.learner._pieces(batch)
        objective.before_step("value", lab.agent, pieces, lab.rng)
        objective.before_step("policy", lab.agent, pieces, lab.rng)
        shown = [p.notes[name][p.mask] if objective.per_unit else p.notes[name] for p in pieces]
        torch.testing.assert_close(torch.cat(shown), expected)
    alone = lab.learner._pieces(batch.take(np.arange(1)))
    if not objective.per_unit:
        objective.before_step("policy", lab.agent, alone, lab.rng)
        assert alone[0].notes[name].tolist() == [0.0]
