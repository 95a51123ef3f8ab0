"""Options of recipes and plug-ins: plain data to validated dataclasses, and errors that name the nearest known key.

Every part that a recipe names declares its options as a dataclass `Config`, the one place of their defaults; a key that
nothing reads is an error.
"""

from __future__ import annotations

import dataclasses
import enum
import keyword
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, ValidationInfo, WrapValidator
from pydantic.dataclasses import is_pydantic_dataclass, rebuild_dataclass
from pydantic.fields import FieldInfo

from embodied_rft import registry
from embodied_rft.names import UserError, nearest


class ConfigError(UserError):
    """A recipe or an option is wrong; the message says where, what was given and what is known."""


T = TypeVar("T")
MOST_LAYERS = 1_000  # more would take the machine before anything is said
STRICT = ConfigDict(extra="forbid")  # of every `Config`: an unknown key is an error


class Dataclass(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


@dataclass(frozen=True)
class StageSpec:
    """One stage of a recipe, validated: StageSpec("finetune", FinetuneConfig(...), "stages.3.finetune")."""

    word: str
    config: Any  # an instance of the stage class's `Config`
    path: str = ""  # where in the recipe, for messages


def parse_stages(items: Sequence[Any], path: str = "stages") -> list[StageSpec]:
    """Validate a list of stages, stages inside stages included.

    Args:
        items: each {word: options}, {word: None}, a bare word, or an already parsed StageSpec.
        path: where the list stands in the recipe, for messages.

    Raises:
        ConfigError: an unknown word or option, with its dotted path and the nearest known name.
    """
    if not isinstance(items, (list, tuple)):
        raise ConfigError(f"{path} must be a list of stages, each like `- evaluate: {{episodes: 200}}`; got {items!r}")
    return [_parse_stage(item, f"{path}.{index}") for index, item in enumerate(items)]


def _parse_stage(item: Any, path: str) -> StageSpec:
    if isinstance(item, StageSpec):
        return item
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, Mapping) or len(item) != 1:
        given = ", ".join(map(str, item)) if isinstance(item, Mapping) else repr(item)
        raise ConfigError(
            f"{path} must be one stage word with its options, as in `evaluate: {{episodes: 200}}`; got {given}"
        )
    ((word, options),) = item.items()
    config = validate_plugin_config("stage", str(word), options or {}, path=f"{path}.{word}")
    return StageSpec(str(word), config, f"{path}.{word}")


def walk(stages: list[StageSpec], prefix: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """All leaf stages in the order they run; a stage that holds stages says how (`expand`)."""
    for index, spec in enumerate(stages):
        path = (*prefix, index)
        stage = registry.find("stage", spec.word)(spec.config, path)
        stage.word = spec.word
        inside = stage.expand()
        if inside is None:
            yield path, stage
        else:
            for inner_path, inner in inside:
                yield from walk(inner, inner_path)


def _validate_stages(value: Any, _: Any, info: ValidationInfo) -> list[StageSpec]:
    prefix = (info.context or {}).get("path", "")
    return parse_stages(value, f"{prefix}.{info.field_name}".lstrip("."))


Stages = Annotated[list[StageSpec], WrapValidator(_validate_stages)]
"""Annotation of a field that holds stages: `stages: Stages = field(default_factory=list)` in a stage's `Config`."""


@dataclass(frozen=True)
class PluginSpec(WrapValidator):
    """See `plugin_spec`."""

    kind: str = ""  # of the registry


def plugin_spec(kind: str) -> PluginSpec:
    """Annotation of a field that names a plug-in with its options: it is checked, and completed with all defaults.

    `objective: Annotated[dict[str, Any], plugin_spec("objective")]` takes `sac` and `{id: sac, gamma: 0.98}` and holds
    {"id": "sac", "gamma": 0.98, ...}.
    """

    def validate(value: Any, _: Any, info: ValidationInfo) -> dict[str, Any]:
        path = f"{(info.context or {}).get('path', '')}.{info.field_name}".lstrip(".")
        spec = {"id": value} if isinstance(value, str) else value
        if not isinstance(spec, Mapping) or not isinstance(spec.get("id"), str):
            raise ConfigError(f"{path} needs an id, as in `{path.rpartition('.')[2]}: {{id: NAME}}`; got {value!r}")
        options = {key: option for key, option in spec.items() if key != "id"}
        config = validate_plugin_config(kind, spec["id"], options, path=path)
        return {"id": spec["id"], **(to_plain(config) or {})}

    return PluginSpec(validate, kind=kind)


def validate_plugin_config(kind: str, id: str, options: Mapping[str, Any], *, path: str = "") -> Any:
    """An instance of the `Config` dataclass of a registered plug-in.

    Args:
        kind: of the registry, such as "objective".
        id: of the plug-in.
        options: what the user wrote, without the id.
        path: where it was written, for messages; default `kind`.

    Raises:
        ConfigError: unknown id, unknown option, wrong value.
    """
    path = path or kind
    try:
        config = registry.config_of(kind, id)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if config is None:
        if options:
            raise ConfigError(f"{path}: {kind} {id!r} has no options; got {', '.join(map(str, options))}")
        return None
    return parse(config, options, path)


def parse(cls: type[T], mapping: object, path: str = "") -> T:
    """Build a dataclass from plain data, checking every key and value.

    Args:
        cls: a dataclass; nested dataclasses are parsed too.
        mapping: plain data, as from YAML; an instance of `cls` passes through.
        path: prefix of the dotted path in messages.

    Raises:
        ConfigError: all problems at once, one line each, with dotted path and nearest known key.
    """
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{path or cls.__name__} must be a mapping of options; got {mapping!r}")
    _forbid_unknown_keys(cls)
    try:
        made: T = TypeAdapter(cls).validate_python(_to_fields(cls, mapping), context={"path": path})
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(cls, problem, path, mapping) for problem in error.errors())) from None
    _check_depth(made, path)
    return made


def check_share(name: str, value: float, what: str) -> float:
    """Give back `value`, the share of something: ("noise", 0.3, "random moves").

    Raises:
        UserError: it is not in [0, 1].
    """
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}: the share of {what}, in [0, 1], is expected")
    return value


def refuse_idle(config: Dataclass, names: Iterable[str], why: str) -> None:
    """Refuse options that nothing would read: those of `names` that do not have their default.

    Args:
        config: an instance of a `Config` dataclass.
        names: of its fields.
        why: how the message goes on behind "NAME has no effect": "with credit 'grpo'".

    Raises:
        UserError: names the first one.
    """
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name in names:
        value, default, factory = getattr(config, name), fields[name].default, fields[name].default_factory
        if isinstance(default, FieldInfo):
            default = default.get_default(call_default_factory=True)
        elif factory is not dataclasses.MISSING:
            default = factory()
        if value != default:
            raise UserError(f"{to_key(name)} {to_plain(value)} has no effect {why}: leave it out")


def _check_depth(config: Any, path: str) -> None:
    """Refuse networks of so many layers that building them alone would take the machine."""
    for field_ in dataclasses.fields(config):
        value = vars(config).get(field_.name)
        deep = value if isinstance(value, int) and field_.name.endswith(("_layers", "_blocks")) else 0
        if isinstance(value, (tuple, list)) and field_.name.endswith("hidden"):
            deep = len(value)
        if deep > MOST_LAYERS:
            raise ConfigError(f"{path}.{field_.name}".lstrip(".") + f": {deep:,} layers; {MOST_LAYERS:,} at most")


def _forbid_unknown_keys(cls: Any) -> None:
    """Make a plug-in's dataclass strict, however it was declared."""
    if (getattr(cls, "__pydantic_config__", None) or {}).get("extra") == "forbid":
        return
    cls.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    if is_pydantic_dataclass(cls):
        rebuild_dataclass(cls, force=True)


def _to_fields(cls: Any, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that are Python keywords, such as `with`, belong to the field with an underscore, `with_`.

    A null that an older version wrote, where the option has moved into the plug-in beside it, said nothing and is left.
    """
    names = {f.name for f in dataclasses.fields(cls)}
    return {
        f"{key}_" if keyword.iskeyword(key) and f"{key}_" in names else key: value
        for key, value in mapping.items()
        if value is not None or key in names or not _home(cls, mapping, key)
    }


def to_key(name: str) -> str:
    """The key of a field: `with` of `with_`."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def _describe(cls: type, problem: Mapping[str, Any], path: str, given: Mapping[str, Any]) -> str:
    """One readable line for one pydantic problem with what was `given`."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # from a nested parse: it has its own path already
        return str(cause)
    location = [part for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    where = ".".join([path, *map(str, location)] if path else map(str, location))
    if problem["type"] == "unexpected_keyword_argument":
        home = _home(cls, given, str(location[-1])) if len(location) == 1 else ""
        return f"unknown key {where}; {home or nearest(str(location[-1]), _keys_at(cls, location[:-1]))}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where} is required and was not given"
    got = "" if isinstance(problem["input"], Mapping) else f"; got {problem['input']!r}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{got}"


def _home(cls: Any, given: Mapping[str, Any], key: str) -> str:
    """Where an unknown key of a dataclass belongs, if a plug-in that is named beside it has such an option."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        spec, value = next((p for p in typing.get_args(hint) if isinstance(p, PluginSpec)), None), given.get(name)
        id = value.get("id") if isinstance(value, Mapping) else value
        if spec is None or id not in registry.known(spec.kind):
            continue
        config = registry.config_of(spec.kind, str(id))
        if key in _keys_at(config, ()):
            return f"it is an option of the {spec.kind}: `{name}: {{id: {id}, {key}: {given[key]!r}}}`"
    return ""


def _keys_at(cls: Any, location: Sequence[Any]) -> list[str]:
    """The keys that are known where `location` points to inside a dataclass."""
    for part in location:
        hints = [typing.get_type_hints(c).get(part) for c in _dataclasses_in(cls)] if isinstance(part, str) else [cls]
        cls = next((hint for hint in hints if hint is not None), None)
    return [to_key(f.name) for c in _dataclasses_in(cls) for f in dataclasses.fields(c) if f.init]


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    """The dataclasses that a type hint mentions: of `list[A | None]`, A."""
    if dataclasses.is_dataclass(hint):
        yield hint
    elif isinstance(hint, types.UnionType) or typing.get_origin(hint) is not None:
        for argument in typing.get_args(hint):
            yield from _dataclasses_in(argument)


def to_plain(value: object) -> Any:
    """Dataclasses, enums, tuples and paths as what YAML and JSON know; a StageSpec as {word: options}."""
    if isinstance(value, StageSpec):
        return {value.word: to_plain(value.config) or {}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {to_key(f.name): to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, os.PathLike) else value
