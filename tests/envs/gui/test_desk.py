"""The desk: errands from seeds, what counts as done, and in a real browser who does them, and who almost does."""

import gymnasium
import numpy as np
import pytest

import embodied_rft.envs  # noqa: F401
from embodied_rft.envs.gui.desk.errands import FOLDERS, ROOMS, SUBJECTS, TASKS, USERS, judge, plan
from embodied_rft.experience.demonstrate import make_demonstrator
from tests.lab.browsing import needs_browser

ID = "embodied_rft/Desk-v0"
NOTHING = {"user": None, "sent": [], "filed": {}}


def all_done(errand):
    """What the page reports after the errand."""
    sent = [] if errand.form is None else [dict(errand.form)]
    return {"user": errand.user, "sent": sent, "filed": dict(errand.filed)}


@pytest.mark.parametrize("task", TASKS)
def test_an_errand_follows_from_its_seed_and_is_done_or_not(task):
    assert plan(task, 7) == plan(task, 7) and plan(task, 7) != plan(task, 8)
    for seed in range(20):
        errand = plan(task, seed)
        done = all_done(errand)
        assert errand.content["accounts"][errand.user] == errand.password and errand.password in errand.instruction
        assert judge(errand, NOTHING) == "open" and judge(errand, done) == "done"
        assert judge(errand, {**done, "user": "somebody else"}) == "wrong"
        assert judge(errand, {**NOTHING, "user": errand.user}) == ("done" if task == "login" else "open")
        assert judge(errand, {**done, "sent": [{"name": "x", "city": "y", "room": "", "urgent": False}]}) == "wrong"
        others = [message["id"] for message in errand.content["messages"] if message["id"] not in errand.filed]
        assert judge(errand, {**done, "filed": {**done["filed"], others[0]: errand.content["folders"][0]}}) == "wrong"
        if errand.form is not None:
            unsent = {**done, "sent": []}
            assert judge(errand, unsent) == "open" and judge(errand, {**done, "sent": done["sent"] * 2}) == "wrong"
            for name, value in errand.form.items():
                wrong = {**errand.form, name: not value if isinstance(value, bool) else f"{value}x"}
                assert judge(errand, {**done, "sent": [wrong]}) == "wrong"
        for message, folder in errand.filed.items():
            other = next(one for one in errand.content["folders"] if one != folder)
            assert judge(errand, {**done, "filed": {**done["filed"], message: other}}) == "wrong"
            left = {name: one for name, one in done["filed"].items() if name != message}
            assert judge(errand, {**done, "filed": left}) == "open"


@pytest.fixture(scope="module")
def make():
    """Desks by their options, one after the other."""
    made = {}

    def one(**options):
        key = str(options)
        if key not in made:
            made[key] = gymnasium.make(ID, **{"expert": True, "state": True, "observe": "image", **options})
        return made[key]

    yield one
    for env in made.values():
        env.close()


def play(env, seed, change=lambda turn, seen: None):
    """(reward, success, turns, over): the expert's lines, or what `change` gives in their place."""
    seen, _ = env.reset(seed=seed)
    for turn in range(30):
        seen, reward, over, cut, info = env.step(change(turn, seen) or seen["expert"])
        if over or cut:
            return reward, info["is_success"], turn + 1, over
    raise AssertionError("it does not end")


@pytest.mark.browser
@needs_browser
def test_the_demonstrator_does_every_errand(make):
    lengths = []
    for seed in range(20):
        reward, success, turns, over = play(make(), seed)
        assert (reward, success, over) == (1, 1, True)
        lengths.append(turns)
    assert min(lengths) >= 5 and max(lengths) <= 16 and len(set(lengths)) >= 4


def parts(seen):
    """{text: (number, box)} of what is seen."""
    lines = [line.split('"') for line in seen["state"].split("\n")]
    return {text: (head.partition("]")[0].strip("["), list(map(int, box.split()))) for head, text, box in lines}


def place(seen, text):
    """A click on what has this text."""
    return f"click [{parts(seen)[text][0]}]"


def aim(seen):
    """The text of what the expert wants to click on; "": it types."""
    verb, *where = seen["expert"].split()
    if verb != "click":
        return ""
    at = list(map(int, where))
    return next(text for text, (_, (x, y, w, h)) in parts(seen).items() if x <= at[0] < x + w and y <= at[1] < y + h)


def any_of(seen, known):
    """A click on one of those."""
    return place(seen, next(one for one in parts(seen) if one in known))


def other(seen, known):
    """A click on one of those that the expert does not want to click on."""
    assert aim(seen) in known
    return any_of(seen, [one for one in known if one != aim(seen)])


MESSAGES = [f"{who}: {what}" for who in USERS for what in SUBJECTS]
NEAR_MISSES = {  # task, what is done in place of the expert's line, whether it is over
    "another folder": ("file", lambda n, seen: other(seen, FOLDERS) if aim(seen) in FOLDERS else None, True),
    "another message": (
        "file", lambda n, seen: other(seen, MESSAGES) if n == 6 else any_of(seen, FOLDERS) if n == 7 else None, True
    ),
    "another room": (
        "form", lambda n, seen: other(seen, ROOMS) if n == 10 else place(seen, "Send") if n == 11 else None, True
    ),
    "unsent": ("form", lambda n, seen: "wait" if aim(seen) == "Send" else None, False),
    "sent empty": ("form", lambda n, seen: place(seen, "Send") if "Send" in parts(seen) else None, True),
    "a letter too many": (
        "form", lambda n, seen: f"{seen['expert']}x" if n == 7 else place(seen, "Send") if n == 8 else None, True
    ),
    "the wrong field": (
        "form",
        lambda n, seen: {6: place(seen, "City"), 7: "type Bob", 8: place(seen, "Send")}.get(n) if n > 5 else None,
        True,
    ),
    "one of two messages": ("sort", lambda n, seen: "wait" if n >= 8 else None, False),
    "the form alone": ("day", lambda n, seen: "wait" if aim(seen) == "Mail" else None, False),
}  # fmt: skip


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_near_misses_fail(make, miss):
    task, change, ends = NEAR_MISSES[miss]
    for seed in range(3):
        reward, success, _, over = play(make(tasks=[task]), seed, change)
        assert (reward, success, over) == (0, 0, ends)


@pytest.mark.browser
@needs_browser
def test_what_is_typed_is_no_markup_and_a_wrong_password_can_be_mended(make):
    env = make(tasks=["login"])
    seen, _ = env.reset(seed=1)
    for said in (seen["expert"], "type <b id=go-form>desk</b>", None):
        seen, reward, over, *_ = env.step(said or place(seen, "Log in"))
        assert not over and set(parts(seen)) == {"User", "Pass", "Log in"}
    turns = 0
    while not over:
        seen, reward, over, _, info = env.step(seen["expert"])
        turns += 1
    assert reward == info["is_success"] == 1 and turns == 6, "click, select all, type; click, type; log in"


@pytest.mark.browser
@needs_browser
def test_a_seed_and_answers_are_the_same_pictures_again(make):
    env, shown = make(tasks=["form"]), []
    for _ in range(2):
        seen, _ = env.reset(seed=3)
        shown.append([seen["image"]])
        for _ in range(9):
            seen, *_ = env.step(seen["expert"])
            shown[-1].append(seen["image"])
    assert all((one == two).all() for one, two in zip(*shown, strict=True))
    assert len({one.tobytes() for one in shown[0]}) == 10


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="did you mean 'form'"):
        gymnasium.make(ID, tasks=["forms"])


@pytest.mark.browser
@needs_browser
def test_the_demonstrator_errs_where_it_is_told_to(make):
    env, rng = make(tasks=["login"]), np.random.default_rng(0)
    demonstrator = make_demonstrator(ID, env_options={"tasks": ["login"]}, noise=0.5)
    seen, _ = env.reset(seed=0)
    said = [demonstrator.act({"expert": [seen["expert"]]}, rng)[0] for _ in range(40)]
    assert 10 < sum(one == seen["expert"] for one in said) < 30 and all(one.startswith("click ") for one in said)
