"""The stage that goes back into failed demonstrations: revisit.

An episode begins as one of them did, does what was done there up to some decision, and goes on as the policy does. Who
then wins has shown what of it was worth copying: all that came before. Environments must repeat an episode from its
seed, nothing more. Legend: N environments, K of them that act.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any, cast

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass

from embodied_rft import distributed
from embodied_rft.data import Action, Decisions, Ragged, Source, Tree, pick, pick_tree
from embodied_rft.experience.collect import Collector
from embodied_rft.experience.schedule import Act
from embodied_rft.names import UserError
from embodied_rft.objectives.common import segment_returns
from embodied_rft.options import STRICT
from embodied_rft.policy import Retraces, able
from embodied_rft.registry import register
from embodied_rft.runs.session import Session
from embodied_rft.stages.base import Stage
from embodied_rft.stages.collect import told


@plain_dataclass(frozen=True, slots=True)
class Visit:
    """An episode whose first decisions are somebody else's: Visit(7, ["left", "up"])."""

    seed: int
    actions: Action


@register("stage", "revisit")
class Revisit(Stage):
    """The policy goes on from states of demonstrations that failed (EEF); whole episodes go into the buffer.

    Whoever wins has shown what of the expert's actions helped (Lan et al. 2025, section 3): those before its own. They
    are copied with `pretrain: {objective: {id: bc, selection: {min_return: 1}}}`; what lost is in no such episode.
    """

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """How many, and of which demonstrations."""

        episodes: PositiveInt = 256  # each from a place in a failed demonstration; places are drawn at random
        below: float = 1.0  # sum of rewards; what has less has failed
        share: NonNegativeFloat = 1.0  # of each demonstration, from its start: places behind it are not gone to

        def __post_init__(self) -> None:
            if self.share > 1:
                raise UserError(f"share is {self.share}: of each demonstration, in [0, 1], is expected; 0: its start")

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"revisit failed demonstrations: {self.config.episodes} episodes"

    def run(self, session: Session) -> dict[str, Any]:
        """Collect in one go; a kill starts this stage again."""
        collector = session.collector = _Visiting(session, self._visits(session))
        recording = collector.collect(
            collector.led(session.actor()), episodes=len(collector.visits), version=int(session.agent.version)
        )
        metrics = recording.metrics()
        recording.write(session.buffer)
        session.counters["decisions"] += sum(distributed.gather(recording.decisions))
        session.log(metrics)
        return {f"{name} from there": value for name, value in told(metrics)} | {"episodes": self.config.episodes}

    def _visits(self, session: Session) -> list[Visit]:
        """Where this process goes."""
        config, buffer, rng = self.config, session.buffer, session.numpy_generator("revisit")
        shown = buffer.segments(buffer.rows(source=Source.DEMONSTRATION))
        failed = [
            run for run, gained in zip(shown, segment_returns(buffer, shown), strict=True) if gained < config.below
        ]
        if not failed:
            raise UserError(
                f"revisit goes to demonstrations that failed, and all {len(shown)} gained {config.below:g} or more: "
                "demonstrate with noise, or set below"
            )
        places = [(run, count) for run in failed for count in range(1 + int(config.share * (len(run) - 1)))]
        chosen = rng.integers(len(places), size=config.episodes)[distributed.rank() :: distributed.size()]
        visits = []
        for run, count in (places[one] for one in chosen):
            seed = int(buffer.columns(run[:1])["seed"][0])
            if seed < 0:
                raise UserError(
                    "revisit repeats demonstrations from their seeds, which a file does not tell: demonstrate"
                )
            visits.append(Visit(seed, cast("Action", buffer.column("action/", run[:count]))))
        return visits


class _Visiting(Collector):
    """Episodes that begin as others did."""

    def __init__(self, session: Session, visits: Sequence[Visit]) -> None:
        policy = session.agent.policy
        super().__init__(
            session.pool("training"),
            run_seed=session.recipe.seed,
            first_episode=session.counters["episodes"],
            past=policy.reads_past,
            say=session.logger.message,
        )
        self.first, self.visits, self.retraces = self.next_episode, visits, able(policy, Retraces)

    def _deal(self, count: int) -> list[tuple[int, int]]:
        return [(number, self._visit(number).seed) for number, _ in super()._deal(count)]

    def _visit(self, episode: int) -> Visit:
        """Those whose environment broke are made up for by the first ones."""
        return self.visits[(episode - self.first) % len(self.visits)]

    def led(self, act: Act) -> Act:
        """Decides as `act`, but where an episode is still to do as it was done."""

        def decide(observation: Tree) -> Decisions:
            own, schedule = act(observation), self.schedule
            rows = schedule.asked
            follows = [
                place
                for place, row in enumerate(rows.tolist())
                if schedule.episode[row] >= 0
                and schedule.step[row] < len(self._visit(int(schedule.episode[row])).actions)
            ]
            return self._follow(own, observation, rows, np.array(follows)) if follows else own

        return decide

    def _follow(self, own: Decisions, observation: Tree, rows: np.ndarray, places: np.ndarray) -> Decisions:
        """Decisions [K], those of `places` replaced by what was done there; who decided so is not known any more."""
        actions = []
        for row in rows[places].tolist():
            at = int(self.schedule.step[row])
            actions.append(pick(self._visit(int(self.schedule.episode[row])).actions, slice(at, at + 1)))
        action: Any = np.concatenate(actions) if isinstance(own.action, np.ndarray) else [*itertools.chain(*actions)]
        trace: Tree = {}
        if own.trace:
            if self.retraces is None:
                raise UserError("revisit: this policy cannot say what trace another one's decisions would have left")
            seen = pick_tree(observation, np.append(places, places[-1]))
            trace = pick_tree(self.retraces.retrace(seen, action), slice(0, len(places)))
        log_prob = own.log_prob
        if isinstance(log_prob, Ragged):
            log_prob = _put(log_prob, places, [[]] * len(places))
        elif log_prob is not None:
            log_prob = _put(log_prob, places, 0)
        return Decisions(
            _put(own.action, places, action),
            log_prob,
            {key: _put(value, places, trace[key]) for key, value in own.trace.items()},
        )


def _put(column: Any, places: np.ndarray, values: Any) -> Any:
    """A column [K, ...] with other values at some places."""
    if isinstance(column, (list, Ragged)):
        rows = list(column)
        for place, value in zip(places.tolist(), values, strict=True):
            rows[place] = value
        return rows if isinstance(column, list) else Ragged.of(rows, column.values.dtype, column.values.shape[1:])
    column = np.array(column)
    column[places] = values
    return column
