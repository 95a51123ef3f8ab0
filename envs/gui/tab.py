"""One page in a browser: opened, looked at, clicked and typed into, on a clock that moves only when we say so.

Files come from a folder, as if `ORIGIN` served it; all that goes elsewhere is blocked and counted. Dialogs are
answered, windows are not opened. Boundary: knows no task and no episode; `browsers` makes tabs.
"""

from __future__ import annotations

import base64
import io
import json
import mimetypes
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from embodied_rft.envs.gui.devtools import Connection, Json, Waiting
from embodied_rft.envs.gui.keys import MODIFIERS, Key, chord
from embodied_rft.names import UserError
from embodied_rft.pools.incidents import Infrastructure

ORIGIN = "http://localhost"
EPOCH = 1_700_000_000.0  # seconds: when every episode begins
LOADS = 400  # milliseconds
MOST_LOADS = 20_000
FRAME = 0.01  # milliseconds between two frames at one moment
NOWHERE = (-8.0, -8.0)  # where the mouse is before it has moved
SCRIPT = files(__package__).joinpath("page.js").read_text(encoding="utf-8")  # a function of the seed
REAL = '(globalThis[Symbol.for("embodied_rft")]?.real ?? Date.now)()'
DRAGS = '(globalThis[Symbol.for("embodied_rft")]?.drags ?? (() => false))()'
CLOCK = """(() => {
  const start = (view) => {
    view[Symbol.for("embodied_rft")]?.();
    for (let i = 0; i < view.frames.length; i++) start(view.frames[i]);
  };
  start(window);
})()"""  # of a page and the frames in it: starts now


class Tab:
    """One page, in a browser context and a process of its own.

    Args:
        connection: to its browser.
        session: of the protocol, with this tab.
        context: the browser context that it is in.
        root: folder of its files.
        size: width and height of what is seen, in pixels.
        window: those of the window that the page is laid out in, of which the upper left is seen; None: the same.
    """

    def __init__(
        self,
        connection: Connection,
        session: str,
        context: str,
        root: Path,
        size: tuple[int, int],
        window: tuple[int, int] | None = None,
    ) -> None:
        self.connection, self.session, self.context = connection, session, context
        self.root, self.size, self.window = root.resolve(), size, window or size
        self.counts: Counter[str] = Counter()  # dialogs, windows, blocked requests, ...: since it was opened
        self.mouse = NOWHERE
        self.now = 0.0  # milliseconds that have passed since it exists
        self._loading: dict[str, str] = {}  # requests and frames that are on their way, and the document of each
        self._told = False  # all that the page has asked for is in there: it comes before the answer to what is asked
        self._frame = 0.0  # when the last one was drawn
        self._base = 0.0  # milliseconds on the browser's clock when it began to exist
        self._script: str | None = None
        self._picture: np.ndarray | None = None
        self._dragged: Json | None = None  # what the page lets be dragged
        connection.listeners[session] = self._hear

    def send(self, method: str, **parameters: object) -> Waiting:
        """A command of the protocol."""
        return self.connection.send(method, self.session, **parameters)

    async def prepare(self) -> None:
        """What is done once."""
        width, height = self.window
        sent = [
            self.send("Page.enable"),
            self.send("Fetch.enable", patterns=[{"urlPattern": "*"}]),
            self.send("Network.enable"),
            self.send("Input.setInterceptDrags", enabled=True),
            self.send("Page.setInterceptFileChooserDialog", enabled=True),
            self.send("Emulation.setFocusEmulationEnabled", enabled=True),
            self.send(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
                dontSetVisibleSize=True,
            ),
        ]
        clock = self.send("Emulation.setVirtualTimePolicy", policy="pause", initialVirtualTime=EPOCH)
        for waiting in sent:
            await waiting
        self._base = (await clock)["virtualTimeTicksBase"]

    # --- pages ---------------------------------------------------------------------------------------------------

    async def open(self, path: str, *, seed: int = 0) -> None:
        """A page of the folder, as nobody has seen it before.

        Args:
            path: of the file in the folder; a query may follow.
            seed: of the page's random numbers.
        """
        if self._served(f"{ORIGIN}/{path}") is None:
            raise UserError(f"there is no page {path!r} in {self.root}")
        script = f"{SCRIPT.rstrip()}({seed % 2**32})"
        self._begin()
        if self._script is not None:
            self.send("Page.removeScriptToEvaluateOnNewDocument", identifier=self._script)
        added = self.send("Page.addScriptToEvaluateOnNewDocument", source=script)
        answer = await self.send("Page.navigate", url=f"{ORIGIN}/{path}")
        self._script = (await added)["identifier"]
        if "errorText" in answer:
            raise Infrastructure("no_page", f"{path} does not open: {answer['errorText']}")
        await self._load(path)
        await self._draw()
        await self._settle()
        await self.evaluate(CLOCK)

    async def restart(self, *, seed: int = 0) -> None:
        """Clock, random numbers and mouse are as they are in a fresh page, and the page stays as it is."""
        self._begin()
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=NOWHERE[0], y=NOWHERE[1])
        await self.evaluate(f"{SCRIPT.rstrip()}({seed % 2**32})")
        await self.evaluate(CLOCK)

    def _begin(self) -> None:
        self.counts.clear()
        self._loading.clear()
        self.mouse = NOWHERE

    async def evaluate(self, expression: str, *arguments: object) -> Any:
        """What an expression is worth in the page, as JSON; with arguments it is a function, which is called with them.

        Raises:
            RuntimeError: it throws.
        """
        if arguments:
            expression = f"({expression})({', '.join(json.dumps(argument) for argument in arguments)})"
        answer = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=False)
        self._told = True
        if (thrown := answer.get("exceptionDetails")) is not None:
            said = thrown.get("exception", {}).get("description") or thrown["text"]
            raise RuntimeError(f"the page throws {said:.300} in {expression:.100}")
        return answer["result"].get("value")

    # --- time ----------------------------------------------------------------------------------------------------

    async def wait(self, milliseconds: float, *, frames: int = 1) -> None:
        """Let time pass for the page: it draws so many frames, and after each its timers fire."""
        for _ in range(frames):
            await self._settle()
            await self._draw()
            await self._pass(milliseconds / frames)

    async def _pass(self, milliseconds: float) -> None:
        over = self.connection.expect("Emulation.virtualTimeBudgetExpired", self.session)
        await self.send("Emulation.setVirtualTimePolicy", policy="advance", budget=milliseconds)
        await over
        self._told = True
        self.now += milliseconds

    async def _settle(self) -> None:
        """Let what is loading come to its end."""
        if not self._told:
            await self.evaluate("0")
        while self._loading:
            await self._load("something on the page")

    async def _load(self, what: str) -> None:
        """Loads end only as the clock moves; they take a whole number of `LOADS`, however quick the machine is."""
        start, nudge = await self._read_clock(), 1
        while self._loading or await self.evaluate("document.readyState") != "complete":
            if self.now > start + MOST_LOADS:
                raise Infrastructure("no_page", f"{what} does not load to its end")
            await self._pass(nudge)
            await self._read_clock()
            nudge = min(2 * nudge, LOADS // 8)
        await self._pass(LOADS - (self.now - start) % LOADS)

    async def _read_clock(self) -> float:
        """The browser lets more time pass while something loads, of itself."""
        self.now = float(await self.evaluate(REAL)) - 1000 * EPOCH
        return self.now

    async def screenshot(self) -> np.ndarray:
        """How the page looks, [H, W, 3] uint8."""
        await self._settle()
        answer = await self._draw(screenshot={"format": "png", "optimizeForSpeed": True})
        if "screenshotData" in answer:
            drawn = Image.open(io.BytesIO(base64.b64decode(answer["screenshotData"])))
            self._picture = np.asarray(drawn.convert("RGB"))
        if self._picture is None:
            raise Infrastructure("no_picture", "the browser has drawn nothing")
        return self._picture

    async def _draw(self, **more: object) -> Json:
        """Draw a frame."""
        self._told = False
        self._frame = max(self.now, self._frame + FRAME)
        moment = self._base + self._frame
        async with self.connection.frames:
            try:
                return await self.send("HeadlessExperimental.beginFrame", frameTimeTicks=moment, interval=1, **more)
            except Infrastructure:  # a frame that hangs keeps those of other tabs from being drawn: it ends first
                await self.connection.send("Target.disposeBrowserContext", browserContextId=self.context)
                raise

    async def _with_frame(self, sent: Waiting) -> None:
        """Moves of the mouse and the wheel are taken with the next frame, which must not be drawn before they come."""
        await self.evaluate("0")
        while not sent.done:
            await self._draw()
        await sent

    # --- mouse and keyboard --------------------------------------------------------------------------------------

    async def move(self, x: float, y: float) -> None:
        """Move the mouse."""
        await self._with_frame(self._mouse("mouseMoved", x, y))

    async def press(self, x: float, y: float, *, count: int = 1) -> None:
        """Move there and press the button."""
        await self._all(self._mouse("mouseMoved", x, y), self._mouse("mousePressed", x, y, count))

    async def release(self, x: float, y: float, *, count: int = 1) -> None:
        """Move there and let go of the button."""
        await self._all(self._mouse("mouseMoved", x, y, held=True), self._mouse("mouseReleased", x, y, count))

    async def click(self, x: float, y: float, *, count: int = 1) -> None:
        """Click, once or `count` times in a row."""
        sent = [self._mouse("mouseMoved", x, y)]
        for number in range(1, count + 1):
            sent += [self._mouse("mousePressed", x, y, number), self._mouse("mouseReleased", x, y, number)]
        await self._all(*sent)

    async def drag(self, x: float, y: float, to_x: float, to_y: float, *, steps: int = 4) -> None:
        """Press, move there in some steps, and let go."""
        self._dragged = None
        await self.press(x, y)
        for step in range(1, steps + 1):
            share = step / steps
            moved = self._mouse("mouseMoved", x + (to_x - x) * share, y + (to_y - y) * share, held=True)
            await self._with_frame(moved)
            if await self.evaluate(DRAGS):
                await self._drop(to_x, to_y)
                break
        await self.release(to_x, to_y)

    async def _drop(self, x: float, y: float) -> None:
        """Something of the page itself is dragged, a text that is selected or what is `draggable`: the browser asks."""
        if self._dragged is None:
            await self.connection.expect("Input.dragIntercepted", self.session)
        for kind in ("dragEnter", "dragOver", "drop"):
            await self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=self._dragged)

    async def scroll(self, x: float, y: float, right: float, down: float) -> None:
        """Turn the wheel over a place, by so many pixels."""
        self._mouse("mouseMoved", x, y)
        await self._with_frame(self._mouse("mouseWheel", x, y, deltaX=right, deltaY=down))

    async def type(self, text: str) -> None:
        """Type a text where the focus is."""
        sent = []
        for letter in text:
            sent += self._strike(*chord(letter))
        await self._all(*sent)

    async def key(self, name: str) -> None:
        """Press a key, or several: "Enter", "Control+a"."""
        await self._all(*self._strike(*chord(name)))

    def _strike(self, key: Key, modifiers: int) -> list[Waiting]:
        """A key goes down and up."""
        if not key.code:  # it is on no keyboard
            return [self.send("Input.insertText", text=key.text)]
        said = {"key": key.key, "code": key.code, "windowsVirtualKeyCode": key.number, "timestamp": self._moment}
        said |= {"modifiers": modifiers, "location": key.location}
        text = "" if modifiers & ~MODIFIERS["Shift"] else key.text
        kind = "keyDown" if text else "rawKeyDown"
        down = self.send("Input.dispatchKeyEvent", type=kind, text=text, **said)
        return [down, self.send("Input.dispatchKeyEvent", type="keyUp", **said)]

    def _mouse(self, kind: str, x: float, y: float, count: int = 0, *, held: bool = False, **more: float) -> Waiting:
        self.mouse = (x, y)
        button = "left" if kind in ("mousePressed", "mouseReleased") or held else "none"
        buttons = int(kind == "mousePressed" or held)
        said: dict[str, object] = {"x": x, "y": y, "button": button, "buttons": buttons, "clickCount": count}
        return self.send("Input.dispatchMouseEvent", type=kind, timestamp=self._moment, **said, **more)

    @property
    def _moment(self) -> float:
        """Now, in seconds of the browser's clock."""
        return (self._base + self.now) / 1000

    async def _all(self, *sent: Waiting) -> None:
        self._told = False
        for waiting in sent:
            await waiting

    # --- what the page does of itself ----------------------------------------------------------------------------

    def _hear(self, event: str, said: Json) -> None:
        if event == "Fetch.requestPaused":
            self._answer(said)
        elif event == "Network.requestWillBeSent":
            self._loading[said["requestId"]] = said["loaderId"]
        elif event in ("Network.loadingFinished", "Network.loadingFailed"):
            self._loading.pop(said["requestId"], None)
        elif event == "Page.frameStartedLoading":
            self._loading[said["frameId"]] = ""
        elif event in ("Page.frameStoppedLoading", "Page.frameDetached"):
            self._loading.pop(said["frameId"], None)
        elif event == "Page.frameNavigated":
            if "parentId" not in (frame := said["frame"]):  # what the page before has asked for is of no interest now
                new = ("", frame["loaderId"])
                self._loading = {one: document for one, document in self._loading.items() if document in new}
        elif event == "Page.javascriptDialogOpening":
            self.counts["dialogs"] += 1
            self.send("Page.handleJavaScriptDialog", accept=True, promptText=said.get("defaultPrompt") or "")
        elif event == "Input.dragIntercepted":
            self._dragged = said["data"]
        elif event == "Page.windowOpen":
            self.counts["windows"] += 1
        elif event == "Page.fileChooserOpened":
            self.counts["file_choosers"] += 1
        elif event == "Inspector.targetCrashed":
            self.lose("its process died")

    def lose(self, why: str) -> None:
        """The tab is gone: whoever waits for it is told."""
        self.connection.fail(self.session, Infrastructure("crashed", f"the tab is gone: {why}"))

    def _answer(self, asked: Json) -> None:
        """The file that the page asks for; what is not in the folder is blocked."""
        url, number = asked["request"]["url"], asked["requestId"]
        if (path := self._served(url)) is None:
            self.counts["missing" if url.startswith(f"{ORIGIN}/") else "blocked"] += 1
            self.send("Fetch.failRequest", requestId=number, errorReason="Aborted")
            return
        kind = mimetypes.guess_type(path.name)[0] or "text/plain"
        kind = f"{kind}; charset=utf-8" if kind.startswith("text/") or kind.endswith("javascript") else kind
        self.send(
            "Fetch.fulfillRequest",
            requestId=number,
            responseCode=200,
            responseHeaders=[{"name": "Content-Type", "value": kind}],
            body=base64.b64encode(path.read_bytes()).decode(),
        )

    def _served(self, url: str) -> Path | None:
        """The file of a URL, in our folder."""
        parts = urlsplit(url)
        if f"{parts.scheme}://{parts.netloc}" != ORIGIN:
            return None
        path = (self.root / unquote(parts.path).lstrip("/")).resolve()
        return path if path.is_relative_to(self.root) and path.is_file() else None
