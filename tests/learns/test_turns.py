"""What is made for many turns learns in seconds; with its idea switched off it does not."""

import numpy as np
import pytest
import torch

from embodied_rft.data import Source, Trajectory
from embodied_rft.objectives.imitation import helpful
from tests.lab import spelling, thinking
from tests.lab.harness import fails, require
from tests.lab.moves import Lab, Moves

pytestmark = pytest.mark.learning


def spells_many(spec, *, rounds=16, num_turns=16):
    """Sixteen classes in a row, from few episodes: the sum of all rewards says little about one turn."""
    lab = spelling.Lab(turns=num_turns, num_envs=32)
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


# --- thoughts weigh less ---------------------------------------------------------------------------------------------


def answers_soon(**options):
    """A reply of 96 tokens of thought and an answer: the ratio of the whole is that of the thoughts, nearly."""
    lab = thinking.Lab(thoughts=96)
    spec = {"id": "grpo", "ratio": "decision", "normalizer": "decisions", "batch_size": 16, "num_epochs": 4}
    lab.objective({**spec, **options}, learning_rate=1e-2)
    require(lab.grade() < 0.45, "it must not know the answers yet")
    for _ in range(5):
        lab.collect(64, group_size=8)
        lab.learner.learn(lab.buffer, lab.numbers)
    assert lab.grade() >= 0.75


@pytest.mark.parametrize("weight", [0.1, 0.0])
def test_thoughts_that_weigh_less(weight):
    answers_soon(unit_weights={"thought": weight})


def test_thoughts_that_weigh_as_much_as_the_answer_fail():
    fails(answers_soon)


def answers_sooner(least, *, values=False, **options):
    """The same by PPO, after three rounds: the mean of three seeds."""
    grades = []
    for seed in range(3):
        lab = thinking.Lab(thoughts=96, seed=seed, values=values)
        lab.objective({"id": "ppo", "batch_size": 16, "num_epochs": 4, **options}, learning_rate=1e-2)
        for _ in range(3):
            lab.collect(64, group_size=8)
            lab.learner.learn(lab.buffer, lab.numbers)
        grades.append(lab.grade())
    assert np.mean(grades) >= least, grades


def test_a_ratio_of_every_token_learns_sooner_than_one_of_the_reply():
    answers_sooner(0.65, value_hidden=[32])
    fails(answers_sooner, 0.65, value_hidden=[32], ratio="decision", normalizer="decisions")


def test_values_inside_replies_learn_sooner_than_those_of_turns():
    answers_sooner(0.79, values=True, credit="bi_level_gae", unit_trace_decay=0.5)
    fails(answers_sooner, 0.79, values=True)


# --- gated rewards ---------------------------------------------------------------------------------------------------

WORK, FARM = 0, 1
STREAMS = {"success": 1.0, "env": 1.0}


def farm(num_envs):
    """Six of eight moves must be work; the other kind pays at once."""

    def pay(moves, turn, secret):
        now = moves[np.arange(len(moves)), np.maximum(turn - 1, 0)]
        return np.where(now == FARM, 0.3, 0.0), (moves == WORK).sum(1) >= 6

    return Moves(num_envs, length=8, kinds=2, pay=pay)


def works(**options):
    lab = Lab(farm)
    spec = {"id": "grpo", "reward_weights": STREAMS, "batch_size": 128, "num_epochs": 4, **options}
    lab.objective(spec, learning_rate=1e-2)
    assert np.mean(lab.finetune(12, group_size=8)[-3:]) >= 0.8


def test_gated_rewards_are_not_farmed():
    works(shaping=[{"id": "gated", "gates": {"success": 1.0}}])


def test_without_the_gate_the_step_reward_is_farmed():
    fails(works)


# --- second tries ----------------------------------------------------------------------------------------------------

GUESSES = 5


def guess(num_envs, secrets=tuple(range(GUESSES))):
    """Two guesses; after the first one it is told whether the secret is below, equal or above."""
    hidden = np.array(secrets)

    def tell(moves, turn, secret):
        first, secret = moves[:, 0], hidden[secret]
        said = np.stack([secret < first, secret == first, secret > first], 1)
        return np.where((turn > 0)[:, None], said, 0.0)

    def pay(moves, turn, secret):
        right = moves[np.arange(len(moves)), np.maximum(turn - 1, 0)] == hidden[secret]
        return right.astype(float), right

    return Moves(num_envs, length=2, kinds=GUESSES, pay=pay, tell=tell, told=3, secrets=len(secrets))


def guesses(rounds, make=guess, **options):
    """First guesses [N], and how often the first and the second were right."""
    lab = Lab(make, num_envs=128)
    lab.objective({"id": "dr_grpo", "batch_size": 128, "num_epochs": 4, **options}, learning_rate=5e-3)
    lab.finetune(rounds, episodes=128, group_size=8)
    moves, secret = lab.play(2000)
    rewards = [lab.pool.pay(moves[:, :turn], np.full(2000, turn), secret)[0].mean() for turn in (1, 2)]
    return np.bincount(moves[:, 0], minlength=GUESSES) / 2000, *rewards


def improves_the_second_try_alone(**options):
    """SCoRe's first phase: the first guess would become the middle one, which tells most; it is to stay as it was."""
    first, _, second = guesses(32, shaping=[{"id": "turns", "weights": [0, 1]}], **options)
    assert second >= 0.42
    assert np.abs(first - 1 / GUESSES).sum() / 2 < 0.2


def test_a_pull_on_the_first_try_keeps_it():
    improves_the_second_try_alone(kl_weight=0.3, kl_turns=[0])


def test_without_it_the_first_try_drifts():
    fails(improves_the_second_try_alone)
    fails(improves_the_second_try_alone, kl_weight=0.3, kl_turns=[1])


def corrects_itself(**options):
    """Six of ten secrets are 0: guessing that twice is what is learned at once."""
    _, first, second = guesses(16, make=lambda n: guess(n, (0,) * 6 + (1, 2, 3, 4)), **options)
    assert second >= 0.6 and second - first >= 0.4


def test_progress_is_paid():
    corrects_itself(shaping=[{"id": "progress", "weight": 3.0}])


def test_without_the_bonus_it_repeats_itself():
    fails(corrects_itself)


# --- ends in proportion to reward ------------------------------------------------------------------------------------

WORTH = np.where(np.random.default_rng(3).random(27) < 0.25, np.random.default_rng(4).choice([2.0, 4.0], 27), 0.3)


def leaves(num_envs):
    """Three choices of three: 27 ends, some worth 2 or 4, the others 0.3."""

    def pay(moves, turn, secret):
        worth = WORTH[(np.maximum(moves, 0) * [9, 3, 1]).sum(1)]
        return np.where(turn == 3, worth, 0.0), worth > 1

    return Moves(num_envs, length=3, kinds=3, pay=pay)


def samples_in_proportion(spec, *, flow_rate=None):
    lab = Lab(leaves)
    rates = {} if flow_rate is None else {"learning_rates": {"flow": flow_rate}}
    lab.objective({"batch_size": 96, "num_epochs": 4, **spec}, learning_rate=5e-3, **rates)
    lab.finetune(36)
    found = np.bincount((lab.play(3000)[0] * [9, 3, 1]).sum(1), minlength=27) / 3000
    assert (found[WORTH > 1] > 0.02).all(), "distinct solutions"
    assert np.abs(found - WORTH / WORTH.sum()).sum() / 2 < 0.12


@pytest.mark.parametrize("balance", ["trajectory", "sub_trajectory", "detailed"])
def test_gflownet(balance):
    samples_in_proportion({"id": "gflownet", "balance": balance}, flow_rate=2e-2)


@pytest.mark.parametrize("spec", [{"id": "ppo", "gamma": 1.0, "entropy_weight": 0.01}, {"id": "gflownet", "beta": 4.0}])
def test_ppo_finds_one_end_and_a_sharper_reward_other_shares(spec):
    fails(samples_in_proportion, spec)


# --- a critic of whole decisions -------------------------------------------------------------------------------------

GOOD = np.array([0, 2, 1, 1, 0, 2])


def lock(num_envs):
    """Six choices of three; what they were worth is told at the end."""

    def pay(moves, turn, secret):
        right = (moves == GOOD).sum(1)
        return np.where(turn == 6, (right / 6) ** 2, 0.0), right == 6

    return Moves(num_envs, length=6, kinds=3, pay=pay)


def opens(spec, *, updates=None, tamper=None):
    """With 11 times 32 episodes."""
    lab = Lab(lock, num_envs=32, tamper=tamper)
    lab.objective(spec, learning_rate=3e-3)
    assert lab.finetune(11, episodes=32, updates=updates)[-1] >= 0.7


ARCHER = {"id": "archer", "batch_size": 64, "critic_hidden": [64], "tau": 0.05, "gamma": 1.0, "entropy_weight": 0.02}


def without_bootstrap(batch):
    batch.discount = torch.zeros_like(batch.discount)
    return batch


def test_archer():
    opens(ARCHER, updates=96)


def test_reinforce_on_as_many_rollouts_and_a_critic_of_one_step_fail():
    plain = {"ratio": "none", "clip_low": None, "clip_high": None, "num_epochs": 1, "batch_size": 192}
    fails(opens, {"id": "reinforce_pp", "entropy_weight": 0.02, **plain})
    fails(opens, ARCHER, updates=48, tamper=without_bootstrap)


# --- copying the best of each turn, and what helped of failures ------------------------------------------------------


def tries_again(selection):
    """Rounds of 256 pairs of guesses, the best answers to each observation copied."""
    lab = Lab(guess, num_envs=128)
    lab.objective({"id": "rise", "temperature": 0.3, "batch_size": 64, "selection": selection}, learning_rate=5e-3)
    for _ in range(8):
        lab.collect(256, group_size=16)
        rows = lab.buffer.rows()
        lab.buffer.label("first", rows, (lab.buffer.columns(rows)["step"] == 0).astype(np.float32))
        lab.learner.learn(lab.buffer, lab.numbers, num_updates=40)
    moves, secret = lab.play(2000)
    first, second = (np.mean(moves[:, turn] == secret) for turn in (0, 1))
    assert first >= 0.17 and second >= 0.38


def test_rise():
    tries_again({"best_of": 1, "per": "state"})


def test_rise_on_first_turns_alone_fails():
    fails(tries_again, {"best_of": 1, "per": "state", "where": "first"})


def copies_what_helped(selection):
    """An expert knows four of six moves; whoever starts behind them may still win, behind a later one nobody does."""
    lab = Lab(lock, num_envs=32)
    expert = np.where(np.arange(6) < 4, GOOD, (GOOD + 1) % 3)
    seen = np.zeros((7, 18), np.float32)
    for t, move in enumerate(expert):
        seen[t + 1 :, 3 * t + move] = 1
    run = Trajectory({"observation": seen}, expert, np.zeros(6, np.float32), "terminated", source=Source.DEMONSTRATION)
    rows = lab.buffer.add_trajectory(run, retrace=lambda o, a: {})
    lab.buffer.label("good", rows, helpful(np.array([0, 0, 1, 0, 1, 0, 0])).astype(np.float32))
    lab.objective({"id": "bc", "batch_size": 16, "selection": selection}, learning_rate=1e-2)
    lab.learner.learn(lab.buffer, lab.numbers, num_updates=300)
    moves, _ = lab.play(2000)
    assert (moves[:, :4] == GOOD[:4]).all(1).mean() >= 0.9, "what helped"
    assert (moves[:, 4:] == expert[4:]).all(1).mean() < 0.5, "what lost"


def test_helpful_actions_of_a_failed_expert():
    copies_what_helped({"where": "good"})


def test_a_failed_expert_copied_as_it_is_fails():
    fails(copies_what_helped, {})
