"""The environment that the package miniwob itself brings, by Selenium, driven by lines of ours: what we compare with.

MINIWOB_CHROME_BINARY and MINIWOB_CHROMEDRIVER say where its browser and its driver are; both are needed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import miniwob.reward
from miniwob.environment import MiniWoBEnvironment
from selenium.webdriver.common.action_chains import ActionChains

PROGRAMS = {"MINIWOB_CHROME_BINARY": "chromium", "MINIWOB_CHROMEDRIVER": "chromedriver"}
NAMED = {  # WebDriver's own letters for keys
    "Enter": "\ue006", "Tab": "\ue004", "Backspace": "\ue003", "Escape": "\ue00c", "Space": " ", "Control": "\ue009",
    "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015",
}  # fmt: skip
STEPS = 4  # moves of a drag


class Played(NamedTuple):
    """Played("Click button ONE.", True, 1.0): what was asked, and how it ended."""

    asked: str
    done: bool
    raw: float


def missing() -> str | None:
    """What is not installed of what the package needs; None: nothing."""
    for variable, program in PROGRAMS.items():
        found = os.environ.get(variable) or shutil.which(program)
        if found is None:
            return program
        os.environ[variable] = found
    return None


class PackagePage:
    """One environment of the package: a task, every episode of it on a fresh page.

    Args:
        task: its name.
        pictures: whether screenshots are taken, as its users have them.
    """

    def __init__(self, task: str, *, pictures: bool = False) -> None:
        if (program := missing()) is not None:
            raise RuntimeError(f"the package's own environment needs {program}")
        self.env = MiniWoBEnvironment(
            task, reward_processor=miniwob.reward.get_raw_reward, refresh_freq=1, field_extractor=lambda asked: []
        )
        self.env.set_record_screenshots(pictures)
        self.driver = self.env.instance.driver

    def begin(self, seed: int) -> str:
        """A new episode; gives what is asked."""
        observation, _ = self.env.reset(seed=seed)
        return str(observation["utterance"])

    def play(self, seed: int, lines: Sequence[str], *, pause: float = 0.2, wait: float = 1.0) -> Played:
        """An episode of these lines, as far as it goes.

        Args:
            seed: of the page.
            lines: as `embodied_rft.envs.gui.actions` writes them, in pixels.
            pause: seconds that pass after each.
            wait: seconds that pass after "wait".
        """
        asked = self.begin(seed)
        for line in lines:
            self.perform(line)
            time.sleep(wait if line == "wait" else pause)
            standing = self.env.instance.get_metadata()
            if standing["done"]:
                break
        standing = self.env.instance.get_metadata()
        return Played(asked, standing["done"], float(standing["raw_reward"]))

    def perform(self, line: str) -> None:
        """Do what a line says."""
        verb, _, rest = line.partition(" ")
        chain = ActionChains(self.driver, duration=0)
        if verb in ("click", "double", "move", "drag", "scroll"):
            self._point(chain.w3c_actions, verb, [float(number) for number in rest.split()])
        elif verb == "type":
            for letter in rest:
                chain.w3c_actions.key_action.key_down(letter)
                chain.w3c_actions.key_action.key_up(letter)
        elif verb == "press":
            keys = [NAMED.get(key, key) for key in rest.split("+")]
            for key in keys:
                chain.w3c_actions.key_action.key_down(key)
            for key in reversed(keys):
                chain.w3c_actions.key_action.key_up(key)
        chain.perform()

    def _point(self, actions: Any, verb: str, numbers: list[float]) -> None:
        mouse, (x, y) = actions.pointer_action, numbers[:2]
        mouse.move_to_location(x, y)
        if verb == "click":
            mouse.click()
        elif verb == "double":
            mouse.double_click()
        elif verb == "drag":
            mouse.click_and_hold()
            for step in range(1, STEPS + 1):
                share = step / STEPS
                mouse.move_to_location(x + (numbers[2] - x) * share, y + (numbers[3] - y) * share)
            mouse.release()
        elif verb == "scroll":
            actions.wheel_action.scroll(
                x=int(x), y=int(y), delta_x=int(numbers[2]), delta_y=int(numbers[3]), duration=0
            )

    def close(self) -> None:
        """End its browser."""
        self.env.close()
