"""How far the running stage is: a typed record a stage, plain data in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self


@dataclass(kw_only=True)
class Progress:
    """All that a stage needs to go on beside what the session holds; a stage adds fields in a `Progress` of its own."""

    renamed: ClassVar[Mapping[str, str]] = {}  # keys of older checkpoints: fields

    before: dict[str, Any] | None = None  # decisions, updates and seconds of the run when the stage began
    evaluations: int = 0  # made in this stage

    def plain(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """What `plain` gave, also that of an older version; what is not known any more is left out."""
        known = {field.name for field in fields(cls)}
        named = {cls.renamed.get(key, key): value for key, value in saved.items()}
        return cls(**{name: value for name, value in named.items() if name in known})
