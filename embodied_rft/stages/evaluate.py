"""The stage that measures and changes nothing: evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from embodied_rft.evaluation.film import roll_out
from embodied_rft.evaluation.video import write_video
from embodied_rft.files import write_json
from embodied_rft.options import STRICT
from embodied_rft.registry import register
from embodied_rft.runs.session import Session
from embodied_rft.seeding import evaluation_generator
from embodied_rft.stages.base import Stage


@register("stage", "evaluate")
class Evaluate(Stage):
    """Greedy success of the current policy on held-out initial states, with a Wilson interval and a video."""

    measures: ClassVar[bool] = True

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """On how many states of which sheet."""

        episodes: PositiveInt = 200  # how many
        name: str = ""  # what the report calls it
        sheet: NonNegativeInt = 0  # learning curves use sheet 1: stopping by them does not select on these states
        video: Literal["failure", "success"] | None = None  # film one such episode

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"evaluate {self.config.name}".strip()

    def run(self, session: Session) -> dict[str, Any]:
        """Evaluate, film, log."""
        config = self.config
        outcome = session.evaluate(config.episodes, sheet=config.sheet, name=config.name or "policy")
        if outcome.episodes + len(outcome.left_out) < config.episodes:
            session.logger.message(
                f"the environment has {outcome.states} held-out initial states: each was judged once, not "
                f"{config.episodes} episodes"
            )
        if not outcome.told:
            session.logger.message(str(outcome))
        if config.video:
            wanted = [
                s for s, won in zip(outcome.seeds, outcome.results, strict=True) if won == (config.video == "success")
            ]
            name = f"{'-'.join(map(str, self.path))}-{config.video}"
            session.logger.message(film(session, wanted, success=config.video == "success", name=name))
        shown = outcome.headline()
        return shown | {"return": shown.pop("mean_return"), "episodes": outcome.episodes}


def film(session: Session, seeds: Sequence[int], *, success: bool, name: str, tries: int = 4) -> str:
    """Film one episode that ends in success (or failure) from one of `seeds`; returns what to tell the user."""
    wanted = "success" if success else "failure"
    if not seeds:
        return f"no {wanted} to film"
    env = session.env
    act = session.actor(greedy=True, rng=evaluation_generator())
    try:
        for seed in seeds[:tries]:
            rolled = roll_out(act, env, seed, session.agent.policy)
            won = rolled.success
            if won == success:
                path = write_video(session.folder.videos / f"{name}.mp4", rolled.frames, fps=25)
                session.folder.add_film(path, seed=seed, success=won, stage=session.path)
                return f"filmed a {wanted}: {path.name}"
        return f"nothing filmed: none of {min(tries, len(seeds))} episodes ended in {wanted} in the single environment"
    except Exception as error:  # a picture is never worth a run
        write_json(session.folder.no_videos, {"reason": str(error)})
        return f"no video: {error}"
