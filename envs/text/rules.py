"""Rules that judge a reply: pure functions of text, registered as "reward". No code of a reply is ever run.

A rule is `rule(reply, answer, **options) -> float` in [0, 1]; 1 means solved. One that has a parameter `prompt` or
`columns` is given what was asked, and the further columns of the problem. A third party registers its own:

    @register("reward", "cites")
    def cites(reply: str, answer: str, *, columns: dict, weight: float = 0.5) -> float:
        return (1 - weight) * (answer in reply) + weight * (columns["source"] in reply)
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import logging
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import regex as bounded
from numpy.typing import ArrayLike

from embodied_rft.names import UserError, nearest
from embodied_rft.registry import find, register
from embodied_rft.turns.objects import agreement, read_calls, same_json
from embodied_rft.turns.parsing import Tags, ToolCalls

logger = logging.getLogger(__name__)

Rule = Callable[..., float]
Judge = Callable[..., float]  # judge(reply, answer, prompt=..., columns=...)
SEEN = ("prompt", "columns")  # parameters of a rule that the problem fills
MATCH_SECONDS = 0.5  # longest that a pattern may try to match a reply
_NUMBER = re.compile(r"((?:(?<!\w)[-+])?(?:\d*\.)?\d+(?:[eE]([-+]?\d+))?)(?:/(\d+))?")  # a sign follows no word
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_LARGEST_EXPONENT = 9_999  # 1e999999999 is no number that anybody should have to write out


def make_rule(spec: str | Mapping[str, Any]) -> Judge:
    """The rule of "exact", or of {"id": "numeric", "tolerance": 0.01} with its options.

    It is called as judge(reply, answer, prompt=text or messages, columns={...}); the latter two may be left out.

    Raises:
        ValueError: an unknown rule or option, with the nearest known one.
    """
    options = {"id": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    id = options.pop("id", None)
    if not isinstance(id, str):
        raise UserError(f'checker {spec!r} names no rule; expected "exact" or {{"id": "numeric", "tolerance": 0.01}}')
    rule: Rule = find("reward", id)
    parameters = list(inspect.signature(rule).parameters)
    wanted, known = [n for n in SEEN if n in parameters], [n for n in parameters[2:] if n not in SEEN]
    for name in options:
        if name not in known:
            raise UserError(f"rule {id!r} has no option {name!r}; {nearest(name, known)}")

    def judge(reply: str, answer: str, *, prompt: object = "", columns: Mapping[str, Any] | None = None) -> float:
        seen = {"prompt": prompt, "columns": dict(columns or {})}
        given = rule(reply, answer, **options, **{name: seen[name] for name in wanted})
        try:
            reward = float(given)
        except (TypeError, ValueError):
            reward = math.nan
        if not math.isfinite(reward):
            raise UserError(f"rule {id!r} gave the reward {given!r:.60}; expected a finite number")
        return reward

    return judge


@register("reward", "exact")
def exact(reply: str, answer: str, *, ignore_case: bool = False) -> float:
    """Whether reply and answer are the same text, but for spaces around and between the words.

    Args:
        reply: any text.
        answer: what is right.
        ignore_case: whether capitals matter not.
    """
    a, b = (" ".join(text.split()) for text in (reply, answer))
    return float(a.casefold() == b.casefold() if ignore_case else a == b)


@register("reward", "numeric")
def numeric(reply: str, answer: str, *, tolerance: float = 0.0, relative: bool = False) -> float:
    r"""Whether the last number in the reply is the answer.

    Understands "1,000", "-2.5", "1e-3", "3/4", \frac{3}{4} and a number inside \boxed{}.

    Args:
        reply: any text.
        answer: a number.
        tolerance: largest difference that counts as equal.
        relative: whether it is a share of the answer.
    """
    if relative and not tolerance:
        raise UserError("relative has no effect without a tolerance: give one, or leave it out")
    expected, given = last_number(answer), last_number(reply)
    if expected is None:
        raise UserError(f"the answer {answer!r} is no number: rule 'numeric' cannot judge it; use 'exact'")
    if given is None:
        return 0.0
    slack = Fraction(tolerance) * (abs(expected) if relative else 1)
    return float(abs(given - expected) <= slack)


@register("reward", "regex")
def regex(reply: str, answer: str) -> float:
    """Whether the whole reply, without spaces around it, matches the pattern in `answer`.

    Some patterns, like (a|aa)+, try for years before they give a reply up: after half a second it has not matched.
    """
    try:
        pattern = bounded.compile(answer, flags=bounded.DOTALL)
    except bounded.error as error:
        raise UserError(f"the answer {answer!r} is no pattern: {error}") from None
    try:
        return float(pattern.fullmatch(reply.strip(), timeout=MATCH_SECONDS) is not None)
    except TimeoutError:
        _warn_of(answer)
        return 0.0


@functools.cache
def _warn_of(pattern: str) -> None:
    """Once for each pattern."""
    logger.warning(
        "the pattern %.80r could not be matched within %g s, which counts as no match: write it without repetitions "
        "that can split one text in many ways",
        pattern,
        MATCH_SECONDS,
    )


@register("reward", "contains")
def contains(reply: str, answer: str) -> float:
    """Whether the answer stands in the reply as a word of its own."""
    return float(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply) is not None)


@register("reward", "format")
def tag_format(
    reply: str,
    answer: str,
    *,
    tags: Sequence[str] = ("think", "answer"),
    rule: Any = None,
    prompt: object = "",
    columns: Mapping[str, Any] | None = None,
) -> float:
    """Whether the reply is exactly <think>...</think><answer>...</answer> (any tags), each once and in order.

    With `rule`, what stands in the last tag is judged by it: half the reward is for the format.

    Args:
        reply: any text.
        answer: what `rule` compares with.
        tags: names of the tags, in order.
        rule: who judges what stands in the last one; None: nobody.
        prompt: what was asked, for `rule`.
        columns: further columns of the problem, for `rule`.
    """
    parsed = Tags(tags=tuple(tags), strict=True).parse(reply)
    said = "" if parsed.said is None else reply[slice(*parsed.said)]
    # Without the form, too, so that an answer that the rule cannot read is found before a run.
    inner = 1.0 if rule is None else make_rule(rule)(said, answer, prompt=prompt, columns=columns)
    return 0.0 if parsed.said is None else 0.5 + 0.5 * inner


@register("reward", "json")
def json_keys(reply: str, answer: str) -> float:
    """Whether the reply is a JSON object with every key and value of the JSON object `answer`."""
    given, expected = _read_json(reply), _read_json(answer)
    if not isinstance(expected, dict):
        raise UserError(f"the answer {answer!r} is no JSON object: rule 'json' cannot judge it")
    missing = object()
    return float(isinstance(given, dict) and all(same_json(given.get(k, missing), v) for k, v in expected.items()))


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@register("reward", "calls")
def tool_calls(reply: str, answer: str, *, graded: bool = True) -> float:
    """How far the calls of tools in a reply are those that were expected (Qian et al. 2025, ToolRL, sec. 3.3).

    A seventh for calls that can be read, the rest for names, parameters and values: ToolRL's -3 to 4, moved to 0 to 1.

    Args:
        reply: calls as the parser "tool_call" reads them, with any text around.
        answer: JSON {"name": ..., "arguments": {...}}, or a list of such.
        graded: whether what is partly right is worth something.
    """
    expected, parsed = read_calls(answer), ToolCalls().parse(reply)
    if not expected:
        raise UserError(f'the answer {answer!r} is no call: {{"name": "move", "arguments": {{"to": 3}}}} is expected')
    given = [] if parsed.action is None else read_calls(parsed.action)
    share = agreement(given, expected).share
    if share == 1 and len(given) == len(expected):
        return 1.0
    return (1 + 6 * min(share, 0.99)) / 7 if given and graded else 0.0


@register("reward", "countdown")
def countdown(reply: str, answer: str) -> float:
    """Whether the reply is an arithmetic expression with the target's value that uses each number at most once.

    Args:
        reply: numbers, + - * / and brackets; a part after "=" is ignored.
        answer: JSON {"numbers": [3, 7, 2], "target": 13}.
    """
    match _read_json(answer):
        case {"numbers": [*numbers], "target": int(target)} if all(isinstance(number, int) for number in numbers):
            pass
        case _:
            raise UserError(f'the answer {answer!r} is no problem: {{"numbers": [3, 7, 2], "target": 13}} is expected')
    result = evaluate_expression(reply.split("=")[0].strip())
    if result is None:
        return 0.0
    value, used = result
    return float(value == target and not Counter(used) - Counter(numbers))


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None if there is none."""
    text = _FRACTION.sub(r"\1/\2", text.replace("\N{MINUS SIGN}", "-"))
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    found = _NUMBER.findall(_THOUSANDS.sub("", boxed[-1] if boxed else text))
    if not found:
        return None
    number, exponent, denominator = found[-1]
    try:
        if abs(int(exponent or 0)) > _LARGEST_EXPONENT:
            return None
        return Fraction(number) / int(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return None


_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate_expression(text: str, *, max_length: int = 200) -> tuple[Fraction, list[int]] | None:
    """Exact value and the integers used of an expression of + - * / and brackets; None if it is anything else."""
    if len(text) > max_length:
        return None
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    try:
        return value(ast.parse(text, mode="eval").body), used
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def overlong_penalty(lengths: ArrayLike, *, limit: int, margin: int) -> np.ndarray:
    """Soft punishment of long replies, in [-1, 0] (Yu et al. 2025, DAPO, eq. 13).

    0 up to `limit - margin`, falling linearly to -1 at `limit`, -1 beyond.

    Args:
        lengths: [N], in any unit (tokens or characters).
        limit: length from which the punishment is full.
        margin: how far before it the punishment begins.
    """
    if not 0 < margin <= limit:
        raise UserError(f"margin is {margin}; expected 0 < margin <= limit, which is {limit}")
    return np.clip((limit - margin - np.asarray(lengths, dtype=np.float64)) / margin, -1.0, 0.0)
