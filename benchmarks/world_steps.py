"""Steps per second of environments of other packages, of one that resets where an episode ends.

    python -m benchmarks.world_steps [--quick] [--only BabyAI ...]

Random actions ("look" in text games), one environment, seconds of the processor, resets included. Packages that are not
installed are left out. A text game is compiled before the clock starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import time
from collections.abc import Callable
from typing import Any

import gymnasium

import embodied_rft.envs  # noqa: F401  (registers)
from benchmarks import common

WORLDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BabyAI, state": ("minigrid", "BabyAI", {"observation": "state"}),
    "BabyAI, image": ("minigrid", "BabyAI", {"observation": "image"}),
    "BabyAI, state and bot": ("minigrid", "BabyAI", {"observation": "state", "expert": True}),
    "Arcade": ("ale_py", "Arcade", {}),
    "Crafter, area 32": ("crafter", "Crafter", {"area": 32}),
    "TextGame": ("textworld", "TextGame", {"games": 1}),
}


def single_rate(env: gymnasium.Env, count: int, seconds: float) -> float:
    """Decisions a second; episodes begin from seeds 0, 1, ..."""
    seeds = itertools.count()
    env.reset(seed=next(seeds))
    env.action_space.seed(0)
    text = isinstance(env.action_space, gymnasium.spaces.Text)

    def work() -> float:
        for _ in range(count):
            if any(env.step("look" if text else env.action_space.sample())[2:4]):
                env.reset(seed=next(seeds))
        return count

    return common.rate(work, seconds=seconds, clock=time.process_time)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(WORLDS), choices=WORLDS, help="some of them")
    options = common.arguments(__doc__, parser)
    seconds, count = (0.5, 50) if options.quick else (3.0, 200)
    runs: dict[str, Callable[[], float]] = {}
    for name in options.only:
        package, id, settings = WORLDS[name]
        if importlib.util.find_spec(package) is not None:
            env = gymnasium.make(f"embodied_rft/{id}-v0", **settings)
            runs[name] = lambda env=env: single_rate(env, count, seconds)  # type: ignore[misc]
    results = common.measure(runs, rounds=1 if options.quick else 3, warm_up=False)
    common.table(results, unit="steps/s of a core", title="Worlds, one environment")
    common.finish(name="world_steps", results=results, ratio=1.0)


if __name__ == "__main__":
    main()
