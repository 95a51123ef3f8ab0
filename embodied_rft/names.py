"""What people meet: errors that are theirs to mend, the nearest known name, no characters that steer a terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import regex


class UserError(ValueError):
    """What was given is wrong: a recipe, an option, a file, a plug-in. The message says what to do.

    The command shows it as one line; every other error is a fault of some code, and shows where it is.
    """


_STEERING = regex.compile(r"[\p{Cc}\p{Cf}\p{Cs}--[\n\t]]", flags=regex.V1)


def visible(text: str) -> str:
    r"""A text in which control and formatting characters are written out ("\x1b"), all but line breaks and tabs."""
    return str(_STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text))


def nearest(given: str, names: Iterable[str]) -> str:
    """A sentence that helps after a wrong name: the closest known one, else all of them."""
    names = sorted(names)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or '(none)'}"
