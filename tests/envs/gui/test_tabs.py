"""One page in a real browser: what it shows is the same in every run, and whatever it does of itself is counted."""

import time
from pathlib import Path

import numpy as np
import pytest

from embodied_rft.envs.gui.browsers import Browser
from embodied_rft.envs.gui.devtools import Refused, alone, together
from embodied_rft.names import UserError
from tests.lab.browsing import Rooms, needs_browser, processes

pytestmark = [pytest.mark.browser, needs_browser]


@pytest.fixture(scope="module")
def browser():
    made = Browser()
    yield made
    made.close()


@pytest.fixture
def tab(browser):
    made = alone(browser.tab(Rooms.root, Rooms.size))
    yield made
    browser.drop(made)


async def story(tab, seed, *, slowly=0.0):
    """What a page shows while it is used; `slowly`: seconds that we dawdle between commands, as busy machines do."""
    await tab.open("calm.html", seed=seed)
    seen = [await tab.screenshot()]
    for act in (
        lambda: tab.click(50, 80),
        lambda: tab.type("Hi, 5%!"),
        lambda: tab.move(50, 20),
        lambda: tab.key("Control+a"),
        lambda: tab.key("Backspace"),
        lambda: tab.drag(20, 80, 60, 80),
        lambda: tab.scroll(50, 80, 0, 40),
        lambda: tab.click(50, 50),
    ):
        await act()
        time.sleep(slowly)
        await tab.wait(200, frames=2)
        time.sleep(slowly)
        seen.append(await tab.screenshot())
    seen.append(np.array(await tab.evaluate("[Date.now(), Math.random(), document.querySelectorAll('img').length]")))
    return seen


def test_a_seed_and_actions_show_the_same_however_fast_the_machine_is(browser, tab):
    first = alone(story(tab, 3))
    assert all((one == other).all() for one, other in zip(first, alone(story(tab, 3, slowly=0.02)), strict=True))
    others = {number: alone(browser.tab(Rooms.root, Rooms.size)) for number in range(3)}
    for seen in together({number: story(one, 3) for number, one in others.items()}).values():
        assert all((one == other).all() for one, other in zip(first, seen, strict=True))
    for one in others.values():
        browser.drop(one)
    assert (alone(story(tab, 4))[0] != first[0]).any()
    assert (first[0] != first[1]).any() and first[-1][-1] == 9  # the ball rolls, and eight pictures were loaded


def test_a_page_begins_at_the_same_moment_whenever_it_is_opened(tab):
    async def clock():
        await tab.open("calm.html")
        began = await tab.evaluate("[Date.now(), new Date().getTime(), Math.random()]")
        await tab.wait(1234)
        await tab.restart()
        return began, await tab.evaluate("[Date.now(), new Date().getTime(), Math.random()]")

    (first, again), (second, _) = alone(clock()), alone(clock())
    assert first[:2] == second[:2] == again[:2] and first[2] == second[2]


PLACE = """(name) => {
  const all = [...document.querySelectorAll("button, a")];
  const box = all.find((one) => one.textContent === name).getBoundingClientRect();
  return [box.x + 5, box.y + 5];
}"""
HAPPENS = {  # what is clicked: what is counted, and what the page makes of it
    "confirm": ("dialogs", True),
    "prompt": ("dialogs", "me"),
    "open": ("windows", None),
    "blank": ("windows", None),
    "away": ("blocked", None),
    "location": ("blocked", None),
    "post": ("blocked", None),
    "fetch": ("blocked", "refused"),
    "socket": (None, "refused"),
    "file": (None, None),
    "download": (None, None),
    "close": (None, "still here"),
    "missing": ("missing", "refused"),
}


@pytest.mark.parametrize("name", HAPPENS)
def test_what_a_page_tries_is_answered_or_blocked_and_counted(browser, tab, name):
    async def click():
        await tab.open("bad.html")
        await tab.click(*await tab.evaluate(PLACE, name))
        await tab.wait(200, frames=2)
        targets = (await browser.connection.send("Target.getTargets"))["targetInfos"]
        said = await tab.evaluate("[document.title, said]")
        return said, sum(one.get("browserContextId") == tab.context for one in targets)

    counted, said = HAPPENS[name]
    assert alone(click()) == (["bad", said], 1)
    assert dict(tab.counts) == ({} if counted is None else {counted: 1})


@pytest.mark.parametrize(("y", "dialogs"), [(135, 1), (145, 0)])
def test_pages_of_the_same_folder_are_gone_to(tab, y, dialogs):
    async def click():
        await tab.open("bad.html")
        await tab.click(5, y)
        await tab.wait(200, frames=2)
        return await tab.evaluate("document.title")

    assert alone(click()) == "calm" and tab.counts["dialogs"] == dialogs


def test_errors_of_pages_say_what_was_asked(tab):
    with pytest.raises(UserError, match="no page 'nothing.html' in"):
        alone(tab.open("nothing.html"))
    with pytest.raises(UserError, match="no page '../browsing.py'"):
        alone(tab.open("../browsing.py"))
    alone(tab.open("calm.html"))
    with pytest.raises(RuntimeError, match="the page throws ReferenceError: nobody is not defined"):
        alone(tab.evaluate("nobody + 1"))

    async def unknown():
        await tab.send("Page.fly")

    with pytest.raises(Refused, match="Page.fly: 'Page.fly' wasn't found"):
        alone(unknown())


def test_the_clipboard_belongs_to_a_tab(browser, tab):
    other = alone(browser.tab(Rooms.root, Rooms.size))

    async def write(one, text):
        await one.open("calm.html")
        await one.click(50, 80)
        await one.type(text)
        await one.key("Control+a")
        await one.key("Control+c")

    async def paste(one):
        await one.key("End")
        await one.key("Control+v")
        return await one.evaluate("document.querySelector('input').value")

    together({0: write(tab, "mine"), 1: write(other, "yours")})
    assert together({0: paste(tab), 1: paste(other)}) == {0: "minemine", 1: "yoursyours"}
    browser.drop(other)


def test_a_browser_that_dies_tells_everybody_who_waits():
    doomed = Browser()
    one, other = (alone(doomed.tab(Rooms.root, Rooms.size)) for _ in range(2))

    async def wait(tab, kills):
        await tab.wait(10)
        for process in processes(doomed.process.profile) if kills else ():
            process.kill()
        while True:
            await tab.wait(10)

    found = together({0: wait(one, False), 1: wait(other, True)})
    assert [error.reason for error in found.values()] == ["dead_browser"] * 2
    doomed.close()
    assert not processes(doomed.process.profile) and not Path(doomed.process.profile).exists()
