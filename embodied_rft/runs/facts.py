"""Where a run was made: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embodied_rft.files import PACKAGE, write_json
from embodied_rft.registry import version_of
from embodied_rft.runs.folder import RunFolder

OURS = "embodied-rft"
REPORTED = (OURS, "torch", "numpy", "mujoco", "gymnasium", "gymnasium-robotics", "stable-baselines3", "transformers")


def machine_facts() -> dict[str, Any]:
    """Processor, usable cores, memory, GPU, system and package versions, as plain data for the report."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {name: version_of(name) for name in REPORTED},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def code_version() -> str:
    """The commit of the checkout, "+ changes" if it was edited, or the released version."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return f"release {version_of(OURS)}"
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + (" + changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return f"checkout of {version_of(OURS)}"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def write_run_facts(folder: str | Path, command: Sequence[str]) -> None:
    """Write run.json at a run's start: command, commit, machine, versions. A resumed run keeps the first one."""
    path = RunFolder(folder).facts
    if not path.exists():
        write_json(path, {"command": shlex.join(command)} | run_facts())


def run_facts() -> dict[str, Any]:
    """What a number needs beside it to be repeated, as far as it can be found out here."""
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"commit": code_version(), "started": started, **machine_facts()}
