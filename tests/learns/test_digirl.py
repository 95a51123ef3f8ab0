"""DigiRL learns in seconds what cloning its successes does not; with one of its ideas off it does not either."""

import numpy as np
import pytest

from embodied_rft.experience.curriculum import Sieve
from embodied_rft.objectives.curricula import make_curriculum
from tests.lab.harness import fails, require
from tests.lab.moves import Lab, Moves

pytestmark = pytest.mark.learning

DIGIRL = {"id": "digirl", "batch_size": 128, "value_hidden": [64]}
CLONING = {"id": "bc", "batch_size": 128, "selection": {"min_return": 0.5}}


def game(*, easy, length, least, tasks=4):
    """`easy` of the tasks are won whatever is done, the others by enough moves of kind 0 of three."""

    def make(num_envs):
        def pay(moves, turn, secret):
            won = (secret < easy) | ((moves == 0).sum(1) >= least)
            return (won & (turn == length)).astype(np.float64), won

        def tell(moves, turn, secret):
            return np.eye(tasks)[secret]

        return Moves(num_envs, length=length, kinds=3, pay=pay, tell=tell, told=tasks, secrets=tasks)

    return make


def learned(spec, rounds, curriculum=None, **how):
    """Sampled moves and tasks after so many rounds of 64 episodes and 24 updates."""
    lab = Lab(game(**how))
    objective, sieve = lab.objective(spec), None
    if curriculum is not None:
        sieve = Sieve(make_curriculum(curriculum), lambda o: objective.foresee(lab.agent, o), run_seed=0, num_envs=64)
    for _ in range(rounds):
        lab.collect(64, sieve=sieve)
        lab.learner.learn(lab.buffer, lab.numbers, num_updates=24)
    return lab.play(2000)


def solves_the_hard_task(spec):
    """Three tasks of four need nothing: their successes drown those of the fourth, which is won once in sixty times."""
    moves, task = learned(spec, 11, easy=3, length=6, least=5)
    assert ((moves[task == 3] == 0).sum(1) >= 5).mean() >= 0.9


def test_digirl_learns_from_what_went_better_than_its_task_promised():
    solves_the_hard_task(DIGIRL)


@pytest.mark.parametrize("spec", [{**DIGIRL, "baseline": "none"}, CLONING], ids=["no instruction value", "cloning"])
def test_without_an_instruction_value_it_does_not(spec):
    fails(solves_the_hard_task, spec)


def leaves_out_what_did_not_help(spec):
    """Half of the moves must be good: an episode that is won holds as many bad ones."""
    before, _ = learned(spec, 0, easy=0, length=10, least=5)
    require((before == 0).mean() < 0.4, "it must not know the good move yet")
    moves, _ = learned(spec, 6, easy=0, length=10, least=5)
    assert (moves == 0).mean() >= 0.69


def test_digirl_copies_the_steps_that_helped():
    leaves_out_what_did_not_help({**DIGIRL, "top": 0.3})


@pytest.mark.parametrize(
    "spec", [{**DIGIRL, "top": 0.3, "margin": None}, {**DIGIRL, "top": 0.3, "decay": 1.0}, CLONING],
    ids=["whole episodes", "no step value", "cloning"],
)  # fmt: skip
def test_whole_episodes_do_not(spec):
    fails(leaves_out_what_did_not_help, spec)


def finds_the_hard_task(curriculum):
    """Fifteen tasks of sixteen need nothing, and a tenth of the episodes of the last one are won at first."""
    spec = {**DIGIRL, "baseline": "none"}
    moves, task = learned(spec, 12, curriculum, easy=15, length=6, least=4, tasks=16)
    assert ((moves[task == 15] == 0).sum(1) >= 4).mean() >= 0.8


def test_a_curriculum_plays_what_is_uncertain():
    finds_the_hard_task({"id": "value", "least": 0.05})


def test_tasks_as_they_come_are_mostly_known():
    fails(finds_the_hard_task, None)
