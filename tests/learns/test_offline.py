"""Learning from data alone: each algorithm does what cloning or naive TD learning cannot, and its broken twin fails."""

import pytest
import torch

from embodied_rft.objectives.common import annotate_returns
from tests.lab.harness import CRITIC, DETERMINISTIC, GAUSSIAN, Lab, fails, require
from tests.lab.point import PointDemonstrator

pytestmark = pytest.mark.learning

NARROW = {"noise": 0.05}  # always right: what lies beside it has never been seen
MIXED = {"noise": 0.3, "wrong": 0.4}  # two of five actions walk away: their mean goes nowhere


def lab_with(demonstrations, *, agent=GAUSSIAN, **options):
    lab = Lab(agent, reward="steps", **options)
    lab.demonstrate(PointDemonstrator(lab.pool, **demonstrations), episodes=100)
    return lab


# --- behaviour cloning -------------------------------------------------------------------------------------------


def clone(tamper=None, imitation="mse"):
    lab = lab_with({"noise": 0.5}, agent=GAUSSIAN | {"imitation": imitation}, tamper=tamper)
    lab.pretrain({"id": "bc", "batch_size": 128}, updates=500)
    assert lab.success() >= 0.9


def test_bc():
    clone()


def test_bc_by_likelihood():
    clone(imitation="nll")


def test_bc_of_permuted_actions_fails():
    def permute(batch):
        batch.action = batch.action.roll(1, 0)
        return batch

    fails(clone, permute)


# --- IQL ---------------------------------------------------------------------------------------------------------


def implicit(**options):
    lab = lab_with(MIXED)
    lab.pretrain({"id": "iql", **CRITIC, **options}, updates=1000)
    assert lab.success() >= 0.9


def test_iql_finds_the_good_actions_in_mixed_data():
    implicit()


def test_iql_without_advantage_weights_fails():
    fails(implicit, inverse_temperature=0.0)


# --- CQL, Cal-QL -------------------------------------------------------------------------------------------------

CONSERVATIVE = CRITIC | {"num_sampled_actions": 3, "batch_size": 64}


def conservative(**options):
    lab = lab_with(NARROW)
    lab.pretrain({"id": "cql", **CONSERVATIVE, **options}, updates=500)
    assert lab.success() >= 0.9


def test_cql_stays_with_narrow_data():
    conservative(conservative_weight=1.0)


def test_cql_without_conservatism_fails():
    fails(conservative, conservative_weight=0.0)


def calibrated(objective):
    """Good, and with values not far below what the data has shown to be possible: fine-tuning starts from there."""
    lab = lab_with(NARROW)
    lab.pretrain({"id": objective, **CONSERVATIVE}, updates=500)
    require(lab.success() >= 0.9, "with and without a floor the policy must be good")
    rows = lab.buffer.rows()
    annotate_returns(lab.buffer, rows, gamma=CRITIC["gamma"])
    data = lab.buffer.batch(rows)
    with torch.no_grad():
        value = lab.agent.parts["critic"](data.observation, lab.agent.policy.mode(data.observation)).mean()
    assert value >= data.notes["mc_return"].mean() - 0.5


def test_cal_ql_keeps_the_scale_of_the_returns():
    calibrated("cal_ql")


def test_without_the_floor_values_are_far_below_the_returns():
    fails(calibrated, "cql")


# --- SPOT --------------------------------------------------------------------------------------------------------


def supported(**options):
    lab = lab_with(NARROW, agent=DETERMINISTIC)
    lab.pretrain({"id": "density", "hidden": [64, 64], "batch_size": 128, "beta": 0.05}, updates=600)
    lab.pretrain({"id": "spot", "beta": 0.05, **CRITIC, **options}, updates=1000)
    assert lab.success() >= 0.9


def test_spot_stays_in_the_support_of_the_data():
    supported(support_weight=5.0)


def test_spot_without_its_penalty_fails():
    fails(supported, support_weight=0.0)
