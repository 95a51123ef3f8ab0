"""Environments: importing this package registers them with Gymnasium and their demonstrators with our registry.

Example, after `import gymnasium, embodied_rft.envs`:

    gymnasium.make("embodied_rft/FetchPickAndPlace-v0")  # one environment
    gymnasium.make_vec("embodied_rft/FetchPickAndPlace-v0", num_envs=64)  # a native batch

Ids: embodied_rft/FetchReach-v0, ...FetchPush-v0, ...FetchSlide-v0, ...FetchPickAndPlace-v0, ...PegInsert-v0;
...TextSum-v0, ...TextCountdown-v0, ...TextFormat-v0, ...TextJsonl-v0.
"""

if __name__ != "embodied_rft.envs":  # one module must have one name
    raise ImportError("import embodied_rft.envs, not envs")

import os

import gymnasium

try:
    import mujoco  # noqa: F401
except Exception as error:  # it loads the library that MUJOCO_GL names at once; what that raises depends on the library
    if (_chosen := os.environ.get("MUJOCO_GL")) is None:
        raise
    raise ImportError(
        f"MuJoCo cannot be loaded with MUJOCO_GL={_chosen} ({type(error).__name__}: {error}). Unset it, or install it, "
        "on Debian or Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri (egl) or libosmesa6 (osmesa)"
    ) from error

import embodied_rft.envs.manipulation.checks
import embodied_rft.envs.manipulation.demonstrators
import embodied_rft.envs.manipulation.peg_insert
import embodied_rft.envs.text.demonstrators
import embodied_rft.envs.text.serve  # noqa: F401  (each registers what it holds)

for _name in ("Reach", "Push", "Slide", "PickAndPlace"):
    gymnasium.register(
        id=f"embodied_rft/Fetch{_name}-v0",
        entry_point="embodied_rft.envs.manipulation.fetch:FetchEnv",
        vector_entry_point="embodied_rft.envs.manipulation.fetch:FetchVectorEnv",
        max_episode_steps=50,
        kwargs={"name": _name},
    )
