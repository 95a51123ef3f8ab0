"""What the stages that learn from replay do with their numbers: ratios, shares, chosen losses, averages."""

import json

import pytest
import torch

import embodied_rft.envs  # noqa: F401
from embodied_rft.buffer.plans import Drawn
from embodied_rft.data import Source
from embodied_rft.learning.learner import Learner
from embodied_rft.objectives import build_objective
from embodied_rft.options import parse, walk
from embodied_rft.runs.recipe import Recipe, load_recipe, recipe_names
from embodied_rft.train import train

TINY = {"critic_hidden": [8]}
DEMONSTRATE = {"demonstrate": {"episodes": 2}}
PUBLISHED = {"sac": 1, "td3": 1, "td3_bc": 1, "rlpd": 20, "wsrl": 4, "e2o": 1, "cql": 1, "cal_ql": 1, "iql": 1}
PUBLISHED |= {"spot": 1, "dsrl_sac": 5, "dsrl_na": 5}


def run(folder, *stages, num_envs=4):
    env = {"id": "embodied_rft/FetchReach-v0", "num_envs": num_envs, "options": {"num_threads": 1}}
    recipe = {"env": env, "agent": {"id": "gaussian", "hidden": [8]}, "buffer": {"capacity": 1_000}}
    return train(parse(Recipe, recipe | {"stages": list(stages)}), folder, quiet=True, report=False)


@pytest.mark.parametrize("id, ratio", PUBLISHED.items())
def test_objectives_declare_their_published_ratio(id, ratio):
    assert build_objective(id).updates_per_decision == ratio


@pytest.mark.parametrize(
    "num_envs, options, updates",
    [
        (4, {}, 104),  # two iterations of 52: at least 50, and as many of each environment
        (64, {}, 128),
        (4, {"updates_per_decision": 0.55, "decisions_per_iteration": 20}, 55),
        (4, {"updates_per_decision": 0.025, "decisions_per_iteration": 20}, 2),  # what is owed in fractions is kept
        (4, {"updates_per_decision": 0}, 0),
        (
            4,
            {
                "objective": {"id": "wsrl", "num_critics": 2, "batch_size": 4, **TINY},
                "decisions": 20,
                "decisions_per_iteration": 20,
            },
            80,
        ),
    ],
)
def test_updates_follow_decisions(tmp_path, num_envs, options, updates):
    stage = {"objective": {"id": "sac", "batch_size": 4, **TINY}, "decisions": 100, **options}
    assert run(tmp_path, {"finetune": stage}, num_envs=num_envs).counters["updates"] == updates


def test_fresh_data_have_no_ratio(tmp_path):
    with pytest.raises(ValueError, match="updates_per_decision has no effect"):
        run(tmp_path, {"finetune": {"objective": "ppo", "decisions": 8, "updates_per_decision": 1}})


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, None])
@pytest.mark.parametrize("word", ["pretrain", "finetune"])
def test_a_stage_keeps_its_share_of_offline_data(tmp_path, monkeypatch, share, word):
    """None: half for rlpd."""
    seen, update = [], Learner.update

    def spy(self, batch, rng, **options):
        seen.append(int((batch.columns["source"] != Source.ONLINE).sum()))
        return update(self, batch, rng, **options)

    monkeypatch.setattr(Learner, "update", spy)
    amount = {"updates": 3} if word == "pretrain" else {"decisions": 8, "decisions_per_iteration": 8}
    objective = {"id": "rlpd", "num_critics": 2, "batch_size": 16, **TINY}
    objective |= {} if share is None else {"offline_share": share}
    run(tmp_path, DEMONSTRATE, {"warm_up": {"decisions": 40}}, {word: {"objective": objective, **amount}})
    assert seen and set(seen) == {round(16 * (0.5 if share is None else share))}


def test_demonstrations_are_never_overwritten(tmp_path):
    session = run(tmp_path, DEMONSTRATE, {"warm_up": {"decisions": 1_200}})  # more than the buffer has room for
    assert len(session.buffer.rows(source=Source.DEMONSTRATION)) == 100 and len(session.buffer) > 800


def test_only_the_chosen_losses_step(tmp_path):
    found = []
    for updates in (0, 3):
        stage = {"objective": {"id": "sac", "batch_size": 4, **TINY}, "updates": updates, "only": ["critic"]}
        session = run(tmp_path / str(updates), DEMONSTRATE, {"pretrain": stage})
        found.append(session.agent.state_dict())
    moved = {
        key.split(".")[1] if key.startswith("parts") else key
        for key in found[0]
        if (found[0][key] != found[1][key]).any()
    }
    assert moved == {"critic", "target_critic"}


@pytest.mark.parametrize("word", ["pretrain", "finetune"])
def test_the_averaged_policy_is_what_evaluations_see_and_what_stays(tmp_path, monkeypatch, word):
    learners, make = [], Learner.__init__
    monkeypatch.setattr(Learner, "__init__", lambda self, *a, **k: learners.append(self) or make(self, *a, **k))
    amount = {"updates": 20} if word == "pretrain" else {"decisions": 20, "decisions_per_iteration": 20}
    objective = {"id": "bc"} if word == "pretrain" else {"id": "sac", **TINY}
    stage = {"objective": {"batch_size": 8, **objective}, **amount, "learner": {"ema": 0.99, "learning_rate": 0.1}}
    curve = {"evaluate_every": 20, "evaluate_episodes": 2}
    session = run(tmp_path, DEMONSTRATE, {word: stage | curve}, {"evaluate": {"episodes": 2, "sheet": 1}})
    kept = session.agent.policy.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in learners[0].averaged.state_dict().items())
    raw = run(tmp_path / "raw", DEMONSTRATE, {word: stage | {"learner": {"learning_rate": 0.1}}})
    assert any(not torch.equal(kept[key], value) for key, value in raw.agent.policy.state_dict().items())
    found = sorted((tmp_path / "evaluations").glob("*.json"))
    curve, final = (json.loads(path.read_text())["mean_return"] for path in found)
    assert curve == final != 0  # the same states, the same policy


@pytest.mark.parametrize("name", [n for n in recipe_names() if not n.startswith("tasks/")])
def test_shipped_recipes_with_replay_say_how_many_updates_they_make(name):
    """The default is the paper's, as in tasks/; a recipe made for minutes on two cores says what it takes instead."""
    for _, stage in walk(load_recipe(name).stages):
        if stage.word == "finetune" and isinstance(build_objective(stage.config.objective).reading, Drawn):
            assert stage.config.updates_per_decision is not None and stage.config.decisions_per_iteration is not None
