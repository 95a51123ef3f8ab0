import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from embodied_rft.data import Decisions
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds, wilson_interval
from embodied_rft.runs.judge import evaluate_run
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.seeding import FIRST_EVALUATION_SEED, check_training_seeds, training_seed
from embodied_rft.train import train
from tests.lab.toys import SeedPool


def act(observation):
    count = len(observation["observation"])
    return Decisions(np.zeros((count, 1), np.float32), np.zeros((count, 1), np.float32))


def test_wilson_matches_published_values():
    # Newcombe (1998), table I: 81/263 and 15/148 without continuity correction
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20)[0] == 0.0 and wilson_interval(20, 20)[1] == 1.0


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_rate_and_mirrors(pair):
    k, n = pair
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("num_envs", [1, 3, 7, 50])
def test_every_episode_of_the_list_is_run_once_whatever_the_number_of_environments(num_envs):
    seeds = evaluation_seeds(23)
    shown = []
    outcome = evaluate(act, SeedPool(num_envs), seeds, progress=lambda *so_far: shown.append(so_far))
    assert shown[-1] == (23, {"success": outcome.success})
    assert outcome.seeds == seeds
    assert outcome.results == [seed % 3 == 0 for seed in seeds]  # SeedPool succeeds on multiples of three
    assert outcome.lengths == [1 + seed % 5 for seed in seeds]
    assert outcome.returns == [float(1 + seed % 5) for seed in seeds]


@pytest.mark.parametrize("step", [1, 3])
def test_a_broken_environment_is_run_again_and_counted(step):
    seeds = evaluation_seeds(6)
    broken = next(seed for seed in seeds if seed % 5 >= 3)
    outcome = evaluate(act, SeedPool(2, break_once={broken}, break_at=step), seeds)
    assert outcome.results == [seed % 3 == 0 for seed in seeds]
    assert outcome.returns == outcome.lengths == [1 + seed % 5 for seed in seeds]  # those of the last try
    assert outcome.invalid == 1 and not outcome.left_out


@pytest.mark.parametrize("num_envs", [1, 2, 6])
def test_a_state_on_which_the_environment_always_fails_is_left_out_of_the_verdict_and_counted(num_envs):
    seeds = evaluation_seeds(6)
    outcome = evaluate(act, SeedPool(num_envs, break_always={seeds[3]}), seeds)
    left = seeds[:3] + seeds[4:]
    assert outcome.left_out == [seeds[3]] and outcome.seeds == left and outcome.invalid == 4
    assert outcome.results == [seed % 3 == 0 for seed in left] and outcome.lengths == [1 + seed % 5 for seed in left]
    assert outcome.interval == wilson_interval(sum(outcome.results), 5)
    assert "on 5 held-out initial states (1 left out" in str(outcome)
    assert outcome.to_json()["left_out"] == [seeds[3]] and outcome.to_json()["episodes"] == 5
    assert outcome.headline()["left_out"] == 1


def test_an_environment_that_fails_on_every_state_says_why():
    seeds = evaluation_seeds(2)
    pool = SeedPool(2, break_always=set(seeds))
    pool.incidents.add("error", "the arm is on fire")
    with pytest.raises(RuntimeError, match="failed 4 times on each of 2 held-out states.*the arm is on fire"):
        evaluate(act, pool, seeds)


class Silent(SeedPool):
    """Says nothing about success."""

    def step(self, action):
        return replace(super().step(action), info={})


def test_an_environment_that_never_tells_success_has_returns_only():
    seeds = evaluation_seeds(6)
    assert evaluate(act, SeedPool(3), seeds).told and not evaluate(act, Silent(3), seeds).told
    outcome = evaluate(act, Silent(3), seeds)
    mean = np.mean([1 + seed % 5 for seed in seeds])
    assert str(outcome).startswith(f"mean return {mean:.3g} on 6") and "success 0" not in str(outcome)
    with pytest.raises(ValueError, match="until.success waits for a success rate, but the environment never said"):
        outcome.require_success("until.success")
    assert evaluate(act, SeedPool(3), seeds).require_success("until.success") > 0


def test_training_never_meets_an_evaluation_state():
    seeds = [training_seed(run, stream, episode) for run in range(3) for stream in range(3) for episode in range(200)]
    assert max(seeds) < FIRST_EVALUATION_SEED <= min(evaluation_seeds(3))
    assert len(set(seeds)) == len(seeds)
    check_training_seeds(np.array(seeds))
    with pytest.raises(ValueError, match="reserved for evaluation"):
        check_training_seeds(np.array([5, FIRST_EVALUATION_SEED]))


@pytest.mark.parametrize("queued", [False, True], ids=["chunks", "queued"])
def test_an_evaluation_with_drawn_start_noise_repeats_to_the_bit(tmp_path, queued):
    """Greedy diffusion policies draw where their chains start; the same weights on the same states give the same."""
    around = "[{adapt: {with: queued}}, {adapt: {with: residual, options: {hidden: [8]}}}]" if queued else "[]"
    recipe = yaml.safe_load(
        f"""
        name: repeats
        env: {{id: embodied_rft/FetchReach-v0, num_envs: 4, options: {{max_episode_steps: 12, reward_type: dense}}}}
        agent: {{id: diffusion, horizon: 2, denoising_steps: 3, width: 16}}
        stages: {around}
        """
    )
    recipe["stages"] += [{"evaluate": {"episodes": 6}}, {"evaluate": {"episodes": 6, "name": "again"}}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    session = train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run", quiet=True)
    session.close()
    files = sorted((tmp_path / "run" / "evaluations").glob("*.json"))
    one, two = (json.loads(f.read_text())["returns"] for f in files)
    assert one == two and len(set(one)) == 6
    assert evaluate_run(tmp_path / "run", episodes=6).returns == one
