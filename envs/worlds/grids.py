"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2019, arXiv:1810.08272; 2023, arXiv:2306.13831): missions in a grid.

One environment of the package minigrid: the agent's view as symbols, as a picture and in words, as in BabyAI-Text
(Carta et al. 2023, arXiv:2302.02662). Reward, end and time limit are the package's: 1 - 0.9 * steps / limit when the
mission is done. The expert of BabyAI levels is the package's own bot.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.envs.games.batch import Description
from embodied_rft.envs.worlds.world import Follower, World, need, shown_of
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.registry import register

WORDS = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle", "done")
DONE = WORDS.index("done")
SIZES = (11, 6, 4)  # kinds of things, colours, states of a square
UNSEEN, EMPTY, WALL, FLOOR, DOOR, AGENT = 0, 1, 2, 3, 4, 10
THINGS = ("", "", "wall", "", "door", "key", "ball", "box", "goal", "lava", "agent")
COLORS = ("red", "green", "blue", "purple", "yellow", "grey")
STATES = ("open", "closed", "locked")
PLAIN = {WALL, 8, 9}  # things whose colour says nothing
LONGEST_MISSION = 1000
FIRST = {"BabyAI": "GoToRedBallGrey-v0", "MiniGrid": "Empty-Random-5x5-v0"}
RULES = (
    "You are in a world of squares and see what lies ahead. Do what the mission says. Toggle opens doors and boxes; "
    "you can pick up, toggle or drop only right in front of you."
)


class Grid(World[int]):
    """A mission in a grid of rooms, of the package minigrid.

    Args:
        level: id of the package without what its ids begin with: "GoToLocal-v0"; None: GoToRedBallGrey-v0 of BabyAI,
            Empty-Random-5x5-v0 of MiniGrid.
        observation: what is observed, by key: "image" (uint8 [H, W, 3]), "state" (symbols), or "both".
        view: what the picture shows: "agent" (what the agent sees) or "whole".
        tile: pixels of a square on a side.
        mission: whether the mission is observed as a text, key "mission".
        expert: whether the bot's advice is observed, key "expert"; of BabyAI levels.
        family: what ids of the package begin with: "BabyAI" or "MiniGrid".
        render_mode: None, "rgb_array" or "ansi".
    """

    words = (WORDS,)

    def __init__(
        self,
        *,
        level: str | None = None,
        observation: str = "image",
        view: str = "agent",
        tile: int = 8,
        mission: bool = False,
        expert: bool = False,
        family: str = "BabyAI",
        render_mode: str | None = None,
    ) -> None:
        if view not in ("agent", "whole"):
            raise UserError(f"unknown view {view!r}; {nearest(view, ('agent', 'whole'))}")
        if tile < 1:
            raise UserError(f"tile is {tile}; expected at least 1 pixel")
        if expert and family != "BabyAI":
            raise UserError("expert: only levels of BabyAI have one (embodied_rft/BabyAI-v0)")
        self.inner = _make(family, level or FIRST[family])
        self.keys, self.view, self.tile, self.mission = shown_of(observation), view, tile, mission
        self._look(0)
        side = self.inner.agent_view_size
        spaces_of: dict[str, Space] = {
            "image": spaces.Box(0, 255, self.picture().shape, np.uint8),
            "state": spaces.MultiDiscrete([*SIZES * side**2, 4]),
        }
        shown = {key: spaces_of[key] for key in self.keys} | ({"mission": AnyText(LONGEST_MISSION)} if mission else {})
        super().__init__(shown, spaces.Discrete(len(WORDS)), expert=expert, render_mode=render_mode)

    def begin(self, start: int) -> None:
        """A new level."""
        self._look(start)
        self.advice = DONE
        if self.expert:
            from minigrid.utils.baby_ai_bot import BabyAIBot

            self.bot: Any = BabyAIBot(self.inner)
            self._replan(None)

    def advance(self, action: int) -> tuple[float, bool, bool, dict[str, Any]]:
        """One action; success is a reward above 0."""
        self.seen, reward, terminated, truncated, _ = self.inner.step(action)
        if self.expert and not (terminated or truncated):
            self._replan(action)
        over = bool(terminated), bool(truncated and not terminated)
        return float(reward), *over, {"is_success": float(terminated and reward > 0)}

    def observe(self) -> dict[str, Any]:
        """The view, and the mission."""
        told: dict[str, Any] = {"image": self.picture()} if "image" in self.keys else {}
        if "state" in self.keys:
            told["state"] = np.append(self.seen["image"].reshape(-1), self.seen["direction"]).astype(np.int64)
        return told | ({"mission": self.seen["mission"]} if self.mission else {})

    def describe(self) -> Description:
        """The mission, and everything in sight."""
        said = tell(self.seen["image"])
        return Description(RULES, f"Mission: {self.seen['mission']}\n{said}", self.words, WORDS)

    def brief(self) -> Description:
        """The mission, and everything in sight, in few characters."""
        return replace(self.describe(), state=f"{self.seen['mission']}\n{tell_briefly(self.seen['image'])}")

    def picture(self) -> np.ndarray:
        """What the agent sees, or the whole grid."""
        return np.asarray(self.inner.get_frame(self.view == "whole", self.tile, self.view == "agent"), np.uint8)

    def advise(self) -> int:
        """What the bot would do."""
        return self.advice

    def _look(self, start: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints whatever it draws in vain
            self.seen = self.inner.reset(seed=start)[0]

    def _replan(self, action: int | None) -> None:
        if self.bot is not None:
            try:
                self.advice = int(self.bot.replan(action))
            except Exception:  # it gives up where what it needs is gone, such as a box that was opened
                self.bot, self.advice = None, DONE


def _make(family: str, level: str) -> Any:
    need("minigrid", "minigrid")
    import gymnasium

    levels = [id.removeprefix(f"{family}-") for id in gymnasium.registry if id.startswith(f"{family}-")]
    if level not in levels:
        raise UserError(f"unknown level {level!r} of {family}; {nearest(level, levels)}")
    return gymnasium.make(f"{family}-{level}", disable_env_checker=True).unwrapped


class Sight(NamedTuple):
    """What the agent sees: things and the next walls in front of it and beside it, and what it carries."""

    things: list[tuple[str, int, int]]  # name, steps to the right, steps ahead; the nearest first
    walls: list[tuple[int, int]]
    carried: str | None


def look(view: np.ndarray) -> Sight:
    """What is in a view.

    Args:
        view: [W, H, 3] kind, colour and state of squares; the agent is in the middle of the last row and looks at the
            first one; his own square shows what he carries.
    """
    middle, last = view.shape[0] // 2, view.shape[1] - 1
    things: list[tuple[int, int, int, str]] = []
    walls: dict[int, tuple[int, int, int]] = {}
    for across, down in np.ndindex(*view.shape[:2]):
        kind, side, ahead = int(view[across, down, 0]), across - middle, last - down
        if kind in (UNSEEN, EMPTY, FLOOR) or (side == 0 and ahead == 0):
            continue
        if kind != WALL:
            things.append((ahead + abs(side), side, ahead, _name(view[across, down])))
        elif side == 0 or ahead == 0:  # the next wall in each direction
            direction = int(np.sign(side))
            walls[direction] = min(walls.get(direction, (99, 0, 0)), (abs(side) + ahead, side, ahead))
    own = view[middle, last]
    carried = None if own[0] in (UNSEEN, EMPTY, FLOOR, DOOR, AGENT, 8, 9) else _name(own)
    found = [(name, side, ahead) for _, side, ahead, name in sorted(things)]
    return Sight(found, [walls[side][1:] for side in (0, -1, 1) if side in walls], carried)


def tell(view: np.ndarray) -> str:
    """A view in words: "You carry nothing.", and below "You see a red ball 1 step left and 2 steps forward."."""
    seen = look(view)
    said = [f"{_article(name)} {name} {_where(*place)}" for name, *place in seen.things]
    said += [f"a wall {_where(*place)}" for place in seen.walls]
    carried = "nothing" if seen.carried is None else f"{_article(seen.carried)} {seen.carried}"
    return f"You carry {carried}.\nYou see {', '.join(said) or 'nothing'}."


def tell_briefly(view: np.ndarray) -> str:
    """The same in few characters, steps forward, to the left and to the right: "wall 5f 3r, red ball 2f1l".

    The nearest thing stands last, where an answer begins.
    """
    seen = look(view)
    said = [] if seen.carried is None else [f"carry {seen.carried}"]
    said += [" ".join(["wall", *(_there(*place) for place in seen.walls)])] * bool(seen.walls)
    return ", ".join([*said, *(f"{name} {_there(*place)}" for name, *place in reversed(seen.things))])


def _name(square: np.ndarray) -> str:
    kind, color, state = (int(number) for number in square)
    parts = [STATES[state]] if kind == DOOR else []
    parts += [] if kind in PLAIN else [COLORS[color]]
    return " ".join([*parts, THINGS[kind]])


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _where(side: int, ahead: int) -> str:
    steps = [(abs(side), "left" if side < 0 else "right"), (ahead, "forward")]
    return " and ".join(f"{count} step{'s' * (count > 1)} {where}" for count, where in steps if count)


def _there(side: int, ahead: int) -> str:
    steps = [(ahead, "f"), (abs(side), "l" if side < 0 else "r")]
    return "".join(f"{count}{where}" for count, where in steps if count)


@register("demonstrator", "baby_ai_bot", "embodied_rft/BabyAI-v0")
class Bot(Follower[int]):
    """The bot of BabyAI; the environment asks it (`env.options.expert: true`), so that it may label any state.

    Args:
        noise: share of decisions that are drawn at random, in [0, 1].
    """

    def other(self, rng: np.random.Generator) -> int:
        """Any action."""
        return int(rng.integers(len(WORDS)))
