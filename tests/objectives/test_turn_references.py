"""What is learned over turns equals its paper's equations, written out turn by turn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embodied_rft.objectives.imitation import Selection, helpful, select
from embodied_rft.objectives.shaping import make_shaping
from tests.lab import thinking
from tests.lab.spelling import CLASSES, Lab
from tests.objectives.test_policy_gradient import moved
from tests.objectives.test_policy_gradient_references import Told, compare, filled, group_advantage, pessimistic, read


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


# --- rewards ---------------------------------------------------------------------------------------------------------


class Told3:
    """Three streams of four episodes, one of which is cut into two segments; `batch` is what a shaping reads."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.lengths = [3, 1, 4, 2, 3]
        self.step = np.concatenate([np.arange(3), [0], np.arange(4), np.arange(2), [2, 3, 4]])
        self.streams = {name: rng.integers(-1, 3, 13).astype(np.float32) / 2 for name in ("env", "quality", "success")}
        self.weights = {"env": 0.5, "quality": 0.3, "success": 2.0}
        mixed = sum(w * self.streams[name] for name, w in self.weights.items())
        self.batch = SimpleNamespace(reward=torch.from_numpy(mixed).float(), columns={"step": self.step})

    def shaped(self, **spec):
        return make_shaping(spec, self.weights)(self.batch, self.lengths, self.streams.__getitem__).tolist()

    @property
    def segments(self):
        ends = np.cumsum(self.lengths)
        return [range(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]


def test_gates_equal_their_definition():
    """Sun et al. 2025: lower ranks accumulate only where every rank above has reached its threshold."""
    told, expected = Told3(), []
    for rows in told.segments:
        won = sum(told.streams["success"][i] for i in rows) >= 1.0
        good = won and sum(told.streams["quality"][i] for i in rows) >= 0.5
        for i in rows:
            reward = 2.0 * told.streams["success"][i] + (0.3 * told.streams["quality"][i] if won else 0.0)
            expected.append(reward + (0.5 * told.streams["env"][i] if good else 0.0))
    assert told.shaped(id="gated", gates={"success": 1.0, "quality": 0.5}) == pytest.approx(expected, abs=1e-6)
    kept = [told.shaped(id="gated", gates={"success": -100.0}), told.batch.reward.tolist()]
    assert kept[0] == pytest.approx(kept[1], abs=1e-6)  # an open gate is none


def test_progress_and_weights_of_turns():
    told, expected = Told3(), []
    reward = told.batch.reward.tolist()
    for rows in told.segments:
        expected += [reward[i] + (3.0 * (reward[i] - reward[i - 1]) if i > rows[0] else 0.0) for i in rows]
    assert told.shaped(id="progress", weight=3.0) == pytest.approx(expected, abs=1e-6)
    weights = [0.0, 1.0, 0.5, 0.5, 0.5]
    expected = [r * weights[t] for r, t in zip(reward, told.step, strict=True)]
    assert told.shaped(id="turns", weights=[0, 1, 0.5]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("weights, said", [(None, "none"), ({"env": 1.0}, "env"), ({"success": 1.0}, "ranks below")])
def test_a_gate_needs_streams(weights, said):
    with pytest.raises(ValueError, match=said):
        make_shaping({"id": "gated", "gates": {"success": 1.0}}, weights)


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_the_pull_to_the_reference_is_on_the_turns_that_are_named(kl_in):
    """What the others do changes nothing: their reference is nowhere."""
    lab = Lab()
    pull = {"kl_weight": 0.3, "kl_in": kl_in, "kl_estimator": "k3", "kl_turns": [1, 2]}
    objective = lab.objective({"id": "dr_grpo", "normalizer_units": 5.0, "clip_low": 0.1, "clip_high": 0.15, **pull})
    filled(lab)
    moved(lab)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    episodes, total = [Told(lab, t) for t in lab.buffer.trajectories()], 0.0
    pulled = [torch.from_numpy((t.turn >= 1) & (t.turn <= 2)) for t in episodes]
    for told, chosen in zip(episodes, pulled, strict=True):
        if kl_in == "reward":
            r = (told.reference - told.old).double()
            told.total -= 0.3 * float((r.exp() - r - 1)[chosen].sum())
    advantage = group_advantage(episodes, "mean")
    for told, chosen, a in zip(episodes, pulled, advantage, strict=True):
        each = pessimistic((told.log_prob - told.old).exp(), a)
        if kl_in == "loss":
            r = told.reference - told.log_prob
            each = each - 0.3 * torch.where(chosen, r.exp() - r - 1, 0.0)
        total = total + each.sum() / 5
    compare(lab, objective, -total / len(episodes), atol=5e-6)


# --- thoughts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.3, 0.0])
@pytest.mark.parametrize("ratio", ["unit", "decision"])
def test_thought_weights_equal_their_paper(ratio, weight):
    """Zhai et al. 2024, eq. 4: log pi(a) = w log pi(thought) + log pi(action | thought), in PPO's ratio."""
    lab = thinking.Lab(thoughts=3)
    spec = {"id": "dr_grpo", "normalizer": "decisions", "whole_groups": False, "clip_low": 0.1, "clip_high": 0.15}
    objective = lab.objective({**spec, "ratio": ratio, "unit_weights": {"thought": weight}})
    lab.collect(64, group_size=4)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    moved(lab)
    batch, total = read(lab, objective), 0.0
    log_prob, _ = lab.agent.policy.log_prob(batch.observation, batch.action, batch.trace)
    for i in range(len(batch)):
        change = (log_prob[i] - batch.log_prob[i]) * torch.tensor([weight] * 3 + [1.0])
        change = change.sum()[None] if ratio == "decision" else change
        total = total + pessimistic(change.exp(), float(batch.notes["advantage"][i])).mean()
    compare(lab, objective, -total / len(batch))


# --- flows -----------------------------------------------------------------------------------------------------------


def balance(told, flow, log_reward, how):
    """Malkin 2022, eq. 14; Bengio 2023, eq. 9; Madan 2023, eq. 10, stretch by stretch of one episode."""
    forward = [told.log_prob[torch.from_numpy(told.turn == t)].sum() for t in range(len(told.lengths))]
    state, last = [*flow, torch.tensor(log_reward)], len(forward)
    if how == "trajectory":
        return (state[0] + sum(forward) - state[last]) ** 2
    pairs = [(i, j) for i in range(last) for j in range(i + 1, last + 1) if how == "sub_trajectory" or j == i + 1]
    weights = [0.7 ** (j - i) if how == "sub_trajectory" else 1.0 for i, j in pairs]
    each = [w * (state[i] + sum(forward[i:j]) - state[j]) ** 2 for w, (i, j) in zip(weights, pairs, strict=True)]
    return sum(each) / sum(weights)


@pytest.mark.parametrize("reward", ["power", "exponential"])
@pytest.mark.parametrize("how", ["trajectory", "sub_trajectory", "detailed"])
def test_gflownet_equals_its_papers(how, reward):
    lab = Lab()
    options = {"sub_decay": 0.7} if how == "sub_trajectory" else {}
    options |= {"floor": 0.1} if reward == "power" else {}
    spec = {"id": "gflownet", "balance": how, "beta": 2.0, "reward": reward, "flow_hidden": [8], **options}
    objective = lab.objective(spec)
    filled(lab)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    moved(lab)
    total, net = 0.0, lab.agent.parts["flow"]
    episodes = [(Told(lab, t), t.observation["observation"][:-1]) for t in lab.buffer.trajectories()]
    for told, shown in episodes:
        worth = 2.0 * (np.log(max(told.total, 0.1)) if reward == "power" else told.total)
        total = total + balance(told, net({"observation": torch.from_numpy(shown)}), worth, how)
    expected = total / len(episodes)
    batch = read(lab, objective)
    weights = {"flow": list(net.parameters()), "policy": list(lab.agent.policy.parameters())}
    for name, part in weights.items():
        truth = torch.autograd.grad(expected, part, retain_graph=True)
        for pieces in ([batch], batch.split(5)):
            losses = [objective.losses[name](lab.agent, piece, lab.rng)[0] for piece in pieces]
            torch.testing.assert_close(sum(losses), expected.to(losses[0]), atol=1e-4, rtol=1e-4)
            found = [torch.autograd.grad(loss, part, retain_graph=True) for loss in losses]
            for one, other in zip([sum(g) for g in zip(*found, strict=True)], truth, strict=True):
                torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_the_best_answers_to_an_observation(count):
    lab = Lab()
    filled(lab, longest=5)
    rows = lab.buffer.rows()
    lab.buffer.label("odd", rows, np.where(rows % 3 == 0, np.nan, rows % 2).astype(np.float32))
    batch = lab.buffer.batch(rows)
    shown, group, reward = batch.observation["observation"].argmax(1).tolist(), batch.columns["group"], batch.reward
    expected = set()
    for i in range(len(rows)):
        better = sum(
            shown[j] == shown[i] and group[j] == group[i] and (-float(reward[j]), j) < (-float(reward[i]), i)
            for j in range(len(rows))
        )
        if better < count:
            expected.add(int(rows[i]))
    assert set(select(lab.buffer, Selection(best_of=count, per="state")).tolist()) == expected
    odd = select(lab.buffer, Selection(best_of=count, per="state", where="odd"))
    assert set(odd.tolist()) == {row for row in expected if row % 3 and row % 2}
    with pytest.raises(ValueError, match="nothing of 24 episodes"):
        lab.buffer.label("never", rows, np.zeros(len(rows), np.float32))
        select(lab.buffer, Selection(where="never"))
    with pytest.raises(ValueError, match="per state has no effect without best_of"):
        Selection(per="state")


def test_helpful_actions_are_those_that_a_win_followed():
    assert helpful(np.array([0, 1, 0, 1, 0])).tolist() == [True, True, True, False]
    assert not helpful(np.array([1, 0, 0])).any() and helpful(np.array([0, 0, 1])).all()


def test_rewards_weigh_what_is_copied():
    lab = Lab()
    objective = lab.objective({"id": "rise", "temperature": 0.5, "selection": {"min_return": -100.0}, "batch_size": 32})
    filled(lab)
    batch = next(objective.reading.batches(lab.buffer, np.random.default_rng(0), 0))
    each = lab.agent.policy.imitation_loss(batch.observation, batch.action).detach()
    expected = sum(float(e) * np.exp(float(r) / 0.5) for e, r in zip(each, batch.reward, strict=True)) / 32
    assert objective.policy_loss(lab.agent, batch, lab.rng)[0].item() == pytest.approx(expected, rel=1e-5)
