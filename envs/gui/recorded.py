"""Single steps of recorded episodes: what was shown is asked again, an answer is paid for agreeing with what was done.

Episodes come from a file of demonstrations, or from the expert of an environment. Boundary: knows no page and no
browser; what lines mean says `actions`, what elements there were the recorded "state".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from embodied_rft.buffer.trajectories import read_trajectories
from embodied_rft.data import Space, Trajectory
from embodied_rft.envs.gui.actions import WRONG, Action, Box, Form, any_click, read, write
from embodied_rft.envs.gui.elements import Element, read_elements
from embodied_rft.envs.serving import EnvBatch, Outcome
from embodied_rft.envs.turns.telling import EXPERT
from embodied_rft.names import UserError, nearest
from embodied_rft.options import check_share
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.seeding import FIRST_EVALUATION_SEED
from embodied_rft.turns.parsing import INVALID, Parser, make_parser

KINDS = tuple(dict.fromkeys((*INVALID, *WRONG)))  # of answers that are not understood
PARTS = ("verb", "target")  # of the reward
LONGEST = 65_536  # characters
STEPS = 1_000  # most of an episode of an expert


@dataclass(frozen=True)
class Step:
    """One recorded decision: what was shown and said so far, and what was done, in pixels."""

    episode: int
    message: str
    image: np.ndarray  # [H, W, 3]
    action: Action
    element: Element | None  # the smallest one that was meant; None: nobody knows


class Agreement(NamedTuple):
    """How far an answer is what was done: Agreement(verb=1.0, target=0.0)."""

    verb: float
    target: float  # of the right verb: its places in the element that was meant, its text, its key


def agree(given: Action, wanted: Action, element: Element | None, *, radius: float) -> Agreement:
    """Verb, and target within the box (Luo et al. 2025, GUI-R1, arXiv:2504.10458; names and arguments as in ToolRL).

    Args:
        given: by the answer.
        wanted: what was done.
        element: that it was done to: any place in its box is right; None: those within a radius are.
        radius: in pixels.
    """
    if given.verb != wanted.verb:
        return Agreement(0.0, 0.0)
    if given.text.strip() != wanted.text.strip() or np.sign(given.by).tolist() != np.sign(wanted.by).tolist():
        return Agreement(1.0, 0.0)
    near = [np.hypot(a - c, b - d) <= radius for (a, b), (c, d) in zip(given.places, wanted.places, strict=True)]
    if element is not None and given.places:  # of a drag, where it begins
        near[0] = _in(element.box, *given.places[0])
    return Agreement(1.0, float(all(near)))


def _in(box: Box, x: float, y: float) -> bool:
    return box.x <= x < box.x + box.width and box.y <= y < box.y + box.height


class Recorded(EnvBatch):
    """One recorded decision an episode: its screen is shown again, an answer is paid for agreeing with what was done.

    Success is agreement in full. Evaluation shows episodes that training never does.

    Args:
        num_envs: N.
        file: of demonstrations (`erft demos`) with messages and pictures, best with the elements under "state".
        of: in its place the id of an environment whose expert is recorded.
        options: of that environment.
        episodes: of that expert.
        held_out: share of the episodes that only evaluations show.
        rewards: weights of "verb" and "target" in the reward.
        radius: pixels around what was clicked on that count as it, where no element is known.
        history: how many of the latest answers stand in the message.
        grid: [columns, rows]: places are cells, not pixels; recorded answers in cells are read so.
        parser: how an answer is read; None: the answer is the line, and no more.
        expert: whether what was done is shown, under "expert".
        invalid: added to the reward of an answer that is not understood.
    """

    one_decision: ClassVar[bool] = True
    arrays = ("evaluates", "place")
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 1}

    def __init__(
        self,
        *,
        num_envs: int,
        file: str | None = None,
        of: str | None = None,
        options: Mapping[str, Any] | None = None,
        episodes: int = 100,
        held_out: float = 0.2,
        rewards: Mapping[Literal["verb", "target"], float] | None = None,
        radius: float = 8.0,
        history: int = 4,
        grid: Sequence[int] | None = None,
        parser: str | Mapping[str, Any] | None = None,
        expert: bool = False,
        invalid: float = 0.0,
    ) -> None:
        super().__init__(num_envs=num_envs)
        if (file is None) == (of is None):
            raise UserError("expected either a file of demonstrations or the environment of an expert, as of")
        if file is not None and (options is not None or episodes != 100):
            raise UserError("options and episodes have no effect beside file: they are those of an expert")
        self.weights = {"verb": 0.2, "target": 0.8} if rewards is None else dict(rewards)
        for part in self.weights:
            if part not in PARTS:
                raise UserError(f"rewards: {part!r} is no part of the reward; {nearest(part, PARTS)}")
        if not 0 < check_share("held_out", held_out, "episodes that only evaluations show") < 1:
            raise UserError(f"held_out is {held_out}: training and evaluation both need episodes")
        self.parser = make_parser(parser or {"id": "words", "strict": True})
        self.radius, self.invalid, self.advises = radius, float(invalid), expert
        played = read_trajectories(file) if file is not None else play(str(of), options or {}, episodes)
        steps, self.form = steps_of(played, self.parser, grid, history)
        count = max(1, round(held_out * len(steps))) if len(steps) > 1 else 0
        if not count:
            raise UserError(
                f"{len(steps)} recorded episodes can be read; expected at least 2, one of them to be held out"
            )
        self.steps = [[one for episode in part for one in episode] for part in (steps[count:], steps[:count])]
        self.evaluates = np.zeros(num_envs, bool)
        self.place = np.full(num_envs, -1)  # in the list; -1: nothing was begun yet
        width, height = self.form.size
        seen: dict[str, Space] = {
            "message": AnyText(LONGEST),
            "image": spaces.Box(0, 255, (height, width, 3), np.uint8),
        }
        self.observation_space = spaces.Dict(seen | ({EXPERT: AnyText(LONGEST)} if expert else {}))
        self.action_space = AnyText(LONGEST)

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """Any step of the episodes that may be shown."""
        for row, seed in zip(rows.tolist(), seeds, strict=True):
            if seed is not None:
                self.evaluates[row] = seed >= FIRST_EVALUATION_SEED
            self.place[row] = self.generators[row].integers(len(self.steps[int(self.evaluates[row])]))

    def _step(self, row: int) -> Step:
        return self.steps[int(self.evaluates[row])][self.place[row]]

    def step(self, rows: np.ndarray, actions: Sequence[str]) -> Outcome:
        """Judge the answers."""
        told: dict[str, list[float]] = {name: [] for name in ("reward/verb", "reward/target")}
        wrong = np.zeros((len(rows), len(KINDS)))
        for number, (row, reply) in enumerate(zip(rows.tolist(), actions, strict=True)):
            given, found = understand(reply, self.parser, self.form, {}), Agreement(0.0, 0.0)
            if isinstance(given, Action):
                one = self._step(row)
                found = agree(given, one.action, one.element, radius=self.radius)
            else:
                wrong[number, KINDS.index(given)] = 1
            for part in PARTS:
                told[f"reward/{part}"].append(getattr(found, part))
        parts = {name: np.array(values) for name, values in told.items()}
        reward = sum(
            weight * parts[f"reward/{part}"] for part, weight in self.weights.items()
        ) + self.invalid * wrong.any(1)
        counted = {f"invalid/{kind}": wrong[:, number] for number, kind in enumerate(KINDS)}
        return Outcome(np.asarray(reward), np.ones(len(rows), bool), parts["reward/target"] == 1, parts | counted)

    def observe(self, rows: np.ndarray) -> dict[str, Any]:
        """What was shown."""
        steps = [None if place < 0 else self._step(row) for row, place in enumerate(self.place)]
        seen: dict[str, Any] = {"message": tuple("" if one is None else one.message for one in steps)}
        none = np.zeros((*reversed(self.form.size), 3), np.uint8)
        seen["image"] = np.stack([none if one is None else one.image for one in steps])
        if self.advises:
            lines = ["" if one is None else self.parser.write(write(one.action, self.form)) for one in steps]
            seen[EXPERT] = tuple(lines)
        return seen

    def guess(self, rng: np.random.Generator) -> str:
        """A click anywhere, in the form that is asked for."""
        return self.parser.write(any_click(rng, self.form))

    def render(self, row: int, mode: str) -> np.ndarray | str | None:
        """The picture, or the message."""
        return self._step(row).message if mode == "ansi" else self._step(row).image


def understand(reply: str, parser: Parser, form: Form, boxes: Mapping[int, Box]) -> Action | str:
    """What an answer wants done, or which kind of wrong it is; two bare numbers are a click."""
    parsed = parser.parse(reply)
    if parsed.action is None:
        assert parsed.invalid is not None
        return parsed.invalid
    line = parsed.action
    return read(f"click {line}" if line[:1].isdigit() else line, form, boxes)


def steps_of(
    played: Sequence[Trajectory], parser: Parser, grid: Sequence[int] | None, history: int
) -> tuple[list[list[Step]], Form]:
    """The steps of each episode that succeeded (or does not say), and how places are written.

    Steps whose answer cannot be read are left out, so are those that wait.

    Raises:
        ValueError: there are no messages, or nothing says how large the screen is.
    """
    if not played or "message" not in played[0].observation:
        raise UserError("the recorded episodes have no messages: record an environment of turns")
    image = played[0].observation.get("image")
    if image is None:
        raise UserError("the recorded episodes have no pictures: record them with observe: image, or both")
    height, width, _ = np.asarray(image[0]).shape
    form = Form((width, height), None if grid is None else (int(grid[0]), int(grid[1])))
    found = []
    for number, one in enumerate(played):
        if one.success is not False:
            steps = list(_of_episode(number, one, parser, form, history))
            found += [steps] if steps else []
    return found, form


def _of_episode(number: int, one: Trajectory, parser: Parser, form: Form, history: int) -> Iterator[Step]:
    messages, states = one.observation["message"], one.observation.get("state")
    for turn, reply in enumerate(one.action):
        elements = [] if states is None else read_elements(states[turn])
        boxes = {element.ref: element.box for element in elements}
        action = understand(reply, parser, form, boxes)
        if not isinstance(action, Action) or action.verb == "wait":
            continue
        meant = [element for element in elements if action.places and _in(element.box, *action.places[0])]
        element = min(meant, key=lambda each: each.box.width * each.box.height, default=None)
        said = [parser.parse(earlier).action or "?" for earlier in one.action[max(0, turn - history) : turn]]
        lines = [messages[0], *([f"Before: {'; '.join(said)}"] if said else []), *([messages[turn]] if turn else [])]
        shown = one.observation["image"][turn]
        yield Step(number, "\n".join(line for line in lines if line), np.asarray(shown), action, element)


def play(of: str, options: Mapping[str, Any], episodes: int) -> list[Trajectory]:
    """Episodes of an environment's own expert, from seeds 0, 1, ..."""
    env, played = gymnasium.make(of, **{**options, "expert": True, "state": True}), []
    try:
        for seed in range(episodes):
            seen, _ = env.reset(seed=seed)
            shown, won = [seen], False
            said: list[str] = []
            while len(said) < STEPS:
                said.append(str(seen[EXPERT]))
                seen, _, over, cut, info = env.step(said[-1])
                shown.append(seen)
                if over or cut:
                    won = bool(info.get("is_success"))
                    break
            columns: dict[str, Any] = {
                key: [each[key] for each in shown] for key in ("message", "image") if key in seen
            }
            columns["state"] = [each["state"] for each in shown]
            played.append(Trajectory(columns, said, np.zeros(len(said), np.float32), "terminated", success=won))
    finally:
        env.close()
    return played
