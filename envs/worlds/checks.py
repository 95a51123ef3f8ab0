"""What `erft doctor` examines of environments of other packages: which of them are installed; imports none."""

from __future__ import annotations

from embodied_rft.data import Finding
from embodied_rft.registry import register, version_of

PACKAGES = {  # what opens with each, by the names that pip knows
    "minigrid": "MiniGrid-v0, BabyAI-v0",
    "ale-py": "Arcade-v0",
    "crafter": "Crafter-v0",
    "textworld": "TextGame-v0",
    "websockets": "OpenEnv-v0",
}


@register("check", "Worlds")
def check_worlds() -> Finding:
    """Those that are not there are missed only by who asks for them."""
    found = {package: version_of(package) for package in PACKAGES}
    here = ", ".join(f"{package} {number}" for package, number in found.items() if number)
    missing = [package for package, number in found.items() if not number]
    if not missing:
        return Finding(here, "ok")
    opens = ", ".join(PACKAGES[package] for package in missing)
    advice = f"for {opens}: pip install {' '.join(missing)}, or all with 'embodied-rft[tasks]'"
    return Finding(here or "not installed", "note", advice)
