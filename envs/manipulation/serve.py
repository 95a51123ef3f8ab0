"""Serves a `Task` (task.py) as `gymnasium.Env` and native `gymnasium.vector.VectorEnv`; knows no particular one.

Both forms are thin: `Simulation` holds N environments as arrays and steps them with an engine of `physics.py`. A
new task subclasses `Task`, then names two classes for `gymnasium.register`:

    class TurnEnv(ManipulationEnv):
        def __init__(self, *, difficulty=1.0, **options):
            super().__init__(TurnTask(difficulty=difficulty), **options)

    class TurnVectorEnv(ManipulationVectorEnv):
        def __init__(self, *, num_envs, difficulty=1.0, **options):
            super().__init__(TurnTask(difficulty=difficulty), num_envs=num_envs, **options)
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from embodied_rft.data import Space
from embodied_rft.envs.manipulation import physics as engines
from embodied_rft.envs.manipulation import rendering
from embodied_rft.envs.manipulation.task import Observation, Task
from embodied_rft.envs.serving import check_mask, check_render_mode, spread_seeds
from embodied_rft.names import UserError, nearest
from embodied_rft.seeding import pack_generator, unpack_generator

State = dict[str, np.ndarray]


class Simulation:
    """N environments of one task, as arrays: physics [N, S], readings [N, M], goal [N, G], elapsed [N], N generators.

    Seeds follow Gymnasium: environment i draws from `seeding.np_random(seed_i)`.
    """

    def __init__(self, task: Task, *, num_envs: int, engine: str, num_threads: int | None) -> None:
        self.task, self.num_envs = task, num_envs
        self.engine = engines.make_engine(
            engine,
            task.model,
            num_envs=num_envs,
            num_substeps=task.num_substeps,
            control_spec=task.control_spec,
            num_threads=num_threads,
            settle=task.settle if task.settles else None,
        )
        self.all_rows = np.arange(num_envs)
        self.generators: list[np.random.Generator] = [seeding.np_random(None)[0] for _ in range(num_envs)]
        physics, goal = task.start(np.random.default_rng(0), {})  # only for the shapes
        self.physics = np.zeros((num_envs, len(physics)))
        self.goal = np.zeros((num_envs, len(goal)))
        self.sensors = np.zeros((num_envs, task.model.nsensordata))
        self.elapsed = np.zeros(num_envs, dtype=np.int64)

    def reset(self, rows: np.ndarray, options: Mapping[str, Any]) -> None:
        """Start a new episode in `rows`; options as in `Task.reset_options`, for one environment or for all N."""
        given = self._options(options)
        for row in rows:
            mine = {name: value[row] for name, value in given.items()}
            self.physics[row], self.goal[row] = self.task.start(self.generators[row], mine)
        controls = self.task.start_controls(self.goal[rows])
        self.sensors[rows] = self.engine.reset(rows, self.physics[rows], controls)
        self.elapsed[rows] = 0

    def step(self, rows: np.ndarray, action: np.ndarray) -> None:
        """One decision in `rows`, actions [K, A] as `check_action` gave them."""
        if self.task.action_noise:
            action = self._disturb(rows, action)
        physics = self.physics[rows]
        controls = self.task.controls(physics, self.sensors[rows], self.goal[rows], action)
        self.physics[rows], self.sensors[rows] = self.engine.step(rows, physics, controls)
        self.elapsed[rows] += 1

    def _disturb(self, rows: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The actions [K, A] as the robot executes them; each row draws from its own generator."""
        noise = np.stack([self.generators[row].standard_normal(action.shape[1]) for row in rows])
        space = self.task.action_space
        return np.clip(action + self.task.action_noise * noise, space.low, space.high)

    def observe(self) -> Observation:
        """The observation of all N environments: a pure function of their state."""
        return self.task.observation(self.physics, self.sensors, self.goal)

    def judge(self, observation: Observation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reward, success and terminated, each [N]."""
        return self.task.judge(observation, self.physics, self.sensors, self.goal)

    def check_action(self, action: Any) -> np.ndarray:
        """The actions [N, A], clipped, in float32 or float64 as given. Raises ValueError if they cannot be executed."""
        array, space = np.asarray(action), self.task.action_space
        expected = (self.num_envs, *space.shape)
        if array.dtype.kind not in "fiu":
            raise UserError(f"actions are {array.dtype}; expected {space.dtype} numbers of shape {expected}")
        if array.shape != expected:
            raise UserError(f"actions have shape {array.shape}; expected {expected} (environments, action dimensions)")
        if array.dtype not in (np.float32, np.float64):
            array = array.astype(np.float64)
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise UserError(
                f"action of environment {row} is not finite: {array[row].tolist()}. No environment was stepped. "
                "Look for a diverged policy or a division by zero before the action."
            )
        return np.clip(array, space.low, space.high)

    def get_state(self) -> State:
        """Everything that the future depends on, as arrays with leading N; `set_state` continues bit by bit."""
        state = {
            "physics": self.physics.copy(),
            "sensors": self.sensors.copy(),
            "goal": self.goal.copy(),
            "elapsed": self.elapsed.copy(),
            "rng": np.stack([pack_generator(generator) for generator in self.generators]),
        }
        warmstart = self.engine.get_warmstart()
        return state if warmstart is None else {**state, "warmstart": warmstart}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a state of `get_state`. Raises ValueError if it is of another task, batch size or engine."""
        for name in ("physics", "sensors", "goal", "elapsed"):
            target = getattr(self, name)
            if name not in state or np.shape(state[name]) != target.shape:
                given = np.shape(state[name]) if name in state else "nothing"
                raise UserError(f"state[{name!r}] has shape {given}, expected {target.shape}: of another environment?")
        self.engine.set_warmstart(state.get("warmstart"))
        for name in ("physics", "sensors", "goal", "elapsed"):
            getattr(self, name)[:] = state[name]
        for generator, packed in zip(self.generators, state["rng"], strict=True):
            unpack_generator(generator, packed)

    def _options(self, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Per-reset options as arrays [N, ...]."""
        arrays = {}
        for name, value in options.items():
            if name not in self.task.reset_options:
                raise UserError(f"unknown reset option {name!r}; {nearest(name, self.task.reset_options)}")
            shape = self.task.reset_options[name]
            array = np.asarray(value, dtype=np.float64)
            if array.shape not in (shape, (self.num_envs, *shape)) or not np.isfinite(array).all():
                raise UserError(
                    f"reset option {name!r} has shape {array.shape}; expected finite numbers of shape {shape}, or "
                    f"one row for each of {self.num_envs} environments"
                )
            arrays[name] = np.broadcast_to(array, (self.num_envs, *shape))
        return arrays


class _View:
    """The optional parts of an observation: camera images and the instruction."""

    def __init__(
        self,
        task: Task,
        cameras: Sequence[str],
        image_size: int | tuple[int, int] | None,
        fast: bool,
        instruction: bool,
    ) -> None:
        self.task, self.cameras, self.instruction = task, tuple(cameras), instruction
        image_size = image_size or (128 if cameras else 320)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.renderer = rendering.Renderer(task.model, height=height, width=width, fast=fast)
        for name in self.cameras:
            if name not in task.cameras:
                raise UserError(f"unknown camera {name!r}; {nearest(name, task.cameras)}")
        spaces: dict[str, Space] = dict(task.observation_space.spaces)
        for name in self.cameras:
            spaces[f"image/{name}"] = gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8)
        if instruction:
            spaces["instruction"] = gymnasium.spaces.Text(max_length=256, min_length=1, charset=string.printable)
        self.space = gymnasium.spaces.Dict(spaces)
        self._latest: dict[str, np.ndarray] = {}  # images of all environments as they were last drawn

    def add(self, observation: dict[str, Any], simulation: Simulation, rows: np.ndarray) -> dict[str, Any]:
        """Put the optional keys into a batched observation; only `rows` are drawn, other images stay as they were."""
        for name in self.cameras:
            key = f"image/{name}"
            images = self._latest.get(key)
            if images is None:
                rows, shape = simulation.all_rows, self.space[key].shape
                images = self._latest[key] = np.zeros((simulation.num_envs, *(shape or ())), np.uint8)
            for row in rows:
                images[row] = self.frame(simulation, row, name)
            observation[key] = images.copy()
        if self.instruction:
            observation["instruction"] = (self.task.instruction,) * simulation.num_envs
        return observation

    def frame(self, simulation: Simulation, row: int, camera: str) -> np.ndarray:
        """One image [height, width, 3] uint8 of environment `row`."""

        def place(data: Any) -> None:
            self.task.place(data, simulation.physics[row], simulation.goal[row])

        return self.renderer.render(place, self.task.cameras[camera])


class ManipulationVectorEnv(gymnasium.vector.VectorEnv):
    """N environments of a task as one native vector environment.

    Args:
        task: what to simulate.
        num_envs: N.
        engine: "exact" (what N single environments compute, bit by bit) or "rollout" (`mujoco.rollout`: no Python
            between the rows, for many cores; the solver starts cold in every step). See envs/manipulation/physics.py.
        num_threads: threads of the engine; None takes one a core.
        autoreset_mode: NEXT_STEP (the step after an episode's end resets it: reward 0, action ignored) or DISABLED (the
            caller resets with `options={"reset_mask": mask}`).
        max_episode_steps: the time limit, in decisions; None: no limit.
        cameras: names of `task.cameras` whose images are observed as "image/<camera>", uint8 [N, H, W, 3].
        image_size: pixels, (height, width) or one number for both; None: 128, or 320 without cameras (for people).
        fast_render: draw without shadows, reflections and multisampling: 2-20 times more frames.
        instruction: observe the task in words, as "instruction": a tuple of N strings.
        render_mode: None or "rgb_array".
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012

    def __init__(
        self,
        task: Task,
        *,
        num_envs: int,
        engine: str = "exact",
        num_threads: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        cameras: Sequence[str] = (),
        image_size: int | tuple[int, int] | None = None,
        fast_render: bool = True,
        instruction: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}, expected at least 1")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            raise UserError("autoreset_mode SAME_STEP is not supported; use NEXT_STEP or DISABLED")
        self.task, self.num_envs, self.max_episode_steps = task, num_envs, max_episode_steps
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = check_render_mode(render_mode)
        self.simulation = Simulation(task, num_envs=num_envs, engine=engine, num_threads=num_threads)
        self._view = _View(task, cameras, image_size, fast_render, instruction)
        self.single_action_space = task.action_space
        self.single_observation_space = self._view.space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._done = np.zeros(num_envs, dtype=bool)
        self._started = np.zeros(num_envs, dtype=bool)
        self.skip_images = False  # True: a step draws only where an episode ends, other images are those of before

    def reset(
        self, *, seed: int | Sequence[int | None] | np.ndarray | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start new episodes everywhere, or where `options["reset_mask"]` [N] bool says.

        Args:
            seed: one for each environment, or one number s for s, s+1, ...; None goes on with the generators as they
                are.
            options: "reset_mask", and the task's own (`Task.reset_options`).
        """
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        rows = self.simulation.all_rows if mask is None else np.flatnonzero(check_mask(mask, self.num_envs))
        seeds = spread_seeds(seed, self.num_envs)
        for row in rows:
            if (one := seeds[row]) is not None:
                self.simulation.generators[row] = seeding.np_random(one)[0]
        self.simulation.reset(rows, options)
        self._done[rows], self._started[rows] = False, True
        return self._observe(rows), {}

    def step(self, actions: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One decision everywhere: observation tree, reward [N] float64, terminated, truncated [N] bool, info.

        info["is_success"] is float32 [N]; info["_is_success"] is False where the step was a reset.
        """
        if not self._started.all():
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        simulation, stepped = self.simulation, ~self._done
        action = simulation.check_action(actions)
        if stepped.all():
            simulation.step(simulation.all_rows, action)
        elif self.autoreset_mode == AutoresetMode.DISABLED:
            raise gymnasium.error.ResetNeeded(
                f"environments {np.flatnonzero(self._done).tolist()} have ended and autoreset is disabled: call "
                'reset(options={"reset_mask": mask}) for them first'
            )
        else:
            rows = np.flatnonzero(stepped)
            simulation.reset(np.flatnonzero(self._done), {})
            if len(rows):
                simulation.step(rows, action[rows])
        observation = simulation.observe()
        reward, success, terminated = simulation.judge(observation)
        terminated = terminated & stepped
        truncated = np.zeros(self.num_envs, dtype=bool)
        if self.max_episode_steps is not None:
            truncated = stepped & (simulation.elapsed >= self.max_episode_steps)
        self._done = terminated | truncated
        info = {"is_success": (success & stepped).astype(np.float32), "_is_success": stepped}
        seen = self._view.add(observation, simulation, np.flatnonzero(self._done | (not self.skip_images)))
        return seen, np.where(stepped, reward, 0.0), terminated, truncated, info

    def get_state(self) -> State:
        """All that the future depends on, as arrays with leading N."""
        return {**self.simulation.get_state(), "done": self._done.copy(), "started": self._started.copy()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Continue from `get_state()`, bit by bit; gives the observation there."""
        self.simulation.set_state(state)
        self._done, self._started = np.array(state["done"], dtype=bool), np.array(state["started"], dtype=bool)
        return self._observe(self.simulation.all_rows)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """An image [height, width, 3] uint8 of every environment."""
        if self.render_mode is None:
            return None
        return tuple(self._view.frame(self.simulation, row, self.task.default_camera) for row in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the engine's threads and free the renderer."""
        self.simulation.engine.close()
        self._view.renderer.close()

    def _observe(self, rows: np.ndarray) -> dict[str, Any]:
        return self._view.add(self.simulation.observe(), self.simulation, rows)


class ManipulationEnv(gymnasium.Env):
    """One environment of a task; arguments as in `ManipulationVectorEnv`.

    `gymnasium.make` adds the registered time limit as a wrapper; `max_episode_steps` is for those who construct
    directly.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012

    def __init__(
        self,
        task: Task,
        *,
        engine: str = "exact",
        max_episode_steps: int | None = None,
        cameras: Sequence[str] = (),
        image_size: int | tuple[int, int] | None = None,
        fast_render: bool = True,
        instruction: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.task, self.max_episode_steps = task, max_episode_steps
        self.render_mode = check_render_mode(render_mode)
        self.simulation = Simulation(task, num_envs=1, engine=engine, num_threads=1)
        self._view = _View(task, cameras, image_size, fast_render, instruction)
        self.action_space = task.action_space
        self.observation_space = self._view.space
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start a new episode; `options` are the task's own (`Task.reset_options`)."""
        super().reset(seed=seed)
        self.simulation.generators[0] = self.np_random
        self.simulation.reset(self.simulation.all_rows, options or {})
        self._started = True
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One decision; info["is_success"] is 1.0 where the task is solved at this moment."""
        if not self._started:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        array = np.asarray(action)
        if array.shape != self.action_space.shape:
            raise UserError(f"action has shape {array.shape}; expected {self.action_space.shape}")
        simulation = self.simulation
        simulation.step(simulation.all_rows, simulation.check_action(array[None]))
        observation = simulation.observe()
        reward, success, terminated = simulation.judge(observation)
        limit = self.max_episode_steps
        truncated = limit is not None and int(simulation.elapsed[0]) >= limit
        info = {"is_success": float(success[0])}
        return self._single(observation), float(reward[0]), bool(terminated[0]), truncated, info

    def get_state(self) -> State:
        """As in `ManipulationVectorEnv`, with a leading 1. The steps counted by a TimeLimit wrapper are not in it."""
        return {**self.simulation.get_state(), "started": np.array([self._started])}

    def set_state(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Continue from `get_state()`, bit by bit; gives the observation there."""
        self.simulation.generators[0] = self.np_random
        self.simulation.set_state(state)
        self._started = bool(state["started"][0])
        return self._observe()

    def render(self) -> np.ndarray | None:
        """An image [height, width, 3] uint8, or None without render_mode."""
        return self._view.frame(self.simulation, 0, self.task.default_camera) if self.render_mode else None

    def close(self) -> None:
        """Free the engine and the renderer."""
        self.simulation.engine.close()
        self._view.renderer.close()

    def _observe(self) -> dict[str, Any]:
        return self._single(self.simulation.observe())

    def _single(self, observation: dict[str, Any]) -> dict[str, Any]:
        seen = self._view.add(observation, self.simulation, self.simulation.all_rows)
        return {key: value[0] for key, value in seen.items()}
