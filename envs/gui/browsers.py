"""Tabs over browsers: made, replaced when they are lost, and gone when they are closed.

Boundary: knows pages no more than a tab does; `site` says what they are for.
"""

from __future__ import annotations

import time
from pathlib import Path
from weakref import WeakSet

from embodied_rft.envs.gui.chromium import Chromium
from embodied_rft.envs.gui.devtools import Connection, Json
from embodied_rft.envs.gui.tab import Tab
from embodied_rft.names import UserError

TABS_EACH = 8  # tabs of a browser
IDLE = 600.0  # seconds after which those that nobody uses are put to rest: an episode can be played again


class Browser:
    """One process of a browser, and the tabs in it.

    Args:
        patience: seconds that it may take for an answer.
    """

    def __init__(self, *, patience: float = 10.0) -> None:
        self.process = Chromium()
        self.connection = Connection(self.process.reads, self.process.writes, patience=patience)
        self.connection.listeners[None] = self._hear
        self.tabs: dict[str, Tab] = {}  # by session
        self.coming = 0  # tabs that are being made
        self.episodes = 0  # that have begun in it

    async def tab(self, root: Path, size: tuple[int, int], window: tuple[int, int] | None = None) -> Tab:
        """A new tab for the pages of a folder."""
        send = self.connection.send
        context = (await send("Target.createBrowserContext"))["browserContextId"]
        width, height = size
        made = await send(
            "Target.createTarget", url="about:blank", browserContextId=context, width=width, height=height,
            enableBeginFrameControl=True,
        )  # fmt: skip
        session = (await send("Target.attachToTarget", targetId=made["targetId"], flatten=True))["sessionId"]
        tab = self.tabs[session] = Tab(self.connection, session, context, root, size, window)
        denied = send("Browser.setDownloadBehavior", behavior="deny", browserContextId=context)
        await tab.prepare()
        await denied
        return tab

    def drop(self, tab: Tab) -> None:
        """Close a tab; nobody waits until it is gone."""
        if self.tabs.pop(tab.session, None) is not None:
            tab.lose("it was closed")
            self.connection.listeners.pop(tab.session, None)
            self.connection.send("Target.disposeBrowserContext", browserContextId=tab.context)

    def _hear(self, event: str, said: Json) -> None:
        if event == "Target.detachedFromTarget" and (tab := self.tabs.get(said["sessionId"])) is not None:
            tab.lose("it was closed")

    def close(self) -> None:
        """End the process, and all tabs with it."""
        self.connection.die("it was closed")
        self.process.close()


class Browsers:
    """Up to N tabs, each on a page of one folder.

    Args:
        root: folder of the pages.
        size: width and height of what is seen, in pixels.
        num_tabs: N.
        recycle: episodes after which a browser takes no new ones; it is gone when its last one has ended.
        patience: seconds that a browser may take for an answer.
        window: what pages are laid out in, see `Tab`.
    """

    def __init__(
        self,
        root: Path,
        size: tuple[int, int],
        *,
        num_tabs: int,
        recycle: int,
        patience: float,
        window: tuple[int, int] | None = None,
    ) -> None:
        if recycle < 1:
            raise UserError(f"recycle is {recycle}; expected at least 1 episode")
        if patience <= 0:
            raise UserError(f"patience is {patience}; expected some seconds")
        self.root, self.size, self.window, self.recycle, self.patience = root, size, window, recycle, patience
        self.places: list[tuple[Browser, Tab] | None] = [None] * num_tabs
        self.browsers: list[Browser] = []
        self.used = time.monotonic()
        _all.add(self)

    def wake(self) -> None:
        """Said when they are used: others that were not for long are put to rest."""
        self.used = time.monotonic()
        for other in list(_all):
            if other.used < self.used - IDLE:
                other.close()

    def tab(self, row: int) -> Tab | None:
        """The tab of a running episode; None: it was put to rest."""
        place = self.places[row]
        return None if place is None else place[1]

    async def fresh(self, row: int) -> Tab:
        """A tab for a new episode: the one of the last, if it is well."""
        place = self.places[row]
        if place is not None and (place[0].episodes >= self.recycle or place[0].connection.dead is not None):
            self.lose(row)
            place = None
        if place is None:
            browser = next((one for one in self.browsers if self._takes(one)), None)
            if browser is None:
                browser = Browser(patience=self.patience)
                self.browsers.append(browser)
            browser.coming += 1
            try:
                tab = await browser.tab(self.root, self.size, self.window)
            finally:
                browser.coming -= 1
            self.places[row] = place = browser, tab
        place[0].episodes += 1
        return place[1]

    def _takes(self, browser: Browser) -> bool:
        young = browser.episodes + browser.coming < self.recycle
        return browser.connection.dead is None and young and len(browser.tabs) + browser.coming < TABS_EACH

    def lose(self, row: int) -> None:
        """The tab of a row is not used any more."""
        place = self.places[row]
        if place is None:
            return
        self.places[row] = None
        browser, tab = place
        browser.drop(tab)
        done = not browser.tabs and not browser.coming and browser.episodes >= self.recycle
        if (done or browser.connection.dead is not None) and browser in self.browsers:
            browser.close()
            self.browsers.remove(browser)

    def close(self) -> None:
        """End all; new ones are made when they are needed."""
        for browser in self.browsers:
            browser.close()
        self.browsers, self.places = [], [None] * len(self.places)


_all: WeakSet[Browsers] = WeakSet()  # of this process
