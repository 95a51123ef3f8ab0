"""DigiRL's losses, notes and choice of episodes are its paper's, written out episode by episode."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.data import Source
from embodied_rft.learning import returns
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from tests.lab.draws import generator
from tests.lab.moves import Lab, Moves
from tests.lab.references import GAUSSIAN, check
from tests.lab.scene import copies
from tests.test_effects import stand

DECAY, MARGIN = 0.6, 0.1


def entropy(logit, won):
    """Of success, by hand."""
    p = torch.sigmoid(logit)
    return -(won * p.log() + (1 - won) * (1 - p).log())


def marked(batch):
    """Half of the decisions are to be copied; the notes that `annotate` writes."""
    rng = np.random.default_rng(len(batch) + int(1e6 * abs(float(batch.reward[0]))))
    size = len(batch)
    batch.notes["won"] = torch.from_numpy(rng.integers(0, 2, size).astype(np.float32))
    batch.notes["ahead"] = torch.from_numpy(rng.integers(0, 4, size).astype(np.float32))
    batch.notes["copied"] = torch.arange(size) % 2 == 1
    batch.columns["step"] = rng.integers(0, 3, size)
    batch.reward = torch.where(batch.notes["ahead"] == 0, batch.notes["won"], 0.0)


def transcription(ref, batch, rng, config, i):
    """Zhou, Bai et al. 2024, section 4.3, decision by decision."""
    o, o2, won, ahead = batch.observation, batch.next_observation, batch.notes["won"], batch.notes["ahead"]
    copied, size = batch.notes["copied"], batch.num_decisions
    each = entropy(ref.step_value(o), won) + entropy(ref.step_value(o2), won)
    ref.step("step_value", sum(each[k] for k in range(len(batch)) if not copied[k]) / size)
    first = [k for k in range(len(batch)) if not copied[k] and batch.columns["step"][k] == 0]
    ref.step("instruction_value", sum(entropy(ref.instruction_value(o), won)[k] for k in first) / size)
    with torch.no_grad():
        now, then = torch.sigmoid(ref.step_value(o)), torch.sigmoid(ref.step_value(o2))
    likely, _ = ref.policy.log_prob(o, batch.action, {})
    loss = 0.0 * likely.sum()
    for k in range(len(batch)):
        share = DECAY ** float(ahead[k])
        advantage = share * won[k] + (1 - share) * (batch.reward[k] + then[k] - now[k])
        if copied[k] and advantage > MARGIN:
            loss = loss - likely[k].sum()
    ref.step("policy", loss / size)


def test_digirl_equals_its_paper():
    spec = {"id": "digirl", "value_hidden": [24, 24], "decay": DECAY, "margin": MARGIN}
    check(transcription, spec, {**GAUSSIAN, "imitation": "nll"}, change=marked)


SHARE = st.floats(0, 1)


@given(reward=SHARE, value=SHARE, following=SHARE, outcome=SHARE, ahead=st.integers(0, 30), decay=SHARE)
@settings(deadline=None)
def test_the_advantage_lies_between_outcome_and_value(reward, value, following, outcome, ahead, decay):
    given = [torch.tensor([x], dtype=torch.float64) for x in (reward, value, following, outcome, ahead)]
    found = float(returns.doubly_robust(*given, decay=decay))
    ends = sorted([outcome, reward + following - value])
    assert ends[0] - 1e-9 <= found <= ends[1] + 1e-9
    if ahead == 0 or decay == 1:
        assert found == pytest.approx(outcome)
    elif decay == 0:
        assert found == pytest.approx(reward + following - value)


# --- which episodes are copied ----------------------------------------------------------------------------------------


def lucky(num_envs):
    """Three of four secrets are won whatever is done; the last one by five moves of kind 0, of which one may fail."""

    def pay(moves, turn, secret):
        won = (secret < 3) | ((moves == 0).sum(1) >= 4)
        return (won & (turn == 5)).astype(np.float64), won

    def tell(moves, turn, secret):
        return np.eye(4)[secret]

    return Moves(num_envs, length=5, kinds=3, pay=pay, tell=tell, told=4, secrets=4)


SPEC = {"id": "digirl", "batch_size": 64, "value_hidden": [32]}


def ranked(**options):
    """(lab, objective, {episode: (won, promised)}) of forty episodes, after the values have learned a little."""
    lab = Lab(lucky)
    objective = lab.objective({**SPEC, **options}, learning_rate=1e-2)
    lab.collect(40)
    lab.learner.learn(lab.buffer, lab.numbers, num_updates=20)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    found = {}
    for run in lab.buffer.segments(lab.buffer.rows()):
        batch = lab.buffer.batch(run)
        with torch.no_grad():
            promised = torch.sigmoid(lab.agent.parts["instruction_value"](batch.observation))[0]
        won = float(batch.reward.sum() > 0)
        assert batch.notes["won"].tolist() == [won] * 5 and batch.notes["ahead"].tolist() == [4, 3, 2, 1, 0]
        found[int(batch.columns["episode"][0])] = won, float(promised)
    return lab, objective, found


@pytest.mark.parametrize("baseline", ["instruction", "none"])
@pytest.mark.parametrize("top", [0.1, 0.3, 1.0])
def test_the_episodes_that_went_better_than_promised_are_copied(baseline, top):
    lab, objective, found = ranked(baseline=baseline, top=top)
    worth = {e: won - promised if baseline == "instruction" else won for e, (won, promised) in found.items()}
    order = sorted(worth.values(), reverse=True)
    least = order[int(np.ceil(top * 40)) - 1]
    chosen = {episode for episode, value in worth.items() if value >= least - 1e-6}
    batch = next(objective.reading.batches(lab.buffer, np.random.default_rng(0), 0))
    copied = batch.notes["copied"].numpy()
    assert copied.sum() == 64 and len(batch) == 128 and batch.num_decisions == 64
    assert set(batch.columns["episode"][copied]) <= chosen
    assert not set(batch.columns["episode"][~copied]) <= chosen or top == 1.0
    assert set(objective.reading.best(lab.buffer, lab.buffer.rows()).astype(int)) <= {0, 1}


def test_demonstrations_may_be_left_out():
    agent, buffer = copies(*stand("stochastic"))
    for kept in (True, False):
        objective = build_objective({**SPEC, "demonstrations": kept, "top": 1.0})
        objective.setup(agent, generator(0))
        objective.annotate(agent, buffer, buffer.rows(), generator(1))
        source = next(objective.reading.batches(buffer, np.random.default_rng(0), 0)).columns["source"]
        assert (source == Source.DEMONSTRATION).any() == kept and (source == Source.ONLINE).any()


def test_what_is_not_over_teaches_nothing():
    lab = Lab(lucky)
    objective = lab.objective(SPEC)
    assert list(objective.reading.batches(lab.buffer, np.random.default_rng(0), 0)) == []
    lab.collect(4)
    rows = lab.buffer.rows()
    objective.annotate(lab.agent, lab.buffer, rows[:3], lab.rng)  # the beginning of an episode, cut off by the question
    assert np.isnan(lab.buffer.note("won", rows)).all()
    objective.annotate(lab.agent, lab.buffer, rows, lab.rng)
    assert np.isfinite(lab.buffer.note("won", rows)).all()


def test_micro_batches_add_up_and_a_language_model_learns():
    """However small: some of them hold only decisions for the values, or only copied ones."""
    left = []
    for size in (None, 3, 1):
        agent, buffer = copies(*stand("text"))
        objective = build_objective({**SPEC, "batch_size": 6, "top": 0.5, "margin": None})
        objective.setup(agent, generator(0))
        learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-3, micro_batch=size, epsilon=1e-3))
        before = {name: [p.clone() for p in agent.trainable(name)] for name in objective.losses}
        learner.learn(buffer, np.random.default_rng(0), num_updates=2)
        for name, weights in before.items():
            moved = [not torch.equal(a, b) for a, b in zip(weights, agent.trainable(name), strict=True)]
            assert any(moved), name
        left.append(agent.state_dict())
    for other in left[1:]:
        for key, value in left[0].items():
            torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5, msg=key)
