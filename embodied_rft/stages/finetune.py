"""Stages that change the policy: pretrain (from the buffer), finetune (new experience), adapt (another structure)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import field, fields, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from embodied_rft import distributed, registry
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Replay, Share
from embodied_rft.data import Decisions, Tree
from embodied_rft.experience.collect import Endless, Recording
from embodied_rft.learning.learner import LearnerConfig
from embodied_rft.learning.objective import Objective
from embodied_rft.objectives import build_objective
from embodied_rft.options import STRICT, plugin_spec
from embodied_rft.registry import register
from embodied_rft.runs.session import Session
from embodied_rft.stages.base import Stage
from embodied_rft.stages.collect import whole_groups

FRESH = {  # options of `finetune` for replay, and what objectives that learn from fresh experience have instead
    "batch_size": "set the objective's own batch_size",
    "updates_per_decision": "set the objective's num_epochs",
    "offline_share": "leave it out",
    "overlap": "leave it out",
}


@dataclass(config=STRICT, kw_only=True)
class Until:
    """When to stop early: as soon as one holds."""

    success: Share | None = None  # on the learning curve's states (sheet 1)
    minutes: PositiveFloat | None = None  # wall time of this stage; a run stopped by it is not repeatable to the bit


@register("stage", "finetune")
class Finetune(Stage):
    """Collect, learn, repeat: online reinforcement learning."""

    extendable: ClassVar[tuple[str, ...]] = ("decisions",)
    adjustable: ClassVar[tuple[str, ...]] = ("evaluate_every", "evaluate_episodes", "until")

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """What to learn, from how much experience."""

        objective: Annotated[dict[str, Any], plugin_spec("objective")]  # what is learned
        decisions: NonNegativeInt = 100_000  # of experience, in all
        # null: 50 for each environment; of replayed objectives about 50 in all, at least one of each environment
        decisions_per_iteration: PositiveInt | None = None
        episodes_per_iteration: PositiveInt | None = None  # whole episodes instead, for group credit
        updates_per_decision: NonNegativeFloat | None = None  # replayed objectives only; None: as published
        batch_size: PositiveInt | None = None  # likewise; None: the objective's
        offline_share: Share | None = None  # likewise, e.g. 0.5 (RLPD), 0 (WSRL); None: the objective's
        group_size: PositiveInt = 1  # episodes that share an initial state (group credit)
        overlap: bool = False  # collect on one thread with the previous weights while learning on another
        evaluate_every: PositiveInt | None = None  # decisions between points of the learning curve
        evaluate_episodes: PositiveInt = 100  # of a point of the learning curve
        until: Until | None = None  # {success: 0.95}: end as soon as the curve shows it
        learner: LearnerConfig = field(default_factory=LearnerConfig)

        def __post_init__(self) -> None:
            objective = build_objective(self.objective)
            if isinstance(objective.reading, Replay):
                off_policy_plan(objective, 0, self.batch_size, self.offline_share)
                say_once(self.objective, batch_size=self.batch_size, offline_share=self.offline_share)
            else:
                self._check_fresh()
            self._check_iteration(objective.needs_groups)
            if self.until is not None and self.until.success is not None and self.evaluate_every is None:
                raise ValueError("until.success reads the learning curve, and there is none: set evaluate_every")

        def _check_fresh(self) -> None:
            """Refuse options that are those of replay."""
            for name, instead in FRESH.items():
                if getattr(self, name) not in (None, False):
                    raise ValueError(
                        f"{name} has no effect with objective {self.objective['id']!r}, which learns from fresh "
                        f"experience, not from replay: {instead}"
                    )

        def _check_iteration(self, needs_groups: bool) -> None:
            """Refuse iterations that nothing would come of."""
            episodes, id = self.episodes_per_iteration, self.objective["id"]
            if self.overlap and episodes is not None:
                raise ValueError("episodes_per_iteration has no effect with overlap: give decisions_per_iteration")
            if episodes is not None and self.decisions_per_iteration is not None:
                raise ValueError(
                    "decisions_per_iteration has no effect beside episodes_per_iteration: give one of them"
                )
            if needs_groups and self.group_size < 2:
                raise ValueError(f"objective {id!r} compares siblings of a group: set group_size, such as 8")
            if needs_groups and episodes is None:
                raise ValueError(
                    f"objective {id!r} compares whole episodes: set episodes_per_iteration, such as "
                    f"{8 * self.group_size}, in place of decisions_per_iteration"
                )
            whole_groups("episodes_per_iteration", episodes, self.group_size)

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"finetune: {self.config.objective['id']}"

    def prepare(self, session: Session) -> None:
        """The objective's networks."""
        session.make_objective(self.config.objective)

    def run(self, session: Session) -> dict[str, Any]:
        """One iteration: record, write, annotate, update, log, evaluate."""
        config, progress = self.config, session.progress
        learner = session.make_learner(config.learner)
        collector = session.make_collector(group_size=config.group_size)
        replayed = isinstance(session.objective.reading, Replay)
        amount = self._iteration(collector.pool.num_envs, replayed)
        self._check_room(session, amount)
        self._begin_anew(session, collector.begin_anew())
        progress.setdefault("decisions", 0)
        with self._recorder(session, amount) as record, session.logger.progress(self.title, config.decisions) as bar:
            while progress["decisions"] < config.decisions and not self._reached(session):
                learner.anneal(progress["decisions"] / config.decisions)
                session.objective.schedule(progress["decisions"])
                recording = record(lambda: self._learn_replay(session, amount))
                rows = self._write(session, recording)
                new = sum(distributed.gather(recording.decisions))
                progress["decisions"] += new
                session.counters["decisions"] += new
                noted: dict[str, float] = {}
                if not replayed:
                    noted = self._learn_fresh(session, rows)
                elif not config.overlap:
                    self._learn_replay(session, recording.decisions if config.episodes_per_iteration else amount)
                collected = recording.metrics()
                progress["ended"] = progress.get("ended", 0) + int(collected["collect/episodes"])
                metrics = distributed.mean(noted) | learner.metrics() | collected
                progress["shown"] = progress.get("shown", {}) | headline(metrics)
                session.log(metrics)
                bar.update(progress["decisions"], **progress["shown"])
                self._evaluate(session, new)
                session.tick()
        if progress["decisions"] and not progress.get("ended"):
            much = f"{progress['decisions']:,} decisions of {session.pool('training').num_envs} environments"
            session.logger.message(f"no episode ended in {much}; {Endless.ADVICE}")
        self._write(session, collector.cut())
        learner.finish()
        last = {f"last {name} on the curve": progress[name] for name in ("success", "return") if name in progress}
        return progress.get("shown", {}) | last

    # --- collecting ----------------------------------------------------------------------------------------------

    def _iteration(self, num_envs: int, replayed: bool) -> int:
        """Decisions of this process in an iteration; replay learns as it goes, close to what it has just seen."""
        if self.config.decisions_per_iteration is not None:
            return distributed.share(self.config.decisions_per_iteration, "decisions_per_iteration")
        return (math.ceil(50 / num_envs) if replayed else 50) * num_envs

    @contextmanager
    def _recorder(self, session: Session, amount: int) -> Iterator[Callable[..., Recording]]:
        """`record(learn)` gives new experience; with `overlap`, it calls `learn` meanwhile (not the first time)."""
        collector, learner = session.collector, session.learner
        assert collector is not None and learner is not None
        if not self.config.overlap:
            act = session.actor()
            episodes = self.config.episodes_per_iteration
            if episodes is not None:
                episodes = distributed.share(episodes, "episodes_per_iteration")
                whole_groups("episodes_per_iteration, of each process,", episodes, self.config.group_size)
            how_much = {"decisions": amount} if episodes is None else {"episodes": episodes}
            yield lambda learn: collector.collect(act, **how_much, version=learner.version)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            act, refresh = delayed_actor(session)

            def record(learn: Callable[[], None]) -> Recording:
                refresh()
                future: Future[Recording] = executor.submit(
                    collector.collect, act, decisions=amount, version=learner.version
                )
                try:
                    if session.progress["decisions"]:
                        learn()
                finally:
                    recording = future.result()
                return recording

            try:
                yield record
            finally:
                torch.set_num_threads(threads)

    def _check_room(self, session: Session, amount: int) -> None:
        """Refuse a buffer in which an iteration would overwrite its own beginning."""
        if self.config.episodes_per_iteration is None:
            num_envs = session.pool("training").num_envs
            steps = -(-amount // num_envs)  # every decision may end its episode, which takes a closing row
            room(session.buffer, 2 * steps * num_envs + num_envs, f"an iteration of {amount:,} decisions may take")

    def _begin_anew(self, session: Session, recording: Recording) -> None:
        """A resumed run: what no checkpoint could hold has been cut, and is counted."""
        lost = sum(distributed.gather(recording.lost))
        self._write(session, recording)
        if lost:
            session.logger.message(
                f"{lost} running episodes could not be saved and begin anew ({session.env.id} offers no get_state)"
            )
            session.log({"collect/begun_anew": float(lost)})

    def _write(self, session: Session, recording: Recording) -> np.ndarray:
        """Put new experience into the buffer; its rows [decisions]. Replayed objectives annotate what has ended."""
        room(session.buffer, recording.num_rows, "this iteration takes")
        rows = recording.write(session.buffer)
        if session.progress.get("annotated") and recording.ended:
            known = session.buffer.rows()
            over = known[np.isin(session.buffer.columns(known)["episode"], recording.ended)]
            session.objective.annotate(session.agent, session.buffer, over, session.generator("annotate"))
        return rows

    # --- learning ------------------------------------------------------------------------------------------------

    def _learn_replay(self, session: Session, amount: int) -> None:
        """Updates from replay, `updates_per_decision` for each of `amount` decisions of every process."""
        annotate_once(session)
        amount = sum(distributed.gather(amount))
        ratio = self.config.updates_per_decision
        ratio = session.objective.updates_per_decision if ratio is None else ratio
        owed = session.progress.get("owed", 0.0) + amount * ratio
        session.progress["owed"] = owed - int(owed)
        plan = off_policy_plan(session.objective, int(owed), self.config.batch_size, self.config.offline_share)
        learner, rng = session.learner, session.generator("learn")
        assert learner is not None
        for batch in plan.batches(session.buffer, session.numpy_generator("sample"), learner.version):
            learner.update(batch, rng)
        session.counters["updates"] += int(owed)

    def _learn_fresh(self, session: Session, rows: np.ndarray) -> dict[str, float]:
        """Updates from the rows just written; what the objective found in them."""
        learner = session.learner
        assert learner is not None
        before, sampler = learner.updates, session.numpy_generator("sample")
        reading, rng = session.objective.reading, session.generator("learn")
        noted = learner.read(session.buffer, rows, reading, sampler=sampler, rng=rng)
        session.counters["updates"] += learner.updates - before
        return noted

    # --- judging -------------------------------------------------------------------------------------------------

    def _evaluate(self, session: Session, new: int) -> None:
        every, progress = self.config.evaluate_every, session.progress
        if every and progress["decisions"] // every > (progress["decisions"] - new) // every:
            outcome = session.evaluate(self.config.evaluate_episodes, sheet=1, name="curve")
            waits = self.config.until is not None and self.config.until.success is not None
            if waits or outcome.told:
                progress["success"] = outcome.require_success("until.success") if waits else outcome.success
            else:
                progress["return"] = outcome.mean_return

    def _reached(self, session: Session) -> bool:
        until, progress = self.config.until, session.progress
        if until is None:
            return False
        late = until.minutes is not None and session.seconds() - progress["before"]["seconds"] > 60 * until.minutes
        good = until.success is not None and progress.get("success", -1.0) >= until.success
        return distributed.any_of(late or good)


def annotate_once(session: Session) -> None:
    """Let the objective write its columns for what the buffer holds, once in a stage, however often that is resumed."""
    if not session.progress.get("annotated"):
        rows, rng = session.buffer.rows(), session.generator("annotate")
        session.objective.annotate(session.agent, session.buffer, rows, rng)
        distributed.equalize(session.agent.buffers())  # statistics of the data
        session.progress["annotated"] = True


def off_policy_plan(objective: Objective, updates: int, batch_size: int | None, offline_share: float | None) -> Replay:
    """The objective's reading plan with the stage's numbers; a plan for fresh data is refused."""
    if not isinstance(objective.reading, Replay):
        raise ValueError(
            f"objective {type(objective).__name__} learns from fresh experience only: use finetune, not pretrain"
        )
    share = objective.reading.offline_share if offline_share is None else offline_share
    batch_size = distributed.share(batch_size or objective.reading.batch_size, "batch_size")
    return replace(objective.reading, num_updates=updates, batch_size=batch_size, offline_share=share)


def say_once(spec: dict[str, Any], **options: Any) -> None:
    """Refuse options of a replayed objective {"id": ..., options} that its stage decides, or decides otherwise."""
    defaults = {f.name: f.default for f in fields(registry.find("objective", spec["id"]).Config)}
    if spec.get("num_updates") != defaults.get("num_updates"):
        raise ValueError(
            f"objective.num_updates {spec['num_updates']} has no effect in a recipe: how much is learned says the "
            "stage, pretrain by `updates`, finetune by `updates_per_decision`"
        )
    for name, value in options.items():
        own = spec.get(name)
        if value is not None and own not in (value, defaults.get(name)):
            raise ValueError(f"{name} is {value} for the stage and {own} for its objective: say it once")


def room(buffer: Buffer, rows: int, what: str) -> None:
    """ValueError if so many rows are more than the buffer has place for."""
    free = buffer.capacity - buffer.num_pinned
    if rows > free:
        raise ValueError(
            f"{what} {rows:,} rows (decisions, and one for each episode that ends), but the buffer has {free:,} that "
            f"are not pinned: set buffer.capacity to at least {rows + buffer.num_pinned:,}"
        )


def delayed_actor(session: Session) -> tuple[Callable[[Tree], Decisions], Callable[[], None]]:
    """(act, refresh): acts with a copy of the agent that `refresh` brings up to date, safe beside a learning thread."""
    copied = copy.deepcopy(session.agent)
    generator, objective = session.generator("act"), session.objective

    def refresh() -> None:
        copied.load_state_dict(session.agent.state_dict())

    return lambda observation: objective.explore(copied, observation, generator), refresh


def headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """The few numbers worth a progress bar; the return where nobody tells success."""
    best = "collect/success" if "collect/success" in metrics else "collect/return"
    wanted = (best, "critic/loss", "policy/loss", "critic/q_mean")
    return {k: metrics[k] for k in wanted if k in metrics}
