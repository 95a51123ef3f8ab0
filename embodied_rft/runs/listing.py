"""What `erft list` prints: everything that a recipe may name, with one line each, and the options of one of them."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from embodied_rft import registry
from embodied_rft.names import UserError, nearest, visible
from embodied_rft.runs.catalogue import KINDS, TOPICS, Describes, Option, of_dataclass, options_of
from embodied_rft.runs.recipe import describe_recipes

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec


def print_known(kinds: Sequence[str]) -> None:
    """Ids and first lines; under headings if there are several kinds."""
    for kind in kinds:
        entries = known_of(kind)
        width = max((len(id) for id in entries), default=0)
        if len(kinds) > 1:
            print(f"{kind}:")
        for id, line in sorted(entries.items()):
            print(visible(f"  {id:<{width}}  {line}".rstrip()))


def known_of(kind: str) -> dict[str, str]:
    """{id: one line} of everything of a kind, which is a plural."""
    if kind == "recipes":
        return describe_recipes()
    if kind == "envs":
        import gymnasium

        registry.load_plugins()
        return {id: describe_env(spec) for id, spec in gymnasium.registry.items() if id.startswith("embodied_rft/")}
    singular = kind.removesuffix("s")
    return {id: first_line(registry.find(singular, id)) for id in registry.known(singular)}


def describe_env(spec: EnvSpec) -> str:
    """One line about a registered environment: what its creator's `describe(**kwargs)` says, else its docstring."""
    from gymnasium.envs.registration import load_env_creator

    creator = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    return creator.describe(**spec.kwargs) if isinstance(creator, Describes) else first_line(creator)


def first_line(target: object) -> str:
    """The first line of the docstring of a class or function."""
    return (target.__doc__ or "").strip().partition("\n")[0]


def print_options(kind: str, id: str | None) -> None:
    """Every option of a part of a recipe, or of one plug-in, with default, values and meaning.

    Raises:
        ValueError: nothing has that name, with the nearest that has.
    """
    singular = kind.removesuffix("s")
    if id is None:
        if kind not in TOPICS:
            names = [*TOPICS, *(f"{name}s" for name in KINDS)]
            raise UserError(f"erft list {kind}: unknown kind; {nearest(kind, names)}")
        rows, about = of_dataclass(TOPICS[kind]), first_line(TOPICS[kind])
    else:
        if singular not in KINDS:
            raise UserError(f"erft list {kind} {id}: unknown kind; {nearest(singular, KINDS)}")
        rows = options_of(singular, id)
        about = known_of("envs").get(id, "") if singular == "env" else first_line(registry.find(singular, id))
    print(visible(f"{id or kind}: {about}".rstrip(": ")))
    if not rows:
        print("It has no options.")
        return
    table = [Option("option", "default", "values", "meaning"), *rows]
    widths = [max(len(getattr(row, name)) for row in table) for name in ("name", "default", "values")]
    widths = [min(width, most) for width, most in zip(widths, (40, 24, 40), strict=True)]
    room = max(30, shutil.get_terminal_size((160, 24)).columns - sum(widths) - 8)
    for row in table:
        head = "  ".join(f"{text:<{width}}" for text, width in zip((row.name, row.default, row.values), widths))
        first, *others = textwrap.wrap(row.meaning, room) or [""]
        print(visible(f"  {head}  {first}".rstrip()))
        for other in others:
            print(visible(" " * (sum(widths) + 8) + other))
