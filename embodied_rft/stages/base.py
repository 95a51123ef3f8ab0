"""What all leaf stages share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from embodied_rft.session import Session


class Stage:
    """A leaf of a recipe. `config` is an instance of the class's own `Config`."""

    Config: ClassVar[Any]
    word: str = ""  # set when the recipe is read

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
