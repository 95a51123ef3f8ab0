"""What `erft doctor` examines of browsers: whether one is installed that pages can be opened in; starts none."""

from __future__ import annotations

from embodied_rft.data import Finding
from embodied_rft.envs.gui.chromium import INSTALL, find_browser
from embodied_rft.names import UserError
from embodied_rft.registry import register, version_of


@register("check", "Browser")
def check_browser() -> Finding:
    """It is missed only by who asks for pages."""
    try:
        found = find_browser()
    except UserError as error:
        return Finding("not found", "broken", str(error))
    if found is None:
        return Finding("not installed", "note", f"for MiniWoB and Desk: {INSTALL}")
    pages = version_of("miniwob")
    missing = "" if pages else "for MiniWoB: pip install miniwob, or what our own tasks need with 'embodied-rft[tasks]'"
    return Finding(f"{found}{f', miniwob {pages}' if pages else ''}", "ok" if pages else "note", missing)
