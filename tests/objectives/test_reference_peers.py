"""Off-policy objectives against installed peers: one and two steps from the same weights, batch and noise."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from tests.lab.point import random_batch
from tests.lab.references import EPSILON, GAUSSIAN, RATE, STATE, generator

UNIT = gym.spaces.Box(-1, 1, (2,), np.float32)
SMALL = {"critic_hidden": [24, 24], "tau": 0.1}
GAMMA = 0.97  # of random_batch


class Blank(gym.Env):
    observation_space, action_space = STATE, UNIT


def linears(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def copy_policy(theirs, ours):
    """Hidden layers, then the last ones side by side (mean, log std)."""
    *hidden, last = linears(ours.head.net)
    layers = linears(theirs)
    with torch.no_grad():
        for mine, other in zip(hidden, layers, strict=False):
            mine.weight.copy_(other.weight), mine.bias.copy_(other.bias)
        rest = layers[len(hidden) :]
        last.weight.copy_(torch.cat([layer.weight for layer in rest]))
        last.bias.copy_(torch.cat([layer.bias for layer in rest]))


def copy_critics(networks, ours):
    with torch.no_grad():
        for member, network in enumerate(networks):
            *hidden, last = linears(network)
            for i, layer in enumerate(hidden):
                ours.net.weights[i][member] = layer.weight.T
                ours.net.biases[i][member, 0] = layer.bias
            ours.net.last[member], ours.net.last_bias[member] = last.weight, last.bias


def flat_critics(networks):
    parts = []
    for network in networks:
        parts += [torch.cat([layer.weight.flatten(), layer.bias]) for layer in linears(network)]
    return torch.cat(parts).detach()


def flat_ours(critic):
    net, parts = critic.net, []
    for member in range(critic.num_members):
        pairs = [(w[member].T, b[member, 0]) for w, b in zip(net.weights, net.biases, strict=True)]
        for weight, bias in [*pairs, (net.last[member], net.last_bias[member])]:
            parts.append(torch.cat([weight.flatten(), bias.flatten()]))
    return torch.cat(parts).detach()


def flat_policy(layers, hidden):
    """Weights and biases of hidden layers, then of all last layers together."""
    parts = [torch.cat([layer.weight.flatten(), layer.bias]) for layer in layers[:hidden]]
    parts.append(
        torch.cat([torch.cat([la.weight for la in layers[hidden:]]).flatten(), *[la.bias for la in layers[hidden:]]])
    )
    return torch.cat(parts).detach()


def sb3_model(cls, **options):
    kwargs = {"net_arch": [24, 24], "optimizer_kwargs": {"eps": EPSILON}}
    return cls(
        "MlpPolicy", Blank(), learning_rate=RATE, tau=0.1, gamma=GAMMA, policy_kwargs=kwargs, device="cpu", seed=0,
        buffer_size=10, **options,
    )  # fmt: skip


def feed(model, batches):
    """The model's next samples are these batches."""
    waiting = [
        SimpleNamespace(
            observations=b.observation["observation"],
            actions=b.action,
            next_observations=b.next_observation["observation"],
            rewards=b.reward[:, None],
            dones=(b.discount == 0).float()[:, None],
            discounts=None,
        )
        for b in batches
    ]
    model.replay_buffer.sample = lambda *_, **__: waiting.pop(0)
    model._logger = SimpleNamespace(record=lambda *_, **__: None)


def ours(objective, agent):
    agent = build_agent(agent, STATE, UNIT, generator(0))
    objective = build_objective(objective)
    objective.setup(agent)
    learner = Learner(agent, objective, LearnerConfig(learning_rate=RATE))
    for optimizer in learner.optimizers.values():
        optimizer.epsilon = EPSILON
    return agent, learner


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


def test_sac_of_sb3(monkeypatch):
    from stable_baselines3 import SAC

    model = sb3_model(SAC, ent_coef="auto_0.3")
    model.ent_coef_optimizer.param_groups[0]["eps"] = EPSILON
    agent, learner = ours({"id": "sac", "initial_temperature": 0.3, **SMALL}, GAUSSIAN)
    copy_policy(model.actor, agent.policy)
    copy_critics(model.critic.q_networks, agent.parts["critic"])
    copy_critics(model.critic_target.q_networks, agent.parts["target_critic"])
    batches = [random_batch(STATE, UNIT, size=40, seed=i) for i in range(2)]
    feed(model, batches)
    noises = []
    for i, batch in enumerate(batches):
        learner.update(batch, generator(i))
        drawn = generator(i)
        following, own = (torch.randn(40, 2, generator=drawn) for _ in range(2))
        noises += [own, following]  # SB3 samples at the observation first
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *_, **__: noises.pop(0))
    model.train(gradient_steps=2, batch_size=40)
    near(flat_ours(agent.parts["critic"]), flat_critics(model.critic.q_networks))
    near(flat_ours(agent.parts["target_critic"]), flat_critics(model.critic_target.q_networks))
    near(flat_policy(linears(agent.policy.head.net), 2), flat_policy(linears(model.actor), 2))
    near(agent.parts["temperature"].log_alpha.detach(), model.log_ent_coef.detach()[0])


def test_td3_of_sb3():
    from stable_baselines3 import TD3

    model = sb3_model(TD3, target_policy_noise=0.0)
    agent, learner = ours({"id": "td3", "target_noise": 0.0, **SMALL}, GAUSSIAN | {"deterministic": True})
    copy_policy(model.actor, agent.policy)
    copy_policy(model.actor_target, agent.parts["target_policy"])
    copy_critics(model.critic.q_networks, agent.parts["critic"])
    copy_critics(model.critic_target.q_networks, agent.parts["target_critic"])
    batches = [random_batch(STATE, UNIT, size=40, seed=i) for i in range(5)]
    feed(model, batches)
    model.train(gradient_steps=5, batch_size=40)
    for i, batch in enumerate(batches):
        learner.update(batch, generator(i))
    near(flat_ours(agent.parts["critic"]), flat_critics(model.critic.q_networks))
    near(flat_ours(agent.parts["target_critic"]), flat_critics(model.critic_target.q_networks))
    near(flat_policy(linears(agent.policy.head.net), 2), flat_policy(linears(model.actor), 2))
    near(flat_policy(linears(agent.parts["target_policy"].head.net), 2), flat_policy(linears(model.actor_target), 2))


# --- TorchRL -----------------------------------------------------------------------------------------------------


def plain_critics(critic):
    """The members of an ensemble as networks of linear layers."""
    networks = []
    for member in range(critic.num_members):
        sizes = [critic.net.weights[0].shape[1], *(w.shape[2] for w in critic.net.weights), 1]
        layers = []
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        networks.append(nn.Sequential(*layers[:-1]))
        linear = linears(networks[-1])
        with torch.no_grad():
            for i, layer in enumerate(linear[:-1]):
                layer.weight.copy_(critic.net.weights[i][member].T), layer.bias.copy_(critic.net.biases[i][member, 0])
            linear[-1].weight.copy_(critic.net.last[member]), linear[-1].bias.copy_(critic.net.last_bias[member])
    return networks


def tensordict_of(batch):
    from tensordict import TensorDict

    done = (batch.discount == 0)[:, None]
    following = {
        "observation": batch.next_observation["observation"], "reward": batch.reward[:, None], "done": done,
        "terminated": done,
    }  # fmt: skip
    return TensorDict(
        {"observation": batch.observation["observation"], "action": batch.action, "next": following}, [len(batch)]
    )


def torchrl_parts(agent):
    """(actor, two critics) of TorchRL with our weights."""
    from tensordict.nn import TensorDictModule
    from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator

    class LogStd(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, observation):
            mean, log_std = self.net.last(self.net.hidden(observation)).chunk(2, -1)
            return mean, log_std.exp()

    module = TensorDictModule(LogStd(agent.policy.head.net), in_keys=["observation"], out_keys=["loc", "scale"])
    actor = ProbabilisticActor(
        module, in_keys=["loc", "scale"], distribution_class=TanhNormal,
        distribution_kwargs={"low": -1.0, "high": 1.0, "tanh_loc": False, "safe_tanh": False},
    )  # fmt: skip

    class Q(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, observation, action):
            return self.network(torch.cat([observation, action], -1))

    critics = [ValueOperator(Q(n), in_keys=["observation", "action"]) for n in plain_critics(agent.parts["critic"])]
    return actor, critics


def test_iql_of_torchrl():
    pytest.importorskip("torchrl")
    from torchrl.modules import ValueOperator
    from torchrl.objectives import IQLLoss

    options = {"id": "iql", "expectile": 0.8, "inverse_temperature": 2.0, **SMALL}
    agent, learner = ours(options, GAUSSIAN)
    actor, critics = torchrl_parts(agent)

    class V(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, observation):
            return self.network.last(self.network.hidden(observation))

    value = ValueOperator(V(agent.parts["value"].net), in_keys=["observation"])
    loss = IQLLoss(actor, critics, value_network=value, temperature=2.0, expectile=0.8, loss_function="l2")
    loss.make_value_estimator(gamma=GAMMA)
    batch = random_batch(STATE, UNIT, size=40, seed=3)
    batch.action = 0.99 * batch.action
    told = loss(tensordict_of(batch))
    values = {name: fn(agent, batch, generator(0))[0].detach() for name, fn in learner.objective.losses.items()}
    near(values["value"], told["loss_value"].detach())
    near(values["critic"], told["loss_qvalue"].detach())
    near(values["policy"], told["loss_actor"].detach())


def test_the_gap_of_cql_of_torchrl(monkeypatch):
    """With one action of each kind, and where one observation follows itself.

    Of several actions TorchRL takes soft maxima of three at a time, and next actions it judges at next observations;
    the paper, its authors and we take one soft maximum of all, at the observation.
    """
    pytest.importorskip("torchrl")
    from torchrl.data import Bounded
    from torchrl.objectives import CQLLoss

    from embodied_rft.objectives import conservative

    agent, learner = ours({"id": "cql", "num_sampled_actions": 1, "gap_temperature": 1.5, **SMALL}, GAUSSIAN)
    actor, critics = torchrl_parts(agent)
    spec = Bounded(-1, 1, (2,))
    loss = CQLLoss(actor, critics, num_random=1, temperature=1.5, min_q_weight=5.0, action_spec=spec)
    loss.make_value_estimator(gamma=GAMMA)
    batch, drawn, get = random_batch(STATE, UNIT, size=40, seed=3), [], loss._get_policy_actions
    batch.next_observation = batch.observation

    def spy(*args, **options):
        drawn.append(get(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(loss, "_get_policy_actions", spy)
    rows = tensordict_of(batch)
    loss.q_loss(rows)
    torch.manual_seed(5)
    told, _ = loss.cql_loss(rows)
    torch.manual_seed(5)
    uniform = torch.empty(40, 2).uniform_(-1, 1)
    action = torch.stack([uniform, *(td["action"] for td, _ in drawn)]).detach()
    density = torch.stack([torch.full((40,), np.log(0.25)), *(log_prob for _, log_prob in drawn)]).float().detach()
    monkeypatch.setattr(conservative, "propose", lambda *_: (action, density))
    q = agent.parts["critic"](batch.observation, batch.action)
    penalty = learner.objective.critic_penalty(agent, batch, q, generator(0))
    near(penalty + 2 * 5.0 * 1.5 * np.log(3), told)  # the mean over three actions, and two members
    ours_, theirs = torch.autograd.grad(penalty, agent.parts["critic"].net.last)[0], []
    told.backward()
    for name, parameter in loss.qvalue_network_params.items(True, True):
        if name[-2:] == ("4", "weight"):
            theirs = parameter.grad
    near(ours_, theirs)
