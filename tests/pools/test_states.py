"""Finite lists of initial states: held-out ones count once, those that a policy cannot read are found at once."""

import functools
import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

import embodied_rft.envs  # noqa: F401
from embodied_rft.data import Decisions
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.learning.agent import build_agent
from embodied_rft.options import parse
from embodied_rft.pools.pool import make_pool
from embodied_rft.runs.recipe import Recipe
from embodied_rft.seeding import evaluation_seed, held_out_index
from embodied_rft.testing.check_env import check_env
from embodied_rft.testing.check_policy import check_policy
from embodied_rft.train import train


class Levels(gymnasium.Env):
    """Somebody else's environment with five levels to be judged on; odd ones are easy."""

    num_held_out_states = 5

    def __init__(self):
        self.observation_space = spaces.Box(0, 5, (1,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        held_out = seed is not None and seed >= 2**31
        self.level = held_out_index(seed, 5) if held_out else int(self.np_random.integers(5))
        return np.full(1, self.level, np.float32), {}

    def step(self, action):
        return np.full(1, self.level, np.float32), 0.0, True, False, {"success": self.level % 2 == 1}


gymnasium.register("tests/Levels-v0", Levels)


def still(observation):
    count = len(observation["observation"])
    return Decisions(np.zeros((count, 1), np.float32), np.zeros((count, 1), np.float32))


@pytest.mark.parametrize("kind", ["sync", "workers"])
def test_every_held_out_state_counts_once_whoever_made_the_environment(kind):
    pool = make_pool(
        "tests/Levels-v0", 3, kind=kind, purpose="evaluation", **({"num_workers": 1} if kind == "workers" else {})
    )
    try:
        outcome = evaluate(still, pool, evaluation_seeds(200))
        assert (outcome.episodes, outcome.states, outcome.success) == (5, 5, 0.4)
        assert sorted(held_out_index(seed, 5) for seed in outcome.seeds) == [0, 1, 2, 3, 4]
        assert "on 5 of 5 held-out initial states" in str(outcome) and outcome.to_json()["states"] == 5
        fewer = evaluate(still, pool, evaluation_seeds(3))
        assert fewer.episodes == 3 and "3 of 5" in str(fewer)
    finally:
        pool.close()


def test_sheets_of_a_finite_list_begin_apart():
    for count in (1, 7, 10, 1000):
        for sheet in range(4):
            seen = [held_out_index(evaluation_seed(i, sheet=sheet), count) for i in range(2 * count)]
            assert sorted(seen[:count]) == list(range(count)) and seen[:count] == seen[count:]
    first, curve = ({held_out_index(evaluation_seed(i, sheet=k), 1000) for i in range(400)} for k in (0, 1))
    assert not first & curve
    with pytest.raises(ValueError, match="evaluation seed"):
        held_out_index(5, 10)


def problems(folder, prompts, **columns):
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": "e", **columns}) + "\n" for p in prompts))
    return {"path": str(path)}


def say(observation):
    count = len(observation["prompt"])
    return Decisions(["e"] * count, np.zeros((count, 1), np.float32))


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_held_out_problems_are_judged_once_each(tmp_path, kind):
    options = problems(tmp_path, [f"say {i % 60}" for i in range(120)])  # each prompt twice
    pool = make_pool("embodied_rft/TextJsonl-v0", 4, kind=kind, options=options, purpose="evaluation")
    outcome = evaluate(say, pool, evaluation_seeds(200))
    shown = {pool.reset(np.array([seed] * 4, np.int64))["prompt"][0] for seed in outcome.seeds}
    assert outcome.episodes == outcome.states == len(shown) < 20
    assert shown == {one["prompt"] for one in pool.ask("initial_observations").values()} - training_prompts(options)
    pool.close()


def training_prompts(options):
    pool = make_pool("embodied_rft/TextJsonl-v0", 64, options=options)
    shown = set()
    for start in range(0, 64 * 30, 64):
        shown |= set(pool.reset(np.arange(start, start + 64))["prompt"])
    pool.close()
    return shown


@pytest.mark.parametrize("count", [2, 10, 100, 250])
def test_a_finite_list_counts_as_different_states(tmp_path, count):
    """Whatever its length: seeds far apart often mean the same entry."""
    options = problems(tmp_path, [f"say {i}" for i in range(count)]) | {"held_out": 0}
    pool = make_pool("embodied_rft/TextJsonl-v0", 2, options=options, purpose="evaluation")
    pool.reset(np.array([2**31, 2**31 + 1]))
    assert pool.seeding.varies and pool.seeding.repeats
    pool.close()


def test_generated_tasks_know_how_few_problems_they_have():
    counts = {"Sum": 100, "Format": 36, "Countdown": None}
    for name, count in counts.items():
        pool = make_pool(f"embodied_rft/Text{name}-v0", 2, purpose="evaluation")
        assert pool.ask("num_held_out_states") == count
        pool.close()


def recipe(options, stages, **agent):
    model = {"tiny": {"hidden_size": 32, "max_tokens": 64}}
    agent = {"id": "language", "model": model, "max_new_tokens": 4, "prompt": "plain", **agent}
    env = {"id": "embodied_rft/TextJsonl-v0", "num_envs": 8, "options": options}
    return parse(Recipe, {"env": env, "agent": agent, "buffer": {"capacity": 500}, "threads": 1, "stages": stages})


def test_prompts_without_room_are_named_before_the_run_starts(tmp_path):
    prompts = [f"{i:03d}" + "x" * (58 if i == 41 else 57 if i == 17 else 20) for i in range(60)]  # 61 + 4 > 64
    options = problems(tmp_path, prompts)
    stages = [{"collect": {"episodes": 64}}, {"evaluate": {"episodes": 100}}]
    with pytest.raises(ValueError, match=r"1 of 60 prompts .*problems.jsonl, line 42: .* 61 tokens and 4 .*skip"):
        train(recipe(options, stages), tmp_path / "run", quiet=True, report=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    session = train(recipe(options, stages, long_prompts="skip"), tmp_path / "run", quiet=True, report=False)
    assert "1 initial states are left out" in (tmp_path / "run" / "run.log").read_text()
    seen = {text for each in session.buffer.trajectories() for text in each.observation["prompt"]}
    assert prompts[41] not in seen and len(seen) > 20
    content = json.loads((tmp_path / "run" / "evaluations" / "1-0.json").read_text())
    assert content["episodes"] == content["states"] < 20
    assert f"has {content['states']} held-out initial states" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize("prompt", ["chat", "plain"])
@given(st.text(min_size=1, max_size=70))
@settings(max_examples=60, deadline=None)
def test_what_counts_as_readable_is_what_can_be_answered(prompt, text):
    """The quick look at lengths in bytes agrees with acting."""
    policy = reader(prompt)
    try:
        policy.act({"prompt": [text]}, greedy=True)
        answered = True
    except ValueError:
        answered = False
    assert answered == (not policy.unreadable({"prompt": [text]}))


@functools.cache
def reader(prompt):
    spec = {"id": "language", "model": {"tiny": {"hidden_size": 32, "max_tokens": 64}}, "prompt": prompt}
    of = spaces.Dict(prompt=spaces.Text(100)), spaces.Text(100)
    return build_agent({**spec, "max_new_tokens": 2}, *of, torch.Generator().manual_seed(0)).policy


@pytest.mark.parametrize("count", [-1, 2.5, True])
def test_an_impossible_number_of_states_is_refused(count, monkeypatch):
    monkeypatch.setattr(Levels, "num_held_out_states", count)
    pool = make_pool("tests/Levels-v0", 1, kind="sync", purpose="evaluation")
    with pytest.raises(ValueError, match="num_held_out_states = "):
        evaluate(still, pool, evaluation_seeds(3))
    pool.close()


def test_no_prompt_at_all_fits(tmp_path):
    with pytest.raises(ValueError, match="2 of 2 prompts"):
        train(
            recipe(problems(tmp_path, ["a" * 70, "b" * 70]), [{"evaluate": {"episodes": 2}}], long_prompts="skip"),
            tmp_path / "run",
            quiet=True,
        )


@pytest.mark.parametrize("id", ["Sum", "Countdown", "Format", "Jsonl", "long"])
@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_text_models_pass_the_check_on_text_environments(tmp_path, id, prompt):
    if id == "long":  # of any length that the space allows
        of = {"observation_space": spaces.Dict(prompt=spaces.Text(50_000)), "action_space": spaces.Text(50_000)}
    else:
        options = problems(tmp_path, ["a", "b", "c", "d"], checker="exact") if id == "Jsonl" else {}
        env = gymnasium.make(f"embodied_rft/Text{id}-v0", **options)
        of = {"observation_space": env.observation_space, "action_space": env.action_space}
    spec = {"id": "language", "model": {"tiny": {"hidden_size": 32, "max_tokens": 128}}, "prompt": prompt}
    agent = build_agent({**spec, "max_new_tokens": 8}, *of.values(), torch.Generator().manual_seed(0))
    check_policy(agent.policy, **of)
    if id != "long":
        check_env(f"embodied_rft/Text{id}-v0", options=options)
