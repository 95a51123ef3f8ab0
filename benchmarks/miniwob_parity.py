"""MiniWoB++: how often its demonstrators solve each task, and whether the package's own environment pays the same.

    python -m benchmarks.miniwob_parity [--quick] [--only click-test ...] [--episodes 20] [--same 2] [--write]

A demonstrator plays held-out episodes here; the first `--same` of them are played again, action by action, in the
environment that the package itself brings (Selenium): the instruction, the end and the raw reward must be the same.
Where there is no demonstrator, clicks at random are played. `--write` keeps what was found in docs/miniwob.json, from
which docs/miniwob.md is made. `ratio` is the share of those episodes that are the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.package_pages import PackagePage
from embodied_rft.envs.gui.miniwob.site import MiniWoBSite
from embodied_rft.envs.gui.miniwob.tasks import TASKS
from embodied_rft.envs.gui.site import Pages
from embodied_rft.seeding import FIRST_EVALUATION_SEED

QUICK = ("click-test-2", "enter-text", "find-greatest")
KEPT = Path(__file__).resolve().parent.parent / "docs/miniwob.json"


def episode(pages: Pages, number: int, clicks: np.random.Generator | None) -> tuple[list[str], bool, float, bool]:
    """One held-out episode by the demonstrator, or by clicks: lines, whether it ended, raw reward, solved."""
    row, seed = np.arange(1), FIRST_EVALUATION_SEED + number
    pages.generators[0] = np.random.default_rng(seed)
    pages.start(row, [seed], {})
    lines: list[str] = []
    for _ in range(pages.max_episode_steps or 1):
        if pages.broken:
            break
        line = pages.episodes[0].advice
        if clicks is not None:
            line = "click {} {}".format(*(int(clicks.integers(low, high)) for low, high in ((0, 160), (50, 210))))
        lines.append(line)
        outcome = pages.step(row, [line])
        if outcome.terminated[0]:
            assert outcome.success is not None
            return lines, True, float(outcome.reward[0]), bool(outcome.success[0])
    if pages.broken:
        print(f"  void: {pages.broken.pop(0)}", flush=True)
        return [], False, 0.0, False
    return lines, False, 0.0, False


def measure(name: str, *, episodes: int, same: int) -> dict[str, Any]:
    """One task: {"episodes": 20, "solved": 20, "played": 2, "same": 2, "note": ""}."""
    task = TASKS[name]
    pages = Pages(MiniWoBSite([name]), num_envs=1, expert=task.expert)
    clicks = None if task.expert else np.random.default_rng(0)
    count, played = episodes if task.expert else same, []
    try:
        for number in range(count):
            lines, done, raw, solved = episode(pages, number, clicks)
            played.append((pages.episodes[0], lines, done, raw, solved))
    finally:
        pages.close()
    found: dict[str, Any] = {"played": 0, "same": 0}
    if task.expert:
        found |= {"episodes": count, "solved": sum(solved for *_, solved in played)}
    notes = []
    page = PackagePage(name) if same else None
    try:
        for begun, lines, done, raw, _ in played[:same]:
            assert page is not None
            theirs = page.play(begun.seed, lines)
            found["played"] += 1
            differs = [
                f"{what}: here {ours!r}, there {others!r}"
                for what, ours, others in (
                    ("asked", begun.instruction, theirs.asked), ("ended", done, theirs.done), ("paid", raw, theirs.raw)
                )
                if ours != others and not (what == "paid" and abs(raw - theirs.raw) < 1e-6)
            ]  # fmt: skip
            found["same"] += not differs
            notes += differs
    finally:
        if page is not None:
            page.close()
    return found | ({"differs": notes[0][:200]} if notes else {})


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(TASKS), help="some of the tasks")
    parser.add_argument("--episodes", type=int, default=20, help="of each demonstrator")
    parser.add_argument("--same", type=int, default=2, help="of them played in the package, too")
    parser.add_argument("--write", action="store_true", help="keep what is found in docs/miniwob.json")
    options = common.arguments(__doc__, parser)
    names = options.only or (QUICK if options.quick else list(TASKS))
    played = same = 0
    for name in names:
        found = measure(
            name, episodes=2 if options.quick else options.episodes, same=1 if options.quick else options.same
        )
        played, same = played + found["played"], same + found["same"]
        print(f"{name:30} {json.dumps(found)}", flush=True)
        if options.write:
            kept = json.loads(KEPT.read_text(encoding="utf-8"))
            kept[name] = found
            text = ",\n".join(f'  "{key}": {json.dumps(kept[key])}' for key in TASKS if key in kept)
            KEPT.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    results = {"same": common.Result("same", [same / max(played, 1)])}
    common.table(results, unit="share", title="Episodes that the package pays the same")
    common.finish(name="miniwob_parity", results=results, ratio=same / max(played, 1))


if __name__ == "__main__":
    main()
