"""What a manipulation task is: a MuJoCo model and array functions over a batch. Knows nothing of Gymnasium's protocol.

`simulation.py` makes N environments of it. Shapes as in `physics.py`: K environments,
S physics, C control, M sensor readings, G numbers of `goal`, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gymnasium
import mujoco
import numpy as np

from embodied_rft.envs.manipulation import physics as engines

Observation = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Camera:
    """Where to look from: a camera of the model by `name`, or a free one around `lookat`.

    Camera(lookat=(1.3, 0.75, 0.55), distance=2.5, azimuth=132.0, elevation=-14.0) or Camera(name="gripper_camera_rgb").
    """

    name: str | None = None
    lookat: tuple[float, float, float] = (0.0, 0.0, 0.0)  # metres
    distance: float = 1.5  # metres
    azimuth: float = 90.0  # degrees
    elevation: float = -30.0  # degrees, negative looks down


class Task:
    """A manipulation task over a batch. Subclasses set attributes, write `start`, `controls`, `observation`, `judge`.

    The example in one line each, for a one-joint model that must reach an angle:

        class Turn(Task):
            def __init__(self):
                self.model = mujoco.MjModel.from_xml_string(XML)          # with a jointpos sensor called "angle"
                self.action_space = Box(-1, 1, (1,), np.float32)
                self.observation_space = Dict(observation=Box(-np.inf, np.inf, (2,), np.float64))
            def start(self, rng, options):
                return self.rest(), rng.uniform(-1, 1, size=1)            # physics [S], goal [G]
            def controls(self, physics, sensors, goal, action):
                return action.astype(np.float64)                          # [K, C]
            def observation(self, physics, sensors, goal):
                return {"observation": np.concatenate([sensors, goal], axis=1)}
            def judge(self, observation, physics, sensors, goal):
                success = np.abs(sensors - goal)[:, 0] < 0.05
                return success - 1.0, success, np.zeros(len(success), bool)

    `goal` holds everything that is drawn at reset and stays fixed for the episode (a target, the pose of a fixture).
    A body that differs between environments is a mocap body: put its pose into `goal`, MOCAP_POS | MOCAP_QUAT into
    `control_spec`, and write the pose in `controls`, `start_controls` and `place`.

    Functions must treat rows independently, without BLAS (`@`, `einsum`, `dot` round differently for different K), so
    that a row does not depend on the size of the batch.
    """

    model: mujoco.MjModel
    action_space: gymnasium.spaces.Box  # of one environment; actions are clipped to it
    observation_space: gymnasium.spaces.Dict  # of one environment, what `observation` gives
    num_substeps: int = 20  # physics steps in one decision
    control_spec: int = mujoco.mjtState.mjSTATE_CTRL.value  # what a row of `controls` holds, in MuJoCo's order of bits
    instruction: str = ""  # the task in words
    cameras: Mapping[str, Camera] = {}  # by the name that users give
    default_camera: str = "front"  # for `render()`
    reset_options: Mapping[str, tuple[int, ...]] = {}  # options that reset takes, and their shape for one environment
    action_noise: float = 0.0  # standard deviation of what disturbs every action before it is executed, in its units
    settles: bool = False  # whether `settle` has something to do

    def start(self, rng: np.random.Generator, options: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Draw the initial state of one environment: physics [S] and goal [G].

        `options` holds the per-reset options that were given. Draw from `rng` as usual and override afterwards, so that
        fixing one thing does not change the others.
        """
        raise NotImplementedError

    def start_controls(self, goal: np.ndarray) -> np.ndarray:
        """Controls [K, C] in force at reset, when the first readings are taken; default: those of a fresh `MjData`."""
        data = mujoco.MjData(self.model)
        row = np.empty(mujoco.mj_stateSize(self.model, self.control_spec))
        mujoco.mj_getState(self.model, data, row, self.control_spec)
        return np.tile(row, (len(goal), 1))

    def controls(self, physics: np.ndarray, sensors: np.ndarray, goal: np.ndarray, action: np.ndarray) -> np.ndarray:
        """From actions [K, A], clipped but in the caller's float dtype, to controls [K, C], held for `num_substeps`."""
        raise NotImplementedError

    def settle(self, physics: np.ndarray) -> None:
        """Change the physics [K, S] in place after the substeps; only called if `settles`."""

    def observation(self, physics: np.ndarray, sensors: np.ndarray, goal: np.ndarray) -> Observation:
        """What the policy sees, by key, each [K, ...]: fresh arrays, never views of the arguments."""
        raise NotImplementedError

    def judge(
        self, observation: Observation, physics: np.ndarray, sensors: np.ndarray, goal: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reward [K] float64, success [K] bool and terminated [K] bool of the state just reached."""
        raise NotImplementedError

    def place(self, data: mujoco.MjData, physics: np.ndarray, goal: np.ndarray) -> None:
        """Make `data` ready for drawing one state: positions of bodies, geoms, cameras, lights; then move markers."""
        mujoco.mj_setState(self.model, data, physics, engines.PHYSICS)
        mujoco.mj_kinematics(self.model, data)
        mujoco.mj_comPos(self.model, data)
        mujoco.mj_camlight(self.model, data)

    def rest(self) -> np.ndarray:
        """The model's own initial physics [S], time 0: a starting point for `start`."""
        row = np.empty(mujoco.mj_stateSize(self.model, engines.PHYSICS))
        mujoco.mj_getState(self.model, mujoco.MjData(self.model), row, engines.PHYSICS)
        return row
