"""MiniWoB++: the table against the package, demonstrators, rewards that are not success, options."""

import gymnasium
import numpy as np
import pytest

import embodied_rft.envs  # noqa: F401
from embodied_rft.envs.gui.miniwob.site import EXPERTS, MiniWoBSite, script
from embodied_rft.envs.gui.miniwob.tasks import MODED, TASKS, WATCHED
from embodied_rft.names import UserError
from tests.lab.browsing import needs_browser

pytest.importorskip("miniwob")
HIDDEN = {"button-delay", "chase-circle", "hover-shape", "moving-items", "simon-says"}  # pages without an environment


def make(task, **options):
    return gymnasium.make(f"embodied_rft/MiniWoB-{task}-v0", style="short", **options).unwrapped


def by_expert(env, seed):
    """An episode by the demonstrator: what the last turn gave."""
    seen, _ = env.reset(seed=seed)
    for _ in range(50):
        seen, reward, over, _, info = env.step(seen["expert"])
        if over:
            return reward, bool(info["is_success"])
    raise AssertionError(f"not done: {seen['message']}")


def test_the_table_has_every_task_of_the_package():
    import miniwob

    gymnasium.register_envs(miniwob)
    known = {id.removeprefix("miniwob/").rsplit("-v", 1)[0] for id in gymnasium.registry if id.startswith("miniwob/")}
    assert set(TASKS) == known | HIDDEN
    assert MODED | WATCHED <= set(TASKS)


def test_every_demonstrator_is_in_the_table():
    code = script(*(f"experts/{name}" for name in EXPERTS))
    for name, task in TASKS.items():
        written = f"experts['{name}']" in code or any(f"experts[`{name[:n]}$" in code for n in range(3, len(name) + 1))
        assert written == task.expert, name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ["click-tst"]}, "click-test"),
        ({"tasks": []}, "at least one"),
        ({"tasks": ["click-test"], "mode": "tst"}, "test"),
        ({"tasks": ["click-test"], "mode": "test"}, "no effect"),
        ({"tasks": ["click-test", "flight.AA"]}, "larger page"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(UserError, match=said):
        MiniWoBSite(**options)


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("task", ["click-test-2", "enter-text", "find-greatest", "social-media", "choose-list"])
def test_demonstrators_solve(task):
    env = make(task, expert=True)
    assert by_expert(env, 10_000) == (1.0, True)
    env.close()


@pytest.mark.browser
@needs_browser
def test_a_wrong_card_is_paid_and_is_no_success():
    env = make("find-greatest", expert=True)
    seen, _ = env.reset(seed=3)
    x, y = map(int, seen["expert"].split()[1:])
    wrong = next(place for place in (40, 80, 120) if abs(place - x) > 20)
    env.step(f"click {wrong} {y}")
    while True:
        seen, reward, over, _, info = env.step("click 80 165")
        if over:
            break
    assert (round(reward, 3), bool(info["is_success"])) == (0.1, False)
    env.close()


@pytest.mark.browser
@needs_browser
def test_a_seed_and_its_actions_give_the_same_pictures():
    stories = []
    for _ in range(2):
        env = make("click-shades", expert=True)
        seen, _ = env.reset(seed=5)
        story = [seen["image"]]
        for _ in range(3):
            seen, *_ = env.step(seen["expert"])
            story.append(seen["image"])
        stories.append(np.array(story))
        env.close()
    assert np.array_equal(*stories)
