"""How much of the time a language model waits for slow environments, which step by turns or all at once.

    python -m benchmarks.async_turns [--quick]

24 environments in processes of their own. Every step and every reset really sleeps for a lognormal time (median
60 ms, mean 83 ms, one in a hundred takes 390 ms), from fixed seeds; an episode ends with probability 0.1 after each
turn. The product's collector goes round between them and who answers: all at once (`splits` 1), or in parts that take
turns. Two answer: a stand-in for a model on an accelerator, which takes 20 ms a batch and 10 ms for each conversation
in it and leaves the processor alone; and a `language` agent on a small random transformer, on one thread.

No collector can be faster than either of its halves: the same collector on environments that cost nothing (measured in
the same rounds), and the mean time of a step with its share of resets, all environments side by side (computed).
A share is turns a second over the lesser of both; `of_bound` is that of the best number of parts with the stand-in.
"""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import gymnasium
import numpy as np
import torch

from benchmarks import common
from embodied_rft.data import Decisions, Ragged
from embodied_rft.experience.collect import Collector
from embodied_rft.policy import build_policy
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.pool import open_pool
from embodied_rft.pools.protocol import Pool
from embodied_rft.pools.text_spaces import AnyText

ID, NUM_ENVS, SPLITS = "benchmarks.async_turns:AsyncTurns-v0", 24, (1, 2, 4)
MEDIAN, SIGMA, ENDS = 0.06, 0.8, 0.1  # seconds of a step, spread of its logarithm, probability of a last turn
BATCH, EACH = 0.02, 0.01  # seconds of the stand-in
MODEL, TOKENS, FREE = {"hidden_size": 768, "num_layers": 2}, 8, "steps that cost nothing"


class AsyncTurns(gymnasium.Env):
    """A conversation that takes its time.

    Args:
        median: seconds that half of the steps and resets take.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, *, median: float = MEDIAN, render_mode: str | None = None) -> None:
        self.observation_space = gymnasium.spaces.Dict({"message": AnyText(20)})
        self.action_space = AnyText(1_000)
        self.median, self.render_mode, self.turn = median, render_mode, 0

    def _see(self) -> dict[str, str]:
        time.sleep(self.median * self.np_random.lognormal(0, SIGMA))
        return {"message": f"turn {self.turn}"}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See Gymnasium."""
        super().reset(seed=seed)
        self.turn = 0
        return self._see(), {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """See Gymnasium."""
        self.turn += 1
        over = bool(self.np_random.random() < ENDS)
        return self._see(), 1.0, over, False, {}


if "AsyncTurns-v0" not in gymnasium.registry:  # this file is read twice: once as the program
    gymnasium.register(id="AsyncTurns-v0", entry_point="benchmarks.async_turns:AsyncTurns")


class StandIn:
    """Takes the time of a model that runs elsewhere."""

    past = False

    def __call__(self, observation: Any) -> Decisions:
        """One token for each message."""
        count = len(observation["message"])
        time.sleep(BATCH + EACH * count)
        return Decisions(["x"] * count, Ragged.of([[0.0]] * count, np.float32))


class Speaker:
    """A small language model, sampling from a generator of its own."""

    past = True

    def __init__(self) -> None:
        env = AsyncTurns()
        spec = {"id": "language", "model": {"tiny": MODEL}, "prompt": "plain", "max_new_tokens": TOKENS}
        spec |= {"history": {"turns": 0, "first": False}}
        self.rng = torch.Generator().manual_seed(0)
        self.policy = build_policy(spec, env.observation_space, env.action_space, torch.Generator().manual_seed(0))

    def __call__(self, observation: Any) -> Decisions:
        """Replies."""
        return self.policy.act(observation, greedy=False, rng=self.rng)


def turns_per_second(pool: Pool, speaker: StandIn | Speaker, turns: int) -> float:
    """Of one call of a collector, its end included, at which it waits for all."""
    collector = Collector(pool, run_seed=0, past=speaker.past)
    collector.collect(speaker, decisions=1)  # the first resets
    start = time.perf_counter()
    recording = collector.collect(speaker, decisions=turns)
    return recording.decisions / (time.perf_counter() - start)


def shares(results: common.Results, stepping: float) -> dict[str, float]:
    """Of what bounds each round, by number of parts: medians."""
    bound = np.minimum(results[FREE].rounds, stepping)
    return {name: float(np.median(one.rounds / bound)) for name, one in results.items() if name != FREE}


def main() -> None:
    """Measure, print."""
    options = common.arguments(__doc__)
    torch.set_num_threads(1)
    turns, rounds = (NUM_ENVS * 8, 1) if options.quick else (NUM_ENVS * 25, 5)
    configs = {f"splits {n}": EnvConfig(ID, NUM_ENVS, pool="workers", num_workers=NUM_ENVS, splits=n) for n in SPLITS}
    configs[FREE] = EnvConfig(ID, NUM_ENVS, options={"median": 0.0})
    stepping = NUM_ENVS / ((1 + ENDS) * MEDIAN * math.exp(SIGMA**2 / 2))
    print(f"steps alone: {stepping:.0f} turns/s")
    found: dict[str, common.Results] = {}
    pools = {name: open_pool(config, purpose="training") for name, config in configs.items()}
    for title, speaker in (("stand-in", StandIn()), ("language", Speaker())):
        runs = {name: functools.partial(turns_per_second, pool, speaker, turns) for name, pool in pools.items()}
        found[title] = common.measure(runs, rounds=rounds, warm_up=False)
        common.table(found[title], unit="turns/s", title=title, baseline="splits 1", digits=1)
        print("of the bound: " + ", ".join(f"{k} {v:.2f}" for k, v in shares(found[title], stepping).items()))
    for pool in pools.values():
        pool.close()
    told = {title: shares(results, stepping) for title, results in found.items()}
    best = max(told["stand-in"], key=lambda name: told["stand-in"][name])
    common.finish(
        name="async_turns",
        results={f"{title}, {name}": one for title, results in found.items() for name, one in results.items()},
        ratio=common.ratio(found["stand-in"], best, "splits 1"),
        of_bound=told["stand-in"][best],
        all_at_once=told["stand-in"]["splits 1"],
        steps_alone=stepping,
        shares={title: {name: round(share, 3) for name, share in some.items()} for title, some in told.items()},
    )


if __name__ == "__main__":
    main()
