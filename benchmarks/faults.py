"""Damage, kills, hostile files, misbehaving environments and the limits of the machine, done to real runs.

    python -m benchmarks.faults [--only ROW ...] [--quick]

Every row does the thing: it starts `erft` processes, kills them, flips bits, fills disks, and looks at what is left. A
figure is mostly "held of tried". `--quick` takes the rows that need few processes, `--times 1` tries less in each.
Rows that mount a disk of their own need the right to (`unshare -m`), one needs two cores; else they say "not tried".
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import common, fault_environments  # noqa: F401  (its rows)
from benchmarks.fault_tools import (
    FAMILIES,
    ROWS,
    Lab,
    Outcome,
    can_mount,
    digest,
    lines_of,
    of,
    recipe,
    row,
    said,
    until,
)
from embodied_rft.buffer.trajectories import read_trajectories, write_trajectories
from embodied_rft.data import Trajectory
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.tree_file import CheckpointError

HALF = "checkpoints/.*.writing-*"  # what a checkpoint is called until it is whole
NO_MOUNT: Outcome = ("not tried: may not mount", None)
SHORT = recipe(
    [{"pretrain": {"objective": "bc", "updates": 20, "log_every": 5}}, {"evaluate": {"episodes": 4}}],
    {"options": {"micros": 0}},
)
SHORT["stages"].insert(0, {"warm_up": {"decisions": 160}})


# --- kills -----------------------------------------------------------------------------------------------------------


def _killed(lab: Lab, family: str) -> Outcome:
    """End it without warning at a random line of the log, every other time while a checkpoint is half written."""
    tree, rng, half, same, tried = FAMILIES[family], random.Random(family), 0, 0, 0
    code, output = lab.train(tree)
    assert code == 0, output
    want, length = digest(lab.folder / "run"), len(lines_of(lab.folder / "run"))
    while tried < lab.times:
        folder, line = lab.folder / f"killed{tried}", rng.randrange(length - 1)
        process = lab.start(tree, run=folder.name)
        alive = until(process, lambda: len(lines_of(folder)) > line)  # noqa: B023
        if alive and tried % 2:
            alive = until(process, lambda: list(folder.glob(HALF)))  # noqa: B023
        process.kill()
        process.communicate()
        half += bool(list(folder.glob(HALF)))
        lab.train(tree, run=folder.name)
        tried, same = tried + alive, same + (alive and digest(folder) == want)
    return f"{same} of {tried} bit-equal, {half} with half a checkpoint on disk", same == tried


for _family in FAMILIES:
    ROWS[f"kill_{_family}"] = (f"kill -9 ({_family}), then the same command", False,
                               lambda lab, family=_family: _killed(lab, family))  # type: ignore[misc]  # fmt: skip


@row("SIGTERM, SIGINT: a checkpoint first, then bit-equal")
def asked_to_stop(lab: Lab) -> Outcome:
    tree, held = FAMILIES["replay"], 0
    lab.train(tree)
    for asked in (signal.SIGTERM, signal.SIGINT):
        folder = lab.folder / asked.name
        stopped = lab.stop(tree, 3, asked, run=asked.name)
        lab.train(tree, run=asked.name)
        held += stopped and digest(folder) == digest(lab.folder / "run")
    return of(held, 2)


@row("crash at each file operation of a checkpoint: old or new state", quick=True)
def crash_while_writing(lab: Lab) -> Outcome:
    held = tried = 0
    while True:
        root = lab.folder / str(tried)
        Checkpoints(root).write(1, {"w": np.full(1_000, 1.0)})
        if (child := os.fork()) == 0:
            _die_at(tried, str(root))
            Checkpoints(root).write(2, {"w": np.full(1_000, 2.0)})
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        Checkpoints(root).clean()
        found = Checkpoints(root).newest()
        held += found is not None and bool((found[1]["w"] == found[0]).all())
        tried += 1
        if code == 0:
            return of(held, tried)


def _die_at(count: int, root: str) -> None:
    """End this process, without a word, at file operation `count` below `root`."""
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(("open", "os.")) and any(root in str(a) for a in arguments):
            seen[0] += 1
            if seen[0] > count:
                os._exit(9)

    sys.addaudithook(hook)


# --- damage ----------------------------------------------------------------------------------------------------------


@row("checkpoint files cut or with a flipped bit: noticed, the one before is used", quick=True)
def damaged_checkpoints(lab: Lab) -> Outcome:
    root, rng, held, tried = lab.folder / "c", random.Random(0), 0, 60 * lab.times
    for step in (1, 2):
        Checkpoints(root).write(
            step, {"w": np.arange(500.0) * step, "recipe": "name: x", "n": step, "l": [1, {"a": None}]}
        )
    files = sorted(root.glob("*2/*"))
    for k in range(tried):
        path = files[k % len(files)]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
        path.write_bytes(flipped if k % 3 else whole[:place])
        try:
            held += (Checkpoints(root).newest() or (0,))[0] == 1
        except CheckpointError:
            pass  # the one before must be found
        path.write_bytes(whole)
    return of(held, tried)


@row("a bit of a demonstration file flipped, a byte cut off: refused", quick=True)
def damaged_demonstrations(lab: Lab) -> Outcome:
    rng, path, held, tried = random.Random(0), lab.folder / "d.safetensors", 0, 60 * lab.times
    observation = {"observation": np.ones((9, 4), np.float32)}
    write_trajectories(
        path, [Trajectory(observation, np.zeros((8, 2), np.float32), np.ones(8, np.float32), "truncated")]
    )
    whole = path.read_bytes()
    for k in range(tried):
        place = rng.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
        path.write_bytes(flipped if k % 6 else whole[:-1])
        try:
            read_trajectories(path)
        except ValueError:
            held += 1
    return of(held, tried)


@row("a log cut in the middle of a line; files for people overwritten: the run goes on, bit-equal")
def damaged_log(lab: Lab) -> Outcome:
    tree, held = FAMILIES["replay"], 0
    lab.train(tree)
    for name in ("metrics.jsonl", "run.json", "metrics.csv"):
        folder = lab.folder / name
        lab.stop(tree, 3, run=name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-7] if name == "metrics.jsonl" else b"\xff{")
        code, _ = lab.train(tree, run=name)
        weights = digest(folder) == digest(lab.folder / "run") or name == "metrics.jsonl"
        held += code == 0 and weights and all("stage" in line for line in lines_of(folder))
    return of(held, 3)


@row("checkpoints deleted, a symbolic link in the run folder, recipe.yaml edited before eval: refused")
def changed_folder(lab: Lab) -> Outcome:
    lab.train(SHORT)
    run, precious = lab.folder / "run", lab.folder / "precious"
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("micros: 0", "micros: 1"))
    held = [said(lab.erft("eval", str(run), "--episodes", "4", "--trust"), "not the recipe that was trained")]
    (run / "recipe.yaml").write_text(text)
    kept = (run / "metrics.jsonl").rename(lab.folder / "kept")
    precious.write_text("a thesis")
    (run / "metrics.jsonl").symlink_to(precious)
    longer = SHORT | {"stages": [*SHORT["stages"], {"evaluate": {"episodes": 4}}]}
    held.append(said(lab.train(longer), "is a symbolic link") and precious.read_text() == "a thesis")
    (run / "metrics.jsonl").unlink()
    kept.rename(run / "metrics.jsonl")
    shutil.rmtree(run / "checkpoints")
    held.append(said(lab.train(SHORT), "put them back") and lab.read("metrics.jsonl") != "")
    return of(sum(held), len(held))


@row("erft eval again and again while the run is trained: it ends, bit-equal")
def eval_while_training(lab: Lab) -> Outcome:
    tree, held = FAMILIES["replay"], 0
    lab.train(tree, run="alone")
    process = lab.start(tree)
    until(process, lambda: list(lab.folder.glob("run/checkpoints/0*")))
    measured = 0
    while process.poll() is None:
        measured += lab.erft("eval", str(lab.folder / "run"), "--episodes", "2", "--trust")[0] == 0
    process.communicate()
    held = process.returncode == 0 and digest(lab.folder / "run") == digest(lab.folder / "alone")
    return f"{measured} evaluations, {'bit-equal' if held else 'NOT EQUAL'}", held and measured > 0


# --- the machine -----------------------------------------------------------------------------------------------------


@row("disk full, out of inodes: a sentence; with room the same command ends bit-equal")
def full_disk(lab: Lab) -> Outcome:
    if not can_mount():
        return NO_MOUNT
    tree, held, limits = FAMILIES["replay"], [], ("size=400k", "nr_inodes=24")
    lab.train(tree, run="alone")
    want = digest(lab.folder / "alone")
    for limit in limits:
        run = lab.folder / limit
        run.mkdir()
        script = (
            f'mount -t tmpfs -o {limit} none "{run}" || exit 99; "$@"; echo "first: $?"; '
            f'mount -o remount,size=100m,nr_inodes=1000 "{run}"; "$@"; echo "second: $?"; cp -r "{run}" "{run}.out"'
        )
        _, output = lab.train(tree, run=limit, before=script)
        stopped = any(f"first: {code}" in output for code in (1, 2)) and "Traceback" not in output
        held.append(stopped and "second: 0" in output and digest(Path(f"{run}.out")) == want)
    return of(sum(held), len(limits))


@row("/dev/shm too small for the workers: a sentence")
def small_shared_memory(lab: Lab) -> Outcome:
    if not can_mount():
        return NO_MOUNT
    env = {"num_envs": 512, "pool": "workers", "num_workers": 2}
    outcome = lab.train(recipe(env=env), before='mount -t tmpfs -o size=16k none /dev/shm; exec "$@"')
    return ("refused", True) if said(outcome, "of shared memory", "/dev/shm has") else (outcome[1][-80:], False)


@row("a buffer beyond `ulimit -v`: refused before the first step, in words")
def out_of_memory(lab: Lab) -> Outcome:
    tree = recipe(buffer={"capacity": 60_000_000})
    outcome = lab.train(tree, before='ulimit -v 6000000; exec "$@"')
    held = said(outcome, "buffer.capacity") and not lines_of(lab.folder / "run")
    return ("refused", held) if held else (outcome[1][-80:], held)


@row("begun on all cores, killed, continued on one")
def fewer_cores(lab: Lab) -> Outcome:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return "not tried: one core", None
    tree = recipe(env={"pool": "workers"})
    lab.train(tree, run="alone")
    lab.stop(tree, 3)
    code, output = lab.train(tree, preexec_fn=lambda: os.sched_setaffinity(0, cores[:1]))
    held = code == 0 and digest(lab.folder / "run") == digest(lab.folder / "alone")
    return "bit-equal" if held else output[-80:], held


@row("training killed while its workers are stopped (SIGSTOP): nothing is left")
def orphans(lab: Lab) -> Outcome:
    process = lab.start(FAMILIES["workers"])
    until(process, lambda: len(lines_of(lab.folder / "run")) > 1)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if child.ppid() != process.pid]  # the others start and sweep them
    for worker in workers:
        worker.suspend()
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(family, timeout=60)
    for child in left:
        child.kill()
    return f"{len(left)} of {len(family)} left, {len(workers)} stopped", not left and len(workers) == 2


# --- what others wrote -----------------------------------------------------------------------------------------------

LAUGHS = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]",
                    *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])  # fmt: skip
HOSTILE = {  # recipe text or changes of a recipe -> what the refusal says
    "name: !!python/object/apply:os.system ['touch executed']": "",
    LAUGHS: "written out",
    "[" * 5_000: "nested too deeply",
    "env: word": "env",
    "name: ../../x": "name must name a folder inside",
    "env: {id: Pendulum-v1, num_envs: 100000000}": "65536",
    "agent: {id: gaussian, hidden: 5}": "hidden",
    "plugins: [no_such_thing]": "no_such_thing",
}


@row("hostile recipes: refused in words, nothing executed", quick=True)
def hostile_recipes(lab: Lab) -> Outcome:
    held, slowest = 0, 0.0
    for number, (text, words) in enumerate(HOSTILE.items()):
        base = {} if text == LAUGHS or text[0] == "[" else {k: v for k, v in SHORT.items() if not text.startswith(k)}
        path = lab.folder / f"{number}.yaml"
        path.write_text(text + "\n" + (yaml.safe_dump(base) if base else ""))
        start = time.monotonic()
        held += said(lab.erft("train", str(path), "--run", str(lab.folder / "run")), words)
        slowest = max(slowest, time.monotonic() - start)
    held -= (lab.folder / "executed").exists()
    return f"{held} of {len(HOSTILE)}, the slowest {slowest:.0f} s", held == len(HOSTILE)


@row("a foreign run folder with code of its own: eval runs it only with --trust")
def foreign_run(lab: Lab) -> Outcome:
    lab.train(SHORT)
    without = lab.erft("eval", str(lab.folder / "run"), "--episodes", "2")
    code, _ = lab.erft("eval", str(lab.folder / "run"), "--episodes", "2", "--trust")
    held = said(without, "--trust", "benchmarks.fault_tools:Walk-v0") and code == 0
    return ("refused, and run when trusted" if held else without[1][-80:]), held


@row("names that are markup, terminal codes or script; an ASCII locale: the run ends, the report has no tag of theirs")
def odd_names(lab: Lab) -> Outcome:
    name = "[/red]<script>alert(1)</script> \x07 ü"
    stages = [*SHORT["stages"], {"evaluate": {"episodes": 4, "name": name}}]
    code, output = lab.train(recipe(stages, description=name), env={"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"})
    page = lab.read("report.html")
    held = code == 0 and page != "" and "<script>alert" not in page and "\x07" not in output + page
    return ("no tag, no control character" if held else output[-80:]), held


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Do the rows that are asked for, print the table and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--times", type=int, default=4, help="how often where a row tries often (4)")
    options = common.arguments(__doc__, parser)
    wanted = options.only or [name for name, (_, quick, _) in ROWS.items() if quick or not options.quick]
    grid = Table("row", "what is done", "measured", "holds", "s", title="Faults")
    figures: dict[str, str] = {}
    verdicts: list[bool] = []
    for name in wanted:
        title, _, function = ROWS[name]
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="erft-faults-") as folder:
            lab = (
                replace(Lab(Path(folder), options.times), times=1)
                if options.quick
                else Lab(Path(folder), options.times)
            )
            figure, holds = function(lab)
        figures[name] = figure
        verdicts += [] if holds is None else [holds]
        print(f"{name}: {figure} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
        grid.add_row(
            name, title, figure, "-" if holds is None else "yes" if holds else "NO", f"{time.monotonic() - start:.0f}"
        )
    Console(width=160).print(grid)
    share = sum(verdicts) / max(1, len(verdicts))
    common.finish(name="faults", results={}, ratio=share, tried=len(verdicts), figures=figures)


if __name__ == "__main__":
    main()
