"""Steps per second of our games, of their symbols and of their pictures, beside the games that Gymnasium has, too.

    python -m benchmarks.game_steps [--quick] [--only Sokoban ...]

Random actions, next-step autoreset; only real transitions are counted, not the calls that reset. Seconds are of the
processor: everything runs on one thread, and what else runs on the machine does not count. FrozenLake and BlackJack are
also stepped as Gymnasium's own single environment, which draws nothing; its FrozenLake has one map, ours makes one for
every episode. How often players and random actions succeed is told with the numbers (seeds from 0 on).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

import embodied_rft.envs  # noqa: F401  (registers)
from benchmarks import common
from embodied_rft import registry

GAMES = (
    "NumberLine", "EZPoints", "Points24", "BlackJack", "GeneralPoints", "TwentyFortyEight", "ShisenSho", "Swap",
    "Sokoban", "FrozenLake",
)  # fmt: skip
OFFICIAL = {"FrozenLake": ("FrozenLake-v1", {"is_slippery": False}), "BlackJack": ("Blackjack-v1", {})}
NUM_ENVS, CALLS = 64, 40


def vector_rate(env: gymnasium.vector.VectorEnv, seconds: float) -> float:
    """Transitions a second of a native batch, with those that reset left out."""
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(CALLS)]
    env.reset(seed=0)

    def work() -> float:
        told = [env.step(action)[4] for action in actions]
        return sum(info["_is_success"].sum() for info in told if info)  # empty: all began anew

    return common.rate(work, seconds=seconds, clock=time.process_time)


def single_rate(env: gymnasium.Env, seconds: float) -> float:
    """Transitions a second of one environment."""
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(NUM_ENVS * CALLS)]
    env.reset(seed=0)

    def work() -> float:
        for action in actions:
            if any(env.step(action)[2:4]):
                env.reset()
        return len(actions)

    return common.rate(work, seconds=seconds, clock=time.process_time)


def success(game: str, act: Callable[[Any], Any], episodes: int) -> float:
    """Share of first episodes that end with success."""
    env: Any = gymnasium.make_vec(f"embodied_rft/{game}-v0", num_envs=episodes, observation="state")
    observation, _ = env.reset(seed=0)
    running, won = np.ones(episodes, bool), np.zeros(episodes, bool)
    while running.any():
        observation, _, terminated, truncated, info = env.step(act(observation))
        won |= running & (info.get("is_success", won) > 0)
        running &= ~(terminated | truncated)
    return float(won.mean())


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(GAMES), choices=GAMES, help="some of the games")
    options = common.arguments(__doc__, parser)
    seconds, episodes = (0.1, 100) if options.quick else (1.0, 200)
    runs: dict[str, Callable[[], float]] = {}
    for game in options.only:
        for observation in ("state", "image"):
            env = gymnasium.make_vec(f"embodied_rft/{game}-v0", num_envs=NUM_ENVS, observation=observation)
            runs[f"{game}, {observation}"] = lambda env=env: vector_rate(env, seconds)  # type: ignore[misc]
        if game in OFFICIAL:
            id, settings = OFFICIAL[game]
            official = gymnasium.make(id, disable_env_checker=True, **settings)
            runs[f"{game}, Gymnasium"] = lambda env=official: single_rate(env, seconds)  # type: ignore[misc]
    results = common.measure(runs, rounds=2 if options.quick else 5, warm_up=not options.quick)
    common.table(results, unit="steps/s of a core", title=f"Games, batches of {NUM_ENVS}")
    wins: dict[str, dict[str, float]] = {}
    for game in options.only:
        rng, player = np.random.default_rng(0), registry.find("demonstrator", f"embodied_rft/{game}-v0")()
        chance = registry.find("demonstrator", f"embodied_rft/{game}-v0")(noise=1.0)
        short = 10 if game == "TwentyFortyEight" else episodes  # thousands of decisions each
        wins[game] = {
            "player": success(game, lambda seen: player.act(seen, rng), short),  # noqa: B023
            "random": success(game, lambda seen: chance.act(seen, rng), episodes),  # noqa: B023
        }
        print(f"{game}: player {wins[game]['player']:.3f}, random {wins[game]['random']:.3f}")
    shared = [game for game in options.only if game in OFFICIAL]
    ratios = [common.ratio(results, f"{game}, state", f"{game}, Gymnasium") for game in shared]
    common.finish(name="game_steps", results=results, ratio=min(ratios, default=0.0), success=wins)


if __name__ == "__main__":
    main()
