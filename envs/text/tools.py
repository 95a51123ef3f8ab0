"""A calculator beside a text task: a reply that calls it is answered by a message, any other reply is the answer.

What the tool says is a message, never a part of a reply: nothing of it is ever trained on. Boundary: as `batch`; how a
call looks says a parser (`turns.parsing`), what an expression is worth says `rules.evaluate_expression`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from gymnasium import spaces

from embodied_rft.envs.serving import Outcome
from embodied_rft.envs.text.batch import TextBatch
from embodied_rft.envs.text.rules import evaluate_expression
from embodied_rft.envs.text.tasks import TextTask
from embodied_rft.names import UserError, nearest
from embodied_rft.options import check_share
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.registry import register
from embodied_rft.turns.parsing import Parsed, make_parser

STYLES = ("full", "short")
CALL = {"id": "tool_call", "tool": "calculator", "argument": "expression"}
NO_CALL = ("empty", "no_answer")  # what a reply that calls nothing is to a parser
MOST_SAID = 400  # bytes of what the calculator says: a fraction of 200 letters


class ToolBatch(TextBatch):
    """N problems beside a calculator (Li et al. 2025, ToRL, arXiv:2503.23383): some calls, then the answer.

    The reward is for the answer alone. A call that cannot be read or computed is told so, and is one.

    Args:
        task: draws the problems.
        num_envs: N.
        parser: what reads calls; its answer is the expression. None: `tool_call` of "calculator", with an "expression".
        max_calls: of an episode; what is replied then is the answer, whatever it looks like. 0: there is no tool.
        style: "full": the first message says how to call; "short": the problem, and numbers.
        options: of `TextBatch`.
    """

    one_decision: ClassVar[bool] = False
    arrays = (*TextBatch.arrays, "calls", "said")

    def __init__(
        self,
        task: TextTask,
        *,
        num_envs: int,
        parser: str | Mapping[str, Any] | None = None,
        max_calls: int = 2,
        style: Literal["full", "short"] = "full",
        max_chars: int = 65_536,
        overlong: tuple[int, int] | None = None,
        held_out: float | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(
            task, num_envs=num_envs, max_chars=max_chars, overlong=overlong, held_out=held_out, exclude=exclude
        )
        if getattr(task, "chat", False):
            raise UserError("problems that are chats have no room for a tool: write their prompts as texts")
        if max_calls < 0:
            raise UserError(f"max_calls is {max_calls}; expected at least 0")
        if style not in STYLES:
            raise UserError(f"style is {style!r}; {nearest(style, STYLES)}")
        self.parser, self.max_calls, self.style = make_parser(parser or CALL), max_calls, style
        self.observation_space = spaces.Dict({"message": AnyText(max_chars)})
        self.max_episode_steps = max_calls + 1
        self.calls = np.zeros(num_envs, np.int64)
        self.said = np.zeros((num_envs, MOST_SAID), np.uint8)  # by the calculator, in the last turn

    def initial_observations(self) -> dict[str, dict[str, str]] | None:
        """See `TextBatch`."""
        known = super().initial_observations()
        return known and {name: {"message": self.first(seen["prompt"])} for name, seen in known.items()}

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """New problems, and nothing was called yet."""
        super().start(rows, seeds, options)
        self.calls[rows], self.said[rows] = 0, 0

    def step(self, rows: np.ndarray, actions: Sequence[str]) -> Outcome:
        """Answer the calls, judge the answers."""
        reward, over, success = np.zeros(len(rows)), np.ones(len(rows), bool), np.zeros(len(rows), bool)
        for place, (row, reply) in enumerate(zip(rows.tolist(), actions, strict=True)):
            parsed = self.parser.parse(reply)
            if parsed.invalid in NO_CALL or self.calls[row] == self.max_calls:
                reward[place], success[place] = self.judge(row, reply)
                continue
            told = np.frombuffer(self.run(parsed).encode(), np.uint8)[:MOST_SAID]
            self.said[row], over[place] = 0, False
            self.said[row, : len(told)] = told
            self.calls[row] += 1
        return Outcome(reward, over, success, {"tool_calls": self.calls[rows]})

    def run(self, call: Parsed) -> str:
        """What the calculator says."""
        if call.action is None:
            assert call.invalid is not None
            return f"error: {call.invalid.replace('_', ' ')}"
        found = evaluate_expression(call.action)
        return "error: no expression of + - * / and brackets" if found is None else str(found[0])

    def first(self, prompt: str) -> str:
        """The first message of a problem."""
        if self.style == "short" or not self.max_calls:
            return prompt
        times = "once" if self.max_calls == 1 else f"up to {self.max_calls} times"
        call = self.parser.how("12*(3+4)")
        return f"{prompt}\nYou may call a calculator {times}: {call}. What else you reply is the answer."

    def observe(self, rows: np.ndarray) -> dict[str, tuple[str, ...]]:
        """Problems where nothing was called, else what the calculator says."""
        prompts, said = super().observe(rows)["prompt"], []
        for row, prompt in enumerate(prompts):
            told = self.said[row].tobytes().rstrip(b"\0").decode()
            shown = told if self.style == "short" else f"<tool_response>\n{told}\n</tool_response>"
            said.append(shown if told else self.first(prompt))
        return {"message": tuple(said)}

    def render(self, row: int, mode: str) -> str | None:
        """The message."""
        return self.observe(np.array([row]))["message"][row] if mode == "ansi" else None


@register("demonstrator", "tool_sum", "embodied_rft/ToolSum-v0")
class ToolSumDemonstrator:
    """Has the calculator add the numbers of the prompt, and repeats what it says.

    Args:
        noise: share of problems that are answered at once, with one of their numbers: in the right form, and wrong.
        environment: id and options of the environment, told by whoever makes demonstrators.
    """

    def __init__(self, *, noise: float = 0.0, environment: Mapping[str, Any]) -> None:
        self.noise = check_share("noise", noise, "problems that are guessed")
        self.parser = make_parser(environment["options"].get("parser") or CALL)

    def act(self, observation: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
        """One reply to each of N messages; `rng` is drawn from only if there is noise."""
        guess = rng.random(len(observation["message"])) < self.noise if self.noise else np.zeros(0, bool)
        replies = []
        for row, message in enumerate(observation["message"]):
            asked = re.match(r"[^\n]*?(\d+(?:\s*\+\s*\d+)+)", message)
            if asked is None:
                replies.append(message.replace("<tool_response>", "").replace("</tool_response>", "").strip())
            elif self.noise and guess[row]:
                replies.append(asked[1].split("+")[0].strip())
            else:
                replies.append(self.parser.write(asked[1]))
        return replies
