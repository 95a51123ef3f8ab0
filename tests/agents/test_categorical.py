"""Choices: the agent `categorical` on and off policy, in imitation, evaluation, film and resume."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.nn import functional as F

from embodied_rft import registry
from embodied_rft.agents.categorical import CategoricalPolicy
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.dqn import DQN
from embodied_rft.objectives.policy_gradient import PPO
from embodied_rft.options import parse
from embodied_rft.policy import build_policy
from embodied_rft.pools.spaces import Choices
from embodied_rft.runs.recipe import Recipe
from embodied_rft.runs.session import Interrupted, Session
from embodied_rft.testing.check_policy import check_policy
from embodied_rft.train import train
from tests.lab import chain_env
from tests.lab.draws import generator
from tests.lab.point import random_batch

STATE = spaces.Box(-np.inf, np.inf, (4,), np.float32)
MIXED = spaces.Dict(camera=spaces.Box(0, 255, (20, 20, 3), np.uint8), goal=spaces.Discrete(3))
ACTIONS = {
    "discrete": spaces.Discrete(5),
    "started": spaces.Discrete(3, start=-7),
    "multi": spaces.MultiDiscrete([2, 4, 3], start=[0, 5, -1]),
    "matrix": spaces.MultiDiscrete([[2, 3], [4, 2]]),
    "binary": spaces.MultiBinary((2, 2)),
}
SMALL = {"id": "categorical", "hidden": [16]}
chain_env.register()


# --- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("seen", [STATE, MIXED], ids=["state", "pixels"])
def test_it_keeps_the_contract_of_a_policy(action, seen):
    policy = build_policy(SMALL, seen, action, generator())
    check_policy(policy, seen, action)
    assert policy.num_units == len(Choices(action).sizes)


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_each_choice_is_a_unit_with_the_probability_that_is_drawn(action):
    policy = build_policy(SMALL, STATE, action, generator())
    seen = {"observation": np.ones((20_000, 4), np.float32)}
    taken = policy.act(seen, rng=generator(1))
    index = policy.choices.index(torch.from_numpy(taken.action))
    parts = [part[0].softmax(-1) for part in policy.logits(as_tensors(seen))[:1].split(policy.sizes, -1)]
    for k, share in enumerate(parts):
        counts = torch.bincount(index[:, k], minlength=len(share)) / len(index)
        torch.testing.assert_close(counts, share.detach(), atol=0.015, rtol=0)
        expected = share.log()[index[:, k]].detach()
        torch.testing.assert_close(torch.from_numpy(taken.log_prob[:, k]), expected, atol=1e-5, rtol=0)
    _, entropy = policy.log_prob(as_tensors(seen), torch.from_numpy(taken.action), {})
    expected = torch.stack([-(share * share.log()).sum() for share in parts])
    torch.testing.assert_close(entropy[0], expected)


def test_imitation_is_cross_entropy():
    policy = build_policy(SMALL, STATE, ACTIONS["multi"], generator())
    batch = random_batch(STATE, ACTIONS["multi"], size=9)
    logits = policy.logits(batch.observation).split(policy.sizes, -1)
    index = batch.action - torch.tensor([0, 5, -1])
    expected = sum(F.cross_entropy(part, index[:, k], reduction="none") for k, part in enumerate(logits))
    torch.testing.assert_close(policy.imitation_loss(batch.observation, batch.action), expected)


def test_dueling_values_are_a_value_and_advantages_of_mean_zero():
    policy = build_policy({**SMALL, "dueling": True}, STATE, spaces.Discrete(3), generator())
    seen = random_batch(STATE, spaces.Discrete(3), size=7).observation
    out = policy.net(policy.encoder(seen))
    expected = torch.stack([out[:, 0] + out[:, 1 + a] - out[:, 1:].mean(-1) for a in range(3)], -1)
    torch.testing.assert_close(policy.logits(seen), expected)
    with pytest.raises(ValueError, match="dueling splits the values of one choice"):
        build_policy({**SMALL, "dueling": True}, STATE, ACTIONS["multi"], generator())


CONTINUOUS = ["gaussian", "diffusion", "flow", "consistency"]


@pytest.mark.parametrize("id", CONTINUOUS)
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_agents_for_vectors_and_for_choices_name_each_other(id, action):
    with pytest.raises(ValueError, match="the agent categorical"):
        build_policy({"id": id}, STATE, action, generator())
    with pytest.raises(ValueError, match="holds no choices.*the agent gaussian"):
        build_policy(SMALL, STATE, spaces.Box(-1, 1, (2,)), generator())
    with pytest.raises(ValueError, match="the agent language"):
        build_policy(SMALL, STATE, spaces.Text(5), generator())


@pytest.mark.parametrize("id", ["sac", "td3", "rlpd", "cql", "cal_ql"])
def test_objectives_for_vectors_name_those_for_choices(id):
    agent = build_agent(SMALL, STATE, spaces.Discrete(3), generator())
    with pytest.raises(ValueError, match="dqn or discrete_sac"):
        build_objective(id).setup(agent)


@pytest.mark.parametrize("id", ["dqn", "discrete_sac"])
def test_objectives_of_one_choice_refuse_everything_else(id):
    for action, message in [(ACTIONS["multi"], "3 at a time.*ppo"), (spaces.Box(-1, 1, (2,)), "the agent gaussian")]:
        spec = SMALL if not isinstance(action, spaces.Box) else {"id": "gaussian"}
        with pytest.raises(ValueError, match=message):
            build_objective(id).setup(build_agent(spec, STATE, action, generator()))


# --- one update, against the papers and against SB3 ------------------------------------------------------------------


def gradients(agent, objective, batch):
    """{loss: (value, gradients of its part)} of one batch from the weights as they are."""
    found = {}
    for name, loss in objective.losses.items():
        parameters = agent.trainable(name)
        value, _ = loss(agent, batch, generator())
        found[name] = value.item(), [g.clone() for g in torch.autograd.grad(value, parameters)]
    return found


def assert_close(found, expected):
    for name, (value, gradient) in expected.items():
        assert found[name][0] == pytest.approx(float(value), rel=1e-5), name
        for ours, theirs in zip(found[name][1], gradient, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def disturb(module, seed):
    """Weights that differ from those that they were copied from."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(seed)))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("huber", [1.0, 0.3, None])
def test_a_dqn_update_is_that_of_the_paper(double, huber):
    action = spaces.Discrete(3, start=2)
    agent = build_agent(SMALL, STATE, action, generator())
    objective = build_objective({"id": "dqn", "double": double, "huber": huber})
    objective.setup(agent)
    target = agent.parts["target_policy"]
    disturb(target, 1)
    batch = random_batch(STATE, action, size=32)
    found = gradients(agent, objective, batch)
    loss = torch.zeros(())
    for i in range(32):
        q = agent.policy.net(batch.observation["observation"][i : i + 1])[0]
        with torch.no_grad():
            theirs = target.net(batch.next_observation["observation"][i : i + 1])[0]
            own = agent.policy.net(batch.next_observation["observation"][i : i + 1])[0]
            best = int((own if double else theirs).argmax())
            y = batch.reward[i] + batch.discount[i] * theirs[best]
        error = q[int(batch.action[i]) - 2] - y
        size = error.abs()
        if huber is None or size <= huber:
            loss = loss + 0.5 * error**2 / 32
        else:
            loss = loss + huber * (size - 0.5 * huber) / 32
    assert_close(found, {"policy": (loss, torch.autograd.grad(loss, agent.trainable("policy")))})


def test_the_dqn_loss_is_that_of_stable_baselines3():
    from stable_baselines3 import DQN as Theirs
    from stable_baselines3.common.logger import Logger

    action, size = spaces.Discrete(3), 32
    agent = build_agent(SMALL, STATE, action, generator())
    objective = build_objective({"id": "dqn", "double": False, "gamma": 0.97})
    objective.setup(agent)
    disturb(agent.parts["target_policy"], 1)
    batch = random_batch(STATE, action, size=size)
    copies = []
    for policy in (agent.policy, agent.parts["target_policy"]):
        copies.append([p.detach().clone() for p in policy.net.parameters()])

    class Wide(gym.Env):
        observation_space, action_space = STATE, action

    model = Theirs(
        "MlpPolicy", Wide(), batch_size=size, gamma=0.97, max_grad_norm=1e9, policy_kwargs={"net_arch": [16]}
    )
    model.set_logger(Logger(None, []))
    for net, weights in zip((model.q_net, model.q_net_target), copies, strict=True):
        with torch.no_grad():
            for own, given in zip(net.parameters(), weights, strict=True):
                own.copy_(given)
    ended = batch.discount == 0
    model.replay_buffer = SimpleNamespace(
        sample=lambda *args, **kwargs: SimpleNamespace(
            observations=batch.observation["observation"],
            next_observations=batch.next_observation["observation"],
            actions=batch.action[:, None],
            rewards=batch.reward[:, None],
            dones=ended[:, None].float(),
            discounts=None,
        )
    )
    model.train(gradient_steps=1, batch_size=size)
    loss, gradient = gradients(agent, objective, batch)["policy"]
    assert model.logger.name_to_value["train/loss"] == pytest.approx(loss, rel=1e-5)
    for ours, their in zip(gradient, model.q_net.parameters(), strict=True):
        torch.testing.assert_close(ours, their.grad, atol=1e-6, rtol=1e-4)


def test_a_discrete_sac_update_is_that_of_the_paper():
    action, size = spaces.Discrete(3, start=1), 24
    agent = build_agent(SMALL, STATE, action, generator())
    objective = build_objective({"id": "discrete_sac", "critic_hidden": [8], "initial_temperature": 0.3})
    objective.setup(agent)
    disturb(agent.parts["target_critic"], 1)
    batch = random_batch(STATE, action, size=size)
    found = gradients(agent, objective, batch)
    critic, target = agent.parts["critic"], agent.parts["target_critic"]
    log_alpha = agent.parts["temperature"].log_alpha
    alpha, wanted = 0.3, 0.98 * np.log(3)
    critic_loss, policy_loss, temperature_loss = (torch.zeros(()) for _ in range(3))
    for i in range(size):
        now, after = (tree["observation"][i : i + 1] for tree in (batch.observation, batch.next_observation))
        with torch.no_grad():
            p = agent.policy.net(after)[0].softmax(-1)
            v = 0.0
            for a in range(3):
                v += p[a] * (min(net(after)[0, a] for net in target.nets) - alpha * p[a].log())
            y = batch.reward[i] + batch.discount[i] * v
        for net in critic.nets:
            critic_loss = critic_loss + 0.5 * (net(now)[0, int(batch.action[i]) - 1] - y) ** 2 / size
        p = agent.policy.net(now)[0].softmax(-1)
        for a in range(3):
            q = min(net(now)[0, a].detach() for net in critic.nets)
            policy_loss = policy_loss + p[a] * (alpha * p[a].log() - q) / size
            temperature_loss = temperature_loss + p[a].detach() * -log_alpha * (p[a].log().detach() + wanted) / size
    losses = {"critic": critic_loss, "policy": policy_loss, "temperature": temperature_loss}
    expected = {k: (v, torch.autograd.grad(v, agent.trainable(k))) for k, v in losses.items()}
    assert_close(found, expected)


@pytest.mark.parametrize(
    "id, moves, online", [("dqn", "target_policy", "policy"), ("discrete_sac", "target_critic", "critic")]
)
def test_the_target_moves_when_it_is_time_and_only_then(id, moves, online):
    agent = build_agent(SMALL, STATE, spaces.Discrete(3), generator())
    objective = build_objective({"id": id, "target_every": 3, "tau": 0.5})
    objective.setup(agent)
    learner = Learner(agent, objective, LearnerConfig(learning_rate=0.01))
    before = [p.clone() for p in agent.parts[moves].parameters()]
    for update in range(1, 4):
        learner.update(random_batch(STATE, spaces.Discrete(3), seed=update), generator())
        now = [p.clone() for p in agent.parts[moves].parameters()]
        if update < 3:
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    for old, new, other in zip(before, now, agent.module(online).parameters(), strict=True):
        torch.testing.assert_close(new, 0.5 * old + 0.5 * other.detach())


def test_epsilon_falls_over_decisions_and_log_probabilities_are_exact():
    agent = build_agent(SMALL, STATE, spaces.Discrete(4), generator())
    objective = build_objective({"id": "dqn", "epsilon": 0.9, "final_epsilon": 0.1, "epsilon_decisions": 100})
    objective.setup(agent)
    seen = {"observation": np.ones((20_000, 4), np.float32)}
    best = int(agent.policy.act(seen, greedy=True).action[0])
    for decisions, epsilon in [(0, 0.9), (50, 0.5), (100, 0.1), (10**6, 0.1)]:
        objective.schedule(decisions)
        taken = objective.explore(agent, seen, generator(decisions))
        greedy = taken.action == best
        assert objective.epsilon == pytest.approx(epsilon)
        assert greedy.mean() == pytest.approx(1 - epsilon * 3 / 4, abs=0.015)
        expected = np.where(greedy, np.log(1 - epsilon * 3 / 4), np.log(epsilon / 4))
        np.testing.assert_allclose(taken.log_prob[:, 0], expected, atol=1e-5)


# --- runs ------------------------------------------------------------------------------------------------------------

LEARNER = {"learner": {"learning_rate": 1e-2}}
REPLAY = {"updates_per_decision": 0.5, "decisions": 1_000, **LEARNER}
FINETUNE = {
    "ppo": {"objective": {"id": "ppo", "num_epochs": 4, "batch_size": 64}, "decisions": 2_000, **LEARNER},
    "dqn": {
        "objective": {"id": "dqn", "batch_size": 32, "gamma": 0.9, "target_every": 20, "epsilon_decisions": 500},
        **REPLAY,
    },
    "discrete_sac": {
        "objective": {"id": "discrete_sac", "gamma": 0.9, "tau": 0.1, "target_every": 1, "target_entropy": 0.1}
        | {"batch_size": 32, "critic_hidden": [32]},
        **REPLAY,
    },
}


def run(folder, *stages, actions="discrete", agent=SMALL, seed=0):
    env = {"id": "Chain-v0", "num_envs": 4, "options": {"actions": actions}}
    tree = {
        "env": env,
        "agent": agent,
        "buffer": {"capacity": 5_000},
        "threads": 1,
        "seed": seed,
        "stages": list(stages),
    }
    return train(parse(Recipe, tree), folder, quiet=True, report=False)


def success(session):
    outcome = session.evaluate(20, sheet=0, name="test")
    return outcome.success


@pytest.mark.parametrize("id", FINETUNE)
def test_it_finds_the_far_prize(id, tmp_path):
    assert success(run(tmp_path, {"finetune": FINETUNE[id]})) == 1.0


@pytest.mark.parametrize("id", FINETUNE)
def test_a_broken_twin_does_not(id, tmp_path, monkeypatch):
    if id == "ppo":  # the wrong action is made likelier
        right = CategoricalPolicy.log_prob
        monkeypatch.setattr(
            CategoricalPolicy, "log_prob", lambda self, seen, action, _: right(self, seen, 3 - action, _)
        )
    else:  # what comes after a reward is forgotten
        cls = registry.find("objective", id)
        monkeypatch.setattr(cls, "td_target", lambda self, agent, batch: batch.reward)
    assert success(run(tmp_path, {"finetune": FINETUNE[id]})) < 1.0


def test_two_choices_at_a_time_learn_too(tmp_path):
    assert success(run(tmp_path, {"finetune": FINETUNE["ppo"]}, actions="multi")) == 1.0


PRESETS = [  # all but those of chains
    id
    for id in registry.known("objective")
    if issubclass(registry.find("objective", id), PPO) and not registry.find("objective", id).Config().per_dimension
]


@pytest.mark.parametrize("id", PRESETS)
@pytest.mark.parametrize("actions", ["discrete", "multi"])
def test_every_preset_of_ppo_runs_and_begins_at_ratio_one(id, actions, tmp_path, monkeypatch):
    first = []
    update = Learner.update

    def watch(self, batch, rng, **options):
        if batch is not None and not first:
            log_prob, _ = self.agent.policy.log_prob(batch.observation, batch.action, batch.trace)
            first.append(float((log_prob - batch.log_prob).abs().max()))
        return update(self, batch, rng, **options)

    monkeypatch.setattr(Learner, "update", watch)
    objective = {"id": id, "batch_size": 64, "num_epochs": 1}
    stage = {"objective": objective, "decisions": 100, "group_size": 4, "episodes_per_iteration": 16}
    run(tmp_path, {"finetune": stage}, {"evaluate": {"episodes": 4, "video": "success"}}, actions=actions)
    assert first and first[0] < 1e-5


def test_imitation_of_the_best_and_iql_take_choices(tmp_path):
    stages = [
        {"collect": {"episodes": 64, "group_size": 8}},
        {"pretrain": {"objective": "raft", "updates": 60, **LEARNER}},
        {"pretrain": {"objective": {"id": "iql", "critic_hidden": [16]}, "updates": 5}},
    ]
    assert success(run(tmp_path, *stages)) > 0.5


@pytest.mark.parametrize("id", ["dqn", "discrete_sac"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(id, tmp_path, monkeypatch):
    stage = {"finetune": {**FINETUNE[id], "decisions": 400}}
    whole = run(tmp_path / "whole", stage).agent.state_dict()
    tick, calls = Session.tick, []

    def stop(self):
        calls.append(1)
        self.stopping = len(calls) == 4
        tick(self)

    monkeypatch.setattr(Session, "tick", stop)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", stage)
    again = run(tmp_path / "parts", stage).agent.state_dict()
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_dqn_is_off_policy():
    assert build_objective("dqn").reading.num_steps == 1 and DQN.updates_per_decision == 0.25
