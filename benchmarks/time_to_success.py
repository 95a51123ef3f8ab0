"""Wall time until 90 % of held-out episodes succeed on Fetch PickAndPlace: our recipe, RLPD without pre-training, SB3.

    python -m benchmarks.time_to_success [--quick] [--minutes M] [--seeds S] [--figure docs/time_to_success.svg]

Each competitor has the machine alone and the same budget of learning time; evaluations are not counted for anybody.
Ours counts everything: collecting the demonstrations, cloning, warm-up, fine-tuning. A competitor that does not get
there counts with its whole budget, so `ratio` (best peer's time / ours) is then a lower bound. `--quick` runs the
same on Fetch Reach for a few seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Result, finish, table
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.recipe import load_recipe
from embodied_rft.train import train

TARGET = 0.9
Curve = list[tuple[float, float]]  # (learning seconds, success)


def competitors(*, minutes: float, quick: bool) -> dict[str, tuple[str, list[str]]]:
    """Recipe and overrides of each."""
    until = f"{{success: {TARGET}, minutes: {minutes}}}"
    every = 3_200 if quick else 9_600
    task = ["env.id=embodied_rft/FetchReach-v0"] if quick else []
    small = ["stages.0.demonstrate.episodes=20", "stages.1.pretrain.updates=300"] if quick else []
    fewer = ["stages.0.demonstrate.episodes=20"] if quick else []
    curve = f"evaluate_every={every}"
    ours = [f"stages.6.finetune.until={until}", f"stages.6.finetune.{curve}", "stages.6.finetune.decisions=2000000"]
    rlpd = [f"stages.2.finetune.until={until}", f"stages.2.finetune.{curve}", "stages.2.finetune.decisions=2000000"]
    sb3 = [
        f"stages.0.sb3.max_seconds={60 * minutes}",
        f"stages.0.sb3.until={TARGET}",
        f"stages.0.sb3.evaluate_every={every}",
    ]
    return {
        "ours (demo recipe)": ("demo", [*ours, *task, *small]),
        "RLPD without pre-training": ("fetch/rlpd", [*rlpd, *task, *fewer]),
        "SB3 SAC+HER from scratch": ("baselines/sb3_sac_her", [*sb3, *task]),
    }


def run(recipe: str, overrides: list[str], seed: int) -> Curve:
    """The learning curve of one run, evaluation time taken out."""
    with tempfile.TemporaryDirectory() as folder:
        train(
            load_recipe(recipe, [*overrides, f"seed={seed}", "checkpoint_seconds=1e9"]),
            folder,
            quiet=True,
            report=False,
        )
        files = [json.loads(p.read_text()) for p in RunFolder(folder).evaluation_files()]
    curve, judging = [], 0.0
    for evaluation in sorted(files, key=lambda e: e["wall_seconds"]):
        judging += evaluation["seconds"]
        if evaluation["sheet"] == 1:
            curve.append((evaluation["wall_seconds"] - judging, evaluation["success"]))
    return curve


def time_to(curve: Curve, budget: float) -> tuple[float, bool]:
    """(seconds to the target, whether it was reached)."""
    reached = [seconds for seconds, success in curve if success >= TARGET]
    return (reached[0], True) if reached else (budget, False)


def draw(curves: dict[str, list[Curve]], path: Path, title: str) -> None:
    """All curves in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for colour, (name, runs) in zip(("#1f6feb", "#bf8700", "#8250df"), curves.items(), strict=True):
        for index, curve in enumerate(runs):
            seconds, success = zip(*curve, strict=True) if curve else ((), ())
            axes.plot(seconds, success, color=colour, label=name if index == 0 else None, marker=".", linewidth=1.5)
    axes.axhline(TARGET, color="0.6", linewidth=0.8, linestyle="--")
    axes.set(xlabel="learning time, seconds", ylabel="success on 100 held-out states", ylim=(-0.02, 1.02), title=title)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Run all competitors one after the other for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Fetch Reach, a few seconds each; ends within 50 s")
    parser.add_argument("--minutes", type=float, default=5.0, help="budget of learning time for each")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="write the curves to this SVG file")
    options = parser.parse_args()
    minutes = 0.15 if options.quick else options.minutes
    entries = competitors(minutes=minutes, quick=options.quick)
    curves: dict[str, list[Curve]] = {name: [] for name in entries}
    for seed in range(1 if options.quick else options.seeds):
        for name, (recipe, overrides) in entries.items():
            curves[name].append(run(recipe, overrides, seed))
            print(f"seed {seed}  {name}: " + "  ".join(f"{s:.0f}s {x:.2f}" for s, x in curves[name][-1]), flush=True)
    times = {n: Result(n, [time_to(c, 60 * minutes)[0] for c in runs]) for n, runs in curves.items()}
    ours, *peers = times
    table(times, unit="s", title=f"Seconds to {TARGET:.0%} success", baseline=ours, digits=1)
    if options.figure:
        draw(curves, options.figure, "Fetch PickAndPlace")
    numbers: dict[str, Any] = {
        "reached": {n: sum(time_to(c, 60 * minutes)[1] for c in runs) for n, runs in curves.items()},
        "last_success": {n: float(np.mean([c[-1][1] if c else 0.0 for c in runs])) for n, runs in curves.items()},
        "budget_seconds": 60 * minutes,
    }
    best = min(times[name].median for name in peers)
    finish(name="time_to_success", results=times, ratio=best / times[ours].median, **numbers)


if __name__ == "__main__":
    main()
