"""What this machine and installation can do: the checks of `erft doctor`, its own and those that plug-ins register."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import rich.box
import rich.console
import rich.table
import torch

from embodied_rft import registry
from embodied_rft.data import Finding
from embodied_rft.registry import version_of

OPTIONAL = {
    "wandb": "logging to Weights & Biases",
    "tensorboard": "logging to TensorBoard",
    "av": "MP4 videos in the report",
    "peft": "LoRA (pip install 'embodied-rft[lora]')",
    "torchrl": "benchmarks (pip install 'embodied-rft[bench]')",
    "trl": "benchmarks (pip install 'embodied-rft[bench]')",
}


def check_python() -> Finding:
    """3.11 or newer."""
    fine = sys.version_info >= (3, 11)
    return Finding(platform.python_version(), "ok" if fine else "broken", "" if fine else "needs 3.11 or newer")


def check_torch() -> Finding:
    """Computes."""
    assert torch.ones(2, 2).sum().item() == 4.0
    return Finding(f"{torch.__version__}, {torch.get_num_threads()} threads", "ok")


def check_plugins() -> Finding:
    """Everything that registers itself can be imported."""
    counts = {kind: len(registry.known(kind)) for kind in ("agent", "objective", "stage", "demonstrator")}
    return Finding(", ".join(f"{count} {kind}s" for kind, count in counts.items()), "ok")


def check_cores() -> Finding:
    """What this process may use."""
    return Finding(str(len(os.sched_getaffinity(0))), "ok")


def check_memory() -> Finding:
    """Enough for the demo."""
    free = psutil.virtual_memory().available / 2**30
    return Finding(f"{free:.1f} GiB free", "ok" if free > 2 else "note", "" if free > 2 else "the demo wants 2 GiB")


def check_disk() -> Finding:
    """Room for checkpoints here."""
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding(f"{free:.1f} GB free", "ok" if free > 1 else "note", "" if free > 1 else "checkpoints need room")


def check_gpu() -> Finding:
    """Optional."""
    return Finding(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (not needed)", "ok")


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python, "PyTorch": check_torch, "Plug-ins": check_plugins, "Cores": check_cores,
    "Memory": check_memory, "Disk": check_disk, "GPU": check_gpu,
}  # fmt: skip


def examine() -> dict[str, Finding]:
    """Run all checks; one that raises is a broken one."""
    findings = {name: _outcome(check) for name, check in CHECKS.items()}
    if findings["Plug-ins"].state == "ok":
        findings |= {name: _outcome(registry.find("check", name)) for name in registry.known("check")}
    for package, purpose in OPTIONAL.items():
        version = version_of(package)
        findings[package] = Finding(version or "not installed", "ok" if version else "note", purpose)
    return findings


def _outcome(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever is broken here is the finding
        return Finding(f"{type(error).__name__}: {error}", "broken")


def doctor() -> int:
    """Print what was found; 1 if something that everything needs is broken."""
    findings = examine()
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for heading in ("", "found", "", "advice"):
        table.add_column(heading, overflow="fold")
    style = {"ok": "green", "note": "yellow", "broken": "bold red"}
    for name, finding in findings.items():
        state = f"[{style[finding.state]}]{finding.state}[/]"
        table.add_row(name, rich.markup.escape(finding.value), state, rich.markup.escape(finding.advice))
    rich.console.Console().print(table)
    return int(any(finding.state == "broken" for finding in findings.values()))
