"""Statistics of observations: when they are taken, that ratios begin at 1, that they go on, freeze and are saved."""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces

from embodied_rft.learning.agent import build_agent, wrap_policy
from embodied_rft.learning.learner import Learner
from embodied_rft.networks.encoder import Encoder
from embodied_rft.objectives import build_objective
from embodied_rft.options import parse
from embodied_rft.runs.recipe import Recipe
from embodied_rft.runs.session import Interrupted, Session
from embodied_rft.train import train
from tests.lab import chain_env
from tests.lab.draws import generator

STATE = spaces.Box(-np.inf, np.inf, (3,), np.float32)
SMALL = {"hidden": [16]}
CHAIN = {"width": 16, "num_blocks": 1, "num_steps": 2}
AGENTS = {
    "gaussian": {"id": "gaussian", **SMALL},
    "residual": {"id": "residual", "base": {"id": "gaussian", **SMALL}, "last_gain": 1.0, **SMALL},
    "flow": {"id": "flow", **CHAIN},
    "categorical": {"id": "categorical", **SMALL},
}
chain_env.register()


def run(folder, agent, *stages):
    actions = "choice" if agent["id"] == "categorical" else "box"
    env = {"id": "Faraway-v0", "num_envs": 4, "options": {"actions": actions}}
    tree = {"env": env, "agent": agent, "buffer": {"capacity": 5_000}, "threads": 1, "stages": list(stages)}
    return train(parse(Recipe, tree), folder, quiet=True, report=False)


@pytest.mark.parametrize("normalize", [True, "running"])
@pytest.mark.parametrize("name", AGENTS)
def test_the_first_ratio_of_every_iteration_is_one(name, normalize, tmp_path, monkeypatch):
    """Statistics may change between iterations only: not between acting and learning from it."""
    largest, seen, update = [], [], Learner.update

    def watch(self, batch, rng, **options):
        if self.iterations == len(largest):
            log_prob, _ = self.agent.policy.log_prob(batch.observation, batch.action, batch.trace)
            largest.append(float((log_prob - batch.log_prob).abs().max()))
            seen.append(self.agent.policy.encoder.mean.clone())
        return update(self, batch, rng, **options)

    monkeypatch.setattr(Learner, "update", watch)
    stage = {
        "objective": {"id": "ppo", "num_epochs": 2, "batch_size": 32},
        "decisions": 240,
        "decisions_per_iteration": 80,
    }
    session = run(tmp_path, {**AGENTS[name], "normalize": normalize}, {"finetune": stage})
    assert len(largest) == 3 and max(largest) < 2e-5
    assert not seen[0].any() and seen[1].abs().min() > 10
    assert torch.equal(seen[1], seen[2]) == (normalize is True)
    encoders = [m for m in session.agent.modules() if isinstance(m, Encoder) and m.normalize and not m.frozen]
    assert len(encoders) == 2 and torch.equal(encoders[0].mean, encoders[1].mean)  # policy and value


def test_running_statistics_are_those_of_all_data():
    encoder = Encoder(STATE, normalize="running", rng=generator())
    data = 7 + 5 * torch.randn(1000, 3, generator=generator(1))
    data[:, 2] *= 1e-4
    for part in data.split([1, 600, 399]):
        encoder.fit({"observation": part})
    torch.testing.assert_close(encoder.mean, data.mean(0))
    expected = 1 / data.std(0, correction=0).clamp_min(1e-2)
    torch.testing.assert_close(encoder.scale, expected, rtol=1e-4, atol=0)


def test_a_feature_that_stood_still_neither_explodes_nor_vanishes_later():
    for normalize in (True, "running"):
        encoder = Encoder(STATE, normalize=normalize, rng=generator())
        still = torch.stack([torch.randn(500, generator=generator()), torch.full((500,), 4.0), torch.zeros(500)], 1)
        still[:, 2] += 1e-4 * torch.randn(500, generator=generator(1))  # hardly moves: noise of a sensor
        if normalize is True:
            with pytest.warns(UserWarning, match=r"observation\[1\]: no variation"):
                encoder.fit({"observation": still})
        else:
            encoder.fit({"observation": still})
        later = torch.tensor([[0.0, 4.0 + d, d] for d in (0.1, 0.2, 0.4, 50.0)])
        features = encoder({"observation": later})
        for column in (1, 2):
            assert len(set(features[:, column].tolist())) == 4
            assert features[:3, column].abs().max() < 20 and features[:3, column].abs().min() > 0.05


def test_inside_ten_deviations_nothing_is_bent():
    encoder = Encoder(STATE, normalize=True, rng=generator())
    encoder.fit({"observation": torch.randn(500, 3, generator=generator())})
    x = torch.linspace(-9, 9, 30).reshape(10, 3)
    expected = (x - encoder.mean) * encoder.scale
    inside = expected.abs() <= 10
    torch.testing.assert_close(encoder({"observation": x})[inside], expected[inside], rtol=0, atol=0)


def test_a_frozen_base_keeps_the_statistics_that_it_was_trained_with():
    agent = build_agent({**AGENTS["gaussian"], "normalize": "running"}, STATE, spaces.Box(-1, 1, (2,)), generator())
    agent.policy.encoder.fit({"observation": 3 + torch.randn(50, 3, generator=generator())})
    agent.policy = wrap_policy("residual", agent, generator(1), hidden=[8], normalize="running")
    base, before = agent.policy.base.encoder, agent.policy.base.encoder.mean.clone()
    for encoder in (base, *agent.normalizers()):
        encoder.fit({"observation": 9 + torch.randn(50, 3, generator=generator())})
    assert torch.equal(base.mean, before) and base not in agent.normalizers()
    assert float(agent.policy.encoder.mean.mean()) > 8


def test_target_networks_read_with_the_statistics_of_those_that_learn():
    agent = build_agent({**AGENTS["gaussian"], "normalize": "running"}, STATE, spaces.Box(-1, 1, (2,)), generator())
    objective = build_objective({"id": "sac", "critic_hidden": [8]})
    objective.setup(agent)
    online, target = (agent.parts[name].encoder for name in ("critic", "target_critic"))
    for shift in (3, 9):
        online.fit({"observation": shift + torch.randn(50, 3, generator=generator(shift))})
        objective.after_update(agent, 1)
        assert torch.equal(target.mean, online.mean) and torch.equal(target.scale, online.scale)


def test_the_reference_of_a_kl_term_keeps_its_statistics():
    agent = build_agent({**AGENTS["gaussian"], "normalize": "running"}, STATE, spaces.Box(-1, 1, (2,)), generator())
    agent.policy.encoder.fit({"observation": 3 + torch.randn(50, 3, generator=generator())})
    build_objective({"id": "ppo", "kl_weight": 0.1}).setup(agent)
    before = agent.parts["reference"].encoder.mean.clone()
    assert agent.parts["reference"].encoder not in agent.normalizers()
    for encoder in agent.normalizers():
        encoder.fit({"observation": 9 + torch.randn(50, 3, generator=generator())})
    assert torch.equal(agent.parts["reference"].encoder.mean, before)
    assert not torch.equal(agent.policy.encoder.mean, before)


@pytest.mark.parametrize("id", ["sac", "ppo"])
def test_running_statistics_freeze_in_evaluation_and_travel_with_the_weights(id, tmp_path):
    stage = {"finetune": {"objective": id, "decisions": 120, "decisions_per_iteration": 40}}
    agent = {**AGENTS["gaussian"], "normalize": "running"}
    session = run(tmp_path, agent, stage)
    encoder = session.agent.policy.encoder
    assert encoder.count > 40
    before = copy.deepcopy(encoder.state_dict())
    session.evaluate(4, sheet=0, name="x")
    after = encoder.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    other = build_agent(agent, STATE, spaces.Box(-1, 1, (2,)), generator(5)).policy
    other.load_state_dict(session.agent.policy.state_dict())
    assert torch.equal(other.encoder.squares, encoder.squares) and torch.equal(other.encoder.mean, encoder.mean)


@pytest.mark.parametrize("id", ["sac", "ppo"])
def test_a_run_with_running_statistics_that_was_stopped_goes_on_with_the_same_bits(id, tmp_path, monkeypatch):
    stage = {"finetune": {"objective": {"id": id, "batch_size": 32}, "decisions": 200, "decisions_per_iteration": 40}}
    agent = {**AGENTS["gaussian"], "normalize": "running"}
    whole = run(tmp_path / "whole", agent, stage).agent.state_dict()
    tick, calls = Session.tick, []

    def stop(self):
        calls.append(1)
        self.stopping = len(calls) == 3
        tick(self)

    monkeypatch.setattr(Session, "tick", stop)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", agent, stage)
    again = run(tmp_path / "parts", agent, stage).agent.state_dict()
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
