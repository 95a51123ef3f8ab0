"""A run: the folder, the state that stages share, and how it survives `kill -9`.

A `Session` owns agent, buffer, learner, collector, random generators, counters and logs. Stages change them; the
session saves them. A checkpoint holds everything from which the future of the run follows, so a run that was killed
and started again ends with the same bits as one that was not. Structure (which networks exist) is never stored: it
follows from the recipe, by `prepare` of every stage up to the current one; only weights and numbers are loaded into
it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied_rft import distributed, registry
from embodied_rft.agent import Agent, Spaces, build_agent
from embodied_rft.buffer import Buffer, Schema
from embodied_rft.checkpoint import Checkpoints, RunLock
from embodied_rft.chunking import QueuedPool, chunk_of, chunk_trajectories, find_planner, fit_pool
from embodied_rft.collect import Act, Collector, action_field
from embodied_rft.config import (
    Recipe,
    StageSpec,
    dump_recipe,
    parse_stages,
    recipe_difference,
    validate_plugin_config,
    write_atomically,
)
from embodied_rft.data import Decisions, Source, Trajectory, Tree
from embodied_rft.evaluate import Evaluation, evaluate, evaluation_seeds
from embodied_rft.learner import Learner, LearnerConfig
from embodied_rft.log import LogConfig, Logger, write_json
from embodied_rft.plans import Fresh
from embodied_rft.pool import Pool, Purpose, make_pool
from embodied_rft.seeding import spawn_generator

Path_ = tuple[int, ...]


class Interrupted(KeyboardInterrupt):
    """The run was stopped on request, after a checkpoint: the same command continues it."""


class Session:
    """The state of a run. Stages use its parts; see `stages` for how."""

    def __init__(self, recipe: Recipe, folder: Path, *, quiet: bool = False) -> None:
        self.recipe, self.folder = recipe, Path(folder)
        self.env = recipe.env  # as it is now: a stage may change its options
        self.stages = parse_stages(recipe.stages)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=2)
        self.logger = Logger(self.folder, recipe.logging, quiet=quiet)
        self.counters: dict[str, Any] = {"decisions": 0, "updates": 0, "episodes": 0, "seconds": 0.0, "saves": 0}
        self.records: list[dict[str, Any]] = []  # one for each finished stage
        self.path: Path_ = ()  # of the running stage
        self.progress: dict[str, Any] = {}  # how far the running stage is: what it needs to go on
        self.generators: dict[str, np.random.Generator | torch.Generator] = {}
        self.stopping = False
        self._resume: dict[str, Any] | None = None
        self._pools: dict[str, Pool] = {}  # of single steps, as the environment offers them
        self._fitted: dict[str, Pool] = {}  # as the current policy acts: in steps, in chunks, or along a plan
        self._buffer: Buffer | None = None
        self.collector: Collector | None = None
        self.learner: Learner | None = None
        self.objective: Any = None
        self._clock = self._saved_at = time.perf_counter()
        pool = fit_pool(self.step_pool("training"), recipe.agent)
        self.agent: Agent = build_agent(
            recipe.agent, pool.observation_space, pool.action_space, rng=self.generator("agent")
        )

    # --- parts ---------------------------------------------------------------------------------------------------

    def step_pool(self, purpose: Purpose) -> Pool:
        """The environments for "training" or "evaluation", one decision a step; made once."""
        if purpose not in self._pools:
            env = self.env
            num_envs = env.num_envs if purpose == "evaluation" else distributed.share(env.num_envs, "env.num_envs")
            self._pools[purpose] = make_pool(
                env.id,
                num_envs=num_envs,
                options=env.options,
                kind=env.pool,
                num_workers=env.num_workers,
                purpose=purpose,
            )
        return self._pools[purpose]

    def pool(self, purpose: Purpose) -> Pool:
        """The environments as the current policy acts in them."""
        if purpose not in self._fitted:
            self._fitted[purpose] = self.fit(self.step_pool(purpose))
        return self._fitted[purpose]

    def fit(self, pool: Pool) -> Pool:
        """A pool of single steps as one of the current policy's decisions: steps, chunks, or steps along a plan."""
        planner = find_planner(self.agent.policy)
        if planner is None:
            return fit_pool(pool, self.agent.policy.spec)
        return QueuedPool(pool, planner)

    def generator(self, name: str) -> torch.Generator:
        """The torch generator `name` of the running stage; its seed depends on run, stage, name and process alone."""
        if name not in self.generators:
            seed = spawn_generator(self.recipe.seed, *self.path, *distributed.seed_key(name)).integers(2**62)
            self.generators[name] = torch.Generator().manual_seed(int(seed))
        return self.generators[name]  # type: ignore[return-value]

    def numpy_generator(self, name: str) -> np.random.Generator:
        """The NumPy generator `name` of the running stage."""
        if name not in self.generators:
            self.generators[name] = spawn_generator(self.recipe.seed, *self.path, *distributed.seed_key(name))
        return self.generators[name]  # type: ignore[return-value]

    @property
    def buffer(self) -> Buffer:
        """The one buffer; announced and made when a stage first needs it."""
        if self._buffer is None:
            schema, capacity = self.schema(), self.recipe.buffer.capacity
            self.logger.message(Buffer.announce(schema, capacity))
            self._buffer = Buffer(schema, capacity)
        return self._buffer

    def schema(self) -> Schema:
        """The columns that this environment and this policy need."""
        pool, policy = self.pool("training"), self.agent.policy
        return Schema(
            observation=dict(pool.fields),
            action=action_field(pool.action_space),
            trace=dict(policy.trace_fields),
            units=policy.num_units,
            rewards=("env", "success") if self.recipe.buffer.success else ("env",),
        )

    def replace_policy(self, policy: Any) -> None:
        """Another policy on the same experience: rows are carried over, their traces recomputed for the new policy.

        Single steps become chunks for a policy that takes chunks, and keys that are no longer observed are left out.
        What the new policy cannot read (chunks as single steps, keys that nobody recorded) is dropped.
        """
        old_schema, old_chunk = self.schema(), chunk_of(self.agent.policy.spec)
        self.agent.policy = policy
        self._fitted.clear()
        schema = self._new_schema()
        if self._buffer is None or schema == old_schema:
            return
        old, self._buffer = self._buffer, None
        recorded = all(old_schema.observation.get(key) == field for key, field in schema.observation.items())
        if not recorded or (old_chunk is not None and schema.action != old_schema.action):
            self.logger.message("decisions are different now: the experience so far is dropped")
            return
        keys, cut = schema.observation.keys(), None if old_chunk is not None else chunk_of(policy.spec)
        for each in old.trajectories():
            log_prob = each.log_prob if schema.units == old_schema.units else None  # else unknown now
            each = replace(each, observation={k: each.observation[k] for k in keys}, log_prob=log_prob)
            self.add_trajectories([each], chunk=cut)
        if old.num_pinned:
            self.buffer.pin()

    def replace_env(self, options: dict[str, Any]) -> None:
        """The environments from here on have these options, too; experience that lacks what they show is dropped."""
        old_schema = self.schema()
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._fitted.clear()
        self.env = replace(self.env, options={**self.env.options, **options})
        if self._new_schema() != old_schema and self._buffer is not None:
            self._buffer = None
            self.logger.message("observations are different now: the experience so far is dropped")

    def _new_schema(self) -> Schema:
        """The columns, after telling the agent that environments or policy are others now."""
        pool = self.pool("training")
        self.agent.spaces = Spaces(pool.observation_space, pool.action_space)
        return self.schema()

    def add_trajectories(self, trajectories: Iterable[Trajectory], *, chunk: tuple[int, int] | None) -> None:
        """Whole episodes into the buffer, as the current policy's decisions.

        Args:
            trajectories: of decisions, or of single steps.
            chunk: (horizon, execute) of the chunks that single steps are to be cut into.
        """
        for one in trajectories:
            if "success" in self.schema().rewards and "success" not in one.rewards:
                raise ValueError(
                    "an episode does not say whether it succeeded, but buffer.success asks for it: write it again with "
                    "`erft demos`, or give its trajectories a reward stream 'success'"
                )
            for each in [one] if chunk is None else chunk_trajectories([one], horizon=chunk[0], execute=chunk[1]):
                self.buffer.add_trajectory(each, retrace=getattr(self.agent.policy, "retrace", None))

    def make_objective(self, spec: dict[str, Any]) -> Any:
        """The objective {"id": ..., options} that a stage names, with its networks set up on the agent."""
        options = dict(spec)
        id = options.pop("id")
        config = validate_plugin_config("objective", id, options)
        self.objective = registry.find("objective", id)(config)
        self.objective.setup(self.agent, self.generator("setup"))
        if distributed.size() > 1 and isinstance(reading := self.objective.reading, Fresh):
            batch_size = distributed.share(reading.batch_size, "objective.batch_size")
            self.objective.reading = replace(reading, batch_size=batch_size)
        return self.objective

    def make_learner(self, config: LearnerConfig) -> Learner:
        """The learner of the running stage for the current objective, restored if the stage is being resumed."""
        distributed.equalize(self.agent.state_dict().values())
        self.learner = Learner(self.agent, self.objective, config)
        if self._resume is not None and self._resume["learner"] is not None:
            self.learner.load_state_dict(self._resume["learner"])
        return self.learner

    def make_collector(
        self, *, group_size: int = 1, source: Source = Source.ONLINE, pool: Pool | None = None
    ) -> Collector:
        """The collector of the running stage, restored if it is being resumed; `pool`: not as the policy acts."""
        self.collector = Collector(
            pool or self.pool("training"),
            run_seed=self.recipe.seed,
            first_episode=self.counters["episodes"],
            group_size=group_size,
            source=source,
        )
        if self._resume is not None and self._resume["collector"] is not None:
            self.collector.load_state_dict(self._resume["collector"])
        return self.collector

    def actor(self, *, greedy: bool = False, rng: str = "act") -> Act:
        """How the agent acts: greedily, or exploring as the objective (else the policy) says."""
        generator, policy = self.generator(rng), self.agent.policy
        explore = None if greedy else getattr(self.objective, "explore", None)

        def act(observation: Tree) -> Decisions:
            if explore is not None:
                return explore(self.agent, observation, rng=generator)
            return policy.act(observation, greedy=greedy, rng=generator)

        return act

    # --- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, episodes: int, *, sheet: int, name: str, act: Act | None = None) -> Evaluation:
        """Greedy success on the first `episodes` states of a sheet, written to `evaluations/` and the log."""
        seeds = evaluation_seeds(episodes, sheet=sheet)
        with self.logger.progress(f"evaluate {name}", episodes) as bar:
            outcome = evaluate(
                act or self.actor(greedy=True, rng="evaluate"),
                self.pool("evaluation"),
                seeds,
                name=name,
                progress=lambda ended, won: bar.update(ended, success=won / max(ended, 1)),
            )
        slug = "-".join(str(i) for i in self.path) + f"-{self.progress.get('evaluations', 0)}"
        self.progress["evaluations"] = self.progress.get("evaluations", 0) + 1
        content = outcome.to_json() | {"stage": list(self.path), "sheet": sheet}
        content |= {"decisions": self.counters["decisions"], "wall_seconds": self.seconds()}
        write_json(self.folder / "evaluations" / f"{slug}.json", content)
        self.log({f"evaluate/{key}": content[key] for key in ("success", "low", "high", "mean_return")}, name=name)
        return outcome

    # --- logs and clocks -----------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Wall time that this run has used so far, over all its restarts."""
        return self.counters["seconds"] + time.perf_counter() - self._clock

    def log(self, metrics: dict[str, float], **labels: str) -> None:
        """One line in every log."""
        self.logger.log(
            metrics,
            stage=list(self.path),
            decisions=self.counters["decisions"],
            updates=self.counters["updates"],
            seconds=self.seconds(),
            **labels,
        )

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
        state = {
            "format": 1,
            "processes": distributed.size(),
            "recipe": dump_recipe(self.recipe),
            "path": list(self.path),
            "finished": finished,
            "progress": self.progress,
            "counters": self.counters,
            "records": self.records,
            "agent": self.agent.finite_state(),
            "buffer": None if self._buffer is None else self._buffer.state_dict(),
            "learner": None if finished or self.learner is None else self.learner.state_dict(),
            "collector": None if finished or self.collector is None else self.collector.state_dict(),
            "generators": {} if finished else {k: _generator_state(g) for k, g in self.generators.items()},
            "logger": self.logger.state_dict(),
        }
        self.checkpoints.write(self.counters["saves"], state)
        distributed.gather(None)  # no process goes on before all have written: their newest are never two apart
        self._saved_at = time.perf_counter()

    def restore(self, *, weights_only: bool = False) -> bool:
        """Load the newest whole checkpoint, if there is one. `weights_only` leaves buffer and logs alone."""
        newest = distributed.newest(self.checkpoints)
        if newest is None:
            return False
        _, state = newest
        if not weights_only:
            distributed.check_size(state.get("processes", 1), self.folder)
            self._check_recipe(state["recipe"])
        target = tuple(state["path"])
        self._prepare_until(self.stages, (), target)
        try:
            self.agent.load_state_dict(state["agent"])
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint in {self.folder} holds other networks than this version makes: {error}"
            ) from None
        self.path, self.progress = target, dict(state["progress"])
        self.counters, self.records = dict(state["counters"]), list(state["records"])
        self._resume = state
        if not weights_only:
            if state["buffer"] is not None:
                self.buffer.load_state_dict(state["buffer"])
            self.logger.load_state_dict(state["logger"])
            where = "after" if state["finished"] else "in"
            self.logger.message(
                f"continuing {where} stage {'.'.join(map(str, target))}, {self.counters['decisions']} decisions in"
            )
        return True

    def _check_recipe(self, stored: str) -> None:
        """A run folder belongs to one recipe."""
        difference = recipe_difference(stored, self.recipe)
        if difference:
            raise ValueError(
                f"{self.folder} holds a run of another recipe ({'; '.join(difference[:6])}). Continue it with its own "
                "recipe, or choose another folder."
            )

    def _prepare_until(self, stages: list[StageSpec], prefix: Path_, target: Path_) -> None:
        """Make the networks of all stages up to `target`, in order, without running them."""
        for path, stage in walk(stages, prefix):
            if path > target:
                return
            self.path = path
            self.generators = {}
            stage.prepare(self)

    # --- running -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run all stages that are not done yet."""
        for path, stage in walk(self.stages, ()):
            resumed = self._resume
            if resumed is not None and (path < self.path or (path == self.path and resumed["finished"])):
                continue
            if resumed is None or path != self.path:  # a fresh stage; else: continue inside it
                self._resume = None
                self.path, self.progress, self.generators = path, {}, {}
                self.collector = self.learner = self.objective = None
                stage.prepare(self)
            else:
                for name, value in resumed["generators"].items():
                    self.generators[name] = _restored_generator(value)
            self._run_stage(stage)

    def _run_stage(self, stage: Any) -> None:
        before = {k: self.counters[k] for k in ("decisions", "updates")} | {"seconds": self.seconds()}
        before = self.progress.setdefault("before", before)
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
        write_json(self.folder / "stages.json", self.records)
        self.logger.stage_finished(record)
        self.save(finished=True)

    def close(self) -> None:
        """Give back environments and files."""
        for pool in self._pools.values():
            pool.close()
        self.logger.close()


def walk(stages: list[StageSpec], prefix: Path_) -> Iterator[tuple[Path_, Any]]:
    """All leaf stages in the order they run; a stage that holds stages says how (`expand`)."""
    for index, spec in enumerate(stages):
        path = (*prefix, index)
        stage = registry.find("stage", spec.word)(spec.config, path)
        stage.word = spec.word
        if hasattr(stage, "expand"):
            for inner_path, inner in stage.expand():
                yield from walk(inner, inner_path)
        else:
            yield path, stage


def train(recipe: Recipe, folder: str | Path, *, quiet: bool = False, report: bool = True) -> Session:
    """Run a recipe in a folder, or continue it there. Returns the closed session, its agent trained.

    Raises:
        ValueError: the folder holds a run of another recipe, or another process is working in it.
        Interrupted: Ctrl-C; the run was saved and the same call continues it.
    """
    rank = distributed.rank()
    folder = Path(folder) if not rank else Path(folder) / "ranks" / str(rank)
    folder.mkdir(parents=True, exist_ok=True)
    if rank:  # rank 0 speaks for all; the others keep only what they need to be continued
        quiet, report, recipe = True, False, replace(recipe, logging=LogConfig(console=False, csv=False))
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with RunLock(folder):
        session = Session(recipe, folder, quiet=quiet)
        try:
            session.restore()
            write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
            with stop_on_interrupt(session):
                session.run()
        finally:
            session.close()
    if report:
        from embodied_rft.report import write_report

        write_report(folder)
    return session


@contextmanager
def stop_on_interrupt(session: Session) -> Iterator[None]:
    """The first Ctrl-C asks the session to stop at the next safe point, a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: Any) -> None:
        if session.stopping:
            raise KeyboardInterrupt
        session.stopping = True
        session.logger.message(
            "stopping at the next safe point (Ctrl-C again to stop at once, losing the work since the last one)"
        )

    old = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, old)


def _generator_state(generator: np.random.Generator | torch.Generator) -> dict[str, Any]:
    if isinstance(generator, torch.Generator):
        return {"torch": generator.get_state()}
    return {"numpy": generator.bit_generator.state}


def _restored_generator(state: dict[str, Any]) -> np.random.Generator | torch.Generator:
    if "torch" in state:
        generator = torch.Generator()
        generator.set_state(state["torch"])
        return generator
    bits = np.random.PCG64()
    bits.state = state["numpy"]
    return np.random.Generator(bits)
