"""Evaluates the policy of a run folder again: more episodes, another sheet, another environment, the official one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from embodied_rft.evaluation.evaluate import Evaluation, evaluate, evaluation_seeds
from embodied_rft.evaluation.panels import panel_of
from embodied_rft.names import UserError
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.pool import num_envs_for, open_pool
from embodied_rft.pools.promises import held_out
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.resume import Which
from embodied_rft.runs.trained import opened
from embodied_rft.seeding import evaluation_generator


def evaluate_run(
    folder: str | Path,
    *,
    episodes: int = 200,
    sheet: int = 0,
    env: str | None = None,
    official: bool = False,
    num_envs: int | None = None,
    checkpoint: Which = "newest",
    device: str = "auto",
    trust: bool = False,
) -> Evaluation:
    """Greedy success of a run's policy; also written to `evaluations/` in the folder.

    Args:
        folder: of the run, finished or not.
        episodes: number of held-out initial states.
        sheet: which list of them (0: that of the recipe's final evaluation, 1: that of its learning curve).
        env: another environment id with the same spaces; None: the recipe's.
        official: the environment that the recipe's one reproduces, as its authors ship it, from the same seeds.
        num_envs: environments stepped together; None: as many as the recipe says.
        checkpoint: "newest", or "best" on the learning curve.
        device: where the policy computes.
        trust: code that the run brings along may run: plug-ins in its folder, classes, pickles.

    Raises:
        ValueError: no checkpoint in the folder, an edited recipe.yaml, other spaces, or no official environment.
    """
    if episodes < 1:
        raise UserError(f"episodes is {episodes}; expected at least 1")
    with opened(folder, checkpoint, device=device, trust=trust) as session:
        own = session.env
        count = num_envs or min(num_envs_for(own, "evaluation"), episodes)
        changed = _asked(own, env, reproduced=session.step_pool("training").ask("official_id") if official else "")
        pool = open_pool(changed, purpose="evaluation", num_envs=count)
        try:
            if pool.fields != session.step_pool("training").fields:
                raise UserError(f"{changed.id} has other observations than {own.id}: {pool.observation_space}")
            act = session.actor(greedy=True, rng=evaluation_generator(sheet=sheet))
            name = "policy, evaluated again" if changed.id == own.id else f"policy in {changed.id}"
            name = name if checkpoint == "newest" else f"{checkpoint} {name}"
            policy, seeds = session.agent.policy, evaluation_seeds(episodes, sheet=sheet)
            outcome = evaluate(act, policy.fit_pool(pool), seeds, name=name, past=policy.reads_past)
        finally:
            pool.close()
        slug = ("again" if changed.id == own.id else changed.id).replace("/", "-")
        slug += "" if checkpoint == "newest" else f"-{checkpoint}"
        RunFolder(folder).add_evaluation(
            f"later-{slug}-{sheet}-{episodes}",
            outcome,
            stage=session.path,
            sheet=sheet,
            decisions=session.counters["decisions"],
            wall_seconds=session.counters["seconds"],
            panel=panel_of(changed),
            environment=changed.id,
            **held_out(pool),
        )
    return outcome


def _asked(own: EnvConfig, env: str | None, *, reproduced: str | None) -> EnvConfig:
    """The environments to evaluate in: the run's own ones, others, or those that it reproduces ("": not asked for)."""
    if reproduced != "":
        if env is not None:
            raise UserError(f"--official and --env {env} exclude each other")
        if reproduced is None:
            raise UserError(f"{own.id} reproduces no official environment")
        changed = replace(own, id=reproduced, options={})
    else:
        changed = own if env is None else replace(own, id=env)
    if changed.id != own.id and own.pool == "native":
        changed = replace(changed, pool="auto")  # another one may have no native form
    return changed
