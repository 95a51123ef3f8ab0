"""The stage that learns from what the buffer holds: pretrain."""

from __future__ import annotations

import itertools
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Annotated, Any, ClassVar

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from embodied_rft import distributed
from embodied_rft.buffer.plans import Drawn
from embodied_rft.learning.learner import LearnerConfig
from embodied_rft.names import UserError
from embodied_rft.objectives import build_objective
from embodied_rft.options import STRICT, plugin_spec, refuse_idle
from embodied_rft.registry import register
from embodied_rft.runs.session import Session
from embodied_rft.stages.base import Stage
from embodied_rft.stages.learning import LearningProgress, annotate_once, headline


@plain_dataclass(kw_only=True)
class PretrainProgress(LearningProgress):
    """How far a `pretrain` is."""

    updates: int = 0  # so far
    shown: dict[str, Any] = field(default_factory=dict)  # the newest headline


@register("stage", "pretrain")
class Pretrain(Stage):
    """Gradient steps on what the buffer holds, without new experience."""

    extendable: ClassVar[tuple[str, ...]] = ("updates",)
    adjustable: ClassVar[tuple[str, ...]] = ("log_every", "evaluate_every", "evaluate_episodes")

    Progress = PretrainProgress

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """What to learn, and for how long."""

        objective: Annotated[dict[str, Any], plugin_spec("objective")]  # what is learned
        updates: NonNegativeInt = 1_000  # gradient steps
        only: list[str] | None = None  # losses to step, e.g. [critic]; None: all
        log_every: PositiveInt = 100  # updates between log lines
        evaluate_every: PositiveInt | None = None  # updates between points of the learning curve
        evaluate_episodes: PositiveInt = 100  # of a point of the learning curve
        learner: LearnerConfig = field(default_factory=LearnerConfig)

        def __post_init__(self) -> None:
            if not isinstance(build_objective(self.objective).reading, Drawn):
                raise UserError(
                    f"objective {self.objective['id']!r} learns from fresh experience only: use finetune, not pretrain"
                )
            if self.evaluate_every is None:
                refuse_idle(self, ["evaluate_episodes"], "without evaluate_every")

    @property
    def title(self) -> str:
        """How the report names this stage."""
        parts = f" ({', '.join(self.config.only)} only)" if self.config.only else ""
        return f"pretrain: {self.config.objective['id']}{parts}"

    def check(self, session: Session) -> None:
        """Whether the environments give what the objective reads."""
        session.require(self.config.objective)

    def prepare(self, session: Session) -> None:
        """The objective's networks."""
        session.make_objective(self.config.objective)

    def run(self, session: Session) -> dict[str, Any]:
        """Annotate once, then update in blocks of `log_every`."""
        config, progress = self.config, session.progress_as(PretrainProgress)
        learner = session.make_learner(config.learner)
        annotate_once(session)
        rng, sampler = session.generator("learn"), session.numpy_generator("sample")
        with session.logger.progress(self.title, config.updates) as bar:
            while (done := progress.updates) < config.updates:
                count = min(config.log_every, config.updates - done)
                learner.anneal(done / config.updates)
                made, batches = 0, session.objective.reading.batches(session.buffer, sampler, learner.version)
                for batch in distributed.in_step(itertools.islice(batches, count)):
                    learner.update(batch, rng, only=config.only)
                    made += 1
                metrics = learner.metrics()
                if made < count:
                    metrics["learn/skipped_updates"] = count - made  # there was nothing to learn from
                progress.updates += count
                progress.shown = headline(metrics)
                session.counters["updates"] += made
                session.log(metrics)
                bar.update(progress.updates, **progress.shown)
                if config.evaluate_every and progress.updates % config.evaluate_every < count:
                    session.evaluate(config.evaluate_episodes, sheet=1, name="curve")
                session.tick()
        learner.finish()
        return dict(progress.shown)
