"""One update of every on-policy preset equals its paper's equations, written out episode by episode, and its peers'.

The transcriptions see episodes as lists, never a batch: reading, credit, masks and normalisers are part of what is
compared. Episodes have one to four turns, groups one without spread.
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Field, Ragged, Trajectory
from embodied_rft.learning.agent import Agent, Spaces
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.credit import BiLevelGAE
from embodied_rft.policy import Policy, Values, able
from tests.lab.spelling import CLASSES, END, LONGEST, Lab
from tests.objectives.test_policy_gradient import gradients, moved

LOW, HIGH, BETA = 0.1, 0.15, 0.3
CLIP = {"clip_low": LOW, "clip_high": HIGH}


def filled(lab, *, longest=4, seed=0):
    """Six groups of four episodes of 1 to `longest` turns in the lab's buffer; group 5 has no spread."""
    rng = np.random.default_rng(seed)
    for number in range(24):
        turns, group = int(rng.integers(1, longest + 1)), number // 4
        shown = {"observation": np.eye(CLASSES, dtype=np.float32)[rng.integers(CLASSES, size=turns + 1)]}
        replies = [[*rng.integers(0, END, rng.integers(0, LONGEST)), END] for _ in range(turns)]
        action = Ragged.of(replies, np.int64)
        with torch.no_grad():
            inputs = {"observation": torch.from_numpy(shown["observation"][:-1])}
            now = lab.agent.policy.log_prob(inputs, action, {})[0].numpy()
        behaviour = [row[: len(r)] + rng.normal(0, 0.1, len(r)) for row, r in zip(now, replies, strict=True)]
        reward = rng.normal(size=turns).astype(np.float32)
        if group == 5:
            reward = np.full(turns, 0.7 / turns, np.float32)
        log_prob = Ragged.of(behaviour, np.float32)
        lab.buffer.add_trajectory(Trajectory(shown, action, reward, "terminated", log_prob=log_prob, group=group))


class Told:
    """An episode as a paper writes it: its outputs one after the other, and what each unit's probabilities are."""

    def __init__(self, lab, trajectory):
        inputs = {"observation": torch.from_numpy(trajectory.observation["observation"][:-1])}
        lengths = trajectory.action.lengths.tolist()

        def flat(padded):
            return torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])

        log_prob, entropy = lab.agent.policy.log_prob(inputs, trajectory.action, {})
        self.log_prob, self.entropy = flat(log_prob), flat(entropy)
        self.old = torch.from_numpy(trajectory.log_prob.values.copy())
        if "reference" in lab.agent.parts:
            self.reference = flat(lab.agent.parts["reference"].log_prob(inputs, trajectory.action, {})[0].detach())
        self.reward, self.lengths, self.group = trajectory.reward.astype(np.float64), lengths, trajectory.group
        self.turn = np.repeat(np.arange(len(lengths)), lengths)
        self.total = float(self.reward.sum())
        if able(lab.agent.policy, Values) is not None:
            self.value = lab.agent.policy.value(inputs, {})
            self.unit_value = flat(lab.agent.policy.unit_values(inputs, trajectory.action, {}))


def pessimistic(ratio, advantage):
    """min(r A, clip(r) A), by hand."""
    clipped = ratio.clamp(1 - LOW, 1 + HIGH)
    return torch.minimum(ratio * advantage, clipped * advantage)


def k3(told):
    r = told.reference - told.log_prob
    return r.exp() - r - 1


def grpo(episodes, advantage):
    """Shao et al. 2024, eq. 3: 1/G sum_i 1/|o_i| sum_t (min(...) - beta KL)."""
    each = []
    for told, a in zip(episodes, advantage, strict=True):
        ratio = (told.log_prob - told.old).exp()
        each.append((pessimistic(ratio, a) - BETA * k3(told)).sum() / len(told.old))
    return -sum(each) / len(each)


def dr_grpo(episodes, advantage):
    """Liu et al. 2025, section 3.2, with a constant in place of the length: 5 units here."""
    each = [pessimistic((t.log_prob - t.old).exp(), a).sum() / 5 for t, a in zip(episodes, advantage, strict=True)]
    return -sum(each) / len(each)


def rloo(episodes, advantage):
    """Ahmadian et al. 2024, eq. 7: the output is one action; the ratio as in TRL's trainer."""
    each = [pessimistic((t.log_prob.sum() - t.old.sum()).exp(), a) for t, a in zip(episodes, advantage, strict=True)]
    return -sum(each) / len(each)


def gspo(episodes, advantage):
    """Zheng et al. 2025, eq. 5 and 7: s_i = (pi(y) / old(y))^(1/|y|)."""
    each = [pessimistic((t.log_prob - t.old).mean().exp(), a) for t, a in zip(episodes, advantage, strict=True)]
    return -sum(each) / len(each)


def dapo(episodes, advantage):
    """Yu et al. 2025, eq. 8: 1/sum|o_i| over groups with spread (eq. 11)."""
    kept = [(t, a) for t, a in zip(episodes, advantage, strict=True) if t.group != 5]
    total = sum(pessimistic((t.log_prob - t.old).exp(), a).sum() for t, a in kept)
    return -total / sum(len(t.old) for t, _ in kept)


def gpg(episodes, advantage):
    """Chu et al. 2025, eq. 6: -log pi A, groups without spread made up for by B / (B - M)."""
    kept = [(t, a) for t, a in zip(episodes, advantage, strict=True) if t.group != 5]
    return -sum((t.log_prob * a).sum() for t, a in kept) / sum(len(t.old) for t, _ in kept)


def group_advantage(episodes, how):
    """Of each episode: over the returns of its group, the sums of their rewards."""
    advantage = []
    for i, told in enumerate(episodes):
        siblings = [t.total for t in episodes if t.group == told.group]
        others = [t.total for j, t in enumerate(episodes) if t.group == told.group and j != i]
        if np.ptp(siblings) < 1e-6:
            advantage.append(0.0)
        elif how == "rloo":
            advantage.append(told.total - np.mean(others))
        else:
            advantage.append(
                (told.total - np.mean(siblings)) / (1 if how == "mean" else np.std(siblings, ddof=1) + 1e-6)
            )
    return advantage


GROUPED = {
    "grpo": (grpo, "std", {"kl_weight": BETA, **CLIP}),
    "dr_grpo": (dr_grpo, "mean", {"normalizer_units": 5.0, **CLIP}),
    "rloo": (rloo, "rloo", CLIP),
    "gspo": (gspo, "std", CLIP),
    "dapo": (dapo, "std", CLIP),
    "gpg": (gpg, "mean", {}),
}


def read(lab, objective):
    """The one batch of everything that the objective reads."""
    plan = replace(objective.reading, num_epochs=1, batch_size=10_000)
    (batch,) = plan.batches(lab.buffer, np.random.default_rng(3), 0)
    return batch


def compare(lab, objective, expected, *, atol=2e-6):
    """Loss and gradients of the objective's batch, whole and in micro-batches, against `expected`."""
    batch = read(lab, objective)
    loss, _ = objective.policy_loss(lab.agent, batch, lab.rng)
    if objective.config.ratio != "none":  # its surrogate has another value than -log pi A, and the same gradient
        torch.testing.assert_close(loss, expected.to(loss), atol=atol, rtol=1e-4)
    truth = gradients(lab, expected.float())
    assert max(float(g.abs().max()) for g in truth) > 1e-3
    pieces = batch.split(5)
    assert len(pieces) > 3
    for given in ([loss], [objective.policy_loss(lab.agent, piece, lab.rng)[0] for piece in pieces]):
        found = [sum(g) for g in zip(*(gradients(lab, part) for part in given), strict=True)]
        for one, other in zip(found, truth, strict=True):
            torch.testing.assert_close(one, other, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("preset", GROUPED)
@pytest.mark.parametrize("longest", [1, 4], ids=["one turn", "turns"])
def test_group_presets_equal_their_papers(preset, longest):
    equations, how, options = GROUPED[preset]
    lab = Lab()
    objective = lab.objective({"id": preset, **options})
    filled(lab, longest=longest)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    moved(lab)
    episodes = [Told(lab, t) for t in lab.buffer.trajectories()]
    compare(lab, objective, equations(episodes, group_advantage(episodes, how)))


def test_unit_rewards_count_once_in_bi_level_gae():
    """With both lambdas 1 the value's target is what is paid from a unit on, in its turn and in those after it."""
    rng = np.random.default_rng(0)
    paid, value = (torch.from_numpy(rng.standard_normal((5, 4))) for _ in range(2))
    units, discount = [4, 1, 2, 3, 2], [0.9, 0.9, 0.0, 0.9, 0.0]
    mask = torch.arange(4) < torch.tensor(units)[:, None]
    reward, following = torch.from_numpy(rng.standard_normal(5)), value[:, 0].roll(-1)
    notes = {"unit_reward": paid, "unit_value": value, "value": value[:, 0], "next_value": following}
    batch = SimpleNamespace(reward=reward, mask=mask, notes=notes, discount=torch.tensor(discount, dtype=torch.float64))
    config = SimpleNamespace(trace_decay=1.0, unit_gamma=1.0, unit_trace_decay=1.0)
    target = BiLevelGAE()(None, batch, [3, 2], config)["value_target"]
    after = 0.0
    for turn in reversed(range(5)):
        after = float(reward[turn]) + discount[turn] * after
        for unit in reversed(range(units[turn])):
            after += float(paid[turn, unit])
            assert float(target[turn, unit]) == pytest.approx(after)


def test_an_episode_is_divided_by_the_units_of_it_that_are_read():
    lab = Lab()
    rejecting = {"how": "reject", "level": "mean", "limit": 1.03}
    objective = lab.objective({"id": "grpo", "correction": rejecting})
    filled(lab)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    batch = read(lab, objective)
    episode, units = batch.columns["episode"], batch.mask.sum(1).numpy()
    torn = {e for e in episode if (lab.buffer.columns(lab.buffer.rows())["episode"] == e).sum() > (episode == e).sum()}
    assert len(torn) > 3
    assert batch.notes["episode_units"].tolist() == [units[episode == e].sum() for e in episode]


def test_every_unit_of_two_replies_with_equal_credit_weighs_the_same_in_rloo():
    """Ahmadian et al. 2024: grad = A sum_u grad log pi(u); two replies of 2 and 10 units: 0.5 for each unit."""
    from embodied_rft.learning import losses

    log_prob = torch.zeros(2, 10, requires_grad=True)
    mask = torch.arange(10)[None] < torch.tensor([2, 10])[:, None]
    config = build_objective("rloo").config
    ratio = losses.log_ratio(log_prob, torch.zeros(2, 10), mask, level=config.ratio, episode=torch.tensor([0, 1]))
    each = losses.clipped_surrogate(ratio, 0.0, torch.ones(2))
    sizes = {"num_units": 12, "num_decisions": 2, "num_episodes": 2, "episode_units": torch.tensor([2.0, 10.0])}
    losses.per_batch(each, mask, normalizer=config.normalizer, **sizes).backward()
    assert (log_prob.grad[mask] + 0.5).abs().max() < 1e-6 and (log_prob.grad[~mask] == 0).all()


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "rloo", "gspo"])
def test_groups_without_spread_keep_their_kl(preset):
    """Only DAPO and GPG leave them out."""
    lab = Lab()
    objective = lab.objective({"id": preset, "kl_weight": BETA})
    filled(lab)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    assert 5 in read(lab, objective).columns["group"]
    for other in ("dapo", "gpg"):
        dropping = lab.objective({"id": other})
        dropping.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
        assert 5 not in read(lab, dropping).columns["group"]


def test_reinforce_pp_equals_its_paper():
    """Hu 2025, eq. 4: A_t = r(x, y) - beta sum_{i >= t} KL(i), normalised over the batch, in PPO's surrogate."""
    lab = Lab()
    objective = lab.objective({"id": "reinforce_pp", "kl_weight": BETA, **CLIP})
    moved(lab, 0.1)
    filled(lab)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    moved(lab)
    episodes = [Told(lab, t) for t in lab.buffer.trajectories()]
    advantage = []
    for told in episodes:
        penalty = BETA * (told.old - told.reference).double().numpy()
        advantage.append([told.reward[told.turn[u] :].sum() - penalty[u:].sum() for u in range(len(told.old))])
    flat = np.concatenate(advantage)
    total = 0.0
    for told, each in zip(episodes, advantage, strict=True):
        normal = torch.from_numpy((np.array(each) - flat.mean()) / flat.std()).float()
        total = total + pessimistic((told.log_prob - told.old).exp(), normal).sum()
    compare(lab, objective, -total / len(flat), atol=5e-6)


def slow_gae(reward, value, gamma, decay):
    """Schulman et al. 2016, eq. 16, of one episode that terminated."""
    advantage = []
    for t in range(len(reward)):
        total = 0.0
        for i in range(t, len(reward)):
            following = value[i + 1] if i + 1 < len(reward) else 0.0
            total += (gamma * decay) ** (i - t) * (reward[i] + gamma * following - value[i])
        advantage.append(total)
    return np.array(advantage)


@pytest.mark.parametrize("value_clip", [None, 0.05])
@pytest.mark.parametrize("credit", ["gae", "bi_level_gae"])
def test_ppo_with_a_value_on_its_trunk_equals_its_paper(credit, value_clip):
    """PPO, eq. 7 and 9, with clipped values; VAGEN's bi-level GAE where each unit has a value."""
    lab = Lab(values=True)
    options = {"gamma": 0.9, "trace_decay": 0.8, "entropy_weight": 0.2, "value_weight": 0.7, "value_clip": value_clip}
    inside = {"unit_gamma": 0.95, "unit_trace_decay": 0.9} if credit == "bi_level_gae" else {}
    objective = lab.objective({"id": "ppo", "credit": credit, **options, **inside, **CLIP})
    filled(lab)
    objective.annotate(lab.agent, lab.buffer, lab.buffer.rows(), lab.rng)
    before = [Told(lab, t) for t in lab.buffer.trajectories()]
    moved(lab)
    after = [Told(lab, t) for t in lab.buffer.trajectories()]
    advantage, target, old_value = [], [], []
    for told in before:
        value = told.value.detach().double().numpy()
        outer = slow_gae(told.reward, value, 0.9, 0.8)
        if credit == "gae":
            advantage.append(outer)
            target.append(outer + value)
            old_value.append(value)
            continue
        unit, found = told.unit_value.detach().double().numpy(), np.zeros(len(told.old))
        for turn, end in enumerate(np.cumsum(told.lengths)):
            running = 0.0
            for u in reversed(range(end - told.lengths[turn], end)):
                following = outer[turn] + value[turn] if u == end - 1 else 0.95 * unit[u + 1]
                running = found[u] = following - unit[u] + 0.95 * 0.9 * running
        advantage.append(found)
        target.append(found + unit)
        old_value.append(unit)
    flat = np.concatenate(advantage)
    policy = value_loss = 0.0
    for told, a, goal, old in zip(after, advantage, target, old_value, strict=True):
        a = torch.from_numpy((a - flat.mean()) / flat.std()).float()
        goal, old = torch.from_numpy(goal).float(), torch.from_numpy(old).float()
        units = a[told.turn] if credit == "gae" else a
        policy = policy - (pessimistic((told.log_prob - told.old).exp(), units) + 0.2 * told.entropy).sum()
        v = told.value if credit == "gae" else told.unit_value
        error = (v - goal) ** 2
        if value_clip is not None:
            error = torch.maximum(error, (old + (v - old).clamp(-value_clip, value_clip) - goal) ** 2)
        value_loss = value_loss + 0.5 * error.sum()
    expected = policy / sum(len(t.old) for t in after) + 0.7 * value_loss / len(flat)
    compare(lab, objective, expected, atol=1e-5)


# --- stable-baselines3 -----------------------------------------------------------------------------------------------


class Drift(gym.Env):
    """A point that is pushed; it terminates, or is truncated, at random."""

    observation_space = gym.spaces.Box(-5, 5, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=3).astype(np.float32)
        return self.x, {}

    def step(self, action):
        self.x = np.clip(self.x + 0.3 * np.append(action, 0.1), -5, 5).astype(np.float32)
        end = self.np_random.random()
        return self.x, float(-np.abs(self.x).sum()), end < 0.08, 0.08 < end < 0.16, {}


class Peer(Policy):
    """An SB3 actor-critic as a policy of ours."""

    num_units, trace_fields, spec = 1, {}, {"id": "peer"}  # noqa: RUF012

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def log_prob(self, observation, action, trace):
        _, log_prob, entropy = self.policy.evaluate_actions(observation["observation"], action)
        return log_prob[:, None], entropy[:, None]

    def value(self, observation, trace):
        return self.policy.predict_values(observation["observation"])[:, 0]


def test_a_moving_reference_follows_by_one_minus_its_decay():
    lab = Lab()
    lab.objective({"id": "grpo", "kl_weight": 0.1, "reference": "moving", "reference_decay": 0.8}, learning_rate=1e-2)
    lab.finetune(1)
    reference, policy = (next(p.parameters()) for p in (lab.agent.parts["reference"], lab.agent.policy))
    assert not torch.equal(reference, policy)
    expected = 0.8 * reference.detach() + 0.2 * policy.detach()
    lab.finetune(1)  # where an iteration begins
    torch.testing.assert_close(reference, expected)


def sb3_rollout():
    """(model of SB3 with a filled rollout buffer, the same episodes in a buffer of ours)."""
    from stable_baselines3 import PPO

    count = 90
    model = PPO("MlpPolicy", Drift(), n_steps=count, batch_size=count, n_epochs=1, seed=0, device="cpu", gamma=0.9)
    options = {"normalize_advantage": False, "ent_coef": 0.03, "vf_coef": 0.4, "max_grad_norm": 1e9}
    for name, number in options.items():
        setattr(model, name, number)
    _, callback = model._setup_learn(count, None)
    seen, step = [], model.env.step_wait

    def watched():
        seen.append(copy.deepcopy(result := step()))  # SB3 adds the bootstrap value to these very rewards
        return result

    model.env.step_wait = watched
    rollout = model.rollout_buffer
    model.collect_rollouts(model.env, callback, rollout, count)
    buffer = Buffer(Schema({"observation": Field((3,))}, Field((2,)), units=1), 400)
    starts, ends = [*np.flatnonzero(rollout.episode_starts[:, 0]), count], set()
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        observation, _, dones, infos = seen[b - 1]
        end = "cut" if not dones[0] else "truncated" if infos[0]["TimeLimit.truncated"] else "terminated"
        ends.add(end)
        last = infos[0]["terminal_observation"][None] if dones[0] else observation
        shown = {"observation": np.concatenate([rollout.observations[a:b, 0], last])}
        reward = np.array([seen[t][1][0] for t in range(a, b)], np.float32)
        log_prob = rollout.log_probs[a:b]
        buffer.add_trajectory(Trajectory(shown, rollout.actions[a:b, 0], reward, end, log_prob=log_prob))
    assert ends == {"cut", "truncated", "terminated"}
    return model, buffer


def test_ppo_equals_stable_baselines3():
    """A rollout of SB3's, with ends of all kinds; SB3's train() and our objective from the same weights."""
    model, buffer = sb3_rollout()
    agent = Agent(Peer(model.policy), Spaces(Drift.observation_space, Drift.action_space), rng=torch.Generator())
    spec = {"id": "ppo", "gamma": 0.9, "normalize_advantage": False, "entropy_weight": 0.03, "value_weight": 0.8}
    objective = build_objective(spec)
    objective.setup(agent)
    objective.annotate(agent, buffer, buffer.rows(), torch.Generator())
    batch, rollout = buffer.batch(buffer.rows()), model.rollout_buffer
    np.testing.assert_allclose(batch.notes["advantage"].numpy(), rollout.advantages[:, 0], atol=1e-4)
    np.testing.assert_allclose(batch.notes["value_target"].numpy(), rollout.returns[:, 0], atol=1e-4)
    with torch.no_grad():
        for p in model.policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    loss, metrics = objective.policy_loss(agent, batch, torch.Generator())
    parameters = list(model.policy.parameters())
    ours, weights = torch.autograd.grad(loss, parameters), [p.detach().clone() for p in parameters]
    model.train()
    for one, p in zip(ours, parameters, strict=True):
        torch.testing.assert_close(one, p.grad, atol=1e-5, rtol=1e-4)
    logged = model.logger.name_to_value
    assert float(metrics["policy/kl"]) == pytest.approx(logged["train/approx_kl"], rel=1e-3)
    assert (
        float(metrics["policy/clipped"]) == pytest.approx(logged["train/clip_fraction"])
        and logged["train/clip_fraction"]
    )
    for factor, stops in ((0.5, True), (0.8, False)):  # SB3 takes no step once the estimate exceeds 1.5 target_kl
        with torch.no_grad():
            for p, old in zip(parameters, weights, strict=True):
                p.copy_(old)
        objective.config = replace(objective.config, target_kl=float(metrics["policy/kl"]) * factor)
        learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-3))
        assert learner.update(batch, torch.Generator()) is not stops
        changed = any(not torch.equal(p, q) for p, q in zip(parameters, weights, strict=True))
        assert changed is not stops and learner.updates == int(not stops)


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_an_iteration_of_ppo_ends_with_the_weights_of_stable_baselines3(micro_batch):
    """Three minibatches in SB3's order: advantages standardised over each, entropy, value, joint clipping, Adam."""
    model, buffer = sb3_rollout()
    model.normalize_advantage, model.batch_size, model.max_grad_norm = True, 30, 0.1
    agent = Agent(Peer(copy.deepcopy(model.policy)), Spaces(Drift.observation_space, Drift.action_space), rng=None)
    spec = {"id": "ppo", "gamma": 0.9, "normalize_advantage": "minibatch", "entropy_weight": 0.03, "value_weight": 0.8}
    objective = build_objective(spec)
    objective.setup(agent)
    config = LearnerConfig(learning_rate=model.learning_rate, epsilon=1e-5, clip_norm=0.1, micro_batch=micro_batch)
    learner = Learner(agent, objective, config)
    objective.annotate(agent, buffer, rows := buffer.rows(), torch.Generator())
    start = nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    np.random.seed(5)  # noqa: NPY002  SB3 draws the order from it
    for part in np.split(np.random.permutation(len(rows)), 3):  # noqa: NPY002
        learner.update(buffer.batch(rows[part]), torch.Generator())
    np.random.seed(5)  # noqa: NPY002
    model.train()
    ours, theirs = (nn.utils.parameters_to_vector(p.parameters()) for p in (agent.policy.policy, model.policy))
    assert (theirs - start).abs().max() > 5e-4
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
