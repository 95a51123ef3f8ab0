"""What may be set, read from where it is declared: name, default, values, meaning of every option.

Options of plug-ins are fields of their `Config`; the meaning is the comment on the field's line, or above it. Options
of environments, demonstrators and rules are keyword arguments; the meaning is in the docstring's "Args:". So a listing
cannot be out of date. Boundary: reads declarations; prints and validates nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import yaml
from pydantic import WrapValidator
from pydantic.fields import FieldInfo

from embodied_rft import registry
from embodied_rft.learning.learner import LearnerConfig
from embodied_rft.names import UserError, nearest
from embodied_rft.options import to_key, to_plain
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.making import find_spec
from embodied_rft.runs.log import LogConfig
from embodied_rft.runs.recipe import BufferConfig, Recipe

TOPICS: dict[str, Any] = {
    "recipe": Recipe, "env": EnvConfig, "buffer": BufferConfig, "learner": LearnerConfig, "logging": LogConfig,
}  # fmt: skip
KINDS = (
    "stage",
    "objective",
    "agent",
    "env",
    "demonstrator",
    "reward",
    "credit",
    "shaping",
    "curriculum",
    "parser",
    "logger",
)  # that have ids
NOT_SET = {"render_mode", "autoreset_mode", "num_envs"}  # of environments: not for a recipe's env.options
WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Option:
    """One row: Option("gamma", "0.99", "number in [0, 1]", "discount of one decision")."""

    name: str
    default: str  # as YAML; "required" if there is none
    values: str  # type and range
    meaning: str

    def __post_init__(self) -> None:
        """A recipe writes null for what Python calls None."""
        object.__setattr__(self, "meaning", re.sub(r"\bNone\b", "null", self.meaning))


def options_of(kind: str, id: str) -> list[Option]:
    """The options of a plug-in or an environment.

    Raises:
        ValueError: an unknown kind or id, with the nearest known one.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}; {nearest(kind, KINDS)}")
    if kind == "env":
        return of_environment(id)
    target, config = registry.find(kind, id), registry.config_of(kind, id)
    if config is not None:
        return of_dataclass(config)
    if kind in ("stage", "objective", "agent", "credit", "shaping", "curriculum"):
        return []
    skipped = {"reward": 2, "logger": 1}.get(kind, 0)  # what a rule judges and where a logger writes is no option
    return of_callable(target, skip=skipped, without={"step", "recipe", "prompt", "columns", "environment"})


# --- dataclasses -------------------------------------------------------------------------------------


def of_dataclass(cls: Any, prefix: str = "") -> list[Option]:
    """The fields of a dataclass; those of dataclasses inside it under dotted names, but for what is a topic itself."""
    hints, comments, rows = typing.get_type_hints(cls, include_extras=True), _comments(cls), []
    for each in dataclasses.fields(cls):
        if not each.init:
            continue
        name, hint, default, ranges = prefix + to_key(each.name), hints[each.name], _default(each), ""
        if isinstance(default, FieldInfo):
            ranges, default = _range(default.metadata), default.get_default(call_default_factory=True)
        topic = next((t for t, known in TOPICS.items() if hint is known), None)
        if topic is not None:
            needed = each.default is each.default_factory is dataclasses.MISSING
            rows.append(Option(name, "required" if needed else "{}", "mapping", f"see `erft list {topic}`"))
        elif dataclasses.is_dataclass(hint):
            rows += of_dataclass(hint, f"{name}.")
        else:
            values = " ".join(part for part in (describe_type(hint), ranges) if part)
            rows.append(Option(name, as_yaml(default), values, comments.get(each.name, "")))
            for place, inner in _inner_dataclasses(hint):
                rows += of_dataclass(inner, f"{name}.{place}")
    return rows


def _inner_dataclasses(hint: Any) -> Iterator[tuple[str, Any]]:
    """(place, type): of `str | dict[str, TinyConfig]` ("tiny.", TinyConfig), of `FlowOptions | None` ("", it)."""
    for part in typing.get_args(hint):
        if isinstance(part, type) and dataclasses.is_dataclass(part) and part not in TOPICS.values():
            key = re.sub(r"(VLM|LM)?Config$", "", part.__name__).lower() if typing.get_origin(hint) is dict else ""
            yield key and f"{key}.", part
        elif typing.get_origin(part) is dict:
            yield from _inner_dataclasses(part)


def _default(each: dataclasses.Field[Any]) -> Any:
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default


def as_yaml(value: object) -> str:
    """A default as a recipe would write it."""
    if value is dataclasses.MISSING or value is inspect.Parameter.empty or repr(value) == "PydanticUndefined":
        return "required"
    text = yaml.safe_dump(to_plain(value), default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def describe_type(hint: Any) -> str:
    """What may stand there: "number in [0, 1] or null", "min | mean"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        if any(isinstance(part, WrapValidator) for part in arguments):  # plug-ins and stages check themselves
            return "list of stages" if typing.get_origin(arguments[0]) is list else "ID or {id: ID, its options}"
        return " ".join(part for part in (describe_type(arguments[0]), _range(arguments[1:])) if part)
    if origin is Literal:
        return " | ".join(as_yaml(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in arguments)
    if origin in (list, tuple, Sequence):
        if origin is tuple and Ellipsis not in arguments:
            return f"[{', '.join(map(describe_type, arguments))}]"
        return f"list of {describe_type(arguments[0])}" if arguments else "list"
    if origin in (dict, Mapping) or hint is dict:
        return "mapping"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(str(member.value) for member in hint)
    return WORDS.get(hint, "mapping" if dataclasses.is_dataclass(hint) else "anything")


def _range(metadata: Sequence[Any]) -> str:
    """What constraints allow: "> 0", "in [0, 1)"."""
    found: dict[str, Any] = {}
    for part in metadata:
        inner = part.metadata if isinstance(part, FieldInfo) else [part]
        for constraint in inner:
            found |= {n: getattr(constraint, n) for n in ("gt", "ge", "lt", "le") if hasattr(constraint, n)}
    low, high = found.get("ge", found.get("gt")), found.get("le", found.get("lt"))
    if low is not None and high is not None:
        return f"in {'[' if 'ge' in found else '('}{low:g}, {high:g}{']' if 'le' in found else ')'}"
    if low is not None:
        return f"{'>=' if 'ge' in found else '>'} {low:g}"
    return "" if high is None else f"{'<=' if 'le' in found else '<'} {high:g}"


@functools.cache
def _comments(cls: Any) -> dict[str, str]:
    """{field: the comment on its line, else above it}, of the class that declares it last; else its docstring's."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        found |= _arguments(one.__doc__)
        try:
            source = textwrap.dedent(inspect.getsource(one))
            body = ast.parse(source).body[0]
        except (OSError, TypeError, SyntaxError, IndentationError):
            continue  # made by a program: its fields are declared elsewhere
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        found_in = [t for t in tokens if t.type == tokenize.COMMENT]
        comments = {t.start[0]: t.string.lstrip("# ") for t in found_in}
        alone = {t.start[0] for t in found_in if t.line.strip() == t.string}  # with no code on their line
        for node in body.body if isinstance(body, ast.ClassDef) else ():
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                said = [comments.get(line, "") for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)]
                above = node.lineno
                while not any(said) and above - 1 in alone:
                    above -= 1
                said = said if any(said) else [comments[line] for line in range(above, node.lineno)]
                text = " ".join(part for part in said if part and not part.startswith(("noqa", "type:", "fmt:")))
                if text:
                    found[node.target.id] = text
    return found


@runtime_checkable
class Describes(Protocol):
    """Makes environments of several ids, and tells of one of them by the `kwargs` that it is registered with."""

    def describe(self, **kwargs: Any) -> str:
        """One line."""

    def option_sources(self, **kwargs: Any) -> tuple[Callable[..., Any], ...]:
        """Whose keyword arguments are options, too."""


# --- keyword arguments -------------------------------------------------------------------------------


def of_environment(id: str) -> list[Option]:
    """What `env.options` may hold: the keyword arguments of what makes the environment.

    A creator with further options than its own says where they go.
    """
    from gymnasium.envs.registration import load_env_creator

    spec = find_spec(id)
    creators = [c for c in (spec.entry_point, spec.vector_entry_point) if c is not None]
    targets = [load_env_creator(c) if isinstance(c, str) else c for c in creators]
    sources = targets[0].option_sources(**spec.kwargs) if isinstance(targets[0], Describes) else ()
    meanings = {name: text for target in reversed([*targets, *sources]) for name, text in _documented(target).items()}
    rows: dict[str, Option] = {}
    for target in (*sources, targets[0]):
        for row in of_callable(target, without=NOT_SET | set(spec.kwargs)):
            rows.setdefault(row.name, dataclasses.replace(row, meaning=row.meaning or meanings.get(row.name, "")))
    return list(rows.values())


def of_callable(target: Callable[..., Any], *, skip: int = 0, without: set[str] = frozenset()) -> list[Option]:  # type: ignore[assignment]
    """The arguments of a function, or of a class and the classes that its further arguments go to."""
    meanings, rows = _documented(target), dict[str, Option]()
    for number, signature in enumerate(_signatures(target)):
        function, parameters = signature
        hints = _hints(function)
        for parameter in list(parameters)[skip:]:
            given_below = number and parameter.default is parameter.empty  # a subclass fills it
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or given_below:
                continue
            if parameter.name not in without:
                values = describe_type(hints.get(parameter.name, Any))
                row = Option(parameter.name, as_yaml(parameter.default), values, meanings.get(parameter.name, ""))
                rows.setdefault(parameter.name, row)
    return list(rows.values())


def _signatures(target: Any) -> Iterator[tuple[Any, Sequence[inspect.Parameter]]]:
    """(function, its parameters without self); of a class also of its bases, as long as `**options` go there."""
    if not inspect.isclass(target):
        yield target, list(inspect.signature(target).parameters.values())
        return
    for cls in target.__mro__:
        if "__init__" in vars(cls) and cls is not object:
            parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
            yield vars(cls)["__init__"], parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                return


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return {}


def _documented(target: Any) -> dict[str, str]:
    """{argument: what the docstrings of a function, or of a class and its bases, say of it}."""
    found: dict[str, str] = {}
    for one in reversed(target.__mro__) if inspect.isclass(target) else [target]:
        found |= _arguments(one.__doc__)
        found |= _arguments(getattr(vars(one).get("__init__"), "__doc__", None)) if inspect.isclass(one) else {}
    return found


def _arguments(docstring: str | None) -> dict[str, str]:
    """The entries below "Args:"."""
    lines = inspect.cleandoc(docstring or "").split("\n")
    if "Args:" not in lines:
        return {}
    entries: dict[str, str] = {}
    name = ""
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break
        if match := re.match(r"    (\w+): (.*)", line):
            name, entries[match[1]] = match[1], match[2]
        elif name and line.strip():
            entries[name] += f" {line.strip()}"
    return entries
