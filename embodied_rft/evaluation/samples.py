"""What agents that write text said while they were judged: kept beside an evaluation, shown as best, worst and random.

A success rate hides how it came about; a reward that is hacked is seen at a glance. Boundary: conversations to JSON
lines and rows, their pictures to `pictures`; knows no model and no environment.
"""

from __future__ import annotations

import heapq
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rft.data import CUT, Decisions, Tree, is_picture
from embodied_rft.evaluation.pictures import digest_of, encode, reduced
from embodied_rft.files import write_atomically
from embodied_rft.names import visible
from embodied_rft.pools.text_spaces import read_chat
from embodied_rft.turns.parsing import Parser

MOST_CHARACTERS = 4_000  # of one text
MOST_TURNS = 24  # of one episode: the first and the last ones
MOST_BYTES = 4_000_000  # of one evaluation
SHOWN = 3  # of each kind in a report

# {"seed", "return", "success", "turns": [{"prompt", "reply", "reward"}]}. A turn may also have "images" {key: digest},
# "cut" True, and what a parser reads in the reply: "action", "invalid" (a kind), "thought" and "said" (spans of it).
Sample = dict[str, Any]
COLUMNS = ("kind", "seed", "turn", "prompt", "reply", "action", "invalid", "reward")  # of `rows_of`


class Samples:
    """What was said in the episodes of one evaluation, and what was seen in those that will be shown.

    Args:
        parser: reads the replies for people; None: they are shown as they are.
    """

    def __init__(self, parser: Parser | None = None) -> None:
        self.parser = parser
        self.turns: dict[int, list[dict[str, Any]]] = {}
        self._running: dict[int, dict[int, dict[str, np.ndarray]]] = {}  # pictures by episode, turn and key
        self._seen: dict[int, dict[int, dict[str, str]]] = {}  # their digests, of episodes that ended and may be shown
        self._files: dict[str, bytes] = {}  # PNG by digest
        self._returns: dict[int, float] = {}

    def add(self, episode: int, observation: Tree, decisions: Decisions, reward: float, env: int) -> None:
        """One decision, row `env` of those given; nothing happens where actions are no texts."""
        action = decisions.action
        if not isinstance(action, list) or not isinstance(action[env], str):
            return
        texts = {key: value[env] for key, value in observation.items() if isinstance(value, list | tuple)}
        prompt = "\n".join(texts.values() if len(texts) == 1 else (f"{k}: {v}" for k, v in texts.items()))
        turn: dict[str, Any] = {"prompt": prompt, "reply": action[env], "reward": float(reward)}
        if CUT in decisions.trace and bool(decisions.trace[CUT][env]):
            turn["cut"] = True
        if self.parser is not None:
            turn |= _read(self.parser, action[env])
        turns, pictures = self.turns.setdefault(episode, []), self._running.setdefault(episode, {})
        seen = {key: value[env] for key, value in observation.items() if isinstance(value, np.ndarray)}
        pictures[len(turns)] = {
            key: reduced(value)
            for key, value in seen.items()
            if is_picture(value.shape, value.dtype) and value.shape[-1] in (1, 3)
        }
        turns.append(turn)
        if len(turns) > MOST_TURNS:
            pictures.pop(len(turns) - 1 - MOST_TURNS // 2, None)  # the middle is left out

    def end(self, episode: int, returned: float) -> None:
        """An episode has ended: its pictures are kept if it may be shown, and then some other may not any more."""
        pictures = self._running.pop(episode, {})
        if not any(pictures.values()):
            return
        self._returns[episode] = returned
        deep = 3 * SHOWN  # each of three ways to choose passes over what the others have chosen
        orders = (lambda e: (-self._returns[e], e), lambda e: (self._returns[e], -e), _by_chance)
        shown = {e for order in orders for e in heapq.nsmallest(deep, self._returns, key=order)}
        for other in [e for e in self._returns if e not in shown]:
            del self._returns[other]
            self._seen.pop(other, None)
        if episode in shown:
            digests = {number: {k: digest_of(p) for k, p in some.items()} for number, some in pictures.items()}
            self._seen[episode] = digests
            for number, some in pictures.items():
                for key, picture in some.items():
                    if digests[number][key] not in self._files:
                        self._files[digests[number][key]] = encode(picture)

    def forget(self, episode: int) -> None:
        """The episode is run again."""
        self.turns.pop(episode, None)
        self._running.pop(episode, None)

    def ended(
        self, seeds: Sequence[int], returns: Sequence[float], results: Sequence[bool]
    ) -> tuple[list[Sample], dict[str, bytes]]:
        """All episodes in which something was said, in their order; and PNG by digest of what the shown ones saw."""
        samples: list[Sample] = []
        for e in sorted(self.turns):
            told = {"episode": e, "seed": int(seeds[e]), "return": float(returns[e]), "success": bool(results[e])}
            samples.append({**told, "turns": self.turns[e]})
        found: dict[str, bytes] = {}
        for sample in (sample for some in pick(samples).values() for sample in some):
            for number, digests in self._seen.get(sample["episode"], {}).items():
                if digests:
                    sample["turns"][number]["images"] = digests
                found |= {digest: self._files[digest] for digest in digests.values()}
        return samples, found


def _read(parser: Parser, reply: str) -> dict[str, Any]:
    """What a parser reads in a reply, as a turn keeps it."""
    parsed = parser.parse(reply)
    spans = {"thought": parsed.thought, "said": parsed.said}
    found = {"action": parsed.action, "invalid": parsed.invalid, **{k: v and list(v) for k, v in spans.items()}}
    return {key: value for key, value in found.items() if value is not None}


def _by_chance(episode: int) -> tuple[int, int]:
    """A place in an order that says nothing of returns, and is the same whenever asked."""
    return zlib.crc32(str(episode).encode()), episode


def write_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """JSON lines, the most telling first as far as there is room: best, worst and random ones by turns."""
    lines, size = [], 0
    for sample in _by_turns(samples):
        line = json.dumps(_shortened(sample), ensure_ascii=False).encode("utf-8", "replace")
        size += len(line) + 1
        if size > MOST_BYTES:
            break
        lines.append(line + b"\n")
    write_atomically(path, b"".join(lines))


def read_samples(path: str | Path) -> list[Sample]:
    """What `write_samples` wrote, as far as it can be read; a damaged line is left out."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError:
        return []
    return [sample for sample in map(_sample_of, lines) if sample is not None]


def _sample_of(line: bytes) -> Sample | None:
    """A sample in which everything is what it should be: what is damaged and optional is left out."""
    try:
        given = json.loads(line)
        sample = {"seed": int(given["seed"]), "return": float(given["return"]), "success": bool(given["success"])}
        sample |= {key: given[key] for key in ("episode", "turns_left_out") if type(given.get(key)) is int}
        turns = [_turn_of(turn) for turn in given["turns"]]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return {**sample, "turns": turns}


def _turn_of(given: Any) -> dict[str, Any]:
    turn: dict[str, Any] = {key: given[key] for key in ("prompt", "reply")}
    if not all(isinstance(text, str) for text in turn.values()):
        raise TypeError("prompt and reply are texts")
    turn["reward"] = float(given.get("reward", 0))
    turn |= {key: given[key] for key in ("action", "invalid") if isinstance(given.get(key), str)}
    if given.get("cut") is True:
        turn["cut"] = True
    for key in ("thought", "said"):
        span = given.get(key)
        if isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span):
            if 0 <= span[0] <= span[1] <= len(turn["reply"]):
                turn[key] = span
    images = given.get("images")
    if isinstance(images, dict) and (kept := {k: v for k, v in images.items() if isinstance(v, str)}):
        turn["images"] = kept
    return turn


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many replies, how many different ones, and the commonest: {"replies", "distinct", "commonest", "times"}.

    Where some were cut or invalid: "cut", how many, and "invalid" {kind: how many}.
    """
    turns = [turn for sample in samples for turn in sample["turns"]]
    replies = Counter(turn["reply"] for turn in turns)
    commonest, times = replies.most_common(1)[0] if replies else ("", 0)
    invalid = Counter(turn["invalid"] for turn in turns if "invalid" in turn)
    cut = sum(turn.get("cut", False) for turn in turns)
    said = {"replies": replies.total(), "distinct": len(replies), "commonest": shorten(commonest), "times": times}
    return said | ({"invalid": dict(sorted(invalid.items()))} if invalid else {}) | ({"cut": cut} if cut else {})


def pick(samples: Sequence[Sample], count: int = SHOWN) -> dict[str, list[Sample]]:
    """{"best", "worst", "random"}: at most `count` of each, none twice, the same ones whenever asked."""
    picked: dict[str, list[Sample]] = {"best": [], "worst": [], "random": []}
    kinds = list(picked) * count
    for kind, sample in zip(kinds, _by_turns(samples), strict=False):
        picked[kind].append(sample)
    return picked


def _by_turns(samples: Sequence[Sample]) -> list[Sample]:
    """All of them: the best, the worst, one at random, the second best, ..."""
    number = [sample.get("episode", i) for i, sample in enumerate(samples)]
    ranked = sorted(range(len(samples)), key=lambda i: (-samples[i]["return"], number[i]))
    queues = [iter(ranked), reversed(ranked), iter(sorted(ranked, key=lambda i: _by_chance(number[i])))]
    order: dict[int, None] = {}
    while len(order) < len(samples):
        for queue in queues:
            chosen = next((i for i in queue if i not in order), None)
            if chosen is not None:
                order[chosen] = None
    return [samples[i] for i in order]


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """A long text without its middle."""
    if len(text) <= most:
        return text
    head, tail = 3 * most // 4, most // 4
    return f"{text[:head]} [... {len(text) - head - tail:,} characters ...] {text[len(text) - tail :]}"


def _shortened(sample: Sample) -> Sample:
    turns = sample["turns"]
    if len(turns) > MOST_TURNS:
        left = len(turns) - MOST_TURNS
        turns = [*turns[: MOST_TURNS // 2], *turns[-MOST_TURNS // 2 :]]
        sample = {**sample, "turns_left_out": left}
    return {**sample, "turns": [_shortened_turn(turn) for turn in turns]}


def _shortened_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with short texts; spans of a reply that loses its middle mean nothing."""
    short = {k: shorten(v) if k in ("prompt", "reply", "action") else v for k, v in turn.items()}
    lost = ("thought", "said") if short["reply"] != turn["reply"] else ()
    return {key: value for key, value in short.items() if key not in lost}


def plain(text: str) -> str:
    """For eyes: chats as their messages, control characters as what they are."""
    try:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in read_chat(text))
    except ValueError:
        pass
    return visible(text)


def parts(turn: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A reply in its parts, each "thought", "said" or "" with its text: all of it, in order, for eyes."""
    reply, found, place = turn["reply"], [], 0
    for kind in ("thought", "said"):
        start, end = turn.get(kind, (0, 0))
        if place <= start < end:
            found += [("", reply[place:start]), (kind, reply[start:end])]
            place = end
    return [(kind, visible(text)) for kind, text in (*found, ("", reply[place:])) if text]


def wrong(turn: Mapping[str, Any]) -> str:
    """What is wrong with a reply, for eyes: "unknown_word, cut", or nothing."""
    kinds = dict.fromkeys(
        [*([visible(turn["invalid"])] if "invalid" in turn else []), *["cut"] * bool(turn.get("cut"))]
    )
    return ", ".join(kinds)


def rows_of(picked: Mapping[str, Sequence[Sample]]) -> list[tuple[str, int, int, str, str, str, str, float]]:
    """`COLUMNS` of every turn, as they are shown."""
    rows = []
    for kind, sample in ((kind, sample) for kind, some in picked.items() for sample in some):
        for number, turn in enumerate(sample["turns"]):
            said = plain(turn["prompt"]), plain(turn["reply"]), visible(turn.get("action", "")), wrong(turn)
            rows.append((kind, sample["seed"], number, *said, float(turn["reward"])))
    return rows


def as_markdown(samples: Sequence[Sample]) -> str:
    """The same for TensorBoard, which renders Markdown: everything in code, which nothing can break out of."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        text = escape(shorten(str(value), 500)).replace("|", "&#124;").replace("\n", "<br>")
        return f"<code>{text}</code>" if text else ""

    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(map(cell, row))} |" for row in rows_of(pick(samples)))])
