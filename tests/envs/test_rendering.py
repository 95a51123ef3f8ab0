import os
import subprocess
import sys
import threading

import gymnasium
import numpy as np
import pytest

from embodied_rft.envs.manipulation.rendering import Renderer, gl_available
from embodied_rft.pools.chunks import ChunkPool
from embodied_rft.pools.pool import VectorPool
from tests.lab.fetch import batch, one

AVAILABLE, REASON = gl_available()
CAMERAS = ("front", "side", "wrist", "overview")

GL_AVAILABLE = "from embodied_rft.envs.manipulation import rendering\nprint(rendering.gl_available())"


def run(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, timeout=120)


DRAW = """
import gymnasium, embodied_rft.envs
from embodied_rft.envs.manipulation import rendering
env = gymnasium.make("embodied_rft/FetchPush-v0", disable_env_checker=True, render_mode="rgb_array", image_size=32)
env.reset(seed=0)
assert env.render().std() > 10
print(rendering.gl_available()[1])
"""
HIDE = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {hidden}:
            raise ImportError(name + " is hidden by this test")
sys.meta_path.insert(0, Hide())
"""


def test_without_a_gl_library_the_error_names_the_package():
    # Physics goes on working; the first image says what to install.
    code = HIDE.format(hidden=("mujoco.egl", "mujoco.osmesa")) + DRAW
    result = run(code)
    assert result.returncode == 1 and "AssertionError" not in result.stderr
    assert "RuntimeError: no GL library works" in result.stderr
    assert "apt-get install libegl1" in result.stderr and "libosmesa6" in result.stderr
    quiet = run(HIDE.format(hidden=("mujoco.egl", "mujoco.osmesa")) + GL_AVAILABLE)
    assert quiet.returncode == 0 and quiet.stdout.startswith("(False,")


def test_a_gl_library_that_mujoco_itself_cannot_load_is_one_sentence():
    # MuJoCo loads what MUJOCO_GL names when it is imported, long before anything is drawn.
    code = "import sys; sys.argv[1:] = {}\nfrom embodied_rft.cli import main\nmain()"
    assert run(code.format(["--help"]), MUJOCO_GL="no").returncode == 0  # the help needs no environment
    result = run(code.format(["list", "envs"]), MUJOCO_GL="no")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "MUJOCO_GL=no" in result.stderr and "libosmesa6" in result.stderr


def test_drawing_switched_off_is_said():
    result = run(GL_AVAILABLE, MUJOCO_GL="off")
    assert result.stdout.startswith("(False,") and "MUJOCO_GL=off" in result.stdout


def test_a_working_library_is_found_without_any_setting_and_exit_is_clean():
    result = run(DRAW)
    if AVAILABLE:
        assert result.returncode == 0 and "images are drawn with" in result.stdout
        assert "Exception ignored" not in result.stderr
    else:
        assert "apt-get install" in result.stderr


def test_osmesa_takes_over_when_egl_does_not_work():
    alone = run(DRAW, MUJOCO_GL="osmesa")
    fallback = run(HIDE.format(hidden=("mujoco.egl",)) + DRAW)
    if alone.returncode == 0:
        assert fallback.returncode == 0 and "drawn with osmesa" in fallback.stdout
    else:
        assert "osmesa" in fallback.stderr and "apt-get install" in fallback.stderr


needs_gl = pytest.mark.skipif(not AVAILABLE, reason=REASON)


@needs_gl
@pytest.mark.parametrize("engine", ["exact", "rollout"])
def test_images_of_a_batch_equal_those_of_single_environments(engine):
    options = {"cameras": CAMERAS, "image_size": (24, 32), "instruction": True, "engine": engine}
    vector = batch("PickAndPlace", 2, autoreset_mode="NextStep", **options)
    singles = [one("PickAndPlace", **options) for _ in range(2)]
    seen, _ = vector.reset(seed=[3, 4])
    each = [env.reset(seed=3 + i)[0] for i, env in enumerate(singles)]
    action = np.full((2, 4), 0.5, np.float32)
    for _ in range(3):
        assert vector.observation_space.contains(seen)
        for camera in CAMERAS:
            images = seen[f"image/{camera}"]
            assert images.shape == (2, 24, 32, 3) and images.dtype == np.uint8 and images.std() > 5
            for i in range(2):
                assert np.array_equal(images[i], each[i][f"image/{camera}"])
        seen, *_ = vector.step(action)
        each = [env.step(a)[0] for env, a in zip(singles, action, strict=True)]
    vector.close()
    for env in singles:
        env.close()


@needs_gl
def test_chunks_draw_only_what_is_read(monkeypatch):
    """Images after a chunk, and where an episode ends inside one, are those of drawing every step."""
    drawn = []
    render = Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda *a: drawn.append(1) or render(*a))

    class Seeing(VectorPool):
        def skip_images(self, skip):
            pass

    def walk(kind):
        options = {"cameras": ("front",), "image_size": 16, "max_episode_steps": 6, "num_envs": 2}
        env = batch("Reach", autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED, **options)
        pool = ChunkPool(kind(env), horizon=4)
        rng, seen, before = np.random.default_rng(0), [pool.reset(np.array([1, 2]))], len(drawn)
        for _ in range(2):
            seen.append(pool.step(rng.uniform(-1, 1, (2, 16)).astype(np.float32)).observation)
        pool.close()
        return [tree["image/front"] for tree in seen], len(drawn) - before

    lazy, few = walk(VectorPool)
    full, many = walk(Seeing)
    assert few == 2 * 2 and many == 2 * 6  # one image a chunk; one a step until the sixth step ends the episode
    for a, b in zip(lazy, full, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (lazy[1] != lazy[2]).any()


@needs_gl
def test_an_image_shows_the_block_the_goal_and_the_arm():
    env = one("PickAndPlace", cameras=("front",), image_size=64)
    start = {"object_xy": [1.3, 0.6], "goal": [1.3, 0.8, 0.45]}

    def image(**change):
        return env.reset(seed=0, options={**start, **change})[0]["image/front"].astype(int)

    assert np.array_equal(image(), image())
    assert np.abs(image() - image(object_xy=[1.4, 0.7])).max() > 50
    assert np.abs(image() - image(goal=[1.2, 0.8, 0.6])).max() > 50
    before = image()
    for _ in range(5):
        after = env.step(np.array([0, 1, 1, 0], np.float32))[0]["image/front"].astype(int)
    assert np.abs(before - after).max() > 50


@needs_gl
def test_fast_rendering_shows_the_same_scene():
    fast, full = (one("Push", render_mode="rgb_array", image_size=64, fast_render=fast) for fast in (True, False))
    fast.reset(seed=0)
    full.reset(seed=0)
    difference = np.abs(fast.render().astype(int) - full.render().astype(int))
    assert 0 < difference.mean() < 20


@needs_gl
def test_render_mode_of_single_and_batch():
    single = gymnasium.make("embodied_rft/FetchReach-v0", render_mode="rgb_array", image_size=48)
    single.reset(seed=1)
    vector = gymnasium.make_vec("embodied_rft/FetchReach-v0", num_envs=2, render_mode="rgb_array", image_size=48)
    vector.reset(seed=[0, 1])
    frames = vector.render()
    assert len(frames) == 2 and np.array_equal(frames[1], single.render()) and frames[0].shape == (48, 48, 3)
    assert one("Reach").render() is None and batch("Reach").render() is None


@needs_gl
def test_drawing_changes_neither_model_nor_physics():
    plain, drawn = one("Push"), one("Push", cameras=("front",), image_size=16, render_mode="rgb_array")
    plain.reset(seed=0)
    drawn.reset(seed=0)
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32):
        drawn.render()
        assert np.array_equal(plain.step(action)[0]["observation"], drawn.step(action)[0]["observation"])


@needs_gl
def test_threads_draw_the_same_image():
    env = one("Push", render_mode="rgb_array", image_size=32)
    env.reset(seed=0)
    images = [env.render()]
    thread = threading.Thread(target=lambda: images.append(env.render()))
    thread.start()
    thread.join()
    assert len(images) == 2 and np.array_equal(*images)
