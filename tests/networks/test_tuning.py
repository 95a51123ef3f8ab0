"""One word picks which weights of a policy learn: exactly those change, also mid-run, rebuilt, and after a kill."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml

from embodied_rft.learning.agent import build_agent, wrap_policy
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.networks.trainable import LoraOptions
from embodied_rft.objectives import build_objective
from embodied_rft.policy import build_policy, tune
from embodied_rft.pools.chunks import ChunkBox
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.train import train
from tests.lab.draws import generator as rng
from tests.lab.point import random_batch

STATE = gym.spaces.Dict(
    {"image/front": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), "state": gym.spaces.Box(-1, 1, (3,), np.float32)}
)
ACTION = ChunkBox(gym.spaces.Box(-1, 1, (2,)), horizon=2)
DIFFUSION = {"id": "diffusion", "horizon": 2, "denoising_steps": 6, "ddim_steps": 3, "width": 32, "keys": ["state"]}
VLA = {
    "id": "vla",
    "model": {"tiny": {"kind": "smolvlm"}},
    "head": "flow",
    "flow": {"width": 32, "num_blocks": 1},
    "horizon": 2,
    "instruction": "go",
    "prompt": "{images}{instruction}",
}
BASES = {"diffusion": DIFFUSION, "vla": VLA}
SMALL = {"hidden": [32], "keys": ["state"]}
WORDS = {  # which weights change, by name
    ("diffusion", "full"): lambda n: True,
    ("diffusion", "lora"): lambda n: "lora_" in n,
    ("diffusion", "residual"): lambda n: n.startswith("head."),
    ("diffusion", "steering"): lambda n: n.startswith("head."),
    ("diffusion", "last_steps"): lambda n: n.startswith("tuned."),
    ("vla", "full"): lambda n: True,
    ("vla", "lora"): lambda n: "lora_" in n,
    ("vla", "lora+head"): lambda n: "lora_" in n or not n.startswith("vlm."),
    ("vla", "head"): lambda n: not n.startswith("vlm."),
    ("vla", "residual"): lambda n: n.startswith("head."),
    ("vla", "steering"): lambda n: n.startswith("head."),
}
OPTIONS = {"residual": SMALL, "steering": SMALL, "last_steps": {"num_steps": 2}}


def adapt(agent, word, **options):
    """What the stage does."""
    if word in OPTIONS:
        agent.policy = wrap_policy(word, agent, rng(1), **OPTIONS[word])
    else:
        tune(agent.policy, word, lora=LoraOptions(**options) if options else None, rng=rng(1))


def learn(agent, objective, *, updates=2):
    """Names of the weights that a few updates changed. Everything else of the policy must be equal to the bit."""
    target = build_objective(objective)
    target.setup(agent)
    before = {n: p.detach().clone() for n, p in agent.policy.named_parameters()}
    buffers = {n: b.clone() for n, b in agent.policy.named_buffers()}
    learner = Learner(agent, target, LearnerConfig(learning_rate=1e-2, weight_decay=0.1))
    for _ in range(updates):
        learner.update(random_batch(STATE, ACTION, size=8), rng(2))
    assert all(torch.equal(b, buffers[n]) for n, b in agent.policy.named_buffers())
    return {n for n, p in agent.policy.named_parameters() if not torch.equal(p, before[n])}


def objective_for(word):
    off_policy = {"id": "sac", "critic_hidden": [32], "batch_size": 8}
    return off_policy if word in ("residual", "steering") else {"id": "bc"}


def greedy(policy):
    """Actions on fixed observations."""
    seen = random_batch(STATE, ACTION, size=4).observation
    return policy.act({k: v.numpy() for k, v in seen.items()}, greedy=True).action


@pytest.mark.parametrize(("base", "word"), WORDS, ids=["-".join(key) for key in WORDS])
def test_exactly_the_chosen_weights_change(base, word):
    agent = build_agent(BASES[base], STATE, ACTION, rng())
    adapt(agent, word)
    expected = {n for n, p in agent.policy.named_parameters() if WORDS[base, word](n) and p.requires_grad}
    assert expected == {n for n, p in agent.policy.named_parameters() if p.requires_grad}
    changed = learn(agent, objective_for(word))
    assert changed <= expected
    unused = {n for n in expected if ".lm_head" in n or "value_head" in n}
    assert len(changed) > 0.7 * len(expected - unused), expected - changed


@pytest.mark.parametrize("base", BASES)
def test_what_is_frozen_does_not_learn(base):
    agent = build_agent(BASES[base], STATE, ACTION, rng())
    adapt(agent, "frozen")
    with pytest.raises(ValueError, match="no trainable weights"):
        learn(agent, {"id": "bc"})


@pytest.mark.parametrize("base", BASES)
def test_adapters_start_as_nothing_and_then_act(base):
    agent = build_agent(BASES[base], STATE, ACTION, rng())
    before = greedy(agent.policy)
    adapt(agent, "lora", rank=2, alpha=64)
    assert np.array_equal(greedy(agent.policy), before)
    learn(agent, {"id": "bc"})
    assert np.abs(greedy(agent.policy) - before).max() > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_the_choice_may_change_again_and_again(base):
    """iRe-VLA alternates; what was added stays, and a spec tells it all."""
    agent = build_agent(BASES[base], STATE, ACTION, rng())
    for word in ("lora", "frozen", "full", "lora", "full"):
        adapt(agent, word)
        trained = {n for n, p in agent.policy.named_parameters() if p.requires_grad}
        assert trained == {n for n in trained if WORDS.get((base, word), lambda n: False)(n)}
        if word != "frozen":
            assert any("lora_" in n for n in trained)
            learn(agent, {"id": "bc"}, updates=1)
        rebuilt = build_policy(agent.policy.spec, STATE, ACTION, rng(9))
        rebuilt.load_state_dict(agent.policy.state_dict())
        assert np.array_equal(greedy(rebuilt), greedy(agent.policy))
        assert {n for n, p in rebuilt.named_parameters() if p.requires_grad} == trained


def test_a_residual_on_an_adapted_base_leaves_the_adapters_alone():
    agent = build_agent(DIFFUSION, STATE, ACTION, rng())
    adapt(agent, "lora")
    learn(agent, {"id": "bc"})
    base = greedy(agent.policy)
    adapt(agent, "residual")
    assert np.abs(greedy(agent.policy) - base).max() < 0.05
    assert all(n.startswith("head.") for n in learn(agent, objective_for("residual")))
    adapt(agent, "lora")  # now of the residual itself
    changed = learn(agent, objective_for("residual"))
    assert changed and all(n.startswith("head.") and "lora_" in n for n in changed)
    adapt(agent, "full")
    assert not any(p.requires_grad for p in agent.policy.base.parameters())


@pytest.mark.parametrize(
    ("word", "options", "message"),
    [
        ("head", {}, "possible: full, lora, frozen"),
        ("fulll", {}, "did you mean 'full'"),
        ("lora", {"targets": ("blokcs",)}, "no linear layer is named 'blokcs'"),
    ],
)
def test_what_cannot_be_trained_is_refused(word, options, message):
    agent = build_agent(DIFFUSION, STATE, ACTION, rng())
    with pytest.raises(ValueError, match=message):
        adapt(agent, word, **options)


def test_adapters_of_another_size_are_refused():
    agent = build_agent(DIFFUSION, STATE, ACTION, rng())
    adapt(agent, "lora", rank=2)
    adapt(agent, "lora")
    with pytest.raises(ValueError, match="has adapters with"):
        adapt(agent, "lora", rank=4)
    assert agent.policy.spec["tuned"] == {"train": "lora", "lora": {"rank": 2, "alpha": 32, "targets": "all-linear"}}


def test_only_named_layers_get_adapters():
    agent = build_agent(DIFFUSION, STATE, ACTION, rng())
    adapt(agent, "lora", targets=("observe", "last"))
    found = {n.split(".lora_")[0] for n, _ in agent.policy.named_parameters() if ".lora_" in n}
    assert found == {"net.observe", "net.last"}


# --- in a recipe -----------------------------------------------------------------------------------------------------

BC = {"pretrain": {"objective": {"id": "bc", "batch_size": 32}, "updates": 2}}
PPO = {"finetune": {"objective": {"id": "ppo", "batch_size": 32}, "decisions": 64, "decisions_per_iteration": 64}}
RECIPE = {
    "name": "tuning",
    "env": {"id": "embodied_rft/FetchReach-v0", "num_envs": 4, "options": {"num_threads": 1}},
    "agent": {"id": "flow", "horizon": 2, "num_steps": 2, "width": 32},
    "buffer": {"capacity": 2_000},
    "logging": {"console": False},
    "stages": [
        {"demonstrate": {"episodes": 4}},
        BC,
        {"repeat": {"times": 2, "stages": [{"adapt": {"with": "lora"}}, PPO, {"adapt": {"with": "full"}}, BC]}},
        {"adapt": {"with": "frozen"}},
        {"adapt": {"with": "residual", "options": {"hidden": [16]}}},
        PPO,
    ],
}


def written(folder, recipe):
    """The recipe as read from a file."""
    path = folder / "tuning.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path)


def last(folder):
    """The agent's state at the end of a run."""
    from embodied_rft.runs.checkpoint import Checkpoints

    return Checkpoints(folder / "checkpoints").newest()[1]["agent"]


class Killed(Exception):
    """As a kill between two stages."""


@pytest.mark.parametrize("stop", [4, 6, 9])
def test_a_run_that_alternates_continues_to_the_same_bits(tmp_path, stop, monkeypatch):
    from embodied_rft.runs.session import Session

    recipe = written(tmp_path, RECIPE)
    train(recipe, tmp_path / "whole", quiet=True, report=False)
    run_stage = Session._run_stage

    def some(session, stage):
        if len(session.records) == stop:
            raise Killed
        run_stage(session, stage)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Session, "_run_stage", some)
        train(recipe, tmp_path / "parts", quiet=True, report=False)
    train(recipe, tmp_path / "parts", quiet=True, report=False)
    a, b = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any("lora_" in k for k in a)


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        ({"with": "ful"}, "did you mean 'full'"),
        ({"with": "gaussian"}, "known|did you mean"),
        ({"with": "head", "options": {"rank": 3}}, "no effect with 'head'"),
        ({"with": "lora", "options": {"rnk": 3}}, "did you mean 'rank'"),
        ({"with": "residual", "options": {"scal": 3}}, "did you mean 'scale'"),
    ],
)
def test_a_recipe_with_a_wrong_word_is_refused(adapt, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, RECIPE | {"stages": [{"adapt": adapt}]})
