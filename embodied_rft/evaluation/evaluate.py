"""Success on a fixed list of held-out initial states, with an interval. Never touches the buffer or a learner.

Episode i of sheet k always starts from `evaluation_seed(i, sheet=k)`: the same state in the batched, the single and
(where there is one) the official environment. Training pools refuse these seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from embodied_rft.evaluation.panels import task_id
from embodied_rft.evaluation.samples import Sample, Samples, summarize
from embodied_rft.experience.schedule import Act, Played, Say, Schedule
from embodied_rft.names import UserError
from embodied_rft.pools.protocol import Pool
from embodied_rft.pools.states import distinct_seeds, num_held_out_states
from embodied_rft.seeding import evaluation_seed
from embodied_rft.turns.parsing import Parser

SILENT = "the environment never said whether an episode succeeded (info['is_success'] or info['success'])"


@dataclass(slots=True)
class Evaluation:
    """What happened on each episode of the list. 150 successes of 200: success 0.75, low 0.686, high 0.805."""

    seeds: list[int]
    results: list[bool]  # success at the episode's end, in the order of `seeds`
    returns: list[float]
    lengths: list[int]
    invalid: int = 0  # episodes that had to be started again because their environment failed
    tasks: list[str] = field(
        default_factory=list
    )  # the panel: what each seed showed first, as `panels.task_id` names it
    changed: list[int] = field(default_factory=list)  # seeds that showed another task in an earlier evaluation
    incidents: dict[str, int] = field(default_factory=dict)  # why, by kind, as pools count them
    seconds: float = 0.0
    name: str = ""
    states: int | None = None  # distinct held-out states that there are, where the environment knows
    statistics: dict[str, float] = field(default_factory=dict)  # means of what it tells of episodes: "invalid/cut"
    told: bool = False  # whether the environment said anything about success; if not, only the returns mean something
    left_out: list[int] = field(default_factory=list)  # seeds on which the environment failed each time: no verdict
    extra: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)  # what was said, where actions are texts
    pictures: dict[str, bytes] = field(default_factory=dict)  # PNG by digest: what was seen in those that are shown

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

    @property
    def mean_return(self) -> float:
        """Mean of the undiscounted returns."""
        return float(np.mean(self.returns)) if self.returns else float("nan")

    def headline(self) -> dict[str, float]:
        """What a log line or a table shows: without success where nobody tells it."""
        low, high = self.interval
        success = {"success": self.success, "low": low, "high": high} if self.told else {}
        left_out = {"left_out": len(self.left_out)} if self.left_out else {}
        return success | {"mean_return": self.mean_return} | left_out

    def to_json(self) -> dict[str, Any]:
        """The content of `evaluations/*.json` in a run folder."""
        low, high = self.interval
        summary = {"episodes": self.episodes, "successes": int(sum(self.results)), "success": self.success}
        content = asdict(replace(self, samples=[], pictures={})) | (
            {"said": summarize(self.samples)} if self.samples else {}
        )
        del content["samples"], content["pictures"]
        return content | summary | {"low": low, "high": high, "mean_return": self.mean_return}

    def require_success(self, option: str) -> float:
        """The success rate that `option` waits for; ValueError when the environment says nothing about success."""
        if not self.told:
            raise UserError(f"{option} waits for a success rate, but {SILENT}")
        return self.success

    def __str__(self) -> str:
        on = f"on {counted(self.episodes, self.states)}"
        if self.left_out:
            on += f" ({len(self.left_out)} left out: the environment failed on them each time)"
        if self.incidents:
            why = ", ".join(f"{count} {kind}" for kind, count in sorted(self.incidents.items()))
            on += f"; {self.invalid} episodes were void and played again ({why})"
        if self.changed:
            on += (
                f"; {len(self.changed)} of the seeds showed other tasks in an earlier evaluation: the environment has "
                "changed, and the two cannot be compared"
            )
        if not self.told:
            return f"mean return {self.mean_return:.3g} {on}; {SILENT}"
        low, high = self.interval
        return f"success {self.success:.3f} [{low:.3f}, {high:.3f}] {on}"


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
    past: bool = False,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    say: Say | None = None,
    max_retries: int = 3,
) -> Evaluation:
    """Run one episode from every seed; an environment that is done takes the next seed at once.

    Args:
        act: observation tree [N, ...] -> Decisions; usually the greedy policy.
        pool: made with purpose="evaluation".
        seeds: evaluation seeds (>= 2**31).
        name: what the report calls this evaluation.
        past: the policy reads what happened before (`Policy.reads_past`).
        progress: called with how many episodes have ended, and their success (or return) so far.
        say: told when no episode ends.
        max_retries: how often an episode that its environment broke is run again; then its seed is left out.

    Raises:
        RuntimeError: the environment failed on every seed.
    """
    started, before = time.perf_counter(), pool.incidents.counts.copy()
    states = num_held_out_states(pool)
    if states:  # no state counts twice
        seeds = distinct_seeds(seeds, states)
    parser = pool.ask("parser")
    episodes = _Episodes(list(seeds), max_retries, Samples(parser if isinstance(parser, Parser) else None))
    schedule = Schedule(pool, episodes.deal, past=past, say=say)
    schedule.fill()
    while schedule.playing.any():
        played = schedule.play(act)
        episodes.count(played, schedule)
        schedule.fill(played.over)
        if progress is not None:
            progress(len(episodes.ended), episodes.so_far())
    if len(seeds) and not episodes.ended:
        raise RuntimeError(
            f"the environment failed {max_retries + 1} times on each of {len(seeds)} held-out states: there is nothing "
            f"to judge. The latest incident: {latest_incident(pool)}"
        )
    outcome = episodes.outcome(name=name, seconds=time.perf_counter() - started, states=states)
    return replace(outcome, incidents=dict(pool.incidents.counts - before))


def latest_incident(pool: Pool) -> str:
    """What went wrong in a pool last, in words."""
    return pool.incidents.latest[-1] if pool.incidents.latest else "it gave no reason"


class _Episodes:
    """Which episodes of a list wait, how those that run stand, and how each ended.

    Success counts at the end: of an episode that reached its goal and lost it again, what the last step says.
    """

    def __init__(self, seeds: list[int], max_retries: int, said: Samples) -> None:
        self.seeds, self.max_retries, self.said = seeds, max_retries, said
        self.waiting = list(range(len(seeds)))[::-1]
        self.returns, self.lengths, self.failures = (np.zeros(len(seeds)) for _ in range(3))
        self.ended: dict[int, bool] = {}  # success of each episode that came to its end
        self.tasks: dict[int, str] = {}  # of each episode that began
        self.statistics: dict[str, list[float]] = {}  # of the episodes that came to their end
        self.told = False

    def deal(self, count: int) -> list[tuple[int, int]]:
        """The next ones, and their seeds."""
        numbers = [self.waiting.pop() for _ in range(min(count, len(self.waiting)))]
        return [(number, self.seeds[number]) for number in numbers]

    def count(self, played: Played, schedule: Schedule) -> None:
        """One decision of every episode that runs."""
        success = played.result.info.get("success")
        self.told |= success is not None
        for env in played.streams.tolist():
            episode, row = int(schedule.episode[env]), env - played.first
            if schedule.step[env] == 1:
                self.tasks[episode] = task_id(played.observation, row, self.seeds[episode])
            self.said.add(episode, played.observation, played.decisions, played.result.reward[row], row)
        for name, values in played.result.statistics(played.ended - played.first).items():
            self.statistics.setdefault(name, []).extend(values)
        for env in played.ended:
            episode = int(schedule.episode[env])
            self.returns[episode], self.lengths[episode] = schedule.returned[env], schedule.step[env]
            self.ended[episode] = success is not None and bool(success[env - played.first])
            self.said.end(episode, float(schedule.returned[env]))
        for episode in schedule.episode[played.broken].tolist():
            self.said.forget(episode)
            self.failures[episode] += 1
            if self.failures[episode] <= self.max_retries:
                self.waiting.append(episode)

    def so_far(self) -> dict[str, float]:
        """Success of the episodes that have ended, or their mean return."""
        if not self.ended:
            return {}
        if self.told:
            return {"success": float(np.mean(list(self.ended.values())))}
        return {"return": float(np.mean(self.returns[list(self.ended)]))}

    def outcome(self, *, name: str, seconds: float, states: int | None) -> Evaluation:
        """The verdict, in the order of the list."""
        judged, every = sorted(self.ended), range(len(self.seeds))
        samples, pictures = self.said.ended(
            self.seeds, self.returns.tolist(), [self.ended.get(i, False) for i in every]
        )
        return Evaluation(
            [int(self.seeds[i]) for i in judged],
            [self.ended[i] for i in judged],
            self.returns[judged].tolist(),
            self.lengths[judged].astype(int).tolist(),
            invalid=int(self.failures.sum()),
            seconds=seconds,
            name=name,
            states=states,
            statistics={name: float(np.mean(values)) for name, values in self.statistics.items() if values},
            told=self.told,
            tasks=[self.tasks[i] for i in judged],
            left_out=[int(seed) for i, seed in enumerate(self.seeds) if i not in self.ended],
            samples=samples,
            pictures=pictures,
        )
