"""Offscreen camera images of a MuJoCo model, headless by default: EGL, else OSMesa. Knows no task."""

from __future__ import annotations

import atexit
import copy
import importlib
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np

if TYPE_CHECKING:
    from embodied_rft.envs.manipulation.task import Camera

BACKENDS = ("egl", "osmesa")  # in the order in which they are tried; both work without a display


def gl_available() -> tuple[bool, str]:
    """Whether images can be drawn here, and a sentence: the library that will be used, or what to install."""
    try:
        name, _ = _backend()
    except RuntimeError as error:
        return False, str(error)
    return True, f"images are drawn with {name}"


class Renderer:
    """Draws a model into uint8 arrays. Nothing is allocated and no GL library is touched before the first image.

    Each thread that draws gets a GL context of its own.

    Args:
        model: what to draw; copied, never modified.
        height: pixels.
        width: pixels.
        fast: no shadows, no reflections, no multisampling, a tiny shadow map.
    """

    def __init__(self, model: mujoco.MjModel, *, height: int, width: int, fast: bool = True) -> None:
        self._source, self._height, self._width, self._fast = model, height, width, fast
        self._local = threading.local()

    def render(self, place: Callable[[mujoco.MjData], None], camera: Camera) -> np.ndarray:
        """One image [height, width, 3] uint8; `place` puts the state into the MjData that it is given."""
        if not hasattr(self._local, "canvas"):
            self._local.canvas = _Canvas(self._source, self._height, self._width, self._fast)
        return self._local.canvas.draw(place, camera)

    def close(self) -> None:
        """Free the GL context of the calling thread."""
        if hasattr(self._local, "canvas"):
            self._local.canvas.close()
            del self._local.canvas


class _Canvas:
    """One GL context with a scene: belongs to one thread."""

    def __init__(self, model: mujoco.MjModel, height: int, width: int, fast: bool) -> None:
        _, make_context = _backend()
        self._model = copy.copy(model)
        self._model.vis.global_.offheight, self._model.vis.global_.offwidth = height, width
        if fast:
            self._model.vis.quality.shadowsize = 16
            self._model.vis.quality.offsamples = 0
        self._hide_mocap_markers()
        self._data = mujoco.MjData(self._model)
        self._context: Any = make_context(width, height)
        self._context.make_current()
        self._mjr = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._mjr)
        self._scene = mujoco.MjvScene(self._model, maxgeom=2000)
        if fast:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option, self._rect = mujoco.MjvOption(), mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), dtype=np.uint8)
        self._thread = threading.get_ident()
        atexit.register(self.close)  # before the GL library itself is torn down

    def _hide_mocap_markers(self) -> None:
        """The handle that pulls a gripper is not part of the world: a real camera would not see it."""
        for geom in range(self._model.ngeom):
            body = self._model.geom_bodyid[geom]
            free = self._model.geom_contype[geom] == 0 and self._model.geom_conaffinity[geom] == 0
            if free and self._model.body_mocapid[body] >= 0:
                self._model.geom_rgba[geom, 3] = 0.0

    def draw(self, place: Callable[[mujoco.MjData], None], camera: Camera) -> np.ndarray:
        """See `Renderer.render`."""
        place(self._data)
        self._context.make_current()
        mujoco.mjv_updateScene(
            self._model,
            self._data,
            self._option,
            None,
            self._view(camera),
            mujoco.mjtCatBit.mjCAT_ALL.value,
            self._scene,
        )
        mujoco.mjr_render(self._rect, self._scene, self._mjr)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._mjr)
        return self._pixels[::-1].copy()

    def _view(self, camera: Camera) -> mujoco.MjvCamera:
        view = mujoco.MjvCamera()
        if camera.name is not None:
            view.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
            view.fixedcamid = self._model.camera(camera.name).id
        else:
            view.type = mujoco.mjtCamera.mjCAMERA_FREE.value
            view.lookat[:] = camera.lookat
            view.distance, view.azimuth, view.elevation = camera.distance, camera.azimuth, camera.elevation
        return view

    def close(self) -> None:
        """Free what the GL library holds; harmless when repeated."""
        atexit.unregister(self.close)
        if self._context is None:
            return
        if threading.get_ident() == self._thread:  # elsewhere the context cannot be made current
            self._context.make_current()
            self._mjr.free()
        self._context.free()
        self._context = None


@cache
def _backend() -> tuple[str, Callable[[int, int], Any]]:
    """The first GL backend that works, and its context class. Raises RuntimeError that says what to install."""
    chosen = os.environ.get("MUJOCO_GL", "").lower().strip()
    if chosen in ("disable", "disabled", "off", "false", "0"):
        raise RuntimeError(f"MUJOCO_GL={chosen} switches drawing off; unset it to draw images")
    # PyOpenGL picks its platform once in a process: who was first, or the user, decides.
    forced = chosen if chosen in BACKENDS else os.environ.get("PYOPENGL_PLATFORM", "").lower()
    reasons = []
    for name in [forced] if forced in BACKENDS else BACKENDS:
        try:
            return name, _context_class(name)
        except Exception as error:  # what a missing library raises depends on the library
            reasons.append(f"{name}: {type(error).__name__}: {error}")
            _forget(name)
    raise RuntimeError(
        f"no GL library works, so no image can be drawn ({'; '.join(reasons)}). Install one that needs no display, "
        "on Debian or Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri (EGL) or libosmesa6 (OSMesa)."
    )


def _context_class(name: str) -> Callable[[int, int], Any]:
    """Load a backend of MuJoCo by name (`mujoco.gl_context` fixes its choice when mujoco is imported) and try it."""
    os.environ["PYOPENGL_PLATFORM"] = name
    context_class = importlib.import_module(f"mujoco.{name}").GLContext
    context = context_class(8, 8)
    context.make_current()
    context.free()
    return context_class


def _forget(name: str) -> None:
    """Undo the import of a backend that does not work, so that PyOpenGL can start over with another platform."""
    os.environ.pop("PYOPENGL_PLATFORM", None)
    for module in [m for m in sys.modules if m.split(".")[0] == "OpenGL" or m.startswith(f"mujoco.{name}")]:
        del sys.modules[module]
