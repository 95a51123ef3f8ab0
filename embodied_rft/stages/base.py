"""What all leaf stages share, and the order in which the stages of a recipe run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from embodied_rft import registry
from embodied_rft.config import StageSpec, validate_plugin_config

if TYPE_CHECKING:
    from embodied_rft.session import Session


class Stage:
    """A leaf of a recipe. `config` is an instance of the class's own `Config`."""

    Config: ClassVar[Any]
    word: str = ""  # set when the recipe is read
    measures: ClassVar[bool] = False  # changes neither agent nor buffer
    extendable: ClassVar[tuple[str, ...]] = ()  # options that may grow after it has begun: it goes on
    adjustable: ClassVar[tuple[str, ...]] = ()  # options that may change after it has begun

    def __init__(self, config: Any, path: tuple[int, ...]) -> None:
        self.config, self.path = config, path

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return self.word

    def prepare(self, session: Session) -> None:
        """Make the networks that this stage needs; nothing by default."""

    def run(self, session: Session) -> dict[str, Any] | None:
        """Do the work; returns what the stage table of the report should show."""
        raise NotImplementedError


def new_objective(spec: dict[str, Any]) -> Any:
    """The objective {"id": ..., options} that a stage names, without networks: `setup` makes those."""
    options = {name: value for name, value in spec.items() if name != "id"}
    return registry.find("objective", spec["id"])(validate_plugin_config("objective", spec["id"], options))


def walk(stages: list[StageSpec], prefix: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """All leaf stages in the order they run; a stage that holds stages says how (`expand`)."""
    for index, spec in enumerate(stages):
        path = (*prefix, index)
        stage = registry.find("stage", spec.word)(spec.config, path)
        stage.word = spec.word
        if hasattr(stage, "expand"):
            for inner_path, inner in stage.expand():
                yield from walk(inner, inner_path)
        else:
            yield path, stage
