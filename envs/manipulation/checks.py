"""What `erft doctor` examines of these environments: the release of MuJoCo, offscreen rendering, repeatable physics."""

from __future__ import annotations

import gymnasium
import mujoco
import numpy as np

from embodied_rft.data import Finding
from embodied_rft.envs.manipulation.rendering import gl_available
from embodied_rft.registry import register

RELEASE = "3.3.0"  # newer ones break gymnasium-robotics 1.4.2


@register("check", "MuJoCo")
def check_mujoco() -> Finding:
    """The pinned release."""
    if mujoco.__version__ == RELEASE:
        return Finding(mujoco.__version__, "ok")
    return Finding(mujoco.__version__, "broken", f"the Fetch models need it: pip install mujoco=={RELEASE}")


@register("check", "Rendering")
def check_rendering() -> Finding:
    """An offscreen GL context; without one everything works except videos and pixels."""
    fine, detail = gl_available()
    return Finding(detail, "ok") if fine else Finding(detail, "note", "videos: apt-get install libegl1 libegl-mesa0")


@register("check", "Simulation")
def check_simulation() -> Finding:
    """Ten steps of real physics, twice, give the same numbers."""
    first, second = _rollout(), _rollout()
    if np.array_equal(first, second) and np.isfinite(first).all():
        return Finding("10 steps of FetchReach, twice the same", "ok")
    return Finding("two equal rollouts differ", "broken", "report this with the output of erft doctor")


def _rollout() -> np.ndarray:
    env = gymnasium.make("embodied_rft/FetchReach-v0")
    try:
        observations = [env.reset(seed=0)[0]]
        observations += [env.step(np.full(4, 0.1, dtype=np.float32))[0] for _ in range(10)]
    finally:
        env.close()
    return np.concatenate([np.ravel(leaf) for observation in observations for leaf in observation.values()])
