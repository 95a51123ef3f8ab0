"""What is to be done at the desk, from a seed: an errand, whether it was done, and what comes next.

Boundary: pure functions of plain data (what the page holds and reports); knows no browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

USERS = ("ann", "ben", "eva", "ida", "jon", "kim", "leo", "mia", "sam", "tom")
NAMES = ("Ada", "Bob", "Cleo", "Dan", "Elsa", "Finn", "Gus", "Hal", "Iris", "Jim")
CITIES = ("Bern", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Quito", "Rome", "Seoul", "Wien")
ROOMS = ("A1", "A2", "B1", "B2", "C1", "C2")
SUBJECTS = ("rent", "tea", "plan", "trip", "tax", "news", "bike", "cake")
FOLDERS = ("Work", "Home", "Bills", "Later")
TASKS = ("login", "file", "form", "sort", "day")  # from the shortest on
Report = Mapping[str, Any]  # what the page says has happened, see desk.js
Verdict = Literal["open", "done", "wrong"]


@dataclass(frozen=True)
class Errand:
    """What is asked of one episode, and what the page is told to hold."""

    user: str
    password: str
    form: Mapping[str, object] | None  # to be sent, exactly
    filed: Mapping[str, str]  # message to folder
    content: Mapping[str, Any]  # of the page
    instruction: str


def plan(task: str, seed: int) -> Errand:
    """The errand of a seed."""
    rng = np.random.default_rng(seed)

    def some(words: Sequence[str], count: int) -> list[str]:
        return [words[number] for number in rng.permutation(len(words))[:count]]

    users, senders, subjects = some(USERS, 3), some(USERS, 4), some(SUBJECTS, 4)
    accounts = {user: f"{chr(97 + rng.integers(26))}{rng.integers(10)}{chr(97 + rng.integers(26))}" for user in users}
    rooms, folders = some(ROOMS, 3), some(FOLDERS, 3)
    messages = [{"id": str(n), "from": who, "about": what} for n, (who, what) in enumerate(zip(senders, subjects))]
    content = {"accounts": accounts, "rooms": rooms, "messages": messages, "folders": folders}
    form: dict[str, object] = {"name": some(NAMES, 1)[0], "city": some(CITIES, 1)[0], "room": some(rooms, 1)[0]}
    form["urgent"] = bool(rng.integers(2))
    asked = rng.permutation(len(messages))[: 2 if task == "sort" else 1]
    filed = {str(number): folders[int(rng.integers(len(folders)))] for number in asked}
    user = users[0]
    said = [f"Log in as {user} with password {accounts[user]}."]
    if wants_form := task in ("form", "day"):
        urgent = "urgent" if form["urgent"] else "not urgent"
        said += [f"Send a form: name {form['name']}, city {form['city']}, room {form['room']}, {urgent}."]
    if wants_mail := task in ("file", "sort", "day"):
        said += [f"File the message of {messages[int(n)]['from']} in {folder}." for n, folder in filed.items()]
    mail = filed if wants_mail else {}
    return Errand(user, accounts[user], form if wants_form else None, mail, content, " ".join(said))


def judge(errand: Errand, report: Report) -> Verdict:
    """Whether all of it was done and nothing else; what cannot be taken back and was not asked for is wrong.

    A form that is sent, a message that is filed and somebody else who is logged in stay as they are.
    """
    sent, filed = list(report["sent"]), dict(report["filed"])
    wanted = [] if errand.form is None else [dict(errand.form)]
    if report["user"] not in (None, errand.user) or sent not in ([], wanted):
        return "wrong"
    if any(errand.filed.get(message) != folder for message, folder in filed.items()):
        return "wrong"
    return "done" if report["user"] == errand.user and sent == wanted and filed == dict(errand.filed) else "open"


def advise(errand: Errand, report: Report) -> str:
    """The next line of who does it without a detour, in pixels: "click 96 40", "type ann"."""
    seen = {one["id"]: one for one in report["seen"]}
    if report["user"] is None:
        return fill(seen, {"user": errand.user, "password": errand.password}) or click(seen["log-in"])
    if errand.form is not None and not report["sent"]:
        if report["screen"] != "form":
            return click(seen["go-form"])
        room, urgent = seen[f"room-{errand.form['room']}"], seen["urgent"]
        texts = {name: str(errand.form[name]) for name in ("name", "city")}
        if (said := fill(seen, texts)) is not None:
            return said
        if not room["value"]:
            return click(room)
        return click(urgent if urgent["value"] != errand.form["urgent"] else seen["send"])
    left = [message for message in errand.filed if message not in report["filed"]]
    if report["screen"] != "mail":
        return click(seen["go-mail"])
    if report["chosen"] in left:
        return click(seen[f"folder-{errand.filed[report['chosen']]}"])
    return click(seen[f"message-{left[0]}"])


def fill(seen: Mapping[str, Any], texts: Mapping[str, str]) -> str | None:
    """What fields still need: to be clicked on, to be emptied, to be typed into; None: nothing."""
    for name, text in texts.items():
        one = seen[name]
        if one["value"] == text:
            continue
        if not one["focus"]:
            return click(one)
        return f"type {text}" if one["all"] else "press Control+a"
    return None


def click(one: Mapping[str, Any]) -> str:
    """On the middle of something that is seen."""
    x, y, width, height = one["box"]
    return f"click {round(x + width / 2)} {round(y + height / 2)}"
