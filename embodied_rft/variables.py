"""Environment variables, `EMBODIED_RFT_*`: read here alone; a name or a value that nobody knows is refused."""

from __future__ import annotations

import os

from embodied_rft.names import UserError, nearest

PREFIX = "EMBODIED_RFT_"
FUSED, TIMEOUT, BROWSER = f"{PREFIX}FUSED", f"{PREFIX}TIMEOUT", f"{PREFIX}BROWSER"
KNOWN = (FUSED, TIMEOUT, BROWSER)


def _read(name: str, default: str) -> str:
    for given in os.environ:
        if given.startswith(PREFIX) and given not in KNOWN:
            raise UserError(f"environment variable {given} is not known; {nearest(given, KNOWN)}")
    return os.environ.get(name, default)


def fused() -> bool:
    """EMBODIED_RFT_FUSED: 0 runs the plain forms of what `networks.fused` has as one node; default 1."""
    if (given := _read(FUSED, "1")) not in ("0", "1"):
        raise UserError(f"{FUSED} is {given!r}: 0 or 1 is expected")
    return given == "1"


def timeout() -> float:
    """EMBODIED_RFT_TIMEOUT: seconds that one of several processes waits for another one at most; default 1800."""
    given = _read(TIMEOUT, "1800")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise UserError(f"{TIMEOUT} is {given!r}: a number of seconds is expected, such as 1800")
    return seconds


def browser() -> str | None:
    """EMBODIED_RFT_BROWSER: the program that pages are opened in; default: what is installed."""
    return _read(BROWSER, "") or None
