"""Advantages weighted by how hard an episode is, and the streams that tell it."""

import numpy as np
import pytest
import torch

import embodied_rft.envs  # noqa: F401
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.data import Source
from embodied_rft.experience.collect import Collector
from embodied_rft.experience.demonstrate import demonstrator_act, make_demonstrator, step_schema
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.difficulty import Difficulty, weights
from embodied_rft.pools.pool import make_pool
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.seeding import spawn_generator
from embodied_rft.train import train

RECIPE = """
name: small
env: {id: embodied_rft/Grounding-v0, num_envs: 8, options: {style: short, grid: [8, 8], answer: point}}
agent:
  id: language
  model: {tiny_vlm: {kind: smolvlm, image_size: 64, patch_size: 16, hidden_size: 16, num_layers: 1}}
  prompt: plain
  key: message
  max_new_tokens: 2
buffer: {capacity: 400, streams: [%s]}
threads: 1
stages: [%s]
"""


def run(tmp_path, stage, streams="reward/hit, box/target"):
    (tmp_path / "small.yaml").write_text(RECIPE % (streams, stage))
    return train(load_recipe(tmp_path / "small.yaml"), tmp_path / "run", quiet=True, report=False)


def test_weights_are_a_power_of_mean_one_and_bounded():
    sizes = np.array([0.1, 0.2, 0.4, 0.05])
    plain = weights(sizes, Difficulty(stream="size", largest=100.0)).numpy()
    assert plain.mean() == pytest.approx(1) and np.allclose(plain * sizes, plain[0] * sizes[0])
    assert np.allclose(weights(sizes, Difficulty(stream="size", largest=1.5)), np.minimum(plain, 1.5))
    other = weights(sizes, Difficulty(stream="size", power=0.5)).numpy()
    assert np.allclose(other, np.sqrt(sizes) / np.sqrt(sizes).mean())
    for wrong in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="above 0"):
            weights(np.array([1.0, wrong]), Difficulty(stream="size"))
    with pytest.raises(ValueError, match="weighs all alike"):
        Difficulty(stream="size", power=0.0)


def test_what_is_told_at_the_end_becomes_streams(tmp_path):
    session = run(tmp_path, "collect: {episodes: 16}")
    buffer, rows = session.buffer, session.buffer.rows()
    assert set(buffer.rewards) == {"env", "reward/hit", "box/target"}
    assert (buffer.stream("reward/hit", rows) == 0).all(), "an untrained model does not answer in form"
    assert ((0 < (size := buffer.stream("box/target", rows))) & (size < 0.3)).all() and len(set(size)) > 8


def test_a_stream_that_nobody_tells_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'box/target'"):
        run(tmp_path, "collect: {episodes: 8}", streams="box/targets")
    with pytest.raises(ValueError, match="each once"):
        run(tmp_path, "collect: {episodes: 8}", streams="success")


def test_the_advantage_of_a_decision_is_weighted_by_its_episode(tmp_path):
    """Against the same objective without weights, on the same buffer."""
    session = run(tmp_path, "collect: {episodes: 32, group_size: 4}")
    buffer, agent, rows = session.buffer, session.agent, session.buffer.rows()
    buffer.label("graded", rows, np.random.default_rng(0).random(len(rows)))  # no random model hits anything
    base = {"id": "dr_grpo", "reward_weights": {"graded": 1.0}}
    noted = {}
    for power in (None, -1.0):
        more = {} if power is None else {"difficulty": {"stream": "box/target", "power": power}}
        objective = build_objective({**base, **more})
        objective.setup(agent, torch.Generator().manual_seed(0))
        objective.annotate(agent, buffer, rows, torch.Generator().manual_seed(0))
        noted[power] = buffer.note("advantage", rows)
    told = buffer.stream("box/target", rows)
    expected = weights(told, Difficulty(stream="box/target")).numpy()
    assert np.allclose(noted[-1.0], noted[None] * expected, atol=1e-6) and np.abs(noted[None]).max() > 0.1


def test_of_longer_episodes_the_last_decision_has_the_stream():
    options = {"expert": True, "popups": 0.5}
    pool = make_pool("embodied_rft/ClickScreen-v0", 8, options=options)
    act = demonstrator_act(make_demonstrator("embodied_rft/ClickScreen-v0", env_options=options), spawn_generator(0, 1))
    recording = Collector(pool, run_seed=0, source=Source.DEMONSTRATION).collect(act, episodes=24)
    buffer = Buffer(step_schema(pool, ("env", "popups/closed")), 1_000)
    recording.write(buffer)
    streams = [each.rewards["popups/closed"] for each in buffer.trajectories()]
    assert all((stream[:-1] == 0).all() for stream in streams) and max(map(len, streams)) > 3
    assert sorted(stream[-1] for stream in streams) == sorted(recording.statistics["popups/closed"])
    assert max(recording.statistics["popups/closed"]) > 1
    pool.close()
