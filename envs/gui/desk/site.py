"""The desk as a site: pages opened with an errand, judged by what the page says has happened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from embodied_rft.envs.gui.actions import Box
from embodied_rft.envs.gui.desk.errands import TASKS, Errand, advise, judge, plan
from embodied_rft.envs.gui.elements import Element
from embodied_rft.envs.gui.site import Look, Site
from embodied_rft.envs.gui.tab import Tab
from embodied_rft.names import UserError, nearest

VIEW = (192, 192)


class DeskSite(Site):
    """An office of our own: log in, fill a form, file messages; 5 to 16 turns without a detour.

    The reward is 1, and a success, where the whole errand is done; what cannot be taken back and was not asked for ends
    the episode without: another form, a message in another folder, another user.

    Args:
        tasks: those that episodes draw from: login, file, form, sort (two messages), day (form and message).
    """

    root = Path(__file__).with_name("page")
    size = VIEW
    turns = 30

    def __init__(self, tasks: Sequence[str] = TASKS) -> None:
        for task in tasks:
            if task not in TASKS:
                raise UserError(f"unknown task {task!r}; {nearest(task, TASKS)}")
        if not tasks or len(set(tasks)) < len(tasks):
            raise UserError(f"tasks are {list(tasks)}; expected at least one of {', '.join(TASKS)}, each once")
        self.chosen = tuple(tasks)
        self.errands: WeakKeyDictionary[Tab, Errand] = WeakKeyDictionary()  # of the running episodes

    def tasks(self) -> Sequence[str]:
        """Those that were chosen."""
        return self.chosen

    async def open(self, tab: Tab, task: str, seed: int) -> str:
        """The page, told what it holds."""
        errand = self.errands[tab] = plan(task, seed)
        await tab.open("index.html", seed=seed)
        await tab.evaluate("(content) => desk.begin(content)", errand.content)
        return errand.instruction

    async def look(self, tab: Tab) -> Look:
        """What has happened, as the page holds it."""
        report = await tab.evaluate("desk.report()")
        verdict = judge(self.errands[tab], report)
        elements = [
            Element(number, one["tag"], one["text"], Box(*one["box"])) for number, one in enumerate(report["seen"])
        ]
        done = verdict == "done"
        return Look(verdict != "open", float(done), done, elements)

    async def expert(self, tab: Tab, task: str) -> str:
        """See `errands.advise`."""
        return advise(self.errands[tab], await tab.evaluate("desk.report()"))
