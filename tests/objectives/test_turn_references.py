"""What is learned over turns equals its paper's equations, written out turn by turn."""

import numpy as np
import pytest
import torch

from tests.lab.spelling import CLASSES, Lab
from tests.objectives.test_policy_gradient import moved
from tests.objectives.test_policy_gradient_references import Told, compare, filled, pessimistic, read


def spread(values, how):
    """What a group's advantages are divided by, in Feng et al. 2025, eq. 3."""
    return 1.0 if how == "none" else np.std(values, ddof=1) + 1e-6


def gigpo(trajectories, *, gamma, omega, how):
    """Feng et al. 2025, eq. 3, 6, 7 and 8, decision by decision as its authors' loops go."""
    steps, found = [], []
    for trajectory in trajectories:
        shown = trajectory.observation["observation"].argmax(1)
        for t, reward in enumerate(trajectory.reward):
            after = sum(gamma ** (k - t) * r for k, r in enumerate(trajectory.reward) if k >= t)
            steps.append((trajectory.group, shown[t], float(trajectory.reward.sum()), after, float(reward)))
    totals = [[t.reward.sum() for t in trajectories if t.group == g] for g in range(6)]
    for group, anchor, total, after, _ in steps:
        others = [s[3] for s in steps if s[:2] == (group, anchor)]
        episode = 0.0 if np.ptp(totals[group]) < 1e-6 else (total - np.mean(totals[group])) / spread(totals[group], how)
        step = 0.0 if np.ptp(others) < 1e-6 else (after - np.mean(others)) / spread(others, how)
        found.append(episode + omega * step)
    return found


@pytest.mark.parametrize("how", ["std", "none"])
def test_gigpo_equals_its_paper(how):
    lab = Lab()
    credit = {"id": "gigpo", "weight": 0.7, "spread": how}
    objective = lab.objective({"id": "gigpo", "gamma": 0.9, "credit": credit, "clip_low": 0.1, "clip_high": 0.15})
    filled(lab, longest=6)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    moved(lab)
    trajectories = list(lab.buffer.trajectories())
    expected = gigpo(trajectories, gamma=0.9, omega=0.7, how=how)
    batch = read(lab, objective)
    order = np.lexsort((batch.columns["step"], batch.columns["episode"]))
    assert batch.notes["advantage"].numpy()[order] == pytest.approx(expected, abs=1e-4)
    surrogate, told = 0.0, [Told(lab, t) for t in trajectories]
    turns, place = sum(len(t.lengths) for t in told), 0
    for one in told:  # eq. 9: every decision counts the same, its tokens share its advantage
        for turn in range(len(one.lengths)):
            units = torch.from_numpy(one.turn == turn)
            ratio = (one.log_prob - one.old).exp()[units]
            surrogate = surrogate + pessimistic(ratio, expected[place]).mean()
            place += 1
    compare(lab, objective, -surrogate / turns)


def test_what_teaches_nothing_in_gigpo_is_not_read():
    """A group without spread is dropped, but for decisions whose returns differ from those at the same observation."""
    lab = Lab()
    objective = lab.objective({"id": "gigpo", "drop_even_groups": True})
    filled(lab)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    rows = lab.buffer.rows()
    live = lab.buffer.note("live", rows) == 1
    even = lab.buffer.columns(rows)["group"] == 5
    advantage = lab.buffer.note("advantage", rows)
    assert live[~even].all() and 0 < live[even].sum() and (advantage[even & ~live] == 0).all()
    assert (advantage[even & live] != 0).all() and len(np.unique(advantage[even & live])) > CLASSES - 1
