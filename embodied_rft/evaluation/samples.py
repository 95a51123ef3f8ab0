"""What agents that write text said while they were judged: kept beside an evaluation, shown as best, worst and random.

A success rate hides how it came about; a reward that is hacked is seen at a glance. Boundary: texts of episodes to
JSON lines and rows; knows no model and no environment.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rft.data import Action
from embodied_rft.files import write_atomically
from embodied_rft.names import visible
from embodied_rft.pools.text_spaces import read_chat

MOST_CHARACTERS = 4_000  # of one text
MOST_TURNS = 10  # of one episode
MOST_BYTES = 4_000_000  # of one evaluation
SHOWN = 3  # of each kind in a report

Sample = dict[str, Any]  # {"seed", "return", "success", "turns": [{"prompt", "reply", "reward"}]}


class Samples:
    """What was said in the episodes of one evaluation."""

    def __init__(self) -> None:
        self.turns: dict[int, list[dict[str, Any]]] = {}

    def add(self, episode: int, observation: Mapping[str, Any], action: Action, reward: float, env: int) -> None:
        """One decision of environment `env`; nothing happens where actions are no texts."""
        if isinstance(action, list) and isinstance(action[env], str):
            shown = {key: value[env] for key, value in observation.items() if isinstance(value, list)}
            prompt = "\n".join(shown.values() if len(shown) == 1 else (f"{k}: {v}" for k, v in shown.items()))
            turn = {"prompt": prompt, "reply": action[env], "reward": float(reward)}
            self.turns.setdefault(episode, []).append(turn)

    def forget(self, episode: int) -> None:
        """The episode is run again."""
        self.turns.pop(episode, None)

    def ended(self, seeds: Sequence[int], returns: Sequence[float], results: Sequence[bool]) -> list[Sample]:
        """All episodes in which something was said, in their order."""
        return [
            {"seed": int(seeds[e]), "return": float(returns[e]), "success": bool(results[e]), "turns": self.turns[e]}
            for e in sorted(self.turns)
        ]


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
    found = []
    for line in Path(path).read_bytes().splitlines() if Path(path).is_file() else ():
        try:
            sample = json.loads(line)
            float(sample["return"]), bool(sample["success"]), int(sample["seed"])
            if all(isinstance(turn[key], str) for turn in sample["turns"] for key in ("prompt", "reply")):
                found.append(sample)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return found


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many replies, how many different ones, and the commonest: {"replies", "distinct", "commonest", "times"}."""
    replies = Counter(turn["reply"] for sample in samples for turn in sample["turns"])
    commonest, times = replies.most_common(1)[0] if replies else ("", 0)
    return {
        "replies": replies.total(),
        "distinct": len(replies),
        "commonest": shorten(commonest),
        "times": times,
    }


def pick(samples: Sequence[Sample], count: int = SHOWN) -> dict[str, list[Sample]]:
    """{"best", "worst", "random"}: at most `count` of each, none twice, the same ones whenever asked."""
    picked: dict[str, list[Sample]] = {"best": [], "worst": [], "random": []}
    kinds = list(picked) * count
    for kind, sample in zip(kinds, _by_turns(samples), strict=False):
        picked[kind].append(sample)
    return picked


def _by_turns(samples: Sequence[Sample]) -> list[Sample]:
    """All of them: the best, the worst, one at random, the second best, ..."""
    ranked = sorted(range(len(samples)), key=lambda i: (-samples[i]["return"], i))
    queues = [iter(ranked), reversed(ranked), iter(np.random.default_rng(0).permutation(len(samples)).tolist())]
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
    short = [{**turn, "prompt": shorten(turn["prompt"]), "reply": shorten(turn["reply"])} for turn in turns]
    return {**sample, "turns": short}


def plain(text: str) -> str:
    """For eyes: chats as their messages, control characters as what they are."""
    try:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in read_chat(text))
    except ValueError:
        pass
    return visible(text)


def rows_of(picked: Mapping[str, Sequence[Sample]]) -> list[tuple[str, int, str, str, float]]:
    """(kind, seed, prompt, reply, reward) of every turn, as they are shown."""
    return [
        (kind, sample["seed"], plain(turn["prompt"]), plain(turn["reply"]), float(turn["reward"]))
        for kind, some in picked.items()
        for sample in some
        for turn in sample["turns"]
    ]


def shown(evaluation: Mapping[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    """What a report shows of one evaluation: its name, what `summarize` says of all replies, rows as of `rows_of`."""
    said, counts = evaluation.get("said"), ("replies", "distinct", "times")
    if not isinstance(said, Mapping) or not all(isinstance(said.get(name), int) for name in counts):
        said = summarize(samples)
    commonest = shorten(plain(str(said.get("commonest"))), 120)
    name = visible(str(evaluation.get("name") or "policy"))
    return {**said, "commonest": commonest, "name": name, "rows": rows_of(pick(samples))}


def as_markdown(samples: Sequence[Sample]) -> str:
    """The same for TensorBoard, which renders Markdown: everything in code, which nothing can break out of."""

    def cell(text: str) -> str:
        return f"<code>{escape(shorten(text, 500)).replace('|', '&#124;').replace(chr(10), '<br>')}</code>"

    rows = [f"| {kind} | {cell(p)} | {cell(r)} | {reward:.3g} |" for kind, _, p, r, reward in rows_of(pick(samples))]
    return "\n".join(["| | prompt | reply | reward |", "|---|---|---|---|", *rows])
