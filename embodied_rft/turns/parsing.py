"""How an answer in text becomes an action: tags, JSON, plain words, calls of tools, each a "parser" in the registry.

An environment reads replies with a parser, an agent marks the tokens of thought and answer with one; both name it as
`tags` or `{id: tags, strict: true}`. Boundary: pure functions of text, in time linear in its length. No text makes a
parser raise: what cannot be read is invalid, of one of the kinds in `INVALID`. A parser writes answers, too.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from pydantic.dataclasses import dataclass as options

from embodied_rft.names import UserError, nearest
from embodied_rft.options import validate_plugin_config
from embodied_rft.registry import kept, register
from embodied_rft.turns.objects import Call, answer_of, call_of, find_objects, read_calls, write_calls
from embodied_rft.turns.words import Vocabulary, Words, vocabulary

Invalid = Literal[
    "empty",  # nothing was said, or the answer is empty
    "no_answer",  # there is no answer in the form that is asked for
    "cut",  # it begins and does not end
    "outside",  # something stands outside the form, where that is not allowed
    "several",  # more answers than one
    "bad_json",  # what should be JSON is none
    "no_key",  # the object, or the call, has no such key
    "unknown_tool",  # the call is of another tool
    "unknown_word",  # the answer names no action
]
INVALID: tuple[Invalid, ...] = get_args(Invalid)
Span = tuple[int, int]  # characters, the second not included


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a reply says: an action, or why it says none.

    Tags().parse("<think>ice below</think><answer> left </answer>") ==
    Parsed(action="left", invalid=None, thought=(7, 16), said=(33, 37)).
    """

    action: str | None  # as it is handed on; where words are known, in their spelling
    invalid: Invalid | None
    thought: Span | None = None  # where the reply thinks, before the answer
    said: Span | None = None  # where the answer is

    def __post_init__(self) -> None:
        if self.invalid is not None and self.invalid not in INVALID:
            raise UserError(f"a parser says {self.invalid!r}; {nearest(self.invalid, INVALID)}")
        assert (self.action is None) == (self.invalid is not None), "an action, or why there is none"


class Found(NamedTuple):
    """Where an answer is, before anything is made of it: Found(said=(33, 37), answer="left", thought=(7, 16))."""

    said: Span | None = None
    answer: str = ""
    thought: Span | None = None
    invalid: Invalid | None = None


@options(frozen=True)
class Parser(ABC):
    """A form of answers. A class registered as a "parser" derives from it and is the dataclass of its own options."""

    Config: ClassVar[type]  # the class itself

    strict: bool = False  # the reply is the form and nothing else; false: the last answer in it counts
    words: Words = ()  # of each choice of an action, others are invalid; environments say theirs; none: any answer
    ignore_case: bool = True  # capitals of words matter not
    ignore_punctuation: bool = True  # quotes, brackets and stops around words matter not

    def __init_subclass__(cls) -> None:
        cls.Config = cls

    @property
    def vocabulary(self) -> Vocabulary:
        """The words, ready to be read; ValueError where they cannot be."""
        return vocabulary(self.words, self.ignore_case, self.ignore_punctuation)

    def parse(self, text: str) -> Parsed:
        """What a reply says."""
        found = self.find(text) if text.strip() else Found(invalid="empty")
        invalid, action = found.invalid, found.answer.strip()
        if invalid is None and not action:
            invalid = "empty"
        if invalid is None and self.words:
            chosen = self.vocabulary.read(action)
            invalid = "unknown_word" if chosen is None else None
            action = action if chosen is None else self.vocabulary.say(chosen)
        return Parsed(action if invalid is None else None, invalid, found.thought, found.said)

    @abstractmethod
    def find(self, text: str) -> Found:
        """Where thought and answer are, in a text that is not blank."""

    @abstractmethod
    def write(self, action: str, thought: str = "") -> str:
        """An answer that `parse` reads so, for demonstrations."""

    @abstractmethod
    def how(self, example: str) -> str:
        """How one answers, in a few words for the rules: "Answer as <answer>left</answer>"."""


def make_parser(spec: str | Mapping[str, Any], *, words: Words = ()) -> Parser:
    """The parser of "tags", or of {"id": "tags", "strict": True} with its options.

    Args:
        spec: id, or id and options.
        words: of each choice of an action, said by the environment.

    Raises:
        ValueError: an unknown parser or option, with the nearest known one; words that cannot be read in this form.
    """
    given = {"id": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    id = given.pop("id", None)
    if not isinstance(id, str):
        raise UserError(f"the parser {spec!r} has no id; expected 'tags', or {{'id': 'tags', 'strict': true}}")
    parser = kept(Parser, validate_plugin_config("parser", id, given, path="parser"), f"parser {id!r}")
    if words and parser.words:
        raise UserError("parser.words has no effect here: the environment says what its words are. Leave it out")
    return replace(parser, words=words) if words else parser


@register("parser", "tags")
@options(frozen=True)
class Tags(Parser):
    """<think>...</think><answer>...</answer>: the last tag holds the answer, those before it thoughts.

    Where tags of thoughts are missing, or only end (the prompt began them), all that comes before the answer is one.
    """

    tags: tuple[str, ...] = ("think", "answer")  # names, in order

    def __post_init__(self) -> None:
        plain = all(re.fullmatch(r"[^<>/\s]+", tag) for tag in self.tags)
        if not self.tags or len(set(self.tags)) < len(self.tags) or not plain:
            raise UserError(f"tags are {list(self.tags)}; expected names without brackets and blanks, each once")

    def find(self, text: str) -> Found:
        """See the class."""
        if self.strict:
            return self._exactly(text)
        begin, end = _tag(self.tags[-1])
        last = text.rfind(end)
        start = text.rfind(begin, 0, last) if last >= 0 else -1
        if start < 0:
            thought = self._thought(text, len(text))
            opened = begin in text or any(text.count(a) > text.count(b) for a, b in map(_tag, self.tags[:-1]))
            return Found(thought=thought, invalid="cut" if opened else "no_answer")
        said = trim(text, start + len(begin), text.index(end, start))
        return Found(said, text[slice(*said)], self._thought(text, start))

    def _thought(self, text: str, end: int) -> Span | None:
        """What comes before a place, without the tags around it."""
        return thought_before(text, end, self.tags[:-1])

    def _exactly(self, text: str) -> Found:
        place, spans = len(text) - len(text.lstrip()), []
        for begin, end in map(_tag, self.tags):
            if text.count(begin) > 1 or text.count(end) > 1:
                return Found(invalid="several")
            closes = text.find(end, place)
            if closes < 0:
                return Found(invalid="cut" if begin in text else "no_answer")
            if not text.startswith(begin, place):
                return Found(invalid="outside")
            spans.append(trim(text, place + len(begin), closes))
            place = closes + len(end)
            place += len(text) - place - len(text[place:].lstrip())
        thought = (spans[0][0], spans[-2][1]) if len(spans) > 1 else None
        if place < len(text):
            return Found(invalid="outside")
        said = spans[-1]
        return Found(said, text[slice(*said)], thought if thought and thought[0] < thought[1] else None)

    def write(self, action: str, thought: str = "") -> str:
        """The thought stands in the first tag; lenient parsers need none for no thought."""
        thoughts = [thought, *[""] * (len(self.tags) - 2)] if len(self.tags) > 1 else []
        if thought and not thoughts:
            raise UserError(f"tags {list(self.tags)} have no room for a thought: name one for it before the last")
        kept_tags = zip(self.tags, [*thoughts, action], strict=True)
        return "".join(f"<{tag}>{text}</{tag}>" for tag, text in kept_tags if text or self.strict)

    def how(self, example: str) -> str:
        """See `Parser`."""
        inside = [*["..."] * (len(self.tags) - 1), example]
        return "".join(f"<{tag}>{text}</{tag}>" for tag, text in zip(self.tags, inside, strict=True))


@register("parser", "json")
@options(frozen=True)
class Json(Parser):
    """{"thought": "...", "action": "left"}: the value of a key of a JSON object; a list is taken as its parts."""

    action: str = "action"  # key of the answer
    thought: str = "thought"  # key of the thought, if it comes before; what is before the object is one as well

    def find(self, text: str) -> Found:
        """See the class."""
        objects = find_objects(text)
        if not objects.found:
            kind: Invalid = "cut" if objects.cut else "bad_json" if objects.broken else "no_answer"
            return Found(invalid=kind)
        answers = [one for one in objects.found if self.action in one.members]
        if not answers:
            return Found(thought=thought_before(text, objects.found[-1].start), invalid="no_key")
        chosen = answers[-1]
        if self.strict and (len(objects.found) > 1 or text.strip() != text[chosen.start : chosen.end]):
            return Found(invalid="several" if len(answers) > 1 else "outside")
        member, idea = chosen.members[self.action], chosen.members.get(self.thought)
        inside = isinstance(member.value, str)
        said, answer = (member.start + inside, member.end - inside), answer_of(member.value)
        thought = thought_before(text, chosen.start)
        if idea is not None and idea.end <= member.start and isinstance(idea.value, str) and idea.value.strip():
            thought = idea.start + 1, idea.end - 1
        return Found(said, answer, thought, None if _encodes(answer) else "bad_json")

    def write(self, action: str, thought: str = "") -> str:
        """An object."""
        return json.dumps(({self.thought: thought} if thought else {}) | {self.action: action}, ensure_ascii=False)

    def how(self, example: str) -> str:
        """See `Parser`."""
        return json.dumps({self.thought: "...", self.action: example}, ensure_ascii=False)


@register("parser", "words")
@options(frozen=True)
class PlainWords(Parser):
    """left: the words of the action. Strict: the reply is an action; else the last one named counts."""

    def find(self, text: str) -> Found:
        """See the class."""
        whole = trim(text, 0, len(text))
        if self.strict:
            return Found(whole, text[slice(*whole)])
        if self.words:
            place = self.vocabulary.last(text)
        else:  # whatever the words are, the last one is meant
            place = max(text.rfind(blank, 0, whole[1]) for blank in " \t\n\r") + 1, whole[1]
        if place is None:
            return Found(whole, text[slice(*whole)])
        return Found(place, text[slice(*place)], thought_before(text, place[0], ()))

    def write(self, action: str, thought: str = "") -> str:
        """The thought comes before, on lines of its own."""
        if thought and self.strict:
            raise UserError("a reply that is strictly the action has no room for a thought: set strict to false")
        return f"{thought}\n{action}" if thought else action

    def how(self, example: str) -> str:
        """See `Parser`."""
        return example


@register("parser", "tool_call")
@options(frozen=True)
class ToolCalls(Parser):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Hermes and Qwen write calls of tools; or bare JSON.

    The action is all calls as JSON (`objects.read_calls`), or an argument of the only one.
    """

    tool: str | None = None  # the only one that may be called; None: any
    argument: str | None = None  # the action is the value of this argument of one call; None: all calls

    def __post_init__(self) -> None:
        if self.words and self.argument is None:
            raise UserError("parser.argument is missing: which argument of the call holds the words of the action?")

    def find(self, text: str) -> Found:
        """See the class."""
        begin, end = _tag("tool_call")
        whole = _between(text, begin, end)
        if whole is None:
            return Found(thought=thought_before(text, text.rfind(begin)), invalid="cut")
        calls: list[Call] = []
        spans: list[Span] = []
        for start, stop in whole or [(0, len(text))]:
            objects = find_objects(text[start:stop])
            found = [(call, one) for one in objects.found if (call := call_of(one.value)) is not None]
            if (whole and len(found) != 1) or (objects.broken and not found):
                bad: Invalid = "cut" if objects.cut and not whole else "bad_json"
                return Found(thought=thought_before(text, start) if whole else None, invalid=bad)
            calls += [call for call, _ in found]
            spans += [(start + one.start, start + one.end) for _, one in found]
        if not calls:
            return Found(invalid="no_answer")
        places = whole or spans
        thought, said = thought_before(text, places[0][0]), (spans[0][0], spans[-1][1])
        edges = [0, *(edge for place in places for edge in place), len(text)]
        if self.strict and any(text[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True)):
            return Found(said, thought=thought, invalid="outside")
        return self._chosen(calls)._replace(said=said, thought=thought)

    def _chosen(self, calls: list[Call]) -> Found:
        """What calls mean."""
        if self.tool is not None and any(call.name != self.tool for call in calls):
            return Found(invalid="unknown_tool")
        if self.argument is None:
            answer = write_calls(calls)
        elif len(calls) > 1:
            return Found(invalid="several")
        elif self.argument not in calls[0].arguments:
            return Found(invalid="no_key")
        else:
            answer = answer_of(calls[0].arguments[self.argument])
        return Found(answer=answer, invalid=None if _encodes(answer) else "bad_json")

    def write(self, action: str, thought: str = "") -> str:
        """One tag for each call."""
        if thought and self.strict:
            raise UserError("a reply that is strictly calls has no room for a thought: set strict to false")
        if self.argument is None:
            calls = read_calls(action)
            if not calls:
                raise UserError(f"{action!r:.80} is no list of calls: write it with objects.write_calls")
        else:
            calls = [Call(self.tool or "act", {self.argument: action})]
        said = [json.dumps(call._asdict(), ensure_ascii=False) for call in calls]
        written = "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in said)
        return f"{thought}\n{written}" if thought else written

    def how(self, example: str) -> str:
        """See `Parser`."""
        if self.argument is None:
            return '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
        return self.write(example).replace("\n", "")


# --- places ----------------------------------------------------------------------------------------------------------


def _tag(name: str) -> tuple[str, str]:
    return f"<{name}>", f"</{name}>"


def _between(text: str, begin: str, end: str) -> list[Span] | None:
    """All that stands in tags, with them; None: one is not closed."""
    places, start = [], text.find(begin)
    while start >= 0:
        stop = text.find(end, start)
        if stop < 0:
            return None
        places.append((start, stop + len(end)))
        start = text.find(begin, stop)
    return places


def _encodes(text: str) -> bool:
    r"""Whether it is a text that can be stored: JSON may hold half a character, "\ud800"."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def trim(text: str, start: int, end: int) -> Span:
    """A span without the blanks at its ends; an empty one stays where it begins."""
    inside = text[start:end]
    lead = len(inside) - len(inside.lstrip())
    return (start, start) if lead == len(inside) else (start + lead, start + len(inside.rstrip()))


def thought_before(text: str, end: int, tags: tuple[str, ...] = ("think",)) -> Span | None:
    """Where a reply thinks, before a place: what the tags hold, or all of it; None: nothing is there."""
    opened = [place + len(tag) + 2 for tag in tags if (place := text.find(f"<{tag}>", 0, end)) >= 0]
    start = min(opened, default=0)
    closed = [place for tag in tags if (place := text.rfind(f"</{tag}>", 0, end)) >= start]
    span = trim(text, start, max(closed, default=end))
    return None if span[0] == span[1] else span
