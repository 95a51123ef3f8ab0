"""Steps per second of pages in a real browser with 1, 4 and 16 tabs, screenshots included, and memory of a tab.

    python -m benchmarks.browser_scale [--quick] [--episodes 10000] [--kill-every 50]

The page is the desk, clicked at random; resets are included. With --episodes it is a soak instead: so many episodes in
8 tabs; memory, processes and open files before and after; and, in turns, windows in which a tab is killed at random
every so many steps and windows in which none is: `ratio` is the throughput of the former over that of the latter.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import psutil

import embodied_rft.envs  # noqa: F401  (registers)
from benchmarks import common
from embodied_rft.envs.gui.site import Pages
from embodied_rft.pools.pool import VectorPool, make_pool
from embodied_rft.pools.protocol import Pool

ID = "embodied_rft/Desk-v0"
TABS = (1, 4, 16)
SOAKED = 8  # tabs of a soak
TURNS = 10  # of an episode, at most
WINDOW = 500  # steps, with or without kills


class Clicks:
    """Episodes of random clicks in a pool, one after the other."""

    def __init__(self, tabs: int) -> None:
        self.pool: Pool = make_pool(ID, tabs, options={"turns": TURNS}, max_incidents=1.0)
        self.rng, self.seed, self.episodes, self.void = np.random.default_rng(0), tabs, 0, 0
        self.pool.reset(np.arange(tabs))

    @property
    def pages(self) -> Pages:
        """The environments themselves."""
        assert isinstance(self.pool, VectorPool)
        batch = self.pool.host.unwrapped.batch  # type: ignore[attr-defined]
        assert isinstance(batch, Pages)
        return batch

    def step(self) -> int:
        """One click in every tab, and new episodes where one has ended; gives how many clicks counted."""
        told = self.pool.step([f"click {x} {y}" for x, y in self.rng.integers(192, size=(self.pool.num_envs, 2))])
        over = told.terminated | told.truncated
        if over.any():
            self.pool.reset(self.seed + np.arange(self.pool.num_envs), over)
            self.seed += self.pool.num_envs
        self.episodes += int((over & told.valid).sum())
        self.void += int((~told.valid).sum())
        return int(told.valid.sum())

    def kill(self) -> None:
        """Kill a tab, as the kernel does when memory is short."""
        tab = self.pages.browsers.tab(int(self.rng.integers(self.pool.num_envs)))
        if tab is not None:
            tab.send("Page.crash")

    def held(self) -> dict[str, float]:
        """Megabytes (shared ones counted once), processes and open files of us and all browsers."""
        us = psutil.Process()
        family = [us, *us.children(recursive=True)]
        memory = sum(one.memory_full_info().pss for one in family if one.status() != psutil.STATUS_ZOMBIE)
        return {"megabytes": memory / 2**20, "processes": len(family), "files": us.num_fds()}


def scale(quick: bool) -> None:
    """Rates by the number of tabs."""
    clicks = {tabs: Clicks(tabs) for tabs in TABS}
    seconds = 2.0 if quick else 10.0
    runs = {f"{n} tabs": lambda n=n: common.rate(clicks[n].step, seconds=seconds) for n in TABS}  # type: ignore[misc]
    results = common.measure(runs, rounds=1 if quick else 5, warm_up=not quick)
    common.table(results, unit="steps/s", title="A desk in a browser, clicked at random")
    used = {}
    for tabs in TABS:
        browsers = clicks[tabs].pages.browsers.browsers
        keepers = [psutil.Process(browser.process.keeper.pid) for browser in browsers]
        family = [one for keeper in keepers for one in keeper.children(recursive=True)]
        used[f"{tabs} tabs"] = sum(one.memory_full_info().pss for one in family) / 2**20
        print(f"{tabs} tabs: {used[f'{tabs} tabs']:.0f} MB in {len(family)} processes")
        clicks[tabs].pool.close()
    each = (used["16 tabs"] - used["1 tabs"]) / 15
    print(f"{each:.1f} MB for another tab")
    common.finish(
        name="browser_scale", results=results, ratio=common.ratio(results, "16 tabs", "1 tabs"), megabytes_per_tab=each
    )


def soak(episodes: int, kill_every: int) -> None:
    """Many episodes: what is held before and after, and what kills cost."""
    clicks, rates = Clicks(SOAKED), {"kills": [], "calm": []}  # type: ignore[var-annotated]
    for _ in range(WINDOW // SOAKED):
        clicks.step()
    before, steps, kills = clicks.held(), 0, 0
    for number in range(10**9):
        kind, done, start = ("kills", "calm")[number % 2], 0, time.perf_counter()
        next_kill = kill_every
        while done < WINDOW:
            done += clicks.step()
            if kind == "kills" and done >= next_kill:
                clicks.kill()
                next_kill, kills = next_kill + kill_every, kills + 1
        rates[kind].append(done / (time.perf_counter() - start))
        steps += done
        if clicks.episodes >= episodes and number % 2:
            break
    after = clicks.held()
    print(f"{clicks.episodes} episodes, {steps} steps, {kills} tabs killed, {clicks.void} void episodes")
    for name in before:
        print(f"{name}: {before[name]:.0f} before, {after[name]:.0f} after")
    clicks.pool.close()
    left = len(psutil.Process().children(recursive=True))
    print(f"processes left when closed: {left}; open files {len(os.listdir('/proc/self/fd'))}")
    results = {name: common.Result(name, rounds) for name, rounds in rates.items()}
    common.table(results, unit="steps/s", title="With and without tabs that are killed", baseline="calm")
    common.finish(
        name="browser_soak", results=results, ratio=common.ratio(results, "kills", "calm"), episodes=clicks.episodes,
        kills=kills, void=clicks.void, before=before, after=after, left=left,
    )  # fmt: skip


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--episodes", type=int, default=0, help="of a soak")
    parser.add_argument("--kill-every", type=int, default=50, help="steps of a soak between two tabs that are killed")
    options = common.arguments(__doc__, parser)
    if options.episodes:
        soak(options.episodes, options.kill_every)
    else:
        scale(options.quick)


if __name__ == "__main__":
    main()
