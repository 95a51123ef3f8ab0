"""Cal-QL online: the return of every episode that has ended is noted; a run that was stopped goes on with it."""

import numpy as np
import pytest
import torch

import embodied_rft.envs  # noqa: F401
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.runs.session import Interrupted, Session
from embodied_rft.train import train

# Episodes have 50 steps, an iteration 30: most episodes end in another iteration than they began in.
RECIPE = """
name: online
env: {id: embodied_rft/FetchReach-v0, num_envs: 4, options: {num_threads: 1}}
agent: {id: gaussian, hidden: [16]}
buffer: {capacity: 1_000}
checkpoint_seconds: 1000
stages:
  - demonstrate: {episodes: 6, noise: 0.3}
  - finetune:
      objective: {id: cal_ql, gamma: 0.9, critic_hidden: [16], num_sampled_actions: 1, batch_size: 8}
      decisions: 1_200
      decisions_per_iteration: 120
      updates_per_decision: 0.05
      overlap: %s
"""
each_way = pytest.mark.parametrize("overlap", ["false", "true"], ids=["in turn", "overlapped"])


def run(folder, overlap):
    folder.mkdir(exist_ok=True)
    (folder / "online.yaml").write_text(RECIPE % overlap)
    return train(load_recipe(folder / "online.yaml"), folder / "run", quiet=True, report=False)


@each_way
def test_returns_are_noted_as_episodes_end(tmp_path, overlap):
    buffer = run(tmp_path, overlap).buffer
    online = buffer.rows(source=2)
    assert len(online) > 650  # the ring has wrapped behind the demonstrations
    for rows, trajectory in zip(buffer.segments(buffer.rows()), buffer.trajectories(), strict=True):
        failed = (trajectory.reward == -1).all()
        following, expected = -1 / (1 - 0.9) if failed else 0.0, []
        for reward in trajectory.reward[::-1]:
            following = float(reward) + 0.9 * following
            expected.insert(0, following)
        np.testing.assert_allclose(buffer.note("mc_return", rows), expected, rtol=1e-5)


@each_way
def test_a_stopped_run_ends_with_the_same_notes_and_weights(tmp_path, overlap, monkeypatch):
    whole, tick = run(tmp_path / "whole", overlap), Session.tick

    def stop_inside_an_episode(self):
        self.stopping = getattr(self.progress, "decisions", None) == 360
        tick(self)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "tick", stop_inside_an_episode)
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped", overlap)
    again = run(tmp_path / "stopped", overlap)
    rows = whole.buffer.rows()
    assert np.array_equal(rows, again.buffer.rows())
    assert np.array_equal(whole.buffer.note("mc_return", rows), again.buffer.note("mc_return", rows))
    ours, theirs = again.agent.state_dict(), whole.agent.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
