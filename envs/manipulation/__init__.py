"""Robot arms in MuJoCo: Fetch and PegInsert, batched. Importing this package registers demonstrators and checks."""

import os

try:
    import mujoco  # noqa: F401
except Exception as error:  # it loads the library that MUJOCO_GL names at once; what that raises depends on the library
    if (_chosen := os.environ.get("MUJOCO_GL")) is None:
        raise
    raise ImportError(
        f"MuJoCo cannot be loaded with MUJOCO_GL={_chosen} ({type(error).__name__}: {error}). Unset it, or install it, "
        "on Debian or Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri (egl) or libosmesa6 (osmesa)"
    ) from error

from embodied_rft.registry import import_files

import_files(__name__, __path__)
