"""Fetch Reach, Push, Slide and PickAndPlace as batches: gymnasium-robotics' tasks and model files, equal step by step.

Tasks: Plappert et al. 2018, "Multi-Goal Reinforcement Learning: Challenging Robotics Environments and Request for
Research", arXiv:1802.09464. The rules here restate `gymnasium_robotics.envs.fetch`; tests/envs/test_fetch.py compares
them.

Shapes: K environments. Model layout: qpos/qvel 0-2 base slides, 3 torso, 4-5 head, 6-12 arm, 13 right and 14 left
finger, then the object (free joint: qpos 15-21, qvel 15-20). The arm follows a mocap body that is welded to the
gripper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces

from embodied_rft.envs.manipulation import physics as engines
from embodied_rft.envs.manipulation.simulation import Simulation
from embodied_rft.envs.manipulation.task import Camera, Observation, Task
from embodied_rft.names import UserError, nearest

NUM_SUBSTEPS = 20
STEP = 0.04  # seconds in one decision: 20 substeps of 2 ms; velocities are observed as displacement in one decision
ARM_JOINTS = (
    "shoulder_pan",
    "shoulder_lift",
    "upperarm_roll",
    "elbow_flex",
    "forearm_roll",
    "wrist_flex",
    "wrist_roll",
)
ARM_AXES = "zyxyxyx"  # rotation axis of each arm joint in its body's frame
QPOS, ARM_QVEL, SLIDE_QVEL = 1, slice(6, 13), slice(0, 4)  # time comes first in a physics row
FINGERS = slice(13, 15)
CLOSE_TO_ZERO = np.finfo(np.float64).eps * 4


@dataclass(frozen=True, slots=True)
class FetchVariant:
    """What differs between the four tasks. Lengths in metres."""

    model: str  # file of gymnasium-robotics
    instruction: str
    base: tuple[float, float, float]  # where the robot stands
    has_object: bool = True
    block_gripper: bool = True  # fingers are shut and the fourth action does nothing
    extra_height: float = 0.0  # of the gripper at the start
    in_the_air: bool = False  # half of the targets are up to 0.45 above the table
    target_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    object_range: float = 0.15  # the object starts at most this far from the gripper in x and y, at least 0.1 in all
    target_range: float = 0.15
    look: tuple[float, float, float] = (1.3, 0.75, 0.5)  # where the cameras point: the middle of what is worked on
    view: float = 1.3  # of the cameras from there
    marker: float | None = None  # radius of the drawn goal; None: as officially, a dot


VARIANTS = {
    "Reach": FetchVariant(
        "reach.xml",
        "move the gripper to the target",
        (0.4049, 0.48, 0.0),
        has_object=False,
        extra_height=0.2,
        look=(1.34, 0.75, 0.53),
        view=0.65,
        marker=0.045,  # nearly the tolerance: what is to be touched can be seen
    ),
    "Push": FetchVariant("push.xml", "push the block to the target", (0.405, 0.48, 0.0)),
    "Slide": FetchVariant(
        "slide.xml",
        "hit the puck so that it slides to the target",
        (0.05, 0.48, 0.0),
        extra_height=-0.02,
        target_offset=(0.4, 0.0, 0.0),
        object_range=0.1,
        target_range=0.3,
        view=1.9,
    ),
    "PickAndPlace": FetchVariant(
        "pick_and_place.xml",
        "pick up the block and move it to the target",
        (0.405, 0.48, 0.0),
        block_gripper=False,
        extra_height=0.2,
        in_the_air=True,
    ),
}
THRESHOLD = 0.05  # metres: the goal is reached within this distance


@dataclass(frozen=True)
class _Scene:
    """A compiled variant, shared by all environments of a process; never modified."""

    model: mujoco.MjModel
    physics: np.ndarray  # [S] before the object is placed
    gripper: np.ndarray  # [3] where the gripper starts
    height: float  # of the object's centre on the table
    sensors: dict[str, slice]


@cache
def _scene(name: str) -> _Scene:
    """Compile the official model with our sensors and drive the arm to its start as the official environment does."""
    variant = VARIANTS[name]
    package = find_spec("gymnasium_robotics")  # only its files: importing it registers and prints what nobody asked for
    if package is None or package.origin is None:
        raise UserError("the model files of Fetch come with gymnasium-robotics: pip install gymnasium-robotics")
    spec = mujoco.MjSpec.from_file(str(Path(package.origin).parent / "envs" / "assets" / "fetch" / variant.model))
    _add_sensors(spec, variant.has_object)
    _add_wrist_camera(spec)
    if variant.marker is not None:
        spec.site("target0").size[0] = variant.marker  # sites have no physics
    model = spec.compile()
    data = mujoco.MjData(model)
    for i, value in enumerate(variant.base):
        data.joint(f"robot0:slide{i}").qpos[0] = value
    if variant.has_object:
        position = (1.7, 1.1, 0.41) if name == "Slide" else (1.25, 0.53, 0.4)
        data.joint("object0:joint").qpos[:] = (*position, 1.0, 0.0, 0.0, 0.0)
    model.eq_data[:, :7] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # weld the gripper to the mocap body without offset
    mujoco.mj_forward(model, data)
    grip = data.site("robot0:grip").xpos
    data.mocap_pos[0] = np.array([-0.498, 0.005, -0.431 + variant.extra_height]) + grip
    data.mocap_quat[0] = (1.0, 0.0, 1.0, 0.0)
    for _ in range(10):
        mujoco.mj_step(model, data, nstep=NUM_SUBSTEPS)
    physics = np.empty(mujoco.mj_stateSize(model, engines.PHYSICS))
    mujoco.mj_getState(model, data, physics, engines.PHYSICS)
    height = float(data.site("object0").xpos[2]) if variant.has_object else 0.0
    return _Scene(model, physics, data.site("robot0:grip").xpos.copy(), height, engines.sensor_slices(model))


def _add_sensors(spec: mujoco.MjSpec, has_object: bool) -> None:
    """Readings from which the observation and the gripper's Jacobian are computed."""
    kinds, objects = mujoco.mjtSensor, mujoco.mjtObj
    axes = {"x": kinds.mjSENS_FRAMEXAXIS, "y": kinds.mjSENS_FRAMEYAXIS, "z": kinds.mjSENS_FRAMEZAXIS}

    def add(name: str, kind: Any, objtype: Any, target: str) -> None:
        spec.add_sensor(name=name, type=kind, objtype=objtype, objname=target)

    add("grip", kinds.mjSENS_FRAMEPOS, objects.mjOBJ_SITE, "robot0:grip")
    add("link", kinds.mjSENS_FRAMEPOS, objects.mjOBJ_XBODY, "robot0:gripper_link")
    add("link_quat", kinds.mjSENS_FRAMEQUAT, objects.mjOBJ_XBODY, "robot0:gripper_link")
    for joint in ARM_JOINTS:
        add(f"anchor_{joint}", kinds.mjSENS_FRAMEPOS, objects.mjOBJ_XBODY, f"robot0:{joint}_link")
    for joint, axis in zip(ARM_JOINTS, ARM_AXES, strict=True):
        add(f"axis_{joint}", axes[axis], objects.mjOBJ_XBODY, f"robot0:{joint}_link")
    if has_object:
        add("object", kinds.mjSENS_FRAMEPOS, objects.mjOBJ_SITE, "object0")
        for axis in "xyz":
            add(f"object_{axis}", axes[axis], objects.mjOBJ_SITE, "object0")


def _add_wrist_camera(spec: mujoco.MjSpec) -> None:
    """A camera on the hand that looks past the fingers (the official one sits inside the hand and sees its wall)."""
    position, target = (
        np.array([-0.06, 0.0, 0.1]),
        np.array([0.1, 0.0, 0.0]),
    )  # in the gripper's frame, x towards the fingertips
    backward = (position - target) / np.linalg.norm(position - target)
    right = np.array([0.0, -1.0, 0.0])
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, np.stack([right, np.cross(backward, right), backward], axis=1).reshape(-1))
    spec.body("robot0:gripper_link").add_camera(name="wrist", pos=position, quat=quat, fovy=75.0)


class FetchTask(Task):
    """One of the four tasks.

    The observation is a dict of float64: "observation" [25] (Reach: [10]) = gripper position 3, object position 3,
    object relative to gripper 3, finger openings 2, object rotation 3 (Euler, rad), object velocity relative to
    gripper 3, object angular velocity 3, gripper velocity 3, finger velocities 2, velocities per decision (0.04 s);
    without the object's for Reach; "achieved_goal" [3] and "desired_goal" [3]: where the object (Reach: the gripper)
    is and should be, metres.

    The action [4] is a displacement of the gripper in units of 5 cm and a change of both finger openings in units of
    1 m (1 opens, -1 shuts).

    Args:
        name: "Reach", "Push", "Slide" or "PickAndPlace".
        reward_type: "sparse" (0 within 5 cm of the goal, else -1) or "dense" (minus the distance).
    """

    action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
    num_substeps = NUM_SUBSTEPS
    control_spec = int(
        mujoco.mjtState.mjSTATE_CTRL | mujoco.mjtState.mjSTATE_MOCAP_POS | mujoco.mjtState.mjSTATE_MOCAP_QUAT
    )

    def __init__(self, name: str, *, reward_type: str = "sparse") -> None:
        if name not in VARIANTS:
            raise UserError(f"unknown Fetch task {name!r}; {nearest(name, VARIANTS)}")
        if reward_type not in ("sparse", "dense"):
            raise UserError(f"unknown reward_type {reward_type!r}; {nearest(reward_type, ('sparse', 'dense'))}")
        self.name, self.variant, self.scene, self.reward_type = name, VARIANTS[name], _scene(name), reward_type
        self.model, self.instruction = self.scene.model, self.variant.instruction
        self.settles = self.variant.block_gripper
        self.cameras = {
            "front": Camera(lookat=self.variant.look, distance=self.variant.view, azimuth=155.0, elevation=-25.0),
            "side": Camera(lookat=self.variant.look, distance=self.variant.view, azimuth=90.0, elevation=-15.0),
            "wrist": Camera(name="wrist"),
            "overview": Camera(lookat=(1.3, 0.75, 0.55), distance=2.5, azimuth=132.0, elevation=-14.0),  # as officially
        }
        self.reset_options = {"goal": (3,), "object_xy": (2,)} if self.variant.has_object else {"goal": (3,)}
        self._target = self.model.site("target0").id
        layout = self.scene.sensors
        self._grip, self._link, self._quat = layout["grip"], layout["link"], layout["link_quat"]
        self._anchors = slice(layout[f"anchor_{ARM_JOINTS[0]}"].start, layout[f"anchor_{ARM_JOINTS[-1]}"].stop)
        self._axes = slice(layout[f"axis_{ARM_JOINTS[0]}"].start, layout[f"axis_{ARM_JOINTS[-1]}"].stop)
        self._qpos = slice(QPOS, QPOS + self.model.nq)
        self._qvel = slice(QPOS + self.model.nq, QPOS + self.model.nq + self.model.nv)

        def unbounded(size: int) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, (size,), np.float64)

        size = 25 if self.variant.has_object else 10
        self.observation_space = spaces.Dict(
            observation=unbounded(size), achieved_goal=unbounded(3), desired_goal=unbounded(3)
        )

    @staticmethod
    def describe(name: str) -> str:
        """One line about a task."""
        return f"Fetch arm: {VARIANTS[name].instruction} (Plappert et al. 2018)"

    def start(self, rng: np.random.Generator, options: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Draw object position, then goal: numbers in the order of the official environment."""
        variant, scene = self.variant, self.scene
        physics = scene.physics.copy()
        if variant.has_object:
            xy = scene.gripper[:2]
            while np.linalg.norm(xy - scene.gripper[:2]) < 0.1:
                xy = scene.gripper[:2] + rng.uniform(-variant.object_range, variant.object_range, size=2)
            physics[QPOS + 15 : QPOS + 17] = options.get("object_xy", xy)
        goal = scene.gripper + rng.uniform(-variant.target_range, variant.target_range, size=3)
        if variant.has_object:
            goal += np.asarray(variant.target_offset)
            goal[2] = scene.height
            if variant.in_the_air and rng.uniform() < 0.5:
                goal[2] += rng.uniform(0, 0.45)
        return physics, np.array(options.get("goal", goal))

    def controls(self, physics: np.ndarray, sensors: np.ndarray, goal: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Finger targets relative to where the fingers are, and a mocap pose relative to where the gripper is."""
        num_fingers = self.model.nu  # 2, or none where the gripper is blocked
        controls = np.empty((len(action), num_fingers + 7))
        if num_fingers:  # actuators: left, right; joints: right, left
            controls[:, 0:2] = physics[:, [QPOS + 14, QPOS + 13]] + action[:, 3:4]
        controls[:, num_fingers : num_fingers + 3] = sensors[:, self._link] + action[:, :3] * action.dtype.type(0.05)
        controls[:, num_fingers + 3 :] = sensors[:, self._quat]
        # the official environment adds (1, 0, 1, 0), unnormalised
        controls[:, [num_fingers + 3, num_fingers + 5]] += 1.0
        return controls

    def settle(self, physics: np.ndarray) -> None:
        """Shut the fingers (only where the gripper is blocked)."""
        physics[:, QPOS + 13 : QPOS + 15] = 0.0

    def observation(self, physics: np.ndarray, sensors: np.ndarray, goal: np.ndarray) -> Observation:
        """See the class. As officially, positions lag by one substep; velocity is lagged Jacobian times final qvel."""
        qpos, qvel = physics[:, self._qpos], physics[:, self._qvel]
        grip = sensors[:, self._grip]
        grip_velocity = self._grip_velocity(sensors, qvel) * STEP
        out = np.empty((len(physics), self.observation_space["observation"].shape[0]))  # type: ignore[index]
        out[:, 0:3] = grip
        if self.variant.has_object:
            objects = self.scene.sensors
            position = sensors[:, objects["object"]]
            x, y, z = (sensors[:, objects[f"object_{axis}"]] for axis in "xyz")
            out[:, 3:6], out[:, 6:9], out[:, 9:11] = position, position - grip, qpos[:, FINGERS]
            _euler(x, y, z, out[:, 11:14])
            out[:, 14:17] = qvel[:, 15:18] * STEP - grip_velocity
            spin = x * qvel[:, 18:19] + y * qvel[:, 19:20] + z * qvel[:, 20:21]
            out[:, 17:20], out[:, 20:23], out[:, 23:25] = spin * STEP, grip_velocity, qvel[:, FINGERS] * STEP
        else:
            position = grip
            out[:, 3:5], out[:, 5:8], out[:, 8:10] = qpos[:, FINGERS], grip_velocity, qvel[:, FINGERS] * STEP
        return {"observation": out, "achieved_goal": position.copy(), "desired_goal": goal.copy()}

    def _grip_velocity(self, sensors: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Velocity [K, 3] of the grip site, m/s: sum over joints of axis x (grip - anchor) times joint velocity."""
        axes = sensors[:, self._axes].reshape(-1, 7, 3)
        arms = sensors[:, None, self._grip] - sensors[:, self._anchors].reshape(-1, 7, 3)
        rate = qvel[:, ARM_QVEL]
        velocity = np.empty((len(sensors), 3))
        for i, (j, k) in enumerate(((1, 2), (2, 0), (0, 1))):
            terms = (axes[:, :, j] * arms[:, :, k] - axes[:, :, k] * arms[:, :, j]) * rate
            velocity[:, i] = terms.sum(axis=1)
        velocity += qvel[:, 0:3]  # the base slides along x, y, z ...
        velocity[:, 2] += qvel[:, 3]  # ... and the torso along z
        return velocity

    def judge(
        self, observation: Observation, physics: np.ndarray, sensors: np.ndarray, goal: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reward and success from the distance to the goal; an episode never terminates."""
        achieved, desired = observation["achieved_goal"], observation["desired_goal"]
        success = goal_distance(achieved, desired) < THRESHOLD
        return self.compute_reward(achieved, desired), success, np.zeros(len(goal), dtype=bool)

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray) -> np.ndarray:
        """The reward of reaching `achieved` [..., 3] when `desired` [..., 3] was wanted."""
        distance = goal_distance(achieved, desired)
        if self.reward_type == "sparse":
            return -(distance > THRESHOLD).astype(np.float32)
        return -distance

    def place(self, data: mujoco.MjData, physics: np.ndarray, goal: np.ndarray) -> None:
        """As in `Task`, with the red marker at the goal."""
        super().place(data, physics, goal)
        data.site_xpos[self._target] = goal


def goal_distance(achieved: np.ndarray, desired: np.ndarray) -> np.ndarray:
    """Euclidean distance [...] between points [..., 3], metres."""
    return np.linalg.norm(np.asarray(achieved) - np.asarray(desired), axis=-1)


def _euler(x: np.ndarray, y: np.ndarray, z: np.ndarray, out: np.ndarray) -> None:
    """Rotation matrices with columns x, y, z [K, 3] to Euler angles [K, 3], the convention of gymnasium-robotics."""
    cosine = np.sqrt(z[:, 2] * z[:, 2] + z[:, 1] * z[:, 1])
    regular = cosine > CLOSE_TO_ZERO
    out[:, 2] = np.where(regular, -np.arctan2(y[:, 0], x[:, 0]), -np.arctan2(-x[:, 1], y[:, 1]))
    out[:, 1] = -np.arctan2(-z[:, 0], cosine)
    out[:, 0] = np.where(regular, -np.arctan2(z[:, 1], z[:, 2]), 0.0)


class FetchSimulation(Simulation):
    """N Fetch environments, with what hindsight relabelling and `erft eval --official` ask of them."""

    task: FetchTask

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: object) -> np.ndarray:
        """The reward for other goals, [...] for points [..., 3]; `info` is not used."""
        return self.task.compute_reward(achieved_goal, desired_goal)

    @property
    def official_id(self) -> str:
        """What this reproduces."""
        return f"gymnasium_robotics:Fetch{self.task.name}-v4"
