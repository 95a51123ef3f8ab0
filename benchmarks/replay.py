"""Replay: transitions sampled per second, bytes per transition with cameras, insert rate; against SB3 and TorchRL.

    python -m benchmarks.replay [--quick]

State: observation 42, action 8, batch 256, 100,000 rows; every competitor returns torch tensors of observation, action,
reward, next observation and done (ours a discount instead, plus log-probability and bookkeeping). Cameras: two of
128x128x3 uint8, 50-step episodes, batch 256; bytes are those really resident (all pages written), per transition, over
the bytes of one set of frames. The plain ring is what one would write by hand: two uint8 arrays, next frame by index.
Inserts: 64 parallel environments, one call a step.

Bars: ratio (sampled state transitions/s, over the better peer) >= 1.0; frame_sets <= 1.05.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from benchmarks import common
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Field

STATE, ACTION, BATCH, ROWS = 42, 8, 256, 100_000
NUM_ENVS, EPISODE, IMAGE = 64, 50, (128, 128, 3)
OURS, SB3, TORCHRL, RING = "ours", "SB3", "TorchRL", "plain uint8 ring"
CAMERAS = ("front", "wrist")


def box(shape: tuple[int, ...], dtype: Any = np.float32) -> gymnasium.spaces.Box:
    low, high = (0, 255) if dtype == np.uint8 else (-1, 1)
    return gymnasium.spaces.Box(low, high, shape, dtype)


def steps(observe: Callable[[int], dict[str, np.ndarray]], count: int, rng: np.random.Generator) -> Any:
    """`count` steps of all environments: (observation, action, reward, next observation, ended)."""
    now = observe(0)
    for i in range(count):
        after = observe(i + 1)
        ended = np.full(NUM_ENVS, (i + 1) % EPISODE == 0)
        yield (
            now,
            rng.uniform(-1, 1, (NUM_ENVS, ACTION)).astype(np.float32),
            np.ones(NUM_ENVS, np.float32),
            after,
            ended,
        )
        now = after


def our_insert(buffer: Buffer) -> Callable[..., None]:
    streams, log_prob, never = np.arange(NUM_ENVS), np.zeros((NUM_ENVS, 1), np.float32), np.zeros(NUM_ENVS, bool)

    def insert(now: Any, action: np.ndarray, reward: np.ndarray, after: Any, ended: np.ndarray) -> None:
        buffer.add(streams, now, Decisions(action, log_prob), reward, never, ended)
        if ended[0]:
            buffer.close(streams, after)

    return insert


def sb3_insert(buffer: ReplayBuffer) -> Callable[..., None]:
    infos: list[dict[str, Any]] = [{} for _ in range(NUM_ENVS)]
    return lambda now, action, reward, after, ended: buffer.add(now, after, action, reward, ended, infos)


# --- state ------------------------------------------------------------------------------------------


def state_sampling(seconds: float, rounds: int) -> common.Results:
    """Transitions/s that each buffer samples from a full store."""
    rng = np.random.default_rng(0)
    states = rng.uniform(-1, 1, (EPISODE + 1, NUM_ENVS, STATE)).astype(np.float32)
    ours = Buffer(Schema({"state": Field((STATE,))}, Field((ACTION,))), ROWS)
    sb3 = ReplayBuffer(ROWS, box((STATE,)), box((ACTION,)), n_envs=NUM_ENVS)
    add_ours, add_sb3 = our_insert(ours), sb3_insert(sb3)
    for now, action, reward, after, ended in steps(lambda i: {"state": states[i % 51]}, ROWS // NUM_ENVS, rng):
        add_ours(now, action, reward, after, ended)
        add_sb3(now["state"], action, reward, after["state"], ended)
    torchrl = torchrl_buffer(rng)
    draw = np.random.default_rng(1)
    samples: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours.sample(draw, BATCH),
        SB3: lambda: sb3.sample(BATCH),
        TORCHRL: torchrl.sample,
    }
    return common.measure({k: counted(s, seconds) for k, s in samples.items()}, rounds=rounds)


def torchrl_buffer(rng: np.random.Generator) -> Any:
    """Full, contiguous in memory, batch size fixed at construction: its fast path."""
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(ROWS), batch_size=BATCH)

    def random(width: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(-1, 1, (ROWS, width)).astype(np.float32))

    following = {"observation": random(STATE), "reward": random(1), "done": torch.zeros(ROWS, 1, dtype=torch.bool)}
    buffer.extend(TensorDict({"observation": random(STATE), "action": random(ACTION), "next": following}, [ROWS]))
    return buffer


def counted(sample: Callable[[], Any], seconds: float) -> Callable[[], float]:
    def work() -> float:
        for _ in range(20):
            sample()
        return 20 * BATCH

    return lambda: common.rate(work, seconds=seconds)


# --- inserting --------------------------------------------------------------------------------------


def inserting(rounds: int, count: int) -> common.Results:
    """Transitions/s stored, one call for each step of 64 environments, closing rows included."""
    rng = np.random.default_rng(0)
    states = rng.uniform(-1, 1, (EPISODE + 1, NUM_ENVS, STATE)).astype(np.float32)
    played = list(steps(lambda i: {"state": states[i % 51]}, count, rng))
    ours = our_insert(Buffer(Schema({"state": Field((STATE,))}, Field((ACTION,))), ROWS))
    sb3 = sb3_insert(ReplayBuffer(ROWS, box((STATE,)), box((ACTION,)), n_envs=NUM_ENVS))

    def run(insert: Callable[..., None], key: str | None) -> float:
        start = time.perf_counter()
        for now, action, reward, after, ended in played:
            insert(now if key is None else now[key], action, reward, after if key is None else after[key], ended)
        return len(played) * NUM_ENVS / (time.perf_counter() - start)

    return common.measure({OURS: lambda: run(ours, None), SB3: lambda: run(sb3, "state")}, rounds=rounds)


# --- cameras ----------------------------------------------------------------------------------------


class PlainRing:
    """The reference: frames in two arrays [steps, envs, ...], the next frame one step further."""

    def __init__(self, length: int) -> None:
        self.frames = {key: np.zeros((length, NUM_ENVS, *IMAGE), np.uint8) for key in CAMERAS}
        self.actions, self.rewards = (
            np.zeros((length, NUM_ENVS, ACTION), np.float32),
            np.zeros((length, NUM_ENVS), np.float32),
        )
        self.at = 0

    def add(self, now: Any, action: np.ndarray, reward: np.ndarray) -> None:
        """One step of all environments."""
        for key in CAMERAS:
            self.frames[key][self.at] = now[key]
        self.actions[self.at], self.rewards[self.at] = action, reward
        self.at += 1

    def sample(self, rng: np.random.Generator) -> Any:
        """Frames, next frames, actions, rewards."""
        step, env = rng.integers(0, self.at - 1, BATCH), rng.integers(0, NUM_ENVS, BATCH)
        now = {key: torch.from_numpy(frames[step, env]) for key, frames in self.frames.items()}
        after = {key: torch.from_numpy(frames[step + 1, env]) for key, frames in self.frames.items()}
        return now, after, torch.from_numpy(self.actions[step, env]), torch.from_numpy(self.rewards[step, env])


def milliseconds(sample: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        sample()
    return (time.perf_counter() - start) / repeats * 1e3


def cameras(rounds: int, episodes: int, repeats: int) -> tuple[common.Results, float]:
    """Milliseconds for a batch of 256, and our resident bytes a transition over the bytes of one set of frames."""
    rng = np.random.default_rng(0)
    film = {key: rng.integers(0, 256, (NUM_ENVS + EPISODE + 1, *IMAGE), dtype=np.uint8) for key in CAMERAS}
    length = episodes * EPISODE
    fields = {key: Field(IMAGE, "uint8") for key in CAMERAS}
    ours = Buffer(Schema(fields, Field((ACTION,))), (length + episodes) * NUM_ENVS)
    spaces = gymnasium.spaces.Dict({key: box(IMAGE, np.uint8) for key in CAMERAS})
    sb3 = DictReplayBuffer(length * NUM_ENVS, spaces, box((ACTION,)), n_envs=NUM_ENVS, handle_timeout_termination=False)
    ring, add_ours, add_sb3 = PlainRing(length), our_insert(ours), sb3_insert(sb3)
    played = steps(lambda i: {key: frames[i % 51 :][:NUM_ENVS] for key, frames in film.items()}, length, rng)
    for now, action, reward, after, ended in played:
        add_ours(now, action, reward, after, ended)
        add_sb3(now, action, reward, after, ended)
        ring.add(now, action, reward)
    frame_set = len(CAMERAS) * np.prod(IMAGE)
    draw = np.random.default_rng(1)
    samples: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours.sample(draw, BATCH),
        SB3: lambda: sb3.sample(BATCH),
        RING: lambda: ring.sample(draw),
    }

    results = common.measure(
        {k: partial(milliseconds, sample, repeats) for k, sample in samples.items()}, rounds=rounds
    )
    return results, ours.nbytes / len(ours) / frame_set


def main() -> None:
    quick = common.arguments(__doc__).quick
    rounds = 5 if quick else 15
    sampled = state_sampling(seconds=0.4 if quick else 1.0, rounds=rounds)
    common.table(sampled, unit="transitions/s", title=f"State {STATE}, batch {BATCH}", baseline=SB3)
    stored = inserting(rounds, count=500 if quick else 1_500)
    common.table(stored, unit="transitions/s", title=f"Inserting, {NUM_ENVS} environments", baseline=SB3)
    shown, frame_sets = cameras(rounds, episodes=1 if quick else 3, repeats=4 if quick else 10)
    common.table(shown, unit="ms", title=f"Two cameras of {IMAGE}, batch {BATCH}", digits=2)
    print(f"Cameras, ours: {frame_sets:.3f} frame sets a transition\n")
    common.finish(
        name="replay",
        results=sampled,
        ratio=common.ratio(sampled, OURS, (SB3, TORCHRL)),
        frame_sets=frame_sets,
        cameras_over_sb3=common.ratio(shown, SB3, OURS),  # milliseconds: theirs over ours
        cameras_over_ring=common.ratio(shown, RING, OURS),
        insert_over_sb3=common.ratio(stored, OURS, SB3),
        insert_per_second=stored[OURS].median,
        camera_milliseconds={name: round(result.median, 3) for name, result in shown.items()},
    )


if __name__ == "__main__":
    main()
