"""MiniGrid, BabyAI, the arcade and Crafter: what is told in words, what is success, which options are refused."""

import numpy as np
import pytest

from embodied_rft.envs.worlds.arcade import _word
from embodied_rft.envs.worlds.grids import tell
from embodied_rft.names import UserError
from tests.lab.worlds import make

WALL, DOOR, KEY, BALL, BOX, GOAL = (2, 5, 0), 4, 5, 6, 7, (8, 1, 0)


def seen(things, carried=(1, 0, 0)):
    """A view of 7 x 7, with things by (steps to the right, steps ahead)."""
    view = np.ones((7, 7, 3), np.uint8)
    view[3, 6] = carried
    for (side, ahead), thing in things.items():
        view[3 + side, 6 - ahead] = thing
    return view


@pytest.mark.parametrize("things, carried, said", [
    ({}, (1, 0, 0), "You carry nothing.\nYou see nothing."),
    ({(0, 1): (BALL, 0, 0)}, (1, 0, 0), "You carry nothing.\nYou see a red ball 1 step forward."),
    ({(-2, 3): (KEY, 2, 0)}, (KEY, 4, 0),
     "You carry a yellow key.\nYou see a blue key 2 steps left and 3 steps forward."),
    ({(1, 0): (DOOR, 5, 0), (0, 2): (DOOR, 1, 2)}, (1, 0, 0),
     "You carry nothing.\nYou see an open grey door 1 step right, a locked green door 2 steps forward."),
    ({(0, 4): WALL, (0, 5): WALL, (-1, 0): WALL, (2, 2): WALL, (0, 3): GOAL}, (1, 0, 0),
     "You carry nothing.\nYou see a goal 3 steps forward, a wall 4 steps forward, a wall 1 step left."),
    ({(0, 1): (0, 0, 0), (0, 2): (3, 2, 0)}, (DOOR, 0, 0), "You carry nothing.\nYou see nothing."),
])  # fmt: skip
def test_a_view_in_words(things, carried, said):
    assert tell(seen(things, carried)) == said


def test_a_mission_is_done_or_not():
    env = make("BabyAI", level="GoToRedBallGrey-v0")
    observation, _ = env.reset(seed=4)
    assert env.describe().state.startswith("Mission: go to the red ball\nYou carry nothing.\nYou see ")
    for _ in range(64):
        observation, reward, terminated, truncated, info = env.step(int(observation["expert"]))
        if terminated:
            break
    assert 0 < reward < 1 and info["is_success"] == 1 and not truncated
    env.reset(seed=4)
    while not (told := env.step(6))[3]:
        assert told[4]["is_success"] == 0
    assert told[1] == 0 and not told[2] and told[4]["is_success"] == 0


def test_symbols_pictures_and_missions_are_those_of_the_package():
    env = make("MiniGrid", tile=4)
    observation, _ = env.reset(seed=2)
    inner = env.inner.gen_obs()
    assert observation["state"][:-1].tolist() == inner["image"].reshape(-1).tolist()
    assert observation["state"][-1] == inner["direction"] and observation["mission"] == inner["mission"]
    assert observation["image"].shape == (28, 28, 3)
    whole = make("MiniGrid", tile=4, view="whole")
    assert whole.reset(seed=2)[0]["image"].shape == (24, 24, 3)


@pytest.mark.parametrize("name, options, message", [
    ("BabyAI", {"level": "GoToRedBal-v0"}, "did you mean 'GoToRedBall-v0'"),
    ("BabyAI", {"view": "agents"}, "did you mean 'agent'"),
    ("BabyAI", {"tile": 0}, "tile is 0"),
    ("BabyAI", {"observation": "picture"}, "unknown observation 'picture'"),
    ("MiniGrid", {"expert": True}, "only levels of BabyAI"),
    ("Arcade", {"game": "Pon"}, "did you mean 'Pong'"),
    ("Arcade", {"sticky": 1.0}, "sticky 1.0"),
    ("Arcade", {"size": 4}, "size is 4"),
    ("Crafter", {"goal": "collect_wod"}, "did you mean 'collect_wood'"),
    ("Crafter", {"area": 8}, "area 8"),
])  # fmt: skip
def test_options_that_are_none(name, options, message):
    with pytest.raises(UserError, match=message):
        make(name, **options)


@pytest.mark.parametrize("name, word", [
    ("NOOP", "wait"), ("FIRE", "fire"), ("UP", "up"), ("UPRIGHTFIRE", "up right and fire"), ("DOWNLEFT", "down left"),
])  # fmt: skip
def test_names_of_actions_as_one_would_say_them(name, word):
    assert _word(name) == word


def test_the_arcade_counts_the_score():
    env = make("Arcade", game="Breakout", goal=1, length=400, sticky=0.0)
    env.reset(seed=0)
    assert env.describe().words == (("wait", "fire", "right", "left"),)
    env.action_space.seed(0)
    total, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        total, over = total + reward, terminated or truncated
    assert info["score"] == total and info["is_success"] == float(total >= 1) and total > 0
    assert env.describe().state == f"Score: {total:g}, lives: {info['lives']}"
    assert "is_success" not in make("Arcade").reset(seed=0)[1]


def test_crafter_ends_with_its_goal():
    env = make("Crafter", goal="collect_sapling", length=60)
    for seed in range(20):
        env.reset(seed=seed)
        for _ in range(60):
            _, reward, terminated, truncated, info = env.step(
                5 if "grass" in env.describe().state.split("\n")[1] else 1
            )
            if terminated or truncated:
                break
        assert info["is_success"] == float(info["achievements"]["collect_sapling"] > 0) == float(terminated)
        if terminated:
            assert reward == 1.0 and info["num_achievements"] == 1
            return
    pytest.fail("no sapling in 20 episodes")


def test_crafter_in_words():
    env = make("Crafter", area=32)
    env.reset(seed=0)
    player, world = env.inner._player, env.inner._world
    for x in range(-5, 6):
        for y in range(-5, 6):
            world[player.pos + (x, y)] = "sand"
    for thing in [one for one in world.objects if one is not player]:
        world.remove(thing)
    player.facing = (0, 1)
    for place, material in {(0, 1): "water", (-2, 0): "tree", (3, -2): "tree", (1, -3): "iron"}.items():
        world[player.pos + place] = material
    player.inventory.update(wood=2, food=4)
    assert env.describe().state.split("\n") == [
        "You face south: water.",
        "You see sand 1 east, water 1 south, tree 2 west, iron 1 east and 3 north.",
        "You have health 9, food 4, drink 9, energy 9 (of 9).",
        "Inventory: wood 2",
    ]
