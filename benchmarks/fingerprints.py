"""Fingerprints of short runs: the same before and after a change that must not change what is computed.

    python -m benchmarks.fingerprints --out before.json
    python -m benchmarks.fingerprints --against before.json

Every shipped recipe runs with all amounts cut down; its line has a hash of the final weights and one of all experience.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.recipe import dump_recipe, load_recipe, recipe_names
from embodied_rft.train import train

SMALL = {
    "episodes": 8, "updates": 10, "decisions": 600, "decisions_per_iteration": 200, "evaluate_every": 300,
    "evaluate_episodes": 2, "num_envs": 4, "capacity": 3_000, "batch_size": 16, "timesteps": 300, "min_return": 0,
    "times": 1,
}  # fmt: skip


def shrink(tree: Any, amounts: dict[str, int]) -> Any:
    """The recipe with every amount cut down to the one of its name; what is learned, and how, stays."""
    if isinstance(tree, dict):
        small = {k: min(v, amounts[k]) for k, v in tree.items() if k in amounts and isinstance(v, int | float)}
        if not tree.get("evaluate_every"):  # then nothing is evaluated, and how much is not asked
            small.pop("evaluate_episodes", None)
        return {k: small.get(k, shrink(v, amounts)) for k, v in tree.items()}
    return [shrink(item, amounts) for item in tree] if isinstance(tree, list) else tree


def digest(tree: Any) -> str:
    """Of all numbers in a nested state, with the names under which they stand."""
    total = hashlib.sha256()

    def add(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(value[key], f"{path}.{key}")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                add(item, f"{path}.{index}")
        elif isinstance(value, (torch.Tensor, np.ndarray)):
            array = np.asarray(value)
            total.update(f"{path} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        else:
            total.update(f"{path} {value!r}".encode())

    add(tree, "")
    return total.hexdigest()[:16]


def fingerprint(name: str) -> dict[str, str]:
    """{"weights": hash, "experience": hash} after a short run of a shipped recipe."""
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.yaml"
        small.write_text(yaml.safe_dump(shrink(yaml.safe_load(dump_recipe(load_recipe(name))), SMALL)))
        run = Path(folder) / "run"
        train(load_recipe(small), run, quiet=True, report=False)
        newest = Checkpoints(RunFolder(run).checkpoints).newest()
        assert newest is not None
        state = newest[1]
        rows = state["buffer"] and {k: v for k, v in state["buffer"].items() if "time" not in k}
        if rows:  # as older versions wrote it, so that hashes go on being comparable with theirs
            rows["images"] = {"compress": False, **rows["images"]}
            rows["schema"] = rows["schema"].replace("dtype='str'", "dtype='uint8'")
        return {"weights": digest(state["agent"]), "experience": digest(rows)}


def main() -> None:
    """Run, print, and compare or keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="write them as JSON")
    parser.add_argument("--against", type=Path, help="compare with a file that was written before")
    parser.add_argument("--only", nargs="*", help="recipes; default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(options.against.read_text()) if options.against else {}
    found, differ = {}, []
    for name in options.only or recipe_names():
        found[name] = fingerprint(name)
        word = "" if name not in before else "equal" if before[name] == found[name] else "DIFFERS"
        differ += [name] if word == "DIFFERS" else []
        print(f"{name:24} {found[name]['weights']} {found[name]['experience']} {word}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    if before:
        print(f"{len(found) - len(differ)} of {len(found)} are equal")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
