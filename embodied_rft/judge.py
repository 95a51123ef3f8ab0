"""Evaluates the policy of a run folder again: more episodes, another sheet, another environment, the official one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium

from embodied_rft.config import EnvConfig, load_recipe
from embodied_rft.evaluate import Evaluation, evaluate, evaluation_seeds
from embodied_rft.pool import Pool, find_spec, num_envs_for, open_pool
from embodied_rft.promises import held_out
from embodied_rft.seeding import evaluation_generator
from embodied_rft.session import Session


def evaluate_run(
    folder: str | Path,
    *,
    episodes: int = 200,
    sheet: int = 0,
    env: str | None = None,
    official: bool = False,
    num_envs: int | None = None,
) -> Evaluation:
    """Greedy success of a run's newest policy; also written to `evaluations/` in the folder.

    Args:
        folder: of the run, finished or not.
        episodes: number of held-out initial states.
        sheet: which list of them (0: that of the recipe's final evaluation, 1: that of its learning curve).
        env: another environment id with the same spaces; None: the recipe's.
        official: the environment that the recipe's one reproduces, as its authors ship it, from the same seeds.
        num_envs: environments stepped together.

    Raises:
        ValueError: no checkpoint in the folder, other spaces, or no official environment.
    """
    folder = Path(folder)
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; expected at least 1")
    if not (folder / "recipe.yaml").exists():
        raise ValueError(
            f"{folder} holds no run: there is no recipe.yaml in it. Give the folder that `erft train` wrote."
        )
    recipe = load_recipe(folder / "recipe.yaml")
    session = Session(recipe, folder, quiet=True)
    try:
        if not session.restore(weights_only=True):
            raise ValueError(f"{folder} holds no whole checkpoint; train it first")
        setting = session.env
        if official and env is not None:
            raise ValueError(f"--official and --env {env} exclude each other")
        if official:
            env, setting = official_id(recipe.env.id, dict(setting.options)), replace(setting, options={})
        pool = _open(setting, env, num_envs or min(num_envs_for(setting, "evaluation"), episodes))
        try:
            if pool.fields != session.step_pool("training").fields:
                raise ValueError(f"{env} has other observations than {recipe.env.id}: {pool.observation_space}")
            act = session.actor(greedy=True, rng=evaluation_generator(sheet=sheet))
            name = f"policy in {env}" if env else "policy, evaluated again"
            outcome = evaluate(act, session.fit(pool), evaluation_seeds(episodes, sheet=sheet), name=name)
        finally:
            pool.close()
        facts = {"stage": list(session.path), "sheet": sheet, "environment": env or recipe.env.id}
        facts |= {"decisions": session.counters["decisions"], "wall_seconds": session.counters["seconds"]}
        facts |= held_out(pool)
        outcome.write(folder, f"later-{(env or 'again').replace('/', '-')}-{sheet}-{episodes}", **facts)
        return outcome
    finally:
        session.close()


def _open(setting: EnvConfig, id: str | None, num_envs: int) -> Pool:
    """The recipe's environments, or others in their place, which may have no native form."""
    if id is not None and setting.pool == "native":
        setting = replace(setting, pool="auto")
    return open_pool(setting, purpose="evaluation", num_envs=num_envs, id=id)


def official_id(id: str, options: dict[str, Any]) -> str:
    """The id of the environment that `id` reproduces."""
    single = gymnasium.make(find_spec(id), **{k: v for k, v in options.items() if k not in ("engine", "num_threads")})
    try:
        official = getattr(single.unwrapped, "official_id", None)
    finally:
        single.close()
    if official is None:
        raise ValueError(f"{id} reproduces no official environment")
    return str(official)
