"""Sets of pages, and N tabs of one as an environment of turns: screenshots and a message, answered in a line of text.

A `Site` says which tasks there are, how an episode of one begins, and how it stands; `Pages` does the rest: it reads
answers, acts, lets the page's time pass, looks, keeps states. Rows go on side by side. Boundary: knows no particular
page; browsers are `browsers`' affair, verbs those of `actions`.

Legend: N environments, K of them named by `rows`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.envs.gui.actions import WRONG, Action, Form, any_click, perform, read, write
from embodied_rft.envs.gui.browsers import Browsers
from embodied_rft.envs.gui.devtools import together
from embodied_rft.envs.gui.elements import Element
from embodied_rft.envs.gui.tab import Tab
from embodied_rft.envs.serving import EnvBatch, Outcome, State
from embodied_rft.envs.turns.telling import EXPERT
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.seeding import FIRST_EVALUATION_SEED
from embodied_rft.turns.parsing import INVALID, make_parser

OBSERVE = ("image", "text", "both")
STYLES = ("full", "short")
MOST_CHARACTERS = 65_536  # of a message and of an answer
KINDS = (*INVALID, *WRONG)  # of answers that are not understood
EVENTS = ("dialogs", "windows", "blocked", "missing", "file_choosers")  # what pages did of themselves, see `tab`
WAITS = 1000.0  # milliseconds that "wait" waits


@dataclass(frozen=True, slots=True)
class Look:
    """How an episode stands after a turn: Look(done=True, reward=1.0, success=True)."""

    done: bool
    reward: float = 0.0  # of this turn, as the page gives it
    success: bool = False
    elements: Sequence[Element] = ()  # what can be seen now


class Site(ABC):
    """A set of pages: which tasks there are, how an episode of one begins, and how it stands."""

    root: Path  # the folder of its files
    size: tuple[int, int]  # width and height of what is seen, in pixels
    window: tuple[int, int] | None = None  # of the window that pages are laid out in, where it is larger
    grid: tuple[int, int] | None = None  # columns and rows of the cells that places are rounded to; told by `Pages`
    turns: int = 10  # most of an episode
    turn_time: float = 200.0  # milliseconds that pass for the page after an action

    @abstractmethod
    def tasks(self) -> Sequence[str]:
        """Their names, in an order that stays; an episode's seed draws one."""

    @abstractmethod
    async def open(self, tab: Tab, task: str, seed: int) -> str:
        """Begin an episode: all that is random in it follows from `seed`. Gives the instruction."""

    @abstractmethod
    async def look(self, tab: Tab) -> Look:
        """How the episode stands."""

    async def expert(self, tab: Tab, task: str) -> str | None:
        """What a demonstrator would do now, a line of `actions` in pixels; None: there is none for this task."""
        return None


@dataclass(slots=True)
class Episode:
    """What a row is in."""

    task: int = -1  # -1: nothing was begun yet
    seed: int = 0
    replies: list[str] = field(default_factory=list)  # so far: what is needed to be here again
    instruction: str = ""
    message: str = ""
    look: Look = field(default_factory=lambda: Look(False))
    picture: np.ndarray | None = None
    advice: str = ""
    wrong: bool = False  # the last answer was not understood
    happened: dict[str, int] = field(default_factory=dict)  # of `EVENTS`
    counts: dict[str, int] = field(default_factory=dict)  # of answers that were not understood, by kind


class Pages(EnvBatch):
    """N tabs of a site.

    Args:
        site: what is opened.
        num_envs: N.
        parser: how an answer is read, as `tags` or {id: tags, strict: true}; None: the answer is the line, and no more.
        grid: [columns, rows]: places are cells, not pixels.
        observe: whether the page is seen, its elements told in the message, or both.
        state: whether its elements are told under "state" as well: for players and critics.
        expert: whether what the site's demonstrator would answer is shown, under "expert".
        style: "full": the first message says how to answer; "short": the instruction and nothing else.
        invalid: added to the reward of an answer that is not understood.
        turns: most of an episode; None: the site's.
        recycle: episodes that a browser lives for.
        patience: seconds that a browser may take for an answer, before its tab is lost.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 2}

    def __init__(
        self,
        site: Site,
        *,
        num_envs: int,
        parser: str | Mapping[str, Any] | None = None,
        grid: Sequence[int] | None = None,
        observe: Literal["image", "text", "both"] = "image",
        state: bool = False,
        expert: bool = False,
        style: Literal["full", "short"] = "full",
        invalid: float = 0.0,
        turns: int | None = None,
        recycle: int = 200,
        patience: float = 10.0,
    ) -> None:
        super().__init__(num_envs=num_envs)
        for name, given, known in (("observe", observe, OBSERVE), ("style", style, STYLES)):
            if given not in known:
                raise UserError(f"{name} is {given!r}; {nearest(str(given), known)}")
        if turns is not None and turns < 1:
            raise UserError(f"turns is {turns}; expected at least 1")
        if grid is not None and len(grid) != 2:
            raise UserError(f"grid is {list(grid)}; expected [columns, rows]")
        self.site, self.names = site, tuple(site.tasks())
        self.form = Form(site.size, None if grid is None else (int(grid[0]), int(grid[1])))
        self.parser = make_parser(parser or {"id": "words", "strict": True})
        self.draws, self.tells, self.style = observe != "text", observe != "image", style
        self.invalid, self.shows_state, self.advises = float(invalid), state, expert
        self.max_episode_steps = site.turns if turns is None else turns
        seen: dict[str, Space] = {"message": AnyText(MOST_CHARACTERS)}
        if self.draws:
            seen["image"] = spaces.Box(0, 255, (site.size[1], site.size[0], 3), np.uint8)
        seen |= {key: AnyText(MOST_CHARACTERS) for key, on in (("state", state), (EXPERT, expert)) if on}
        self.observation_space, self.action_space = spaces.Dict(seen), AnyText(MOST_CHARACTERS)
        self.evaluates = np.zeros(num_envs, dtype=bool)
        self.episodes = [Episode() for _ in range(num_envs)]
        site.grid = self.form.grid
        self.browsers = Browsers(
            site.root, site.size, num_tabs=num_envs, recycle=recycle, patience=patience, window=site.window
        )

    # --- episodes ------------------------------------------------------------------------------------------------

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """New episodes: a task, and a seed of its page, even in training and odd in evaluation."""
        for row, seed in zip(rows.tolist(), seeds, strict=True):
            if seed is not None:
                self.evaluates[row] = seed >= FIRST_EVALUATION_SEED
            generator = self.generators[row]
            task = int(generator.integers(len(self.names))) if len(self.names) > 1 else 0
            self.episodes[row] = Episode(task, 2 * int(generator.integers(2**30)) + int(self.evaluates[row]))
        self._run({row: self._begin(row) for row in rows.tolist()})

    def step(self, rows: np.ndarray, actions: Sequence[str]) -> Outcome:
        """Read the answers, and do what they say."""
        self._run({row: self._turn(row, reply) for row, reply in zip(rows.tolist(), actions, strict=True)})
        episodes = [self.episodes[row] for row in rows.tolist()]
        looks = [episode.look for episode in episodes]
        wrong = np.array([episode.wrong for episode in episodes])
        counted = {f"invalid/{kind}": np.array([one.counts.get(kind, 0) for one in episodes]) for kind in KINDS}
        counted |= {f"pages/{kind}": np.array([one.happened.get(kind, 0) for one in episodes]) for kind in EVENTS}
        reward = np.array([look.reward for look in looks], dtype=np.float64) + self.invalid * wrong
        return Outcome(reward, np.array([k.done for k in looks]), np.array([k.success for k in looks]), counted)

    def _run(self, coroutines: Mapping[int, Coroutine[Any, Any, object]]) -> None:
        """Rows side by side; what fails is void."""
        self.browsers.wake()
        for row, result in together(coroutines).items():
            if isinstance(result, Exception):
                self.browsers.lose(row)
                self.fail(row, result)

    async def _begin(self, row: int) -> Tab:
        episode = self.episodes[row]
        tab = await self.browsers.fresh(row)
        episode.instruction = await self.site.open(tab, self.names[episode.task], episode.seed)
        episode.message = self._first(episode.instruction)
        await self._look(row, tab)
        return tab

    async def _turn(self, row: int, reply: str) -> None:
        """One answer."""
        episode, tab = self.episodes[row], self.browsers.tab(row)
        if tab is None:  # it was put to rest
            tab = await self._again(row)
        episode.replies.append(reply)
        action = self._understand(reply, episode)
        episode.wrong = not isinstance(action, Action)
        if not isinstance(action, Action):
            episode.counts[action] = episode.counts.get(action, 0) + 1
            episode.look = Look(False, elements=episode.look.elements)
            episode.message = self._wrong(action)
            return
        await perform(tab, action)
        await tab.wait(WAITS if action.verb == "wait" else self.site.turn_time)
        episode.message = "ok" if self.style == "short" else f"Done: {write(action, self.form)}"
        await self._look(row, tab)

    async def _look(self, row: int, tab: Tab) -> None:
        """What is shown now."""
        episode = self.episodes[row]
        episode.look = await self.site.look(tab)
        episode.happened = dict(tab.counts)
        if self.draws:
            episode.picture = await tab.screenshot()
        if self.advises and not episode.look.done:
            line = await self.site.expert(tab, self.names[episode.task])
            episode.advice = "" if line is None else self.parser.write(self._in_form(line, episode))

    def _understand(self, reply: str, episode: Episode) -> Action | str:
        """What is to be done; or which kind of wrong the answer is."""
        parsed = self.parser.parse(reply)
        if parsed.action is None:
            assert parsed.invalid is not None
            return parsed.invalid
        return read(parsed.action, self.form, {element.ref: element.box for element in episode.look.elements})

    def _in_form(self, line: str, episode: Episode) -> str:
        """A line of a demonstrator as this environment wants it."""
        boxes = {element.ref: element.box for element in episode.look.elements}
        action = read(line, Form(self.site.size), boxes)
        assert isinstance(action, Action), f"the demonstrator of {self.names[episode.task]} says {line!r}: {action}"
        return write(action, self.form)

    def guess(self, rng: np.random.Generator) -> str:
        """A click anywhere, in the form that is asked for."""
        return self.parser.write(any_click(rng, self.form))

    # --- messages ------------------------------------------------------------------------------------------------

    def _first(self, instruction: str) -> str:
        if self.style == "short":
            return instruction
        return f"{instruction}\nAnswer like {self.parser.how('click 3 4')}. Actions: {self.form.how()}"

    def _wrong(self, kind: str) -> str:
        said = kind.replace("_", " ")
        return f"? {said}" if self.style == "short" else f"? Your answer was not understood: {said}."

    def observe(self, rows: np.ndarray) -> dict[str, Any]:
        """Messages, screenshots, elements."""
        told = [self._told(episode) for episode in self.episodes]
        messages = [episode.message for episode in self.episodes]
        if self.tells:
            messages = [f"{one}\n{state}" if state else one for one, state in zip(messages, told, strict=True)]
        seen: dict[str, Any] = {"message": tuple(messages)}
        if self.draws:
            seen["image"] = np.zeros((self.num_envs, self.site.size[1], self.site.size[0], 3), np.uint8)
            for row, episode in enumerate(self.episodes):
                if episode.picture is not None:
                    seen["image"][row] = episode.picture
        if self.shows_state:
            seen["state"] = tuple(told)
        if self.advises:
            seen[EXPERT] = tuple(episode.advice for episode in self.episodes)
        return seen

    @staticmethod
    def _told(episode: Episode) -> str:
        return "\n".join(str(element) for element in episode.look.elements)

    def render(self, row: int, mode: str) -> np.ndarray | str | None:
        """The page, or the message."""
        return self.episodes[row].message if mode == "ansi" else self.episodes[row].picture

    # --- states --------------------------------------------------------------------------------------------------

    def get_state(self) -> State:
        """What episodes began with, and the answers since."""
        said = [json.dumps([one.task, one.seed, one.replies]).encode() for one in self.episodes]
        story = np.zeros((self.num_envs, max(map(len, said))), np.uint8)
        for row, one in enumerate(said):
            story[row, : len(one)] = np.frombuffer(one, np.uint8)
        return {"evaluates": self.evaluates.copy(), "story": story}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue: the episodes are played again."""
        self.evaluates[:] = state["evaluates"]
        for row in range(self.num_envs):
            self._take(row, bytes(np.asarray(state["story"][row], np.uint8)))
        self._play_again([row for row in range(self.num_envs) if self.episodes[row].task >= 0])

    def save(self, row: int) -> object:
        """One episode."""
        state = self.get_state()
        return bool(state["evaluates"][row]), state["story"][row].tobytes()

    def restore(self, row: int, saved: object) -> None:
        """Go on with one."""
        evaluates, story = cast(tuple[bool, bytes], saved)
        self.evaluates[row] = evaluates
        self._take(row, story)
        if self.episodes[row].task >= 0:
            self._play_again([row])

    def _take(self, row: int, story: bytes) -> None:
        task, seed, replies = json.loads(story.rstrip(b"\0"))
        self.episodes[row] = Episode(task, seed, replies)

    def _play_again(self, rows: Sequence[int]) -> None:
        async def play(row: int) -> None:
            await self._again(row)

        self._run({row: play(row) for row in rows})

    async def _again(self, row: int) -> Tab:
        """Play the episode of a row, up to where it is."""
        episode = self.episodes[row]
        replies, episode.replies = episode.replies, []
        episode.counts.clear()
        tab = await self._begin(row)
        for reply in replies:
            await self._turn(row, reply)
        return tab

    def close(self) -> None:
        """End the browsers."""
        self.browsers.close()
