"""Stages through `train`: what experience they gather, which of it is learned from, what their options change."""

import json
import shutil

import numpy as np
import pytest
import torch

from embodied_rft import registry
from embodied_rft.buffer.trajectories import write_trajectories
from embodied_rft.data import Source, Trajectory
from embodied_rft.experience.collect import Collector
from embodied_rft.objectives.policy_gradient import PPO
from embodied_rft.objectives.soft_actor_critic import SAC
from embodied_rft.options import ConfigError, parse, parse_stages
from embodied_rft.runs.recipe import Recipe
from embodied_rft.runs.session import Session
from embodied_rft.train import train
from tests.lab import toys  # noqa: F401  registers Corridor-v0

READ = []  # batches that the objectives below were given


class WatchedPPO(PPO):
    """Remembers what it learned from."""

    def policy_loss(self, agent, batch, rng):
        READ.append(batch)
        return super().policy_loss(agent, batch, rng)


class WatchedSAC(SAC):
    """Likewise."""

    def critic_loss(self, agent, batch, rng):
        READ.append(batch)
        return super().critic_loss(agent, batch, rng)


for name, cls in (("watched_ppo", WatchedPPO), ("watched_sac", WatchedSAC)):
    if name not in registry.known("objective"):
        registry.register("objective", name)(cls)


def recipe(*stages, env=(), env_options=(), **options):
    return parse(
        Recipe,
        {
            "name": "stages",
            "env": {"id": "Corridor-v0", "num_envs": 4, "options": dict(env), **dict(env_options)},
            "agent": {"id": "gaussian", "hidden": [8]},
            "buffer": {"capacity": 2_000},
            "checkpoint_seconds": 0.0,
            "stages": list(stages),
        }
        | options,
    )


def run(folder, *stages, **options):
    READ.clear()
    return train(recipe(*stages, **options), folder, quiet=True, report=False)


def lines(folder):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("wall/")} for line in read]


def finetune(objective="watched_ppo", **options):
    return {"finetune": {"objective": {"id": objective, **options.pop("objective_options", {})}, **options}}


# --- episodes and iterations -----------------------------------------------------------------------------------------


def learned_once(folder, per_iteration, **env):
    """Every decision of every episode was learned from exactly once, with what really followed it."""
    session = run(
        folder,
        finetune(decisions=160, decisions_per_iteration=per_iteration, objective_options={"num_epochs": 1}),
        env=env,
    )
    columns = session.buffer.columns(session.buffer.rows())
    seen = [batch.columns for batch in READ]
    pairs = [np.stack([c["episode"], c["step"]], 1) for c in (columns, *seen)]
    assert len(columns["step"]) >= 160
    assert sorted(map(tuple, np.concatenate(pairs[1:]))) == sorted(map(tuple, pairs[0]))
    batch = session.buffer.batch(session.buffer.rows())
    now, after = batch.observation["observation"], batch.next_observation["observation"]
    assert torch.allclose(after[:, 0], now[:, 0] + 0.1) and torch.equal(after[:, 1], now[:, 1])
    return columns["step"].max()


@pytest.mark.parametrize("per_iteration", [4, 12, 40])  # of 4 environments: one step, three, ten
def test_episodes_go_on_and_each_decision_is_learned_from_once(tmp_path, per_iteration):
    assert learned_once(tmp_path / "run", per_iteration, length=17, spread=6) >= 16


def test_reading_ends_too_early_without_a_look_at_what_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(Collector, "_running", lambda self: np.zeros(0, np.int64))
    with pytest.raises((AssertionError, ValueError)):
        learned_once(tmp_path / "run", 40, length=17)


def stopped(monkeypatch, ticks):
    """The run dies behind a checkpoint: at the tick of that number."""
    count, tick = iter(range(ticks)), Session.tick

    def die(self):
        tick(self)
        if next(count, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Session, "tick", die)


def interrupted(folder, monkeypatch, ticks, *stages, **options):
    """A run that was killed, and two continuations of it."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, ticks)
        run(folder / "killed", *stages, **options)
    shutil.copytree(folder / "killed", folder / "again")
    return [run(folder / name, *stages, **options) for name in ("killed", "again")]


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.agent.state_dict().values(), b.agent.state_dict().values(), strict=True)
    )


def test_what_no_checkpoint_can_hold_begins_anew_is_counted_and_the_run_repeats(tmp_path, monkeypatch):
    stage, env = finetune(decisions=200, decisions_per_iteration=20), {"length": 13}
    whole, second = (run(tmp_path / name, stage, env=env) for name in ("whole", "second"))
    assert same_weights(whole, second) and lines(tmp_path / "whole") == lines(tmp_path / "second")
    killed, again = interrupted(tmp_path, monkeypatch, 3, stage, env=env)
    assert same_weights(killed, again) and lines(tmp_path / "killed") == lines(tmp_path / "again")
    assert lines(tmp_path / "killed")[:4] == lines(tmp_path / "whole")[:4]
    assert [line["collect/begun_anew"] for line in lines(tmp_path / "killed") if "collect/begun_anew" in line] == [4.0]
    assert "4 running episodes could not be saved and begin anew" in (tmp_path / "killed" / "run.log").read_text()
    assert "begin anew" not in (tmp_path / "whole" / "run.log").read_text()
    ends = [t.end for t in killed.buffer.trajectories()]
    assert ends.count("cut") == 4 + 4  # at the resumption, and at the end of the stage


def test_iterations_of_whole_episodes_lose_nothing_in_any_environment(tmp_path, monkeypatch):
    stage, env = finetune(decisions=100, episodes_per_iteration=6), {"length": 3, "spread": 4}
    whole = run(tmp_path / "whole", stage, env=env)
    killed, again = interrupted(tmp_path, monkeypatch, 2, stage, env=env)
    assert same_weights(whole, killed) and same_weights(whole, again)
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed") == lines(tmp_path / "again")


def test_a_run_in_which_no_episode_ends_says_so_and_what_to_do(tmp_path):
    run(tmp_path / "run", finetune(decisions=80, decisions_per_iteration=40), env={"length": 0})
    said = (tmp_path / "run" / "run.log").read_text()
    assert "no episode ended in 80 decisions" in said and "TimeLimit, max_episode_steps: 200" in said
    assert lines(tmp_path / "run")[-1]["collect/episodes"] == 0
    run(tmp_path / "other", finetune(decisions=80, decisions_per_iteration=40))
    assert "no episode ended" not in (tmp_path / "other" / "run.log").read_text()


def test_the_return_of_an_episode_is_its_own(tmp_path):
    run(tmp_path / "run", finetune(decisions=120, decisions_per_iteration=24), env={"length": 5})
    assert [line["collect/return"] for line in lines(tmp_path / "run")] == [5.0] * 5


@pytest.mark.parametrize("times", [0, 3])
def test_a_body_is_repeated_so_often(tmp_path, times):
    session = run(tmp_path / "run", {"repeat": {"times": times, "stages": [{"collect": {"episodes": 4}}]}})
    assert len(list(session.buffer.trajectories())) == 4 * times
    assert len({t.seed for t in session.buffer.trajectories()}) == 4 * times  # every round has states of its own


@pytest.mark.parametrize(
    "stage",
    [{"warm_up": {"decisions": 22}}, finetune(decisions=22, decisions_per_iteration=24)],
    ids=lambda s: next(iter(s)),
)
def test_a_stage_ends_the_episodes_that_it_began(tmp_path, stage):
    session = run(tmp_path / "run", stage, {"collect": {"episodes": 4}})
    found = sorted((len(t), t.end) for t in session.buffer.trajectories())
    assert found == [(1, "cut")] * 4 + [(5, "terminated")] * 8


@pytest.mark.parametrize("source", ["demonstration", "offline"])
def test_what_is_loaded_counts_as_the_recipe_says_and_stays(tmp_path, source):
    file, zeros = tmp_path / "data.safetensors", np.zeros(2, np.float32)
    episodes = [
        Trajectory({"observation": np.zeros((3, 2), np.float32)}, zeros[:, None], zeros, "terminated", seed=i)
        for i in range(5)
    ]
    write_trajectories(file, episodes)
    load = {"load": {"file": str(file), "source": source, "max_episodes": 3}}
    session = run(tmp_path / "run", load, {"collect": {"episodes": 12}}, buffer={"capacity": 40})
    kept = [(t.seed, t.source) for t in session.buffer.trajectories() if t.source != Source.ONLINE]
    assert kept == [(i, Source[source.upper()]) for i in range(3)]


# --- success ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("success", "rate"), [("end", 1.0), ("middle", 0.0)])
@pytest.mark.parametrize("tell", ["always", "end"])
def test_success_counts_at_the_end_of_an_episode(tmp_path, success, rate, tell):
    env = {"success": success, "tell": tell}
    session = run(tmp_path / "run", {"collect": {"episodes": 8}}, {"evaluate": {"episodes": 8}}, env=env)
    assert [record["metrics"]["success"] for record in session.records] == [rate, rate]


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_success_told_with_the_last_step_only_is_a_stream_of_reward(tmp_path, end):
    buffer = {"capacity": 200, "success": True}
    env = {"tell": "end", "end": end}
    session = run(tmp_path / "run", {"collect": {"episodes": 8}}, env=env, buffer=buffer)
    for trajectory in session.buffer.trajectories():
        assert trajectory.rewards["success"].tolist() == [0, 0, 0, 0, 1] and trajectory.success


@pytest.mark.parametrize(("success", "decisions"), [("end", 40), ("middle", 120)])
def test_a_stage_ends_as_soon_as_its_curve_shows_the_success_that_is_asked_for(tmp_path, success, decisions):
    curve = {"evaluate_every": 40, "evaluate_episodes": 4, "until": {"success": 0.9}}
    stage = finetune(decisions=120, decisions_per_iteration=20, **curve)
    assert run(tmp_path / "run", stage, env={"success": success}).counters["decisions"] == decisions


def test_success_that_is_lost_again_pays_nothing(tmp_path):
    buffer = {"capacity": 200, "success": True}
    session = run(tmp_path / "run", {"collect": {"episodes": 8}}, env={"success": "middle"}, buffer=buffer)
    for trajectory in session.buffer.trajectories():
        assert trajectory.rewards["success"].tolist() == [0] * 5 and not trajectory.success


def test_success_that_is_asked_for_and_never_told_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="buffer.success asks for success, and an episode ended without a word"):
        run(
            tmp_path / "run",
            {"collect": {"episodes": 8}},
            env={"success": ""},
            buffer={"capacity": 200, "success": True},
        )


@pytest.mark.parametrize(("time_limit", "discount"), [("truncated", 0.99), ("terminal", 0.0)])
def test_a_recipe_says_whether_a_time_limit_is_terminal(tmp_path, time_limit, discount):
    stage, options = {"collect": {"episodes": 4}}, {"end": "truncated"}
    session = run(tmp_path / "run", stage, env=options, env_options={"time_limit": time_limit})
    batch = session.buffer.batch(session.buffer.rows())
    assert batch.discount[batch.columns["step"] == 4].tolist() == pytest.approx([discount] * 4)


def test_the_return_is_drawn_where_success_is_not_told(tmp_path):
    stage = finetune(decisions=80, decisions_per_iteration=40, evaluate_every=40, evaluate_episodes=3)
    train(recipe(stage, env={"success": ""}), tmp_path / "run", quiet=True)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "return over environment decisions" in page and "return on held-out initial states" in page
    assert "success over" not in page


def test_the_return_is_the_headline_where_success_is_not_told(tmp_path):
    stages = [finetune(decisions=80, decisions_per_iteration=40, evaluate_every=40, evaluate_episodes=3)]
    session = run(tmp_path / "run", *stages, {"evaluate": {"episodes": 3}}, env={"success": ""})
    assert not [key for line in lines(tmp_path / "run") for key in line if "success" in key]
    assert (
        session.records[0]["metrics"]["collect/return"]
        == session.records[0]["metrics"]["last return on the curve"]
        == 5
    )
    assert session.records[1]["metrics"] == {"return": 5.0, "episodes": 3}


# --- options that change what is learned ------------------------------------------------------------------------------


@pytest.fixture
def demos(tmp_path):
    """A stage that loads 10 episodes of 5 steps."""
    episodes = [
        Trajectory(
            {"observation": np.full((6, 2), i, np.float32)},
            np.full((5, 1), 0.5, np.float32),
            np.ones(5, np.float32),
            "terminated",
            rewards={"success": np.array([0, 0, 0, 0, 1], np.float32)},
            source=Source.DEMONSTRATION,
        )
        for i in range(10)
    ]
    write_trajectories(tmp_path / "demos.safetensors", episodes)
    return {"load": {"file": str(tmp_path / "demos.safetensors")}}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_an_objective_says_how_much_of_a_batch_is_offline(tmp_path, demos, share):
    amount = {"decisions": 80, "decisions_per_iteration": 40, "updates_per_decision": 0.25}
    stage = finetune("watched_sac", **amount, objective_options={"batch_size": 16, "offline_share": share})
    run(tmp_path / "run", demos, {"warm_up": {"decisions": 40}}, stage)
    assert len(READ) == 20 and all(len(batch) == 16 for batch in READ)
    assert {int((batch.columns["source"] < Source.ONLINE).sum()) for batch in READ} == {int(16 * share)}


@pytest.mark.parametrize(("own", "size"), [({"batch_size": 32}, 32), ({}, 256)])
def test_a_batch_is_as_large_as_the_objective_says(tmp_path, demos, own, size):
    run(tmp_path / "run", demos, {"pretrain": {"objective": {"id": "watched_sac", **own}, "updates": 2}})
    assert [len(batch) for batch in READ] == [size] * 2


@pytest.mark.parametrize("only", [["critic"], ["policy"], None])
def test_only_what_a_stage_names_is_learned(tmp_path, demos, only):
    before = run(tmp_path / "before", demos, {"pretrain": {"objective": "sac", "updates": 0}}).agent
    after = run(tmp_path / "after", demos, {"pretrain": {"objective": "sac", "updates": 4, "only": only}}).agent
    moved = {
        part: not all(
            torch.equal(a, b) for a, b in zip(*(agent.trainable(part) for agent in (before, after)), strict=True)
        )
        for part in ("critic", "policy")
    }
    assert moved == {part: only is None or part in only for part in moved}


@pytest.mark.parametrize("overlap", [False, True])
def test_updates_owed_in_fractions_are_not_lost(tmp_path, demos, overlap):
    stage = finetune(
        "watched_sac", decisions=40, decisions_per_iteration=4, updates_per_decision=0.375, overlap=overlap
    )
    session = run(tmp_path / "run", demos, stage)
    assert (
        session.counters["updates"] == len(READ) == (13 if overlap else 15)
    )  # overlapped, the last are not learned from


def test_a_stop_behind_the_last_update_keeps_the_numbers_of_the_stage(tmp_path, demos, monkeypatch):
    stage = {"pretrain": {"objective": "bc", "updates": 20, "log_every": 10}}
    whole = run(tmp_path / "whole", demos, stage)
    killed, _ = interrupted(tmp_path, monkeypatch, 1, demos, stage)
    assert killed.records[-1]["metrics"] == whole.records[-1]["metrics"] != {}


# --- what is refused before anything runs -----------------------------------------------------------------------------

GROUPS = {"episodes_per_iteration": 16, "group_size": 8}


def test_iterations_of_whole_episodes_make_updates_for_what_they_collected(tmp_path):
    options = {"objective_options": {"critic_hidden": [8], "batch_size": 4}}
    session = run(tmp_path / "run", finetune("watched_sac", decisions=40, episodes_per_iteration=4, **options))
    assert session.counters == session.counters | {"decisions": 40, "updates": 40}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (finetune("ppo", batch_size=64), "batch_size; it is an option of the objective: `objective: {id: ppo, batch_s"),
        (
            finetune("sac", offline_share=0.5),
            "finetune.offline_share; it is an option .*{id: sac, offline_share: 0.5}`",
        ),
        ({"pretrain": {"objective": "bc", "batch_size": 8}}, "pretrain.batch_size; it is an option of the objective"),
        ({"pretrain": {"objective": "dpo", "offline_share": 0.5}}, "unknown key stages.0.pretrain.offline_share"),
        (finetune("grpo", **GROUPS, updates_per_decision=1), "updates_per_decision has no effect.*num_epochs"),
        (
            finetune("ppo", overlap=True),
            "overlap has no effect with objective 'ppo', which learns from fresh experience",
        ),
        (
            finetune("ppo", decisions_per_iteration=8, episodes_per_iteration=8),
            "no effect beside episodes_per_iteration",
        ),
        (finetune("sac", objective_options={"subset_size": 3}), "subset_size 3 has no effect with target 'min'"),
        (finetune("td3", objective_options={"target_noise": 0, "target_noise_clip": 0.1}), "without target_noise"),
        (finetune("ppo", objective_options={"kl_estimator": "k1"}), "kl_estimator k1 has no effect without kl_weight"),
        (finetune("grpo", **GROUPS, objective_options={"trace_decay": 0.9}), "has no effect with credit 'grpo'"),
        (
            {"pretrain": {"objective": {"id": "bc", "selection": {"best_of": 1}, "offline_share": 0.5}}},
            "offline_share 0.5 has no effect",
        ),
        ({"pretrain": {"objective": "ppo"}}, "learns from fresh experience only: use finetune"),
        (
            finetune("grpo", group_size=8),
            "compares whole episodes: set episodes_per_iteration, such as 64, in place of",
        ),
        (finetune("rloo", episodes_per_iteration=8), "compares siblings of a group: set group_size"),
        (
            finetune("dr_grpo", episodes_per_iteration=18, group_size=8),
            "episodes_per_iteration 18 tears a group of 8: set it to a multiple, such as 16 or 24",
        ),
        ({"collect": {"episodes": 6, "group_size": 4}}, "episodes 6 tears a group of 4: .*4 or 8"),
    ],
)
def test_options_without_effect_and_torn_groups_are_refused(stage, message):
    with pytest.raises(ConfigError, match=message):
        recipe(stage)


def test_a_resolved_recipe_says_everything_and_is_accepted_again(tmp_path):
    from embodied_rft.runs.recipe import load_recipe

    stages = [
        finetune("sac", objective_options={"batch_size": 32}, decisions=0),
        {"pretrain": {"objective": "rlpd", "updates": 0}},
    ]
    run(tmp_path / "run", *stages)
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again == recipe(*stages)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            finetune("ppo", decisions_per_iteration=60),
            r"an iteration of 60 decisions may take 124 rows .* at least 124",
        ),
        (finetune("ppo", episodes_per_iteration=20), r"this iteration takes 120 rows"),
    ],
)
def test_a_buffer_smaller_than_an_iteration_is_refused(tmp_path, stage, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", stage, buffer={"capacity": 100})
    stage["finetune"]["decisions"] = 60
    run(tmp_path / "enough", stage, buffer={"capacity": 124})


def test_a_held_out_state_on_which_the_environment_always_fails_is_left_out_and_said(tmp_path):
    from embodied_rft.evaluation.evaluate import evaluation_seeds

    bad = evaluation_seeds(5)[2]
    session = run(tmp_path / "run", {"evaluate": {"episodes": 5}}, env={"fails": [bad]})
    (file,) = (tmp_path / "run" / "evaluations").glob("*.json")
    content = json.loads(file.read_text())
    assert content["left_out"] == [bad] and content["episodes"] == 4 and content["success"] == 1.0
    assert session.records[0]["metrics"]["left_out"] == 1
    assert "1 left out" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"with": "gaussian"}, "adapt.with is 'gaussian'"),
        ({"with": "residual", "options": {"base": {"id": "gaussian"}}}, "the base is the policy that there is"),
        ({"with": "residual", "options": {"scales": 1}}, "adapt.options.scales; did you mean 'scale'"),
    ],
)
def test_adapt_puts_adapters_around_the_policy_that_there_is(stage, message):
    with pytest.raises(ConfigError, match=message):
        parse_stages([{"adapt": stage}])
