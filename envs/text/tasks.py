"""Where the problems of text environments come from: sums, countdown, formats, and the lines of a file.

A task draws problems; one that can name them all has `problems`, so that each held-out one is judged once. Boundary:
makes prompts, answers and rules; knows no environment and no model.
"""

from __future__ import annotations

import difflib
import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from embodied_rft.envs.text.rules import Judge, make_rule
from embodied_rft.files import given_stem
from embodied_rft.names import UserError
from embodied_rft.pools.text_spaces import AnyText, ChatText, check_messages, read_chat, write_chat

MOST_LISTED = 10_000  # problems of a generated task that are written down; of more, the same is hardly drawn twice


class Problem(NamedTuple):
    """Problem("3+4=", "7", numeric): what is shown, what is right, and who judges."""

    prompt: str  # a text, or a chat as `text_spaces.write_chat` writes it
    answer: str
    judge: Judge  # what `text_rewards.make_rule` gives
    columns: Mapping[str, Any] = {}  # whatever else is known of it; rules may read it
    name: str = ""  # for messages: "problems.jsonl, line 78"; empty: the prompt
    is_chat: bool = False

    def score(self, reply: str) -> float:
        """The reward of a reply."""
        prompt = read_chat(self.prompt) if self.is_chat else self.prompt
        return self.judge(reply, self.answer, prompt=prompt, columns=self.columns)

    @property
    def label(self) -> str:
        """How messages call it."""
        return self.name or self.prompt


class TextTask(Protocol):
    """Where problems come from.

    Optional attributes: `problems`, all there are; `held_out`, the default of the option of that name; `chat`, whether
    its prompts are chats.
    """

    def draw(self, rng: np.random.Generator) -> Problem:
        """One problem; all its randomness is from `rng`."""


class SumTask:
    """Add integers: "3+4=" -> "7".

    Args:
        digits: largest number of digits of a term.
        num_terms: terms of a sum.
        template: of the prompt; {sum} is replaced.
        rule: who judges, see `text_rewards`.
    """

    def __init__(
        self,
        *,
        digits: int = 1,
        num_terms: int = 2,
        template: str = "{sum}=",
        rule: str | Mapping[str, Any] = "numeric",
    ) -> None:
        if digits < 1 or num_terms < 2:
            raise UserError(f"digits is {digits} and num_terms {num_terms}; expected at least 1 and 2")
        self.high, self.num_terms, self.template, self.judge = 10**digits, num_terms, template, make_rule(rule)
        self.problems = None
        if self.high**num_terms <= MOST_LISTED:
            self.problems = [self._of(terms) for terms in itertools.product(range(self.high), repeat=num_terms)]

    def draw(self, rng: np.random.Generator) -> Problem:
        """Terms uniform in [0, 10**digits)."""
        return self._of(rng.integers(self.high, size=self.num_terms).tolist())

    def _of(self, terms: Sequence[int]) -> Problem:
        return Problem(self.template.replace("{sum}", "+".join(map(str, terms))), str(sum(terms)), self.judge)


class CountdownTask:
    """Reach a target with given numbers and + - * /, each number at most once. Every problem has a solution.

    Args:
        num_numbers: how many numbers are given.
        largest: largest of them.
    """

    def __init__(self, *, num_numbers: int = 3, largest: int = 20) -> None:
        if num_numbers < 2 or largest < 2:
            raise UserError(f"num_numbers is {num_numbers} and largest {largest}; expected at least 2 each")
        self.num_numbers, self.largest, self.judge = num_numbers, largest, make_rule("countdown")

    def draw(self, rng: np.random.Generator) -> Problem:
        """The target is the value of a random expression of all numbers, an integer above 0."""
        while True:
            numbers = [int(n) for n in rng.integers(1, self.largest + 1, size=self.num_numbers)]
            value = numbers[0]
            for number in numbers[1:]:
                value = [value + number, value - number, value * number][int(rng.integers(3))]
            if 0 < value <= self.largest**2:
                break
        shown = [numbers[i] for i in rng.permutation(self.num_numbers)]
        prompt = f"Use {', '.join(map(str, shown))} and + - * / to make {value}. Reply with the expression only."
        return Problem(prompt, json.dumps({"numbers": shown, "target": value}), self.judge)


class FormatTask:
    """Follow a form exactly: so many words or numbers, upper or lower case, this separator.

    Args:
        largest: most items of a list.
    """

    KINDS = (("lower-case words", r"[a-z]+"), ("upper-case words", r"[A-Z]+"), ("numbers", r"[0-9]+"))
    SEPARATORS = (("commas", ","), ("semicolons", ";"), ("dashes", "-"))

    def __init__(self, *, largest: int = 4) -> None:
        if largest < 1:
            raise UserError(f"largest is {largest}; expected at least 1 item")
        self.largest, self.judge = largest, make_rule("regex")
        every = itertools.product(range(3), range(3), range(1, largest + 1))
        self.problems = [self._of(*which) for which in every] if 9 * largest <= MOST_LISTED else None

    def draw(self, rng: np.random.Generator) -> Problem:
        """One of three kinds of item, 1 to `largest` of them, one of three separators."""
        kind, separator = int(rng.integers(3)), int(rng.integers(3))
        return self._of(kind, separator, int(rng.integers(1, self.largest + 1)))

    def _of(self, kind: int, separator: int, count: int) -> Problem:
        (item, pattern), (name, sign) = self.KINDS[kind], self.SEPARATORS[separator]
        prompt = f"Write exactly {count} {item} separated by {name}, without spaces."
        return Problem(prompt, sign.join([pattern] * count), self.judge)


class JsonlTask:
    """Problems from a local file, one JSON object a line: {"prompt": ..., "answer": ..., "checker": "numeric"}.

    A prompt is a text or a list of messages; further keys are columns that rules may read. A tenth of the prompts is
    held out for evaluation, unless `held_out` says otherwise.

    Args:
        path: the file, UTF-8.
        checker: rule for lines without one.

    Raises:
        ValueError: with the line's number, when the file is missing, empty, or a line is not as above.
    """

    held_out = 0.1

    def __init__(self, *, path: str | Path, checker: str | Mapping[str, Any] = "exact") -> None:
        file = Path(path)
        if not file.is_file():
            raise UserError(f"the problem file {str(path)!r} does not exist")
        self.problems: list[Problem] = []
        given = f"{given_stem(file.stem)}{file.suffix}"  # as the user knows it: runs keep copies
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 inside a text
        except UnicodeDecodeError as error:
            raise UserError(f"{given} is no UTF-8 text ({error}): save it so, one JSON object a line") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{given}, line {number}"
                try:
                    self.problems.append(_problem(line, checker, place))
                except ValueError as error:
                    raise UserError(f"{place}: {error}") from error
        if not self.problems:
            raise UserError(f'{given} holds no problem; expected lines like {{"prompt": "3+4=", "answer": "7"}}')
        self.chat = any(problem.is_chat for problem in self.problems)
        if self.chat:  # one space for all
            self.problems = [
                p if p.is_chat else p._replace(prompt=write_chat([{"role": "user", "content": p.prompt}]), is_chat=True)
                for p in self.problems
            ]

    def draw(self, rng: np.random.Generator) -> Problem:
        """One line, uniformly."""
        return self.problems[int(rng.integers(len(self.problems)))]


def _problem(line: str, checker: str | Mapping[str, Any], name: str) -> Problem:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"this is not JSON ({error}): {line[:60]!r}") from None
    if not isinstance(content, dict):
        raise UserError(f"expected an object with a prompt and an answer, found {line[:60]!r}")
    known = ("prompt", "answer", "checker")
    for wanted in known:
        meant = [] if wanted in content else difflib.get_close_matches(wanted, content, n=1, cutoff=0.8)
        if meant:
            raise UserError(f"unknown key {meant[0]!r}; did you mean {wanted!r}?")
    for wanted in known[:2]:
        if wanted not in content:
            raise UserError(f'no key {wanted!r}; expected "prompt", "answer" and, if you like, "checker" and columns')
    prompt, answer, columns = content["prompt"], content["answer"], {k: content[k] for k in content if k not in known}
    is_chat = isinstance(prompt, list)
    if is_chat:
        prompt = write_chat(check_messages(prompt))
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"the prompt is {prompt!r}; expected a text that is not empty, or a list of messages")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"the answer is {answer!r}; expected a text or a number")
    judge = make_rule(content.get("checker", checker))
    problem = Problem(prompt, str(answer), judge, columns, name, is_chat)
    try:
        problem.score("")  # what the rule cannot read is found now, not in the middle of a run
    except ValueError:
        raise
    except Exception as error:  # whatever a rule of somebody else may raise
        raise UserError(f"its rule fails on it: {type(error).__name__}: {error}") from error
    return problem


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt is one of those that only evaluation shows; the same on every machine."""
    return zlib.crc32(prompt.encode()) < share * 2**32


class Listed:
    """The problems of a task, as far as it can name them: which may be shown, and which are held out.

    Args:
        task: with an attribute `problems`, or without.
        held_out: share of the prompts that only evaluation shows; 0: it shows all.
        exclude: names of problems that nobody shows.
    """

    def __init__(self, task: TextTask, *, held_out: float, exclude: Sequence[str]) -> None:
        listed: Sequence[Problem] | None = getattr(task, "problems", None)
        self.exclude = frozenset(exclude)
        if self.exclude and listed is None:
            raise UserError("exclude names problems, but this task makes them up as it goes: take it out")
        unknown = self.exclude - {problem.label for problem in listed or ()}
        if unknown:
            raise UserError(f"exclude names {min(unknown)!r}, which is no problem of this task")
        self.all: list[Problem] | None = None
        self.held_out: list[Problem] | None = None
        if listed is not None:
            self.all = list({p.prompt: p for p in reversed(listed) if p.label not in self.exclude}.values())[::-1]
            chosen = [p for p in self.all if not held_out or is_held_out(p.prompt, held_out)]
            self.held_out = sorted(chosen, key=lambda p: zlib.crc32(p.prompt.encode()))  # no order of the file


def space_of(task: TextTask) -> type[AnyText]:
    """The kind of space that a task's prompts are of."""
    return ChatText if getattr(task, "chat", False) else AnyText
