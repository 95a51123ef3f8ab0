"""Pages of tests, and what is left of browsers."""

import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from embodied_rft.envs.gui.actions import Box
from embodied_rft.envs.gui.checks import check_browser
from embodied_rft.envs.gui.chromium import find_browser
from embodied_rft.envs.gui.site import Element, Look, Site
from embodied_rft.envs.serving import serve

PROFILES = "embodied-rft-browser-"
ELEMENTS = """() => [...document.querySelectorAll("button, a, input")].map((one) => {
  const box = one.getBoundingClientRect();
  return [one.tagName.toLowerCase(), one.textContent, box.x, box.y, box.width, box.height];
})"""
needs_browser = pytest.mark.skipif(find_browser() is None, reason=check_browser().advice or "a browser is there")


class Rooms(Site):
    """Pages that behave badly, one a task; what is done there adds to `score`."""

    root = Path(__file__).with_name("pages")
    size = (120, 160)

    def __init__(self, tasks=("calm",)):
        self.chosen = list(tasks)

    def tasks(self):
        return self.chosen

    async def open(self, tab, task, seed):
        await tab.open(f"{task}.html", seed=seed)
        return "Press OK."

    async def look(self, tab):
        done, reward = await tab.evaluate("[Boolean(window.done), window.score || 0]")
        seen = await tab.evaluate(f"({ELEMENTS})()")
        boxes = [Element(number, tag, text, Box(*box)) for number, (tag, text, *box) in enumerate(seen)]
        return Look(done, reward, done and reward > 0, boxes)

    async def expert(self, tab, task):
        return "click [0]"


serve("Rooms-v0", "embodied_rft.envs.gui.site:Pages", task=Rooms)


def processes(profile=PROFILES):
    """Those of browsers of ours that run: of all, or of one, by the folder of its profile; without their keepers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        said = process.info["cmdline"] or [""]
        with suppress(psutil.NoSuchProcess):  # gone meanwhile
            if "chrom" in said[0] and profile in " ".join(said) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def profiles():
    """Folders of profiles that lie about."""
    return set(Path(tempfile.gettempdir()).glob(f"{PROFILES}*"))
