"""The keyboard: what keys are called, and what a page is told of each (layout of the United States)."""

from __future__ import annotations

from typing import NamedTuple

from embodied_rft.names import UserError, nearest

MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}  # bits of the protocol


class Key(NamedTuple):
    """Key("a", "KeyA", 65, "a"): name, place on the keyboard, number of old, the text that it writes."""

    key: str
    code: str  # "": on no keyboard
    number: int = 0
    text: str = ""
    location: int = 0


def _letters() -> dict[str, tuple[Key, int]]:
    """Every character of the keyboard: its key, and whether shift is held."""
    shift, found = MODIFIERS["Shift"], {}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        big = letter.upper()
        found[letter] = Key(letter, f"Key{big}", ord(big), letter), 0
        found[big] = Key(big, f"Key{big}", ord(big), big), shift
    for digit, above in zip("0123456789", ")!@#$%^&*(", strict=True):
        found[digit] = Key(digit, f"Digit{digit}", ord(digit), digit), 0
        found[above] = Key(above, f"Digit{digit}", ord(digit), above), shift
    signs = {
        ";:": ("Semicolon", 186), "=+": ("Equal", 187), ",<": ("Comma", 188), "-_": ("Minus", 189),
        ".>": ("Period", 190), "/?": ("Slash", 191), "`~": ("Backquote", 192), "[{": ("BracketLeft", 219),
        "\\|": ("Backslash", 220), "]}": ("BracketRight", 221), "'\"": ("Quote", 222),
    }  # fmt: skip
    for both, (code, number) in signs.items():
        plain, above = both[0], both[1]
        found[plain] = Key(plain, code, number, plain), 0
        found[above] = Key(above, code, number, above), shift
    found[" "] = Key(" ", "Space", 32, " "), 0
    found["\n"] = Key("Enter", "Enter", 13, "\r"), 0
    found["\t"] = Key("Tab", "Tab", 9), 0
    return found


LETTERS = _letters()
NAMED = {
    name: Key(name, name, number, text)
    for name, number, text in (
        ("Enter", 13, "\r"), ("Tab", 9, ""), ("Backspace", 8, ""), ("Delete", 46, ""), ("Escape", 27, ""),
        ("Space", 32, " "), ("Home", 36, ""), ("End", 35, ""), ("PageUp", 33, ""), ("PageDown", 34, ""),
        ("ArrowLeft", 37, ""), ("ArrowUp", 38, ""), ("ArrowRight", 39, ""), ("ArrowDown", 40, ""), ("Insert", 45, ""),
    )
} | {f"F{number}": Key(f"F{number}", f"F{number}", 111 + number) for number in range(1, 13)}  # fmt: skip
NAMED["Space"] = NAMED["Space"]._replace(key=" ")


def chord(name: str) -> tuple[Key, int]:
    """The key of a character or a name, "a" or "Enter", and bits of those that are held with it, as in "Control+a".

    Raises:
        ValueError: no key has that name.
    """
    held = 0
    while (end := name.find("+")) > 0 and name[:end] in MODIFIERS and name[end + 1 :]:
        held |= MODIFIERS[name[:end]]
        name = name[end + 1 :]
    if name in NAMED:
        return NAMED[name], held
    if name in LETTERS:
        key, shift = LETTERS[name]
        return key, held | shift
    if len(name) == 1 and not held and name.isprintable():
        return Key(name, "", text=name), 0
    raise UserError(f"no key is called {name!r}; {nearest(name, [*NAMED, *MODIFIERS])}")
