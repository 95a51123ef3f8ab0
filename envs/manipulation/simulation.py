"""N environments of one `Task` (task.py) as arrays, stepped by an engine of `physics.py`; knows no particular one.

`serving` makes Gymnasium environments of it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np

from embodied_rft.data import Action, Space
from embodied_rft.envs.manipulation import physics as engines
from embodied_rft.envs.manipulation import rendering
from embodied_rft.envs.manipulation.task import Observation, Task
from embodied_rft.envs.serving import EnvBatch, Outcome, State
from embodied_rft.names import UserError, nearest


class Simulation(EnvBatch):
    """N environments of one task, as arrays: physics [N, S], sensors [N, M], goal [N, G].

    Args:
        task: what to simulate.
        num_envs: N.
        engine: "exact" (what N single environments compute, bit by bit) or "rollout" (`mujoco.rollout`: no Python
            between the rows, for many cores; the solver starts cold in every step). See envs/manipulation/physics.py.
        num_threads: threads of the engine; None takes one a core.
        cameras: names of `task.cameras` whose images are observed as "image/<camera>", uint8 [N, H, W, 3].
        image_size: pixels, (height, width) or one number for both; None: 128, or 320 without cameras (for people).
        fast_render: draw without shadows, reflections and multisampling: 2-20 times more frames.
        instruction: observe the task in words, as "instruction": a tuple of N strings.
    """

    arrays = ("physics", "sensors", "goal")
    batch_options = ("num_threads",)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(
        self,
        task: Task,
        *,
        num_envs: int,
        engine: str = "exact",
        num_threads: int | None = None,
        cameras: Sequence[str] = (),
        image_size: int | tuple[int, int] | None = None,
        fast_render: bool = True,
        instruction: bool = False,
    ) -> None:
        super().__init__(num_envs=num_envs)
        self.task, self.reset_options = task, task.reset_options
        self.engine = engines.make_engine(
            engine,
            task.model,
            num_envs=num_envs,
            num_substeps=task.num_substeps,
            control_spec=task.control_spec,
            num_threads=num_threads,
            settle=task.settle if task.settles else None,
        )
        physics, goal = task.start(np.random.default_rng(0), {})  # only for the shapes
        self.physics = np.zeros((num_envs, len(physics)))
        self.goal = np.zeros((num_envs, len(goal)))
        self.sensors = np.zeros((num_envs, task.model.nsensordata))
        self._view = _View(task, cameras, image_size, fast_render, instruction)
        self.action_space, self.observation_space = task.action_space, self._view.space
        self._judged: Observation | None = None  # of the state that the last step led to, until it is looked at

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """New episodes in `rows`; options as in `Task.reset_options`, for one environment or for all N."""
        given = self._options(options)
        for row in rows:
            mine = {name: value[row] for name, value in given.items()}
            self.physics[row], self.goal[row] = self.task.start(self.generators[row], mine)
        controls = self.task.start_controls(self.goal[rows])
        self.sensors[rows] = self.engine.reset(rows, self.physics[rows], controls)
        self._judged = None

    def step(self, rows: np.ndarray, actions: np.ndarray) -> Outcome:
        """One decision in `rows`, actions [K, A]."""
        if self.task.action_noise:
            actions = self._disturb(rows, actions)
        physics = self.physics[rows]
        controls = self.task.controls(physics, self.sensors[rows], self.goal[rows], actions)
        self.physics[rows], self.sensors[rows] = self.engine.step(rows, physics, controls)
        self._judged = self.task.observation(self.physics, self.sensors, self.goal)
        reward, success, terminated = self.task.judge(self._judged, self.physics, self.sensors, self.goal)
        return Outcome(reward[rows], terminated[rows], success[rows])

    def observe(self, rows: np.ndarray) -> dict[str, Any]:
        """A pure function of the state, but images: only those of `rows` are drawn, others are of before."""
        seen, self._judged = self._judged, None
        seen = self.task.observation(self.physics, self.sensors, self.goal) if seen is None else seen
        return self._view.add(seen, self, rows)

    def render(self, row: int, mode: str) -> np.ndarray | None:
        """An image [height, width, 3] uint8 from the task's default camera."""
        return self._view.frame(self, row, self.task.default_camera) if mode == "rgb_array" else None

    def _disturb(self, rows: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The actions [K, A] as the robot executes them; each row draws from its own generator."""
        noise = np.stack([self.generators[row].standard_normal(action.shape[1]) for row in rows])
        space = self.task.action_space
        return np.clip(action + self.task.action_noise * noise, space.low, space.high)

    def check_actions(self, actions: Action) -> np.ndarray:
        """The actions [N, A], clipped, in float32 or float64 as given. Raises ValueError if they cannot be executed."""
        array, space = np.asarray(actions), self.task.action_space
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
        """With the engine's warm start, where it keeps one."""
        warmstart = self.engine.get_warmstart()
        return super().get_state() | ({} if warmstart is None else {"warmstart": warmstart})

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `get_state`. Raises ValueError if it is of another task, batch size or engine."""
        super().set_state(state)
        self.engine.set_warmstart(state.get("warmstart"))
        self._judged = None

    def close(self) -> None:
        """Stop the engine's threads and free the renderer."""
        self.engine.close()
        self._view.renderer.close()

    def _options(self, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Per-reset options as arrays [N, ...]."""
        arrays = {}
        for name, value in options.items():
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
                rows, shape = np.arange(simulation.num_envs), self.space[key].shape
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
