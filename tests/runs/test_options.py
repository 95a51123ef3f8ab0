"""Listings of options: read from the declarations, complete, of third parties too, with the nearest name."""

import dataclasses
from typing import Annotated, Any, Literal

import gymnasium
import pytest
from pydantic import Field, NonNegativeInt, PositiveFloat

from embodied_rft import cli, registry
from embodied_rft.learning.objective import Objective
from embodied_rft.options import parse, plugin_spec
from embodied_rft.runs import catalogue
from embodied_rft.runs.catalogue import Option, describe_type, of_callable, of_dataclass, options_of


def rows(found):
    return {row.name: row for row in found}


def everything():
    registry.load_plugins()
    for kind in catalogue.KINDS:
        ids = gymnasium.registry if kind == "env" else registry.shipped(kind)
        yield from ((kind, id) for id in ids if kind != "env" or id.startswith("embodied_rft/"))


@dataclasses.dataclass
class Inner:
    depth: int = 2  # of the tree


@dataclasses.dataclass
class Base:
    """Options of somebody.

    Args:
        said: in the docstring.
    """

    rate: PositiveFloat = 0.5  # of learning
    share: Annotated[float, Field(ge=0, lt=1)] = 0.1  # None: all of it
    said: str = "x"
    long: dict[str, int] = dataclasses.field(  # over
        default_factory=lambda: {"a": 1}
    )


@dataclasses.dataclass
class Config(Base):
    rate: PositiveFloat = 0.25
    mode: Literal["a", "b"] | None = None  # how
    with_: list[str] = dataclasses.field(default_factory=list)  # whom
    inner: Inner = dataclasses.field(default_factory=Inner)
    models: str | dict[str, Inner] = "m"  # which
    objective: Annotated[dict[str, Any], plugin_spec("objective")] = dataclasses.field(default_factory=dict)  # what
    needed: NonNegativeInt = Field(default=3, le=9)  # a number


def test_name_default_values_and_meaning_are_those_of_the_declaration():
    assert of_dataclass(Config) == [
        Option("rate", "0.25", "number > 0", "of learning"),
        Option("share", "0.1", "number in [0, 1)", "null: all of it"),
        Option("said", "x", "text", "in the docstring."),
        Option("long", "{a: 1}", "mapping", "over"),
        Option("mode", "null", "a | b or null", "how"),
        Option("with", "[]", "list of text", "whom"),
        Option("inner.depth", "2", "integer", "of the tree"),
        Option("models", "m", "text or mapping", "which"),
        Option("models.inner.depth", "2", "integer", "of the tree"),
        Option("objective", "{}", "ID or {id: ID, its options}", "what"),
        Option("needed", "3", "integer >= 0 <= 9", "a number"),
    ]


def test_arguments_of_functions_and_of_chains_of_classes():
    class Below:
        """Below.

        Args:
            task: given by the class above.
            size: pixels,
                of an edge.
        """

        def __init__(self, task, *, size: tuple[int, int] = (3, 4)) -> None:
            """Nothing."""

    class Above(Below):
        def __init__(self, path: str, **more: Any) -> None:
            super().__init__(None, **more)

    assert of_callable(Above) == [
        Option("path", "required", "text", ""),
        Option("size", "[3, 4]", "[integer, integer]", "pixels, of an edge."),
    ]
    assert describe_type(Any) == "anything"


@pytest.mark.parametrize("kind, id", sorted(everything()))
def test_every_option_that_we_ship_says_what_it_means(kind, id):
    for row in options_of(kind, id):
        assert row.meaning and row.values and row.default, row


def test_defaults_that_are_listed_are_those_that_are_used():
    import yaml

    for kind, id in everything():
        config = registry.config_of(kind, id) if kind != "env" else None
        listed = [] if config is None else options_of(kind, id)
        if not listed or any(row.default == "required" for row in listed):
            continue
        made = parse(config, {row.name: yaml.safe_load(row.default) for row in listed if "." not in row.name})
        assert made == config(), id


def test_presets_have_the_options_of_what_they_are_based_on():
    assert rows(options_of("objective", "td3"))["policy_delay"].default == "2"
    assert rows(options_of("objective", "sac"))["policy_delay"].default == "1"
    assert rows(options_of("objective", "td3"))["gamma"] == rows(options_of("objective", "sac"))["gamma"]


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code


def test_the_command_prints_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    for kind in ("objective", "objectives"):
        assert run("list", kind, "sac") == 0
        said = capsys.readouterr().out
        assert "Soft actor-critic" in said.splitlines()[0]
        for row in options_of("objective", "sac"):
            (line,) = [line for line in said.splitlines() if line.strip().startswith(f"{row.name} ")]
            assert row.default in line and row.values in line and row.meaning[:20] in line
    for topic in catalogue.TOPICS:
        assert run("list", topic) == 0 and "meaning" in capsys.readouterr().out
    assert run("list", "env", "embodied_rft/TextJsonl-v0") == 0
    assert "held_out" in (said := capsys.readouterr().out) and "checker" in said and "render_mode" not in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("objective", "sacc"), "unknown objective 'sacc'; did you mean 'sac'?"),
        (("objektive", "sac"), "did you mean 'objective'?"),
        (("lerner",), "did you mean 'learner'?"),
        (("env", "embodied_rft/FetchPus-v0"), "did you mean 'embodied_rft/FetchPush-v0'?"),
    ],
)
def test_the_nearest_name(arguments, message, capsys):
    assert run("list", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_third_party_needs_no_code_for_it(monkeypatch, capsys):
    monkeypatch.setitem(registry._tables, "objective", dict(registry._tables["objective"]))

    @registry.register("objective", "mine")
    class Mine(Objective):
        """Something of mine with \x1b[31m colour."""

        Config = Config

    assert run("list", "objective", "mine") == 0
    said = capsys.readouterr().out
    assert "number in [0, 1)" in said and "of learning" in said and "\x1b" not in said
