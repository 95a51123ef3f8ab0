"""JSON objects inside any text, with the places of their values; and calls of tools, which are such objects.

Boundary: pure functions of text that never raise, in time linear in its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\n\r]*")


class Member(NamedTuple):
    """A value of an object and its place: Member("left", 11, 17) of '{"action": "left"}'."""

    value: Any
    start: int
    end: int


class Object(NamedTuple):
    """A JSON object in a text: its place and its values by key."""

    start: int
    end: int
    members: Mapping[str, Member]

    @property
    def value(self) -> dict[str, Any]:
        """As `json.loads` gives it."""
        return {key: member.value for key, member in self.members.items()}


class Objects(NamedTuple):
    """All outermost objects of a text, and what is wrong if there is none."""

    found: list[Object]
    broken: bool  # something began like an object and is none
    cut: bool  # the last one is not complete


class _Broken(Exception):
    """No object; the text is wrong at a place."""

    def __init__(self, place: int, *, at_end: bool) -> None:
        super().__init__()
        self.place, self.at_end = place, at_end


def find_objects(text: str) -> Objects:
    """The outermost JSON objects of a text, in order."""
    found, broken, cut, place = [], False, False, text.find("{")
    while place >= 0:
        try:
            found.append(_scan(text, place))
            place, cut = found[-1].end, False
        except _Broken as error:
            broken, cut, place = True, error.at_end, max(error.place, place + 1)
        place = text.find("{", place)
    return Objects(found, broken, cut)


def _scan(text: str, start: int) -> Object:
    """The object that begins at a "{"; _Broken where there is none."""
    members: dict[str, Member] = {}
    place = _skip(text, start + 1)
    while text[place : place + 1] != "}":
        if members:
            place = _skip(text, _expect(text, place, ","))
        if text[place : place + 1] != '"':
            raise _Broken(place, at_end=place == len(text))
        key = _value(text, place)
        member = _value(text, _skip(text, _expect(text, _skip(text, key.end), ":")))
        members[key.value] = member
        place = _skip(text, member.end)
    return Object(start, place + 1, members)


def _skip(text: str, place: int) -> int:
    """Behind the blanks at a place."""
    found = _BLANK.match(text, place)
    return place if found is None else found.end()


def _expect(text: str, place: int, sign: str) -> int:
    """Behind a sign that must be there."""
    if text[place : place + 1] != sign:
        raise _Broken(place, at_end=place == len(text))
    return place + 1


def _value(text: str, place: int) -> Member:
    """The JSON value that begins at a place."""
    try:
        value, end = _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        unfinished = error.msg.startswith("Unterminated") or error.pos >= len(text)
        raise _Broken(error.pos, at_end=unfinished) from None
    except ValueError:  # a number of thousands of digits
        raise _Broken(place, at_end=False) from None
    except RecursionError:  # thousands of brackets: whatever follows is no answer, either
        raise _Broken(len(text), at_end=False) from None
    return Member(value, place, end)


def answer_of(value: object) -> str:
    """A value as an answer: texts as they are, the parts of a list one behind the other, all else as JSON."""
    parts = value if isinstance(value, list) else [value]
    return " ".join(part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts)


# --- calls of tools ------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of a tool: Call("move", {"to": "left"})."""

    name: str
    arguments: dict[str, Any]


def call_of(value: object) -> Call | None:
    """{"name": ..., "arguments" or "parameters": {...} (or that as a text)} as a call; None for anything else."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return Call(value["name"], arguments) if isinstance(arguments, dict) else None


def write_calls(calls: Sequence[Call]) -> str:
    """Calls as one text, from which `read_calls` makes them again."""
    return json.dumps([call._asdict() for call in calls], ensure_ascii=False)


def read_calls(text: str) -> list[Call]:
    """The calls of `write_calls`, or of one object; none where there is anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [call_of(part) for part in (content if isinstance(content, list) else [content])]
    return [] if None in calls else [call for call in calls if call is not None]


class Agreement(NamedTuple):
    """How far calls agree with those that were expected (Qian et al. 2025, ToolRL, arXiv:2504.13958, sec. 3.3)."""

    names: float  # r_name: names in both over names in either, in [0, 1]
    parameters: float  # r_param: the same of the parameters, summed over the expected calls, in [0, G]
    values: float  # r_value: parameters with the expected value, in [0, sum of the parameters of the expected calls]
    largest: float  # S_max = 1 + G + sum of the parameters

    @property
    def share(self) -> float:
        """R_max / S_max, in [0, 1]; ToolRL's reward of correctness is 6 times this, less 3."""
        return (self.names + self.parameters + self.values) / self.largest


def agreement(given: Sequence[Call], expected: Sequence[Call]) -> Agreement:
    """How well calls are those that were expected, in any order; the share of a call with itself is 1.

    Each expected call, in order, takes the given one that fits it best and was not taken yet.
    """
    ours, theirs = {call.name for call in given}, {call.name for call in expected}
    names = len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0
    left, parameters, values, largest = list(given), 0.0, 0, 1
    for call in expected:
        largest += 1 + len(call.arguments)
        fits = [_fit(other, call) for other in left]
        if fits:
            best = max(range(len(fits)), key=lambda index: sum(fits[index]))
            parameters, values = parameters + fits[best][0], values + fits[best][1]
            if left[best].name == call.name:
                left.pop(best)
    return Agreement(names, parameters, values, largest)


def _fit(given: Call, expected: Call) -> tuple[float, int]:
    """Parameters in both over those in either, and how many have the expected value; nothing for another tool."""
    if given.name != expected.name:
        return 0.0, 0
    ours, theirs = given.arguments, expected.arguments
    same = sum(key in ours and same_json(ours[key], value) for key, value in theirs.items())
    either = ours.keys() | theirs.keys()
    return (len(ours.keys() & theirs.keys()) / len(either) if either else 1.0), same


def same_json(a: object, b: object) -> bool:
    """Whether two values are the same JSON: 1 is 1.0, but true is not 1, as it is for Python."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    return bool(a == b)
