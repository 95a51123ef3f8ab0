"""What was said in the evaluations of a run, for its page and for the terminal: conversations with their pictures.

Boundary: the run folder's samples to plain values that a template or a terminal shows; texts come out harmless for a
terminal (`names.visible`), a template escapes them besides. A page has an end: what finds no room is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embodied_rft.evaluation import pictures
from embodied_rft.evaluation.samples import Sample, parts, pick, plain, read_samples, shorten, summarize, wrong
from embodied_rft.names import UserError, nearest, visible
from embodied_rft.report.run import Run

MOST_BYTES = 8_000_000  # of all conversations of one page, pictures included
FOLDED = 1  # of each kind, of evaluations that are folded
Picked = Mapping[str, Sequence[Sample]]


@dataclass(frozen=True)
class Turn:
    """One message and the answer to it."""

    prompt: str
    reply: Sequence[tuple[str, str]]  # ("thought" | "said" | "", text), see `samples.parts`
    action: str | None  # as it was read, where a parser read it
    wrong: str  # "unknown_word, cut", or nothing
    reward: float
    pictures: Sequence[tuple[str, str | None]] = ()  # (key, data URL); None: it was not kept


@dataclass(frozen=True)
class Conversation:
    """One episode."""

    title: str  # "episode 3, initial state 2147483651: success, return 1"
    turns: Sequence[Turn]
    kind: str = ""  # best, worst, random
    left_out: int = 0  # turns in the middle

    @property
    def middle(self) -> int:
        """Before which turn some are left out."""
        return len(self.turns) // 2


@dataclass
class Said:
    """What was said in one evaluation."""

    name: str
    about: str  # how many replies, how many of them different, invalid or cut
    commonest: str  # where one came more than once, else nothing
    times: int
    conversations: list[Conversation] = field(default_factory=list)
    open: bool = False


class Room:
    """How much more a page can hold, in bytes."""

    def __init__(self, run: Run, most: int = MOST_BYTES) -> None:
        self.folder, self.left = run.folder.pictures, most

    def picture(self, digest: object) -> str | None:
        """A data URL, if it is there and there is room."""
        url = pictures.data_url(self.folder, digest)
        return url if url is not None and self.take(len(url)) else None

    def take(self, size: int) -> bool:
        """Whether so many bytes fit; then they are taken."""
        fits = size <= self.left
        self.left -= size if fits else 0
        return fits


def said_in(run: Run, most: int = MOST_BYTES) -> tuple[list[Said], list[str]]:
    """What a page shows of all evaluations, the telling ones first, and the names of those that found no room."""
    room, found, without = Room(run, most), [], list[str]()
    first = run.verdicts[:1][: len(run.verdicts) - 1]
    for number, evaluation in enumerate([*run.verdicts[-1:], *first, *run.later, *run.verdicts[1:-1], *run.curve]):
        samples = samples_of(run, evaluation)
        if not samples:
            continue
        telling = number < len(run.verdicts[-1:]) + len(first) + len(run.later)
        said = _said(evaluation, samples, telling=telling)
        for kind, some in pick(samples, *(() if telling else (FOLDED,))).items():
            for sample in some:
                texts = sum(len(turn["prompt"]) + len(turn["reply"]) + 300 for turn in sample["turns"])
                if room.take(texts):
                    said.conversations.append(conversation(sample, told=_told(evaluation), kind=kind, room=room))
        if said.conversations:
            found.append(said)
        else:
            without.append(said.name)
    return found, without


def samples_of(run: Run, evaluation: Mapping[str, Any]) -> list[Sample]:
    """What was kept of an evaluation; nothing where actions are no texts."""
    return read_samples(run.folder.samples_of(dict(evaluation))) if evaluation.get("samples") else []


def _told(evaluation: Mapping[str, Any]) -> bool:
    return bool(evaluation.get("told", True))


def _said(evaluation: Mapping[str, Any], samples: Sequence[Sample], *, telling: bool) -> Said:
    said, counts = evaluation.get("said"), ("replies", "distinct", "times")
    if not isinstance(said, Mapping) or not all(isinstance(said.get(name), int) for name in counts):
        said = summarize(samples)
    about = f"{said['replies']} replies, {said['distinct']} of them different"
    invalid = said.get("invalid")
    if isinstance(invalid, Mapping):
        about += "".join(f"; {count} invalid: {visible(str(kind))}" for kind, count in invalid.items())
    about += f"; {said['cut']} cut" if isinstance(said.get("cut"), int) else ""
    commonest = shorten(plain(str(said.get("commonest"))), 120) if said["times"] > 1 else ""
    return Said(label(evaluation), about, commonest, said["times"], open=telling)


def label(evaluation: Mapping[str, Any]) -> str:
    """An evaluation among others of its name: "curve, after 4,096 decisions"."""
    decisions = evaluation.get("decisions")
    after = f", after {decisions:,} decisions" if decisions else ""
    return visible(str(evaluation.get("name") or "policy")) + after


def title(sample: Sample, *, told: bool = True) -> str:
    """How an episode ended: "episode 3, initial state 2147483651: success, return 1"."""
    number = f"episode {sample['episode']}, " if "episode" in sample else ""
    outcome = ("success, " if sample["success"] else "failure, ") if told else ""
    return f"{number}initial state {sample['seed']}: {outcome}return {sample['return']:.4g}"


def conversation(sample: Sample, *, told: bool = True, kind: str = "", room: Room | None = None) -> Conversation:
    """A sample to be shown; without room, pictures are only named."""
    turns = []
    for turn in sample["turns"]:
        action = visible(turn["action"]) if "action" in turn else None
        seen = [
            (visible(key), None if room is None else room.picture(digest))
            for key, digest in turn.get("images", {}).items()
        ]
        turns.append(Turn(plain(turn["prompt"]), parts(turn), action, wrong(turn), turn["reward"], seen))
    return Conversation(title(sample, told=told), turns, kind, sample.get("turns_left_out", 0))


# --- one that is asked for -------------------------------------------------------------------------------------------


def evaluations_of(run: Run) -> dict[str, dict[str, Any]]:
    """Those in which something was said, in their order, by a name of their own: "policy", or "curve@4096"."""
    every = [e for e in (*run.verdicts, *run.curve, *run.later) if e.get("samples")]
    every.sort(key=lambda e: e.get("wall_seconds", 0))
    return dict(_distinct(every))


def _distinct(every: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    known: set[str] = set()
    for evaluation in every:
        name = plain_name = visible(str(evaluation.get("name") or "policy"))
        if sum((e.get("name") or "policy") == (evaluation.get("name") or "policy") for e in every) > 1:
            name = plain_name = f"{plain_name}@{evaluation.get('decisions', 0)}"
        number = 1
        while name in known:
            number += 1
            name = f"{plain_name}#{number}"
        known.add(name)
        yield name, evaluation


def chosen(run: Run, name: str | None) -> tuple[str, dict[str, Any]]:
    """An evaluation by name; None: the latest verdict.

    Raises:
        ValueError: nothing was said in this run, or there is no such evaluation.
    """
    known = evaluations_of(run)
    if not known:
        raise UserError(f"{run.folder} holds no samples: no evaluation of an agent that writes text has ended in it")
    if name is None:
        verdicts = [key for key, e in known.items() if e in run.verdicts]
        name = (verdicts or list(known))[-1]
    if name not in known:
        raise UserError(f"no evaluation {name!r}; {nearest(name, known)}")
    return name, known[name]


def episode(samples: Mapping[int, Sample], number: int, of: str) -> Sample:
    """One of the samples of an evaluation; ValueError says which there are."""
    if number not in samples:
        raise UserError(f"no episode {number} in {of!r}; kept are {_ranges(sorted(samples)) or 'none'}")
    return samples[number]


def _ranges(numbers: Sequence[int]) -> str:
    """0 to 5, 7, 9 to 12."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)
