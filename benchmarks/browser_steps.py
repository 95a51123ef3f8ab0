"""Steps a second of MiniWoB++ in a real browser, with screenshots, against the package's own environment (Selenium).

    python -m benchmarks.browser_steps [--quick] [--envs 4]

Both click the same places of click-shades at random, which end no episode, in as many environments: ours side by side
in tabs of one browser, the package's one after another, each in a browser of its own, as it comes (its screenshot and
its list of elements with each step). `ratio` is ours over the package's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from benchmarks import common
from benchmarks.package_pages import PackagePage, missing
from embodied_rft.envs.gui.miniwob.site import MiniWoBSite
from embodied_rft.envs.gui.site import Pages

TASK, OURS, PACKAGE = "click-shades", "ours", "package (Selenium)"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--envs", type=int, default=4, help="environments of each")
    options = common.arguments(__doc__, parser)
    count, seconds = options.envs, 2.0 if options.quick else 6.0
    clicks = np.random.default_rng(0)
    pages = Pages(MiniWoBSite([TASK]), num_envs=count)
    rows = np.arange(count)
    pages.start(rows, [int(row) for row in rows], {})

    def line() -> str:
        return f"click {clicks.integers(5, 150)} {clicks.integers(60, 130)}"

    def ours() -> float:
        pages.step(rows, [line() for _ in rows])
        pages.observe(rows)
        return count

    runs: dict[str, Callable[[], float]] = {OURS: lambda: common.rate(ours, seconds=seconds)}
    theirs = [] if missing() else [PackagePage(TASK, pictures=True) for _ in rows]
    for row, page in enumerate(theirs):
        page.driver.execute_script("core.EPISODE_MAX_TIME = 2 ** 31 - 1")  # its clock would end the episode
        page.env.instance.refresh_freq = 0
        page.begin(row)

    def package() -> float:
        for page in theirs:
            x, y = line().split()[1:]
            place = np.array([x, y], dtype=np.float32)
            page.env.step(page.env.create_action("CLICK_COORDS", coords=place))
        return count

    if theirs:
        runs[PACKAGE] = lambda: common.rate(package, seconds=seconds)
    try:
        results = common.measure(runs, rounds=3 if options.quick else 9)
    finally:
        pages.close()
        for page in theirs:
            page.close()
    common.table(results, unit="steps/s", title=f"{TASK}, {count} environments", baseline=PACKAGE if theirs else None)
    found = common.ratio(results, OURS, PACKAGE) if theirs else 0.0
    common.finish(name="browser_steps", results=results, ratio=found)


if __name__ == "__main__":
    main()
