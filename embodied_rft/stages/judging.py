"""The stage that measures and changes nothing: evaluate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from embodied_rft.registry import register
from embodied_rft.stages.base import Stage
from embodied_rft.stages.experience import STRICT

if TYPE_CHECKING:
    from embodied_rft.session import Session


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
            from embodied_rft.film import film

            wanted = [
                s for s, won in zip(outcome.seeds, outcome.results, strict=True) if won == (config.video == "success")
            ]
            name = f"{'-'.join(map(str, self.path))}-{config.video}"
            session.logger.message(film(session, wanted, success=config.video == "success", name=name))
        shown = outcome.headline()
        return shown | {"return": shown.pop("mean_return"), "episodes": outcome.episodes}
