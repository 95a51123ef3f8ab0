"""Which environment a run steps, how many copies of it, and how they run: `env` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field as Limit
from pydantic import PositiveFloat, PositiveInt

from embodied_rft.options import ConfigError
from embodied_rft.pools.making import check_wrappers

MOST_ENVS = 65_536  # more would take the machine before anything is said


@dataclass
class EnvConfig:
    """Which environment, how many copies, and how they run."""

    id: str  # Gymnasium id, or "module:Id" of a module that registers it
    num_envs: Annotated[int, Limit(gt=0, le=MOST_ENVS)] = 64  # environments stepped together
    evaluation_envs: Annotated[int, Limit(gt=0, le=MOST_ENVS)] | None = None  # the same for evaluations; None: num_envs
    pool: Literal["auto", "native", "sync", "workers"] = "auto"  # see `pool.make_pool`
    num_workers: PositiveInt | None = None  # worker processes; None: one for each core
    splits: PositiveInt = 1  # environments in so many parts, by turns: the policy answers in one, the others step
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the environment
    # innermost first: {id: TimeLimit, max_episode_steps: 200}
    wrappers: list[dict[str, Any]] = field(default_factory=list)
    time_limit: Literal["truncated", "terminal"] = "truncated"  # terminal: an episode cut off does not bootstrap
    deadline: PositiveFloat = 60.0  # seconds that a step or reset of one environment may take
    max_incidents: Annotated[float, Limit(ge=0, le=1)] = 0.9  # share of the latest episodes that may break; 1: all

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.pool != "workers":
            raise ConfigError(f"env.num_workers has no effect with env.pool {self.pool!r}: set env.pool to workers")
        if self.wrappers and self.pool == "native":
            raise ConfigError("env.wrappers wrap single environments: they cannot be used with env.pool 'native'")
        self._check_splits()
        try:
            check_wrappers(self.wrappers)
        except ValueError as error:
            raise ConfigError(f"env.{error}") from None

    def _check_splits(self) -> None:
        """Refuse parts that would wait for one another all the same."""
        if self.splits == 1:
            return
        if self.pool != "workers":
            raise ConfigError(
                f"env.splits has no effect with env.pool {self.pool!r}, which steps in the process of the policy: set "
                "env.pool to workers"
            )
        for name, count in (("num_envs", self.num_envs), ("num_workers", self.num_workers)):
            if count is not None and count < self.splits:
                raise ConfigError(
                    f"env.splits {self.splits} with env.{name} {count}: each part needs one of its own; expected "
                    f"env.splits <= {count}"
                )
