"""What of a vision-language-action policy is trained: adapters, heads, towers that stay, values of each kind."""

import copy

import numpy as np
import pytest
import torch

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from embodied_rft.policy import Values, able, tune
from embodied_rft.pools.protocol import fields_of
from tests.lab.helpers_vla import SPACE, STEP, chunks, observation, policy, rng, same, tensors

# --- what is trained -------------------------------------------------------------------------------------------------

CHANGES = {
    "full": lambda name: True,
    "lora": lambda name: "lora_" in name,
    "lora+head": lambda name: "lora_" in name or not name.startswith("vlm."),
    "head": lambda name: not name.startswith("vlm."),
}


def updated(train, **options):
    """(names of weights that one PPO update changed, names of all weights)"""
    spec = policy(train=train, **options).spec
    agent = build_agent(spec, SPACE, STEP, rng())
    p, seen = agent.policy, observation(8)
    objective = build_objective({"id": "bc", "batch_size": 8})
    objective.setup(agent)
    learner = Learner(agent, objective, LearnerConfig(learning_rate=1e-2))
    before = {n: q.detach().clone() for n, q in p.named_parameters()}
    buffers = {n: b.clone() for n, b in p.named_buffers()}
    schema = Schema(fields_of(SPACE), fields_of(STEP)["observation"], dict(p.trace_fields), p.num_units)
    buffer = Buffer(schema, 100)
    never = np.zeros(8, bool)
    taken = Decisions(chunks(8).numpy(), np.full((8, p.num_units), np.nan, np.float32))
    buffer.add(
        np.arange(8), seen, taken, np.ones(8, np.float32), ~never, never, group=0, seed=0, step=0, version=0, source=0
    )
    buffer.close(np.arange(8), seen)
    learner.learn(buffer, np.random.default_rng(0), num_updates=2)
    assert all(torch.equal(b, buffers[n]) for n, b in p.named_buffers())
    return {n for n, q in p.named_parameters() if not torch.equal(q, before[n])}, set(before)


@pytest.mark.parametrize("train", CHANGES)
def test_an_update_changes_only_what_is_trained(train):
    changed, known = updated(train)
    assert changed and all(CHANGES[train](name) for name in changed)
    if train.startswith("lora"):
        assert {n for n in known if "lora_B" in n} <= changed
    if train != "lora":
        assert {n for n in known if n.startswith("head.")} <= changed


def test_a_frozen_tower_stays():
    changed, known = updated("full", freeze_vision=True)
    visual = {n for n in known if ".visual." in n}
    assert visual and not visual & changed and any("language_model" in n for n in changed)


def test_nothing_can_be_learned_by_a_frozen_policy():
    with pytest.raises(ValueError, match="no trainable weights"):
        updated("frozen")


def test_what_is_trained_can_change_between_stages():
    """iRe-VLA: reinforcement learning of the head, then supervised learning of everything."""
    p = policy(train="head")
    tune(p, "full", rng=rng())
    assert any(q.requires_grad for q in p.vlm.parameters()) and not p.vlm.vision_frozen
    tune(p, "head", rng=rng())
    assert not any(q.requires_grad for q in p.vlm.parameters()) and all(q.requires_grad for q in p.head.parameters())


def test_adapters_start_as_nothing():
    assert same(policy(train="lora").act(observation(), greedy=True), policy().act(observation(), greedy=True))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["detached", "shared", "own"])
def test_ppo_with_each_kind_of_value(value):
    agent = build_agent(policy(value=value).spec, SPACE, STEP, rng())
    objective = build_objective({"id": "ppo", "num_epochs": 1, "batch_size": 8})
    objective.setup(agent)
    assert ("value" in agent.parts) == (value != "shared") and (able(agent.policy, Values) is not None) == (
        value == "shared"
    )
    learner = Learner(agent, objective)
    p, seen = agent.policy, observation(4)
    schema = Schema(fields_of(SPACE), fields_of(STEP)["observation"], dict(p.trace_fields), p.num_units)
    buffer, never = Buffer(schema, 100), np.zeros(4, bool)
    for step in range(2):
        taken = p.act(seen, rng=rng(step))
        row = {"group": 0, "seed": 0, "step": step, "version": learner.version, "source": 2}
        buffer.add(np.arange(4), seen, taken, np.arange(4, dtype=np.float32), never, ~never if step else never, **row)
    buffer.close(np.arange(4), seen)
    metrics = learner.learn(buffer, np.random.default_rng(0))
    assert np.isfinite(metrics["value/loss"]) and metrics["policy/kl"] < 1e-6


def test_a_shared_value_trains_the_trunk_and_a_detached_one_does_not():
    seen = tensors(observation())
    shared = policy(value="shared")
    assert torch.autograd.grad(shared.value(seen).sum(), next(shared.vlm.decoder.parameters()))[0].abs().max() > 0
    encoder = policy().make_encoder(rng=rng())
    assert not encoder(seen).requires_grad and not list(encoder.parameters())


def test_a_copied_policy_is_its_own():
    p, seen = policy(value="shared"), tensors(observation())
    twin = copy.deepcopy(p)
    before = twin.value(seen)
    with torch.no_grad():
        for parameter in p.parameters():
            parameter.add_(0.1)
    assert torch.equal(twin.value(seen), before) and not torch.equal(p.value(seen), before)
