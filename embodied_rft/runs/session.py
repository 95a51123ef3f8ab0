"""A run: the folder, the state that stages share, its clocks and logs, and the loop over the stages.

A `Session` owns agent, buffer, learner, collector, random generators, counters and logs. Stages change them; the
session saves them (`resume` says what). What the policy stands on, environments and experience, is its `Rig`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from embodied_rft import distributed
from embodied_rft.data import Decisions, Source, Tree
from embodied_rft.device import on_device, resolve_device, restored_generator, seeded
from embodied_rft.evaluation.evaluate import Evaluation, evaluate, evaluation_seeds, latest_incident
from embodied_rft.evaluation.panels import panel_of
from embodied_rft.experience.collect import Collector
from embodied_rft.experience.curriculum import Curriculum, Sieve
from embodied_rft.experience.schedule import Act
from embodied_rft.files import write_atomically, write_json
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.learning.objective import Objective
from embodied_rft.objectives import build_objective
from embodied_rft.options import to_plain, walk
from embodied_rft.pools.described import Description
from embodied_rft.pools.promises import held_out
from embodied_rft.pools.protocol import Pool
from embodied_rft.runs import resume
from embodied_rft.runs.checkpoint import Checkpoints, common_newest
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.log import Logger
from embodied_rft.runs.recipe import Recipe, dump_recipe
from embodied_rft.runs.tree_file import save
from embodied_rft.seeding import evaluation_generator, spawn_generator

SHOWN = 8  # texts of incidents that are kept


class Interrupted(KeyboardInterrupt):
    """The run was stopped on request, after a checkpoint: the same command continues it."""


class Session(resume.State):
    """The state of a run. Stages use its parts; see `stages` for how."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        *,
        quiet: bool = False,
        text: str | None = None,
        described: Sequence[Description | None] = (),
    ) -> None:
        logger = Logger(folder, recipe.logging, quiet=quiet, recipe=to_plain(recipe))
        super().__init__(recipe, folder, logger, text=text or dump_recipe(recipe), described=described)
        self.checkpoints = Checkpoints(self.folder.checkpoints, keep=2, holds=resume.HOLDS)
        self._said: set[str] = set()
        self.stage_name = ""  # its title
        self.stopping = False
        self._recipe_kept = False  # in recipe.yaml
        self._resume: dict[str, Any] | None = None
        self._objective: Objective | None = None
        self._clock = self._saved_at = time.perf_counter()
        pool = self.step_pool("training")
        self.agent = build_agent(recipe.agent, pool.observation_space, pool.action_space, rng=self.generator("agent"))
        self.agent.to(resolve_device(recipe.device))
        self.leave_out_unreadable()

    # --- parts ---------------------------------------------------------------------------------------------------

    def generator(self, name: str) -> torch.Generator:
        """The torch generator `name` of the running stage; its seed depends on run, stage, name and process alone."""
        if name not in self.generators:
            seed = spawn_generator(self.recipe.seed, *self.path, *distributed.seed_key(name)).integers(2**62)
            # Weights are drawn on the processor, so that they are the same on every machine.
            self.generators[name] = seeded(int(seed), "cpu" if name in ("agent", "setup") else self.agent.device)
        return self.generators[name]  # type: ignore[return-value]

    def numpy_generator(self, name: str) -> np.random.Generator:
        """The NumPy generator `name` of the running stage."""
        if name not in self.generators:
            self.generators[name] = spawn_generator(self.recipe.seed, *self.path, *distributed.seed_key(name))
        return self.generators[name]  # type: ignore[return-value]

    def make_objective(self, spec: dict[str, Any]) -> Objective:
        """The objective {"id": ..., options} that a stage names, with its networks set up on the agent."""
        objective = self._objective = build_objective(spec)
        objective.setup(self.agent, self.generator("setup"))
        if distributed.size() > 1:
            batch_size = distributed.share(objective.reading.batch_size, "objective.batch_size")
            objective.reading = replace(objective.reading, batch_size=batch_size)
        return objective

    def require(self, spec: dict[str, Any]) -> None:
        """Refuse an objective whose reading the environments do not serve; the policy may be another one until then."""
        build_objective(spec).reading.require(replace(self.schema(), trace={}), self.goals)

    @property
    def objective(self) -> Objective:
        """Of the running stage, whose `prepare` made it."""
        assert self._objective is not None
        return self._objective

    @property
    def running_learner(self) -> Learner:
        """Of the running stage, which has made it."""
        assert self.learner is not None
        return self.learner

    @property
    def running_collector(self) -> Collector:
        """Likewise."""
        assert self.collector is not None
        return self.collector

    def make_learner(self, config: LearnerConfig) -> Learner:
        """The learner of the running stage for the current objective, restored if the stage is being resumed."""
        self.objective.reading.require(self.schema(), self.goals)
        distributed.equalize(self.agent.state_dict().values())
        self.learner = Learner(self.agent, self.objective, config)
        if self._resume is not None and self._resume["learner"] is not None:
            self.learner.load_state_dict(self._resume["learner"])
        return self.learner

    def make_collector(
        self,
        *,
        group_size: int = 1,
        source: Source = Source.ONLINE,
        pool: Pool | None = None,
        curriculum: Curriculum | None = None,
    ) -> Collector:
        """The collector of the running stage, restored if it is being resumed; `pool`: not as the policy acts."""
        pool = pool or self.pool("training")
        self.collector = Collector(
            pool,
            run_seed=self.recipe.seed,
            first_episode=self.counters["episodes"],
            group_size=group_size,
            source=source,
            past=self.agent.policy.reads_past,
            say=self.logger.message,
            sieve=None if curriculum is None else self._sieve(curriculum, pool.num_envs),
        )
        if self._resume is not None and self._resume["collector"] is not None:
            self.collector.load_state_dict(self._resume["collector"])
        return self.collector

    def _sieve(self, curriculum: Curriculum, num_envs: int) -> Sieve:
        def foresee(observation: Tree) -> np.ndarray:
            return self.objective.foresee(self.agent, observation)

        return Sieve(curriculum, foresee, run_seed=self.recipe.seed, num_envs=num_envs)

    def actor(self, *, greedy: bool = False, rng: torch.Generator | None = None) -> Act:
        """How the agent acts: greedily, or exploring as the objective (else the policy) says.

        `rng`: what it draws from; None: the stage's own generator, which goes on from call to call.
        """
        generator = self.generator("act") if rng is None else on_device(rng, self.agent.device)
        judged = self.learner.judged if greedy and self.learner is not None else None
        objective = None if greedy else self._objective

        def act(observation: Tree) -> Decisions:
            if objective is not None:
                return objective.explore(self.agent, observation, generator)
            return self.agent.act(observation, greedy=greedy, rng=generator, policy=judged)

        return act

    # --- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, episodes: int, *, sheet: int, name: str, act: Act | None = None) -> Evaluation:
        """Greedy success on the first `episodes` states of a sheet, written to `evaluations/` and the log."""
        seeds = evaluation_seeds(episodes, sheet=sheet)
        with self.logger.progress(f"evaluate {name}", episodes, speed=False) as bar:
            outcome = evaluate(
                act or self.actor(greedy=True, rng=evaluation_generator(sheet=sheet)),
                self.pool("evaluation"),
                seeds,
                name=name,
                past=self.agent.policy.reads_past,
                progress=lambda ended, so_far: bar.update(ended, **so_far),
                say=self.logger.message,
            )
        if outcome.left_out:
            self.logger.message(
                f"evaluate {name}: {outcome}; the latest incident: {latest_incident(self.pool('evaluation'))}"
            )
        slug = "-".join(str(i) for i in self.path) + f"-{self.progress.evaluations}"
        self.progress.evaluations += 1
        self.folder.add_evaluation(
            slug,
            outcome,
            stage=self.path,
            sheet=sheet,
            decisions=self.counters["decisions"],
            wall_seconds=self.seconds(),
            panel=panel_of(self.env),
            **held_out(self.step_pool("evaluation")),
        )
        if outcome.changed:
            self.logger.message(f"warning: evaluate {name}: {outcome}")
        self.logger.show_samples(name, outcome.samples, decisions=self.counters["decisions"])
        shown = outcome.headline() | outcome.statistics
        self.log({f"evaluate/{key}": value for key, value in shown.items()}, name=name)
        if sheet and act is None:  # never by the states of the verdict
            self.save_best(outcome)
        return outcome

    # --- logs and clocks -----------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Wall time that this run has used so far, over all its restarts."""
        return float(self.counters["seconds"]) + time.perf_counter() - self._clock

    def log(self, metrics: dict[str, float], **labels: str) -> None:
        """One line in every log; what went wrong in the environments since the last one is part of it."""
        self.logger.log(
            {**metrics, **self.note_incidents()},
            stage=list(self.path),
            stage_name=self.stage_name,
            decisions=self.counters["decisions"],
            updates=self.counters["updates"],
            seconds=self.seconds(),
            **labels,
        )

    def note_incidents(self) -> dict[str, float]:
        """{"incidents/error": how many since the last call}; said whenever their number doubles, kept for reports."""
        fresh: Counter[str] = Counter()
        known = self.counters["incidents"]
        for pool in self._pools.values():
            counts, texts = pool.incidents.news()
            fresh.update(counts)
            known["latest"] = [*known["latest"], *texts][-SHOWN:]
            note = held_out(pool)["seeding"]
            if note and note not in self._said:
                self._said.add(note)
                self.logger.message(f"warning: {note}", style="yellow")
        before = sum(known["counts"].values())
        known["counts"] = dict(Counter(known["counts"]) + fresh)
        if fresh:
            after = sum(known["counts"].values())
            if after.bit_length() > before.bit_length():
                kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(known["counts"].items()))
                self.logger.message(
                    f"warning: {after} incidents in environments so far ({kinds}); the latest is {known['latest'][-1]}",
                    style="yellow",
                )
            write_json(self.folder.incidents, known)
        return {f"incidents/{kind}": float(count) for kind, count in sorted(fresh.items())}

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Called by stages wherever they can be continued from: saves when it is time, stops when asked to."""
        due = time.perf_counter() - self._saved_at > self.recipe.checkpoint_seconds
        if distributed.size() > 1:  # all save at the same place
            due, self.stopping = distributed.any_of(due), distributed.any_of(self.stopping)
        if due or self.stopping:
            self.save()
        if self.stopping:
            raise Interrupted(f"stopped after a checkpoint; the same command continues {self.folder}")

    def save(self, *, finished: bool = False) -> None:
        """Write a checkpoint; `finished`: the stage at `path` is over."""
        self.counters["seconds"], self._clock = self.seconds(), time.perf_counter()
        self.counters["saves"] += 1
        self.checkpoints.write(self.counters["saves"], resume.snapshot(self, finished=finished))
        self.keep_recipe(saved=True)
        distributed.gather(None)  # no process goes on before all have written: their newest are never two apart
        self._saved_at = time.perf_counter()

    def keep_recipe(self, *, saved: bool = False) -> None:
        """Write recipe.yaml; a changed one when the first checkpoint that was made with it is there."""
        if not self._recipe_kept and (saved or self._resume is None or self._resume["recipe"] == self.recipe_text):
            write_atomically(self.folder.recipe, self.recipe_text)
            self._recipe_kept = True

    def restore(self) -> bool:
        """Go on from the newest whole checkpoint, if there is one."""
        newest = common_newest(self.checkpoints)
        if newest is None:
            return False
        self._resume = resume.restore(self, newest[1])
        write_json(self.folder.stages, self.records)
        return True

    def save_best(self, outcome: Evaluation) -> None:
        """Keep the policy beside the newest checkpoints if it is the best so far on the learning curve."""
        value = outcome.success if outcome.told else float(np.mean(outcome.returns))
        if self.best is None or value > self.best["value"]:
            self.best = {"value": value, "told": outcome.told, "decisions": self.counters["decisions"]}
            if not distributed.rank():
                save(self.folder.best, resume.weights(self))

    # --- running -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run all stages that are not done yet."""
        if self._resume is None:
            self._check_stages()
        if self.left_out:
            self.logger.message(f"{self.left_out} initial states are left out: the policy cannot read them")
        for path, stage in walk(self.stages):
            resumed = self._resume
            if resumed is not None and (path < self.path or (path == self.path and resumed["finished"])):
                continue
            if resumed is None or path != self.path:  # a fresh stage; else: continue inside it
                self._resume = None
                self.path, self.progress, self.generators = path, stage.Progress(), {}
                self.collector = self.learner = self._objective = None
                self.tail = self.tail if stage.measures else None
                stage.prepare(self)
            else:
                self.progress = stage.Progress.of(resumed["progress"])
                for name, value in resumed["generators"].items():
                    if (restored := restored_generator(value, self.agent.device)) is not None:
                        self.generators[name] = restored
            self._run_stage(stage)

    def _check_stages(self) -> None:
        """Refuse now what the environments do not give a later stage, not when it is its turn."""
        for _, stage in walk(self.stages):
            if stage.replaces_env:
                return  # what the next ones give, nobody knows yet
            stage.check(self)

    def _run_stage(self, stage: Any) -> None:
        before = {k: self.counters[k] for k in ("decisions", "updates")} | {"seconds": self.seconds()}
        before = self.progress.before = self.progress.before or before
        self.stage_name = stage.title
        self.logger.stage_started(self.path, stage.title)
        metrics = stage.run(self) or {}
        self._resume = None
        if self.collector is not None:
            self.counters["episodes"] = self.collector.next_episode
        record = {
            "path": list(self.path),
            "word": stage.word,
            "title": stage.title,
            "decisions": self.counters["decisions"] - before["decisions"],
            "updates": self.counters["updates"] - before["updates"],
            "seconds": self.seconds() - before["seconds"],
            "metrics": metrics,
        }
        self.records.append(record)
        write_json(self.folder.stages, self.records)
        self.logger.stage_finished(record)
        if stage.extendable:
            self.tail = resume.going_on(self)
        self.save(finished=True)

    def close(self) -> None:
        """Give back environments and files."""
        self.close_pools()
        self.logger.close()
