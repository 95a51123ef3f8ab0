"""What this machine and installation can do: the checks of `erft doctor` and the facts that a report states."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rich.box
import rich.console
import rich.table

from embodied_rft.runs.facts import version_of

MUJOCO = "3.3.0"  # newer releases break gymnasium-robotics 1.4.2
OPTIONAL = {
    "wandb": "logging to Weights & Biases",
    "tensorboard": "logging to TensorBoard",
    "av": "MP4 videos in the report",
    "peft": "LoRA (pip install 'embodied-rft[lora]')",
    "torchrl": "benchmarks (pip install 'embodied-rft[bench]')",
    "trl": "benchmarks (pip install 'embodied-rft[bench]')",
}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: Finding("MuJoCo", "3.3.0", "ok")."""

    name: str
    value: str
    state: str  # "ok", "note" (works without), "broken" (does not work)
    advice: str = ""


# --- checks ------------------------------------------------------------------------------------------


def check_python() -> Finding:
    """3.11 or newer."""
    fine = sys.version_info >= (3, 11)
    return Finding(
        "Python", platform.python_version(), "ok" if fine else "broken", "" if fine else "needs 3.11 or newer"
    )


def check_torch() -> Finding:
    """Imports and computes."""
    import torch

    assert torch.ones(2, 2).sum().item() == 4.0
    return Finding("PyTorch", f"{torch.__version__}, {torch.get_num_threads()} threads", "ok")


def check_mujoco() -> Finding:
    """The pinned release."""
    import mujoco

    if mujoco.__version__ == MUJOCO:
        return Finding("MuJoCo", mujoco.__version__, "ok")
    return Finding("MuJoCo", mujoco.__version__, "broken", f"the Fetch models need it: pip install mujoco=={MUJOCO}")


def check_rendering() -> Finding:
    """An offscreen GL context; without one everything works except videos and pixels."""
    rendering = importlib.import_module("embodied_rft.envs.manipulation.rendering")
    available = rendering.gl_available()
    fine, detail = available if isinstance(available, tuple) else (bool(available), "")
    if fine:
        return Finding("Rendering", str(detail or "available"), "ok")
    return Finding("Rendering", str(detail or "no GL library"), "note", "videos: apt-get install libegl1 libegl-mesa0")


def check_memory() -> Finding:
    """Enough for the demo."""
    import psutil

    free = psutil.virtual_memory().available / 2**30
    return Finding(
        "Memory", f"{free:.1f} GiB free", "ok" if free > 2 else "note", "" if free > 2 else "the demo wants 2 GiB"
    )


def check_cores() -> Finding:
    """What this process may use."""
    return Finding("Cores", str(len(os.sched_getaffinity(0))), "ok")


def check_disk() -> Finding:
    """Room for checkpoints here."""
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding(
        "Disk", f"{free:.1f} GB free", "ok" if free > 1 else "note", "" if free > 1 else "checkpoints need room"
    )


def check_gpu() -> Finding:
    """Optional."""
    import torch

    return Finding("GPU", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (not needed)", "ok")


def check_plugins() -> Finding:
    """Everything that registers itself can be imported."""
    from embodied_rft import registry

    counts = {kind: len(registry.known(kind)) for kind in ("agent", "objective", "stage", "demonstrator")}
    return Finding("Plug-ins", ", ".join(f"{count} {kind}s" for kind, count in counts.items()), "ok")


def check_environment() -> Finding:
    """Ten steps of real physics, twice, give the same numbers."""
    import gymnasium
    import numpy as np

    importlib.import_module("embodied_rft.envs")

    def rollout() -> np.ndarray:
        env = gymnasium.make("embodied_rft/FetchReach-v0")
        try:
            observations = [env.reset(seed=0)[0]]
            observations += [env.step(np.full(4, 0.1, dtype=np.float32))[0] for _ in range(10)]
        finally:
            env.close()
        return np.concatenate(
            [np.ravel(leaf) for o in observations for leaf in (o.values() if isinstance(o, dict) else [o])]
        )

    first, second = rollout(), rollout()
    if np.array_equal(first, second) and np.isfinite(first).all():
        return Finding("Simulation", "10 steps of FetchReach, twice the same", "ok")
    return Finding("Simulation", "two equal rollouts differ", "broken", "report this with the output of erft doctor")


def check_optional() -> list[Finding]:
    """Packages that add something."""
    found = [(package, version_of(package), purpose) for package, purpose in OPTIONAL.items()]
    return [
        Finding(name, version or "not installed", "ok" if version else "note", purpose)
        for name, version, purpose in found
    ]


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python, check_torch, check_mujoco, check_plugins, check_environment, check_rendering, check_cores,
    check_memory, check_disk, check_gpu,
)  # fmt: skip


def examine() -> list[Finding]:
    """Run all checks; one that raises is a broken one."""
    findings = []
    for check in CHECKS:
        try:
            findings.append(check())
        except Exception as error:  # whatever is broken here is the finding
            name = check.__name__.removeprefix("check_").capitalize()
            findings.append(Finding(name, f"{type(error).__name__}: {error}", "broken"))
    return findings + check_optional()


def doctor() -> int:
    """Print what was found; 1 if something that everything needs is broken."""
    findings = examine()
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for heading in ("", "found", "", "advice"):
        table.add_column(heading, overflow="fold")
    style = {"ok": "green", "note": "yellow", "broken": "bold red"}
    for finding in findings:
        state = f"[{style[finding.state]}]{finding.state}[/]"
        table.add_row(finding.name, rich.markup.escape(finding.value), state, rich.markup.escape(finding.advice))
    rich.console.Console().print(table)
    return int(any(finding.state == "broken" for finding in findings))
