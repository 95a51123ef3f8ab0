"""What the docs show works: pages of plug-ins are run as they stand, in processes of their own; names exist."""

import collections
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import gymnasium
import pytest
import yaml

from embodied_rft import cli, registry
from embodied_rft.options import parse, to_plain
from embodied_rft.runs.catalogue import KINDS, TOPICS, of_dataclass, options_of
from embodied_rft.runs.recipe import Recipe, load_recipe, recipe_names
from tests.lab import ROOT

CHECK = """
import gymnasium, torch, corridor
import numpy as np
from embodied_rft import check_env, check_policy
from embodied_rft.pools.pool import make_pool
check_env("corridor/Reach-v0")
check_env("corridor/Board-v0", options={"size": 4})
board = make_pool("corridor/Board-v0", 2, kind="native", options={"size": 4})
board.reset(np.arange(2))
assert board.can_save
board = gymnasium.make("corridor/Board-v0", size=3, render_mode="ansi")
board.reset(seed=0)
assert sorted(board.render()) == sorted(".......xo\\n\\n")
env = gymnasium.make("corridor/Reach-v0")
spaces = dict(observation_space=env.observation_space, action_space=env.action_space)
check_policy(corridor.Line(corridor.Line.Config(), rng=torch.Generator(), **spaces), **spaces)
"""


RULE = """
import corridor, gymnasium
env = gymnasium.make("embodied_rft/TextJsonl-v0", path="problems.jsonl", held_out=0)
for reply, reward in (("8,849 m (survey 2020)", 1.0), ("8,849 m", 0.75), ("survey 2020", 0.25), ("", 0.0)):
    env.reset(seed=0)
    assert env.step(reply)[1] == reward, (reply, reward)
"""


RELATIVES = """
import awac, gymnasium, torch
from embodied_rft.learning.agent import build_agent
from embodied_rft.learning.learner import Learner, LearnerConfig
from embodied_rft.objectives import build_objective
from tests.lab.point import random_batch

box = gymnasium.spaces.Box(-1, 1, (2,))
for id in ("awac", "crr", "mcac"):
    agent = build_agent({"id": "gaussian", "hidden": [16]}, box, box, torch.Generator().manual_seed(0))
    objective = build_objective(id)
    objective.setup(agent)
    batch = random_batch(box, box)
    batch.notes["mc_return"][::2] = torch.nan
    learner = Learner(agent, objective, LearnerConfig())
    before = [p.clone() for part in (agent.policy, agent.parts["critic"]) for p in part.parameters()]
    learner.update(batch, torch.Generator())
    after = [p for part in (agent.policy, agent.parts["critic"]) for p in part.parameters()]
    assert all((old != new).any() for old, new in zip(before, after)), id
    assert id != "crr" or (objective.config.num_actions, objective.config.largest_weight) == (4, 20)
target, plain = (f(objective, agent, batch, torch.Generator()) for f in (awac.MCAC.td_target, awac.SAC.td_target))
seen = batch.notes["mc_return"]
expected = torch.stack([a if b.isnan() else max(a, b) for a, b in zip(plain, seen)])
assert torch.equal(target, expected) and (target != plain).any()
"""


def blocks(page, language):
    """The fenced blocks of a page of docs/, in their order."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with what the pages tell a reader to save."""
    folder = tmp_path_factory.mktemp("corridor")
    for page, name in (("plugins", "corridor"), ("objectives", "awac")):
        (folder / f"{name}.py").write_text("\n\n".join(blocks(page, "python")))
        (folder / f"{name}.yaml").write_text(blocks(page, "yaml")[0])
    (folder / "problems.jsonl").write_text(blocks("plugins", "json")[0])
    return folder


def run(project, *command, **environment):
    own = os.environ | environment
    return subprocess.run([sys.executable, *command], cwd=project, env=own, capture_output=True, text=True)


def test_the_examples_pass_the_checkers(project):
    done = run(project, "-c", CHECK)
    assert done.returncode == 0, done.stderr


def test_the_example_rule_judges_the_example_line(project):
    done = run(project, "-c", "import embodied_rft.envs.text\n" + RULE)
    assert done.returncode == 0, done.stderr
    line = json.loads(blocks("plugins", "json")[0])
    (project / "problems.jsonl").write_text(json.dumps({**line, "source": 7}))
    done = run(project, "-c", "import embodied_rft.envs.text\n" + RULE)
    assert "problems.jsonl, line 1: its rule fails on it: TypeError" in done.stderr, done.stderr


def test_the_lines_and_the_recipe_of_the_text_page_are_read(tmp_path, monkeypatch):
    lines = blocks("text", "json")[0]
    chat = re.search(r"a chat: `(.*?)`", (ROOT / "docs" / "text.md").read_text(encoding="utf-8"))[1]
    (tmp_path / "problems.jsonl").write_text(f'{lines}{{"prompt": {chat}, "answer": "Hello"}}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tree = yaml.safe_load(blocks("text", "yaml")[0])
    recipe = parse(Recipe, tree)
    env = gymnasium.make(recipe.env.id, **recipe.env.options, held_out=0)
    assert len(env.unwrapped.initial_observations()) == lines.count("\n") + 1 > 3


@pytest.mark.parametrize("example", blocks("turns", "python"))
def test_the_examples_of_the_page_on_turns_are_true(example):
    exec(example, {})


def success(project, *command):
    """Success before and after a recipe of the project."""
    done = run(project, "-m", "embodied_rft.cli", "train", *command)
    assert done.returncode == 0, done.stderr
    summary = json.loads((project / command[-1] / "summary.json").read_text())
    return summary["before"]["success"], summary["after"]["success"]


def test_the_example_recipe_learns(project):
    before, after = success(project, "corridor.yaml", "--run", "run")
    assert before < 0.3 and after > 0.9
    *_, stage, calm = json.loads((project / "run" / "summary.json").read_text())["stages"]
    assert calm["word"] == "calm" and calm["metrics"]["calm"] < 0 < calm["metrics"]["labelled"]
    assert stage["word"] == "returns" and stage["metrics"]["episodes"] == 100 and 10 < stage["metrics"]["return"] < 30


def test_the_example_agent_asks_its_critic(project):
    """Best of sixteen under the critic of IQL beats the first proposal of the same policy."""
    recipe = {
        "plugins": ["corridor"],
        "env": {"id": "corridor/Reach-v0", "num_envs": 16},
        "agent": {"id": "best_of", "proposals": 16, "hidden": [32, 32]},
        "buffer": {"capacity": 10_000},
        "stages": [
            {"demonstrate": {"episodes": 100, "noise": 1.0}},
            {"pretrain": {"objective": {"id": "iql", "gamma": 0.9}, "updates": 400}},
            {"evaluate": {"episodes": 100}},
        ],
    }
    (project / "best.yaml").write_text(yaml.safe_dump(recipe))
    returns = []
    for proposals in (16, 1):
        options = (f"agent.proposals={proposals}", "--run", f"best-{proposals}")
        done = run(project, "-m", "embodied_rft.cli", "train", "best.yaml", *options)
        assert done.returncode == 0, done.stderr
        (file,) = (project / f"best-{proposals}" / "evaluations").glob("*.json")
        returns.append(json.loads(file.read_text())["mean_return"])
    assert returns[0] > 1.2 * returns[1], returns


def test_without_updates_it_does_not(project):
    """The broken twin: the same recipe, nothing learned."""
    assert success(project, "corridor.yaml", "stages.2.pretrain.updates=0", "--run", "twin")[1] < 0.3


def test_the_example_with_a_critic_learns(project):
    before, after = success(project, "awac.yaml", "--run", "critic")
    assert before < 0.3 and after > 0.9


def test_with_equal_weights_it_does_not(project):
    """The broken twin: a clone of what a coin decided."""
    equal = "stages.2.pretrain.objective.inverse_temperature=0"
    assert success(project, "awac.yaml", equal, "--run", "equal")[1] < 0.5


def test_the_relatives_of_the_example_are_what_the_page_says(project):
    done = run(project, "-c", RELATIVES, PYTHONPATH=str(ROOT))  # other packages install a `tests` of theirs
    assert done.returncode == 0, done.stderr


def test_a_wrong_option_of_a_plugin_is_named(project):
    done = run(project, "-m", "embodied_rft.cli", "train", "corridor.yaml", "agent.sdt=1", "--run", "wrong")
    assert done.returncode == 2 and "did you mean 'std'" in done.stderr, done.stderr


# --- names on pages --------------------------------------------------------------------------------------------------

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md")) + sorted(ROOT.glob("*.md"))
ALGORITHMS = sorted((DOCS / "algorithms").glob("*.md"))
PARTS = ["Equations", "Options that matter", "Recipes", "Results", "What differs from the papers"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
each_algorithm = pytest.mark.parametrize("page", ALGORITHMS, ids=lambda page: page.stem)


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def headings(page):
    """What links may name behind a #, as GitHub makes it."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def section(page, title):
    """What stands under a heading of the second level."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.M | re.S)[1]


@each_page
def test_links_lead_somewhere(page):
    for target, place in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", prose(page)):
        assert (page.parent / target).exists(), target
        if place:
            assert place in headings(page.parent / target if target else page), f"{target}#{place}"


def test_the_index_leads_to_every_page():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    missing = [page for page in DOCS.rglob("*.md") if f"]({page.relative_to(DOCS).as_posix()})" not in text]
    assert missing == [DOCS / "index.md"]


@each_page
def test_recipes_that_are_trained_exist(page):
    named = re.findall(r"erft train ([\w./-]*\w)", page.read_text(encoding="utf-8"))
    for name in named:  # capitals stand for something else, files are the reader's own
        assert name in recipe_names() or name.endswith(".yaml") or name != name.lower(), name


COMMAND = re.compile(r"(?:^|[ /(`])((?:erft (?!VERB)[a-z]|torchrun |python -m )[^`#;\n]*)", re.M)


def commands(text):
    """What a page has its reader type: in fenced blocks, between backticks, in the tree of the README."""
    fenced = re.findall(r"^```(?:bash|text)\n(.*?)^```", text, flags=re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [found.strip() for part in (*fenced, *inline) for found in COMMAND.findall(part)]


def parsed(words):
    """Whether `erft` takes these words; what a page writes in capitals stands for something. A bare verb is a name."""
    words = [{"SEED": "0", "ID": "sac"}.get(word, word.replace("SEED", "0")) for word in words]
    return words[1:] == [] and words[0] in cli.VERBS or cli._run(words, debug=False) == 0


@each_page
def test_commands_are_understood(page, monkeypatch):
    """Every verb, every option, every name behind `list`; nothing is run."""
    for verb in cli.VERBS.keys() - {"list"}:
        monkeypatch.setitem(cli.VERBS, verb, functools.wraps(cli.VERBS[verb])(lambda *_, **__: None))
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command)
        if words[0] == "python":
            name = words[2].replace("NAME", "faults")
            source = importlib.util.find_spec(name).loader.get_source(name)
            assert all(word.strip("[]") in source for word in words[3:] if word.startswith("--")), command
            continue
        if words[0] == "torchrun":  # its own options end at --, or it takes ours for abbreviations of them
            assert words[3:6] == ["-m", "--", "embodied_rft.cli"], command
            words = ["erft", *words[6:]]
        assert parsed(words[1:]) or "corridor/" in command, command


@each_page
def test_overrides_that_a_page_names_fit_their_recipe(page):
    """Those of a command, and those that stand alone in a line, such as a row of a table, with one command."""
    for line in page.read_text(encoding="utf-8").replace("SEED", "0").splitlines():
        spans = [shlex.split(span) for span in re.findall(r"`([^`]+)`", line) if span.count("'") % 2 == 0]
        trained = [words[2:] for words in spans if words[:2] == ["erft", "train"]]
        alone = [words for words in spans if words and all(re.match(r"[a-z][\w.]*\.\w+=", word) for word in words)]
        for name, *behind in trained if len(trained) == 1 else ():
            for words in [behind, *alone] if name in recipe_names() else ():
                load_recipe(name, [word for word in words if re.match(r"[a-z][\w.]*=", word)])


@pytest.mark.parametrize(
    "text", ["`erft trian demo`", "```bash\n.venv/bin/erft train demo --sed 1\n```", "`erft list objective sca`"]
)
def test_a_command_with_a_mistake_is_seen(text):
    (command,) = commands(text)
    with pytest.raises((AssertionError, SystemExit)):
        assert parsed(shlex.split(command)[1:])


@each_algorithm
def test_a_page_of_algorithms_says_what_it_must(page):
    for title in PARTS:
        assert section(page, title).strip(), title
    rows = re.findall(r"^\| `([^`]+)`.* \|$", section(page, "Results"), re.M)
    assert set(rows) <= set(recipe_names())
    commands = re.findall(r"erft train ([\w/]+)", section(page, "Recipes"))
    assert commands and set(rows) <= set(commands), "results of recipes that the page does not name"


@each_algorithm
def test_numbers_of_a_page_of_algorithms_are_those_of_the_results(page):
    """Whoever measures anew changes both."""
    known = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "results.md", ROOT / "README.md"))
    for number in re.findall(r"\[\d+\.\d, [\d.]+\]|`[0-9a-f]{7}`", section(page, "Results")):
        assert number in known, f"{number} is neither in docs/results.md nor in README.md"


def test_every_objective_is_on_one_page_of_algorithms():
    tables = [section(page, "Objectives") for page in ALGORITHMS if "\n## Objectives\n" in page.read_text("utf-8")]
    found = collections.Counter(re.findall(r"^\| \[`(\w+)`\]\(\.\./options\.md#\1\) ", "".join(tables), re.M))
    assert found == collections.Counter(registry.shipped("objective"))


@pytest.fixture(scope="module")
def words():
    """Everything that a recipe may say: ids, stage words, options, their values."""
    named = [(id, options_of(kind, id)) for kind in KINDS if kind != "env" for id in registry.known(kind)]
    named += [(topic, of_dataclass(cls)) for topic, cls in TOPICS.items()]
    said = [text for id, options in named for text in (id, *(f"{o.name} {o.values}" for o in options))]
    return {word for text in [*said, *recipe_names()] for word in re.findall(r"\w+", text)}


@each_algorithm
def test_options_of_a_page_of_algorithms_exist(page, words):
    for text in re.findall(r"`([^`]+)`", section(page, "Options that matter")):
        for word in re.findall(r"[a-z]\w+", text):
            assert word in words, f"`{text}`: {word}"


# --- options ---------------------------------------------------------------------------------------------------------


def test_files_that_the_pages_name_exist():
    """`embodied_rft/pools/pool.py` as it lies, `pool.py` somewhere; what a page has its reader save aside."""
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    named = {name for page in pages for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8"))}
    gone = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}
    assert len(named) > 10 and gone <= {"corridor.py", "awac.py"}, gone


@pytest.mark.parametrize("kind", ["agent", "objective", "stage"])
def test_the_options_of_every_plugin_survive_the_dump(kind):
    """A run's recipe.yaml holds all defaults, and reading it gives the same run."""
    checked = 0
    for id in registry.known(kind):
        config = registry.config_of(kind, id)
        required = config and [f.name for f in dataclasses.fields(config) if is_required(f)]
        if config is None or required:
            continue
        text = yaml.safe_dump(to_plain(config()))
        assert parse(config, yaml.safe_load(text), id) == config(), id
        checked += 1
    assert checked > 2


def is_required(field):
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
