"""The stage that learns from new experience: finetune."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Annotated, Any, ClassVar

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from embodied_rft import distributed
from embodied_rft.buffer.plans import Share
from embodied_rft.experience.recording import Recording
from embodied_rft.experience.schedule import Endless
from embodied_rft.learning.learner import LearnerConfig
from embodied_rft.learning.objective import Metrics
from embodied_rft.names import UserError
from embodied_rft.objectives import build_objective
from embodied_rft.objectives.curricula import make_curriculum
from embodied_rft.options import STRICT, plugin_spec, refuse_idle
from embodied_rft.registry import register
from embodied_rft.runs.session import Session
from embodied_rft.stages.base import Stage
from embodied_rft.stages.collect import whole_groups
from embodied_rft.stages.learning import (
    FromFresh,
    FromReplay,
    Learning,
    LearningProgress,
    headline,
    learning_of,
    room,
)
from embodied_rft.stages.turns import InTurn, Overlapped, overlapped


@dataclass(config=STRICT, kw_only=True)
class Until:
    """When to stop early: as soon as one holds."""

    success: Share | None = None  # on the learning curve's states (sheet 1)
    minutes: PositiveFloat | None = None  # wall time of this stage; a run stopped by it is not repeatable to the bit


@plain_dataclass(kw_only=True)
class FinetuneProgress(LearningProgress):
    """How far a `finetune` is."""

    renamed: ClassVar[Mapping[str, str]] = {"return": "mean_return"}

    ended: int = 0  # episodes
    shown: dict[str, Any] = field(default_factory=dict)  # the newest headline
    success: float | None = None  # of the newest point of the learning curve
    mean_return: float | None = None  # likewise, where nobody tells success


@register("stage", "finetune")
class Finetune(Stage):
    """Collect, learn, repeat: online reinforcement learning."""

    extendable: ClassVar[tuple[str, ...]] = ("decisions",)
    adjustable: ClassVar[tuple[str, ...]] = ("evaluate_every", "evaluate_episodes", "until")
    Progress = FinetuneProgress

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """What to learn, from how much experience."""

        objective: Annotated[dict[str, Any], plugin_spec("objective")]  # what is learned
        decisions: NonNegativeInt = 100_000  # of experience, in all
        # null: 50 for each environment; of replayed objectives about 50 in all, at least one of each environment
        decisions_per_iteration: PositiveInt | None = None
        episodes_per_iteration: PositiveInt | None = None  # whole episodes instead, for group credit
        updates_per_decision: NonNegativeFloat | None = None  # replayed objectives only; None: as published
        group_size: PositiveInt = 1  # episodes that share an initial state (group credit)
        # which tasks are played more often than others, {id: value}; null: all as they come
        curriculum: Annotated[dict[str, Any], plugin_spec("curriculum")] | None = None
        overlap: bool = False  # collect on one thread with the previous weights while learning on another
        evaluate_every: PositiveInt | None = None  # decisions between points of the learning curve
        evaluate_episodes: PositiveInt = 100  # of a point of the learning curve
        until: Until | None = None  # {success: 0.95}: end as soon as the curve shows it
        learner: LearnerConfig = field(default_factory=LearnerConfig)

        def __post_init__(self) -> None:
            objective = build_objective(self.objective)
            for name, instead in learning_of(objective).refused.items():
                if getattr(self, name) not in (None, False):
                    raise UserError(
                        f"{name} has no effect with objective {self.objective['id']!r}, which learns from fresh "
                        f"experience, not from replay: {instead}"
                    )
            self._check_iteration(objective.needs_groups)
            if self.curriculum is not None:
                self._check_curriculum(self.curriculum, objective.foresees)
            if self.evaluate_every is None:
                refuse_idle(self, ["evaluate_episodes"], "without evaluate_every")
            if self.until is not None and self.until.success is not None and self.evaluate_every is None:
                raise UserError("until.success reads the learning curve, and there is none: set evaluate_every")

        def _check_curriculum(self, spec: Mapping[str, Any], foresees: bool) -> None:
            """Refuse one that nobody can answer."""
            if make_curriculum(spec).foresees and not foresees:
                raise UserError(
                    f"curriculum {spec['id']!r} asks what a task promises, which objective "
                    f"{self.objective['id']!r} does not know (digirl does): take curriculum record, or leave it out"
                )
            if self.overlap:
                raise UserError(
                    "a curriculum is not asked with overlap, where learning goes on beside it: leave one out"
                )

        def _check_iteration(self, needs_groups: bool) -> None:
            """Refuse iterations that nothing would come of."""
            episodes, id = self.episodes_per_iteration, self.objective["id"]
            if self.overlap and episodes is not None:
                raise UserError("episodes_per_iteration has no effect with overlap: give decisions_per_iteration")
            if episodes is not None and self.decisions_per_iteration is not None:
                raise UserError("decisions_per_iteration has no effect beside episodes_per_iteration: give one of them")
            if needs_groups and self.group_size < 2:
                raise UserError(f"objective {id!r} compares siblings of a group: set group_size, such as 8")
            if needs_groups and episodes is None:
                raise UserError(
                    f"objective {id!r} compares whole episodes: set episodes_per_iteration, such as "
                    f"{8 * self.group_size}, in place of decisions_per_iteration"
                )
            whole_groups("episodes_per_iteration", episodes, self.group_size)

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"finetune: {self.config.objective['id']}"

    def check(self, session: Session) -> None:
        """Whether the environments give what the objective reads."""
        session.require(self.config.objective)

    def prepare(self, session: Session) -> None:
        """The objective's networks."""
        session.make_objective(self.config.objective)

    def run(self, session: Session) -> dict[str, Any]:
        """Iterations: collect, add, learn, log, evaluate."""
        config, progress = self.config, session.progress_as(FinetuneProgress)
        learner = session.make_learner(config.learner)
        curriculum = None if config.curriculum is None else make_curriculum(config.curriculum)
        collector = session.make_collector(group_size=config.group_size, curriculum=curriculum)
        learning = learning_of(session.objective)(session, vars(config))
        with self._turns(session, learning) as turns, session.logger.progress(self.title, config.decisions) as bar:
            while progress.decisions < config.decisions and not self._reached(session):
                learner.anneal(progress.decisions / config.decisions)
                session.objective.schedule(progress.decisions)
                recording = turns.collect()
                rows = learning.add(recording)
                new = self._count(session, recording)
                noted = turns.learn(recording, rows)
                self._log(session, recording, noted, bar)
                self._evaluate(session, new)
                session.tick()
        if progress.decisions and not progress.ended:
            much = f"{progress.decisions:,} decisions of {session.pool('training').num_envs} environments"
            session.logger.message(f"no episode ended in {much}; {Endless.ADVICE}")
        learning.add(collector.cut())
        learner.finish()
        last = {"last success on the curve": progress.success, "last return on the curve": progress.mean_return}
        return progress.shown | {name: value for name, value in last.items() if value is not None}

    # --- collecting ----------------------------------------------------------------------------------------------

    @contextmanager
    def _turns(self, session: Session, learning: FromReplay | FromFresh) -> Iterator[InTurn | Overlapped]:
        """Who collects and learns, after what a resumed run has lost is accounted for."""
        config, num_envs = self.config, session.running_collector.schedule.pool.num_envs
        amount = learning.iteration(num_envs)
        if config.decisions_per_iteration is not None:
            amount = distributed.share(config.decisions_per_iteration, "decisions_per_iteration")
        self._check_room(session, amount)
        self._begin_anew(session, learning)
        if config.overlap:
            assert isinstance(learning, FromReplay)  # the config refuses it with fresh experience
            with overlapped(session, learning, decisions=amount) as turns:
                yield turns
            return
        episodes = config.episodes_per_iteration
        if episodes is not None:
            episodes = distributed.share(episodes, "episodes_per_iteration")
            whole_groups("episodes_per_iteration, of each process,", episodes, config.group_size)
        yield InTurn(session, learning, decisions=amount, episodes=episodes)

    def _check_room(self, session: Session, amount: int) -> None:
        """Refuse a buffer in which an iteration would overwrite its own beginning."""
        if self.config.episodes_per_iteration is None:
            num_envs = session.pool("training").num_envs
            steps = -(-amount // num_envs)  # every decision may end its episode, which takes a closing row
            room(session.buffer, 2 * steps * num_envs + num_envs, f"an iteration of {amount:,} decisions may take")

    def _begin_anew(self, session: Session, learning: Learning) -> None:
        """A resumed run: what no checkpoint could hold has been cut, and is counted."""
        recording = session.running_collector.begin_anew()
        lost = sum(distributed.gather(recording.lost))
        learning.add(recording)
        if lost:
            session.logger.message(
                f"{lost} running episodes could not be saved and begin anew ({session.env.id} offers no get_state)"
            )
            session.log({"collect/begun_anew": float(lost)})

    def _count(self, session: Session, recording: Recording) -> int:
        """Decisions of this iteration, of all processes."""
        new = sum(distributed.gather(recording.decisions))
        session.progress_as(FinetuneProgress).decisions += new
        session.counters["decisions"] += new
        return new

    # --- judging -------------------------------------------------------------------------------------------------

    def _log(self, session: Session, recording: Recording, noted: Metrics, bar: Any) -> None:
        progress, collected = session.progress_as(FinetuneProgress), recording.metrics()
        progress.ended += int(collected["collect/episodes"])
        metrics = distributed.mean(noted) | session.running_learner.metrics() | collected
        progress.shown = progress.shown | headline(metrics)
        session.log(metrics)
        bar.update(progress.decisions, **progress.shown)

    def _evaluate(self, session: Session, new: int) -> None:
        every, progress = self.config.evaluate_every, session.progress_as(FinetuneProgress)
        if every and progress.decisions // every > (progress.decisions - new) // every:
            outcome = session.evaluate(self.config.evaluate_episodes, sheet=1, name="curve")
            waits = self.config.until is not None and self.config.until.success is not None
            if waits or outcome.told:
                progress.success = outcome.require_success("until.success") if waits else outcome.success
            else:
                progress.mean_return = outcome.mean_return

    def _reached(self, session: Session) -> bool:
        until, progress = self.config.until, session.progress_as(FinetuneProgress)
        if until is None:
            return False
        began = 0.0 if progress.before is None else progress.before["seconds"]
        late = until.minutes is not None and session.seconds() - began > 60 * until.minutes
        good = until.success is not None and progress.success is not None and progress.success >= until.success
        return distributed.any_of(late or good)
