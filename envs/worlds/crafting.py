"""Crafter (Hafner 2022, arXiv:2109.06780): survive, gather and build in a world of its own; 22 achievements.

The package's environment has the interface of before Gymnasium and the order of sets in its dice; here it has
Gymnasium's, and one seed is one episode. Reward is the package's: 1 for each achievement that is new in the episode,
and a tenth of what health changes. An option ends an episode with one achievement, which then is success.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from embodied_rft.envs.games.batch import Description
from embodied_rft.envs.worlds.world import World, need
from embodied_rft.names import UserError, nearest

WIDTH, HEIGHT = 9, 7  # squares in sight
BODY = ("health", "food", "drink", "energy")
FACING = {(0, 1): "south", (0, -1): "north", (1, 0): "east", (-1, 0): "west"}
RULES = (
    "You survive in a world of squares, seen from above. Collect with 'do' what is in front of you: saplings from "
    "grass, wood from trees, with a pickaxe stone, coal and iron; drink water, eat cows and ripe plants, fight zombies "
    "and skeletons. Sleep when energy is low. A table takes wood, a furnace stone, tools are made near them."
)


class Crafter(World[int]):
    """Survive, gather and build in an open world, of the package crafter.

    Args:
        goal: an achievement that ends the episode with success, "collect_wood"; None: the episode ends with death, and
            nothing is called success.
        length: decisions of an episode.
        size: pixels of the picture on a side.
        area: squares of the world on a side.
        render_mode: None, "rgb_array" or "ansi".
    """

    def __init__(
        self,
        *,
        goal: str | None = None,
        length: int = 10_000,
        size: int = 64,
        area: int = 64,
        render_mode: str | None = None,
    ) -> None:
        package = need("crafter", "crafter")
        if goal is not None and goal not in package.constants.achievements:
            raise UserError(f"unknown goal {goal!r}; {nearest(goal, package.constants.achievements)}")
        if length < 1 or size < 9 or area < 16:
            raise UserError(f"length is {length}, size {size}, area {area}; expected at least 1, 9 and 16")
        self.goal, self.length = goal, length
        self.words = (("wait", *(name.replace("_", " ") for name in package.constants.actions[1:])),)
        self.inner = _steady(package)(area=(area, area), size=(size, size), length=None)
        image = spaces.Box(0, 255, (size, size, 3), np.uint8)
        super().__init__({"image": image}, spaces.Discrete(len(self.words[0])), render_mode=render_mode)

    def begin(self, start: int) -> None:
        """A new world."""
        self.inner._seed, self.inner._episode = start, 0
        self.seen, self.steps = self.inner.reset(), 0

    def advance(self, action: int) -> tuple[float, bool, bool, dict[str, Any]]:
        """One action; info tells how often what was achieved in this episode."""
        self.seen, reward, dead, info = self.inner.step(action)
        self.steps += 1
        done = dict(info["achievements"])
        told: dict[str, Any] = {"achievements": done, "num_achievements": sum(count > 0 for count in done.values())}
        reached = self.goal is not None and done[self.goal] > 0
        if self.goal is not None:
            told["is_success"] = float(reached)
        over = bool(dead or reached)
        return float(reward), over, not over and self.steps >= self.length, told

    def observe(self) -> dict[str, np.ndarray]:
        """The picture."""
        return {"image": self.picture()}

    def picture(self) -> np.ndarray:
        """What is near, and the inventory."""
        return np.asarray(self.seen, np.uint8)

    def describe(self) -> Description:
        """What is near, the body and the inventory; the nearest of each kind."""
        player = self.inner._player
        body = ", ".join(f"{name} {player.inventory[name]}" for name in BODY)
        held = ", ".join(f"{k.replace('_', ' ')} {n}" for k, n in player.inventory.items() if n and k not in BODY)
        lines = [f"Goal: {self.goal.replace('_', ' ')}"] if self.goal is not None else []
        lines += ["You are asleep."] if player.sleeping else []
        side, before = FACING[int(player.facing[0]), int(player.facing[1])], self._at(player.pos + player.facing)
        lines += [f"You face {side}: {before}.", f"You see {', '.join(self._near()) or 'nothing else'}."]
        lines += [f"You have {body} (of 9).", f"Inventory: {held or 'empty'}"]
        return Description(RULES, "\n".join(lines), self.words, self.words[0])

    def _at(self, place: np.ndarray) -> str:
        """What is on a square."""
        material, thing = self.inner._world[place]
        return "the end of the world" if material is None else material if thing is None else _name(thing)

    def _near(self) -> list[str]:
        """The nearest of each kind in sight."""
        found: dict[str, tuple[int, str]] = {}
        for x, y in np.ndindex(WIDTH, HEIGHT):
            right, down = x - WIDTH // 2, y - HEIGHT // 2
            if right or down:
                what = self._at(self.inner._player.pos + np.array([right, down]))
                far = (abs(right) + abs(down), f"{what} {_where(right, down)}")
                found[what] = min(found.get(what, far), far)
        return [text for what, (_, text) in sorted(found.items(), key=lambda item: item[1]) if "end of" not in what]


def _steady(package: Any) -> type:
    """The package's environment, whose dice know no order of sets in memory."""

    class Steady(package.Env):  # type: ignore[misc]
        def _balance_chunk(self, chunk: Any, objs: Any) -> None:
            super()._balance_chunk(chunk, sorted(objs, key=lambda each: tuple(each.pos)))

    return Steady


def _name(thing: Any) -> str:
    kind = type(thing).__name__.lower()
    return f"{'ripe' if thing.ripe else 'young'} plant" if kind == "plant" else kind


def _where(right: int, down: int) -> str:
    """Steps to the sides: "2 west and 1 north"."""
    parts = [(abs(right), "west" if right < 0 else "east"), (abs(down), "north" if down < 0 else "south")]
    return " and ".join(f"{count} {side}" for count, side in parts if count)
