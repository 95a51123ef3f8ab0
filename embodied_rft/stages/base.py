"""What all stages share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from embodied_rft.options import StageSpec
from embodied_rft.registry import contract
from embodied_rft.runs.progress import Progress
from embodied_rft.runs.session import Session


@contract("stage")
class Stage:
    """A part of a recipe. `config` is an instance of the class's own `Config`."""

    Config: ClassVar[Any]
    Progress: ClassVar[type[Progress]] = Progress  # what a checkpoint keeps of how far it is
    word: str = ""  # set when the recipe is read
    measures: ClassVar[bool] = False  # changes neither agent nor buffer
    replaces_env: ClassVar[bool] = False  # what follows meets other environments
    extendable: ClassVar[tuple[str, ...]] = ()  # options that may grow after it has begun: it goes on
    adjustable: ClassVar[tuple[str, ...]] = ()  # options that may change after it has begun

    def __init__(self, config: Any, path: tuple[int, ...]) -> None:
        self.config, self.path = config, path

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return self.word

    def check(self, session: Session) -> None:
        """Refuse, before anything has run, what the environments do not give; nothing by default."""

    def expand(self) -> Iterator[tuple[tuple[int, ...], list[StageSpec]]] | None:
        """Lists of stages that run in place of this one, in their order, each under a path; None: it runs itself."""
        return None

    def prepare(self, session: Session) -> None:
        """Make the networks that this stage needs; nothing by default."""

    def run(self, session: Session) -> dict[str, Any] | None:
        """Do the work; returns what the stage table of the report should show."""
        raise NotImplementedError
