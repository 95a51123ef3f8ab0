"""Drawn screens that are clicked on: what each task wants, pop-ups, answers that are none, exact states."""

import gymnasium
import numpy as np
import pytest

import embodied_rft.envs  # noqa: F401
from embodied_rft.envs.gui.click_screen import ID, TASKS
from embodied_rft.envs.gui.elements import read_elements
from embodied_rft.experience.demonstrate import make_demonstrator
from embodied_rft.pools.pool import make_pool
from embodied_rft.turns.parsing import make_parser


def make(**options):
    """One screen, with an expert beside it."""
    return gymnasium.make(ID, **{"expert": True, "popups": 0.0, **options})


def play(env, seed, *, task=None, wrong_at=None, clicks=None):
    """(reward, success, turns, last message): the expert's way, or with another answer at a turn."""
    seen, _ = env.reset(seed=seed, options=None if task is None else {"task": task})
    for turn in range(40):
        said = clicks[turn] if clicks else seen["expert"]
        if turn == wrong_at:
            said = said if clicks else "0 0"
        seen, reward, over, cut, info = env.step(said)
        if over or cut:
            return reward, info["is_success"], turn + 1, seen["message"]
    raise AssertionError("it does not end")


@pytest.mark.parametrize("options", [{}, {"size": 48, "elements": 3}, {"size": 128, "grid": None}, {"style": "short"}])
@pytest.mark.parametrize("popups", [0.0, 0.5])
@pytest.mark.parametrize("task", TASKS)
def test_the_expert_does_every_task(task, popups, options):
    env = make(popups=popups, turns=30, **options)
    played = [play(env, seed, task=task) for seed in range(10)]
    assert all((reward, success) == (1, 1) for reward, success, *_ in played)
    least = {"icon": 1, "word": 1, "pair": 2, "page": 2, "ticks": 2}[task]
    assert all(turns >= least for _, _, turns, _ in played) and (popups or min(t for _, _, t, _ in played) == least)


def middle(state, name):
    """A click on an element that "state" tells of, in pixels."""
    x, y = next(each for each in read_elements(state) if each.text.startswith(name)).box.middle
    return f"click {int(x)} {int(y)}"


def others(env, seen):
    """An element that the task does not name."""
    return next(
        each.text for each in read_elements(seen["state"])
        if each.text not in seen["message"].replace('"', "").lower() and "page" not in each.text
    )  # fmt: skip


@pytest.mark.parametrize("forgiving", [False, True])
def test_a_wrong_element_ends_the_episode_unless_it_is_forgiven(forgiving):
    env = make(state=True, grid=None, forgiving=forgiving)
    for seed in range(10):
        seen, _ = env.reset(seed=seed, options={"task": "icon"})
        wrong = middle(seen["state"], others(env, seen))
        after, reward, over, _, info = env.step(wrong)
        assert (reward, over, info["is_success"]) == (0, not forgiving, 0) and after["message"] == "That was wrong."
        if forgiving:
            assert env.step(after["expert"])[1:3] == (1, True)


def test_near_misses_fail():
    env = make(state=True, grid=None)
    for seed in range(10):
        seen, _ = env.reset(seed=seed, options={"task": "pair"})
        asked = seen["message"].split("\n")[0].removeprefix("Click on the ").rstrip(".").split(", then on the ")
        assert env.step(middle(seen["state"], asked[1]))[1:3] == (0, True), "the second one first"
        seen, _ = env.reset(seed=seed, options={"task": "ticks"})
        assert env.step(middle(seen["state"], "ok"))[1:3] == (0, True), "OK before anything is ticked"
        seen, _ = env.reset(seed=seed, options={"task": "ticks"})
        ticked, *_ = env.step(middle(seen["state"], others(env, seen)))
        over = False
        while not over:
            ticked, reward, over, *_ = env.step(ticked["expert"])
        assert reward == 1, "the expert takes a wrong tick back"
        seen, _ = env.reset(seed=seed, options={"task": "ticks"})
        ticked, *_ = env.step(seen["expert"])
        ticked, *_ = env.step(middle(ticked["state"], others(env, seen)))
        assert env.step(middle(ticked["state"], "ok"))[1:3] == (0, True), "one too many"


@pytest.mark.parametrize("observe", ["text", "both"])
def test_a_screen_in_words_says_what_to_answer(observe):
    """Whatever is asked for: who reads where it is, or what is in the way, needs no picture."""
    env = make(style="short", observe=observe, popups=0.3, turns=30)
    assert ("image" in env.observation_space.spaces) == (observe == "both")
    for seed in range(20):
        seen, _ = env.reset(seed=seed)
        over = False
        while not over:
            _, *places = seen["message"].split("\n")
            where = {" ".join(line.split()[:-2]): " ".join(line.split()[-2:]) for line in places}
            assert seen["expert"] in where.values()
            assert "close" not in where or seen["expert"] == where["close"]
            seen, reward, over, *_ = env.step(seen["expert"])
        assert reward == 1


def test_a_pop_up_is_in_the_way_until_it_is_closed():
    env = make(popups=1.0, state=True, grid=None)
    seen, _ = env.reset(seed=0, options={"task": "icon"})
    assert "pop-up" in seen["state"]
    target = seen["message"].split("\n")[0].removeprefix("Click on the ").rstrip(".")
    after, reward, over, _, _ = env.step(middle(seen["state"], target))
    assert (reward, over, after["message"]) == (0, False, "A pop-up is in the way: close it.")
    env = make(popups=0.5, state=True, grid=None, turns=40)
    shown = 0
    for seed in range(20):
        seen, _ = env.reset(seed=seed)
        over = False
        while not over:
            told = "pop-up" in seen["state"]
            shown += told
            seen, _, over, _, info = env.step(seen["expert"])
            assert seen["message"].startswith("The pop-up is closed") == told
        assert info["is_success"]
    assert shown > 10 and info["popups/closed"] >= 0


def test_answers_that_are_none_move_nothing_and_are_counted():
    env = make(style="short", invalid=-0.25)
    before, _ = env.reset(seed=4)
    for number, said in enumerate(("", "red star", "8 0", "1 2 3", "-1 2")):
        seen, reward, over, _, info = env.step(said)
        kind = "unknown word" if said else "empty"
        assert (reward, over) == (-0.25, False) and seen["message"] == f"? {kind}\n{before['message']}"
        assert (seen["image"] == before["image"]).all()
        assert (info["invalid/empty"], info["invalid/unknown_word"]) == (1, number)


def test_other_parsers_read_the_same():
    env = make(parser="tags")
    seen, _ = env.reset(seed=2)
    assert make_parser("tags").parse(seen["expert"]).action.startswith("click ")
    assert "<answer>click X Y<" in seen["message"]
    with pytest.raises(ValueError, match="set its option strict"):
        make(parser="words")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tasks": ["icons"]}, "did you mean 'icon'"),
        ({"tasks": []}, "at least one"),
        ({"elements": 1}, "2 to 9"),
        ({"size": 20}, "48 to 1024"),
        ({"grid": [4, 4]}, "miss what is small"),
        ({"grid": [8]}, "columns and rows"),
        ({"size": 48, "elements": 9, "grid": [5, 6]}, "no room"),
        ({"popups": 2}, "popups"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_a_seed_is_a_screen_and_states_are_exact():
    options = {"popups": 0.4, "expert": True, "state": True}
    pools = [make_pool(ID, 6, options=options) for _ in range(2)]
    demonstrator = make_demonstrator(ID, env_options=options, noise=0.5)
    first, again = (pool.reset(np.arange(6)) for pool in pools)
    assert first["message"] == again["message"] and (first["image"] == again["image"]).all()
    rng = np.random.default_rng(0)
    for _ in range(2):
        pools[0].step(demonstrator.act(pools[0].observation, rng))
    pools[1].reset(np.arange(50, 56))
    pools[1].set_state(pools[0].get_state())
    for _ in range(4):
        said = demonstrator.act(pools[0].observation, rng)
        one, two = (pool.step(said) for pool in pools)
        assert (one.reward == two.reward).all() and (one.terminated == two.terminated).all()
        running = ~(one.terminated | one.truncated)
        assert (one.observation["image"] == two.observation["image"])[running].all()
        assert one.observation["message"] == two.observation["message"]
    for pool in pools:
        pool.close()


def test_the_demonstrator_errs_where_it_is_told_to():
    env, won = make(), {}
    for noise in (0.0, 0.6):
        demonstrator, rng = make_demonstrator(ID, env_options={}, noise=noise), np.random.default_rng(0)
        won[noise] = []
        for seed in range(40):
            seen, over, cut = env.reset(seed=seed)[0], False, False
            while not over and not cut:
                seen, _, over, cut, info = env.step(demonstrator.act({"expert": [seen["expert"]]}, rng)[0])
            won[noise].append(info["is_success"])
    assert np.mean(won[0.0]) == 1 and 0.3 < np.mean(won[0.6]) < 0.98
    with pytest.raises(ValueError, match=r"env\.options\.expert"):
        demonstrator.act({"message": ["?"]}, rng)


def test_elements_have_room_and_do_not_overlap():
    for size, elements in ((48, 9), (64, 9), (64, 2), (200, 9)):
        screens = make(size=size, elements=elements, grid=None, tasks=["icon", "pair", "page", "ticks"]).unwrapped.batch
        for seed in range(30):
            looks, boxes = screens._lay_out(np.random.default_rng(seed), "icon")
            covered = np.zeros((size, size), int)
            for x1, y1, x2, y2 in boxes:
                covered[y1:y2, x1:x2] += 1
                assert min(x2 - x1, y2 - y1) >= 8
            assert covered.max() == 1 and len(set(looks)) == elements and not covered[size - 12 :].any()
