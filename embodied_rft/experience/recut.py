"""Single steps as chunks: trajectories cut as a chunk policy would have recorded them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from embodied_rft.data import Trajectory, pick_tree
from embodied_rft.pools.chunks import Chunk


def action_windows(action: np.ndarray, *, horizon: int) -> np.ndarray:
    """The next H actions of every step of an episode: [T, A] -> [T, H * A]; past the end the last one is repeated."""
    index = np.minimum(np.arange(len(action))[:, None] + np.arange(horizon)[None, :], len(action) - 1)
    windows: np.ndarray = action[index]
    return windows.reshape(len(action), -1)


def chunk_trajectories(
    trajectories: Sequence[Trajectory], *, horizon: int, execute: int | None = None
) -> list[Trajectory]:
    """Single-step episodes as episodes of chunk decisions, as ChunkPool would have recorded them.

    Every episode becomes E of them, starting at its steps 0 .. E-1, so that every step is the start of one chunk: all
    windows are seen in imitation, and every chunk trajectory is a correct one for reinforcement learning.
    """
    execute = Chunk.of(horizon, execute).execute
    chunked = []
    for each in trajectories:
        windows = action_windows(np.asarray(each.action, dtype=np.float32), horizon=horizon)
        for first in range(min(execute, len(each))):
            starts = np.arange(first, len(each), execute)
            rows = np.append(starts, len(each))
            chunked.append(
                replace(
                    each,
                    observation=pick_tree(each.observation, rows),
                    action=windows[starts],
                    reward=_summed(each.reward, starts, execute),
                    rewards={k: _summed(v, starts, execute) for k, v in each.rewards.items()},
                    log_prob=None,
                    trace={},
                    span=np.minimum(horizon, len(each) - starts),
                )
            )
    return chunked


def _summed(reward: np.ndarray, starts: np.ndarray, execute: int) -> np.ndarray:
    padded = np.append(np.asarray(reward, dtype=np.float32), np.zeros(execute, dtype=np.float32))
    summed: np.ndarray = padded[starts[:, None] + np.arange(execute)].sum(1)
    return summed.astype(np.float32)
