"""The stage `sb3`: stable-baselines3 trains its own SAC, TD3 or PPO on the run's environment, for comparison.

Only measuring is ours: the same held-out initial states, logs and report. The session's agent is left as it is; to go
on with the model, name its zip in an agent `{id: sb3, path: ...}`. SB3 cannot continue inside a run, so a run that was
stopped in this stage starts the stage again from the same seed.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gymnasium import spaces
from pydantic.dataclasses import dataclass

from embodied_rft.data import Decisions, Space, Tree
from embodied_rft.experience.schedule import Act
from embodied_rft.names import UserError
from embodied_rft.options import STRICT
from embodied_rft.pools.making import find_spec, make_single
from embodied_rft.pools.protocol import flatten_space
from embodied_rft.registry import register
from embodied_rft.runs.progress import Progress
from embodied_rft.runs.session import Interrupted, Session
from embodied_rft.seeding import training_seed
from embodied_rft.stages.base import Stage

if TYPE_CHECKING:  # imported only where it is used
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

GOAL_KEYS = {"observation", "achieved_goal", "desired_goal"}


@plain_dataclass(kw_only=True)
class SB3Progress(Progress):
    """How far an `sb3` is: it has begun, or not."""

    saved: bool = False  # the state from which a stopped run starts it again


@register("stage", "sb3")
class SB3Stage(Stage):
    """Train a stable-baselines3 model for a number of decisions, or until a time or a success rate is reached."""

    Progress = SB3Progress

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """Which algorithm, how long, and what differs from SB3's defaults."""

        algorithm: Literal["SAC", "TD3", "PPO"] = "SAC"  # of stable-baselines3
        decisions: int = 100_000  # of experience, in all
        max_seconds: float | None = None  # wall time of learning, evaluation not counted
        until: float | None = None  # success on the curve at which to stop
        num_envs: int = 1  # stepped one after the other, as SB3's DummyVecEnv does
        hindsight: bool | None = None  # HER; None: for SAC and TD3 on goal environments
        options: dict[str, Any] = field(default_factory=dict)  # of the algorithm's constructor: {gamma: 0.98}
        evaluate_every: int = 10_000  # decisions
        evaluate_episodes: int = 100  # of a point of the learning curve
        sheet: int = 1  # learning curves use sheet 1, final numbers sheet 0

        def __post_init__(self) -> None:
            if self.hindsight is not None and self.algorithm == "PPO":
                raise UserError(
                    f"hindsight {self.hindsight} has no effect with PPO, which replays nothing: leave it out"
                )

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"sb3: {self.config.algorithm}"

    def check(self, session: Session) -> None:
        """Whether there are goals, if hindsight is asked for."""
        uses_hindsight(self.config, session.step_pool("training").observation_space)

    def run(self, session: Session) -> dict[str, Any]:
        """Train, measure along the way, save the zip into the run folder."""
        from stable_baselines3.common.env_util import make_vec_env

        config = self.config
        progress = session.progress_as(SB3Progress)
        if not progress.saved:  # where a stopped run takes up again: the start of this stage
            progress.saved = True
            session.save()
        spec, options, wrappers = find_spec(session.env.id), dict(session.env.options), session.env.wrappers
        seed = training_seed(session.recipe.seed, 0, 0) % (2**31 - config.num_envs)
        try:
            single = functools.partial(make_single, spec, options=options, wrappers=wrappers)
            env = make_vec_env(single, n_envs=config.num_envs, seed=seed)
        except ValueError as error:
            raise UserError(
                f"the stage sb3 runs single environments, and {spec.id!r} as a single one refused {options}: {error}"
            ) from error
        try:
            model = make_model(config, env, seed=seed, max_episode_steps=spec.max_episode_steps or 1000)
            watch = _make_watch(self, session, model)
            model.learn(config.decisions, callback=watch)
            watch.finish()
        finally:
            env.close()
        path = session.folder.models / f"{'-'.join(map(str, self.path))}.zip"
        save_model(model, path)
        return {
            "success": watch.success,
            "hindsight": uses_hindsight(config, env.observation_space),
            "model": str(path),
        }


def uses_hindsight(config: SB3Stage.Config, space: Space) -> bool:
    """Whether HER relabels this run: asked for, or an off-policy algorithm on a goal environment."""
    goals = isinstance(space, spaces.Dict) and set(space.spaces) >= GOAL_KEYS
    if config.hindsight is not None and not goals:
        raise UserError(
            f"hindsight {config.hindsight} has no effect without goals: an observation with {sorted(GOAL_KEYS)} is "
            f"expected, given {space}"
        )
    return (goals and config.algorithm != "PPO") if config.hindsight is None else config.hindsight


def make_model(config: SB3Stage.Config, env: VecEnv, *, seed: int, max_episode_steps: int) -> BaseAlgorithm:
    """The untrained model: SB3's defaults, one update for each decision, what `options` says on top."""
    import stable_baselines3

    leaves = flatten_space(env.observation_space)
    if any(isinstance(leaf, spaces.Text) for leaf in leaves.values()):
        raise UserError(f"stable-baselines3 reads no text, but this environment observes {sorted(leaves)}")
    options: dict[str, Any] = {"seed": seed, "device": "cpu", "verbose": 0}
    if config.algorithm != "PPO":
        # As many updates as decisions with any num_envs; HER needs whole episodes before the first of them.
        options |= {"gradient_steps": -1, "learning_starts": max(100, 2 * config.num_envs * max_episode_steps)}
        options["buffer_size"] = max(1, min(1_000_000, config.decisions))
    if uses_hindsight(config, env.observation_space):
        options["replay_buffer_class"] = stable_baselines3.HerReplayBuffer
    dictionary = isinstance(env.observation_space, spaces.Dict)
    image = any(len(leaf.shape or ()) == 3 for leaf in leaves.values())
    policy = "MultiInputPolicy" if dictionary else "CnnPolicy" if image else "MlpPolicy"
    try:
        model: BaseAlgorithm = getattr(stable_baselines3, config.algorithm)(policy, env, **(options | config.options))
        return model
    except TypeError as error:
        raise UserError(f"SB3's {config.algorithm} refused the options {config.options}: {error}") from error


def greedy_act(model: BaseAlgorithm) -> Act:
    """`act(observation tree) -> Decisions` of the model's deterministic actions."""
    dictionary = isinstance(model.observation_space, spaces.Dict)

    def act(observation: Tree) -> Decisions:
        action, _ = model.predict(dict(observation) if dictionary else observation["observation"], deterministic=True)
        return Decisions(action, np.zeros((len(action), 1), dtype=np.float32))

    return act


def save_model(model: BaseAlgorithm, path: Path) -> None:
    """Write the zip so that a crash leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    model.save(unfinished)
    os.replace(unfinished, path)


def _make_watch(stage: SB3Stage, session: Session, model: BaseAlgorithm) -> Any:
    """SB3's callback: learning curve, progress bar, limits, Ctrl-C. A function, so that SB3 is imported only here."""
    from stable_baselines3.common.callbacks import BaseCallback

    config = stage.config
    decisions, updates = session.counters["decisions"], session.counters["updates"]

    class Watch(BaseCallback):
        """Measures every `evaluate_every` decisions; `success` is the latest point of the curve."""

        success: float | None = None
        measured_at = 0  # decisions
        measured_model = -1  # updates
        seconds = 0.0  # of learning

        def _on_training_start(self) -> None:
            self.resumed = time.perf_counter()

        def _on_rollout_start(self) -> None:  # here the updates of all decisions so far are done
            if self.num_timesteps - self.measured_at >= config.evaluate_every:
                self.measure()

        def _on_step(self) -> bool:
            if session.stopping:
                raise Interrupted(f"stopped; the same command starts this stage of {session.folder} again")
            learning = self.seconds + time.perf_counter() - self.resumed
            slow = config.max_seconds is not None and learning >= config.max_seconds
            reached = config.until is not None and self.success is not None and self.success >= config.until
            return not (slow or reached)

        def measure(self) -> None:
            self.seconds += time.perf_counter() - self.resumed
            self.measured_at, self.measured_model = self.num_timesteps, model._n_updates
            session.counters["decisions"] = decisions + self.num_timesteps
            session.counters["updates"] = updates + int(model._n_updates)
            name = f"sb3 {config.algorithm}"
            outcome = session.evaluate(config.evaluate_episodes, sheet=config.sheet, name=name, act=greedy_act(model))
            if outcome.told or config.until is not None:
                self.success = outcome.require_success("until")
            self.resumed = time.perf_counter()

        def finish(self) -> None:
            """The last point of the curve, unless it is there already."""
            if self.measured_model != model._n_updates:
                self.measure()

    return Watch()
