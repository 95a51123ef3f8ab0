"""Single steps of recorded episodes: what agrees with what was done, from files and from experts."""

import gymnasium
import numpy as np
import pytest

import embodied_rft.envs  # noqa: F401
from embodied_rft.envs.gui.actions import Action, Box
from embodied_rft.envs.gui.elements import Element, read_elements
from embodied_rft.envs.gui.recorded import agree
from embodied_rft.experience.demonstrate import write_demos
from embodied_rft.pools.pool import make_pool

ID, SCREEN = "embodied_rft/RecordedSteps-v0", "embodied_rft/ClickScreen-v0"
BUTTON = Element(3, "button", 'Say "OK" [now]: 3', Box(20, 10, 30, 12))


def test_elements_are_read_as_they_are_written():
    assert read_elements(f"{BUTTON}\nsomething else\n{BUTTON}") == [BUTTON, BUTTON] and read_elements("") == []


@pytest.mark.parametrize(
    "given, wanted, element, expected",
    [
        (Action("click", ((49, 21),)), Action("click", ((21, 11),)), BUTTON, (1, 1)),
        (Action("click", ((50, 21),)), Action("click", ((21, 11),)), BUTTON, (1, 0)),
        (Action("double", ((30, 15),)), Action("click", ((21, 11),)), BUTTON, (0, 0)),
        (Action("click", ((24, 15),)), Action("click", ((21, 11),)), None, (1, 1)),
        (Action("click", ((26, 15),)), Action("click", ((21, 11),)), None, (1, 0)),
        (Action("drag", ((49, 21), (90, 90))), Action("drag", ((21, 11), (91, 91))), BUTTON, (1, 1)),
        (Action("drag", ((49, 21), (80, 90))), Action("drag", ((21, 11), (91, 91))), BUTTON, (1, 0)),
        (Action("type", text="ann "), Action("type", text="ann"), None, (1, 1)),
        (Action("type", text="anna"), Action("type", text="ann"), None, (1, 0)),
        (Action("press", text="Enter"), Action("type", text="Enter"), None, (0, 0)),
        (Action("scroll", ((1, 1),), (0, 50)), Action("scroll", ((2, 2),), (0, 90)), None, (1, 1)),
        (Action("scroll", ((1, 1),), (0, -50)), Action("scroll", ((2, 2),), (0, 90)), None, (1, 0)),
    ],
)
def test_agreement(given, wanted, element, expected):
    assert agree(given, wanted, element, radius=5.0) == expected


@pytest.mark.parametrize("source", ["file", "expert"])
def test_every_step_is_one_decision_that_the_recorded_answer_solves(source, tmp_path):
    if source == "file":
        path = tmp_path / "demos.safetensors"
        write_demos(SCREEN, path, episodes=30, options={"expert": True, "state": True})
        options = {"file": str(path)}
    else:
        options = {"of": SCREEN, "episodes": 30}
    env = gymnasium.make(ID, grid=[8, 8], expert=True, **options)
    for seed in range(30):
        seen, _ = env.reset(seed=seed)
        assert env.observation_space.contains(seen) and seen["expert"].startswith("click ")
        _, reward, over, _, info = env.step(seen["expert"])
        assert (reward, over, info["is_success"]) == (1, True, 1)
        assert info["reward/verb"] == info["reward/target"] == 1
        env.reset(seed=seed)
        _, reward, *_, info = env.step("type red")
        assert (reward, info["is_success"]) == (0, 0)
        env.reset(seed=seed)
        _, reward, *_, info = env.step("click 9 9")
        assert reward == 0 and info["invalid/outside"] == 1
    if source == "file":  # what is clicked on counts, and not where
        env = gymnasium.make(ID, expert=True, **options)
        with pytest.raises(ValueError, match="can be read"):
            gymnasium.make(ID, parser="tags", **options)


def test_a_click_next_to_the_element_is_none():
    env, told = gymnasium.make(ID, of=SCREEN, options={"grid": None, "popups": 0.0}, episodes=20, expert=True), []
    for seed in range(30):
        seen, _ = env.reset(seed=seed)
        batch = env.unwrapped.batch
        box = batch._step(0).element.box
        inside = f"click {int(box.x)} {int(box.y)}"
        assert env.step(inside)[1] == 1
        env.reset(seed=seed)
        beside = box.x + box.width if box.x + box.width < 64 else box.x - 1
        told.append(env.step(f"click {int(beside)} {int(box.y)}")[1])
    assert told == [0.2] * 30, "the verb alone"


def test_the_message_has_the_instruction_and_what_was_answered():
    env = gymnasium.make(ID, of=SCREEN, options={"tasks": ["pair"], "popups": 0.0}, grid=[8, 8], history=4)
    found = {}
    for seed in range(20):
        first, *others = env.reset(seed=seed)[0]["message"].split("\n")
        assert first.startswith("Click on the ")
        found["Before" if any(line.startswith("Before: click ") for line in others) else "first"] = others
    assert found["Before"][-1] == "Good, go on." and len(found) == 2


def test_evaluation_shows_other_episodes():
    pools = [make_pool(ID, 64, options={"of": SCREEN, "grid": [8, 8]}, purpose=p) for p in ("training", "evaluation")]
    shown = [pool.reset(np.arange(64) + first)["image"] for pool, first in zip(pools, (0, 2**31))]
    kinds = [{one.tobytes() for one in images} for images in shown]
    assert not kinds[0] & kinds[1] and min(map(len, kinds)) > 20
    state = pools[0].get_state()
    other = make_pool(ID, 64, options={"of": SCREEN, "grid": [8, 8]})
    other.reset(np.arange(64) + 500)
    other.set_state(state)
    assert (other.step(["click 1 1"] * 64).reward == pools[0].step(["click 1 1"] * 64).reward).all()


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "either a file"),
        ({"file": "x", "of": SCREEN}, "either a file"),
        ({"file": "x", "episodes": 3}, "no effect beside file"),
        ({"of": SCREEN, "rewards": {"verbs": 1}}, "did you mean 'verb'"),
        ({"of": SCREEN, "held_out": 1.0}, "held_out"),
        ({"of": SCREEN, "options": {"observe": "text"}}, "no pictures"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        gymnasium.make(ID, **options)
