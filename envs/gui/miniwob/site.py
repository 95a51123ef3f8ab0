"""MiniWoB++ as a site: its pages begun from a seed, their raw reward, what counts as solved, demonstrators.

The page's clock does not end episodes and its reward does not decay: turns bound them. Boundary: which tasks there are,
and what solves them, is `tasks`; how they are solved is in `experts/`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from embodied_rft.envs.gui.actions import Box
from embodied_rft.envs.gui.advised import Advised
from embodied_rft.envs.gui.elements import Element
from embodied_rft.envs.gui.miniwob.tasks import MODED, TASKS, WATCHED
from embodied_rft.envs.gui.site import Look, Site
from embodied_rft.envs.gui.tab import Tab
from embodied_rft.envs.serving import serve
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.incidents import Infrastructure
from embodied_rft.registry import register

MODES = ("train", "test")
VIEW, FLIGHT_VIEW = (160, 210), (375, 667)  # what is seen
WINDOW, FLIGHT_WINDOW = (500, 320), (600, 800)  # what pages are laid out in, as the package has it
READY = 100  # times that a page may say that it is not ready
EXPERTS = ("hands", "clicks", "forms", "inboxes", "drags")


@cache
def script(*names: str) -> str:
    """Our JavaScript of these names, one after another."""
    folder = files(__package__)
    return "\n".join(folder.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in names)


def pages() -> Path:
    """The folder of the package's pages; the package is not imported."""
    found = find_spec("miniwob")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "the pages of MiniWoB++ come with the package miniwob: pip install miniwob, or what our own tasks need, "
            "pip install 'embodied-rft[tasks]'"
        )
    return Path(found.submodule_search_locations[0]) / "html"


class MiniWoBSite(Site):
    """The tasks of MiniWoB++, in a real browser: buttons, forms, menus, mail, drawings, of 160 x 210 pixels.

    Args:
        tasks: those that episodes draw from; None: all that a demonstrator solves within the turns.
        mode: "test": some tasks have others to generalise to.
    """

    def __init__(self, tasks: Sequence[str] | None = None, mode: Literal["train", "test"] = "train") -> None:
        chosen = [name for name, task in TASKS.items() if task.expert] if tasks is None else list(tasks)
        for name in chosen:
            if name not in TASKS:
                raise UserError(f"unknown task {name!r}; {nearest(name, TASKS)}")
        if not chosen or len(set(chosen)) < len(chosen):
            raise UserError(f"tasks are {chosen}; expected at least one, each once")
        if mode not in MODES:
            raise UserError(f"mode is {mode!r}; {nearest(mode, MODES)}")
        if mode != "train" and not MODED.intersection(chosen):
            raise UserError(f"mode {mode!r} has no effect: only {', '.join(sorted(MODED))} have one for tests")
        flights = [name for name in chosen if name.startswith("flight.")]
        if flights and len(flights) < len(chosen):
            raise UserError(f"{flights[0]} has a larger page than the others: it cannot be drawn together with them")
        self.root = pages()
        self.size, self.window = (FLIGHT_VIEW, FLIGHT_WINDOW) if flights else (VIEW, WINDOW)
        self.chosen, self.mode = [TASKS[name] for name in chosen], mode
        self.turns = max(task.turns for task in self.chosen)

    @classmethod
    def describe(cls, tasks: Sequence[str] = (), **options: object) -> str:
        """One line about what is registered with these settings."""
        if len(tasks) == 1:
            return f"The page {tasks[0]} of MiniWoB++, in a real browser."
        return "The tasks of MiniWoB++, in a real browser: buttons, forms, menus, mail, drawings, of 160 x 210 pixels."

    def tasks(self) -> Sequence[str]:
        """Those that were chosen."""
        return [task.name for task in self.chosen]

    async def open(self, tab: Tab, task: str, seed: int) -> str:
        """The page anew, its generator seeded as the package does it."""
        known = TASKS[task]
        await tab.open(known.page, seed=seed)
        if task in WATCHED:
            await tab.evaluate(script(*(f"experts/{name}" for name in EXPERTS)))
        rule = known.success
        solved = f"(raw) => raw >= {rule.least} - 1e-6 && Boolean({rule.probe or 'true'})"
        await tab.evaluate(f"({script('begin').strip()})({seed}, '{self.mode}', {solved})")
        for _ in range(READY):
            if await tab.evaluate("WOB_TASK_READY"):
                return str(await tab.evaluate(SAID))
            await tab.wait(50)
        raise Infrastructure("no_page", f"the page of {task} does not become ready")

    async def look(self, tab: Tab) -> Look:
        """Done with the page's raw reward, or not yet; and what can be seen."""
        seen = await tab.evaluate(f"({script('look').strip()})({self.size[0]}, {self.size[1]})")
        elements = [Element(number, tag, text, Box(*box)) for number, (tag, text, *box) in enumerate(seen["elements"])]
        return Look(seen["done"], float(seen["raw"]), seen["solved"], elements)

    async def expert(self, tab: Tab, task: str) -> str | None:
        """The next line of the task's demonstrator."""
        if not TASKS[task].expert:
            return None
        if await tab.evaluate("typeof demonstrators") == "undefined":
            await tab.evaluate(script(*(f"experts/{name}" for name in EXPERTS)))
        line = await tab.evaluate(f"demonstrators.next('{task}', {json.dumps(self.grid)})")
        return None if line is None else str(line)


SAID = (
    """(() => { const said = core.getUtterance(); return said.utterance === undefined ? said : said.utterance; })()"""
)
ANY, EACH = "embodied_rft/MiniWoB-v0", {name: f"embodied_rft/MiniWoB-{name}-v0" for name in TASKS}
serve(ANY, "embodied_rft.envs.gui.site:Pages", task=MiniWoBSite)
for name, id in EACH.items():
    serve(id, "embodied_rft.envs.gui.site:Pages", task=MiniWoBSite, tasks=[name])
register("demonstrator", ANY, *(id for name, id in EACH.items() if TASKS[name].expert))(Advised)
