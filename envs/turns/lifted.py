"""Any environment with choices, lifted to turns of text: it shows a message, and takes what is read from a reply.

The observation is the new message of a turn and nothing of those before; pictures beside it, if asked for. The first
message of an episode holds the rules. An answer that is not understood moves nothing (or does what `instead` says),
costs what `invalid` says, is counted by its kind in info, and the next message tells of it. Boundary: knows no model;
parsers are the engine's (`turns.parsing`), what is lifted is in `hosts`, how it is told in `telling`.

Legend: N environments, K of them named by `rows`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
from gymnasium import spaces

from embodied_rft.data import Space
from embodied_rft.envs.serving import EnvBatch, Outcome, State
from embodied_rft.envs.turns.hosts import make_host, state_of, state_space
from embodied_rft.envs.turns.speech import InMenu, Legal, speech_of
from embodied_rft.envs.turns.telling import EXPERT, LEGAL, Told, number_form, untold
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.protocol import flatten_space
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.turns.parsing import INVALID, Invalid, make_parser

OBSERVE = ("text", "image", "both")
STYLES = ("full", "short")
MOST_CHARACTERS = 65_536  # of a message and of a reply
UNDERSTOOD = -1  # no kind of invalid answer
MOST_IN_VAIN = 100  # answers in a row that are not understood: where nobody counts turns, they end the episode


class Lifted(EnvBatch):
    """A conversation about any environment: states told in words or drawn, actions read from replies.

    Args:
        num_envs: N.
        of: id of the environment that is lifted.
        options: of that environment.
        wrap: what is around it, as `env.wrappers` says it; batches of ours take nothing.
        parser: how an answer is read, as `tags` or {id: tags, strict: true}.
        words: of its actions, in their order (a list of them for each choice); None: the environment's, or numbers.
        bins: of actions that are numbers, so many values of each, evenly spaced; None: 5.
        numbers: answers are any numbers within the bounds, not the words of `bins`.
        menu: legal actions are listed with numbers in every message, and an answer is a number.
        observe: whether the state is told in text, drawn as an image, or both.
        state: whether its symbols or numbers are shown as well, under "state": for players and critics.
        told: whether the state is told in text under "told" whatever is observed: for thoughts of demonstrators.
        style: "full": rules, how to answer, what is legal; "short": the state and nothing else, as briefly as the
            environment can.
        rules: in the place of the environment's own.
        digits: significant ones of numbers that are told; None: 3.
        decimals: in their place so many digits behind the point, and the sign: "-0.04 +1.20", which stand in columns.
        invalid: added to the reward of an answer that is not understood.
        instead: word of the action that is done then; None: nothing moves, and the turn is over.
        turns: most of an episode; None: as many as the environment allows.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}

    def __init__(
        self,
        *,
        num_envs: int,
        of: str,
        options: Mapping[str, Any] | None = None,
        wrap: Sequence[Mapping[str, Any]] = (),
        parser: str | Mapping[str, Any] = "tags",
        words: Sequence[Any] | None = None,
        bins: int | None = None,
        numbers: bool = False,
        menu: bool = False,
        observe: Literal["text", "image", "both"] = "text",
        state: bool = False,
        told: bool = False,
        style: Literal["full", "short"] = "full",
        rules: str | None = None,
        digits: int | None = None,
        decimals: int | None = None,
        invalid: float = 0.0,
        instead: str | None = None,
        turns: int | None = None,
    ) -> None:
        super().__init__(num_envs=num_envs)
        for name, given, known in (("observe", observe, OBSERVE), ("style", style, STYLES)):
            if given not in known:
                raise UserError(f"{name} is {given!r}; {nearest(str(given), known)}")
        if rules is not None and style == "short":
            raise UserError("rules have no effect with style short, which tells the state only")
        self.reads, self.draws, self.style, self.invalid = observe != "image", observe != "text", style, float(invalid)
        self.host = make_host(
            of, options or {}, wrap, self.generators, draws=self.draws, shows_state=state or told or self.reads
        )
        self.can_save = self.host.can_save
        most = self.host.limit or math.inf
        if turns is not None and not 1 <= turns <= most:
            raise UserError(f"turns is {turns}; expected 1 to {most}, where the environment ends an episode")
        self.max_episode_steps = self.host.limit if turns is None else turns
        if not (digits is None and decimals is None) and (self.host.describes or not (self.reads or told)):
            raise UserError("digits and decimals have no effect where no numbers are told: leave them out")
        self.of, self.rules, self.form, self.menu = of, rules, number_form(digits, decimals), menu
        self._refuse_silence(observe)
        self.speech = speech_of(self.host.action_space, self.host.env, words=words, bins=bins, numbers=numbers)
        self._set_parser(parser, instead)
        self.legal: list[Legal] = [None] * num_envs  # what is legal now
        self.counts = np.zeros((num_envs, len(INVALID)), np.int64)  # invalid answers of the running episodes, by kind
        self.trouble = np.full(num_envs, UNDERSTOOD, np.int64)  # kind of the latest answer
        self.turn = np.full(num_envs, -1, np.int64)  # of the running episodes; -1: none was started
        self.messages, self.told = [""] * num_envs, [""] * num_envs
        self.vain = np.zeros(num_envs, np.int64)  # answers in a row that were not understood
        self.silent = np.zeros(num_envs, dtype=bool)  # seen to say nothing of success
        self.arrays = ("counts", "trouble", "turn", "vain", "silent")
        self._set_spaces(shows_state=state, told=told)

    def _refuse_silence(self, observe: str) -> None:
        """Nothing that decides is left out of messages."""
        if observe == "text" and not self.host.describes and (missing := untold(self.host.observation_space)):
            raise UserError(
                f"{missing[0]!r} of the observations of {self.of!r} is too large to be told, and nothing else shows "
                "it: set observe to both, or lift what has a method describe(), as all environments of ours have"
            )
        if self.menu and not self.host.describes:
            raise UserError(f"menu: {self.of!r} does not tell what is legal: leave it out")

    def _set_parser(self, parser: Any, instead: str | None) -> None:
        """Who reads the answers, and what is done when they are not understood."""
        if self.menu:
            self.speech = InMenu(self.speech)
        self.words = self.speech.words
        self.parser = make_parser(parser, words=self.words)
        self.vocabulary = self.parser.vocabulary
        read = self.parser.parse(self.parser.write(self.speech.example)).action
        if read != self.speech.example:
            raise UserError(
                f"the parser {parser!r} reads {read!r} where {self.speech.example!r} is answered: set its option "
                "strict to true, or take one with a frame, as tags"
            )
        if instead is not None and self.menu:
            raise UserError("instead has no effect beside menu, where numbers mean something else at every turn")
        self.instead = None if instead is None else self.speech.read(instead)
        if instead is not None and self.instead is None:
            known = self.words[0] if self.words else (self.speech.example,)
            raise UserError(f"instead is {instead!r}, which is no action; {nearest(instead, known)}")

    def _set_spaces(self, *, shows_state: bool, told: bool) -> None:
        seen: dict[str, Space] = {"message": AnyText(MOST_CHARACTERS)}
        self.pictures: np.ndarray | None = None
        if self.draws:
            self.pictures = np.zeros((self.num_envs, *self._first_picture().shape), np.uint8)
            seen["image"] = spaces.Box(0, 255, self.pictures.shape[1:], np.uint8)
        self.shows_state, self.tells = shows_state, told
        if shows_state:
            inner = state_space(self.host.observation_space)
            if inner is None:
                raise UserError(
                    f"observations {self.host.observation_space} hold no symbols or numbers: leave state out"
                )
            seen["state"] = inner
        if told:
            seen["told"] = AnyText(MOST_CHARACTERS)
        inside = flatten_space(self.host.observation_space)
        self.advises = EXPERT in inside
        if self.advises:
            seen[EXPERT] = inside[EXPERT]
        self.lists_legal = self.menu and (shows_state or self.advises)  # somebody plays, who must know
        if self.lists_legal:
            seen[LEGAL] = AnyText(MOST_CHARACTERS)
        self.observation_space, self.action_space = spaces.Dict(seen), AnyText(MOST_CHARACTERS)

    def _first_picture(self) -> np.ndarray:
        rows = np.arange(1)
        failed = self.host.start(rows, [0], {})
        drawn = None if failed else self.host.picture(0)
        if drawn is None:
            why = f": {failed[0][1]}" if failed else ""
            raise UserError(f"the environment cannot be drawn{why}; set observe to text")
        return drawn

    @staticmethod
    def describe(of: str | None = None, **options: object) -> str:
        """One line for lists."""
        return "Any environment of choices as a conversation." if of is None else f"{of} as a conversation."

    # --- episodes ------------------------------------------------------------------------------------------------

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """New episodes; the first messages hold the rules."""
        self.broken.update(self.host.start(rows, seeds, options))
        self.counts[rows], self.trouble[rows], self.turn[rows], self.vain[rows] = 0, UNDERSTOOD, 0, 0
        self._write(rows)

    def step(self, rows: np.ndarray, actions: Sequence[str]) -> Outcome:
        """Read the answers, and do what they say."""
        understood = [self._understand(reply, row) for reply, row in zip(actions, rows.tolist(), strict=True)]
        kinds, wanted = np.array([kind for kind, _ in understood]), [action for _, action in understood]
        wrong = kinds != UNDERSTOOD
        self.trouble[rows], self.turn[rows] = kinds, self.turn[rows] + 1
        self.counts[rows[wrong], kinds[wrong]] += 1
        self.vain[rows] = np.where(wrong, self.vain[rows] + 1, 0)
        moved = np.flatnonzero([action is not None for action in wanted])
        reward, terminated = self.invalid * wrong, np.zeros(len(rows), dtype=bool)
        truncated = (self.vain[rows] >= MOST_IN_VAIN) & (self.max_episode_steps is None)
        success = np.zeros(len(rows), dtype=bool)  # who did nothing solved nothing
        if len(moved):
            outcome, failed = self.host.step(rows[moved], [wanted[number] for number in moved.tolist()])
            self.broken.update(failed)
            reward[moved] += outcome.reward
            terminated[moved] = outcome.terminated
            self.silent[rows[moved]] = outcome.success is None
            success[moved] = False if outcome.success is None else outcome.success
            if outcome.truncated is not None:
                truncated[moved] |= outcome.truncated
        self._write(rows)
        said = None if self.silent.any() else success
        return Outcome(reward, terminated, said, self._counted(rows), truncated)

    def _understand(self, reply: str, row: int) -> tuple[int, Any]:
        """What is wrong with an answer, and the action that follows; None: none does."""
        parsed = self.parser.parse(reply)
        invalid: Invalid | None = parsed.invalid
        if parsed.action is not None:
            if (action := self.speech.read(parsed.action, self.legal[row])) is not None:
                return UNDERSTOOD, action
            invalid = "unknown_word"
        assert invalid is not None
        return INVALID.index(invalid), self.instead

    def _counted(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """How many answers of each kind were invalid in the running episodes."""
        return {f"invalid/{kind}": self.counts[rows, number] for number, kind in enumerate(INVALID)}

    def observe(self, rows: np.ndarray) -> dict[str, Any]:
        """The messages, and pictures that are drawn anew for `rows`."""
        seen: dict[str, Any] = {"message": tuple(self.messages)}
        if self.pictures is not None:
            if len(rows):
                self.pictures = self.pictures.copy()  # what was given away stays as it is
            for row, drawn in self.host.pictures(rows).items():
                if drawn is not None and row not in self.broken and self.turn[row] >= 0:
                    self.pictures[row] = drawn
            seen["image"] = self.pictures
        if self.shows_state:
            seen["state"] = state_of(self.host.observation_space, self.host.observation())
        if self.tells:
            seen["told"] = tuple(self.told)
        if self.advises:
            advice = self.host.observation()[EXPERT]
            seen[EXPERT] = tuple(advice) if isinstance(advice, list) else advice.copy()
        if self.lists_legal:
            seen[LEGAL] = tuple("\n".join(legal or ()) for legal in self.legal)
        return seen

    # --- messages ------------------------------------------------------------------------------------------------

    def _write(self, rows: np.ndarray) -> None:
        """The new messages of `rows`."""
        for row in rows.tolist():
            if row in self.broken or self.turn[row] < 0:
                self.messages[row], self.told[row], self.legal[row] = "", "", None
                continue
            asked = self.reads or self.tells or self.menu or self.turn[row] == 0
            now = self.host.tell(row, form=self.form, briefly=self.style == "short") if asked else None
            self.told[row] = now.state if now is not None and self.tells else ""
            self.legal[row] = None if now is None else now.legal
            self.messages[row] = "\n".join(line for line in self._lines(row, now) if line)

    def _lines(self, row: int, now: Told | None) -> list[str]:
        lines: list[str] = []
        full, kind = self.style == "full", int(self.trouble[row])
        if kind != UNDERSTOOD:
            said = INVALID[kind].replace("_", " ")
            lines += [f"Your answer was not understood: {said}. {self._how()}" if full else f"? {said}"]
        if now is not None and self.turn[row] == 0 and full:
            lines += [now.rules if self.rules is None else self.rules, self._how()]
        if now is not None and self.reads:
            lines += [now.state]
        if now is not None and self.menu:
            lines += [f"{number} {said}" for number, said in enumerate(now.legal or (), 1)]
        elif now is not None and self.reads and full and self.speech.lists(now.legal):
            lines += [f"Legal: {', '.join(now.legal or ())}"]
        return lines

    def _how(self) -> str:
        """How one answers."""
        return f"Answer like {self.parser.how(self.speech.example)}. Actions: {self.speech.choices}."

    def render(self, row: int, mode: str) -> np.ndarray | str | None:
        """The picture, or the message."""
        if mode == "ansi":
            return self.messages[row]
        return None if self.pictures is None else self.pictures[row]

    # --- states --------------------------------------------------------------------------------------------------

    def get_state(self) -> State:
        """With the state of what is lifted; its random numbers are the generators', or its own."""
        return super().get_state() | {f"inner/{name}": value for name, value in self.host.get_state().items()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue; messages are written again."""
        super().set_state(state)
        self.host.set_state({n.removeprefix("inner/"): value for n, value in state.items() if n.startswith("inner/")})
        rows = np.flatnonzero(self.turn >= 0)
        self._write(rows)

    def save(self, row: int) -> object:
        """One conversation."""
        return {name: value[row].copy() for name, value in self.held().items()}, self.host.save(row)

    def restore(self, row: int, saved: object) -> None:
        """Go on with one."""
        own, inside = cast(Any, saved)
        for name, value in self.held().items():
            value[row] = own[name]
        self.host.restore(row, inside)
        self._write(np.array([row]))

    def close(self) -> None:
        """Close what is lifted."""
        self.host.close()
