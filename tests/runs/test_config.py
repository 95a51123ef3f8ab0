"""Recipes: extends, overrides, nested stages, errors with path and nearest key, and a dump that loads to the same."""

import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pydantic.dataclasses
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft import options, registry
from embodied_rft.learning.objective import Objective
from embodied_rft.options import ConfigError, Stages, parse, parse_stages
from embodied_rft.policy import Policy
from embodied_rft.runs.recipe import BufferConfig, Recipe, dump_recipe, load_recipe, recipe_names
from embodied_rft.stages.base import Stage


class Mode(Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclass
class Learning:
    learning_rate: float = 3e-4
    layers: tuple[int, ...] = (256, 256)


@dataclass
class Until:
    success: float | None = None


class Finetune(Stage):
    @dataclass
    class Config:
        objective: str = "sac"
        updates: int = 100
        mode: Mode = Mode.FAST
        with_: str = "nobody"
        learner: Learning = field(default_factory=Learning)
        until: Until | None = None
        parts: list[Learning] = field(default_factory=list)
        file: Path | None = None


class Gaussian(Policy):
    @dataclass
    class Config:
        hidden: tuple[int, ...] = (256, 256)
        scale: float = 1.0


class Pretrain(Stage):
    @dataclass
    class Config:
        objective: Annotated[dict[str, Any], options.plugin_spec("objective")]


class Cloning(Objective):
    @dataclass
    class Config:
        share: float = 0.5


class Evaluate(Stage):
    @pydantic.dataclasses.dataclass
    class Config:  # a pydantic dataclass that forgot to forbid unknown keys
        episodes: int = 200


class Repeat(Stage):
    @dataclass
    class Config:
        times: int
        stages: Stages = field(default_factory=list)


class Bare(Stage):
    """A stage without options."""


@pytest.fixture(autouse=True)
def words(monkeypatch):
    monkeypatch.setattr(registry, "load_plugins", lambda: None)
    monkeypatch.setitem(registry._tables, "agent", {"gaussian": Gaussian})
    monkeypatch.setitem(registry._tables, "objective", {"bc": Cloning})
    table = {"pretrain": Pretrain, "finetune": Finetune, "evaluate": Evaluate, "repeat": Repeat, "bare": Bare}
    monkeypatch.setitem(registry._tables, "stage", table)


BASE = """
env: {id: some/Env-v0, num_envs: 8}
agent: {id: gaussian, hidden: [64, 64]}
stages:
  - bare
  - finetune: {updates: 20_000, with: scripted, learner: {learning_rate: 1e-3}}
  - repeat:
      times: 2
      stages:
        - finetune: {until: {success: 0.95}}
        - evaluate:
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def test_a_recipe_is_read_completely(base):
    recipe = load_recipe(base)
    assert (recipe.name, recipe.seed, recipe.env.num_envs, recipe.env.pool) == ("base", 0, 8, "auto")
    bare, finetune, repeat = recipe.stages
    assert (bare.word, bare.config, bare.path) == ("bare", None, "stages.0.bare")
    assert finetune.config.updates == 20_000 and finetune.config.with_ == "scripted"
    assert finetune.config.learner == Learning(learning_rate=1e-3)
    inner, evaluate = repeat.config.stages
    assert inner.path == "stages.2.repeat.stages.0.finetune" and inner.config.until.success == 0.95
    assert evaluate.config.episodes == 200


@pytest.mark.parametrize(
    "override, read",
    [
        ("stages.1.finetune.updates=7", lambda r: r.stages[1].config.updates == 7),
        ("stages.1.finetune.learner.learning_rate=1e-5", lambda r: r.stages[1].config.learner.learning_rate == 1e-5),
        ("stages.1.finetune.with=me", lambda r: r.stages[1].config.with_ == "me"),
        ("stages.2.repeat.stages.1.evaluate.episodes=3", lambda r: r.stages[2].config.stages[1].config.episodes == 3),
        ("stages.0={evaluate: {episodes: 1}}", lambda r: r.stages[0].config.episodes == 1),
        ("agent.scale=2e-1", lambda r: r.agent["scale"] == 0.2),
        ("agent.hidden=[8]", lambda r: r.agent["hidden"] == [8]),
        ("env.options.clearance=0.001", lambda r: r.env.options == {"clearance": 0.001}),
        ("logging.wandb=offline", lambda r: r.logging.wandb == "offline"),
        ("logging.wandb=off", lambda r: r.logging.wandb is False),
        ("seed=5", lambda r: r.seed == 5),
    ],
)
def test_overrides_reach_everything(base, override, read):
    assert read(load_recipe(base, [override]))
    assert dump_recipe(load_recipe(base, [override])) != dump_recipe(load_recipe(base)) or "wandb=off" in override


@pytest.mark.parametrize(
    "override, message",
    [
        ("env.num_env=8", "unknown key env.num_env; did you mean 'num_envs'?"),
        ("stages.1.finetune.update=8", "unknown key stages.1.finetune.update; did you mean 'updates'?"),
        (
            "stages.1.finetune.learner.learn_rate=1",
            "stages.1.finetune.learner.learn_rate; did you mean 'learning_rate'?",
        ),
        ("stages.1.finetune.until={sucess: 1}", "stages.1.finetune.until.sucess; did you mean 'success'?"),
        ("stages.1.finetune.parts=[{layer: [1]}]", "stages.1.finetune.parts.0.layer; did you mean 'layers'?"),
        ("stages.1.finetune.updates=many", "stages.1.finetune.updates: input should be a valid integer"),
        ("stages.1.finetune.mode=fats", "input should be 'fast' or 'slow'; got 'fats'"),
        (
            "stages.2.repeat.stages.0.finetune.updats=1",
            "stages.2.repeat.stages.0.finetune.updats; did you mean 'updates'?",
        ),
        (
            "stages.2.repeat.stages.1={evalute: {}}",
            "stages.2.repeat.stages.1.evalute: unknown stage 'evalute'; did you mean",
        ),
        ("stages.2.repeat={}", "stages.2.repeat.times is required"),
        ("stages.0={evaluate: {episode: 2}}", "stages.0.evaluate.episode; did you mean 'episodes'?"),
        ("stages.0.bare.x=1", "stages.0.bare: stage 'bare' has no options; got x"),
        ("stages.1.evaluate={}", "stages.1 must be one stage word with its options"),
        ("stages.1=7", "stages.1 must be one stage word"),
        ("stages={finetune: {}}", "stages must be a list of stages"),
        ("stages.9.finetune.updates=1", "stages.9 is not a position in a list of 3 (0 to 2)"),
        ("name.x=1", "it has no 'x'"),
        ("name={}", "name: input should be a valid string"),
        ("seed=-1", "seed must be in [0, 2**31)"),
        ("agent={hidden: [1]}", "agent needs an id"),
        ("agent=gausian", "agent: unknown agent 'gausian'; did you mean 'gaussian'?"),
        ("agent.hiden=[1]", "unknown key agent.hiden; did you mean 'hidden'?"),
        (
            "stages.1={pretrain: {objective: cb}}",
            "stages.1.pretrain.objective: unknown objective 'cb'; did you mean 'bc'?",
        ),
        (
            "stages.1={pretrain: {objective: {id: bc, shar: 1}}}",
            "stages.1.pretrain.objective.shar; did you mean 'share'?",
        ),
        ("stages.1={pretrain: {objective: {share: 1}}}", "stages.1.pretrain.objective needs an id"),
        ("stages.1={pretrain: {}}", "stages.1.pretrain.objective is required"),
        ("sed=1", "unknown key sed; did you mean 'seed'?"),
        ("seed", "is not of the form key=value"),
        ("seed=[1", "is not YAML"),
        ("logging.wandb=sometimes", "logging.wandb"),
    ],
)
def test_errors_say_where_and_what_was_meant(base, override, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(base, [override])
    assert message in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_an_override_changes_one_use_of_an_anchor(tmp_path):
    path = tmp_path / "twice.yaml"
    stages = "[pretrain: {objective: &copy {id: bc, share: 0.9}}, pretrain: {objective: *copy}]"
    path.write_text(f"env: {{id: x}}\nagent: {{id: gaussian}}\nstages: {stages}\n")
    stages = yaml.safe_load(dump_recipe(load_recipe(path, ["stages.1.pretrain.objective.share=0.1"])))["stages"]
    assert [stage["pretrain"]["objective"]["share"] for stage in stages] == [0.9, 0.1]


def test_all_problems_are_listed_at_once(base):
    with pytest.raises(ConfigError) as caught:
        load_recipe(base, ["env.num_env=1", "checkpoint_seconds=soon"])
    assert len(str(caught.value).splitlines()) == 2


def test_extends_merges_mappings_and_replaces_lists(base):
    child = base.with_name("child.yaml")
    child.write_text("extends: base.yaml\nenv: {num_envs: 2}\nagent: {hidden: [32]}\n")
    grandchild = base.with_name("grandchild.yaml")
    grandchild.write_text("extends: child\nseed: 3\n")
    recipe = load_recipe(grandchild)
    assert (recipe.name, recipe.seed, recipe.env.num_envs, recipe.env.id) == ("grandchild", 3, 2, "some/Env-v0")
    assert recipe.agent == {"id": "gaussian", "hidden": [32], "scale": 1.0} and len(recipe.stages) == 3
    base.write_text("extends: grandchild.yaml\n" + BASE)
    with pytest.raises(ConfigError, match="extends itself"):
        load_recipe(grandchild)


def test_a_named_mapping_is_merged_and_gives_way(base):
    child = base.with_name("child.yaml")
    child.write_text("extends: base.yaml\nagent: {<<: {scale: 1.5, hidden: [8]}, scale: 2.0}\n")
    assert load_recipe(child).agent == {"id": "gaussian", "hidden": [8], "scale": 2.0}


@pytest.mark.parametrize(
    "text, message",
    [
        ("env: {id: a}\nenv: {id: b}", "key 'env' is given twice, line 2"),
        ("- 1", "must hold a mapping"),
        ("env: [", "cannot be read as YAML"),
        ("env: !!python/object/apply:os.system [ls]", "cannot be read as YAML"),
        ("extends: nowhere\nseed: 1", "no recipe file and no shipped recipe 'nowhere'"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml|nowhere") as caught:
        load_recipe(path)
    assert message in str(caught.value)


def test_a_recipe_brings_its_own_modules(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    (base.parent / "my_words.py").write_text(
        "from embodied_rft import Stage, register\n\n\n@register('stage', 'wait')\nclass Wait(Stage):\n    pass\n"
    )
    recipe = load_recipe(base, ["plugins=[my_words]", "stages=[wait]"])
    assert recipe.stages[0].word == "wait" and recipe.plugins == ["my_words"]
    with pytest.raises(ConfigError, match="plugins: no module 'my_wrods'"):
        load_recipe(base, ["plugins=[my_wrods]"])


def test_shipped_recipes_are_found_by_name():
    assert "demo" in recipe_names()
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_recipe("dmeo")


def test_the_dump_is_complete_and_loads_to_the_same(base, tmp_path):
    recipe = load_recipe(base, ["stages.1.finetune.mode=slow", "stages.1.finetune.file=a/b.npz"])
    text = dump_recipe(recipe)
    plain = yaml.safe_load(text)
    assert plain["stages"][1]["finetune"]["with"] == "scripted" and plain["stages"][1]["finetune"]["mode"] == "slow"
    assert plain["stages"][2]["repeat"]["stages"][1] == {"evaluate": {"episodes": 200}}
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_recipe(again) == recipe and dump_recipe(load_recipe(again)) == text


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab é:#-{'\n1e5."),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text("abcdef", min_size=1), json_like, max_size=4), st.integers(0, 2**31 - 1), st.floats(0, 1)
)
def test_any_recipe_survives_its_dump(tmp_path_factory, options, seed, success):
    stages = [{"finetune": {"until": {"success": success}}}, {"repeat": {"times": 1, "stages": ["evaluate"]}}]
    tree = {"env": {"id": "e", "options": options}, "agent": {"id": "gaussian"}, "stages": stages, "seed": seed}
    recipe = parse(Recipe, tree)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_plugins_are_completed_with_their_defaults(base):
    recipe = load_recipe(base, ["stages=[pretrain: {objective: bc}]", "agent=gaussian"])
    assert recipe.stages[0].config.objective == {"id": "bc", "share": 0.5}
    assert recipe.agent == {"id": "gaussian", "hidden": [256, 256], "scale": 1.0}


def test_parsed_stages_pass_through():
    specs = parse_stages(["evaluate", {"finetune": None}])
    assert parse_stages(specs) == specs


def test_an_instance_passes_through_and_a_non_mapping_does_not():
    learning = Learning()
    assert parse(Learning, learning) is learning
    with pytest.raises(ConfigError, match="stages.0.x must be a mapping of options; got 7"):
        parse(Learning, 7, "stages.0.x")


def test_defaults_live_in_the_dataclasses():
    """The dump of a minimal recipe is exactly the dataclasses' defaults."""
    recipe = parse(Recipe, {"env": {"id": "e"}, "agent": {"id": "gaussian"}, "stages": ["finetune"]})
    plain = yaml.safe_load(dump_recipe(recipe))
    defaults: dict[str, Any] = options.to_plain(Finetune.Config())
    assert plain["stages"] == [{"finetune": defaults}]
    assert plain["buffer"] == options.to_plain(BufferConfig())


def test_a_folder_beside_a_recipe_is_a_module_only_where_the_recipe_names_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "gym").mkdir()  # several packages try `import gym`, and take what they find for the old Gym
    recipe, tree = tmp_path / "mine.yaml", {"env": {"id": "CartPole-v1"}, "agent": {"id": "gaussian"}, "stages": []}
    recipe.write_text(yaml.safe_dump(tree))
    load_recipe(recipe)
    assert str(tmp_path) not in sys.path
    (tmp_path / "corridor_beside.py").write_text("")
    recipe.write_text(yaml.safe_dump({**tree, "plugins": ["corridor_beside"]}))
    load_recipe(recipe)
    assert str(tmp_path) in sys.path
