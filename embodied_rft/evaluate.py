"""Success on a fixed list of held-out initial states, with an interval. Never touches the buffer or a learner.

Episode i of sheet k always starts from `evaluation_seed(i, sheet=k)`: the same state in the batched, the single and
(where there is one) the official environment. Training pools refuse these seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rft.collect import Act
from embodied_rft.log import write_json
from embodied_rft.pool import Pool, StepResult
from embodied_rft.samples import Sample, Samples, summarize, write_samples
from embodied_rft.seeding import evaluation_seed
from embodied_rft.states import distinct_seeds, num_held_out_states

SILENT = "the environment never said whether an episode succeeded (info['is_success'] or info['success'])"


@dataclass(slots=True)
class Evaluation:
    """What happened on each episode of the list. 150 successes of 200: success 0.75, low 0.686, high 0.805."""

    seeds: list[int]
    results: list[bool]  # success at the episode's end, in the order of `seeds`
    returns: list[float]
    lengths: list[int]
    invalid: int = 0  # episodes that had to be started again because their environment failed
    seconds: float = 0.0
    name: str = ""
    states: int | None = None  # distinct held-out states that there are, where the environment knows
    told: bool = False  # whether the environment said anything about success; if not, only the returns mean something
    extra: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)  # what was said, where actions are texts

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.results)

    @property
    def success(self) -> float:
        """Share of episodes that succeeded."""
        return float(np.mean(self.results)) if self.results else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson_interval(sum(self.results), self.episodes)

    def record(self, episode: int, result: StepResult, env: int) -> None:
        """Count one step of an episode that runs in environment `env`."""
        self.returns[episode] += float(result.reward[env])
        self.lengths[episode] += 1
        success = result.info.get("success")
        self.told |= success is not None
        self.results[episode] = success is not None and bool(success[env])

    def forget(self, episode: int, max_retries: int) -> None:
        """Start an episode again that its environment broke; RuntimeError when it broke it too often."""
        self.invalid += 1
        self.returns[episode], self.lengths[episode] = 0.0, 0
        tries = self.extra.setdefault("broken", {})
        tries[str(episode)] = tries.get(str(episode), 0) + 1
        if tries[str(episode)] > max_retries:
            raise RuntimeError(
                f"the environment failed {tries[str(episode)]} times on evaluation seed {self.seeds[episode]}"
            )

    def to_json(self) -> dict[str, Any]:
        """The content of `evaluations/*.json` in a run folder."""
        low, high = self.interval
        summary = {"episodes": self.episodes, "successes": int(sum(self.results)), "success": self.success}
        mean_return = float(np.mean(self.returns)) if self.returns else float("nan")
        content = asdict(replace(self, samples=[])) | ({"said": summarize(self.samples)} if self.samples else {})
        del content["samples"]
        return content | summary | {"low": low, "high": high, "mean_return": mean_return}

    def write(self, run_folder: Path, slug: str, **facts: Any) -> dict[str, Any]:
        """Write `evaluations/slug.json`, and what was said beside it; returns the content, `facts` included."""
        content, folder = self.to_json() | facts, run_folder / "evaluations"
        if self.samples:
            content["samples"] = f"{slug}.samples.jsonl"
            write_samples(folder / content["samples"], self.samples)
        write_json(folder / f"{slug}.json", content)
        return content

    def require_success(self, option: str) -> float:
        """The success rate that `option` waits for; ValueError when the environment says nothing about success."""
        if not self.told:
            raise ValueError(f"{option} waits for a success rate, but {SILENT}")
        return self.success

    def __str__(self) -> str:
        if not self.told:
            return f"mean return {np.mean(self.returns):.3g} on {counted(self.episodes, self.states)}; {SILENT}"
        low, high = self.interval
        return f"success {self.success:.3f} [{low:.3f}, {high:.3f}] on {counted(self.episodes, self.states)}"


def counted(episodes: int, states: int | None = None) -> str:
    """On what an evaluation is: "200 held-out initial states", or "7 of 7" where there are no more."""
    return f"{episodes} {f'of {states} ' if states else ''}held-out initial states"


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a binomial proportion (Wilson 1927); never leaves [0, 1], honest at 0 and at all successes."""
    if trials == 0:
        return 0.0, 1.0
    p, square = successes / trials, z * z
    centre = (p + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(p * (1 - p) / trials + square / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # exact at the ends, where rounding would leave 1e-17
    return low, 1.0 if successes == trials else min(1.0, centre + half)


def evaluation_seeds(episodes: int, *, sheet: int = 0) -> list[int]:
    """The first `episodes` seeds of a sheet."""
    return [evaluation_seed(i, sheet=sheet) for i in range(episodes)]


def evaluate(
    act: Act,
    pool: Pool,
    seeds: Sequence[int],
    *,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
    max_retries: int = 3,
) -> Evaluation:
    """Run one episode from every seed; an environment that is done takes the next seed at once.

    Args:
        act: observation tree [N, ...] -> Decisions; usually the greedy policy.
        pool: made with purpose="evaluation".
        seeds: evaluation seeds (>= 2**31).
        name: what the report calls this evaluation.
        progress: called with (episodes ended, successes so far).
        max_retries: how often the same episode may be broken by its environment before this raises RuntimeError.
    """
    started = time.perf_counter()
    states = num_held_out_states(pool)
    if states:  # no state counts twice
        seeds = distinct_seeds(seeds, states)
    count = len(seeds)
    outcome = Evaluation([int(s) for s in seeds], [False] * count, [0.0] * count, [0] * count, name=name, states=states)
    waiting = list(range(count))[::-1]
    running = np.full(pool.num_envs, -1, dtype=np.int64)  # index of the episode in each environment
    current = np.full(pool.num_envs, seeds[0] if count else evaluation_seed(0), dtype=np.int64)
    observation: Any = None
    over = np.ones(pool.num_envs, dtype=bool)
    ended, won, said = 0, 0, Samples()
    while ended < count:
        idle = np.flatnonzero(running < 0)
        fresh = idle[: len(waiting)]
        running[fresh] = [waiting.pop() for _ in fresh]
        current[fresh] = [seeds[i] for i in running[fresh]]
        over[fresh] = True
        if over.any():  # those without an episode left start an old one again, which nobody looks at
            observation = pool.reset(current, None if observation is None else over)
        action, shown = act(observation).action, observation
        result = pool.step(action)
        observation = result.observation
        over = result.terminated | result.truncated | ~result.valid
        for env in np.flatnonzero(running >= 0):
            episode = int(running[env])
            if not result.valid[env]:
                outcome.forget(episode, max_retries)
                said.forget(episode)
                waiting.append(episode)
            else:
                outcome.record(episode, result, int(env))
                said.add(episode, shown, action, result.reward[env], int(env))
                ended += int(over[env])
                won += int(over[env] and outcome.results[episode])
        running[over] = -1
        if progress is not None:
            progress(ended, won)
    outcome.seconds = time.perf_counter() - started
    outcome.samples = said.ended(outcome.seeds, outcome.returns, outcome.results)
    return outcome
