"""`embodied_rft/PegInsert-v0`: a SCARA arm puts a square peg into a square hole whose clearance is about a millimetre.

The pose of the hole (x, y, yaw) is drawn for every episode and observed without noise; what makes the task hard is
contact and limited control precision: soft servos that lag behind, joint friction in which small commands get lost, and
an edge without chamfer on which a peg that is half a millimetre off gets stuck. Cloning blurs the small corrections.

This file holds the task and its demonstrator.
Shapes as in `task.py`: K environments, S physics (time, qpos [4], qvel [4]), goal [K, 3]: hole x, y (m), yaw.
A pose is (x, y, z, yaw) of the peg's bottom centre in the world, in metres and radians; the table is z = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mujoco
import numpy as np
from gymnasium.spaces import Box, Dict

from embodied_rft.envs.manipulation.demonstrators import Scripted
from embodied_rft.envs.manipulation.task import Camera, Observation, Task
from embodied_rft.names import UserError, nearest
from embodied_rft.registry import register

ENV_ID = "embodied_rft/PegInsert-v0"
MODEL_PATH = Path(__file__).parent / "assets" / "peg_insert.xml"

# Geometry of the model, metres.
UPPER_ARM, FOREARM = 0.25, 0.2
PEG_HALF_WIDTH = 0.01
REST_HEIGHT = 0.05  # of the peg's bottom when the lift joint is 0
HOLE_DEPTH = 0.025  # the block is that high; the table is the floor of the hole
WALL_HALF_WIDTH = 0.03

SUCCESS_DEPTH = 0.8 * HOLE_DEPTH
WORKSPACE = np.array([[0.2, -0.13, -0.02, -1.2], [0.4, 0.13, 0.1, 1.2]])  # poses that can be commanded
CENTRE = np.array([0.3, 0.0, HOLE_DEPTH, 0.0])

# What is drawn at reset: uniform within +- of these.
HOLE_RANGE = np.array([0.04, 0.04, 0.6])  # x, y (m), yaw (rad) around CENTRE
START_RANGE = np.array([0.05, 0.05, 0.015, 0.05])  # the peg, from a point 35 mm above the hole; its yaw around 0
START_HEIGHT = 0.035

ACTION_SCALE = np.array([0.0125, 0.0125, 0.0125, 0.125])  # what 1.0 commands: metres (x, y, z) and radians (yaw)
# What 1.0 means in an observation, so that all numbers are of order one.
OBSERVATION_UNITS = np.concatenate(
    [
        [0.01, 0.01, 0.01, 0.1],  # hole minus peg: x, y, z (m; z from the mouth of the hole), yaw (rad)
        [0.05, 0.05, 0.05, 0.5],  # velocity of the peg: m/s, rad/s
        [0.025, 0.025, 0.015, 0.2],  # pose of the peg relative to CENTRE
        [3.0] * 3 + [0.05] * 3,  # wrist force (N) and torque (N m), in the frame of the peg
    ]
)
SENSOR_LIMIT = 5.0  # wrist readings are cut off at +- this many units


def joints_of(pose: np.ndarray) -> np.ndarray:
    """Inverse kinematics, elbow to the right: poses [K, 4] to joints [K, 4] (shoulder, elbow, lift, wrist)."""
    x, y, z, yaw = pose.T
    cosine = (x**2 + y**2 - UPPER_ARM**2 - FOREARM**2) / (2 * UPPER_ARM * FOREARM)
    elbow = np.arccos(np.clip(cosine, -0.95, 0.95))  # away from the stretched and the folded arm
    shoulder = np.arctan2(y, x) - np.arctan2(FOREARM * np.sin(elbow), UPPER_ARM + FOREARM * np.cos(elbow))
    return np.stack([shoulder, elbow, z - REST_HEIGHT, yaw - shoulder - elbow], axis=1)


def pose_of(qpos: np.ndarray) -> np.ndarray:
    """Forward kinematics: joints [K, 4] to poses [K, 4], the inverse of `joints_of`."""
    shoulder, elbow, lift, wrist = qpos.T
    heading = shoulder + elbow
    x = UPPER_ARM * np.cos(shoulder) + FOREARM * np.cos(heading)
    y = UPPER_ARM * np.sin(shoulder) + FOREARM * np.sin(heading)
    return np.stack([x, y, REST_HEIGHT + lift, heading + wrist], axis=1)


def velocity_of(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """Velocity [K, 4] of the pose: the Jacobian of `pose_of` times joint velocities [K, 4]."""
    shoulder, heading = qpos[:, 0], qpos[:, 0] + qpos[:, 1]
    turn, swing = qvel[:, 0], qvel[:, 0] + qvel[:, 1]
    x = -UPPER_ARM * np.sin(shoulder) * turn - FOREARM * np.sin(heading) * swing
    y = UPPER_ARM * np.cos(shoulder) * turn + FOREARM * np.cos(heading) * swing
    return np.stack([x, y, qvel[:, 2], swing + qvel[:, 3]], axis=1)


def build_model(clearance: float) -> mujoco.MjModel:
    """The model whose hole is `clearance` metres wider than the peg; a negative one makes a hole too small for it."""
    spec = mujoco.MjSpec.from_file(str(MODEL_PATH))
    half, wall = PEG_HALF_WIDTH + clearance / 2, WALL_HALF_WIDTH
    geoms = {geom.name: geom for geom in spec.geoms}
    for sign, mark in ((1, "+"), (-1, "-")):
        geoms[f"wall_x{mark}"].pos[0] = sign * (half + wall)
        geoms[f"wall_x{mark}"].size[1] = half + 2 * wall
        geoms[f"wall_y{mark}"].pos[1] = sign * (half + wall)
        geoms[f"wall_y{mark}"].size[0] = half
    return spec.compile()


class PegInsertTask(Task):
    """Put the peg at least 80 % of the hole's depth into the hole. An episode ends (terminates) with success.

    Observation, "observation" [K, 18] float64, in OBSERVATION_UNITS: the hole's mouth minus the peg's bottom (x, y, z,
    yaw; z is positive inside), velocity of the peg, pose of the peg relative to CENTRE, wrist force and torque.

    Action [K, 4] in [-1, 1]: where the peg shall go from where it is (x, y, z, yaw in the world), times ACTION_SCALE;
    held for 20 physics steps of 2 ms (25 decisions a second).

    Args:
        clearance: width of the hole minus width of the peg, metres, in [0.0005, 0.005].
        reward_type: "sparse" is 1 on success, else 0. "dense" is minus the distance to the floor of the hole in units
            of 0.1 m, where a wrong yaw counts as the way of the peg's corners.
        action_noise: standard deviation of the noise on every executed action, in [-1, 1] units. Nobody can foresee
            it: a plan of several steps misses by what adds up on the way, a look at every step corrects it.
        robot_state: observe what the robot knows without seeing the hole as a key of its own, "robot_state" [K, 14]:
            the observation without its first four numbers. For policies that read it beside a camera.

    Reset options: `hole` (x, y, yaw) and `start` (pose of the peg: x, y, z, yaw), metres and radians.
    """

    num_substeps = 20
    control_spec = mujoco.mjtState.mjSTATE_CTRL | mujoco.mjtState.mjSTATE_MOCAP_POS | mujoco.mjtState.mjSTATE_MOCAP_QUAT
    instruction = "insert the peg into the hole"
    cameras: Mapping[str, Camera] = {
        "front": Camera(lookat=(0.29, 0.0, 0.06), distance=0.45, azimuth=150.0, elevation=-25.0),
        "wrist": Camera(name="wrist"),
    }
    reset_options: Mapping[str, tuple[int, ...]] = {"hole": (3,), "start": (4,)}

    def __init__(
        self,
        *,
        clearance: float = 0.0015,
        reward_type: str = "sparse",
        action_noise: float = 0.0,
        robot_state: bool = False,
    ) -> None:
        if not 0.0005 <= clearance <= 0.005:
            raise UserError(
                f"clearance is {clearance!r}; expected metres in [0.0005, 0.005]: 0.001 is hard, 0.003 forgiving"
            )
        if reward_type not in ("sparse", "dense"):
            hint = nearest(str(reward_type), ("sparse", "dense"))
            raise UserError(f"unknown reward_type {reward_type!r}; {hint}")
        if not 0 <= action_noise <= 1:
            raise UserError(f"action_noise is {action_noise!r}; expected a standard deviation in [0, 1], 0.2 is a lot")
        self.clearance, self.reward_type = clearance, reward_type
        self.action_noise, self.robot_state = action_noise, robot_state
        self.model = build_model(clearance)
        self.action_space = Box(-1.0, 1.0, (4,), np.float32)
        size = len(OBSERVATION_UNITS)
        parts = {"observation": size} | ({"robot_state": size - 4} if robot_state else {})
        self.observation_space = Dict({k: Box(-np.inf, np.inf, (n,), np.float64) for k, n in parts.items()})

    def start(self, rng: np.random.Generator, options: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """A hole somewhere in reach and the peg at rest somewhere above it."""
        hole = CENTRE[[0, 1, 3]] + rng.uniform(-HOLE_RANGE, HOLE_RANGE)
        offset = rng.uniform(-START_RANGE, START_RANGE)
        hole = options.get("hole", hole)
        pose = np.array([hole[0], hole[1], HOLE_DEPTH + START_HEIGHT, 0.0]) + offset
        physics = self.rest()
        physics[1:5] = joints_of(options.get("start", pose)[None])[0]
        return physics, hole.copy()

    def start_controls(self, goal: np.ndarray) -> np.ndarray:
        """No reading depends on the servos at rest in free air; the hole is where the goal says."""
        return np.concatenate([np.zeros((len(goal), 4)), fixture_pose(goal)], axis=1)

    def controls(self, physics: np.ndarray, sensors: np.ndarray, goal: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Servo targets: the joints at the commanded pose."""
        target = pose_of(physics[:, 1:5]) + action * ACTION_SCALE
        return np.concatenate([joints_of(np.clip(target, *WORKSPACE)), fixture_pose(goal)], axis=1)

    def observation(self, physics: np.ndarray, sensors: np.ndarray, goal: np.ndarray) -> Observation:
        """See the class."""
        qpos, qvel = physics[:, 1:5], physics[:, 5:9]
        pose = pose_of(qpos)
        parts = [mouth_of(goal) - pose, velocity_of(qpos, qvel), pose - CENTRE, sensors]
        scaled = np.concatenate(parts, axis=1) / OBSERVATION_UNITS
        scaled[:, 12:] = np.clip(scaled[:, 12:], -SENSOR_LIMIT, SENSOR_LIMIT)
        return {"observation": scaled} | ({"robot_state": scaled[:, 4:].copy()} if self.robot_state else {})

    def judge(
        self, observation: Observation, physics: np.ndarray, sensors: np.ndarray, goal: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Success: deep enough, and all four corners of the peg's bottom within the hole."""
        delta = mouth_of(goal) - pose_of(physics[:, 1:5])
        success = (delta[:, 2] >= SUCCESS_DEPTH) & self.inside(delta, goal)
        if self.reward_type == "sparse":
            return success.astype(np.float64), success, success
        delta[:, 2] -= HOLE_DEPTH
        delta[:, 3] *= PEG_HALF_WIDTH * np.sqrt(2)
        return -10.0 * np.sqrt((delta**2).sum(axis=1)), success, success

    def inside(self, delta: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Whether the outline of the peg, `delta` [K, 4] away from the hole, lies within the hole's; bool [K].

        A quarter of the clearance is allowed for the softness of the contact.
        """
        cosine, sine = np.cos(goal[:, 2]), np.sin(goal[:, 2])
        across = np.abs(cosine * delta[:, 0] + sine * delta[:, 1])
        along = np.abs(cosine * delta[:, 1] - sine * delta[:, 0])
        outline = PEG_HALF_WIDTH * (np.abs(np.cos(delta[:, 3])) + np.abs(np.sin(delta[:, 3])))
        return np.maximum(across, along) + outline <= PEG_HALF_WIDTH + 0.75 * self.clearance

    def place(self, data: mujoco.MjData, physics: np.ndarray, goal: np.ndarray) -> None:
        """Draw the block where this episode has it."""
        fixture = fixture_pose(goal[None])[0]
        data.mocap_pos[0], data.mocap_quat[0] = fixture[:3], fixture[3:]
        super().place(data, physics, goal)


def mouth_of(goal: np.ndarray) -> np.ndarray:
    """Pose [K, 4] of the hole's mouth, from goals [K, 3]."""
    return np.stack([goal[:, 0], goal[:, 1], np.full(len(goal), HOLE_DEPTH), goal[:, 2]], axis=1)


def fixture_pose(goal: np.ndarray) -> np.ndarray:
    """Position and quaternion [K, 7] of the block with the hole, which stands on the table."""
    zero, half = np.zeros(len(goal)), goal[:, 2] / 2
    return np.stack([goal[:, 0], goal[:, 1], zero, np.cos(half), zero, zero, np.sin(half)], axis=1)


@register("demonstrator", "peg_insert", ENV_ID)
class PegInsertDemonstrator(Scripted):
    """Scripted insertion over a batch, closed loop and without memory.

    The peg comes down over the hole in a funnel: as long as it is `e` off (metres, a wrong yaw counting as the way of
    the peg's faces), it stays `funnel * (e - tolerance)` above the block, and goes in once `e` is below `tolerance`.

    Args:
        gain: how much of an error one command asks for; above 1 to overcome the friction of the joints.
        tolerance: error below which the peg goes down into the hole, metres.
        funnel: slope of the funnel, height over error.
    """

    def __init__(
        self, *, noise: float = 0.0, gain: float = 2.0, tolerance: float = 0.0006, funnel: float = 1.0
    ) -> None:
        super().__init__(noise=noise)
        self.gain, self.tolerance, self.funnel = gain, tolerance, funnel

    def command(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """[K, 4] for {"observation": [K, 18]}."""
        delta = np.asarray(observation["observation"], dtype=np.float64)[:, :4] * OBSERVATION_UNITS[:4]
        height = -delta[:, 2]  # of the peg above the block
        error = np.sqrt(delta[:, 0] ** 2 + delta[:, 1] ** 2) + PEG_HALF_WIDTH * np.abs(delta[:, 3])
        hover = np.minimum(self.funnel * (error - self.tolerance) + 0.0005, 0.03)
        inserting = (error <= self.tolerance) | (height < -0.001)
        delta[:, 2] = np.where(inserting, -HOLE_DEPTH - 0.005, hover) - height
        return self.gain * delta / ACTION_SCALE
