"""Every policy-gradient, selection and preference preset learns to spell in seconds; its broken twin does not."""

import pytest
import torch

from embodied_rft.learning import losses
from embodied_rft.objectives import preference
from tests.lab.harness import fails, require
from tests.lab.spelling import Lab

pytestmark = pytest.mark.learning

GROUPS = {"batch_size": 64, "num_epochs": 4}
VALUE = {"id": "ppo", "value_hidden": [32, 32], **GROUPS}
PRESETS = {
    "ppo": (VALUE, {}),
    "ppo, clipped value and entropy": ({**VALUE, "value_clip": 0.2, "entropy_weight": 0.003}, {}),
    "ppo, dual clip": ({**VALUE, "dual_clip": 3.0}, {}),
    "ppo, value on the policy's trunk": ({"id": "ppo", **GROUPS}, {"values": True}),
    "ppo, two turns": (VALUE, {"turns": 2}),
    "ppo, bi-level GAE over two turns": (
        {"id": "ppo", "credit": "bi_level_gae", **GROUPS},
        {"values": True, "turns": 2},
    ),
    "grpo": ({"id": "grpo", **GROUPS}, {}),
    "grpo, two turns": ({"id": "grpo", **GROUPS}, {"turns": 2}),
    "dr_grpo": ({"id": "dr_grpo", "normalizer_units": 5.0, **GROUPS}, {}),
    "rloo": ({"id": "rloo", "batch_size": 64}, {}),
    "reinforce_pp": ({"id": "reinforce_pp", "kl_weight": 0.001, **GROUPS}, {}),
    "gpg": ({"id": "gpg", "batch_size": 64}, {}),
    "gspo": ({"id": "gspo", "clip_low": 0.1, "clip_high": 0.15, **GROUPS}, {}),
    "dapo": ({"id": "dapo", "min_groups": 8, "overlong": (6, 1), **GROUPS}, {}),
    "dapo, corrected": ({"id": "dapo", "correction": {"how": "truncate"}, **GROUPS}, {}),
}


def learns(spec, *, tamper=None, **task):
    lab = Lab(tamper=tamper, **task)
    lab.objective(spec, learning_rate=1e-2)
    require(lab.grade() < 0.25, "it must not know how to spell yet")
    lab.finetune(20, enough=0.9)
    assert lab.grade() >= 0.8


def with_shuffled_advantage(batch):
    """Credit goes to whom it is not due."""
    shift, notes = len(batch) // 2 + 1, dict(batch.notes)
    if "unit_advantage" in notes:
        mean = torch.where(batch.mask, notes["unit_advantage"], 0.0).sum(1) / batch.mask.sum(1)
        notes["unit_advantage"] = mean.roll(shift, 0)[:, None].expand(batch.mask.shape)
    else:
        notes["advantage"] = notes["advantage"].roll(shift, 0)
    batch.notes = notes
    return batch


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    spec, task = PRESETS[name]
    learns(spec, **task)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_with_shuffled_advantages_fails(name):
    spec, task = PRESETS[name]
    fails(learns, spec, tamper=with_shuffled_advantage, **task)


# --- KL to a reference -------------------------------------------------------------------------------------------


def stays_near(kl_in, estimator):
    """A strong pull must let it learn, and keep it near where it began."""
    lab = Lab()
    spec = {"id": "grpo", "kl_weight": 0.3, "kl_in": kl_in, "kl_estimator": estimator, **GROUPS}
    lab.objective(spec, learning_rate=1e-2)
    before, metrics = lab.grade(), lab.finetune(8)
    assert lab.grade() > before + 0.1
    assert abs(metrics["policy/kl_to_reference"]) < 0.6


PULLS = [("loss", "k3"), ("loss", "k2"), ("reward", "k1")]


@pytest.mark.parametrize("kl_in, estimator", PULLS)
def test_kl_keeps_it_near(kl_in, estimator):
    stays_near(kl_in, estimator)


@pytest.mark.parametrize("kl_in, estimator", PULLS)
def test_kl_with_flipped_sign_drives_it_away(kl_in, estimator, monkeypatch):
    kl = losses.kl
    monkeypatch.setattr(losses, "kl", lambda *args, **options: -kl(*args, **options))
    fails(stays_near, kl_in, estimator)


# --- clipping ----------------------------------------------------------------------------------------------------


def moves_little():
    """Many epochs on the same experience: clipping bounds how far the policy goes."""
    lab = Lab()
    lab.objective({"id": "grpo", "batch_size": 64, "num_epochs": 40}, learning_rate=1e-2)
    metrics = lab.finetune(1)
    assert lab.grade() > 0.2
    assert metrics["policy/kl"] < 0.1


def test_clipping_bounds_the_step():
    moves_little()


def test_clipping_the_wrong_side_does_not(monkeypatch):
    clip = losses.clipped_surrogate

    def flipped(log_prob, old, advantage, *, low, high, dual):
        return -clip(log_prob, old, -advantage, low=low, high=high, dual=dual)  # the maximum in place of the minimum

    monkeypatch.setattr(losses, "clipped_surrogate", flipped)
    fails(moves_little)


# --- from selected episodes and from pairs -----------------------------------------------------------------------


def copies_the_best(*, sign, **selection):
    lab = Lab()
    spec = {"id": "raft", "batch_size": 64, "reward_weights": {"env": sign}, "selection": selection}
    lab.objective(spec, learning_rate=1e-2)
    lab.finetune(12)
    assert lab.grade() >= 0.8


@pytest.mark.parametrize("selection", [{"best_of": 1, "newest": 256}, {"best_of": 2, "min_return": 0.4, "newest": 512}])
def test_raft(selection):
    copies_the_best(sign=1.0, **selection)


def test_raft_that_copies_the_worst_fails():
    fails(copies_the_best, sign=-1.0, best_of=1, newest=256)


PREFERENCES = {
    "dpo": {"id": "dpo", "beta": 0.3},
    "dpo, smoothed": {"id": "dpo", "beta": 0.3, "smoothing": 0.1},
    "dpo, extremes": {"id": "dpo", "beta": 0.3, "pairing": "extremes"},
    "ipo": {"id": "ipo", "beta": 0.1},
    "simpo": {"id": "simpo"},
    "slic": {"id": "slic"},
    "cpl": {"id": "cpl", "beta": 0.3, "segment": 1, "within": "group", "chosen_weight": 0.05},
}


def prefers(spec):
    """Pairs of its own replies, in four rounds."""
    lab = Lab()
    lab.objective({"batch_size": 64, **spec}, learning_rate=3e-3)
    before = lab.grade()
    for _ in range(4):
        lab.objective({"batch_size": 64, **spec}, learning_rate=3e-3)
        lab.collect(512)
        lab.learner.learn(lab.buffer, lab.numbers, num_updates=40)
    assert lab.grade() >= before + 0.2


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference(name):
    prefers(PREFERENCES[name])


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_with_flipped_labels_fails(name, monkeypatch):
    make = preference.pair_batch
    monkeypatch.setattr(preference, "pair_batch", lambda buffer, chosen, rejected: make(buffer, rejected, chosen))
    fails(prefers, PREFERENCES[name])
